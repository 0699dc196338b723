//! The `sail-data` command as the tests of the documentation start it: the same one line as the real one but for the
//! commit, here so that `cargo test` builds it before they run.

fn main() -> std::process::ExitCode {
    sail_data::cli::main("under test")
}
