//! What ranks tell of themselves through the store while they train, and what follows from it. Read and written by
//! the watch.

use std::thread;
use std::time::Duration;

use sail_torch::Store;
use serde::{Deserialize, Serialize};

use super::agree::host_of;
use crate::error::{Error, Result};

/// A rank whose beat is the same after this long is not running.
const SAMPLE: Duration = Duration::from_millis(1500);
/// Where the first rank that gives up says why.
const FAILURE: &str = "failure";
/// Ranks or differences that a message names.
const SHOWN: usize = 5;

/// What a rank says of itself, twice a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Beat {
    /// Beats before this one.
    pub(super) count: u64,
    pub(super) step: u64,
    pub(super) doing: String,
    /// What it has begun together with the others: the same number on all ranks at the same place.
    pub(super) begun: u64,
}

impl Beat {
    pub(super) fn write(&self, store: &Store, rank: usize) -> Result<()> {
        Ok(store.set(&key(rank), &serde_json::to_vec(self).map_err(Error::exchange)?)?)
    }

    /// That of a rank which has not come so far is as if it never beat.
    pub(super) fn read(store: &Store, rank: usize) -> Result<Self> {
        if !store.has(&key(rank))? {
            return Ok(Self::default());
        }
        serde_json::from_slice(&store.get(&key(rank))?).map_err(Error::exchange)
    }

    /// Where the rank is, for messages.
    pub(super) fn place(&self) -> String {
        let doing = if self.doing.is_empty() { "starting" } else { &self.doing };
        format!("step {}, {doing}", self.step)
    }
}

/// Says why this rank gives up, unless another one was first.
pub(super) fn tell_failure(store: &Store, text: &str) -> Result<()> {
    if store.add("failures", 1)? == 1 {
        store.set(FAILURE, text.as_bytes())?;
    }
    Ok(())
}

/// Why the first rank that gave up did so.
pub(super) fn failure(store: &Store) -> Result<Option<String>> {
    if !store.has(FAILURE)? {
        return Ok(None);
    }
    Ok(Some(String::from_utf8_lossy(&store.get(FAILURE)?).into_owned()))
}

/// Which ranks the beats show to keep the others waiting, of `size` and seen by `rank`, which has `begun` as much:
/// those that do not run, else those that have begun the least, and less than this one.
pub(super) fn who_is_late(store: &Store, rank: usize, size: usize, begun: u64) -> Result<Option<String>> {
    let others: Vec<usize> = (0..size).filter(|other| *other != rank).collect();
    let beats = || others.iter().map(|other| Beat::read(store, *other)).collect::<Result<Vec<Beat>>>();
    let before = beats()?;
    thread::sleep(SAMPLE);
    if let Some(failure) = failure(store)? {
        return Ok(Some(failure));
    }
    let after = beats()?;
    let least = after.iter().map(|beat| beat.begun).min();
    let (mut silent, mut behind) = (Vec::new(), Vec::new());
    for ((other, before), after) in others.iter().zip(&before).zip(&after) {
        if before == after {
            silent.push(format!("{}, last seen at {}", name(store, *other), after.place()));
        } else if after.begun < begun && Some(after.begun) == least {
            behind.push(format!("{} is still at {}", name(store, *other), after.place()));
        }
    }
    Ok(match (silent.is_empty(), behind.is_empty()) {
        (false, _) => Some(format!("no sign of life from {}", listed(silent))),
        (true, false) => Some(listed(behind)),
        (true, true) => None,
    })
}

/// Some of them, and how many more there are.
pub(super) fn listed(mut parts: Vec<String>) -> String {
    let more = parts.len().saturating_sub(SHOWN);
    parts.truncate(SHOWN);
    let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{}{rest}", parts.join("; "))
}

/// A rank and the host that it is on.
pub(super) fn name(store: &Store, rank: usize) -> String {
    format!("rank {rank} on {}", host_of(store, rank))
}

fn key(rank: usize) -> String {
    format!("beat/{rank}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What rank 0 of four finds out, while the ranks of `running` beat on.
    fn found(begun: [u64; 4], running: &[usize]) -> Option<String> {
        let limit = Duration::from_secs(30);
        let store = Store::serve(0, limit).unwrap();
        let others = Store::connect("127.0.0.1", store.port(), "", limit).unwrap();
        let beat = |rank: usize, count| {
            let doing = "computing".to_owned();
            Beat { count, step: 7, doing, begun: begun[rank] }.write(&others, rank).unwrap();
        };
        for rank in 0..4 {
            let hello = br#"{"host": "h", "pid": 1, "size": 4, "address": null}"#;
            others.set(&format!("hello/{rank}"), hello).unwrap();
            beat(rank, 0);
        }
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(SAMPLE / 2);
                for rank in running {
                    beat(*rank, 1);
                }
            });
            who_is_late(&store, 0, 4, begun[0]).unwrap()
        })
    }

    #[test]
    fn whoever_does_not_run_or_is_behind_is_late() {
        let cases: [([u64; 4], &[usize], Option<&str>); 5] = [
            ([9, 9, 9, 9], &[1, 2, 3], None),
            ([9, 9, 4, 9], &[1, 2, 3], Some("rank 2 on h is still at step 7, computing")),
            // One that waits for the one behind it is not the reason.
            ([9, 8, 4, 9], &[1, 2, 3], Some("rank 2 on h is still at step 7, computing")),
            ([9, 9, 4, 9], &[1, 2], Some("no sign of life from rank 3 on h, last seen at step 7, computing")),
            // This one is the last itself.
            ([3, 9, 9, 9], &[1, 2, 3], None),
        ];
        thread::scope(|scope| {
            for (begun, running, expected) in cases {
                scope.spawn(move || {
                    let found = found(begun, running);
                    assert_eq!(found.as_deref(), expected, "{begun:?} {running:?}");
                });
            }
        });
    }

    #[test]
    fn the_first_failure_is_the_one_to_tell() {
        let store = Store::serve(0, Duration::from_secs(10)).unwrap();
        assert_eq!(failure(&store).unwrap(), None);
        tell_failure(&store, "first").unwrap();
        tell_failure(&store, "second").unwrap();
        assert_eq!(failure(&store).unwrap().as_deref(), Some("first"));
        assert_eq!(who_is_late(&store, 0, 2, 0).unwrap().as_deref(), Some("first"));
    }

    #[test]
    fn a_message_names_a_few() {
        let names = |n: usize| (0..n).map(|i| i.to_string()).collect();
        assert_eq!(listed(names(5)), "0; 1; 2; 3; 4");
        assert_eq!(listed(names(7)), "0; 1; 2; 3; 4; and 2 more");
    }
}
