//! One stage from its first step to its export, read top to bottom.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use sail_data::Tally;
use serde::{Deserialize, Serialize};
use tch::Device;
use tracing::warn;

use crate::checkpoint::{self, Checkpoint, Totals};
use crate::config::{Module, Plan};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{Console, Events, StepReport};
use crate::export;
use crate::origin::check_lineage;
use crate::schedule::{factor, is_due};
use crate::session::{self, Session, Verdict};
use crate::stage::FreezeTable;
use crate::step::Step;
use crate::world::World;

/// What a stage leaves in its folder when it has ended.
pub(crate) const SUMMARY: &str = "summary.json";
/// Fields that may differ on resume: they change what is told and kept, not what is trained.
const HARMLESS: [&str; 11] = [
    "run.name",
    "run.dir",
    "data.threads",
    "data.store",
    "parallel.strategy",
    "parallel.bucket_mb",
    "parallel.timeout_secs",
    "parallel.first_step_timeout_secs",
    "log",
    "checkpoint",
    "eval",
];

/// How to run, apart from what to run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Where to continue.
    pub resume: Resume,
    /// Save and stop after this step.
    pub stop_at: Option<u64>,
    /// Set from outside to ask for a save and a stop.
    pub stop: Arc<AtomicBool>,
    /// Where messages go.
    pub console: Console,
}

impl RunOptions {
    /// Whether this process was asked to stop, or the step now being made is the last one wanted.
    fn stop_asked(&self, step: u64) -> bool {
        self.stop.load(Ordering::Relaxed) || self.stop_at.is_some_and(|at| step >= at)
    }
}

/// Where a run continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// From the newest complete checkpoint in the run folder, if there is one.
    Auto,
    /// Nowhere: the run folder must hold no checkpoint.
    Never,
    /// From this checkpoint.
    From(PathBuf),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Finished(Box<StageSummary>),
    /// It was asked to stop, and saved.
    Interrupted {
        /// The step of the checkpoint.
        step: u64,
    },
}

/// What is worth knowing of a finished stage; `summary.json` in its folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageSummary {
    /// `run.name`.
    pub name: String,
    /// Of the plan.
    pub plan_hash: String,
    /// What was trained.
    pub modules: FreezeTable,
    /// Optimizer steps.
    pub steps: u64,
    /// What it was trained on.
    pub totals: Totals,
    /// Samples seen, repeated and skipped, by source.
    pub coverage: BTreeMap<String, Tally>,
    /// Mean training loss of the last tenth of the steps; `None` when its record is gone.
    pub train_loss: Option<f64>,
    /// Held out, before the first step.
    pub before: Option<EvalReport>,
    /// Held out, after the last step.
    pub after: Option<EvalReport>,
    /// The exported vision encoder.
    pub export: Option<PathBuf>,
}

/// Runs a stage to its end, or until it is asked to stop. Every rank of `world` makes the same call.
///
/// # Errors
/// Anything that keeps it from going on; the newest complete checkpoint stays.
pub fn run_stage(plan: &Plan, world: &Arc<World>, options: &RunOptions) -> Result<Outcome> {
    let (_lock, resume) = match begin(plan, world, &options.resume)? {
        Beginning::From(lock, resume) => (lock, resume),
        Beginning::Finished(summary) => {
            options.console.line(format!("{}: already finished", plan.run.name));
            return Ok(Outcome::Finished(summary));
        }
    };
    let mut session = Session::build(plan, world, resume.as_deref())?;
    world.on_main(|| write_in(&plan.run.dir, "data.yaml", &session.data_spec()))?;
    let mut events = Events::open(options.console.clone(), plan, session.step, world.is_main())?;
    announce(&session, &events, resume.as_deref())?;
    if session.step == 0 {
        evaluate(&session, &mut events)?;
    }
    while session.step < plan.schedule.steps {
        let started = Instant::now();
        let Some(step) = session.next_step()? else {
            data_ended(&session, &events)?;
            break;
        };
        let loss = session.accumulate(&step)?;
        let verdict = session.agree(&loss, options.stop_asked(session.step + 1))?;
        check_finite(&verdict, &session, &step)?;
        let lr_factor = factor(&plan.schedule, session.step);
        session.update(lr_factor)?;
        session.advance(&step)?;
        events.step(&report(&session, &step, &verdict, lr_factor, started))?;

        let done = session.step == plan.schedule.steps;
        if is_due(plan.checkpoint.every, session.step) || done || verdict.stop {
            save(&session)?;
        }
        if verdict.stop && !done {
            events.close();
            events.note(format!(
                "{}: saved at step {} and stopped; the same command resumes",
                plan.run.name, session.step
            ));
            return Ok(Outcome::Interrupted { step: session.step });
        }
        if !done && plan.eval.as_ref().is_some_and(|eval| is_due(eval.every, session.step)) {
            evaluate(&session, &mut events)?;
        }
    }
    finish(&session, &mut events).map(|summary| Outcome::Finished(Box::new(summary)))
}

