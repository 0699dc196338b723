//! What a run shows: a progress bar on a terminal, plain lines elsewhere, on standard error.
//!
//! [`Console`] is shared by all that prints; [`Shown`] is how far one run has come, as [`super::Events`] tells it.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::fmt::MakeWriter;

use super::StepReport;
use crate::config::{Amount, Plan, Progress};
use crate::schedule::is_due;

/// Standard error, shared by the bar, the plain lines and the log so that none breaks another.
#[derive(Clone, Debug)]
pub struct Console {
    bars: MultiProgress,
    /// Whether it shows more than errors: among ranks only one does.
    talks: bool,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// Draws bars only when standard error is a terminal.
    pub fn new() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()), talks: true }
    }

    /// The same where it `talks`; otherwise only alarms and the log are shown.
    #[must_use]
    pub fn talking(self, talks: bool) -> Self {
        Self { talks, ..self }
    }

    /// Prints lines above the bar, where this console talks.
    pub fn line(&self, text: impl std::fmt::Display) {
        if self.talks {
            self.alarm(text);
        }
    }

    /// Prints lines above the bar. A closed or full standard error is no reason to stop training, and
    /// there is nowhere to report it.
    pub fn alarm(&self, text: impl std::fmt::Display) {
        self.bars.suspend(|| drop(writeln!(io::stderr(), "{text}")));
    }

    fn shows_bars(&self) -> bool {
        self.talks && io::stderr().is_terminal()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bars.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl MakeWriter<'_> for Console {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// How far a run has come, as it is shown.
pub(super) struct Shown {
    console: Console,
    bar: Option<ProgressBar>,
    name: String,
    length: Amount,
    /// Steps between plain lines.
    every: u64,
    started: Instant,
    /// How far the stage had come when this process began, and how far it is now.
    began: Progress,
    pub(super) at: Progress,
}

impl Shown {
    /// Of a run that goes on from `at`.
    pub(super) fn new(console: Console, plan: &Plan, at: Progress) -> Self {
        let bar = console.shows_bars().then(|| {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} eta {eta}");
            let bar = ProgressBar::new(plan.schedule.length.count())
                .with_style(style.expect("invariant: the template is well formed"))
                .with_prefix(plan.run.name.clone())
                .with_position(plan.schedule.length.of(at));
            bar.reset_eta();
            console.bars.add(bar)
        });
        Self {
            console,
            bar,
            name: plan.run.name.clone(),
            length: plan.schedule.length,
            every: plan.log.every,
            started: Instant::now(),
            began: at,
            at,
        }
    }

    /// Prints a message.
    pub(super) fn note(&self, text: impl std::fmt::Display) {
        self.console.line(text);
    }

    /// Takes note of a step; shows it when it is due.
    pub(super) fn step(&mut self, report: &StepReport) {
        self.at = Progress { steps: report.step, tokens: self.at.tokens + report.size.tokens };
        let (length, wait) = (self.length, 100.0 * report.data_wait_secs / report.step_secs);
        let done = length.of(self.at);
        let mfu = report.mfu.map_or_else(String::new, |mfu| format!(" mfu {:.1}%", 100.0 * mfu));
        let figures = format!(
            "loss {:.4} grad {:.2} lr x{:.2} {:.0} tok/s{mfu} wait {wait:.0}%",
            report.loss,
            report.grad_norm,
            report.lr_factor,
            report.tokens_per_sec()
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(figures);
            }
            None if is_due(Some(self.every), report.step) || length.is_reached(self.at) => {
                let place = match length {
                    Amount::Steps(steps) => format!("{}/{steps}", report.step),
                    Amount::Tokens(tokens) => format!("{} tokens {done}/{tokens}", report.step),
                };
                let (name, eta) = (&self.name, self.eta().as_secs());
                self.console.line(format!("{name} step {place} {figures} eta {eta}s"));
            }
            None => {}
        }
    }

    /// The run was put back.
    pub(super) fn back_to(&mut self, to: Progress) {
        self.at = to;
        if let Some(bar) = &self.bar {
            bar.set_position(self.length.of(to));
        }
    }

    /// Removes the bar.
    pub(super) fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn eta(&self) -> Duration {
        let length = self.length;
        let done = length.of(self.at).saturating_sub(length.of(self.began)).max(1) as f64;
        let left = length.count().saturating_sub(length.of(self.at)) as f64;
        self.started.elapsed().mul_f64(left / done)
    }
}
