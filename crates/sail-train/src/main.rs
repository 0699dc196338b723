//! The `sail-train` command; see [`sail_train::cli`].

fn main() -> std::process::ExitCode {
    sail_train::cli::main(sail_data::commit!())
}
