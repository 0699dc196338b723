//! What ranks tell each other through the store, before there is a group: that all are there and were started
//! alike, and later that they are about to do the same thing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use sail_torch::Store;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::info;

use super::beats::listed;
use super::place::{Place, Starter};
use crate::checkpoint::checksum;
use crate::error::{Error, Result};
use crate::program;

/// What a rank has, by name.
pub type Fields = BTreeMap<String, String>;

/// How long the others wait for the main rank's answer beyond the time that it waits for them.
const GRACE: Duration = Duration::from_secs(3);
/// Between two looks at who has come.
const POLL: Duration = Duration::from_millis(50);
/// How long the others have to read the main rank's answer, where the store goes with it.
const TO_BE_READ: Duration = Duration::from_secs(1);
/// How long the one that serves the store waits for the others at the end.
const LEAVE: Duration = Duration::from_secs(10);
/// Keys: the main rank's number of ranks, its answer, and what a rank has found wrong with itself.
const SIZE: &str = "size";
const MET: &str = "met";
const PROBLEM: &str = "problem";
const ALL_LEFT: &str = "all left";
/// Between two words of the main rank on whom it waits for.
const TELL: Duration = Duration::from_secs(15);

/// What a rank says when it comes.
#[derive(Serialize, Deserialize)]
struct Hello {
    host: String,
    pid: u32,
    size: usize,
    /// Where the others reach it, as far as it knows.
    address: Option<String>,
}

/// What keeps the ranks from working together.
#[derive(Serialize, Deserialize)]
enum Problem {
    /// They were not started as one training.
    Misfit(String),
    /// Some did not come.
    Absent(String),
}

impl Problem {
    fn error(self, place: &Place) -> Error {
        match self {
            Self::Misfit(text) => Error::usage(text, hint(place)),
            Self::Absent(text) => Error::ranks(text, hint(place)),
        }
    }
}

/// Returns once all ranks have come. `address` is where the others reach this one.
pub(super) fn meet(store: &Store, place: &Place, address: Option<&str>, patience: Duration) -> Result<()> {
    if place.is_main() {
        write(store, SIZE, &place.size)?;
    }
    let hello = Hello {
        host: host_name(),
        pid: std::process::id(),
        size: place.size,
        address: address.map(str::to_owned),
    };
    let absent = |error: sail_torch::Error| {
        Error::ranks(format!("rank 0 did not answer within {} s: {error}", patience.as_secs()), hint(place))
    };
    store.wait(SIZE, patience + GRACE).map_err(absent)?;
    if let Some(problem) = misfit(store, place, &hello)? {
        // The main rank tells the others.
        write(store, PROBLEM, &problem)?;
        return Err(problem.error(place));
    }
    write(store, &hello_key(place.rank), &hello)?;
    if place.is_main() {
        let problem = wait_for_all(store, place, patience)?;
        write(store, MET, &problem)?;
    }
    store.wait(MET, patience + GRACE).map_err(absent)?;
    let Some(problem) = read::<Option<Problem>>(store, MET)? else { return Ok(()) };
    if place.serves_store() {
        // The store goes with this process.
        thread::sleep(TO_BE_READ);
    }
    Err(problem.error(place))
}

/// What is wrong with this rank.
fn misfit(store: &Store, place: &Place, hello: &Hello) -> Result<Option<Problem>> {
    let Place { rank, size, .. } = *place;
    let main_size: usize = read(store, SIZE)?;
    if size != main_size {
        return Ok(Some(Problem::Misfit(format!(
            "rank {rank} on {} was started as one of {size} ranks, rank 0 as one of {main_size}",
            hello.host
        ))));
    }
    if store.add(&format!("comers/{rank}"), 1)? == 1 {
        return Ok(None);
    }
    let other = read::<Hello>(store, &hello_key(rank))?;
    Ok(Some(Problem::Misfit(format!(
        "rank {rank} is there twice: as process {} on {} and as process {} on {}",
        other.pid, other.host, hello.pid, hello.host
    ))))
}

/// What keeps the ranks from working together, found by the main one or told by another.
fn wait_for_all(store: &Store, place: &Place, patience: Duration) -> Result<Option<Problem>> {
    let started = Instant::now();
    let mut told = started;
    let mut missing: Vec<usize> = (1..place.size).collect();
    loop {
        if store.has(PROBLEM)? {
            return Ok(Some(read(store, PROBLEM)?));
        }
        let mut still = Vec::new();
        for rank in missing {
            if !store.has(&hello_key(rank))? {
                still.push(rank);
            }
        }
        missing = still;
        if missing.is_empty() {
            return Ok(None);
        }
        if started.elapsed() > patience {
            let ranks: Vec<String> = missing.iter().map(usize::to_string).collect();
            return Ok(Some(Problem::Absent(format!(
                "{} of {} ranks did not come within {} s: rank {}",
                missing.len(),
                place.size,
                patience.as_secs(),
                ranks.join(", ")
            ))));
        }
        if told.elapsed() > TELL {
            told = Instant::now();
            let more =
                if missing.len() > 1 { format!(" and {} more", missing.len() - 1) } else { String::new() };
            info!("waiting for rank {}{more} of {}", missing[0], place.size);
        }
        thread::sleep(POLL);
    }
}

