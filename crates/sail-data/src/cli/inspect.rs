//! `sail-data inspect`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::options::DataArgs;
use super::terminal::{Colour, print, save};
use crate::tools::error::{Result, ToolError};
use crate::tools::inspect::{Paint, Which, page, report, tiles, view};

const AFTER_HELP: &str = "\
Examples:
  sail-data inspect shard-000000.tar --tokenizer weights/qwen2.5 --nth 3 --tiles
  sail-data inspect 'shards/*.tar' --key 000000033471 --html sample.html
  sail-data inspect --spec runs/stage1/data.yaml --nth 100

With an index beside a shard (`sail-data index`), `--nth` finds its sample at once.";

/// Shows a sample as the model sees it: turns, tokens with their labels, images and tiles
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Args {
    #[command(flatten)]
    data: DataArgs,
    /// The sample with this key
    #[arg(long, value_name = "KEY", conflicts_with = "nth")]
    key: Option<String>,
    /// The sample with this number, from 0, over all shards [default: 0]
    #[arg(long, value_name = "N")]
    nth: Option<u64>,
    /// Draws the tiles, on a terminal with colours
    #[arg(long)]
    tiles: bool,
    /// Writes a page with the tiles as pictures
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// When to write colours
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    color: Colour,
}

impl Args {
    pub(super) fn run(self) -> Result<ExitCode> {
        let colour = self.color.on_stdout();
        if self.tiles && !colour && self.html.is_none() {
            return Err(ToolError::usage(
                "tiles can only be drawn on a terminal with colours",
                "`--html FILE` shows them in a browser, `--color always` writes colours all the same",
            ));
        }
        let setup = self.data.open()?;
        let which = self.key.map_or(Which::Nth(self.nth.unwrap_or(0)), Which::Key);
        let view = self.data.threads()?.install(|| view(&setup, &which))?;
        save(self.html.as_deref(), || page(&view))?;
        let mut text = report(&view, Paint(colour));
        if self.tiles && colour {
            text.push('\n');
            text.push_str(&tiles(&view, columns()));
        }
        print(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Width of the terminal, as far as it is known.
fn columns() -> usize {
    std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok()).unwrap_or(80)
}
