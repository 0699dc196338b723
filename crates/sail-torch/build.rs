//! Compiles `csrc/` against the libtorch that torch-sys links, and hands its directory on.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    let lib_dir = PathBuf::from(
        env::var_os("DEP_TCH_LIBTORCH_LIB").expect("torch-sys hands on the directory of libtorch"),
    );
    // `<torch>/lib` of a wheel or of a libtorch archive; the headers lie beside it.
    let torch = lib_dir.parent().expect("the library directory has a parent");
    println!("cargo:rerun-if-changed=csrc");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .files(
            [
                "ops",
                "fused",
                "loss",
                "recompute",
                "cpu_memory",
                "device",
                "profiler",
                "store",
                "group",
                "gloo",
                "nccl",
                "stacks",
            ]
            .map(|name| format!("csrc/{name}.cpp")),
        )
        .include("csrc/gloo_api")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        // Else a loop with a choice or a root in it is no vector: nobody asks for the traps and codes of such operations.
        .flag("-fno-trapping-math")
        .flag("-fno-math-errno")
        .warnings(false);
    // libtorch's loops over threads are templates, and GCC's runtime is the one that it has loaded: they have one name.
    if build.get_compiler().is_like_clang() {
        println!(
            "cargo:warning=compiled by clang: norms, gates and rotations use one thread; g++ makes them use all"
        );
    } else {
        build.flag("-fopenmp");
        println!("cargo:rustc-link-lib=gomp");
    }
    if let Some(headers) = nccl_headers(torch) {
        build.includes(headers).define("SAIL_WITH_NCCL", None);
    }
    if env::var_os("CARGO_FEATURE_ADDRESS_SANITIZER").is_some() {
        build.opt_level(1).flag("-g1").flag("-fsanitize=address").flag("-fno-omit-frame-pointer");
        println!("cargo:rustc-link-lib=asan");
    }
    build.compile("sail_torch_shim");
    // So that this crate's tests find libtorch, and libtorch its own dependencies, without a variable.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib_dir.display());
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    // Read by the build scripts of binaries: DEP_SAIL_TORCH_LIB.
    println!("cargo:lib={}", lib_dir.display());
}

/// The headers of NCCL and CUDA: those of the wheels beside torch's, where this libtorch has CUDA.
fn nccl_headers(torch: &Path) -> Option<[PathBuf; 2]> {
    if !torch.join("lib/libtorch_cuda.so").exists() {
        return None;
    }
    let site_packages = torch.canonicalize().ok()?.parent()?.join("nvidia");
    let headers = [site_packages.join("nccl/include"), site_packages.join("cu13/include")];
    let found = headers[0].join("nccl.h").exists() && headers[1].join("cuda_runtime_api.h").exists();
    if !found {
        println!(
            "cargo:warning=libtorch has CUDA, but no headers of NCCL and CUDA are beside it: built without NCCL"
        );
    }
    found.then_some(headers)
}
