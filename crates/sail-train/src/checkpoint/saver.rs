//! Saving while training goes on: a snapshot is taken between two steps, threads write it, and all ranks learn
//! together that it is done.
//!
//! A save has two parts: every rank writes its tensors, then the main rank makes the folder a checkpoint and removes
//! older ones. Each part runs on a thread; the ranks go from one to the next together, at a step's one host read, so
//! that no collective waits for tensors to be written. Used by the train loop.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};
use tracing::warn;

use super::retention::retain;
use super::snapshot::{Snapshot, host_memory};
use super::write::{Written, partial, prepare, remove_if_there, seal, write_pieces};
use crate::config::CheckpointPlan;
use crate::error::{Error, Result};
use crate::lock::RunLock;
use crate::optim::StatePiece;
use crate::threads::spawn;
use crate::world::World;

/// Of the threads that write.
const THREAD: &str = "sail-save";
/// Between two looks whether all ranks are done.
const SHORT: Duration = Duration::from_millis(2);
const LONG: Duration = Duration::from_millis(100);

/// A checkpoint that was made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Save {
    /// Its step.
    pub step: u64,
    /// How long training stood still for it on this rank.
    pub blocked: Duration,
    /// From the snapshot until it was a checkpoint.
    pub took: Duration,
    /// What this rank wrote of tensors.
    pub bytes: u64,
}

/// The checkpoints of a running stage.
pub struct Saver {
    run_dir: PathBuf,
    plan: CheckpointPlan,
    world: Arc<World>,
    /// Of the folder, on the main rank.
    lock: Option<Arc<RunLock>>,
    newest: Option<Snapshot>,
    /// Memory for the first one.
    reserved: Option<JoinHandle<Result<Vec<Tensor>>>>,
    under_way: Option<UnderWay>,
    /// Saves that failed since one did not.
    failures: u32,
    /// The step of the newest checkpoint of this course.
    saved: Option<u64>,
    made: Vec<Save>,
}

struct UnderWay {
    step: u64,
    part: Part,
    bytes: u64,
    begun: Instant,
    blocked: Duration,
}

/// Why a rank could not do its part; goes from rank to rank.
#[derive(Serialize, Deserialize)]
struct Failure {
    reason: String,
    /// Whether it is not worth saving, or nowhere to be saved, so that the run cannot go on.
    spoilt: bool,
}

type Outcome<T> = std::result::Result<T, Failure>;

enum Part {
    /// This rank's tensors.
    Tensors(JoinHandle<Result<Written>>),
    /// The main rank makes it a checkpoint; the others have nothing to do.
    Folder(Option<JoinHandle<Result<()>>>),
}

impl Part {
    fn is_done(&self) -> bool {
        match self {
            Self::Tensors(thread) => thread.is_finished(),
            Self::Folder(thread) => thread.as_ref().is_none_or(JoinHandle::is_finished),
        }
    }
}

impl Saver {
    /// For a stage in `run_dir`, which resumed from the checkpoint of step `resumed`.
    pub fn new(run_dir: PathBuf, plan: CheckpointPlan, world: &Arc<World>, resumed: Option<u64>) -> Self {
        let world = Arc::clone(world);
        Self {
            run_dir,
            plan,
            world,
            lock: None,
            newest: None,
            reserved: None,
            under_way: None,
            failures: 0,
            saved: resumed,
            made: Vec::new(),
        }
    }

    /// Where the run ends with an error of its own: what is under way is waited for, in a process alone. Among ranks
    /// the others may not come.
    pub fn finish_alone(&mut self) {
        if self.world.size() == 1
            && let Err(error) = self.finish()
        {
            warn!("{error}");
        }
    }

    /// The same in a folder that the main rank has taken: nothing is saved into one that took its place.
    #[must_use]
    pub fn with_lock(self, lock: Option<RunLock>) -> Self {
        Self { lock: lock.map(Arc::new), ..self }
    }

    /// Checks that the folder is still the one that was taken.
    ///
    /// # Errors
    /// [`Error::FolderGone`].
    pub fn check_folder(&self) -> Result<()> {
        check(self.lock.as_deref())
    }

    /// The newest snapshot that was taken.
    pub fn newest(&self) -> Option<&Snapshot> {
        self.newest.as_ref()
    }