/// The data has a length and is used up before the schedule: the stage ends here.
fn data_ended(session: &Session, events: &Events) -> Result<()> {
    let (name, step, steps) = (&session.plan.run.name, session.step, session.plan.schedule.steps);
    events.note(format!("{name}: the data ends after step {step} of {steps}, and with it the stage"));
    if step == 0 { Err(Error::NoData { name: name.clone() }) } else { save(session) }
}

/// Refuses a step that would break the weights.
fn check_finite(verdict: &Verdict, session: &Session, step: &Step) -> Result<()> {
    if verdict.is_finite() {
        return Ok(());
    }
    let samples = session.world.gather(&step.sample_names())?.join(" ");
    let Verdict { loss, grad_norm, .. } = *verdict;
    Err(Error::NotFinite { step: session.step + 1, loss, grad_norm, samples })
}

fn report(session: &Session, step: &Step, verdict: &Verdict, lr_factor: f64, started: Instant) -> StepReport {
    StepReport {
        step: session.step,
        loss: verdict.loss,
        grad_norm: verdict.grad_norm,
        lr_factor,
        size: step.all.size,
        step_secs: started.elapsed().as_secs_f64(),
        data_wait_secs: step.all.data_wait_secs,
        packing: step.all.packing(session.plan.batch.tokens_per_pack),
        coverage: step.all.coverage.clone(),
    }
}

/// How a stage begins.
enum Beginning {
    /// It has ended before.
    Finished(Box<StageSummary>),
    /// From a checkpoint, or anew; no other process may train in its folder meanwhile.
    From(Option<File>, Option<Box<Checkpoint>>),
}

/// What the main rank has found, for all.
#[derive(Serialize, Deserialize)]
enum Found {
    Finished(Box<StageSummary>),
    From(Option<PathBuf>),
}

/// The main rank looks at the run's folder and decides for all.
fn begin(plan: &Plan, world: &World, resume: &Resume) -> Result<Beginning> {
    world.set_timeout(plan.parallel.first_step_timeout_secs)?;
    world.agree(|| plan.fields())?;
    let (mut lock, mut opened) = (None, None);
    let found = world.from_main(|| {
        lock = Some(session::lock(&plan.run.dir)?);
        opened = find_resume(plan, resume)?;
        if let Some(checkpoint) = &opened {
            check_lineage(plan, checkpoint)?;
        }
        if let Some(summary) = finished(plan, opened.as_ref())? {
            return Ok(Found::Finished(Box::new(summary)));
        }
        write_in(&plan.run.dir, "plan.yaml", &plan.to_yaml())?;
        Ok(Found::From(opened.as_ref().map(|checkpoint| checkpoint.dir().to_owned())))
    })?;
    let dir = match found {
        Found::Finished(summary) => return Ok(Beginning::Finished(summary)),
        Found::From(dir) => dir,
    };
    if opened.is_none() {
        opened = dir.map(|dir| Checkpoint::open_verified(&dir)).transpose()?;
    }
    Ok(Beginning::From(lock, opened.map(Box::new)))
}

fn find_resume(plan: &Plan, resume: &Resume) -> Result<Option<Checkpoint>> {
    let dir = &plan.run.dir;
    let checkpoint = match resume {
        Resume::From(path) => Some(Checkpoint::open(path)?),
        Resume::Auto => checkpoint::newest(dir)?,
        Resume::Never => match checkpoint::newest(dir)? {
            None => None,
            Some(found) => {
                return Err(Error::usage(
                    format!("`--resume never`, but `{}` exists", found.dir().display()),
                    format!("remove `{}` or choose another `run.dir`", dir.display()),
                ));
            }
        },
    };
    if let Some(checkpoint) = &checkpoint {
        let mut changes = checkpoint.state().plan.diff(plan);
        changes.retain(|change| !HARMLESS.iter().any(|prefix| change.path.starts_with(prefix)));
        if !changes.is_empty() {
            let list: Vec<String> = changes.iter().map(ToString::to_string).collect();
            return Err(Error::usage(
                format!(
                    "the plan differs from that of `{}`:\n  {}",
                    checkpoint.dir().display(),
                    list.join("\n  ")
                ),
                format!(
                    "undo the changes, choose another `run.dir`, or remove `{}` to start anew",
                    dir.display()
                ),
            ));
        }
    }
    Ok(checkpoint)
}

