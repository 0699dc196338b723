//! The command `doctor`: its arguments; what it looks at is in [`crate::doctor`].

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use super::print;
use crate::config;
use crate::doctor::{State, examine};
use crate::error::{Error, Result};
use crate::output;

const HELP: &str = "\
Examples:
  sail-train doctor
  sail-train doctor --folder /scratch/runs --config stage2.yaml

`poor` is what training can do without, `BAD` what it fails for. Exit code 1 if anything is bad.";

/// Says what this machine has that training needs, what is missing, and how to mend it
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Options {
    /// Where runs are to be kept: 128 MB are written there, and removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    folder: PathBuf,
    /// Also looks for the data, weights and tokenizers of a stage or a curriculum
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides a value of the configuration, as in training
    #[arg(long, value_name = "PATH=VALUE", requires = "config")]
    set: Vec<String>,
    /// Writes what was found for other programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Looks, and says what it found.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let config = options.config.as_deref().map(|file| config::load(file, &options.set)).transpose()?;
    if let Some(out) = &options.json {
        output::check(out, &[])?;
    }
    let findings = examine(&options.folder, config.as_ref());
    print(&findings)?;
    if let Some(out) = &options.json {
        let text = format!("{:#}\n", serde_json::json!(findings));
        output::replace(out, |path| fs::write(path, text).map_err(Error::io(path)))?;
    }
    Ok(if findings.worst() == State::Bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
