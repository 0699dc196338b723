//! What a run shows: a progress bar on a terminal, plain lines elsewhere, on standard error.
//!
//! [`Console`] is shared by all that prints; [`Shown`] is how far one run has come, as [`super::Events`] tells it.
//! What is printed is in the log file of the run's rank as well.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing::{error, info};
use tracing_subscriber::fmt::MakeWriter;

use super::StepReport;
use crate::config::{Amount, Plan, Progress};
use crate::error::{Error, Result};
use crate::schedule::is_due;
use crate::threads::lock;

/// The target of log events that repeat what is printed: for files, and where all that is printed is a log.
pub(crate) const SAID: &str = "sail_train::said";

/// Standard error, shared by the bar, the plain lines and the log so that none breaks another; and the log file of a rank.
#[derive(Clone, Debug)]
pub struct Console {
    bars: MultiProgress,
    /// Whether it shows more than errors: among ranks only one does.
    talks: bool,
    /// Whether all that is printed is a log, for programs that read it.
    logs_alone: bool,
    file: LogFile,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// Draws bars only when standard error is a terminal.
    pub fn new() -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self { bars, talks: true, logs_alone: false, file: LogFile::default() }
    }

    /// The same where it `talks`; otherwise, and where it did not talk before, only alarms and the log are shown.
    #[must_use]
    pub fn talking(self, talks: bool) -> Self {
        Self { talks: talks && self.talks, ..self }
    }

    /// The same where the log alone is printed, with what else would be as events in it.
    #[must_use]
    pub fn logging_alone(self, logs_alone: bool) -> Self {
        Self { logs_alone, ..self }
    }

    /// From here on the log is appended to `log/rank-R.log` in a run's folder as well.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be made.
    pub fn log_to(&self, run_dir: &Path, rank: usize) -> Result<()> {
        let folder = run_dir.join("log");
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let path = folder.join(format!("rank-{rank}.log"));
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        *lock(&self.file.0) = Some(file);
        Ok(())
    }

    /// Where log events are written as well.
    pub(crate) fn file(&self) -> LogFile {
        self.file.clone()
    }

    /// Prints lines above the bar, where this console talks.
    pub fn line(&self, text: impl std::fmt::Display) {
        info!(target: SAID, "{}", text.to_string().trim());
        if self.talks {
            self.print(&text);
        }
    }

    /// Prints lines above the bar, whether this console talks or not.
    pub fn alarm(&self, text: impl std::fmt::Display) {
        error!(target: SAID, "{}", text.to_string().trim());
        self.print(&text);
    }

    /// A closed or full standard error is no reason to stop training, and there is nowhere to report it.
    fn print(&self, text: &impl std::fmt::Display) {
        if !self.logs_alone {
            self.bars.suspend(|| drop(writeln!(io::stderr(), "{text}")));
        }
    }

    /// Whether it shows more than errors.
    pub(crate) fn talks(&self) -> bool {
        self.talks
    }

    pub(super) fn shows_bars(&self) -> bool {
        self.talks && !self.logs_alone && io::stderr().is_terminal()
    }

    /// Puts a bar below the others, for as long as it is not cleared.
    pub(super) fn add(&self, bar: ProgressBar) -> ProgressBar {
        self.bars.add(bar)
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

/// The file of a rank's log, once there is a run to have one. What cannot be written to it, on a disk that is full, is not
/// in it: that is no reason to stop training.
#[derive(Clone, Debug, Default)]
pub(crate) struct LogFile(Arc<Mutex<Option<File>>>);

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).as_mut().map_or(Ok(bytes.len()), |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogFile {
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
    /// Steps between plain lines, and the longest time between two.
    every: u64,
    patience: Duration,
    started: Instant,
    /// When the last line was written.
    told: Instant,
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
            console.add(bar)
        });
        let now = Instant::now();
        Self {
            console,
            bar,
            name: plan.run.name.clone(),
            length: plan.schedule.length,
            every: plan.log.every,
            patience: Duration::from_secs(plan.log.line_secs),
            started: now,
            told: now,
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
            None if self.is_line_due(report.step) => {
                self.told = Instant::now();
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

    fn is_line_due(&self, step: u64) -> bool {
        is_due(Some(self.every), step)
            || self.length.is_reached(self.at)
            || self.told.elapsed() >= self.patience
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
