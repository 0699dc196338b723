//! What a run tells: a progress bar on a terminal, plain lines elsewhere, `metrics.jsonl` always.
//!
//! The only place that prints while training. `metrics.jsonl` has one object a line with a `kind`
//! of `train`, `eval` or `checkpoint`; after a resume it holds the line of each training step once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use sail_data::Tally;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;
use tracing_subscriber::fmt::MakeWriter;

use crate::ada_lrs::{Finding, Trial};
use crate::checkpoint::{Save, Totals};
use crate::clock::Parts;
use crate::config::{Amount, Module, Plan, Progress, UnlockPlan};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::feature_cache::CacheUse;
use crate::freeze::RatesByName;
use crate::schedule::is_due;
use crate::step::Packing;

/// One line of JSON for each step, evaluation, unlock point, trial and checkpoint.
pub(crate) const METRICS: &str = "metrics.jsonl";
const TRIPS: &str = "trips.jsonl";

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

/// What one optimizer step gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss per unit of loss weight.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// The schedule's factor on all peak rates.
    pub lr_factor: f64,
    /// The learning rate of each part of the plan that is trained.
    pub lr: BTreeMap<String, f64>,
    /// Samples, tokens and answer tokens of this step.
    pub size: Totals,
    /// From asking for its data to its end; saving and evaluating are not part of it.
    pub step_secs: f64,
    /// Of these, waiting for data: of all ranks, the longest.
    pub data_wait_secs: f64,
    /// What this rank did in them.
    pub parts: Parts,
    /// Operations of its forward and backward passes on all ranks, by module.
    pub flops: BTreeMap<Module, u64>,
    /// The share of what the devices of all ranks could compute that these are; None where that is not known.
    pub mfu: Option<f64>,
    /// How well its packs are packed.
    pub packing: Packing,
    /// Bytes that each rank sent to the others.
    pub sent_bytes: u64,
    /// How its images were come by, where features are kept.
    pub feature_cache: Option<CacheUse>,
    /// The most memory of this rank's device that tensors have held so far, bytes; None on the CPU.
    pub peak_memory_bytes: Option<u64>,
    /// What was seen of each source since the start of the stage.
    pub coverage: BTreeMap<String, Tally>,
}

/// Where a run stands when it begins or resumes; what was recorded later is not of its course.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// How far the stage has come.
    pub progress: Progress,
    /// Steps that were judged on the way.
    pub judged: u64,
    /// Trials of another learning rate that have ended.
    pub trials: u64,
    /// Unlock points that it has passed, by index in the plan.
    pub unlocked: BTreeSet<usize>,
}

impl Standing {
    /// Whether a line of `metrics.jsonl` was written before. Some things happen between a step and the next one, before
    /// or after a checkpoint is made there: these count by themselves.
    fn knows(&self, line: &Value) -> bool {
        let own = match line["kind"].as_str() {
            Some("ada_lrs") => line["trial"]["trial"].as_u64().is_some_and(|trial| trial <= self.trials),
            Some("unlock") => {
                line["point"].as_u64().is_some_and(|point| self.unlocked.contains(&(point as usize)))
            }
            _ => true,
        };
        own && is_at_most(line, "step", self.progress.steps)
    }
}

/// The voice of one run.
pub struct Events {
    console: Console,
    bar: Option<ProgressBar>,
    /// Where this rank is the one that writes.
    files: Option<Files>,
    plan: Plan,
    started: Instant,
    /// How far the stage had come when this process began, and how far it is now.
    began: Progress,
    at: Progress,
    /// How the images of all steps of this process were come by, where features are kept.
    cache_use: Option<CacheUse>,
    /// Lines of steps that may yet be undone, while a trial runs.
    trial: Option<Vec<Value>>,
}

