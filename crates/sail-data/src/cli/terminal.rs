//! Standard output, standard error, colours, and how far a command is.

use std::io::{IsTerminal, Write};
use std::path::Path;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::tools::error::{Result, ToolError};
use crate::tools::files::write_atomically;
use crate::tools::walk::Progress;

/// When to write colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Colour {
    /// On a terminal, unless `NO_COLOR` is set
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl Colour {
    /// Whether standard output gets colours.
    pub(super) fn on_stdout(self) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => std::io::stdout().is_terminal() && wanted(),
        }
    }
}

/// Whether standard error gets colours.
pub(super) fn colour_on_stderr() -> bool {
    std::io::stderr().is_terminal() && wanted()
}

fn wanted() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !refused && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Prints a result. A reader that has gone (`| head`) has seen what it wanted.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(ToolError::io("write", Path::new("standard output"))(error))
        }
        _ => Ok(()),
    }
}

/// Prints a line on standard error, where nobody may be listening.
pub(super) fn warn(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Writes a file of results for other programs or a browser.
pub(super) fn save(path: Option<&Path>, contents: impl FnOnce() -> String) -> Result<()> {
    match path {
        // A pipe or a device is written to, not replaced.
        Some(path) if path.exists() && !path.is_file() => {
            std::fs::write(path, contents()).map_err(ToolError::io("write", path))
        }
        Some(path) => write_atomically(path, contents().as_bytes()),
        None => Ok(()),
    }
}

/// A bar on standard error, when that is a terminal.
#[derive(Debug)]
pub(super) struct Bar {
    bar: ProgressBar,
    samples: std::sync::atomic::AtomicU64,
}

impl Bar {
    /// For this many shards; `None` when that is not known before.
    pub(super) fn new(shards: Option<usize>) -> Self {
        let target = ProgressDrawTarget::stderr_with_hz(8);
        let bar = ProgressBar::with_draw_target(shards.map(|shards| shards as u64), target);
        let template = match shards {
            Some(_) => "{elapsed_precise} {wide_bar} {pos}/{len} shards, {msg}",
            None => "{elapsed_precise} {spinner} {pos} shards, {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message("0 samples");
        Self { bar, samples: std::sync::atomic::AtomicU64::new(0) }
    }

    /// Prints a line of the result above the bar.
    pub(super) fn print(&self, text: &str) -> Result<()> {
        self.bar.suspend(|| print(text))
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Progress for Bar {
    fn samples(&self, samples: u64) {
        let before = self.samples.fetch_add(samples, std::sync::atomic::Ordering::Relaxed);
        self.bar.set_message(format!("{} samples", before + samples));
    }

    fn shard(&self) {
        self.bar.inc(1);
    }
}
