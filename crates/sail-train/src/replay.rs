//! One step of a run made again and looked at pack by pack, from the newest checkpoint before it.
//!
//! Steps between are made as the run made them, so the weights are those that the step met. Nothing is written.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use tch::Kind;

use crate::checkpoint::{Checkpoint, newest_before};
use crate::config::{GuardAction, Module};
use crate::error::{Error, Result};
use crate::events::{Console, trip_of};
use crate::schedule::factor;
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
    let found = match checkpoint {
        Some(path) => Some(Checkpoint::open(path)?).filter(|checkpoint| checkpoint.state().step < step),
        None => newest_before(run_dir, step)?,
    };
    let checkpoint = found.ok_or_else(|| {
        Error::usage(
            format!("`{}` has no checkpoint before step {step}", run_dir.display()),
            "a step is made again from a checkpoint: keep more of them with `checkpoint.every` and `keep_last`",
        )
    })?;
    let mut plan = checkpoint.state().plan.clone();
    plan.eval = None;
    let world = Arc::new(World::alone());
    let mut session = Session::build(&plan, &world, Some(&checkpoint))?;
    console.line(format!(
        "from {}: making {} steps before",
        checkpoint.dir().display(),
        step - 1 - session.step
    ));
    while session.step + 1 < step {
        let before = next(&mut session)?;
        let loss = session.accumulate(&before)?;
        let verdict = session.agree(&loss, false, false)?;
        match session.judge(&verdict).map(|trip| trip.action) {
            None => {
                session.update(&before, factor(&plan.schedule, session.step))?;
                session.advance(&before)?;
            }
            Some(GuardAction::Skip) => session.skip()?,
            Some(GuardAction::Rollback | GuardAction::Stop) => {
                return Err(Error::usage(
                    format!("the run went back at step {}, before step {step}", session.step + 1),
                    "name a checkpoint made after that with `--checkpoint`",
                ));
            }
        }
    }
    let wanted = next(&mut session)?;
    let recorded = trip_of(run_dir, step)?.map(|record| record["samples"].clone());
    let mut own = wanted.samples();
    let as_recorded = recorded.and_then(|ranks| serde_json::from_value::<Vec<Vec<String>>>(ranks).ok());
    // Each rank lists its own, so the order is another one.
    own.sort_unstable();
    let as_recorded = as_recorded.map(|ranks| {
        let mut samples = ranks.concat();
        samples.sort_unstable();
        samples == own
    });
    let packs = wanted.packs.into_iter().map(|pack| look(&mut session, pack)).collect::<Result<_>>()?;
    Ok(Replayed { step, packs, as_recorded })
}

fn next(session: &mut Session) -> Result<Step> {
    let name = session.plan.run.name.clone();
    session.next_step()?.ok_or(Error::NoData { name })
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
