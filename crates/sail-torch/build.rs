//! Compiles `csrc/` against the libtorch that torch-sys links, and hands its directory on.

use std::env;
use std::path::PathBuf;

fn main() {
    let lib_dir = PathBuf::from(
        env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys hands on the directory of libtorch"),
    );
    // `<torch>/lib` of a wheel or of a libtorch archive; the headers lie beside it.
    let torch = lib_dir.parent().expect("the library directory has a parent");
    println!("cargo:rerun-if-changed=csrc");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("csrc/shim.cpp")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .warnings(false)
        .compile("sail_torch_shim");
    // So that this crate's tests find libtorch, and libtorch its own dependencies, without a variable.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib_dir.display());
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    // Read by the build scripts of binaries: DEP_SAIL_TORCH_LIB.
    println!("cargo:lib={}", lib_dir.display());
}