fn hint(place: &Place) -> &'static str {
    match place.started_by {
        Starter::Slurm => {
            "start with `srun`, one task a GPU; `unset SLURM_NTASKS` to train in one process alone"
        }
        Starter::Torchrun | Starter::Single => {
            "give every process its own RANK and all the same WORLD_SIZE, every run its own port, and look at the \
             output of the ranks named; `parallel.first_step_timeout_secs` is how long they have"
        }
    }
}

/// Compares `fields` with those of the main rank; `number` counts such comparisons.
pub(super) fn agree(store: &Store, place: &Place, number: u64, fields: &Fields) -> Result<()> {
    let key = |part: &str, rank: usize| format!("agree/{number}/{part}/{rank}");
    let text = serde_json::to_vec(fields).map_err(Error::exchange)?;
    let hash = Sha256::digest(&text);
    store.set(&key("fields", place.rank), &text)?;
    store.set(&key("hash", place.rank), &hash)?;
    let verdict = format!("agree/{number}/verdict");
    if place.is_main() {
        let mut problems = Vec::new();
        for rank in 1..place.size {
            if store.get(&key("hash", rank))? != hash.as_slice() {
                let theirs: Fields = read(store, &key("fields", rank))?;
                let host = read::<Hello>(store, &hello_key(rank))?.host;
                problems.push(format!(
                    "rank {rank} on {host} differs from rank 0: {}",
                    differences(fields, &theirs)
                ));
            }
        }
        store.set(&verdict, problems.join("\n").as_bytes())?;
    }
    let problem = String::from_utf8_lossy(&store.get(&verdict)?).into_owned();
    if problem.is_empty() {
        return Ok(());
    }
    Err(Error::usage(problem, "start every rank with the same program, configuration and weights"))
}

/// Tells this program from another build of it.
///
/// # Errors
/// When its own file cannot be read.
pub(super) fn program() -> Result<String> {
    let path = std::env::current_exe().map_err(Error::io("the running executable".as_ref()))?;
    Ok(format!("{} build {:08x}", program::version(), checksum(&path)?.crc32))
}

/// The first fields in which two ranks differ.
fn differences(main: &Fields, other: &Fields) -> String {
    let names: BTreeSet<&String> = main.keys().chain(other.keys()).collect();
    let differ = names.into_iter().filter(|name| main.get(*name) != other.get(*name));
    let shown = |value: Option<&String>| value.map_or("nothing", String::as_str).to_owned();
    listed(
        differ
            .map(|name| format!("`{name}` is {}, there {}", shown(other.get(name)), shown(main.get(name))))
            .collect(),
    )
}

/// Tells that this rank has done its part; the one that serves the store waits for all, for it must not go
/// before them. Nothing is left to be done: a store that does not answer, or a rank that does not come, has its
/// own error to tell.
pub(super) fn leave(store: &Arc<Store>, place: &Place) {
    let (store, size, serves) = (Arc::clone(store), place.size as i64, place.serves_store());
    let _ = within(LEAVE, move || {
        let told = store
            .add("left", 1)
            .and_then(|count| if count == size { store.set(ALL_LEFT, b"") } else { Ok(()) });
        if told.is_ok() && serves {
            drop(store.wait(ALL_LEFT, LEAVE));
        }
    });
}

/// What a call to a store gives, which never returns where nobody answers; nothing once the time is over.
pub(crate) fn within<T: Send + 'static>(
    patience: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, done) = mpsc::channel();
    thread::spawn(move || {
        // Nobody listens any more where the time was over.
        let _ = sender.send(call());
    });
    done.recv_timeout(patience).ok()
}

/// The name of the host that a rank is on.
pub(super) fn host_of(store: &Store, rank: usize) -> String {
    read::<Hello>(store, &hello_key(rank)).map_or_else(|_| "?".to_owned(), |hello| hello.host)
}

/// Where a rank is reached, as far as it knew when it came.
pub(super) fn address_of(store: &Store, rank: usize) -> Result<Option<String>> {
    Ok(read::<Hello>(store, &hello_key(rank))?.address)
}

fn hello_key(rank: usize) -> String {
    format!("hello/{rank}")
}

fn write(store: &Store, key: &str, value: &impl Serialize) -> Result<()> {
    Ok(store.set(key, &serde_json::to_vec(value).map_err(Error::exchange)?)?)
}

fn read<T: serde::de::DeserializeOwned>(store: &Store, key: &str) -> Result<T> {
    serde_json::from_slice(&store.get(key)?).map_err(Error::exchange)
}

pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
