//! How a stage begins: anew, from a checkpoint, or not at all because it has ended.
//!
//! The main rank looks at the run's folder and decides for all. Called by the train loop.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::warn;

use crate::checkpoint::{self, Checkpoint, MANIFEST};
use crate::config::{Plan, hex};
use crate::error::{Error, Result};
use crate::lock::RunLock;
use crate::origin::check_lineage;
use crate::train_loop::{RunOptions, SUMMARY, StageSummary};
use crate::world::World;

/// The resolved plan in a run's folder.
pub(crate) const PLAN: &str = "plan.yaml";

/// Fields that may differ on resume: they change what is told and kept, not what is trained.
const HARMLESS: [&str; 18] = [
    "run.name",
    "run.dir",
    "run.time_limit_secs",
    "run.time_margin_secs",
    "batch.recompute",
    "batch.vision_images",
    "data.threads",
    "data.store",
    "data.feature_cache",
    "parallel.strategy",
    "parallel.bucket_mb",
    "parallel.timeout_secs",
    "parallel.first_step_timeout_secs",
    "log",
    "watchdog",
    "checkpoint",
    "guard",
    "eval",
];

/// How the names begin of files that show that a folder is shared.
const MARK: &str = ".shared-";

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

/// How a stage begins.
pub(crate) enum Beginning {
    /// It has ended before.
    Finished(Box<StageSummary>),
    /// From a checkpoint, or anew; no other process may train in its folder meanwhile.
    From(Option<RunLock>, Option<Box<Checkpoint>>),
}

/// What the main rank has found, for all.
#[derive(Serialize, Deserialize)]
enum Found {
    Finished(Box<StageSummary>),
    From(Option<PathBuf>),
}

