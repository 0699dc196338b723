//! One stage from its first step to its export, read top to bottom.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use sail_data::Tally;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::ada_lrs::{Finding, Next, Trial};
use crate::checkpoint::{Checkpoint, Saver, Snapshot, Totals};
use crate::config::{GuardAction, Module, Plan};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{About, Console, Ending, Events, Phases, StepReport};
use crate::export;
use crate::freeze::FreezeTable;
use crate::guard::Trip;
use crate::pictures;
use crate::profile::Profile;
use crate::resume::{Beginning, Resume, begin};
use crate::schedule::{Factors, is_due};
use crate::session::{Session, Verdict};
use crate::step::Step;
use crate::stopping::{Reason, Stopping, remove_file};
use crate::watchdog::Watchdog;
use crate::world::World;

/// What a stage leaves in its folder when it has ended.
pub(crate) const SUMMARY: &str = "summary.json";

/// How to run, apart from what to run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Where to continue.
    pub resume: Resume,
    /// Whether the configuration may be another one than that of the checkpoint.
    pub allow_config_change: bool,
    /// What ends it before its time.
    pub stopping: Stopping,
    /// Of how many steps of each stage every rank writes a trace; of none without a number.
    pub profile: Option<u64>,
    /// Where messages go.
    pub console: Console,
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
    let (lock, resume) = match begin(plan, world, options)? {
        Beginning::From(lock, resume) => (lock, resume),
        Beginning::Finished(summary) => {
            options.console.line(format!("{}: already finished", plan.run.name));
            return Ok(Outcome::Finished(summary));
        }
    };
    options.console.log_to(&plan.run.dir, world.rank())?;
    let watchdog = Watchdog::start(&plan.watchdog, world, &options.console)?;
    let _phases = options.console.talks().then(|| Phases::show(&options.console, plan, world)).transpose()?;
    let mut session = Session::build(plan, world, resume.as_deref())?;
    world.on_main(|| {
        write_in(&plan.run.dir, "data.yaml", &session.data_spec())?;
        match &session.evaluator {
            Some(evaluator) => pictures::write(&plan.run.dir, &evaluator.pictures()),
            None => Ok(()),
        }
    })?;
    let mut events = open_events(&session, options)?;
    session.remember(world.from_main(|| events.held_out())?);
    let mut saver = saver_for(&session, resume.as_deref())?.with_lock(lock);
    announce(&session, &events, resume.as_deref());
    let mut profile = Profile::new(options.profile, &options.console);
    let made = steps(&mut session, &mut saver, &mut events, &watchdog, &mut profile, options);
    profile.end(&session);
    if made.is_err() {
        saver.finish_alone();
        if world.is_main() {
            remove_file(plan);
        }
    }
    match made? {
        Some(step) => Ok(Outcome::Interrupted { step }),
        None => finish(&mut session, &saver, &mut events).map(|summary| Outcome::Finished(Box::new(summary))),
    }
}

/// Where what happens is told. A fault of the main rank there is one of all.
fn open_events(session: &Session, options: &RunOptions) -> Result<Events> {
    let about = About { plan: &session.plan, table: session.freeze.table(), lineage: session.lineage() };
    let open = |writes| Events::open(options.console.clone(), about, &session.standing(), writes);
    let mut opened = None;
    session.world.from_main(|| {
        opened = Some(open(true)?);
        Ok(())
    })?;
    opened.map_or_else(|| open(false), Ok)
}

/// Makes the steps that are left; where the run was asked to stop, the step after which it did. All are saved.
fn steps(
    session: &mut Session,
    saver: &mut Saver,
    events: &mut Events,
    watchdog: &Watchdog,
    profile: &mut Profile,
    options: &RunOptions,
) -> Result<Option<u64>> {
    if session.step > 0 && !session.is_done() && options.stopping.is_reached(session.step) {
        stopped(session, session.step, events, Some(&Reason::Step));
        return Ok(Some(session.step));
    }
    evaluate_at_start(session, saver, events)?;
    while !session.is_done() {
        let _span = profile.begin_step(session);
        let started = Instant::now();
        session.clock.begin();
        unlock_if_due(session, saver, events)?;
        begin_window_if_due(session, saver)?;
        let Some(step) = session.next_step()? else {
            session.clock.end();
            data_ended(session, events)?;
            break;
        };
        let loss = session.accumulate(&step)?;
        let asked = options.stopping.reason(&session.plan, session.step + 1, session.world.is_main());
        let verdict = session.agree(&loss, asked.is_some(), saver.is_done())?;
        if verdict.saved {
            saver.advance()?;
        }
        let went_back = if session.skips_again() {
            session.skip_again()?;
            false
        } else {
            match session.judge(&verdict) {
                // What another rate breaks says that it is too high.
                Some(_) if session.in_trial() => {
                    end_trial(&session.break_off_trial(), session, saver, events)?
                }
                Some(trip) => tripped(&trip, &step, &verdict, session, saver, events)?,
                None => {
                    let factors = session.factors(&step);
                    session.update(&step, &factors)?;
                    session.advance(&step)?;
                    events.step(&report(session, &step, &verdict, &factors, started)?);
                    search_rate(session.observe(verdict.loss), session, saver, events)?
                }
            }
        };
        session.clock.end();
        watchdog.step_done(session.step, started.elapsed());

        if verdict.stop && !session.is_done() {
            let saved = save_and_stop(saver, session, events)?;
            stopped(session, saved, events, asked.as_ref());
            return Ok(Some(saved));
        }
        if !session.is_done() && !went_back {
            save_if_due(saver, session)?;
            evaluate_if_due(session, saver, events)?;
        }
        events.saves(&saver.made());
    }
    if session.stops_early() {
        stopped_early(session, events);
    }
    save_last(saver, session, events)?;
    Ok(None)
}

