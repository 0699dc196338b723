//! What is shown of what happens: the options `-v`, `-q` and `--log-format`, and where the log goes.

use std::io::IsTerminal;

use clap::{ArgAction, ValueEnum};
use sail_data::cli::log::filter_from_env;
use tracing_subscriber::filter::{Directive, EnvFilter};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;

use crate::error::{Error, Result};
use crate::events::{Console, SAID};
use crate::world::Place;

/// Options of every command.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogArgs {
    /// Shows more of the log; twice also that of libraries
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "quiet")]
    verbose: u8,
    /// Shows errors alone, beside results on standard output
    #[arg(short, long, global = true)]
    quiet: bool,
    /// How what happens is written to standard error and to a run's `log` folder
    #[arg(long, value_name = "FORMAT", default_value = "text", global = true)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// Lines for people, with bars on a terminal
    Text,
    /// An object of JSON a line, for programs
    Json,
}

impl LogArgs {
    /// Begins to log, and gives what else is printed with.
    ///
    /// # Errors
    /// [`Error::Usage`] for a `SAIL_LOG` that is no filter.
    pub(super) fn start(&self) -> Result<Console> {
        let json = self.log_format == LogFormat::Json;
        let console = Console::new().talking(!self.quiet).logging_alone(json);
        // Among ranks one tells what happens, the others what is wrong; their files have it all.
        let is_main = !Place::from_env().is_ok_and(|place| !place.is_main());
        // What is said is shown whatever part of the log is asked for.
        let said = format!("{SAID}={}", if self.quiet { "error" } else { "info" });
        let wished = filter_from_env().map_err(|wrong| Error::usage(wrong.what, wrong.hint))?;
        let shown =
            wished.map_or_else(|| self.filter(is_main), |wished| wished.add_directive(directive(&said)));
        let stderr = {
            let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            // A log that nobody can read any more is no reason to end a run.
            let layer = tracing_subscriber::fmt::layer().with_ansi(colour).log_internal_errors(false);
            let layer = layer.with_writer(console.clone());
            if json {
                layer.json().flatten_event(true).with_filter(shown).boxed()
            } else {
                // What is said is printed without being an event.
                layer
                    .with_target(false)
                    .with_filter(shown.add_directive(directive(&format!("{SAID}=off"))))
                    .boxed()
            }
        };
        let file = {
            let layer = tracing_subscriber::fmt::layer().with_ansi(false).log_internal_errors(false);
            let layer = layer.with_writer(console.file());
            // Also where the terminal is to be quiet, or to show a part alone.
            let kept = Self { quiet: false, ..*self }.filter(true);
            if json {
                layer.json().flatten_event(true).with_filter(kept).boxed()
            } else {
                layer.with_target(false).with_filter(kept).boxed()
            }
        };
        Registry::default().with(vec![stderr, file]).init();
        Ok(console)
    }

    /// As the options say it.
    fn filter(&self, is_main: bool) -> EnvFilter {
        let own = |level: &str| {
            ["sail_data", "sail_model", "sail_torch", "sail_train"]
                .map(|name| format!("{name}={level}"))
                .join(",")
        };
        let usual = match self.verbose {
            _ if self.quiet => "error".to_owned(),
            0 if is_main => "info".to_owned(),
            0 => "warn".to_owned(),
            1 => format!("info,{}", own("debug")),
            _ => format!("debug,{}", own("trace")),
        };
        EnvFilter::new(usual)
    }
}

fn directive(text: &str) -> Directive {
    text.parse().expect("invariant: a target and a level")
}