impl Events {
    /// Opens `metrics.jsonl`: anew for a run that starts, without what was written after `step` for
    /// one that resumes there; and `trips.jsonl` without what was written later. `writes` says whether this rank is
    /// the one that does.
    pub fn open(console: Console, plan: &Plan, standing: &Standing, writes: bool) -> Result<Self> {
        let at = standing.progress;
        let step = at.steps;
        let open = || {
            let [metrics, trips] = [METRICS, TRIPS].map(|name| plan.run.dir.join(name));
            if step == 0 {
                File::create(&metrics).map_err(Error::io(&metrics))?;
            }
            // A step that the run has left by going back is no later one.
            let trips = Lines::open(trips, |line| is_at_most(line, "judged", standing.judged))?;
            Ok::<_, Error>(Files { metrics: Lines::open(metrics, |line| standing.knows(line))?, trips })
        };
        let files = writes.then(open).transpose()?;
        let bar = console.shows_bars().then(|| {
            let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg} eta {eta}");
            let bar = ProgressBar::new(plan.schedule.length.count())
                .with_style(style.expect("invariant: the template is well formed"))
                .with_prefix(plan.run.name.clone())
                .with_position(plan.schedule.length.of(at));
            bar.reset_eta();
            console.bars.add(bar)
        });
        let started = Instant::now();
        Ok(Self {
            console,
            bar,
            files,
            plan: plan.clone(),
            started,
            began: at,
            at,
            cache_use: None,
            trial: None,
        })
    }

    /// Prints a message.
    pub fn note(&self, text: impl std::fmt::Display) {
        self.console.line(text);
    }

    /// Records a step; shows it when it is due.
    pub fn step(&mut self, report: &StepReport) {
        let tokens_per_sec = report.size.tokens as f64 / report.step_secs;
        let line = json!({
            "kind": "train", "step": report.step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr,
            "samples": report.size.samples, "tokens": report.size.tokens,
            "answer_tokens": report.size.answer_tokens, "step_secs": report.step_secs,
            "data_wait_secs": report.data_wait_secs, "parts_secs": report.parts, "tokens_per_sec": tokens_per_sec,
            "flops": report.flops, "mfu": report.mfu, "sent_bytes": report.sent_bytes, "packing": report.packing,
            "peak_memory_bytes": report.peak_memory_bytes, "coverage": report.coverage,
            "feature_cache": report.feature_cache,
        });
        if let Some(cache_use) = report.feature_cache {
            self.cache_use.get_or_insert_default().add(cache_use);
        }
        match &mut self.trial {
            Some(lines) => lines.push(line),
            None => self.write(&line),
        }
        self.at = Progress { steps: report.step, tokens: self.at.tokens + report.size.tokens };
        let (schedule, wait) = (&self.plan.schedule, 100.0 * report.data_wait_secs / report.step_secs);
        let done = schedule.length.of(self.at);
        let mfu = report.mfu.map_or_else(String::new, |mfu| format!(" mfu {:.1}%", 100.0 * mfu));
        let figures = format!(
            "loss {:.4} grad {:.2} lr x{:.2} {tokens_per_sec:.0} tok/s{mfu} wait {wait:.0}%",
            report.loss, report.grad_norm, report.lr_factor
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(figures);
            }
            None if is_due(Some(self.plan.log.every), report.step) || schedule.length.is_reached(self.at) => {
                let place = match schedule.length {
                    Amount::Steps(steps) => format!("{}/{steps}", report.step),
                    Amount::Tokens(tokens) => format!("{} tokens {done}/{tokens}", report.step),
                };
                let (name, eta) = (&self.plan.run.name, self.eta().as_secs());
                self.console.line(format!("{name} step {place} {figures} eta {eta}s"));
            }
            None => {}
        }
    }

    /// Records and shows an evaluation.
    pub fn evaluation(&mut self, step: u64, report: &EvalReport) {
        self.write(&json!({"kind": "eval", "step": step, "report": report}));
        self.note(format!("\n{} after step {step}\n{report}", self.plan.run.name));
    }

    /// Records and tells that the parts of an unlock point are trained after `step`.
    pub fn unlocked(&mut self, step: u64, point: usize, unlock: &UnlockPlan, freed: &RatesByName) {
        let parts: Vec<String> = unlock.parts.iter().map(ToString::to_string).collect();
        self.write(
            &json!({"kind": "unlock", "step": step, "point": point, "parts": parts, "tensors": freed.len()}),
        );
        let (name, parts, tensors) = (&self.plan.run.name, parts.join(", "), freed.len());
        self.note(format!("{name}: after step {step} {parts} is trained as well, {tensors} tensors"));
    }

    /// Steps after `start` are made once more; they are recorded when they are kept.
    pub fn begin_trial(&mut self, start: Progress) {
        self.at = start;
        self.trial = Some(Vec::new());
    }

    /// Records the steps of the trial in place of those that were made before it since `start`.
    pub fn keep_trial(&mut self, start: Progress) {
        let at = self.at;
        self.back_to(start);
        for line in self.trial.take().unwrap_or_default() {
            self.write(&line);
        }
        self.at = at;
    }

    /// Forgets the steps of the trial; the run goes on from `to`.
    pub fn drop_trial(&mut self, to: Progress) {
        self.at = to;
        self.trial = None;
    }

    /// Records and tells what a trial of another learning rate has led to. `window` is the steps before and after it.
    pub fn trial(&mut self, window: (u64, u64), trial: &Trial) {
        let (from, step) = window;
        self.write(&json!({"kind": "ada_lrs", "step": step, "from": from, "trial": trial}));
        let Trial { trial, scale_before, scale_tried, gain, verdict, scale } = trial;
        let found = match verdict {
            Finding::Keep => "is kept",
            Finding::Leave => "makes no difference",
            Finding::GoBack => "is worse: back to before it, with lower ones",
        };
        let gain = gain.map_or("a step that is not to be made".to_owned(), |gain| {
            format!("the loss falls {:+.2e} a step faster (+-{:.1e})", gain.speed, gain.error)
        });
        self.note(format!(
            "{}: trial {trial} of the rates x{scale_tried:.3} for x{scale_before:.3} {found}: {gain}; now x{scale:.3}",
            self.plan.run.name
        ));
    }

    /// Records checkpoints that were made.
    pub fn saves(&mut self, made: &[Save]) {
        for Save { step, blocked, took, bytes } in made {
            let (blocked, took) = (blocked.as_secs_f64(), took.as_secs_f64());
            self.write(&json!({
                "kind": "checkpoint", "step": step, "blocked_secs": blocked, "secs": took, "bytes": bytes,
            }));
        }
    }

    /// The held-out losses of the run so far, by step; none on ranks that do not write.
    pub fn held_out(&self) -> Result<BTreeMap<u64, f64>> {
        let Some(Files { metrics, .. }) = &self.files else { return Ok(BTreeMap::new()) };
        let text = fs::read_to_string(&metrics.path).map_err(Error::io(&metrics.path))?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let evaluations = lines.filter(|line| line["kind"] == "eval");
        let loss = |line: Value| Some((line["step"].as_u64()?, line["report"]["total"]["loss"].as_f64()?));
        Ok(evaluations.filter_map(loss).collect())
    }

    /// The mean training loss over the last tenth of `steps`, and the evaluation before the first
    /// one, as the whole run recorded them; nothing on ranks that do not write.
    pub fn history(&mut self, steps: u64) -> Result<(Option<f64>, Option<EvalReport>)> {
        let Some(Files { metrics, .. }) = &mut self.files else { return Ok((None, None)) };
        metrics.catch_up()?;
        let path = &metrics.path;
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        let from = steps - steps.div_ceil(10);
        let (mut losses, mut before) = (Vec::new(), None);
        for line in text.lines() {
            let broken = |error: serde_json::Error| Error::io(path)(error.into());
            let mut line: Value = serde_json::from_str(line).map_err(broken)?;
            let step = line["step"].as_u64();
            match line["kind"].as_str() {
                Some("train") if step > Some(from) => losses.extend(line["loss"].as_f64()),
                Some("eval") if step == Some(0) => {
                    before = Some(serde_json::from_value(line["report"].take()).map_err(broken)?);
                }
                _ => {}
            }
        }
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        Ok(((!losses.is_empty()).then_some(mean), before))
    }

    /// Records a step that was not made, in `trips.jsonl`.
    pub fn trip(&mut self, trip: &Value, said: impl std::fmt::Display) {
        if let Some(files) = &mut self.files {
            files.trips.write(trip);
        }
        self.console.line(said);
    }

    /// Forgets the steps after `step`, to which the run was put back.
    pub fn back_to(&mut self, to: Progress) {
        self.at = to;
        let step = to.steps;
        if let Some(Files { metrics, .. }) = &mut self.files
            && let Err(error) = metrics.keep_if(|line| is_at_most(line, "step", step))
        {
            warn!("{error}; the steps after {step} stay in it beside those that are made instead");
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.plan.schedule.length.of(to));
        }
    }

    /// Forgets the steps that were not made after so many were judged: the run judges them anew.
    pub fn forget_trips(&mut self, judged: u64) {
        if let Some(Files { trips, .. }) = &mut self.files
            && let Err(error) = trips.keep_if(|line| is_at_most(line, "judged", judged))
        {
            warn!("{error}; what is judged anew stays in it beside what is found then");
        }
    }

    /// Removes the bar, and tells what a cache was good for. What could not be written until now is not written any more.
    pub fn close(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if let Some(cache_use) = self.cache_use.take() {
            self.note(format!("{}: {cache_use}", self.plan.run.name));
        }
        let files = self.files.iter_mut().flat_map(|files| [&mut files.metrics, &mut files.trips]);
        for lines in files {
            if let Err(error) = lines.catch_up() {
                warn!("{error}; its last lines are lost");
            }
        }
    }

    fn eta(&self) -> Duration {
        let length = self.plan.schedule.length;
        let done = length.of(self.at).saturating_sub(length.of(self.began)).max(1) as f64;
        let left = length.count().saturating_sub(length.of(self.at)) as f64;
        self.started.elapsed().mul_f64(left / done)
    }

    fn write(&mut self, line: &Value) {
        if let Some(files) = &mut self.files {
            files.metrics.write(line);
        }
    }
}

