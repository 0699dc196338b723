//! The watch over the other ranks: when one of them is gone or stuck, this process ends and says which.
//!
//! A thread of every rank writes a beat into the store, reads that of the next rank, and looks whether a rank has
//! given up. A second thread, which does nothing that can block, looks whether the first one still gets answers:
//! a call to a store whose process is stopped, or behind a broken link, never returns. A collective that fails
//! tells the main thread, which asks here who is the reason ([`Watch::explain`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use sail_torch::Store;

use super::agree::{host_name, host_of};
use super::beats::{self, Beat};
use super::place::{Place, Rendezvous, Server};
use super::progress::{Doing, Progress};
use crate::error::{Error, Result};
use crate::events::Console;
use crate::threads::{lock, spawn};

/// Between two beats.
const BEAT: Duration = Duration::from_millis(500);
/// After this long without an answer a call to the store is not likely to return.
const SILENCE: Duration = Duration::from_millis(2500);
/// How long the main thread has, once another rank has given up, to end with an error of its own.
const GRACE: Duration = Duration::from_secs(3);
/// How long the others have to read why a rank gives up, where the store goes with it.
const TO_BE_READ: Duration = Duration::from_secs(1);
/// How long it may take to find out who is the reason of an error.
const EXPLAIN: Duration = Duration::from_secs(5);

/// For an end that may come in any thread.
static OF_PROCESS: OnceLock<(Arc<Shared>, Arc<Store>)> = OnceLock::new();

/// Tells the others, where there are any, that this process ends at once and why; in bounded time.
pub(crate) fn tell_of_end(text: &str) {
    let Some((shared, store)) = OF_PROCESS.get() else { return };
    let told =
        format!("rank {} on {}: {}", shared.rank, host_name(), text.lines().next().unwrap_or_default());
    let telling = thread::spawn(move || shared.tell(store, &told));
    let started = Instant::now();
    while !telling.is_finished() && started.elapsed() < EXPLAIN {
        thread::sleep(Duration::from_millis(10));
    }
}

/// The two threads.
pub(super) struct Watch {
    shared: Arc<Shared>,
    /// The connection of the beats, once there is one.
    store: Option<Arc<Store>>,
    threads: Vec<thread::JoinHandle<()>>,
}

struct Shared {
    rank: usize,
    size: usize,
    serves_store: bool,
    /// How long a rank may be silent, milliseconds.
    limit_ms: AtomicU64,
    progress: Arc<Progress>,
    /// What this rank has begun together with the others.
    begun: Arc<AtomicU64>,
    state: Mutex<State>,
    console: Console,
}

struct State {
    phase: Phase,
    /// Who serves the store, for messages.
    server: String,
    /// Whether all ranks have met there.
    met: bool,
    /// When the store answered last.
    answered: Instant,
    /// Why another rank has given up.
    failure: Option<String>,
}

enum Phase {
    Working,
    /// The main thread looks for the reason of its error; if it has not ended by then, it is held up itself.
    Failing {
        until: Instant,
        error: String,
        code: u8,
    },
    Over,
}

impl Watch {
    /// Begins to look whether the store answers, before it is connected to.
    pub(super) fn start(
        place: &Place,
        meeting: &Rendezvous,
        limit: Duration,
        console: &Console,
        progress: &Arc<Progress>,
    ) -> Result<Self> {
        let state = State {
            phase: Phase::Working,
            server: server(meeting, "rank 0"),
            met: false,
            answered: Instant::now(),
            failure: None,
        };
        let shared = Arc::new(Shared {
            rank: place.rank,
            size: place.size,
            serves_store: place.serves_store(),
            limit_ms: AtomicU64::new(limit.as_millis() as u64),
            progress: Arc::clone(progress),
            begun: Arc::default(),
            state: Mutex::new(state),
            console: console.clone(),
        });
        let watching = Arc::clone(&shared);
        let watch = spawn("sail-watch", move || watching.keep_watching())?;
        Ok(Self { shared, store: None, threads: vec![watch] })
    }