/// The data has a length and is used up before the schedule: the stage ends here.
fn data_ended(session: &Session, events: &Events) -> Result<()> {
    let (name, step, length) = (&session.plan.run.name, session.step, session.plan.schedule.length);
    let done = length.with_count(length.of(session.progress()));
    events
        .note(format!("{name}: the data ends after step {step} ({done} of {length}), and with it the stage"));
    if step == 0 { Err(Error::NoData { name: name.clone() }) } else { Ok(()) }
}

/// The held-out loss falls no more: the stage ends here.
fn stopped_early(session: &Session, events: &Events) {
    let (name, step) = (&session.plan.run.name, session.step);
    let lowest = session.held_out().iter().min_by(|a, b| a.1.total_cmp(b.1));
    let best =
        lowest.map_or_else(String::new, |(at, loss)| format!("; it was lowest, {loss:.4}, after step {at}"));
    events.note(format!("{name}: ends early, after step {step}: the held-out loss falls no more{best}"));
}

/// What writes the checkpoints of a stage.
fn saver_for(session: &Session, resume: Option<&Checkpoint>) -> Result<Saver> {
    let Plan { run, checkpoint, guard, .. } = &session.plan;
    // One of another folder is none of this run's yet.
    let is_own = |resume: &&Checkpoint| same_folder(resume.dir().parent(), &run.dir);
    let resumed = resume.filter(is_own).map(|resume| resume.state().step);
    let mut saver = Saver::new(run.dir.clone(), checkpoint.clone(), &session.world, resumed);
    if guard.rolls_back() {
        saver.hold(|old| session.snapshot(old))?;
    } else if checkpoint.every.is_some() {
        saver.reserve(&session.optimizer.state()?)?;
    }
    Ok(saver)
}

fn same_folder(a: Option<&Path>, b: &Path) -> bool {
    let canonical = |path: &Path| fs::canonicalize(path).ok();
    a.and_then(canonical).is_some_and(|a| Some(a) == canonical(b))
}

/// Begins to train what the stage has come to unlock.
fn unlock_if_due(session: &mut Session, saver: &mut Saver, events: &mut Events) -> Result<()> {
    let due = session.unlock_due()?;
    for &index in &due {
        events.unlocked(
            session.step,
            index,
            &session.plan.train.unfreeze[index],
            session.freeze.unlocked_by(index),
        );
    }
    // What is put back must be what is trained.
    if !due.is_empty() && session.plan.guard.rolls_back() {
        saver.hold(|old| session.snapshot(old))?;
    }
    Ok(())
}

/// Takes the snapshot from which a window of steps is made twice, at two learning rates. The saver holds the one to which
/// a rate that is too high is gone back from.
fn begin_window_if_due(session: &mut Session, saver: &mut Saver) -> Result<()> {
    if session.is_window_due() {
        let beginning = if session.goes_farther_back() {
            Some(session.snapshot(Vec::new())?)
        } else {
            saver.hold(|old| session.snapshot(old))?;
            None
        };
        session.begin_window(beginning);
    }
    Ok(())
}

/// Does what the search for a learning rate comes to after a step, and says whether the run went back.
fn search_rate(next: Next, session: &mut Session, saver: &Saver, events: &mut Events) -> Result<bool> {
    match next {
        Next::Step => Ok(false),
        Next::Try => {
            let measured = session.snapshot(Vec::new())?;
            match session.take_beginning() {
                Some(beginning) => session.go_to(&beginning)?,
                None => session.go_to(held(saver))?,
            }
            session.set_aside(measured);
            events.begin_trial(session.progress());
            Ok(true)
        }
        Next::End(trial) => end_trial(&trial, session, saver, events),
    }
}

