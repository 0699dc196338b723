//! `sail-data rebalance`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::options::{ShardArgs, SpecFile, bytes, read_spec};
use super::terminal::{Bar, print, save};
use crate::source::Source;
use crate::spec::SourceSpec;
use crate::tools::access::{find_shards, find_shards_in};
use crate::tools::error::{Result, ToolError};
use crate::tools::files::write_atomically;
use crate::tools::rebalance::{LEAST_MEMORY_BYTES, Options, rebalance, report};
use crate::weights;

const AFTER_HELP: &str = "\
Examples:
  sail-data rebalance 'shards/captions/*.tar' --layout captions --out captions.safetensors
  sail-data rebalance --spec runs/stage1/data.yaml --source caption --out captions.safetensors

Name the shards as the source in the configuration does, and give it `sampling_weights: captions.safetensors`.
A sample's weight is the mean over its n-grams of min(1, sqrt(T / f)), f the share of samples that have it.";

/// Gives samples sampling weights that make over-represented n-grams rarer
///
/// The text of all shards is read twice, as one source; images are not decoded, but in tar files they lie between the
/// texts and are read too. Memory is that of the counts and 4 bytes a sample.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Args {
    #[command(flatten)]
    shards: ShardArgs,
    /// A specification with `tokenizer` and `data`, such as the `data.yaml` of a run, instead of shards
    #[arg(long, value_name = "FILE", conflicts_with = "shards", help_heading = "How samples are read")]
    spec: Option<PathBuf>,
    /// Which source of the specification [default: its only one]
    #[arg(long, value_name = "NAME", conflicts_with = "shards", help_heading = "How samples are read")]
    source: Option<String>,
    /// The file of weights
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Words of an n-gram; characters where a script writes no spaces
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u16).range(1..=64))]
    n: u16,
    /// Share of the samples that an n-gram may have without lowering a weight
    #[arg(long, value_name = "T", default_value = "0.001", value_parser = share)]
    threshold: f64,
    /// Memory for counts, such as 64MiB
    #[arg(long, value_name = "B", default_value = "256MiB", value_parser = memory)]
    memory: u64,
    /// Writes the report for other programs
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Args {
    pub(super) fn run(self) -> Result<ExitCode> {
        let source = self.source()?;
        self.check_targets(&source)?;
        let options =
            Options { n: usize::from(self.n), threshold: self.threshold, memory_bytes: self.memory };
        let bar = Bar::new(Some(2 * source.shards.len()));
        let rebalanced = self.shards.threads()?.install(|| rebalance(&source, options, &bar));
        bar.end();
        let rebalanced = rebalanced?;
        write_atomically(&self.out, &rebalanced.to_bytes(&source)?)?;
        save(self.json.as_deref(), || format!("{:#}\n", json!(rebalanced.summary)))?;
        print(&report(&rebalanced.summary))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Whatever is written replaces what is there: nothing that is read, no device, no other kind of file.
    fn check_targets(&self, source: &Source) -> Result<()> {
        let read = source.shards.iter().map(Path::new).chain(self.spec.as_deref());
        let read: Vec<PathBuf> = read.filter_map(canonical).collect();
        let (out, json) = (("--out", self.out.as_path()), self.json.as_deref().map(|json| ("--json", json)));
        for (option, path) in [out].into_iter().chain(json) {
            let refuse = |what: &str| {
                let message = format!("`{option} {}` {what}", path.display());
                Err(ToolError::usage(message, "give a new name, or remove what is there"))
            };
            let Some(place) = canonical(path) else {
                return refuse("is in a folder that does not exist, or that cannot be read");
            };
            if read.contains(&place) {
                return refuse("is a file that is read");
            }
            if place.exists() && !place.is_file() {
                return refuse("is no file that could be replaced");
            }
        }
        if json.is_some_and(|(_, json)| canonical(json) == canonical(out.1)) {
            return Err(ToolError::usage("`--out` and `--json` are one file", "give each a name of its own"));
        }
        if self.out.exists() && !weights::is_file_of(&self.out) {
            return Err(ToolError::usage(
                format!("`--out {}` is there and holds no sampling weights", self.out.display()),
                "give a new name, or remove what is there",
            ));
        }
        Ok(())
    }

    fn source(&self) -> Result<Source> {
        let Some(path) = &self.spec else {
            return find_shards(self.shards.source("shards", self.shards.shards.clone()));
        };
        let SpecFile { data, .. } = read_spec(path)?;
        let names: Vec<String> = data.sources.iter().map(|source| format!("`{}`", source.name)).collect();
        let wanted = |source: &SourceSpec| self.source.as_ref().is_none_or(|name| *name == source.name);
        let mut sources: Vec<SourceSpec> = data.sources.into_iter().filter(wanted).collect();
        match (sources.pop(), sources.is_empty()) {
            // The weights that it had, or is to have, play no part.
            (Some(source), true) => {
                find_shards_in(SourceSpec { sampling_weights: None, ..source }, data.store)
            }
            _ => Err(ToolError::usage(
                format!("`{}` has the sources {}", path.display(), names.join(", ")),
                "choose one of them with `--source NAME`",
            )),
        }
    }
}

/// Where a file is, or would be in a folder that is there.
fn canonical(path: &Path) -> Option<PathBuf> {
    if let Ok(place) = path.canonicalize() {
        return Some(place);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some(folder.canonicalize().ok()?.join(path.file_name()?))
}

fn memory(text: &str) -> std::result::Result<u64, String> {
    match bytes(text)? {
        too_few if too_few < LEAST_MEMORY_BYTES => {
            Err(format!("expected at least {LEAST_MEMORY_BYTES} bytes"))
        }
        enough => Ok(enough),
    }
}

fn share(text: &str) -> std::result::Result<f64, String> {
    let share = text.parse().map_err(|_| "expected a number".to_owned())?;
    if share > 0.0 && share <= 1.0 {
        Ok(share)
    } else {
        Err("expected a number above 0 and at most 1".into())
    }
}
