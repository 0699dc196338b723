//! Which libtorch this process has loaded.

use crate::ffi;

/// The version of the loaded libtorch, as `2.11.0`. That of its headers may differ: a library is found when the process
/// starts.
pub fn version() -> String {
    // `TORCH_ABI_VERSION` of `torch/headeronly/version.h`: major, minor and patch are its highest bytes.
    let [major, minor, patch, ..] = ffi::aoti_torch_abi_version().to_be_bytes();
    format!("{major}.{minor}.{patch}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_is_the_one_that_tch_is_written_for() {
        assert!(super::version().starts_with("2.11."), "{}", super::version());
    }
}