/// The summary of a run that has nothing left to do.
fn finished(plan: &Plan, resume: Option<&Checkpoint>) -> Result<Option<StageSummary>> {
    let path = plan.run.dir.join(SUMMARY);
    let Some(checkpoint) = resume.filter(|_| path.exists()) else { return Ok(None) };
    let text = fs::read(&path).map_err(Error::io(&path))?;
    let Ok(summary) = serde_json::from_slice::<StageSummary>(&text) else {
        warn!("{}: cannot be read; the end of the stage is done again", path.display());
        return Ok(None);
    };
    // A stage ends with its last step or with its data.
    if summary.steps != checkpoint.state().step {
        return Ok(None);
    }
    let export_is_there = summary.export.as_ref().is_none_or(|export| export.exists());
    Ok((export_is_there && plan.export.is_some() == summary.export.is_some()).then_some(summary))
}

fn write_in(run_dir: &Path, name: &str, text: &str) -> Result<()> {
    let path = run_dir.join(name);
    fs::write(&path, text).map_err(Error::io(&path))
}

fn announce(session: &Session, events: &Events, resume: Option<&Checkpoint>) -> Result<()> {
    let plan = &session.plan;
    let position = match resume {
        Some(checkpoint) => {
            format!("resumes after step {} from {}", session.step, checkpoint.dir().display())
        }
        None => "starts".to_owned(),
    };
    events.note(format!(
        "\n{}: {} steps on {}, {position}\n{}",
        plan.run.name,
        plan.schedule.steps,
        where_it_runs(session),
        session.freeze_table()?
    ));
    Ok(())
}

fn where_it_runs(session: &Session) -> String {
    let device = match session.device {
        Device::Cuda(index) => format!("CUDA device {index}"),
        _ => "the CPU".to_owned(),
    };
    match session.world.size() {
        1 => device,
        ranks => format!("{ranks} ranks ({}), rank 0 on {device}", session.plan.parallel.strategy.name()),
    }
}

fn evaluate(session: &Session, events: &mut Events) -> Result<Option<EvalReport>> {
    let Some(evaluator) = &session.evaluator else { return Ok(None) };
    events.note(format!("{}: measuring the held-out loss", session.plan.run.name));
    session.world.doing(session.step, "evaluating");
    session.optimizer.settle()?;
    let report = evaluator.run(&session.model, &session.encoder, session.device)?;
    events.evaluation(session.step, &report)?;
    Ok(Some(report))
}

fn save(session: &Session) -> Result<()> {
    session.world.doing(session.step, "saving");
    session.check_frozen()?;
    session.check_finite()?;
    let dir = &session.plan.run.dir;
    checkpoint::save(dir, &session.snapshot()?, &session.world)?;
    session.world.on_main(|| checkpoint::keep_last(dir, session.step, session.plan.checkpoint.keep_last))
}

/// After the last step: evaluation, export and summary.
fn finish(session: &Session, events: &mut Events) -> Result<StageSummary> {
    let (plan, world) = (&session.plan, &session.world);
    let after = evaluate(session, events)?;
    world.doing(session.step, "exporting");
    let coverage = session.coverage()?;
    let weights = plan.export.as_ref().map(|_| session.exact_params(Module::Vision)).transpose()?;
    let summary = world.from_main(|| {
        let out = plan.run.dir.join("export/vit");
        let export = match (&plan.export, weights) {
            (Some(export), Some(weights)) => Some(export::vit(session, weights, export.vit, &out)?),
            _ => None,
        };
        let (train_loss, before) = events.history(session.step)?;
        let summary = StageSummary {
            name: plan.run.name.clone(),
            plan_hash: plan.hash(),
            modules: session.freeze_table()?,
            steps: session.step,
            totals: session.totals,
            coverage,
            train_loss,
            before,
            after,
            export,
        };
        write_summary(&plan.run.dir.join(SUMMARY), &summary)?;
        Ok(summary)
    })?;
    events.close();
    Ok(summary)
}

fn write_summary(path: &Path, summary: &StageSummary) -> Result<()> {
    let text =
        serde_json::to_vec_pretty(&summary).map_err(|error| Error::checkpoint(path, error.to_string()))?;
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path)).map_err(Error::io(path))
}
