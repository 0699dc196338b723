//! The watch over the other ranks: when one of them is gone or stuck, this process ends and says which.
//!
//! A thread of every rank writes a beat into the store, reads that of the next rank, and looks whether a rank has
//! given up. A second thread, which does nothing that can block, looks whether the first one still gets answers.
//! A collective that fails tells the main thread, which asks here who is the reason ([`Watch::explain`]).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use sail_torch::Store;
use serde::{Deserialize, Serialize};

use super::agree::host_of;
use super::place::{Place, Rendezvous};
use crate::error::{Error, Result};
use crate::events::Console;

/// Between two beats.
const BEAT: Duration = Duration::from_millis(500);
/// A rank whose beat is the same after this long is not running.
const SILENCE: Duration = Duration::from_millis(2500);
/// How long the main thread has, once another rank has given up, to end with an error of its own.
const GRACE: Duration = Duration::from_secs(3);
/// Where the first rank that gives up says why.
const FAILURE: &str = "failure";

/// What a rank says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Beat {
    count: u64,
    step: u64,
    doing: String,
}

/// The two threads.
pub(super) struct Watch {
    shared: Arc<Shared>,
    store: Arc<Store>,
    threads: [JoinHandle<()>; 2],
}

struct Shared {
    rank: usize,
    size: usize,
    /// Where the store is, for messages.
    meeting: String,
    /// How long a rank may be silent, milliseconds.
    limit_ms: AtomicU64,
    doing: Mutex<(u64, &'static str)>,
    answered: Mutex<Instant>,
    ended: AtomicBool,
    console: Console,
}

impl Watch {
    /// Starts the threads, with a connection to the store of their own.
    pub(super) fn start(
        store: Store,
        place: &Place,
        meeting: &Rendezvous,
        limit: Duration,
        console: &Console,
    ) -> Result<Self> {
        let host = if meeting.hosts_store { "this process" } else { "another process" };
        let shared = Arc::new(Shared {
            rank: place.rank,
            size: place.size,
            meeting: format!("{}:{} (served by {host})", meeting.host, meeting.port),
            limit_ms: AtomicU64::new(limit.as_millis() as u64),
            doing: Mutex::new((0, "starting")),
            answered: Mutex::new(Instant::now()),
            ended: AtomicBool::new(false),
            console: console.clone(),
        });
        let store = Arc::new(store);
        let (beating, beating_store) = (Arc::clone(&shared), Arc::clone(&store));
        beating.beat(&store, 0)?;
        let beat = spawn("sail-beat", move || beating.keep_beating(&beating_store))?;
        let watching = Arc::clone(&shared);
        let watch = spawn("sail-watch", move || watching.keep_watching())?;
        Ok(Self { shared, store, threads: [beat, watch] })
    }

    pub(super) fn doing(&self, step: u64, what: &'static str) {
        *lock(&self.shared.doing) = (step, what);
    }

    pub(super) fn set_limit(&self, limit: Duration) {
        self.shared.limit_ms.store(limit.as_millis() as u64, Ordering::Relaxed);
    }