/// What a run writes lines to.
struct Files {
    metrics: Lines,
    trips: Lines,
}

/// A file of JSON lines.
struct Lines {
    path: PathBuf,
    file: File,
    /// What could not be written to it yet.
    unwritten: Vec<u8>,
}

impl Lines {
    /// Opened to write to, with the lines to `keep`.
    fn open(path: PathBuf, keep: impl Fn(&Value) -> bool) -> Result<Self> {
        keep_if(&path, keep)?;
        let file = Self::append_to(&path)?;
        Ok(Self { path, file, unwritten: Vec::new() })
    }

    fn append_to(path: &Path) -> Result<File> {
        OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))
    }

    /// Takes away all but the lines to `keep`.
    fn keep_if(&mut self, keep: impl Fn(&Value) -> bool) -> Result<()> {
        self.catch_up()?;
        keep_if(&self.path, keep)?;
        self.file = Self::append_to(&self.path)?;
        Ok(())
    }

    /// A disk that is full now may not be so later: the run goes on, and its lines are kept until then.
    fn write(&mut self, line: &Value) {
        let was_behind = !self.unwritten.is_empty();
        self.unwritten.extend(format!("{line}\n").bytes());
        if let Err(error) = self.catch_up()
            && !was_behind
        {
            warn!("{error}; its lines are kept in memory until they can be written");
        }
    }

    fn catch_up(&mut self) -> Result<()> {
        write_what_fits(&mut self.file, &mut self.unwritten).map_err(Error::io(&self.path))
    }
}

