//! Which checkpoints of a run may go.

use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::{COMPLETE, folder_name, list};
use crate::config::CheckpointPlan;
use crate::error::{Error, Result};

/// A checkpoint in a run's folder.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Found {
    step: u64,
    /// Whether its removal was not begun yet.
    complete: bool,
    held_out: Option<f64>,
}

/// After the checkpoint of `step` was written: removes what the plan does not keep, and checkpoints of later
/// steps, which belong to a course that this run has left (it resumed before them). `held_out` has the losses that
/// were measured, by step.
///
/// # Errors
/// When a folder cannot be removed.
pub(super) fn retain(
    run_dir: &Path,
    step: u64,
    plan: &CheckpointPlan,
    held_out: &BTreeMap<u64, f64>,
) -> Result<()> {
    let look = |(step, path): (u64, PathBuf)| Found {
        step,
        complete: path.join(COMPLETE).exists(),
        held_out: held_out.get(&step).copied(),
    };
    let found: Vec<Found> = list(run_dir)?.into_iter().map(look).collect();
    let abandoned: Vec<u64> = found.iter().map(|found| found.step).filter(|found| *found > step).collect();
    if !abandoned.is_empty() {
        let names: Vec<String> = abandoned.iter().map(|step| folder_name(*step)).collect();
        warn!("removing checkpoints of later steps, which this run does not continue: {}", names.join(" "));
    }
    for step in superfluous(&found, step, plan) {
        let path = run_dir.join(folder_name(step));
        // Without its marker a half-removed folder is no checkpoint.
        let marker = path.join(COMPLETE);
        if marker.exists() {
            fs::remove_file(&marker).map_err(Error::io(&marker))?;
        }
        fs::remove_dir_all(&path).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// The steps of those that are not kept after the checkpoint of `step` was written, oldest first.
fn superfluous(found: &[Found], step: u64, plan: &CheckpointPlan) -> Vec<u64> {
    let mut usable: Vec<&Found> = found.iter().filter(|found| found.complete && found.step <= step).collect();
    usable.sort_by_key(|found| Reverse(found.step));
    let mut best: Vec<&&Found> = usable.iter().filter(|found| found.held_out.is_some()).collect();
    // Of equally good ones the newest, which a stable sort leaves first.
    best.sort_by(|a, b| a.held_out.partial_cmp(&b.held_out).unwrap_or(Ordering::Equal));
    let newest = usable.iter().take(plan.keep_last).map(|found| found.step);
    let best = best.into_iter().take(plan.keep_best.unwrap_or(0)).map(|found| found.step);
    let regular = usable.iter().map(|found| found.step);
    let regular = regular.filter(|step| plan.keep_every.is_some_and(|every| step.is_multiple_of(every)));
    let kept: Vec<u64> = newest.chain(best).chain(regular).collect();
    let mut superfluous: Vec<u64> =
        found.iter().map(|found| found.step).filter(|step| !kept.contains(step)).collect();
    superfluous.sort_unstable();
    superfluous
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case<'a> = (&'a str, &'a [(u64, Option<f64>)], &'a [u64], u64, (usize, u64, usize), &'a [u64]);

    /// What is kept of checkpoints written as `(step, held-out loss)`, of which those in `broken` lack their marker.
    fn kept(
        written: &[(u64, Option<f64>)],
        broken: &[u64],
        step: u64,
        plan: (usize, u64, usize),
    ) -> Vec<u64> {
        let (keep_last, every, best) = plan;
        let plan = CheckpointPlan {
            keep_last,
            keep_every: (every > 0).then_some(every),
            keep_best: (best > 0).then_some(best),
            every: None,
            max_failures: 0,
            timeout_secs: 1,
        };
        let found: Vec<Found> = written
            .iter()
            .map(|&(step, held_out)| Found { step, complete: !broken.contains(&step), held_out })
            .collect();
        let gone = superfluous(&found, step, &plan);
        written.iter().map(|(step, _)| *step).filter(|step| !gone.contains(step)).collect()
    }

    #[test]
    fn what_is_kept() {
        let steps = |steps: &[u64]| steps.iter().map(|step| (*step, None)).collect::<Vec<_>>();
        let six = steps(&[10, 20, 30, 40, 50, 60]);
        let measured =
            [(10, Some(3.0)), (20, Some(1.0)), (30, None), (40, Some(1.0)), (50, Some(2.0)), (60, None)];
        let cases: [Case; 11] = [
            ("the newest", &six, &[], 60, (2, 0, 0), &[50, 60]),
            ("fewer than are kept", &six[..2], &[], 20, (3, 0, 0), &[10, 20]),
            ("every 30th beside the newest", &six, &[], 60, (1, 30, 0), &[30, 60]),
            ("every 7th is none of them", &six, &[], 60, (1, 7, 0), &[60]),
            ("the best", &measured, &[], 60, (1, 0, 1), &[40, 60]),
            ("the two best, of equals both", &measured, &[], 60, (1, 0, 2), &[20, 40, 60]),
            ("more best ones than were measured", &measured, &[], 60, (1, 0, 9), &[10, 20, 40, 50, 60]),
            ("all rules together", &measured, &[], 60, (1, 50, 1), &[40, 50, 60]),
            ("a broken one does not count as kept", &six, &[50], 60, (2, 0, 0), &[40, 60]),
            ("a broken one is not the best", &measured, &[40], 60, (1, 0, 1), &[20, 60]),
            ("later ones were left", &six, &[], 40, (2, 30, 0), &[30, 40]),
        ];
        for (what, written, broken, step, plan, expected) in cases {
            assert_eq!(kept(written, broken, step, plan), expected, "{what}");
        }
        assert_eq!(kept(&[], &[], 0, (1, 0, 0)), Vec::<u64>::new());
    }
}
