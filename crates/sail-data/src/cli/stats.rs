//! `sail-data stats`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::options::DataArgs;
use super::terminal::{Bar, print, save, warn};
use crate::tools::error::{Result, with_causes};
use crate::tools::stats::{Stats, page, report};

const AFTER_HELP: &str = "\
Examples:
  sail-data stats 'shards/*.tar' --tokenizer weights/qwen2.5 --tokens-per-pack 8192
  sail-data stats --spec runs/stage1/data.yaml --html stats.html

Each histogram runs from the smallest to the largest value; a last bar holds what lies far above
the 99th percentile. Shards whose names differ in their last number are one source.";

/// Distributions of images, tiles, tokens, licences and sources
///
/// Annotations and image headers are read, pixels are not decoded. Memory does not grow with the data.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Args {
    #[command(flatten)]
    data: DataArgs,
    /// Writes the numbers for other programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes a page with histograms
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Args {
    pub(super) fn run(self) -> Result<ExitCode> {
        let setup = self.data.open()?;
        let bar = Bar::new(Some(setup.sources.iter().map(|source| source.shards.len()).sum()));
        let stats = self.data.threads()?.install(|| Stats::measure(setup, &bar));
        bar.end();
        let stats = stats?;
        save(self.json.as_deref(), || format!("{:#}\n", stats.to_json()))?;
        save(self.html.as_deref(), || page(&stats))?;
        print(&report(&stats))?;
        for (_, error) in &stats.broken {
            warn(&format!("error: {}", with_causes(error)));
        }
        Ok(if stats.broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