    /// Begins to beat, once all ranks have met, with a connection to the store of its own.
    pub(super) fn beat(&mut self, store: Store, meeting: &Rendezvous, limit: Duration) -> Result<()> {
        let store = Arc::new(store);
        self.shared.beat(&store, 0)?;
        let main = format!("rank 0 on {}", host_of(&store, 0));
        {
            let mut state = self.shared.state();
            (state.server, state.met, state.answered) = (server(meeting, &main), true, Instant::now());
        }
        self.set_limit(limit);
        // A process trains in one world.
        let _ = OF_PROCESS.set((Arc::clone(&self.shared), Arc::clone(&store)));
        let (beating, beating_store) = (Arc::clone(&self.shared), Arc::clone(&store));
        self.store = Some(store);
        self.threads.push(spawn("sail-beat", move || beating.keep_beating(&beating_store))?);
        Ok(())
    }

    /// The store has answered.
    pub(super) fn heard(&self) {
        self.shared.state().answered = Instant::now();
    }

    /// Counts what this rank begins together with the others.
    pub(super) fn begun(&self) -> &Arc<AtomicU64> {
        &self.shared.begun
    }

    pub(super) fn set_limit(&self, limit: Duration) {
        self.shared.limit_ms.store(limit.as_millis() as u64, Ordering::Relaxed);
    }

