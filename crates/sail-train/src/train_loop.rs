//! One stage from its first step to its export, read top to bottom.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use sail_data::Tally;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::checkpoint::{self, Checkpoint, Totals};
use crate::config::{Module, Plan};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{Console, Events, StepReport};
use crate::export;
use crate::resume::{Beginning, Resume, begin};
use crate::schedule::{factor, is_due};
use crate::session::{Session, Verdict};
use crate::stage::FreezeTable;
use crate::step::Step;
use crate::watchdog::Watchdog;
use crate::world::World;

/// What a stage leaves in its folder when it has ended.
pub(crate) const SUMMARY: &str = "summary.json";
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
    let watchdog = Watchdog::start(&plan.watchdog, world, &options.console)?;
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
        watchdog.step_done(session.step, started.elapsed());
        events.step(&report(&session, &step, &verdict, lr_factor, started)?)?;

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

fn report(
    session: &Session,
    step: &Step,
    verdict: &Verdict,
    lr_factor: f64,
    started: Instant,
) -> Result<StepReport> {
    Ok(StepReport {
        step: session.step,
        loss: verdict.loss,
        grad_norm: verdict.grad_norm,
        lr_factor,
        size: step.all.size,
        step_secs: started.elapsed().as_secs_f64(),
        data_wait_secs: step.all.data_wait_secs,
        packing: step.all.packing(session.plan.batch.tokens_per_pack),
        sent_bytes: session.world.newly_sent_bytes(),
        peak_memory_bytes: sail_torch::memory_peak(session.device)?.map(|peak| peak.allocated),
        coverage: step.all.coverage.clone(),
    })
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
    let report = evaluator.run(&session.model, &session.encoder, session.device, &session.world)?;
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
    // What one rank writes and reads back may take longer than a step.
    world.set_timeout(plan.parallel.first_step_timeout_secs)?;
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