/// The run goes on from the end of the window, by one of the two ways to it, or from where its rate was first used.
fn end_trial(trial: &Trial, session: &mut Session, saver: &Saver, events: &mut Events) -> Result<bool> {
    let (mut from, measured) = session.take_aside();
    match trial.verdict {
        Finding::Keep => events.keep_trial(from),
        Finding::Leave => {
            session.go_to(&measured)?;
            events.drop_trial(session.progress());
        }
        Finding::GoBack => {
            from = held(saver).state.progress();
            session.go_to(held(saver))?;
            events.drop_trial(from);
            events.back_with_trials(from);
            // The same steps are judged anew.
            events.forget_trips(session.standing().judged);
        }
    }
    events.trial((from.steps, session.step), trial);
    Ok(trial.verdict == Finding::GoBack)
}

/// Where a window began, or the first one of several at a rate.
fn held(saver: &Saver) -> &Snapshot {
    saver.newest().expect("invariant: one is taken before a window begins")
}

fn save_if_due(saver: &mut Saver, session: &Session) -> Result<()> {
    if !is_due(session.plan.checkpoint.every, session.step) {
        return Ok(());
    }
    if session.may_go_back() {
        // A run that resumes makes anew what may be undone.
        saver.begin_held()?;
    } else {
        saver.begin(session.step, |old| session.snapshot(old))?;
    }
    Ok(())
}

/// Before the first step, and where a run resumes at a step that was saved and not evaluated any more.
fn evaluate_at_start(session: &mut Session, saver: &mut Saver, events: &mut Events) -> Result<()> {
    if session.step == 0 {
        evaluate(session, events)?;
    } else if !session.is_done() && !session.held_out().contains_key(&session.step) {
        evaluate_if_due(session, saver, events)?;
    }
    Ok(())
}

fn evaluate_if_due(session: &mut Session, saver: &mut Saver, events: &mut Events) -> Result<()> {
    let is_due = session.plan.eval.as_ref().is_some_and(|eval| is_due(eval.every, session.step));
    if is_due && !session.in_trial() {
        // It takes its time: what is being saved should be safe before.
        saver.finish()?;
        evaluate(session, events)?;
    }
    Ok(())
}

fn save_last(saver: &mut Saver, session: &Session, events: &mut Events) -> Result<()> {
    session.world.doing(session.step, "saving");
    saver.save_last(session.step, |old| session.snapshot(old))?;
    events.saves(&saver.made());
    Ok(())
}

/// Saves where the run stops before its end: the step that it resumes from.
fn save_and_stop(saver: &mut Saver, session: &Session, events: &mut Events) -> Result<u64> {
    if !session.may_go_back() {
        save_last(saver, session, events)?;
        return Ok(session.step);
    }
    session.world.doing(session.step, "saving");
    let step = saver.save_last_held()?;
    events.saves(&saver.made());
    Ok(step)
}

fn stopped(session: &Session, step: u64, events: &mut Events, asked: Option<&Reason>) {
    events.close(Ending::Stopped);
    let reason = asked.map_or("another rank was asked to".to_owned(), ToString::to_string);
    let name = &session.plan.run.name;
    events
        .note(format!("{name}: saved at step {step} and stopped, since {reason}; the same command resumes"));
    if session.world.is_main() {
        remove_file(&session.plan);
    }
}

/// Does what the guard wants done instead of a step, and says whether the run went back.
fn tripped(
    trip: &Trip,
    step: &Step,
    verdict: &Verdict,
    session: &mut Session,
    saver: &mut Saver,
    events: &mut Events,
) -> Result<bool> {
    let number = session.step + 1;
    let record = session.record(trip, step, verdict)?;
    let Verdict { loss, grad_norm, .. } = *verdict;
    let (name, dir) = (&session.plan.run.name, session.plan.run.dir.display());
    let mut what = format!("step {number}: loss {loss}, gradient norm {grad_norm}: {}", trip.reason);
    if trip.too_many {
        let guard = &session.plan.guard;
        what = format!(
            "{what}; more than {} such steps in {} (`guard.max_trips`)",
            guard.max_trips, guard.window
        );
    }
    let replay = format!("sail-train replay --run {dir} --step {number}");
    match trip.action {
        GuardAction::Stop => {
            events.trip(&record, format!("{name}: {what}; saving as it was before"));
            session.optimizer.discard();
            if session.may_go_back() {
                // The window is made anew, and with it the step.
                saver.save_last_held()?;
            } else {
                saver.save_last(session.step, |old| session.give_back(session.snapshot(old)?))?;
            }
            events.saves(&saver.made());
            events.close(Ending::Failed);
            let samples = session.world.gather(&step.samples())?.concat().join(" ");
            Err(Error::Tripped { what, samples, replay })
        }
        GuardAction::Skip => {
            events.trip(&record, format!("{name}: {what}; skipped; `{replay}` shows more"));
            session.skip()?;
            Ok(false)
        }
        GuardAction::Rollback => {
            saver.leave()?;
            let snapshot = saver.newest().expect("invariant: one is taken before the first step");
            let (to, progress) = (snapshot.state.step, snapshot.state.progress());
            let said = format!(
                "{name}: {what}; back to step {to}, with the data that follows; `{replay}` shows more"
            );
            session.roll_back(snapshot)?;
            events.trip(&record, said);
            events.back_to(progress);
            Ok(true)
        }
    }
}