    /// Stops the threads; one that waits for an answer that does not come is left behind.
    pub(super) fn end(&self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        let started = Instant::now();
        while self.threads.iter().any(|thread| !thread.is_finished()) && started.elapsed() < SILENCE {
            for thread in &self.threads {
                thread.thread().unpark();
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Tells the others why this rank ends. Where another one is the reason, it is named instead.
    pub(super) fn explain(&self, error: Error) -> Error {
        self.shared.ended.store(true, Ordering::Relaxed);
        let blames_others = matches!(&error, Error::Torch(torch) if torch.is_distributed());
        let mut text = error.to_string();
        let mut explained = error;
        if blames_others && let Some(reason) = self.reason() {
            text = format!("{reason} ({text})");
            explained =
                Error::ranks(text.clone(), "its own output says more; the newest checkpoint is intact");
        }
        let first = self.store.add("failures", 1).is_ok_and(|count| count == 1);
        if first {
            let own = format!("rank {}: {}", self.shared.rank, text.lines().next().unwrap_or_default());
            // Where the store is gone the others notice that.
            let _ = self.store.set(FAILURE, own.as_bytes());
        }
        // The store may go with this process; the others read it first.
        thread::sleep(2 * BEAT);
        explained
    }

    /// Who keeps the others waiting, as far as the store knows.
    fn reason(&self) -> Option<String> {
        let shared = &self.shared;
        if self.store.has(FAILURE).ok()? {
            return Some(String::from_utf8_lossy(&self.store.get(FAILURE).ok()?).into_owned());
        }
        let others: Vec<usize> = (0..shared.size).filter(|rank| *rank != shared.rank).collect();
        let beats = |ranks: &[usize]| -> Option<Vec<Beat>> {
            ranks.iter().map(|rank| read_beat(&self.store, *rank).ok()).collect()
        };
        let before = beats(&others)?;
        thread::sleep(SILENCE);
        let after = beats(&others)?;
        let silent: Vec<String> = (others.iter().zip(before.iter().zip(&after)))
            .filter(|(_, (before, after))| before == after)
            .map(|(rank, (_, beat))| format!("{}, last seen at {}", self.name(*rank), beat.place()))
            .collect();
        if !silent.is_empty() {
            return Some(format!("no sign of life from {}", silent.join("; ")));
        }
        let own = lock(&shared.doing).0;
        let behind =
            others.iter().zip(&after).filter(|(_, beat)| beat.step < own).min_by_key(|(_, beat)| beat.step);
        let slow =
            behind.or_else(|| others.iter().zip(&after).find(|(_, beat)| beat.doing.starts_with("waiting")));
        slow.map(|(rank, beat)| format!("{} is still at {}", self.name(*rank), beat.place()))
    }

    fn name(&self, rank: usize) -> String {
        format!("rank {rank} on {}", host_of(&self.store, rank))
    }
}

impl Beat {
    fn place(&self) -> String {
        format!("step {}, {}", self.step, self.doing)
    }
}

impl Shared {
    fn beat(&self, store: &Store, count: u64) -> Result<()> {
        let (step, doing) = *lock(&self.doing);
        let beat = Beat { count, step, doing: doing.to_owned() };
        let text = serde_json::to_vec(&beat).map_err(Error::exchange)?;
        Ok(store.set(&beat_key(self.rank), &text)?)
    }

    fn keep_beating(&self, store: &Store) {
        let next = (self.rank + 1) % self.size;
        let (mut seen, mut changed) = (Beat::default(), Instant::now());
        for count in 1.. {
            thread::park_timeout(BEAT);
            if self.has_ended() {
                return;
            }
            let answer = self.beat(store, count).and_then(|()| self.look_around(store, next));
            if self.has_ended() {
                return;
            }
            match answer {
                Ok((Some(failure), _)) => {
                    thread::sleep(GRACE);
                    self.give_up(&failure);
                }
                Ok((None, beat)) => {
                    *lock(&self.answered) = Instant::now();
                    if beat.as_ref().is_some_and(|beat| *beat != seen) {
                        (seen, changed) = (beat.unwrap_or_default(), Instant::now());
                    }
                    if changed.elapsed() > self.limit() {
                        let (host, place) = (host_of(store, next), seen.place());
                        let secs = changed.elapsed().as_secs();
                        let text = format!(
                            "no sign of life from rank {next} on {host} for {secs} s, last seen at {place}"
                        );
                        if store.add("failures", 1).is_ok_and(|count| count == 1) {
                            let _ = store.set(FAILURE, text.as_bytes());
                        }
                        self.give_up(&text);
                    }
                }
                Err(error) => self.give_up(&format!("the store at {} is gone: {error}", self.meeting)),
            }
        }
    }

    /// Why another rank gave up, if one did, and how the next one is.
    fn look_around(&self, store: &Store, next: usize) -> Result<(Option<String>, Option<Beat>)> {
        if store.has(FAILURE)? {
            return Ok((Some(String::from_utf8_lossy(&store.get(FAILURE)?).into_owned()), None));
        }
        let there = next != self.rank && store.has(&beat_key(next))?;
        Ok((None, if there { Some(read_beat(store, next)?) } else { Some(Beat::default()) }))
    }

    fn keep_watching(&self) {
        while !self.has_ended() {
            let silent = lock(&self.answered).elapsed();
            if silent > self.limit() {
                self.give_up(&format!(
                    "the store at {} has not answered for {} s: its process is stopped, or the network to it is down",
                    self.meeting,
                    silent.as_secs()
                ));
            }
            thread::park_timeout(BEAT);
        }
    }

    fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms.load(Ordering::Relaxed))
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Ends the process at once: its main thread may wait for a rank that will never come.
    fn give_up(&self, why: &str) {
        if !self.has_ended() {
            let (step, doing) = *lock(&self.doing);
            self.console.alarm(format!(
                "error: {why}; rank {} ends at step {step}, {doing}\n\nhint: the newest checkpoint is intact; the \
                 same command resumes",
                self.rank
            ));
            // Without the handlers of C++'s libraries, which may wait for what is stuck.
            signal_hook::low_level::exit(1);
        }
    }
}

fn beat_key(rank: usize) -> String {
    format!("beat/{rank}")
}

fn read_beat(store: &Store, rank: usize) -> Result<Beat> {
    serde_json::from_slice(&store.get(&beat_key(rank))?).map_err(Error::exchange)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
    thread.map_err(|source| Error::Io { path: "thread".into(), source })
}
