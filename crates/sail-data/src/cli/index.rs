//! `sail-data index`.

use std::path::Path;
use std::process::ExitCode;

use rayon::prelude::*;

use super::options::threads;
use super::terminal::{print, warn};
use crate::source::Source;
use crate::spec::SourceSpec;
use crate::store::is_remote;
use crate::tools::access::find_shards;
use crate::tools::error::{Result, ToolError, with_causes};
use crate::tools::index::write_index;

/// Writes `SHARD.idx` beside each tar: where its samples begin
///
/// The format is that of Megatron-Energon: 64-bit little-endian offsets of every sample, then of the end mark.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  sail-data index 'shards/*.tar'")]
pub(super) struct Args {
    /// Shards: paths with braces and globs
    #[arg(value_name = "SHARD", required = true)]
    shards: Vec<String>,
    /// Number of threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl Args {
    pub(super) fn run(self) -> Result<ExitCode> {
        if let Some(url) = self.shards.iter().find(|shard| is_remote(shard)) {
            return Err(ToolError::usage(
                format!("`{url}` is not a local file"),
                "index a local copy, and store the index beside the shard",
            ));
        }
        if let Some(lines) =
            self.shards.iter().find(|shard| Path::new(shard).extension().is_some_and(|e| e == "jsonl"))
        {
            return Err(ToolError::usage(
                format!("`{lines}` is no tar archive"),
                "JSON lines need no index; streams enter them at any line",
            ));
        }
        let source: Source = find_shards(SourceSpec::new("shards", self.shards))?;
        let written: Vec<_> = threads(self.threads)?.install(|| {
            (0..source.shards.len()).into_par_iter().map(|shard| write_index(&source, shard)).collect()
        });
        let mut code = ExitCode::SUCCESS;
        for index in written {
            match index {
                Ok((path, samples)) => print(&format!("{path}: {samples} samples\n"))?,
                Err(error) => {
                    warn(&format!("error: {}", with_causes(&error)));
                    code = ExitCode::FAILURE;
                }
            }
        }
        Ok(code)
    }
}
