//! The checkpoints of a run measured one after the other as they are written, by a process beside the one that trains:
//! `sail-train eval --tasks --follow`. Training does not wait, and how often is `checkpoint.every`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::Device;
use tracing::{info, warn};

use super::{Opened, Results, Subject, choose, claim, measure, write};
use crate::checkpoint;
use crate::config::TasksPlan;
use crate::error::{Error, Result};
use crate::lock::{LOCK, RunLock};
use crate::resume::PLAN;
use crate::train_loop::SUMMARY;

const LINES: &str = "results.jsonl";
/// What a new checkpoint waits for at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What was found of one checkpoint.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    step: u64,
    /// Tells the checkpoint from another of the same step, which a run that went back has made.
    checkpoint: String,
    #[serde(flatten)]
    results: Results,
}

/// A run that is followed.
struct Followed<'a> {
    plan: &'a TasksPlan,
    device: Device,
    run: &'a Path,
    out: &'a Path,
    lines: BTreeMap<u64, Line>,
    /// Seals of checkpoints that were removed before they could be read.
    missed: BTreeSet<String>,
}

/// Measures every complete checkpoint of `run`, oldest first, into a folder of `out` by its name, and returns when the run
/// has ended and its last one is measured. `out` gets `results.jsonl` as well, a line for each step, of which `told` is told. A
/// checkpoint that the run removed before it was read is left out with a warning; what is known of steps to which the run
/// went back is measured anew.
///
/// # Errors
/// [`Error::Usage`] when `run` is not a run's folder, or `out` one of other tasks; those of [`super::run`].
pub fn follow(
    plan: &TasksPlan,
    run: &Path,
    out: &Path,
    mut told: impl FnMut(u64, &Path) -> Result<()>,
) -> Result<()> {
    let mut waits = false;
    check_run(run)?;
    let _lock = RunLock::take(out)?;
    claim(out, &json!({ "tasks": plan }))?;
    let lines = known(&out.join(LINES))?;
    let mut followed = Followed { plan, device: choose(plan)?, run, out, lines, missed: BTreeSet::new() };
    loop {
        // Looked for first: whatever is complete when a run has ended is seen below.
        let ended = run.join(SUMMARY).exists();
        if let Some((step, seal, dir)) = followed.next()? {
            waits = false;
            if let Some(folder) = followed.measure(step, seal, &dir)? {
                told(step, &folder)?;
            }
        } else if ended {
            return Ok(());
        } else {
            if !run.is_dir() {
                return Err(not_a_run(run));
            }
            if !waits {
                info!("waiting for checkpoints in {}", run.display());
                waits = true;
            }
            sleep(LOOK_EVERY);
        }
    }
}

