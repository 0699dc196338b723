//! Lets this crate's tests find libtorch at run time without `LD_LIBRARY_PATH`, and libtorch its own
//! dependencies (`--disable-new-dtags`: the path holds for what the libraries themselves load).

use std::env;

fn main() {
    let lib_dir = env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys hands on the directory of libtorch");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib_dir}");
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    println!("cargo:rerun-if-changed=build.rs");
}
