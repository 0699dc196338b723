//! What a run tells: a progress bar on a terminal, plain lines elsewhere, `metrics.jsonl` always, and the figures of that to
//! TensorBoard, Prometheus and MLflow where the plan says so.
//!
//! The only place that prints while training. `metrics.jsonl` has one object a line with a `kind`
//! of `train`, `eval` or `checkpoint`; after a resume it holds the line of each training step once. The other places are
//! `record::Sink`s: each is told of a record after it is in `metrics.jsonl`, and of going back after that has.

mod appender;
mod console;
mod lines;
mod mlflow;
mod phases;
mod prometheus;
mod record;
mod tensorboard;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use sail_data::Tally;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;

pub use self::console::Console;
pub(crate) use self::console::SAID;
use self::console::Shown;
use self::lines::{Lines, is_at_most};
use self::mlflow::Mlflow;
pub(crate) use self::phases::Phases;
use self::prometheus::Prometheus;
pub use self::record::Ending;
use self::record::{Record, Sink};
use self::tensorboard::TensorBoard;
use crate::ada_lrs::{Finding, Trial};
use crate::checkpoint::{Save, Totals};
use crate::clock::Parts;
use crate::config::{Module, Plan, Progress, UnlockPlan};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::feature_cache::CacheUse;
use crate::freeze::{FreezeTable, RatesByName};
use crate::lineage::{self, Lineage};
use crate::step::Packing;

/// One line of JSON for each step, evaluation, unlock point, trial and checkpoint.
pub(crate) const METRICS: &str = "metrics.jsonl";
/// One for each step that was not made.
pub(crate) const TRIPS: &str = "trips.jsonl";

/// What one optimizer step gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss per unit of loss weight.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// The same of every trained parameter, by module, where the step is reported.
    pub grad_norms: BTreeMap<Module, Vec<f64>>,
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

impl StepReport {
    /// Tokens of all ranks.
    pub fn tokens_per_sec(&self) -> f64 {
        self.size.tokens as f64 / self.step_secs
    }
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
        let is_before = is_at_most(line, "step", self.progress.steps);
        match line["kind"].as_str() {
            // The run may have gone back from later steps.
            Some("ada_lrs") => line["trial"]["trial"].as_u64().is_some_and(|trial| trial <= self.trials),
            Some("unlock") => {
                let point = line["point"].as_u64();
                is_before && point.is_some_and(|point| self.unlocked.contains(&(point as usize)))
            }
            _ => is_before,
        }
    }
}

/// The voice of one run.
pub struct Events {
    shown: Shown,
    /// Where this rank is the one that writes.
    files: Option<Files>,
    plan: Plan,
    /// How the images of all steps of this process were come by, where features are kept.
    cache_use: Option<CacheUse>,
    /// What was recorded of steps that may yet be undone, while a trial runs.
    trial: Option<Vec<Record>>,
}

/// What a run is, for those that are told of it.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// What is run.
    pub plan: &'a Plan,
    /// What it trains and freezes.
    pub table: &'a FreezeTable,
    /// Where its weights come from.
    pub lineage: &'a Lineage,
}

impl Events {
    /// Opens `metrics.jsonl`: anew for a run that starts, without what was written after `step` for
    /// one that resumes there; and `trips.jsonl` without what was written later; and what else the plan wants to be told.
    /// `writes` says whether this rank is the one that does.
    ///
    /// # Errors
    /// For a file that cannot be written, and a place where it cannot be listened.
    pub fn open(console: Console, about: About<'_>, standing: &Standing, writes: bool) -> Result<Self> {
        let plan = about.plan;
        let files = writes.then(|| Files::open(about, standing)).transpose()?;
        let shown = Shown::new(console, plan, standing.progress);
        Ok(Self { shown, files, plan: plan.clone(), cache_use: None, trial: None })
    }

    /// Prints a message.
    pub fn note(&self, text: impl std::fmt::Display) {
        self.shown.note(text);
    }

    /// Records a step; shows it when it is due.
    pub fn step(&mut self, report: &StepReport) {
        let line = json!({
            "kind": "train", "step": report.step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr,
            "samples": report.size.samples, "tokens": report.size.tokens,
            "answer_tokens": report.size.answer_tokens, "step_secs": report.step_secs,
            "data_wait_secs": report.data_wait_secs, "parts_secs": report.parts, "tokens_per_sec": report.tokens_per_sec(),
            "flops": report.flops, "mfu": report.mfu, "sent_bytes": report.sent_bytes, "packing": report.packing,
            "peak_memory_bytes": report.peak_memory_bytes, "coverage": report.coverage,
            "feature_cache": report.feature_cache,
        });
        if let Some(cache_use) = report.feature_cache {
            self.cache_use.get_or_insert_default().add(cache_use);
        }
        let record = Record { grad_norms: report.grad_norms.clone(), ..timed(line) };
        match &mut self.trial {
            Some(records) => records.push(record),
            None => self.write(&record),
        }
        self.shown.step(report);
    }

    /// Records and shows an evaluation.
    pub fn evaluation(&mut self, step: u64, report: &EvalReport) {
        self.write(&timed(json!({"kind": "eval", "step": step, "report": report})));
        self.note(format!("\n{} after step {step}\n{report}", self.plan.run.name));
    }

    /// Records and tells that the parts of an unlock point are trained after `step`.
    pub fn unlocked(&mut self, step: u64, point: usize, unlock: &UnlockPlan, freed: &RatesByName) {
        let parts: Vec<String> = unlock.parts.iter().map(ToString::to_string).collect();
        let line =
            json!({"kind": "unlock", "step": step, "point": point, "parts": parts, "tensors": freed.len()});
        self.write(&timed(line));
        let (name, parts, tensors) = (&self.plan.run.name, parts.join(", "), freed.len());
        self.note(format!("{name}: after step {step} {parts} is trained as well, {tensors} tensors"));
    }

