//! The `sail-data` command; see [`sail_data::cli`].

fn main() -> std::process::ExitCode {
    sail_data::cli::main(sail_data::commit!())
}
