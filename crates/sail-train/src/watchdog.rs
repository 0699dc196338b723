//! The watchdog over this process: a step that takes far longer than usual is logged with what all threads are in, and
//! a process in which nothing goes on is ended.
//!
//! It is a thread of the train loop's that reads what the main thread does (`world/progress.rs`); [`Judge`] decides.
//! Other ranks are not its matter but that of `world/watch.rs`. Whatever may wait for what the main thread holds (the
//! console, the allocator, the dynamic linker) is done on threads that are given up after a while.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use sail_torch::ThreadStack;
use tracing::warn;

use crate::config::WatchdogPlan;
use crate::error::Result;
use crate::events::Console;
use crate::threads::{lock, spawn};
use crate::world::{Doing, World, host_name, tell_of_end, within};

/// Of the thread; its own stack is of no interest.
const NAME: &str = "sail-watchdog";
/// Between two looks.
const TICK: Duration = Duration::from_millis(250);
/// A look that comes later than this after the one before counts as this much later: the process was stopped itself.
const LONGEST_TICK: Duration = Duration::from_secs(2);
/// Steps whose median is what is usual.
const WINDOW: usize = 50;
/// With fewer steps nothing is usual.
const FEW: usize = 5;
/// How long it may take to log what all threads are in, and to print why the process ends.
const TELLING: Duration = Duration::from_secs(20);
const PRINTING: Duration = Duration::from_secs(3);
/// Frames of a thread, the innermost ones, that are logged.
const SHOWN_FRAMES: usize = 40;

/// Watches until it is dropped.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    thread: Thread,
}

/// What the train loop tells the thread.
#[derive(Default)]
struct Shared {
    usual: Mutex<Usual>,
    over: AtomicBool,
}

/// The steps that this process has made.
#[derive(Clone, Debug, Default)]
struct Usual {
    /// The last one.
    done: u64,
    /// How long the newest ones took.
    took: VecDeque<Duration>,
}

impl Watchdog {
    /// Begins to watch the thread that trains in `world`.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub(crate) fn start(plan: &WatchdogPlan, world: &Arc<World>, console: &Console) -> Result<Self> {
        // What an earlier stage did last is no step of this one.
        world.doing(0, "starting");
        let shared = Arc::new(Shared::default());
        let watch =
            Watch { shared: Arc::clone(&shared), world: Arc::downgrade(world), console: console.clone() };
        let judge = Judge::new(plan);
        let thread = spawn(NAME, move || watch.keep_watching(judge))?;
        Ok(Self { shared, thread: thread.thread().clone() })
    }

    /// A step is done, and took this long.
    pub(crate) fn step_done(&self, step: u64, took: Duration) {
        let mut usual = self.shared.usual();
        usual.done = step;
        usual.took.push_back(took);
        if usual.took.len() > WINDOW {
            usual.took.pop_front();
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.thread.unpark();
    }
}

impl Shared {
    fn usual(&self) -> MutexGuard<'_, Usual> {
        lock(&self.usual)
    }
}

impl Usual {
    /// The median, once there are enough steps.
    fn median(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.took.iter().copied().collect();
        sorted.sort_unstable();
        (sorted.len() >= FEW).then(|| sorted[sorted.len() / 2])
    }
}

/// Decides what is too long. Time is what is counted here, so that one in which the process was stopped is none.
#[derive(Debug)]
struct Judge {
    plan: WatchdogPlan,
    /// What was seen last, and for how long nothing has moved since.
    moves: u64,
    still: Duration,
    /// The step that is being made, if one is, how long it takes so far, and how long it took when that was told last.
    step: Option<u64>,
    lasts: Duration,
    told: Option<Duration>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Finding {
    Fine,
    /// The step takes too long: to be told.
    Late,
    /// Nothing goes on: the process is to end.
    Stuck,
}

impl Judge {
    fn new(plan: &WatchdogPlan) -> Self {
        let (still, lasts) = (Duration::ZERO, Duration::ZERO);
        Self { plan: plan.clone(), moves: 0, still, step: None, lasts, told: None }
    }

    /// `passed` since the last look; `moves` is how often the main thread has done something, `step` the one that is
    /// being made.
    fn look(&mut self, passed: Duration, moves: u64, step: Option<u64>, median: Option<Duration>) -> Finding {
        let passed = passed.min(LONGEST_TICK);
        if step == self.step {
            self.lasts += passed;
        } else {
            (self.step, self.lasts, self.told) = (step, Duration::ZERO, None);
        }
        if moves == self.moves {
            self.still += passed;
        } else {
            (self.moves, self.still) = (moves, Duration::ZERO);
        }
        if self.still >= Duration::from_secs(self.plan.limit_secs) {
            return Finding::Stuck;
        }
        let from = self.told.map_or_else(|| self.too_long(median), |told| 2 * told);
        if step.is_none() || self.lasts < from {
            return Finding::Fine;
        }
        self.told = Some(self.lasts);
        Finding::Late
    }

