//! What ranks tell each other through the store, before there is a group: that all are there and were started
//! alike, and later that they are about to do the same thing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sail_torch::Store;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::place::{Place, Starter};
use crate::error::{Error, Result};

/// What a rank has, by name.
pub type Fields = BTreeMap<String, String>;

/// How long the others wait for the main rank's answer beyond the time that it waits for them.
const GRACE: Duration = Duration::from_secs(5);
/// Differences that a message lists.
const SHOWN: usize = 5;

/// What a rank says when it comes.
#[derive(Serialize, Deserialize)]
struct Hello {
    host: String,
    pid: u32,
    size: usize,
}

/// What the main rank answers to all.
#[derive(Serialize, Deserialize)]
struct Answer {
    size: usize,
    problem: Option<String>,
}

/// Returns once all ranks have come.
pub(super) fn meet(store: &Store, place: &Place, patience: Duration) -> Result<()> {
    let hello = Hello { host: host_name(), pid: std::process::id(), size: place.size };
    if store.add(&format!("comers/{}", place.rank), 1)? > 1 {
        let other = read::<Hello>(store, &hello_key(place.rank))?;
        return Err(Error::ranks(
            format!(
                "rank {} is there already: process {} on {}; this is process {} on {}",
                place.rank, other.pid, other.host, hello.pid, hello.host
            ),
            "give every process its own RANK, and every run its own port",
        ));
    }
    write(store, &hello_key(place.rank), &hello)?;
    if place.rank == 0 {
        let problem = wait_for_all(store, place, patience)?;
        write(store, "met", &Answer { size: place.size, problem })?;
    }
    let absent = |error| {
        Error::ranks(
            format!("rank 0 did not say within {} s that all have come: {error}", patience.as_secs()),
            "look at rank 0's output",
        )
    };
    store.wait("met", patience + GRACE).map_err(absent)?;
    let Answer { size, problem } = read(store, "met")?;
    match problem {
        Some(problem) => Err(Error::ranks(problem, hint(place))),
        None if size != place.size => Err(Error::usage(
            format!(
                "rank {} was started as one of {} ranks, rank 0 as one of {size}",
                place.rank, place.size
            ),
            hint(place),
        )),
        None => Ok(()),
    }
}

/// What keeps the ranks from working together, found by the main one.
fn wait_for_all(store: &Store, place: &Place, patience: Duration) -> Result<Option<String>> {
    let started = Instant::now();
    let mut missing = Vec::new();
    for rank in 1..place.size {
        let left = patience.saturating_sub(started.elapsed());
        if store.wait(&hello_key(rank), left).is_err() {
            missing.push(rank.to_string());
            continue;
        }
        let hello: Hello = read(store, &hello_key(rank))?;
        if hello.size != place.size {
            return Ok(Some(format!(
                "rank {rank} on {} was started as one of {} ranks, rank 0 as one of {}",
                hello.host, hello.size, place.size
            )));
        }
    }
    Ok((!missing.is_empty()).then(|| {
        format!(
            "{} of {} ranks did not come within {} s: rank {}",
            missing.len(),
            place.size,
            patience.as_secs(),
            missing.join(", ")
        )
    }))
}

fn hint(place: &Place) -> &'static str {
    match place.started_by {
        Starter::Slurm => {
            "start with `srun`, one task a GPU; `unset SLURM_NTASKS` to train in one process alone"
        }
        Starter::Torchrun | Starter::Single => {
            "start every node with the same number of nodes and of processes a node, and look at the output of \
             the ranks named; `parallel.first_step_timeout_secs` is how long they have"
        }
    }
}

/// Compares `fields` with those of the main rank; `about` is used once in a run.
pub(super) fn agree(store: &Store, place: &Place, about: &str, fields: &Fields) -> Result<()> {
    let key = |part: &str, rank: usize| format!("agree/{about}/{part}/{rank}");
    let text = serde_json::to_vec(fields).map_err(Error::exchange)?;
    let hash = Sha256::digest(&text);
    store.set(&key("fields", place.rank), &text)?;
    store.set(&key("hash", place.rank), &hash)?;
    let verdict = format!("agree/{about}/verdict");
    if place.rank == 0 {
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
    let mut file = std::fs::File::open(&path).map_err(Error::io(&path))?;
    let (mut hash, mut bytes) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
    loop {
        match std::io::Read::read(&mut file, &mut bytes).map_err(Error::io(&path))? {
            0 => return Ok(format!("{} build {:08x}", env!("CARGO_PKG_VERSION"), hash.finalize())),
            count => hash.update(&bytes[..count]),
        }
    }
}

/// The first fields in which two ranks differ.
fn differences(main: &Fields, other: &Fields) -> String {
    let names: std::collections::BTreeSet<&String> = main.keys().chain(other.keys()).collect();
    let differ = names.into_iter().filter(|name| main.get(*name) != other.get(*name));
    let shown = |value: Option<&String>| value.map_or("nothing", String::as_str).to_owned();
    let mut all: Vec<String> = differ
        .map(|name| format!("`{name}` is {}, there {}", shown(other.get(name)), shown(main.get(name))))
        .collect();
    let more = all.len().saturating_sub(SHOWN);
    all.truncate(SHOWN);
    let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{}{rest}", all.join("; "))
}

/// Tells that this rank has done its part; the one that serves the store waits for all, for it must not go
/// before them.
pub(super) fn leave(store: &Store, place: &Place) -> Result<()> {
    let left = store.add("left", 1)?;
    if left == place.size as i64 {
        store.set("all left", b"")?;
    }
    if place.rendezvous.as_ref().is_some_and(|meeting| meeting.hosts_store) {
        // One that does not come has its own error to tell; this one is done.
        let _ = store.wait("all left", Duration::from_secs(30));
    }
    Ok(())
}

/// The name of the host that a rank is on.
pub(super) fn host_of(store: &Store, rank: usize) -> String {
    read::<Hello>(store, &hello_key(rank)).map_or_else(|_| "?".to_owned(), |hello| hello.host)
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

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