    /// Stops the threads; one that waits for an answer that does not come is left behind.
    pub(super) fn end(&self) {
        self.shared.state().phase = Phase::Over;
        let started = Instant::now();
        while self.threads.iter().any(|thread| !thread.is_finished()) && started.elapsed() < SILENCE {
            self.threads.iter().map(thread::JoinHandle::thread).for_each(Thread::unpark);
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Tells the others why this rank ends. Where another one is the reason, it is named instead.
    pub(super) fn explain(&self, error: Error) -> Error {
        let shared = &self.shared;
        // Beats go on meanwhile, so that no other rank takes this one for the reason.
        let until = Instant::now() + EXPLAIN;
        shared.state().phase = Phase::Failing { until, error: error.to_string(), code: error.exit_code() };
        let blames_others = matches!(&error, Error::Torch(torch) if torch.is_distributed());
        let reason = if blames_others { self.reason() } else { None };
        let (error, told) = if let Some(reason) = reason {
            let hint = "its own output says more; the newest checkpoint is intact";
            (Error::ranks(format!("{reason} ({error})"), hint), reason)
        } else {
            let own = error.to_string();
            let first = own.lines().next().unwrap_or_default();
            let told = format!("rank {} on {}: {first}", shared.rank, host_name());
            (error, told)
        };
        if let Some(store) = &self.store
            && shared.answers()
        {
            shared.tell(store, &told);
        }
        error
    }

    /// Who keeps the others waiting, as far as is known.
    pub(super) fn reason(&self) -> Option<String> {
        let shared = &self.shared;
        if !shared.answers() {
            // Unless this process was stopped itself and goes on just now.
            thread::sleep(BEAT);
        }
        if let Some(failure) = shared.failure() {
            return Some(failure);
        }
        if !shared.answers() {
            return Some(shared.silent_store());
        }
        // The store may go at any moment, with a rank that has said why.
        let own = shared.begun.load(Ordering::Relaxed);
        let ask = |store: &Arc<Store>| beats::who_is_late(store, shared.rank, shared.size, own);
        let asked = self.store.as_ref().map_or(Ok(None), ask);
        asked.unwrap_or_else(|error| Some(shared.failure().unwrap_or_else(|| shared.gone_store(&error))))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state().phase = Phase::Over;
    }
}

impl Shared {
    fn beat(&self, store: &Store, count: u64) -> Result<()> {
        let doing = self.progress.now();
        let begun = self.begun.load(Ordering::Relaxed);
        Beat { count, step: doing.step, doing: doing.what.to_owned(), begun }.write(store, self.rank)
    }

    fn keep_beating(&self, store: &Store) {
        let next = (self.rank + 1) % self.size;
        let (mut seen, mut changed) = (Beat::default(), Instant::now());
        let (mut own, mut moved) = (0, Instant::now());
        for count in 1.. {
            if park() {
                (changed, moved) = (Instant::now(), Instant::now());
            }
            let begun = self.begun.load(Ordering::Relaxed);
            if begun != own {
                (own, moved) = (begun, Instant::now());
            }
            if self.is_over() {
                return;
            }
            match self.beat(store, count).and_then(|()| self.look_around(store, next)) {
                Ok(Some(beat)) => {
                    self.state().answered = Instant::now();
                    if beat != seen {
                        (seen, changed) = (beat, Instant::now());
                    }
                    if changed.elapsed() > self.limit() && self.is_working() {
                        let (rank, secs) = (beats::name(store, next), changed.elapsed().as_secs());
                        let place = seen.place();
                        let text = format!("no sign of life from {rank} for {secs} s, last seen at {place}");
                        self.tell(store, &text);
                        self.give_up(&text);
                    }
                    // On CUDA the host waits for the device, where no collective reports its timeout.
                    if moved.elapsed() > self.limit() + GRACE && self.is_working() {
                        moved = Instant::now();
                        if let Ok(Some(reason)) = beats::who_is_late(store, self.rank, self.size, own) {
                            self.tell(store, &reason);
                            self.give_up(&reason);
                        }
                    }
                }
                Ok(None) => {
                    self.state().answered = Instant::now();
                    if self.is_working() {
                        thread::sleep(GRACE);
                        self.give_up(&self.failure().unwrap_or_default());
                    }
                }
                Err(error) => {
                    // The main thread may be about to end for the same reason.
                    thread::sleep(BEAT);
                    self.give_up(&self.gone_store(&error));
                    return;
                }
            }
        }
    }

    /// How the next rank is; nothing when one has given up, which is taken note of.
    fn look_around(&self, store: &Store, next: usize) -> Result<Option<Beat>> {
        if let Some(failure) = beats::failure(store)? {
            self.state().failure = Some(failure);
            return Ok(None);
        }
        Ok(Some(if next == self.rank { Beat::default() } else { Beat::read(store, next)? }))
    }

    fn keep_watching(&self) {
        while !self.is_over() {
            let silent = self.silent();
            if silent > self.limit() && self.is_working() {
                self.give_up(&self.silent_store());
            }
            if let Phase::Failing { until, error, code } = &self.state().phase
                && Instant::now() > *until
            {
                self.end_process(error, *code);
            }
            if park() {
                self.state().answered = Instant::now();
            }
        }
    }

    /// Tells the others why this rank gives up, unless another one has been first.
    fn tell(&self, store: &Store, text: &str) {
        // Where the store is gone the others notice that.
        let _ = beats::tell_failure(store, text);
        if self.serves_store {
            thread::sleep(TO_BE_READ);
        }
    }

    fn silent_store(&self) -> String {
        let State { server, met, answered, .. } = &*self.state();
        let other = if *met { "" } else { ", or something else has the port" };
        let secs = answered.elapsed().as_secs();
        format!("{server} has not answered for {secs} s: it is stopped, or the network to it is down{other}")
    }

    fn gone_store(&self, error: &Error) -> String {
        format!("{} is gone: {error}", self.state().server)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    fn silent(&self) -> Duration {
        self.state().answered.elapsed()
    }

    /// Whether a call to the store may return.
    fn answers(&self) -> bool {
        self.silent() < SILENCE
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms.load(Ordering::Relaxed))
    }

    fn is_working(&self) -> bool {
        matches!(self.state().phase, Phase::Working)
    }

    fn is_over(&self) -> bool {
        matches!(self.state().phase, Phase::Over)
    }

    /// Ends the process at once: its main thread may wait for a rank that will never come.
    fn give_up(&self, why: &str) {
        if self.is_working() {
            let Doing { step, what: doing, .. } = self.progress.now();
            let rank = self.rank;
            let hint = "the newest checkpoint is intact; the same command resumes";
            self.end_process(&format!("{why}; rank {rank} ends at step {step}, {doing}\n\nhint: {hint}"), 1);
        }
    }

    fn end_process(&self, error: &str, code: u8) {
        self.console.alarm(format!("error: {error}"));
        // Without the handlers of C++'s libraries, which may wait for what is stuck.
        signal_hook::low_level::exit(code.into());
    }
}

/// Waits for the time of a beat, and says whether it was so much more that the process must have been stopped
/// itself: then it knows nothing of the others.
fn park() -> bool {
    let started = Instant::now();
    thread::park_timeout(BEAT);
    started.elapsed() > SILENCE
}

fn server(meeting: &Rendezvous, main: &str) -> String {
    let who = match meeting.served_by {
        Server::Rank0 => main,
        Server::Agent => "the launcher or the agent of `torchrun`",
    };
    format!("{who}, which serves the ranks' store at {}:{},", meeting.host, meeting.port)
}