    /// Steps after `start` are made once more; they are recorded when they are kept.
    pub fn begin_trial(&mut self, start: Progress) {
        self.shown.at = start;
        self.trial = Some(Vec::new());
    }

    /// Records the steps of the trial in place of those that were made before it since `start`.
    pub fn keep_trial(&mut self, start: Progress) {
        let at = self.shown.at;
        self.back_with_trials(start);
        for record in self.trial.take().unwrap_or_default() {
            self.write(&record);
        }
        self.shown.at = at;
    }

    /// Forgets the steps of the trial; the run goes on from `to`.
    pub fn drop_trial(&mut self, to: Progress) {
        self.shown.at = to;
        self.trial = None;
    }

    /// Records and tells what a trial of another learning rate has led to. `window` is the steps before and after it.
    pub fn trial(&mut self, window: (u64, u64), trial: &Trial) {
        let (from, step) = window;
        self.write(&timed(json!({"kind": "ada_lrs", "step": step, "from": from, "trial": trial})));
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
            self.write(&timed(json!({
                "kind": "checkpoint", "step": step, "blocked_secs": blocked, "secs": took, "bytes": bytes,
            })));
        }
    }

    /// The held-out losses of the run so far, by step; none on ranks that do not write.
    pub fn held_out(&self) -> Result<BTreeMap<u64, f64>> {
        let Some(Files { metrics, .. }) = &self.files else { return Ok(BTreeMap::new()) };
        let text = fs::read_to_string(metrics.path()).map_err(Error::io(metrics.path()))?;
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
        let path = metrics.path();
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
        self.shown.note(said);
    }

    /// Forgets the steps after `step`, to which the run was put back.
    pub fn back_to(&mut self, to: Progress) {
        self.forget(to, |line| is_at_most(line, "step", to.steps));
    }

    /// The same where a trial of another learning rate is the reason: it and those before it are still told of.
    pub fn back_with_trials(&mut self, to: Progress) {
        self.forget(to, |line| line["kind"] == "ada_lrs" || is_at_most(line, "step", to.steps));
    }

    fn forget(&mut self, to: Progress, stays: impl Fn(&Value) -> bool) {
        let step = to.steps;
        if let Some(Files { metrics, sinks, .. }) = &mut self.files {
            if let Err(error) = metrics.keep_if(stays) {
                warn!("{error}; the steps after {step} stay in it beside those that are made instead");
            }
            for sink in sinks {
                sink.back_to(step);
            }
        }
        self.shown.back_to(to);
    }

    /// Forgets the steps that were not made after so many were judged: the run judges them anew.
    pub fn forget_trips(&mut self, judged: u64) {
        if let Some(Files { trips, .. }) = &mut self.files
            && let Err(error) = trips.keep_if(|line| is_at_most(line, "judged", judged))
        {
            warn!("{error}; what is judged anew stays in it beside what is found then");
        }
    }

    /// Removes the bar, and tells what a cache was good for. What could not be written until now is not written any more;
    /// a server is waited for as long as the plan says.
    pub fn close(&mut self, ending: Ending) {
        self.shown.close();
        if let Some(cache_use) = self.cache_use.take() {
            self.note(format!("{}: {cache_use}", self.plan.run.name));
        }
        let Some(Files { metrics, trips, sinks }) = &mut self.files else { return };
        for lines in [metrics, trips] {
            if let Err(error) = lines.catch_up() {
                warn!("{error}; its last lines are lost");
            }
        }
        for mut sink in sinks.drain(..) {
            sink.close(ending);
        }
    }

    fn write(&mut self, record: &Record) {
        if let Some(Files { metrics, sinks, .. }) = &mut self.files {
            metrics.write(&record.line);
            for sink in sinks {
                sink.record(record);
            }
        }
    }
}

/// What a run writes to.
struct Files {
    metrics: Lines,
    trips: Lines,
    sinks: Vec<Box<dyn Sink>>,
}

impl Files {
    fn open(about: About<'_>, standing: &Standing) -> Result<Self> {
        let About { plan, table, lineage } = about;
        let (dir, step) = (&plan.run.dir, standing.progress.steps);
        let [metrics, trips] = [METRICS, TRIPS].map(|name| dir.join(name));
        if step == 0 {
            File::create(&metrics).map_err(Error::io(&metrics))?;
            tensorboard::remove(dir)?;
        }
        // A step that the run has left by going back is no later one.
        let trips = Lines::open(trips, |line| is_at_most(line, "judged", standing.judged))?;
        let metrics = Lines::open(metrics, |line| standing.knows(line))?;
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        if let Some(listen) = plan.log.prometheus {
            sinks.push(Box::new(Prometheus::start(listen, &plan.run.name, lineage.stages.len() + 1)?));
        }
        if plan.log.tensorboard {
            let texts = tensorboard::texts(plan, table);
            sinks.push(Box::new(TensorBoard::open(dir, step, &texts)?));
        }
        if let Some(mlflow) = &plan.log.mlflow {
            sinks.push(Box::new(Mlflow::start(plan, mlflow, step, &lineage::told(lineage))?));
        }
        Ok(Self { metrics, trips, sinks })
    }
}

/// A line with the time when it was written, seconds since 1970.
fn timed(mut line: Value) -> Record {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // As precise as it is worth.
    line["time"] = json!(since.as_millis() as f64 / 1e3);
    line.into()
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
