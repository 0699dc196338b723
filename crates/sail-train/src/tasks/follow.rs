//! The checkpoints of a run measured one after the other as they are written, by a process beside the one that trains:
//! `sail-train eval --tasks --follow`. Training does not wait, and how often is `checkpoint.every`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tracing::{info, warn};

use super::{Subject, write};
use crate::checkpoint;
use crate::config::TasksPlan;
use crate::error::{Error, Result};
use crate::train_loop::SUMMARY;

/// A line for each checkpoint.
const LINES: &str = "results.jsonl";
/// What a new checkpoint may wait for at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Measures every complete checkpoint of `run`, oldest first, into a folder of `out` by its name, and returns when the run
/// has ended and its last one is measured. `out` gets `results.jsonl` as well, a line for each step that `measured` is then told
/// of. A checkpoint that the run removed before it could be read is left out with a warning.
///
/// # Errors
/// [`Error::Usage`] when `run` is not a run's folder; those of [`super::run`].
pub fn follow(
    plan: &TasksPlan,
    run: &Path,
    out: &Path,
    mut measured: impl FnMut(u64, &Path) -> Result<()>,
) -> Result<()> {
    if !run.is_dir() || run.join(checkpoint::MANIFEST).exists() {
        return Err(Error::usage(
            format!("`{}` is not a run's folder", run.display()),
            "`--follow` takes the folder that checkpoints are written to, `run.dir` of the configuration",
        ));
    }
    let mut lines = known(&out.join(LINES))?;
    let mut passed = None;
    loop {
        // Looked for first: whatever is complete when a run has ended is seen below.
        let ended = run.join(SUMMARY).exists();
        let found = checkpoint::complete(run)?.into_iter().find(|(step, _)| Some(*step) > passed);
        let Some((step, dir)) = found else {
            if ended {
                return Ok(());
            }
            sleep(LOOK_EVERY);
            continue;
        };
        passed = Some(step);
        let of_step = out.join(dir.file_name().expect("invariant: a checkpoint's folder has a name"));
        info!("measuring {}", dir.display());
        match super::run(plan, Subject::Checkpoint(&dir), &of_step) {
            Ok(results) => {
                let mut line = Map::from_iter([("step".to_owned(), json!(step))]);
                let results = serde_json::to_value(results).expect("invariant: results are numbers and text");
                if let Value::Object(results) = results {
                    line.extend(results);
                }
                lines.insert(step, Value::Object(line));
                let text = lines.values().map(|line| format!("{line}\n")).collect::<String>();
                write(&out.join(LINES), &text)?;
                measured(step, &of_step)?;
            }
            Err(error) if !dir.exists() => {
                warn!(
                    "{} was removed before it was measured: {error}; `checkpoint.keep_last` keeps more",
                    dir.display()
                );
            }
            Err(error) => return Err(error),
        }
    }
}

/// What an earlier process has measured, by step: checkpoints may be gone since then.
fn known(path: &Path) -> Result<BTreeMap<u64, Value>> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let read = |(number, line): (usize, &str)| {
        let value = serde_json::from_str::<Value>(line).ok();
        value.and_then(|value| Some((value["step"].as_u64()?, value))).ok_or_else(|| {
            let what = format!("`{}` is not what this command writes, line {}", path.display(), number + 1);
            Error::usage(what, "name another folder for `--out`, or remove the file")
        })
    };
    text.lines().enumerate().map(read).collect()
}