/// Writes, and takes away, as many bytes as the system takes.
fn write_what_fits(file: &mut impl Write, bytes: &mut Vec<u8>) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => drop(bytes.drain(..written)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The records in a run's `trips.jsonl`, newest first.
pub(crate) fn trips(run_dir: &Path) -> Result<Vec<Value>> {
    newest_lines(&run_dir.join(TRIPS))
}

/// A trial of another learning rate, and the steps before and after its window.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct RecordedTrial {
    pub(crate) from: u64,
    pub(crate) step: u64,
    pub(crate) trial: Trial,
}

/// The trials that a run has made, the newest first.
pub(crate) fn trials(run_dir: &Path) -> Result<Vec<RecordedTrial>> {
    let path = run_dir.join(METRICS);
    let broken = |error: serde_json::Error| Error::io(&path)(error.into());
    let lines = newest_lines(&path)?.into_iter().filter(|line| line["kind"] == "ada_lrs");
    lines.map(|line| serde_json::from_value(line).map_err(broken)).collect()
}

fn newest_lines(path: &Path) -> Result<Vec<Value>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    // The last one may be cut off.
    Ok(text.lines().rev().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

fn is_at_most(line: &Value, field: &str, last: u64) -> bool {
    line[field].as_u64().is_some_and(|known| known <= last)
}

/// Rewrites a file of lines with those to `keep`, and without a line cut off in writing.
fn keep_if(path: &Path, keep: impl Fn(&Value) -> bool) -> Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let mut kept = Vec::new();
    // Bytes: a line may be cut within a character.
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(Error::io(path))?;
        if serde_json::from_slice::<Value>(&line).is_ok_and(|line| keep(&line)) {
            kept.extend(line);
            kept.push(b'\n');
        }
    }
    let temporary = path.with_extension("tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(&kept)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&temporary, path)).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_steps_and_cut_lines_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS);
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st").unwrap();
        keep_if(&path, |line| is_at_most(line, "step", 2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
        keep_if(&dir.path().join("absent"), |_| true).unwrap();

        // Within a character, as a kill or a full disk cuts it.
        let whole = "{\"step\":1,\"source\":\"\u{e9}\"}\n";
        fs::write(&path, [whole.as_bytes(), &whole.as_bytes()[..21]].concat()).unwrap();
        assert!(fs::read_to_string(&path).is_err(), "it is cut within the letter");
        keep_if(&path, |line| is_at_most(line, "step", 2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_written_later() {
        /// Takes as many bytes as there is room for.
        struct Disk(Vec<u8>, usize);
        impl Write for Disk {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let fits = bytes.len().min(self.1 - self.0.len());
                self.0.extend(&bytes[..fits]);
                if fits == 0 { Err(ErrorKind::StorageFull.into()) } else { Ok(fits) }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (mut disk, mut lines) = (Disk(vec![], 5), b"one\ntwo\n".to_vec());
        assert!(write_what_fits(&mut disk, &mut lines).is_err());
        assert_eq!(lines, b"wo\n");
        lines.extend(b"three\n");
        disk.1 = 100;
        write_what_fits(&mut disk, &mut lines).unwrap();
        assert!(lines.is_empty());
        assert_eq!(disk.0, b"one\ntwo\nthree\n");
    }
}
