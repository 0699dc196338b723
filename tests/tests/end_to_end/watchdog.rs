//! A step that hangs for real: the log says in what, the process ends in time, and its peers know which one it was.

use std::fs;
use std::time::{Duration, Instant};

use crate::processes::{Job, Process, all_end, signal, steps, together, until};
use crate::{root, shard_server};

/// `watchdog.limit_secs`.
const LIMIT_SECS: u64 = 8;
/// Until when a process has ended in which nothing goes on: the stacks are read and others are told as well.
const WITHIN: Duration = Duration::from_secs(LIMIT_SECS + 15);

/// Small steps, of which one that takes 2 s is far too long, and ranks that wait for each other for longer than that.
fn job(sets: &[&str]) -> Job {
    let limit = format!("watchdog.limit_secs={LIMIT_SECS}");
    let mut job =
        Job::new(&["batch.tokens_per_pack=128", "schedule.steps=100000", "parallel.timeout_secs=60"]);
    job.set(&["watchdog.factor=2", "watchdog.least_secs=1", &limit]);
    job.set(sets);
    job
}

/// A source of which the rest never comes.
fn source_that_falls_silent() -> [String; 3] {
    let shards =
        ["000000", "000001", "000002"].map(|n| root().join(format!("data/demo/caption-train-{n}.tar")));
    let server = shard_server::start(&shards, 300_000);
    let sources = format!("data.sources=[{{name: web, shards: \"{server}/{{0..2}}.tar\"}}]");
    [sources, "data.store.read_ahead_bytes=1".to_owned(), "data.shuffle_buffer=8".to_owned()]
}

/// What it said, once it has ended with code 1 in time; `since` is when it was known to work last.
fn ended(what: &str, process: &mut Process, since: Instant) -> String {
    let took = all_end(std::slice::from_mut(process), since, WITHIN);
    let said = process.said();
    println!("--- {what}: {} ended after {:.1} s\n{said}", process.name, took.as_secs_f64());
    assert_eq!(process.code(), 1, "{what}: {} said\n{said}", process.name);
    said
}

fn has(what: &str, said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{what}: `{word}` is not said:\n{said}");
    }
}

/// The part of a log that the main thread's frames are in.
fn main_thread<'a>(what: &str, said: &'a str) -> &'a str {
    let start = said.find("\nthread ").unwrap_or_else(|| panic!("{what}: no stacks:\n{said}")) + 1;
    let rest = &said[start..];
    &rest[..rest[1..].find("\nthread ").map_or(rest.len(), |at| at + 1)]
}

/// The seconds in front of which a word stands in the last log.
fn secs_after(said: &str, word: &str) -> f64 {
    let text = &said[said.rfind(word).unwrap_or_else(|| panic!("no `{word}` in {said}")) + word.len()..];
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_step_that_hangs_is_told_and_ended() {
    together(&[
        ("data that never comes", data_that_never_comes),
        ("data that one of two ranks never gets", data_of_one_rank),
        ("a rank that is stopped", stopped_rank),
    ]);
}

fn data_that_never_comes() {
    let what = "data that never comes";
    let silent = source_that_falls_silent();
    let job = job(&silent.each_ref().map(String::as_str));
    let mut process = job.start("alone", job.alone());
    job.wait_for_step(1, std::slice::from_mut(&mut process));
    until("a step hangs", || process.said().contains("so far, ") || process.has_ended());
    let said = ended(what, &mut process, Instant::now());
    let step = steps(&job.run_dir()).len() + 1;
    has(
        what,
        &said,
        &[
            &format!("WARN step {step} takes "),
            "it is waiting for data\n",
            &format!(
                "error: nothing has gone on for {LIMIT_SECS} s at step {step}, waiting for data\n\nhint: "
            ),
        ],
    );
    let frames = main_thread(what, &said);
    has(what, frames, &["next_step at sail-train/src/session.rs:", "run_stage at "]);
    let (data, computation) = (secs_after(&said, "data "), secs_after(&said, "computation "));
    assert!(data >= LIMIT_SECS as f64 - 1.0 && computation < 2.0, "{data} s, {computation} s:\n{said}");
    // At 2 s, 4 s and perhaps 8 s, and at the end.
    let told = said.matches("so far, ").count();
    assert!((2..=3).contains(&told), "told {told} times:\n{said}");
    assert_eq!(said.matches("WARN nothing has gone on").count(), 1, "{said}");
    assert!(job.left().is_empty(), "{what}: still there: {:?}", job.left());
}

/// The one that waits for the other does not take itself for the reason.
fn data_of_one_rank() {
    let what = "data of one rank";
    let silent = source_that_falls_silent();
    let mut job = job(&silent.each_ref().map(String::as_str));
    job.set(&["batch.packs_per_step=2", "data.streams=2"]);
    let mut ranks = job.start_ranks(2);
    job.wait_for_step(1, &mut ranks);
    until("a step hangs", || {
        ranks.iter_mut().any(|rank| rank.said().contains("so far, ") || rank.has_ended())
    });
    let since = Instant::now();
    let said: Vec<String> = ranks.iter_mut().map(|rank| ended(what, rank, since)).collect();
    let step = steps(&job.run_dir()).len() + 1;
    let waits = |said: &String| said.contains("it is waiting for data\n");
    let late = said.iter().position(waits).expect("one waits for its data");
    let others = &said[1 - late];
    has(what, &said[late], &[&format!("WARN step {step} takes "), "next_step at ", "hint:"]);
    has(
        what,
        others,
        &[
            "it is waiting for the data of the others\n",
            "c10d::Work::wait",
            &format!("error: rank {late} on "),
        ],
    );
    assert!(secs_after(others, "communication ") >= 1.5, "{others}");
    assert!(job.left().is_empty(), "{what}: still there: {:?}", job.left());
}

fn stopped_rank() {
    let what = "a stopped rank";
    let job = job(&["batch.packs_per_step=2", "data.streams=2"]);
    let mut ranks = job.start_ranks(2);
    job.wait_for_step(2, &mut ranks);
    signal("STOP", ranks[1].pid());
    let since = Instant::now();
    let said = ended(what, &mut ranks[0], since);
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let named = format!("error: no sign of life from rank 1 on {}, last seen at step ", host.trim());
    has(what, &said, &["WARN step ", &named, "nothing has gone on for", "hint:"]);
    assert!(secs_after(&said, "communication ") >= 1.5, "{said}");
    assert_eq!(job.left(), [ranks[1].pid()], "{what}");
    // It has lost no time of its own, and ends since the other one is gone.
    signal("CONT", ranks[1].pid());
    let said = ended(what, &mut ranks[1], Instant::now());
    has(what, &said, &["rank 0", "hint:"]);
    assert!(!said.contains("nothing has gone on") || said.contains("rank 0 on "), "{said}");
    assert!(job.left().is_empty(), "{what}: still there: {:?}", job.left());
}