/// The main rank looks at the run's folder and decides for all.
pub(crate) fn begin(plan: &Plan, world: &World, options: &RunOptions) -> Result<Beginning> {
    world.set_timeout(plan.parallel.first_step_timeout_secs)?;
    world.agree(|| plan.fields())?;
    let (mut held, mut opened) = (None, None);
    let found = world.from_main(|| {
        held = Some(RunLock::take(&plan.run.dir)?);
        checkpoint::remove_partial(&plan.run.dir)?;
        remove_marks(&plan.run.dir)?;
        opened = find_resume(&plan.run.dir, &options.resume)?;
        let changed = match &opened {
            Some(checkpoint) => check_config(plan, checkpoint, options)?,
            None => false,
        };
        if let Some(checkpoint) = &opened {
            check_lineage(plan, checkpoint)?;
        }
        if let Some(summary) = finished(plan, opened.as_ref().filter(|_| !changed))? {
            return Ok(Found::Finished(Box::new(summary)));
        }
        // One of before, of a stage that has more to do now.
        let path = plan.run.dir.join(SUMMARY);
        if path.exists() {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        let path = plan.run.dir.join(PLAN);
        fs::write(&path, plan.to_yaml()).map_err(Error::io(&path))?;
        Ok(Found::From(opened.as_ref().map(|checkpoint| checkpoint.dir().to_owned())))
    })?;
    let dir = match found {
        Found::Finished(summary) => return Ok(Beginning::Finished(summary)),
        Found::From(dir) => dir,
    };
    check_shared(&plan.run.dir, world)?;
    if opened.is_none() {
        opened = dir.map(|dir| Checkpoint::open_verified(&dir)).transpose()?;
    }
    Ok(Beginning::From(held, opened.map(Box::new)))
}

fn find_resume(dir: &Path, resume: &Resume) -> Result<Option<Checkpoint>> {
    match resume {
        Resume::From(path) if !path.exists() => Err(Error::usage(
            format!("`--resume`: `{}` does not exist", path.display()),
            format!("name a `step-…` folder of `{}`, or use `--resume auto`", dir.display()),
        )),
        Resume::From(path) if !path.join(MANIFEST).exists() => Err(Error::usage(
            format!("`--resume`: `{}` is no checkpoint", path.display()),
            format!("name a `step-…` folder of `{}`, or use `--resume auto`", dir.display()),
        )),
        Resume::From(path) => Ok(Some(Checkpoint::open(path)?)),
        Resume::Auto => match checkpoint::newest(dir)? {
            None if checkpoint::any(dir)? => Err(Error::usage(
                format!("`{}` has checkpoints, and none of them verifies", dir.display()),
                "see the warnings above; mend or remove them to start anew, or choose another `run.dir`",
            )),
            found => Ok(found),
        },
        Resume::Never => match checkpoint::newest(dir)? {
            None => Ok(None),
            Some(found) => Err(Error::usage(
                format!("`--resume never`, but `{}` exists", found.dir().display()),
                format!("remove `{}` or choose another `run.dir`", dir.display()),
            )),
        },
    }
}

/// Whether a field says nothing of what is trained.
fn is_harmless(plan: &Plan, path: &str) -> bool {
    // What is measured decides when a stage ends that may end early.
    let decides = path.starts_with("eval") && plan.schedule.early_stop.is_some();
    HARMLESS.iter().any(|prefix| path.starts_with(prefix)) && !decides
}

/// What all plans have in common that make the same steps, as 64 hexadecimal digits.
pub(crate) fn course(plan: &Plan) -> String {
    let mut sum = Sha256::new();
    for (path, value) in plan.fields().iter().filter(|(path, _)| !is_harmless(plan, path)) {
        sum.update(format!("{path}={value}\n"));
    }
    hex(&sum.finalize())
}

/// Whether what is trained is another plan than that of `checkpoint`, where that is allowed.
fn check_config(plan: &Plan, checkpoint: &Checkpoint, options: &RunOptions) -> Result<bool> {
    let mut changes = checkpoint.state().plan.diff(plan);
    changes.retain(|change| !is_harmless(plan, &change.path));
    if changes.is_empty() {
        return Ok(false);
    }
    let list: Vec<String> = changes.iter().map(ToString::to_string).collect();
    let differs =
        format!("the plan differs from that of `{}`:\n  {}", checkpoint.dir().display(), list.join("\n  "));
    if options.allow_config_change {
        options.console.line(format!("{}: {differs}\nallowed by `--allow-config-change`", plan.run.name));
        return Ok(true);
    }
    Err(Error::usage(
        differs,
        format!(
            "undo the changes, go on with them by `--allow-config-change`, choose another `run.dir`, or remove `{}` to \
             start anew",
            plan.run.dir.display()
        ),
    ))
}

/// Every rank must see the main rank's folder, and be able to write there: better known now than at the first save.
fn check_shared(run_dir: &Path, world: &World) -> Result<()> {
    // A name that nobody has looked for: file systems over a network remember what was not there.
    let mark = world.from_main(|| {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mark = run_dir.join(format!("{MARK}{}-{}", std::process::id(), started.as_nanos()));
        fs::write(&mark, "").map_err(Error::io(&mark))?;
        Ok(mark)
    })?;
    let probe = mark.with_extension(format!("{:05}", world.rank()));
    let own = if mark.exists() {
        fs::write(&probe, "").and_then(|()| fs::remove_file(&probe)).map_err(|error| error.to_string())
    } else {
        Err("does not see what rank 0 writes there".to_owned())
    };
    let all: Vec<std::result::Result<(), String>> = world.gather(&own)?;
    world.on_main(|| fs::remove_file(&mark).map_err(Error::io(&mark)))?;
    let fault = all.into_iter().enumerate().find_map(|(rank, own)| Some((rank, own.err()?)));
    let Some((rank, reason)) = fault else { return Ok(()) };
    Err(Error::usage(
        format!("`run.dir`, `{}`, is not one folder for all ranks: rank {rank}: {reason}", run_dir.display()),
        "put it on a file system that all ranks share and may write to",
    ))
}

/// Removes what runs that were killed while they checked this have left.
fn remove_marks(run_dir: &Path) -> Result<()> {
    for entry in fs::read_dir(run_dir).map_err(Error::io(run_dir))? {
        let entry = entry.map_err(Error::io(run_dir))?;
        if entry.file_name().to_string_lossy().starts_with(MARK) {
            fs::remove_file(entry.path()).map_err(Error::io(&entry.path()))?;
        }
    }
    Ok(())
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
