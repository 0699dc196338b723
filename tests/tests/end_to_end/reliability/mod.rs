//! Kill anything, lose nothing: faults are injected into trainings; each ends as docs/reliability.md says, and the
//! same command then leads to what the training would have been without it.
//!
//! Moments are random. Each test prints its seed; `SAIL_TEST_SEED=…` makes it begin with the same numbers again.

mod clock;
mod damage;
mod disks;
mod elastic;
mod folders;
mod kills;
mod signals;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::processes::{Job, assert_same, steps};

/// What trains everything, so that every parameter has moments and a checkpoint takes a while.
const ALL: &str = "train={vision: {lr: 1e-4}, projector: {lr: 1e-4}, llm: {lr: 1e-4}}";

/// Small steps, each saved.
fn job(sets: &[&str]) -> Job {
    let mut job = Job::new(&["batch.tokens_per_pack=128", "checkpoint.every=1", "parallel.bucket_mb=1"]);
    job.set(&["parallel.timeout_secs=60"]);
    job.set(sets);
    job
}

/// Numbers that a seed decides (splitmix64).
struct Random(u64);

impl Random {
    fn new(what: &str) -> Self {
        let seed = match std::env::var("SAIL_TEST_SEED") {
            Ok(text) => text.parse().expect("SAIL_TEST_SEED is a number"),
            Err(_) => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos().into(),
        };
        println!("{what}: SAIL_TEST_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn within(&mut self, time: Duration) -> Duration {
        Duration::from_micros(self.below(u64::try_from(time.as_micros()).unwrap()))
    }
}

/// `job`, which was disturbed, is in every bit what `straight` is: losses, weights, moments, data.
fn assert_nothing_lost(what: &str, job: &Job, straight: &Job) {
    assert_same(what, job, straight);
    assert_same_data(what, job, straight);
}

/// Each step was made once, with the same data, and nothing of an interruption is left.
fn assert_same_data(what: &str, job: &Job, straight: &Job) {
    let lines = trained_on(&job.run_dir());
    let numbers: Vec<Option<u64>> = lines.iter().map(|line| line[0].as_u64()).collect();
    assert_eq!(numbers, (1..=lines.len() as u64).map(Some).collect::<Vec<_>>(), "{what}: each step once");
    assert_eq!(lines, trained_on(&straight.run_dir()), "{what}: what each step was trained on");
    let (a, b) = (job.newest(), straight.newest());
    assert_eq!(a.state().data, b.state().data, "{what}: position in the data");
    assert_eq!((a.state().step, a.state().totals), (b.state().step, b.state().totals), "{what}");
    assert_eq!(a.state().updates, b.state().updates, "{what}");
    assert_nothing_left(what, job);
}

/// Files that are there only for a moment are gone.
fn assert_nothing_left(what: &str, job: &Job) {
    let names = names_in(&job.run_dir());
    let odd = |name: &&String| name.starts_with('.') && *name != ".lock" || *name == "metrics.tmp";
    let left: Vec<_> = names.iter().filter(odd).collect();
    assert!(left.is_empty(), "{what}: left behind: {left:?}");
}

/// Of each step its number and what it was trained on, as `metrics.jsonl` has it, in which no line is cut.
fn trained_on(run_dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a whole line"));
    let of_steps = lines.filter(|line| line["kind"] == "train");
    let data = ["step", "samples", "tokens", "answer_tokens", "coverage"];
    of_steps.map(|line| json!(data.map(|key| line[key].clone()))).collect()
}

/// The newest step in `metrics.jsonl`.
fn last_step(job: &Job) -> u64 {
    steps(&job.run_dir()).last().map_or(0, |line| line["step"].as_u64().unwrap())
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// The step of a checkpoint that is being written, begun after `since`.
fn being_written(run_dir: &Path, since: SystemTime) -> Option<u64> {
    names_in(run_dir).iter().find_map(|name| {
        let step = name.strip_prefix(".tmp-step-")?.parse().ok()?;
        let modified = fs::metadata(run_dir.join(name)).ok()?.modified().ok()?;
        (modified > since).then_some(step)
    })
}