    /// Begins to make memory for copies of `state` on a thread, so that the first save does not wait for it.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn reserve(&mut self, state: &[StatePiece<'_>]) -> Result<()> {
        let sizes: Vec<(i64, Device)> =
            state.iter().map(|piece| (piece.tensor.numel() as i64, piece.tensor.device())).collect();
        let thread = spawn(THREAD, move || {
            let touched = |(numel, device)| Ok(host_memory(numel, device)?.f_zero_()?);
            sizes.into_iter().map(touched).collect()
        })?;
        self.reserved = Some(thread);
        Ok(())
    }

    /// Takes a snapshot without saving it; a save under way is waited for. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn hold(&mut self, take: impl FnOnce(Vec<Tensor>) -> Result<Snapshot>) -> Result<&Snapshot> {
        // What is being written is the newest one's.
        self.finish()?;
        let memory = match (self.newest.take(), self.reserved.take()) {
            // The older one's memory is used again; its writer is done with it.
            (Some(old), _) => old.trained.into_iter().map(|piece| piece.tensor).collect(),
            (None, Some(thread)) => joined(thread)?,
            (None, None) => Vec::new(),
        };
        Ok(self.newest.insert(take(memory)?))
    }

    /// Takes note that the run leaves its course for that of the newest snapshot: it may stand at the same step again
    /// with other data before it. What is under way is waited for. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of [`Saver::finish`].
    pub fn leave(&mut self) -> Result<()> {
        self.finish()?;
        self.saved = None;
        Ok(())
    }

    /// Begins to save the step that `take` makes a snapshot of, given memory for it; nothing when that is the
    /// newest checkpoint already. The save before it is waited for. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of `take` and of c10d; a failed save when it is one too many.
    pub fn begin(&mut self, step: u64, take: impl FnOnce(Vec<Tensor>) -> Result<Snapshot>) -> Result<()> {
        let started = Instant::now();
        self.finish()?;
        if self.saved == Some(step) {
            return Ok(());
        }
        let begun = Instant::now();
        self.hold(take)?;
        self.write_newest(started, begun)
    }

    /// Begins to save the newest snapshot, to whose course the run may yet go back; nothing when it is a checkpoint
    /// already. Every rank makes the same call.
    ///
    /// # Errors
    /// As [`Saver::begin`].
    pub fn begin_held(&mut self) -> Result<()> {
        let started = Instant::now();
        self.finish()?;
        if self.newest.as_ref().is_none_or(|snapshot| self.saved == Some(snapshot.state.step)) {
            return Ok(());
        }
        self.write_newest(started, started)
    }

    fn write_newest(&mut self, started: Instant, begun: Instant) -> Result<()> {
        let snapshot = self.newest.as_ref().expect("invariant: one is held");
        let step = snapshot.state.step;
        let (pieces, frozen) = (snapshot.pieces(), snapshot.frozen_check.clone());
        let bytes = pieces.iter().map(|piece| 4 * piece.tensor.numel() as u64).sum();
        let prepared = || check(self.lock.as_deref()).and_then(|()| prepare(&self.run_dir, step));
        if let Err(failure) = self.world.from_main(|| Ok(prepared().map_err(Failure::from)))? {
            return self.failed(step, failure);
        }
        let (dir, rank) = (partial(&self.run_dir, step), self.world.rank());
        let part = Part::Tensors(spawn(THREAD, move || {
            frozen.check()?;
            write_pieces(&dir, step, pieces, rank)
        })?);
        self.under_way = Some(UnderWay { step, part, bytes, begun, blocked: started.elapsed() });
        Ok(())
    }

    /// Saves a step where the run ends, and returns once it is a checkpoint. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of [`Saver::begin`]; when it could not be saved.
    pub fn save_last(&mut self, step: u64, take: impl FnOnce(Vec<Tensor>) -> Result<Snapshot>) -> Result<()> {
        self.saved_last(|saver| saver.begin(step, take))
    }

    /// The same of the newest snapshot; the step that it is of.
    ///
    /// # Errors
    /// As [`Saver::save_last`].
    pub fn save_last_held(&mut self) -> Result<u64> {
        self.saved_last(Self::begin_held)?;
        Ok(self.newest.as_ref().map_or(0, |snapshot| snapshot.state.step))
    }

    fn saved_last(&mut self, begin: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.finish()?;
        // There is no later one to rely on.
        self.plan.max_failures = 0;
        begin(self)?;
        self.finish()?;
        // Also where there was nothing to save, since what follows writes into the folder.
        self.world.from_main(|| check(self.lock.as_deref()))
    }

    /// Checkpoints made since the last call.
    pub fn made(&mut self) -> Vec<Save> {
        std::mem::take(&mut self.made)
    }

    /// Whether this rank waits for nothing of its own: what the ranks tell each other in every step.
    pub fn is_done(&self) -> bool {
        self.under_way.as_ref().is_some_and(|save| save.part.is_done())
    }

    /// To be called when all ranks are done with a part: goes on to the next one. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of c10d; a failed save when it is one too many.
    pub fn advance(&mut self) -> Result<()> {
        let started = Instant::now();
        let Some(mut save) = self.under_way.take() else { return Ok(()) };
        let result = match save.part {
            Part::Tensors(thread) => match self.all_written(thread)? {
                Ok(thread) => {
                    save.part = Part::Folder(thread);
                    save.blocked += started.elapsed();
                    self.under_way = Some(save);
                    return Ok(());
                }
                Err(failure) => Err(failure),
            },
            Part::Folder(thread) => self
                .world
                .from_main(|| Ok(thread.map_or(Ok(()), |thread| joined(thread).map_err(Failure::from))))?,
        };
        let UnderWay { step, bytes, begun, blocked, .. } = save;
        match result {
            Ok(()) => {
                (self.failures, self.saved) = (0, Some(step));
                let blocked = blocked + started.elapsed();
                self.made.push(Save { step, blocked, took: begun.elapsed(), bytes });
                Ok(())
            }
            Err(failure) => {
                let partial = partial(&self.run_dir, step);
                // What is left is removed by the next start; the first error is the one to tell.
                if self.world.is_main() {
                    drop(remove_if_there(&partial));
                }
                self.failed(step, failure)
            }
        }
    }

    /// Waits until nothing is under way. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of c10d; a failed save when it is one too many; one that takes longer than `checkpoint.timeout_secs`.
    pub fn finish(&mut self) -> Result<()> {
        let (mut pause, started) = (SHORT, Instant::now());
        while let Some(save) = &self.under_way {
            let (step, done) = (save.step, f64::from(save.part.is_done()));
            self.world.doing(step, "waiting for a checkpoint to be written");
            let all = self.world.gather_numbers(&[done])?;
            let waiting = all.iter().enumerate().filter(|(_, done)| done[0] == 0.0);
            let waiting: Vec<String> = waiting.map(|(rank, _)| rank.to_string()).collect();
            if waiting.is_empty() {
                self.advance()?;
                continue;
            }
            // The main rank's clock decides for all.
            let is_late = started.elapsed() > Duration::from_secs(self.plan.timeout_secs);
            if self.world.from_main(|| Ok(is_late))? {
                let secs = self.plan.timeout_secs;
                let ranks = waiting.join(", ");
                let hint = "look at the disk below `run.dir`, or raise `checkpoint.timeout_secs`; older checkpoints are intact";
                let reason =
                    format!("step {step} is not saved after {secs} s, on rank {ranks}\n\nhint: {hint}");
                return Err(Error::checkpoint(&self.run_dir, reason));
            }
            thread::sleep(pause);
            if let Some(save) = &mut self.under_way {
                save.blocked += pause;
            }
            pause = (2 * pause).min(LONG);
        }
        Ok(())
    }

    /// Every rank's tensors are written: the main rank goes on with the folder.
    fn all_written(
        &self,
        thread: JoinHandle<Result<Written>>,
    ) -> Result<Outcome<Option<JoinHandle<Result<()>>>>> {
        let rank = self.world.rank();
        let own = joined(thread).map_err(|error| {
            let failure = Failure::from(error);
            Failure { reason: format!("rank {rank}: {}", failure.reason), ..failure }
        });
        let (mut written, mut failures) = (Vec::new(), Vec::new());
        for rank in self.world.gather::<Outcome<Written>>(&own)? {
            match rank {
                Ok(own) => written.push(own),
                Err(failure) => failures.push(failure),
            }
        }
        // What is spoilt on one rank matters more than a disk of another.
        failures.sort_by_key(|failure| !failure.spoilt);
        if let Some(failure) = failures.into_iter().next() {
            return Ok(Err(failure));
        }
        let Some(snapshot) = self.newest.as_ref().filter(|_| self.world.is_main()) else {
            return Ok(Ok(None));
        };
        let (state, untouched) = (snapshot.state.clone(), snapshot.untouched.clone());
        let (run_dir, plan) = (self.run_dir.clone(), self.plan.clone());
        let lock = self.lock.clone();
        let thread = spawn(THREAD, move || {
            check(lock.as_deref())?;
            seal(&run_dir, &state, untouched, written)?;
            if let Err(error) = retain(&run_dir, state.step, &plan, &state.held_out) {
                warn!("an older checkpoint could not be removed: {error}");
            }
            Ok(())
        })?;
        Ok(Ok(Some(thread)))
    }

    fn failed(&mut self, step: u64, failure: Failure) -> Result<()> {
        // A folder that is gone is the reason for whatever failed in it.
        let gone = self.world.from_main(|| Ok(check(self.lock.as_deref()).map_err(Failure::from)))?;
        let Failure { reason, spoilt } = gone.err().filter(|gone| gone.spoilt).unwrap_or(failure);
        if spoilt {
            return Err(Error::checkpoint(&self.run_dir, reason));
        }
        self.failures += 1;
        if self.failures > self.plan.max_failures {
            let hint = "older checkpoints are intact; mend the cause, and the same command resumes";
            let reason = format!("step {step} could not be saved: {reason}\n\nhint: {hint}");
            return Err(Error::checkpoint(&self.run_dir, reason));
        }
        if self.world.is_main() {
            let left = self.plan.max_failures - self.failures;
            warn!(
                "step {step} could not be saved: {reason}; older checkpoints are intact, and training goes on, also after {left} more such failures"
            );
        }
        Ok(())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let spoilt = matches!(
            error,
            Error::FreezePlan { .. } | Error::WeightsNotFinite { .. } | Error::FolderGone { .. }
        );
        Self { reason: error.to_string(), spoilt }
    }
}

fn check(lock: Option<&RunLock>) -> Result<()> {
    lock.map_or(Ok(()), RunLock::check)
}

fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    let ended = || Error::Io { path: "thread".into(), source: std::io::Error::other("panicked") };
    thread.join().unwrap_or_else(|_| Err(ended()))
}
