//! The search for a learning rate: what its trials lead to, and that a run goes on the same way after a stop in one.

use std::fs;

use serde_json::Value;

use crate::processes::{Job, assert_same, steps};
use crate::{run, stderr};

const LR: f64 = 1e-2;

fn job(sets: &[&str]) -> Job {
    let search = "schedule={kind: constant, warmup: 1, steps: 24, \
                  ada_lrs: {window: 3, alpha: 9, beta: 2, lambda: 0.8}}";
    let mut job = Job::new(&[search, "batch.tokens_per_pack=128", "train.projector.lr=1e-2"]);
    job.set(&["checkpoint={every: 2, keep_last: 99}", "parallel.timeout_secs=60"]);
    job.set(sets);
    job
}

/// The lines of `metrics.jsonl` that are of trials and of steps, in their order.
fn course(job: &Job) -> Vec<Value> {
    let metrics = fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == "train" || line["kind"] == "ada_lrs").collect()
}

#[test]
fn rates_follow_the_trials() {
    let job = job(&[]);
    job.run(job.alone(), 0);
    let (mut scale, mut back, mut tried, mut trials) = (1.0, 0, 0, 0);
    for line in course(&job) {
        let shrunk = 0.8f64.powi(trials);
        let (up, down) = ((9.0 * shrunk).max(1.0), 1.0 / (2.0 * shrunk).max(1.0));
        if line["kind"] == "train" {
            // Of a window that measures, or of a trial.
            let times = line["lr"]["projector"].as_f64().unwrap() / LR / scale;
            assert!((times - 1.0).abs() < 1e-9 || (times - up).abs() < 1e-9 * up, "{times} {up}: {line}");
            tried += usize::from(times > 1.0 + 1e-9);
            continue;
        }
        let trial = &line["trial"];
        let number = |field: &str| trial[field].as_f64().unwrap();
        let change = trial["tried"]["speed"].as_f64().unwrap() - trial["before"]["speed"].as_f64().unwrap();
        let limit = 2.0 * trial["before"]["error"].as_f64().unwrap();
        let near = |field: &str, expected: f64| {
            assert!((number(field) - expected).abs() < 1e-9 * expected, "{field} {expected}: {line}");
        };
        near("scale_before", scale);
        near("scale_tried", scale * up);
        let (verdict, then) = match change {
            change if change > limit => ("keep", scale * up),
            change if change < -limit => ("go_back", scale * down),
            _ => ("leave", scale),
        };
        assert_eq!(trial["verdict"], verdict, "{line}");
        near("scale", then);
        back += usize::from(verdict == "go_back");
        (scale, trials) = (then, trials + 1);
    }
    assert!(trials >= 3 && back >= 1, "{trials} trials, {back} of them back");
    // Steps that were gone back on have left the record.
    assert_eq!(tried % 3, 0);
    assert!(tried >= 3 * (trials as usize - back), "{tried} steps of {trials} trials");
    let made = steps(&job.run_dir());
    let numbers: Vec<u64> = made.iter().map(|step| step["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=24).collect::<Vec<u64>>());
}

/// A step of a trial that was undone is on no course that the run is on.
#[test]
fn a_replay_says_that_the_run_went_back() {
    let job = job(&[]);
    job.run(job.alone(), 0);
    let undone = course(&job).into_iter().find(|line| line["trial"]["verdict"] == "go_back").unwrap();
    let to = undone["step"].as_u64().unwrap();
    let replay = |step: u64, checkpoint: u64| {
        let (dir, step) = (job.run_dir().display().to_string(), step.to_string());
        let checkpoint = format!("{dir}/step-{checkpoint:08}");
        ["replay", "--run", &dir, "--step", &step, "--checkpoint", &checkpoint].map(str::to_owned)
    };
    let refused = replay(to + 2, 2);
    let said = stderr(&run(&refused.each_ref().map(String::as_str), 2));
    assert!(said.contains(&format!("step {to}")) && said.contains("hint:"), "{said}");
    // From after it all is well.
    let allowed = replay(to + 8, to + 6);
    run(&allowed.each_ref().map(String::as_str), 0);
}

/// A checkpoint within a trial is of its beginning, so that the trial is made again.
#[test]
fn a_run_resumes_within_and_between_trials() {
    for (ranks, stops) in [(1, &[1, 4, 5, 7, 9, 14][..]), (2, &[5, 8])] {
        let start = |job: &Job| if ranks == 1 { job.alone() } else { job.launch(ranks) };
        let straight = job(&[]);
        straight.run(start(&straight), 0);
        for stop in stops {
            let job = job(&[]);
            let mut command = start(&job);
            command.args(["--stop-at", &stop.to_string()]);
            job.run(command, 3);
            job.run(start(&job), 0);
            assert_same(&format!("{ranks} ranks, stopped at {stop}"), &job, &straight);
            let trials = |job: &Job| -> Vec<Value> {
                course(job).into_iter().filter(|line| line["kind"] == "ada_lrs").collect()
            };
            assert_eq!(trials(&job), trials(&straight), "{ranks} ranks, stopped at {stop}");
        }
    }
}
