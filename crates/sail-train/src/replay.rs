//! One step of a run made again and looked at pack by pack, from the newest checkpoint before it.
//!
//! Steps between are made as the run made them, so the weights are those that the step met. Nothing is written.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tch::Kind;

use crate::ada_lrs::Finding;
use crate::checkpoint::{Checkpoint, newest_before};
use crate::config::{Amount, GuardAction, Module};
use crate::error::{Error, Result};
use crate::events::{Console, RecordedTrial, trials, trips};
use crate::session::Session;
use crate::stage::module_of;
use crate::step::Step;
use crate::world::World;

/// A step, looked at.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// Its number.
    pub step: u64,
    /// Its packs, in the order of their streams.
    pub packs: Vec<PackReport>,
    /// Whether its samples are those that `trips.jsonl` has of it; `None` where that has nothing.
    pub as_recorded: Option<bool>,
    /// Where the run went back from the course that the step was on, and made it anew with other data.
    pub left: Option<u64>,
}

/// What a pack does by itself.
#[derive(Clone, Debug)]
pub struct PackReport {
    /// Mean loss of its answer tokens.
    pub loss: f64,
    /// Norm of the gradient that it gives each module that is trained.
    pub grad_norms: Vec<(Module, f64)>,
    /// Trained parameters whose gradient has something that is not a number.
    pub not_finite: Vec<String>,
    /// Its samples, as `source/shard/key`.
    pub samples: Vec<String>,
}

/// Makes `step` of the run in `run_dir` again, from `checkpoint` or the newest one before it.
///
/// # Errors
/// [`Error::Usage`] when there is no checkpoint before it, or the run went another way; those of training.
pub fn replay(run_dir: &Path, step: u64, checkpoint: Option<&Path>, console: &Console) -> Result<Replayed> {
    if !crate::checkpoint::any(run_dir)? {
        return Err(Error::usage(
            format!("`--run`: `{}` is no run's folder, or has no checkpoint", run_dir.display()),
            "name the folder that is `run.dir` of a stage",
        ));
    }
    let trips = trips(run_dir)?;
    let trip = trips.iter().find(|trip| trip["step"].as_u64() == Some(step));
    let checkpoint = match checkpoint {
        Some(path) if !path.exists() => {
            return Err(Error::usage(
                format!("`--checkpoint`: `{}` does not exist", path.display()),
                format!("name a `step-…` folder of `{}`, or leave it out", run_dir.display()),
            ));
        }
        Some(path) => before(Checkpoint::open(path)?, step)?,
        None => find(run_dir, step, trip)?,
    };
    let trials = trials(run_dir)?;
    let mut plan = checkpoint.state().plan.clone();
    if let Amount::Steps(last) = plan.schedule.length
        && step > last
    {
        return Err(Error::usage(
            format!("`--step`: the run has {last} steps, and {step} was asked for"),
            "name one of its steps",
        ));
    }
    plan.eval = None;
    if let Some(cache) = &mut plan.data.feature_cache {
        // Its features are those that the run trained on; nothing is added to them.
        cache.max_bytes = 0;
    }
    // What was done at each step is recorded; judging only has to count as the run did.
    plan.guard.not_finite = GuardAction::Skip;
    plan.guard.spike = plan.guard.spike.map(|_| GuardAction::Skip);
    plan.guard.max_trips = usize::MAX;
    let world = Arc::new(World::alone());
    let mut session = Session::build(&plan, &world, Some(&checkpoint))?;
    console.line(format!(
        "from {}: making {} steps before",
        checkpoint.dir().display(),
        step - 1 - session.step
    ));
    while session.step + 1 < step {
        session.follow_search(scale_at(&trials, session.step + 1));
        make_again(&mut session, &trips, step)?;
    }
    let wanted = next(&mut session, step)?;
    let mut own = wanted.samples();
    let recorded = trip.map(|trip| trip["samples"].clone());
    let as_recorded = recorded.and_then(|ranks| serde_json::from_value::<Vec<Vec<String>>>(ranks).ok());
    // Each rank lists its own, so the order is another one.
    own.sort_unstable();
    let as_recorded = as_recorded.map(|ranks| {
        let mut samples = ranks.concat();
        samples.sort_unstable();
        samples == own
    });
    let packs = wanted.packs.into_iter().map(|pack| look(&mut session, pack)).collect::<Result<_>>()?;
    let left = trips.iter().filter(|_| trip.is_none()).find_map(|other| {
        let beyond = other["judged"].as_u64()? > checkpoint.state().guard.judged();
        let went_back = other["action"] == "rollback" && other["step"].as_u64()? >= step;
        (beyond && went_back).then(|| other["step"].as_u64())?
    });
    Ok(Replayed { step, packs, as_recorded, left })
}