fn report(
    session: &Session,
    step: &Step,
    verdict: &Verdict,
    factors: &Factors,
    started: Instant,
) -> Result<StepReport> {
    let step_secs = started.elapsed().as_secs_f64();
    let shows_norms = is_due(Some(session.plan.log.every), session.step);
    Ok(StepReport {
        step: session.step,
        loss: verdict.loss,
        grad_norm: verdict.grad_norm,
        grad_norms: if shows_norms { session.grad_norms(verdict) } else { BTreeMap::new() },
        lr_factor: factors.all,
        lr: session.freeze.lrs(factors),
        size: step.all.size,
        step_secs,
        data_wait_secs: step.all.data_wait_secs,
        parts: session.clock.parts(step_secs),
        mfu: session.peak.utilisation(step.all.flops.values().sum(), step_secs, session.world.size()),
        flops: step.all.flops.clone(),
        packing: step.all.packing(session.plan.batch.tokens_per_pack),
        sent_bytes: session.world.newly_sent_bytes(),
        feature_cache: session.cache.as_ref().map(|_| verdict.cache_use),
        peak_memory_bytes: sail_torch::memory_peak(session.device)?.map(|peak| peak.allocated),
        coverage: step.all.coverage.clone(),
    })
}

fn write_in(run_dir: &Path, name: &str, text: &str) -> Result<()> {
    let path = run_dir.join(name);
    fs::write(&path, text).map_err(Error::io(&path))
}

fn announce(session: &Session, events: &Events, resume: Option<&Checkpoint>) {
    let plan = &session.plan;
    let position = match resume {
        Some(checkpoint) => {
            format!("resumes after step {} from {}", session.step, checkpoint.dir().display())
        }
        None => "starts".to_owned(),
    };
    events.note(format!(
        "\n{}: {} on {}, {position}\n{}",
        plan.run.name,
        plan.schedule.length,
        where_it_runs(session),
        session.freeze.table()
    ));
    if let Some(missing) = session.peak.missing() {
        events.note(format!("{}: {missing}", plan.run.name));
    }
    if let Some(cache) = &session.cache {
        events.note(format!("{}: {cache}", plan.run.name));
    }
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

fn evaluate(session: &mut Session, events: &mut Events) -> Result<Option<EvalReport>> {
    if session.evaluator.is_some() {
        events.note(format!("{}: measuring the held-out loss", session.plan.run.name));
    }
    let report = session.evaluate()?;
    if let Some(report) = &report {
        events.evaluation(session.step, report);
    }
    Ok(report)
}

/// After the last step: evaluation, export and summary.
fn finish(session: &mut Session, saver: &Saver, events: &mut Events) -> Result<StageSummary> {
    let after = match session.measured() {
        Some(report) => Some(report.clone()),
        None => evaluate(session, events)?,
    };
    let (plan, world) = (&session.plan, &session.world);
    world.doing(session.step, "exporting");
    // What one rank writes and reads back may take longer than a step.
    world.set_timeout(plan.parallel.first_step_timeout_secs)?;
    let coverage = session.coverage()?;
    let weights = plan.export.as_ref().map(|_| session.final_params(Module::Vision)).transpose()?;
    let summary = world.from_main(|| {
        saver.check_folder()?;
        let out = plan.run.dir.join("export/vit");
        let export = match (&plan.export, weights) {
            (Some(export), Some(weights)) => {
                let saved = Checkpoint::of_step(&plan.run.dir, session.step)?;
                Some(export::vit(session, weights, &saved, export.vit, &out)?)
            }
            _ => None,
        };
        let (train_loss, before) = events.history(session.step)?;
        let summary = StageSummary {
            name: plan.run.name.clone(),
            plan_hash: plan.hash(),
            modules: session.freeze.table().clone(),
            steps: session.step,
            totals: session.totals,
            coverage,
            train_loss,
            before,
            after,
            export,
        };
        saver.check_folder()?;
        write_summary(&plan.run.dir.join(SUMMARY), &summary)?;
        Ok(summary)
    })?;
    events.close(Ending::Finished);
    Ok(summary)
}

fn write_summary(path: &Path, summary: &StageSummary) -> Result<()> {
    let text =
        serde_json::to_vec_pretty(&summary).map_err(|error| Error::checkpoint(path, error.to_string()))?;
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path)).map_err(Error::io(path))
}