impl Followed<'_> {
    /// The first complete checkpoint of which nothing is known: step, seal and folder.
    fn next(&mut self) -> Result<Option<(u64, String, PathBuf)>> {
        let found = checkpoint::complete(self.run)?;
        if let Some((newest, _)) = found.last() {
            // The run went back behind these.
            self.lines.retain(|step, _| step <= newest);
        }
        let sealed = found.into_iter().filter_map(|(step, dir)| Some((step, checkpoint::seal(&dir)?, dir)));
        let is_known = |step: &u64, seal: &String| {
            self.missed.contains(seal) || self.lines.get(step).is_some_and(|line| line.checkpoint == *seal)
        };
        Ok(sealed.into_iter().find(|(step, seal, _)| !is_known(step, seal)))
    }

    /// Measures a checkpoint and writes all lines; the folder of its results, or none if it is gone.
    fn measure(&mut self, step: u64, seal: String, dir: &Path) -> Result<Option<PathBuf>> {
        let opened = match Opened::open(Subject::Checkpoint(dir), self.plan, self.device) {
            Ok(opened) => opened,
            Err(error) if checkpoint::seal(dir).as_ref() != Some(&seal) => {
                warn!(
                    "{} was removed before it was read: {error}; `checkpoint.keep_last` keeps more",
                    dir.display()
                );
                self.missed.insert(seal);
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let folder = self.out.join(dir.file_name().expect("invariant: a checkpoint's folder has a name"));
        let mark = folder.with_extension("checkpoint");
        // Of another checkpoint of this step.
        if folder.exists() && fs::read_to_string(&mark).is_ok_and(|found| found != seal) {
            fs::remove_dir_all(&folder).map_err(Error::io(&folder))?;
        }
        write(&mark, &seal)?;
        info!("measuring {}", dir.display());
        let results = measure(self.plan, &opened, self.device, &folder)?;
        self.lines.insert(step, Line { step, checkpoint: seal, results });
        let line = |line: &Line| {
            serde_json::to_string(line).expect("invariant: results are numbers and text") + "\n"
        };
        write(&self.out.join(LINES), &self.lines.values().map(line).collect::<String>())?;
        Ok(Some(folder))
    }
}

/// A run's folder has its plan, or nothing yet.
fn check_run(run: &Path) -> Result<()> {
    let is_new = || fs::read_dir(run).is_ok_and(|mut entries| entries.next().is_none());
    let is_run = run.join(PLAN).is_file() || run.join(LOCK).is_file() || is_new();
    if is_run { Ok(()) } else { Err(not_a_run(run)) }
}

fn not_a_run(run: &Path) -> Error {
    Error::usage(
        format!("`{}` is not a run's folder", run.display()),
        "`--follow` takes the folder that checkpoints are written to, `run.dir` of the configuration",
    )
}

/// What an earlier process has measured, by step: checkpoints may be gone since then.
fn known(path: &Path) -> Result<BTreeMap<u64, Line>> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let read = |(number, line): (usize, &str)| {
        serde_json::from_str::<Line>(line).map(|line| (line.step, line)).map_err(|error| {
            let what = format!(
                "`{}`, line {}, is not what this command writes: {error}",
                path.display(),
                number + 1
            );
            Error::usage(what, "name another folder for `--out`, or remove the file")
        })
    };
    text.lines().enumerate().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_tasks;

    #[test]
    fn checkpoints_of_a_course_that_was_left_are_measured_again() {
        let dir = tempfile::tempdir().unwrap();
        let (run, out, tasks) =
            (dir.path().join("run"), dir.path().join("out"), dir.path().join("tasks.yaml"));
        fs::write(&tasks, "affinity: [{ name: words, shards: a.tar }]\n").unwrap();
        let plan = load_tasks(&tasks).unwrap();
        for (step, seal) in [(1, Some("a")), (2, Some("b")), (3, None)] {
            let folder = run.join(format!("step-{step:08}"));
            fs::create_dir_all(&folder).unwrap();
            if let Some(seal) = seal {
                fs::write(folder.join("COMPLETE"), format!("{seal}\n")).unwrap();
            }
        }
        let line = |step, seal: &str| {
            (step, Line { step, checkpoint: seal.to_owned(), results: Results::default() })
        };
        let lines = BTreeMap::from([line(1, "a"), line(2, "earlier"), line(4, "earlier")]);
        let missed = BTreeSet::new();
        let mut followed = Followed { plan: &plan, device: Device::Cpu, run: &run, out: &out, lines, missed };
        let (step, seal, folder) = followed.next().unwrap().unwrap();
        assert_eq!((step, seal.as_str(), &folder), (2, "b", &run.join("step-00000002")));
        assert!(!followed.lines.contains_key(&4), "the run went back behind it");
        // It cannot be read, and is there.
        assert!(followed.measure(step, seal.clone(), &folder).is_err());
        fs::remove_dir_all(&folder).unwrap();
        assert!(followed.measure(step, seal, &folder).unwrap().is_none(), "it is gone, which is no failure");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("COMPLETE"), "b\n").unwrap();
        assert!(followed.next().unwrap().is_none(), "one is known, one is gone, one is not complete");
        assert!(check_run(&run).is_err(), "it has no plan");
        assert!(check_run(&out).is_err(), "it is not there");
    }
}