/// What all rates of a step were multiplied with, by the trials of the run, the newest first.
fn scale_at(trials: &[RecordedTrial], step: u64) -> f64 {
    let before = trials.iter().find(|recorded| recorded.from < step);
    before.map_or(1.0, |RecordedTrial { step: last, trial, .. }| match trial.verdict {
        _ if *last < step => trial.scale,
        Finding::Keep => trial.scale_tried,
        Finding::Leave | Finding::GoBack => trial.scale_before,
    })
}

/// The checkpoint to begin from: the newest before the step, on the course of the run that the step's trip was on
/// where one is left of it.
fn find(run_dir: &Path, step: u64, trip: Option<&Value>) -> Result<Checkpoint> {
    let judged = trip.and_then(|trip| trip["judged"].as_u64()).unwrap_or(u64::MAX);
    let (mut newest, mut below) = (None, step);
    while let Some(checkpoint) = newest_before(run_dir, below)? {
        if checkpoint.state().guard.judged() < judged {
            return Ok(checkpoint);
        }
        below = checkpoint.state().step;
        newest.get_or_insert(checkpoint);
    }
    newest.ok_or_else(|| {
        Error::usage(
            format!("`{}` has no checkpoint before step {step}", run_dir.display()),
            "a step is made again from a checkpoint: keep more of them with `checkpoint.every` and `keep_last`",
        )
    })
}

fn before(checkpoint: Checkpoint, step: u64) -> Result<Checkpoint> {
    let then = checkpoint.state().step;
    if then < step {
        return Ok(checkpoint);
    }
    Err(Error::usage(
        format!(
            "`{}` was made after step {then}, which is not before step {step}",
            checkpoint.dir().display()
        ),
        "name an older one, or leave out `--checkpoint`",
    ))
}

/// Makes a step as the run did, going by what is recorded of it.
fn make_again(session: &mut Session, trips: &[Value], wanted: u64) -> Result<()> {
    let (done, judged) = (session.step, session.standing().judged);
    let trip = trips.iter().find(|trip| trip["judged"].as_u64() == Some(judged + 1));
    let step = next(session, wanted)?;
    let loss = session.accumulate(&step)?;
    let verdict = session.agree(&loss, false, false)?;
    session.judge(&verdict);
    match trip.map(|trip| trip["action"].as_str()) {
        None => {
            session.update(&step, &session.factors(&step))?;
            session.advance(&step)
        }
        Some(Some("skip")) => session.skip(),
        Some(_) => Err(went_back(done + 1, wanted)),
    }
}

fn went_back(step: u64, wanted: u64) -> Error {
    Error::usage(
        format!("the run went back or ended at step {step}, before it came to step {wanted}"),
        "name a checkpoint made after that with `--checkpoint`",
    )
}

fn next(session: &mut Session, wanted: u64) -> Result<Step> {
    let done = session.step;
    session.unlock_due()?;
    session.next_step()?.ok_or_else(|| {
        Error::usage(format!("the data ends after step {done}, before step {wanted}"), "name an earlier step")
    })
}

/// One pack by itself: its loss, its gradients.
fn look(session: &mut Session, pack: sail_data::Pack) -> Result<PackReport> {
    let alone = Step::alone(vec![pack]);
    let loss = session.accumulate(&alone)?.to_kind(Kind::Double).double_value(&[]);
    let mut grad_norms: Vec<(Module, f64)> = Vec::new();
    let mut not_finite = Vec::new();
    for (name, _, gradient) in session.optimizer.gradients()? {
        let squared = gradient.square().sum(Kind::Double).double_value(&[]);
        if !squared.is_finite() {
            not_finite.push(name.to_owned());
        }
        let module = module_of(name)?;
        match grad_norms.iter_mut().find(|(known, _)| *known == module) {
            Some((_, sum)) => *sum += squared,
            None => grad_norms.push((module, squared)),
        }
    }
    for (_, sum) in &mut grad_norms {
        *sum = sum.sqrt();
    }
    session.optimizer.discard();
    Ok(PackReport { loss, grad_norms, not_finite, samples: alone.samples() })
}

impl fmt::Display for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "step {}, {} packs, each by itself", self.step, self.packs.len())?;
        match self.as_recorded {
            Some(true) => writeln!(f, "its samples are those of `trips.jsonl`")?,
            Some(false) => {
                writeln!(f, "its samples are NOT those of `trips.jsonl`: another course of the run")?;
            }
            None => {}
        }
        if let Some(left) = self.left {
            writeln!(
                f,
                "the run left this course at step {left} and made the step anew with other data; this is the first time"
            )?;
        }
        for (index, pack) in self.packs.iter().enumerate() {
            write!(f, "pack {index:<4} loss {:<10.4} gradient norm", pack.loss)?;
            for (module, norm) in &pack.grad_norms {
                write!(f, " {module} {norm:.4}")?;
            }
            writeln!(f, "\n  samples: {}", pack.samples.join(" "))?;
            if let Some(first) = pack.not_finite.first() {
                writeln!(f, "  not finite: {} parameters, the first is {first}", pack.not_finite.len())?;
            }
        }
        Ok(())
    }
}