    /// From when a step takes too long. The first steps warm up the device and fill buffers.
    fn too_long(&self, median: Option<Duration>) -> Duration {
        let least = Duration::from_secs(self.plan.least_secs);
        match median {
            Some(median) => median.mul_f64(self.plan.factor).max(least),
            None => least.mul_f64(self.plan.factor),
        }
    }
}

/// The thread.
struct Watch {
    shared: Arc<Shared>,
    world: Weak<World>,
    console: Console,
}

impl Watch {
    fn keep_watching(&self, mut judge: Judge) {
        let mut before = Instant::now();
        loop {
            thread::park_timeout(TICK);
            let Some(world) = self.world.upgrade() else { return };
            if self.shared.over.load(Ordering::Relaxed) {
                return;
            }
            let (now, doing, usual) = (Instant::now(), world.progress(), self.shared.usual().clone());
            let step = (doing.step > usual.done).then_some(doing.step);
            let finding = judge.look(now - before, doing.moves, step, usual.median());
            before = now;
            match finding {
                Finding::Fine => {}
                Finding::Late => tell(&late(&doing, judge.lasts, usual.median()), &world, &doing),
                Finding::Stuck => self.end(&stuck(&doing, judge.still), &world, &doing),
            }
        }
    }

    /// Ends the process, whatever its main thread is in. The other ranks learn why; where one of them keeps this one
    /// waiting, it is named.
    fn end(&self, why: &str, world: &Arc<World>, doing: &Doing) {
        tell(why, world, doing);
        let asked = Arc::clone(world);
        let late = within(TELLING, move || asked.who_is_late()).flatten();
        let why = late.map_or_else(|| why.to_owned(), |late| format!("{late}; {why}"));
        tell_of_end(&why);
        let console = self.console.clone();
        let hint = "the log says what each thread was in; the newest checkpoint is intact, and the same command resumes; \
                    where it was no fault, set a longer `watchdog.limit_secs`";
        within(PRINTING, move || console.alarm(format!("error: {why}\n\nhint: {hint}")));
        // Without the handlers of C++'s libraries, which may wait for what is stuck.
        signal_hook::low_level::exit(1);
    }
}

fn late(doing: &Doing, lasts: Duration, median: Option<Duration>) -> String {
    let (step, what, lasts) = (doing.step, doing.what, lasts.as_secs_f64());
    let usual = median.map_or("the first steps of this process".to_owned(), |median| {
        format!("usual are {:.1} s", median.as_secs_f64())
    });
    format!("step {step} takes {lasts:.1} s so far, {usual}; it is {what}")
}

fn stuck(doing: &Doing, still: Duration) -> String {
    let (step, what, secs) = (doing.step, doing.what, still.as_secs());
    format!("nothing has gone on for {secs} s at step {step}, {what}")
}

/// Logs `what` with the times of the step and the stacks of all threads, in bounded time.
fn tell(what: &str, world: &World, doing: &Doing) {
    let times = doing.times(world.waited());
    let (rank, host, process) = (world.rank(), host_name(), std::process::id());
    let [data, communication, compute] =
        [times.data, times.communication, times.compute].map(|time| time.as_secs_f64());
    let head = format!(
        "{what}\nrank {rank} on {host}, process {process}; of this step: data {data:.1} s, computation {compute:.1} s, \
         communication {communication:.1} s"
    );
    let told = within(TELLING, move || {
        let stacks = sail_torch::thread_stacks();
        let stacks = stacks.map_or_else(
            |error| format!("no stacks: {error}"),
            |mut stacks| {
                stacks.retain(|stack| stack.name != NAME);
                stacks_text(&stacks)
            },
        );
        warn!("{head}\n{stacks}");
    });
    if told.is_none() {
        within(PRINTING, || warn!("the stacks could not be read within {} s", TELLING.as_secs()));
    }
}

/// Threads with the same frames are shown once.
fn stacks_text(stacks: &[ThreadStack]) -> String {
    let mut groups: Vec<(String, Vec<&ThreadStack>)> = Vec::new();
    for stack in stacks {
        let body = frames_text(stack);
        match groups.iter_mut().find(|(other, _)| *other == body) {
            Some((_, threads)) => threads.push(stack),
            None => groups.push((body, vec![stack])),
        }
    }
    let mut text = String::new();
    for (body, threads) in groups {
        let first = threads[0];
        let more = if threads.len() > 1 { format!(" and {} more", threads.len() - 1) } else { String::new() };
        // Writing to a string does not fail.
        let _ = writeln!(text, "thread {} `{}`{more}\n{body}", first.tid, first.name);
    }
    text.trim_end().to_owned()
}

fn frames_text(stack: &ThreadStack) -> String {
    if let Some(why) = &stack.silent {
        return format!("    no frames: {why}");
    }
    let mut lines: Vec<String> =
        stack.frames.iter().take(SHOWN_FRAMES).map(|frame| format!("    {frame}")).collect();
    if let Some(more) = stack.frames.len().checked_sub(SHOWN_FRAMES).filter(|more| *more > 0) {
        lines.push(format!("    and {more} more"));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn judge() -> Judge {
        Judge::new(&WatchdogPlan { factor: 10.0, least_secs: 60, limit_secs: 300 })
    }

    /// The seconds at which a main thread that does something every second, always in the same step, is found late.
    fn late_at(median: Option<Duration>, step: Option<u64>, secs: u64) -> Vec<u64> {
        let mut judge = judge();
        let mut found = Vec::new();
        for second in 0..=secs {
            match judge.look(SECOND, second + 1, step, median) {
                Finding::Fine => {}
                Finding::Late => found.push(second),
                Finding::Stuck => panic!("stuck after {second} s"),
            }
        }
        found
    }

    #[test]
    fn a_step_is_late_by_what_is_usual_and_is_told_when_its_time_has_doubled() {
        for (what, median, step, late) in [
            ("short steps: the least time", Some(SECOND), Some(8), vec![60, 120, 240, 480]),
            ("at the border", Some(6 * SECOND), Some(8), vec![60, 120, 240, 480]),
            ("long steps: the factor", Some(20 * SECOND), Some(8), vec![200, 400]),
            ("the first steps", None, Some(1), vec![600]),
            ("no step: an evaluation, a save", Some(SECOND), None, vec![]),
        ] {
            let secs = if median.is_none() { 700 } else { 500 };
            assert_eq!(late_at(median, step, secs), late, "{what}");
        }
    }

    #[test]
    fn a_new_step_begins_anew() {
        let mut judge = judge();
        let mut moves = 0;
        let mut look = |step: u64| {
            moves += 1;
            judge.look(SECOND, moves, Some(step), Some(SECOND))
        };
        for step in 1..200 {
            for _ in 0..50 {
                assert_eq!(look(step), Finding::Fine);
            }
        }
        let late = (0..100).filter(|_| look(200) == Finding::Late).count();
        assert_eq!(late, 1, "once for one step");
    }

    #[test]
    fn what_does_not_move_ends_at_the_limit_whatever_it_is() {
        for step in [None, Some(3)] {
            let mut judge = judge();
            let mut at = |second: u64, moves| {
                let finding = judge.look(SECOND, moves, step, Some(100 * SECOND));
                assert!(finding != Finding::Late, "{second}: 1000 s are not over");
                finding
            };
            for second in 0..250 {
                assert_eq!(at(second, 1), Finding::Fine);
            }
            // It went on once.
            for second in 0..300 {
                assert_eq!(at(second, 2), Finding::Fine, "{second}");
            }
            assert_eq!(at(300, 2), Finding::Stuck);
        }
    }

    #[test]
    fn a_process_that_was_stopped_is_not_blamed() {
        let mut judge = judge();
        assert_eq!(judge.look(SECOND, 1, Some(2), Some(SECOND)), Finding::Fine);
        assert_eq!(judge.look(90_000 * SECOND, 1, Some(2), Some(SECOND)), Finding::Fine);
        assert_eq!(judge.still, LONGEST_TICK);
        assert_eq!(judge.lasts, LONGEST_TICK);
    }

    #[test]
    fn the_median_is_of_the_newest_steps_and_needs_some() {
        let took =
            |secs: &[u64]| Usual { done: 0, took: secs.iter().map(|secs| *secs as u32 * SECOND).collect() };
        assert_eq!(took(&[1, 2, 3, 4]).median(), None);
        assert_eq!(took(&[9, 1, 100, 2, 3]).median(), Some(3 * SECOND));
        let (world, plan) = (Arc::new(World::alone()), judge().plan);
        let watchdog = Watchdog::start(&plan, &world, &Console::new()).unwrap();
        for step in 1..=80 {
            watchdog.step_done(step, if step <= 30 { 100 * SECOND } else { SECOND });
        }
        let usual = watchdog.shared.usual().clone();
        assert_eq!((usual.done, usual.took.len(), usual.median()), (80, WINDOW, Some(SECOND)));
    }

    #[test]
    fn stacks_are_grouped_and_cut() {
        let stack = |tid, name: &str, frames: &[&str], silent: Option<&str>| ThreadStack {
            tid,
            name: name.to_owned(),
            frames: frames.iter().map(|&frame| frame.to_owned()).collect(),
            silent: silent.map(str::to_owned),
        };
        let deep = vec!["recurses"; 45];
        let stacks = [
            stack(7, "sail-train", &["poll", "next_pack at session.rs:150"], None),
            stack(8, "worker", &["futex"], None),
            stack(9, "deep", &deep, None),
            stack(10, "worker", &["futex"], None),
            stack(11, "cuda", &[], Some("it blocks signals")),
        ];
        let text = stacks_text(&stacks);
        assert!(
            text.starts_with("thread 7 `sail-train`\n    poll\n    next_pack at session.rs:150\n"),
            "{text}"
        );
        assert!(text.contains("thread 8 `worker` and 1 more\n    futex\nthread 9 "), "{text}");
        assert_eq!(text.matches("    recurses\n").count(), SHOWN_FRAMES);
        assert!(text.contains("    and 5 more\n"), "{text}");
        assert!(text.contains("thread 11 `cuda`\n    no frames: it blocks signals"), "{text}");
    }
}
