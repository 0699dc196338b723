//! Who may ask a run to save and stop: a signal, a step given on the command line, a file in the run's folder, the end
//! of the time that it has.
//!
//! Asked by the train loop once a step; the ranks decide together.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tracing::warn;

use crate::config::Plan;
use crate::error::{Error, Result};

/// The file in a run's folder.
const FILE: &str = "stop";
/// When the job of this process ends, seconds since 1970.
const SLURM_END: &str = "SLURM_JOB_END_TIME";

/// Why a run stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Signal,
    Step,
    File(PathBuf),
    Time(Duration),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal => f.write_str("a signal asked for it"),
            Self::Step => f.write_str("`--stop-at` asked for it"),
            Self::File(path) => write!(f, "`{}` asked for it", path.display()),
            Self::Time(left) => write!(f, "{} s are left of its time", left.as_secs()),
        }
    }
}

/// What is known from the start of the process.
#[derive(Clone, Debug)]
pub struct Stopping {
    /// Set from outside to ask for a save and a stop.
    pub flag: Arc<AtomicBool>,
    /// Save and stop after this step.
    pub at_step: Option<u64>,
    /// When the process began.
    pub started: Instant,
    /// When a scheduler ends it.
    pub ends: Option<Instant>,
}

impl Stopping {
    /// Of a process that begins now, with the time that its scheduler gives it.
    ///
    /// # Errors
    /// [`Error::Usage`] for a scheduler's time that cannot be read.
    pub fn new(at_step: Option<u64>) -> Result<Self> {
        let started = Instant::now();
        let end = std::env::var(SLURM_END).ok().filter(|text| !text.is_empty());
        let ends = end.map(|text| end_of_job(&text, started)).transpose()?;
        Ok(Self { flag: Arc::default(), at_step, started, ends })
    }

    /// Why the run of `plan` is to stop after `step`, which is being made; on the main rank also for its folder.
    pub(crate) fn reason(&self, plan: &Plan, step: u64, is_main: bool) -> Option<Reason> {
        let file = plan.run.dir.join(FILE);
        if self.flag.load(Ordering::Relaxed) {
            Some(Reason::Signal)
        } else if self.is_reached(step) {
            Some(Reason::Step)
        } else if is_main && file.exists() {
            Some(Reason::File(file))
        } else {
            self.time_left(plan).map(Reason::Time)
        }
    }

    /// Whether a run that has come to `step` already is not to make another one.
    pub(crate) fn is_reached(&self, step: u64) -> bool {
        self.at_step.is_some_and(|at| step >= at)
    }

    /// Why no stage is to follow that of `plan`, which has ended.
    pub(crate) fn reason_between(&self, plan: &Plan, is_main: bool) -> Option<Reason> {
        // `--stop-at` counts steps of a running stage.
        Self { at_step: None, ..self.clone() }.reason(plan, 0, is_main)
    }

    /// What is left of the process's time, once that is too little to go on.
    fn time_left(&self, plan: &Plan) -> Option<Duration> {
        let limit = plan.run.time_limit_secs.map(Duration::from_secs);
        let own = limit.and_then(|limit| self.started.checked_add(limit));
        let end = [own, self.ends].into_iter().flatten().min()?;
        let left = end.saturating_duration_since(Instant::now());
        (left <= Duration::from_secs(plan.run.time_margin_secs)).then_some(left)
    }
}

/// To be called on the main rank when the run of `plan` has stopped, for whatever reason: a file that asked for it is
/// not to stop the next one.
pub(crate) fn remove_file(plan: &Plan) {
    let path = plan.run.dir.join(FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            warn!("{} cannot be removed, and will stop the next run as well: {error}", path.display());
        }
        _ => {}
    }
}

/// The moment of a time of the wall clock, which may be set later without moving it.
fn end_of_job(text: &str, now: Instant) -> Result<Instant> {
    let unreadable = || {
        Error::usage(
            format!("`{SLURM_END}={text}` is not a number of seconds since 1970"),
            "unset it; the run then goes on until a signal comes",
        )
    };
    let end = Duration::from_secs(text.trim().parse().map_err(|_| unreadable())?);
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.checked_add(end.saturating_sub(since_1970)).ok_or_else(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_job_is_a_moment_from_now() {
        let now = Instant::now();
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let in_an_hour = end_of_job(&format!("{}\n", unix + 3600), now).unwrap() - now;
        assert!((3598..=3600).contains(&in_an_hour.as_secs()), "{in_an_hour:?}");
        assert_eq!(end_of_job("12", now).unwrap(), now);
        for text in ["", "soon", "-1", "1e9", &u64::MAX.to_string()] {
            let error = end_of_job(text, now).unwrap_err().to_string();
            assert!(error.contains("SLURM_JOB_END_TIME") && error.contains("hint:"), "{error}");
        }
    }
}
