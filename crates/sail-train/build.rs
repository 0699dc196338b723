//! Lets the binary find libtorch at run time without `LD_LIBRARY_PATH`, and libtorch its own
//! dependencies (`--disable-new-dtags`: the path holds for what the libraries themselves load).

use std::env;

fn main() {
    let lib_dir = env::var("DEP_SAIL_TORCH_LIB").expect("sail-torch hands on the directory of libtorch");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib_dir}");
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    println!("cargo:rerun-if-changed=build.rs");
}
