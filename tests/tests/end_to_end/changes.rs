//! A run goes on with another configuration where that is allowed, and keeps the checkpoints that its plan names.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use sail_train::optim::StateKind;
use serde_json::Value;

use crate::processes::{Job, assert_same, steps};

const VISION: &str = "train.vision={lr: 2e-4}";

fn job(sets: &[&str]) -> Job {
    let mut job = Job::new(&["schedule={kind: constant, warmup: 1, steps: 6}", "batch.tokens_per_pack=128"]);
    job.set(&["checkpoint.every=null", "parallel.timeout_secs=60"]);
    job.set(sets);
    job
}

fn with(mut command: Command, args: &[&str]) -> Command {
    command.args(args);
    command
}

const ALLOWED: &str = "--allow-config-change";

/// The change is refused with its diff and allowed by name; after a save it is the run's own.
fn assert_refused(job: &Job, diff: &[&str]) {
    let said = job.run(job.alone(), 2);
    for part in [diff, &["the plan differs", "hint:", ALLOWED]].concat() {
        assert!(said.contains(part), "`{part}` in {said}");
    }
}

#[test]
fn another_rate_and_a_longer_schedule() {
    let mut job = job(&[]);
    job.run(with(job.alone(), &["--stop-at", "3"]), 3);
    job.set(&["train.projector.lr=5e-4"]);
    assert_refused(&job, &["train.projector.lr", "0.001", "0.0005"]);
    let said = job.run(with(job.alone(), &[ALLOWED]), 0);
    assert!(
        said.contains("resumes after step 3") && said.contains("allowed by `--allow-config-change`"),
        "{said}"
    );
    assert_eq!(steps(&job.run_dir())[3]["lr"]["projector"], 5e-4);
    assert!(job.run(job.alone(), 0).contains("already finished"));

    job.set(&["schedule.steps=8"]);
    assert_refused(&job, &["schedule.steps", "6", "8"]);
    let said = job.run(with(job.launch(2), &[ALLOWED]), 0);
    assert!(said.contains("resumes after step 6"), "{said}");
    assert_eq!((job.newest().state().step, steps(&job.run_dir()).len()), (8, 8));
    let summary = fs::read_to_string(job.run_dir().join("summary.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&summary).unwrap()["steps"], 8);
    assert!(job.run(job.alone(), 0).contains("already finished"));
}

/// What is unlocked on the way begins with fresh moments, whose age is kept from then on.
#[test]
fn a_module_is_unlocked_and_another_time_frozen() {
    let ages = |job: &Job| {
        let later = &job.newest().state().updates.later.clone();
        assert!(later.keys().all(|name| name.starts_with("vision.")), "{later:?}");
        let encoder = job.newest().names().filter(|name| name.starts_with("vision.")).count();
        assert_eq!(later.len(), encoder);
        (job.newest().state().updates.all, later.values().copied().collect::<BTreeSet<u64>>())
    };
    let unlocked = |ranks: usize| {
        let mut job = job(&["parallel.strategy=zero1"]);
        let command = move |job: &Job| if ranks == 1 { job.alone() } else { job.launch(ranks) };
        job.run(with(command(&job), &["--stop-at", "2"]), 3);
        job.set(&[VISION]);
        (job, command)
    };
    for ranks in [1, 2] {
        let (straight, command) = unlocked(ranks);
        if ranks == 1 {
            assert_refused(&straight, &["train.vision"]);
        }
        straight.run(with(command(&straight), &[ALLOWED]), 0);
        assert_eq!(ages(&straight), (6, BTreeSet::from([4])));

        let (mut stopped, _) = unlocked(ranks);
        stopped.run(with(command(&stopped), &[ALLOWED, "--stop-at", "3"]), 3);
        assert_eq!(ages(&stopped), (3, BTreeSet::from([1])));
        stopped.run(with(command(&stopped), &["--stop-at", "5"]), 3);
        assert_eq!(ages(&stopped), (5, BTreeSet::from([3])));
        stopped.run(command(&stopped), 0);
        assert_same("unlocked, and stopped twice", &stopped, &straight);

        let name = "vision.encoder.layers.0.attention.q_proj.weight";
        let before = straight.newest().tensor(name, StateKind::Param).unwrap();
        stopped.set(&["train.vision=frozen", "schedule.steps=8"]);
        stopped.run(with(command(&stopped), &[ALLOWED]), 0);
        let newest = stopped.newest();
        assert_eq!((newest.state().step, newest.state().updates.later.len()), (8, 0));
        assert!(newest.tensor(name, StateKind::Param).unwrap() == before, "it is frozen now");
        assert!(newest.tensor(name, StateKind::ExpAvg).is_err());
    }
}

/// A rate so high that the held-out loss rises in the end: the best are not the newest.
#[test]
fn checkpoints_that_are_kept() {
    let eval = r#"eval={every: 2, samples: 4, generate: 0,
        sources: [{name: caption, shards: "data/demo/caption-heldout-*.tar"}]}"#;
    for ranks in [1, 2] {
        let sets =
            [eval, "schedule.steps=11", "checkpoint={every: 1, keep_last: 1, keep_every: 5, keep_best: 2}"];
        let job = job(&[&sets[..], &["train.projector.lr=0.1"]].concat());
        job.run(if ranks == 1 { job.alone() } else { job.launch(ranks) }, 0);
        let text = fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut evaluated: Vec<(f64, u64)> = lines
            .filter(|line| line["kind"] == "eval")
            .map(|line| (line["report"]["total"]["loss"].as_f64().unwrap(), line["step"].as_u64().unwrap()))
            .filter(|(_, step)| (1..11).contains(step))
            .collect();
        evaluated.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert_eq!(evaluated.len(), 5, "{evaluated:?}");
        let best = [evaluated[0].1, evaluated[1].1];
        assert!(best.iter().any(|step| step % 5 != 0), "{evaluated:?}");
        let expected: BTreeSet<u64> = best.into_iter().chain([5, 10, 11]).collect();
        let folders = fs::read_dir(job.run_dir()).unwrap().map(|entry| entry.unwrap().file_name());
        let found: BTreeSet<u64> =
            folders.filter_map(|name| name.to_string_lossy().strip_prefix("step-")?.parse().ok()).collect();
        assert_eq!(found, expected, "{evaluated:?}");
        assert_eq!(job.newest().state().step, 11);
    }
}
