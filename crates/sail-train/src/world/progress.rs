//! What the main thread of this process does, for those who watch it: the ranks' watch and the watchdog.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::threads::lock;

/// The phase in which a rank waits for its own data.
pub(crate) const DATA: &str = "waiting for data";
/// The other phases of a step.
pub(crate) const DATA_OF_OTHERS: &str = "waiting for the data of the others";
pub(crate) const GRADIENTS: &str = "computing gradients";
pub(crate) const AGREEING: &str = "agreeing on the step";
pub(crate) const UPDATING: &str = "updating";

/// What is done now; written by the main thread, read by others.
#[derive(Debug)]
pub(crate) struct Progress(Mutex<Doing>);

/// A moment of it.
#[derive(Clone, Debug)]
pub(crate) struct Doing {
    /// The step that is being made, or the last one where none is.
    pub(crate) step: u64,
    /// The phase, for messages.
    pub(crate) what: &'static str,
    /// How often something was done.
    pub(crate) moves: u64,
    /// Since when the phase lasts.
    since: Instant,
    /// Since when the step is the one that it is, and how long works had been waited for until then.
    step_since: Instant,
    waited_before: Duration,
    /// Data waited for in this step, in phases that are over.
    data: Duration,
}

impl Doing {
    /// Whether it is a part of a step.
    pub(crate) fn is_of_a_step(&self) -> bool {
        [DATA, DATA_OF_OTHERS, GRADIENTS, AGREEING, UPDATING].contains(&self.what)
    }
}

/// How a step's time was spent so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    /// Waiting for data of its own.
    pub(crate) data: Duration,
    /// Waiting for works of a group, that is for other ranks and the network between.
    pub(crate) communication: Duration,
    /// The rest.
    pub(crate) compute: Duration,
}

impl Default for Progress {
    fn default() -> Self {
        let (now, none) = (Instant::now(), Duration::ZERO);
        let what = "starting";
        Self(Mutex::new(Doing {
            step: 0,
            what,
            moves: 0,
            since: now,
            step_since: now,
            waited_before: none,
            data: none,
        }))
    }
}

impl Progress {
    /// A phase begins; `waited` is how long works were waited for since the process started.
    pub(crate) fn begin(&self, step: u64, what: &'static str, waited: Duration) {
        self.change(|doing| doing.begin(step, what, waited, Instant::now()));
    }

    /// Something was done, and the phase goes on.
    pub(crate) fn go_on(&self) {
        self.change(|doing| doing.moves += 1);
    }

    pub(crate) fn now(&self) -> Doing {
        lock(&self.0).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Doing)) {
        change(&mut lock(&self.0));
    }
}

impl Doing {
    fn begin(&mut self, step: u64, what: &'static str, waited: Duration, now: Instant) {
        if step != self.step {
            (self.step_since, self.waited_before, self.data) = (now, waited, Duration::ZERO);
        } else if self.what == DATA {
            self.data += now - self.since;
        }
        (self.step, self.what, self.since) = (step, what, now);
        self.moves += 1;
    }

    /// How the step's time was spent until now, `waited` being as in [`Progress::begin`].
    pub(crate) fn times(&self, waited: Duration) -> Times {
        self.times_at(waited, Instant::now())
    }

    fn times_at(&self, waited: Duration, now: Instant) -> Times {
        let waiting = if self.what == DATA { now - self.since } else { Duration::ZERO };
        let data = self.data + waiting;
        let communication = waited.saturating_sub(self.waited_before);
        let compute = (now - self.step_since).saturating_sub(data + communication);
        Times { data, communication, compute }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_a_step_begin_with_it_and_add_up() {
        let started = Instant::now();
        let secs = Duration::from_secs;
        let mut doing = Progress::default().now();
        let mut begin = |at, step, what, waited| {
            doing.begin(step, what, secs(waited), started + secs(at));
            doing.clone()
        };
        begin(100, 4, DATA, 50);
        begin(103, 4, "computing gradients", 50);
        begin(110, 5, DATA, 52);
        begin(111, 5, "waiting for the data of the others", 52);
        // The streams of this rank had ended, others go on.
        begin(113, 5, DATA, 54);
        let doing = begin(117, 5, "computing gradients", 54);
        let times = |waited, at| doing.times_at(secs(waited), started + secs(at));
        assert_eq!(times(54, 117), Times { data: secs(5), communication: secs(2), compute: secs(0) });
        assert_eq!(times(55, 130), Times { data: secs(5), communication: secs(3), compute: secs(12) });
        let doing = Doing { what: DATA, ..doing };
        assert_eq!(doing.times_at(secs(54), started + secs(127)).data, secs(15));
    }

    #[test]
    fn what_goes_on_is_seen_to_move() {
        let progress = Progress::default();
        let before = progress.now();
        progress.go_on();
        let after = progress.now();
        assert!(after.moves > before.moves && after.since == before.since);
    }
}
