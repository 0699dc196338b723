//! `sail-train config`: a configuration checked, shown, and described for editors.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::print;
use crate::config::{self, Config};
use crate::error::Result;

#[derive(Debug, Args)]
#[command(about = "Checks or shows a configuration without running it")]
pub(super) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Lists every fault of a stage or a curriculum and of the YAML files that it names
    ///
    /// `sail-train doctor --config FILE` also looks at the data and the weights.
    #[command(after_help = "Example:\n  sail-train config check configs/demo/curriculum.yaml")]
    Check(File),
    /// Prints it with every default filled in
    #[command(
        after_help = "Example:\n  sail-train config show configs/demo/stage2.yaml --set train.projector.lr=1e-4"
    )]
    Show(File),
    /// Prints the JSON Schema of configurations, which editors complete and check by
    #[command(after_help = "Example:\n  sail-train config schema > schema.json")]
    Schema,
}

#[derive(Debug, Args)]
struct File {
    /// A stage, or a curriculum of stages
    file: PathBuf,
    /// Overrides a value, as in training
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
}

/// Runs one of the commands.
pub(super) fn run(options: Options) -> Result<ExitCode> {
    match options.command {
        Command::Check(File { file, set }) => {
            let what = match config::load(&file, &set)? {
                Config::Stage(_) => "a stage".to_owned(),
                Config::Curriculum(curriculum) => {
                    format!("a curriculum of {} stages", curriculum.stages.len())
                }
            };
            print(format_args!("{}: no faults, {what}\n", file.display()))?;
        }
        Command::Show(File { file, set }) => print(config::load(&file, &set)?.to_yaml())?,
        Command::Schema => print(format_args!("{:#}\n", config::schema()))?,
    }
    Ok(ExitCode::SUCCESS)
}
