//! The `sail-train` command as the end-to-end tests start it: the same one line as the real one but for the commit, here
//! so that `cargo test` builds it before they run.

fn main() -> std::process::ExitCode {
    sail_train::cli::main("under test")
}
