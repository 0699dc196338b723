//! What a run does while it makes no step: loading, evaluating, saving, exporting; on a terminal as a line with a spinner,
//! elsewhere as a plain line when it takes long.
//!
//! Begun by the train loop on the rank that talks. Looks at the world's record of what is done, from a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::console::Console;
use crate::config::Plan;
use crate::error::Result;
use crate::threads::spawn;
use crate::world::{Doing, World};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// What takes less is not shown.
const SHORT: Duration = Duration::from_millis(500);

/// Shows phases until it is dropped.
pub(crate) struct Phases {
    ended: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Phases {
    /// Has a run say what it does.
    ///
    /// # Errors
    /// Where the system has no thread left.
    pub(crate) fn show(console: &Console, plan: &Plan, world: &Arc<World>) -> Result<Self> {
        let (ended, is_ended) = mpsc::channel();
        let (name, patience) = (plan.run.name.clone(), Duration::from_secs(plan.log.line_secs));
        let mut shown = Phase { console: console.clone(), name, patience, now: None };
        let world = Arc::clone(world);
        let thread = spawn("sail-phases", move || {
            while is_ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                shown.look(&world.progress(), Instant::now());
            }
            shown.end();
        })?;
        Ok(Self { ended: Some(ended), thread: Some(thread) })
    }
}

impl Drop for Phases {
    fn drop(&mut self) {
        drop(self.ended.take());
        if let Some(thread) = self.thread.take() {
            // A panic in it has ended the process.
            drop(thread.join());
        }
    }
}

/// The phase that is shown, if one is.
struct Phase {
    console: Console,
    name: String,
    patience: Duration,
    now: Option<Now>,
}

struct Now {
    what: &'static str,
    step: u64,
    since: Instant,
    /// The world's count of what was done, when the phase was first seen.
    moves: u64,
    bar: Option<ProgressBar>,
    /// How long it takes until the next plain line.
    next: Duration,
}

impl Phase {
    fn look(&mut self, doing: &Doing, at: Instant) {
        if self.now.as_ref().is_some_and(|now| (now.what, now.step) != (doing.what, doing.step)) {
            self.end();
        }
        if doing.is_of_a_step() {
            return;
        }
        let Self { console, name, patience, now } = self;
        let now = now.get_or_insert_with(|| Now {
            what: doing.what,
            step: doing.step,
            since: at,
            moves: doing.moves,
            bar: None,
            next: *patience,
        });
        let (took, done) = (at - now.since, doing.moves - now.moves);
        let count = if done > 0 { format!(", {done} done") } else { String::new() };
        if console.shows_bars() && took >= SHORT {
            let style = ProgressStyle::with_template("{prefix} {spinner} {msg} {elapsed}");
            let made = || {
                let style = style.expect("invariant: the template is well formed");
                console.add(ProgressBar::new_spinner().with_style(style).with_prefix(name.clone()))
            };
            let bar = now.bar.get_or_insert_with(made);
            bar.set_message(format!("{}{count}", now.what));
            bar.tick();
        } else if !console.shows_bars() && took >= now.next {
            now.next *= 2;
            console.line(format!("{name}: {}{count}, for {} s", now.what, took.as_secs()));
        }
    }

    fn end(&mut self) {
        if let Some(Now { bar: Some(bar), .. }) = self.now.take() {
            bar.finish_and_clear();
        }
    }
}
