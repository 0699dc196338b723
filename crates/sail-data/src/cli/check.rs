//! `sail-data check`.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::options::DataArgs;
use super::terminal::{Bar, save};
use crate::tools::check::{Checked, Problem, check};
use crate::tools::error::Result;
use crate::tools::page::one_line;
use crate::tools::stats::text_count;

const AFTER_HELP: &str = "\
Examples:
  sail-data check 'shards/*.tar'
  sail-data check 'shards/*.tar' --tokenizer weights/smollm2 --tokens-per-pack 8192 --json problems.json
  sail-data check --spec runs/stage1/data.yaml

Exit code 1 if anything is wrong.";

/// Reads everything as training would, and lists what is wrong
///
/// Annotations are parsed, every image is decoded, and text is tokenised when a tokenizer is given.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Args {
    #[command(flatten)]
    data: DataArgs,
    /// Writes all problems for other programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Args {
    pub(super) fn run(self) -> Result<ExitCode> {
        let setup = self.data.open()?;
        let bar = Bar::new(Some(setup.sources.iter().map(|source| source.shards.len()).sum()));
        let mut problems = Vec::new();
        let checked = self.data.threads()?.install(|| {
            check(&setup, &bar, |problem| {
                bar.print(&line(&problem))?;
                if self.json.is_some() {
                    problems.push(problem);
                }
                Ok(())
            })
        });
        bar.end();
        let checked = checked?;
        save(self.json.as_deref(), || format!("{:#}\n", json!({"summary": checked, "problems": problems})))?;
        super::terminal::print(&summary(&checked, setup.counts_text))?;
        Ok(if checked.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn line(problem: &Problem) -> String {
    match problem {
        Problem::BadSample { shard, key, reason, detail, .. } => {
            format!("{}  {}  {reason}: {}\n", one_line(shard), one_line(key), one_line(detail))
        }
        Problem::BrokenShard { detail, .. } | Problem::UnfitWeights { detail, .. } => {
            format!("{}\n", one_line(detail))
        }
    }
}

fn summary(checked: &Checked, tokenised: bool) -> String {
    let bad: u64 = checked.bad.values().sum();
    let mut text = String::new();
    if !checked.is_clean() {
        text.push('\n');
        let rows = checked.bad.iter().map(|(reason, count)| (reason.as_str(), *count));
        let shards = [("broken shards", checked.broken_shards), ("unfit weights", checked.unfit_weights)];
        for (reason, count) in rows.chain(shards.into_iter().filter(|(_, count)| *count > 0)) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {reason:<18} {:>8}", text_count(count));
        }
        text.push('\n');
    }
    let tokenised = if tokenised { "" } else { "; text was not tokenised" };
    let _ = writeln!(
        text,
        "{} samples with {} images in {} shard{}: {} bad{tokenised}",
        text_count(checked.samples),
        text_count(checked.images),
        checked.shards,
        if checked.shards == 1 { "" } else { "s" },
        text_count(bad)
    );
    text
}
