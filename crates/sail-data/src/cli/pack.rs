//! `sail-data pack`.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use super::options::{by_name, bytes, threads};
use super::terminal::{Bar, print};
use crate::spec::Layout;
use crate::tools::error::Result;
use crate::tools::pack::{Limit, PackOptions, Packed, pack};
use crate::tools::stats::text_count;

const AFTER_HELP: &str = "\
Examples:
  sail-data pack llava_v1_5_mix665k.json --images data/llava --out shards/llava
  sail-data pack 'annotations/*.jsonl' --images images --out shards --samples-per-shard 5000 --license CC-BY-4.0
  sail-data pack 'img2dataset/{00000..00099}.tar' --layout captions --out shards/captions

The same command goes on after a kill, and ends with the same bytes. Bad samples are listed in
`rejected.jsonl`, what was done in `pack.json`.";

/// Packs conversations and their images into tar shards
///
/// An input is JSON lines (`.jsonl`), a JSON array (`.json`) or a shard. Images are taken verbatim.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Args {
    /// JSON files or shards: paths with braces and globs
    #[arg(value_name = "INPUT", required = true)]
    inputs: Vec<String>,
    /// The folder of the shards
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Shards are called NAME-000000.tar
    #[arg(long, value_name = "NAME", default_value = "shard", value_parser = prefix)]
    prefix: String,
    /// Samples of a shard
    #[arg(long, value_name = "N", conflicts_with = "bytes_per_shard", value_parser = clap::value_parser!(u64).range(1..))]
    samples_per_shard: Option<u64>,
    /// Most bytes of a shard, such as 500MB or 1GiB [default: 1GB]
    #[arg(long, value_name = "B", value_parser = bytes)]
    bytes_per_shard: Option<u64>,
    /// Where the image names in JSON begin [default: the folder of the JSON file]
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,
    /// What is in shards: `conversations`, `captions`, `pages` or `interleaved`
    #[arg(long, default_value = "conversations", value_parser = by_name::<Layout>)]
    layout: Layout,
    /// Number of threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Licence of the samples that name none
    #[arg(long, value_name = "L")]
    license: Option<String>,
    /// Source of the samples that name none
    #[arg(long, value_name = "S")]
    source: Option<String>,
    /// A bad sample is an error instead of being skipped
    #[arg(long)]
    strict: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<ExitCode> {
        let limit = match self.samples_per_shard {
            Some(samples) => Limit::Samples(samples),
            None => Limit::Bytes(self.bytes_per_shard.unwrap_or(1_000_000_000)),
        };
        let options = PackOptions {
            inputs: self.inputs,
            out: self.out,
            prefix: self.prefix,
            limit,
            images: self.images,
            layout: self.layout,
            license: self.license,
            source: self.source,
            strict: self.strict,
        };
        let bar = Bar::new(None);
        let packed = threads(self.threads)?.install(|| pack(&options, &bar));
        bar.end();
        let packed = packed?;
        print(&summary(&options, &packed))?;
        // Nothing but bad samples is no success.
        Ok(if packed.samples == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn summary(options: &PackOptions, packed: &Packed) -> String {
    let mut text = format!(
        "{} in {} ({} bytes) in `{}`\n",
        some(packed.samples, "sample"),
        some(packed.shards as u64, "shard"),
        text_count(packed.bytes),
        options.out.display()
    );
    if packed.resumed > 0 {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{} of the shards were there already", packed.resumed);
    }
    let skipped: u64 = packed.rejected.values().sum();
    if skipped > 0 {
        let reasons: Vec<String> =
            packed.rejected.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let list = options.out.join("rejected.jsonl");
        let _ = writeln!(text, "{skipped} skipped: {}; see `{}`", reasons.join(", "), list.display());
    }
    text
}

/// A number of things.
fn some(number: u64, thing: &str) -> String {
    format!("{} {thing}{}", text_count(number), if number == 1 { "" } else { "s" })
}

fn prefix(name: &str) -> std::result::Result<String, String> {
    let safe = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.chars().all(safe) && !name.is_empty() {
        Ok(name.to_owned())
    } else {
        Err("it may have letters, digits, `-` and `_`".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_a_file_name() {
        assert!(prefix("a-b_1").is_ok());
        assert!(prefix("a/b").is_err() && prefix("a.b").is_err() && prefix("").is_err());
    }
}
