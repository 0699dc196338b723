//! The search for a learning rate: what its trials lead to, and that a run goes on the same way after a stop in one.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use crate::processes::{Job, assert_same, steps};
use crate::run;

fn job(sets: &[&str]) -> Job {
    let search = "schedule={kind: constant, warmup: 1, steps: 24, \
                  ada_lrs: {window: 3, alpha: 9, beta: 2, lambda: 0.8}}";
    let mut job = Job::new(&[search, "batch.tokens_per_pack=128", "train.projector.lr=1e-4"]);
    job.set(&["checkpoint={every: 2, keep_last: 99}", "parallel.timeout_secs=60"]);
    job.set(sets);
    job
}

/// A rate that the first trials leave, and from which a later one goes back by far more than its error.
const TOO_HIGH: [&str; 2] = ["run.seed=1", "train.projector.lr=3e-3"];

/// The lines of `metrics.jsonl` that are of trials and of steps, in their order.
fn course(job: &Job) -> Vec<Value> {
    let metrics = fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == "train" || line["kind"] == "ada_lrs").collect()
}

#[test]
fn rates_follow_the_trials() {
    let verdicts = follow(&job(&[]));
    assert!(verdicts.contains(&"keep") && verdicts.contains(&"go_back"), "{verdicts:?}");
}

/// A rate that a later window shows to be too high has done harm from where it was first used.
#[test]
fn a_rate_that_is_too_high_is_undone_from_its_first_step() {
    let verdicts = follow(&job(&TOO_HIGH));
    assert!(verdicts.windows(2).any(|two| two == ["leave", "go_back"]), "{verdicts:?}");
}

/// Trains, and compares the rates of the steps that stay with what the trials say; the trials' verdicts.
fn follow(job: &Job) -> Vec<&'static str> {
    job.run(job.alone(), 0);
    let (mut scale, mut verdicts) = (1.0, Vec::new());
    // Where the search stands, and where the rate that it has was first used in a window.
    let (mut at, mut since) = (1, 1);
    let mut scales: BTreeMap<u64, f64> = BTreeMap::new();
    let (trials, steps): (Vec<Value>, Vec<Value>) =
        course(job).into_iter().partition(|line| line["kind"] == "ada_lrs");
    for line in trials {
        let shrunk = 0.8f64.powi(verdicts.len() as i32);
        let (up, down) = ((9.0 * shrunk).max(1.0), 1.0 / (2.0 * shrunk).max(1.0));
        let trial = &line["trial"];
        let near = |found: &Value, expected: f64| {
            assert!((found.as_f64().unwrap() - expected).abs() < 1e-9 * expected, "{expected}: {line}");
        };
        near(&trial["scale_before"], scale);
        near(&trial["scale_tried"], scale * up);
        let gain = trial["gain"]["speed"].as_f64().unwrap();
        let limit = 2.0 * trial["gain"]["error"].as_f64().unwrap();
        let (verdict, made_at, then) = match gain {
            gain if gain > limit => ("keep", scale * up, scale * up),
            gain if gain < -limit => ("go_back", scale, scale * down),
            _ => ("leave", scale, scale),
        };
        assert_eq!(trial["verdict"], verdict, "{line}");
        near(&trial["scale"], then);
        if verdicts.last() != Some(&"leave") {
            since = at;
        }
        let (from, to) = if verdict == "go_back" { (since, since) } else { (at, at + 3) };
        assert_eq!((line["from"].as_u64(), line["step"].as_u64()), (Some(from), Some(to)), "{line}");
        scales.retain(|step, _| *step <= from);
        scales.extend((from + 1..=to).map(|step| (step, made_at)));
        verdicts.push(verdict);
        (scale, at) = (then, to);
    }
    assert!(
        at + 3 > 23 || 9.0 * 0.8f64.powi(verdicts.len() as i32) <= 1.0,
        "{verdicts:?} end after step {at}"
    );
    // Of steps that were made several times one course is left in the record.
    let numbers: Vec<u64> = steps.iter().map(|step| step["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=24).collect::<Vec<u64>>());
    let lr = |line: &Value| line["lr"]["projector"].as_f64().unwrap();
    for line in &steps {
        let expected = scales.get(&line["step"].as_u64().unwrap()).unwrap_or(&scale);
        let expected = if line["step"] == 1 { 1.0 } else { *expected };
        assert!((lr(line) / lr(&steps[0]) - expected).abs() < 1e-9 * expected, "{expected}: {line}");
    }
    verdicts
}

/// Whatever was tried and undone on the way, a step made again has the loss that the run recorded.
#[test]
fn a_replay_follows_the_search() {
    let job = job(&["batch.packs_per_step=1", "data.streams=1"]);
    job.run(job.alone(), 0);
    let verdicts: Vec<String> =
        course(&job).iter().filter_map(|line| Some(line["trial"]["verdict"].as_str()?.to_owned())).collect();
    assert!(verdicts.iter().any(|verdict| verdict == "keep"), "{verdicts:?}");
    let (dir, checkpoint) = (job.run_dir(), job.run_dir().join("step-00000004"));
    for step in [6, 9, 12, 16, 21, 24] {
        let (number, dir, checkpoint) = (step.to_string(), dir.display(), checkpoint.display());
        let args =
            ["replay", "--run", &dir.to_string(), "--step", &number, "--checkpoint", &checkpoint.to_string()];
        let said = String::from_utf8(run(&args, 0).stdout).unwrap();
        let loss = said.split("loss ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
        let recorded = steps(&job.run_dir())[step - 1]["loss"].as_f64().unwrap();
        assert!((loss.parse::<f64>().unwrap() - recorded).abs() < 1e-4, "step {step}: {recorded} in {said}");
    }
}

/// What another rate breaks ends its trial and not the run, whatever the guard does with steps like that.
#[test]
fn a_trial_that_breaks_is_undone() {
    let search = "schedule={kind: constant, warmup: 4, steps: 14, \
                  ada_lrs: {window: 4, alpha: 1000, beta: 3, lambda: 0.1}}";
    let job = job(&[search, "train.llm={lr: 1e-3}", "guard={spike: stop, spike_z: 60, window: 8}"]);
    job.run(job.alone(), 0);
    let trials: Vec<Value> = course(&job).into_iter().filter(|line| line["kind"] == "ada_lrs").collect();
    assert_eq!(trials[0]["trial"]["verdict"], "go_back", "{trials:?}");
    assert!(trials[0]["trial"]["gain"].is_null(), "{trials:?}");
    assert_eq!(steps(&job.run_dir()).len(), 14);
    assert_eq!(fs::read_to_string(job.run_dir().join("trips.jsonl")).unwrap(), "");
}

/// A checkpoint within a window is of where a rate that is too high is gone back to, so that all that may be undone is made
/// again.
#[test]
fn a_run_resumes_within_and_between_trials() {
    let cases: [(_, &[&str], &[u64]); 4] = [
        (1, &[], &[1, 4, 5, 7, 9, 14]),
        (2, &[], &[5, 8]),
        (1, &TOO_HIGH, &[3, 5, 6, 8]),
        (2, &TOO_HIGH, &[6]),
    ];
    for (ranks, sets, stops) in cases {
        let start = |job: &Job| if ranks == 1 { job.alone() } else { job.launch(ranks) };
        let straight = job(sets);
        straight.run(start(&straight), 0);
        for stop in stops {
            let job = job(sets);
            let mut command = start(&job);
            command.args(["--stop-at", &stop.to_string()]);
            job.run(command, 3);
            job.run(start(&job), 0);
            assert_same(&format!("{ranks} ranks, stopped at {stop}"), &job, &straight);
            let trials = |job: &Job| -> Vec<Value> {
                let trials = course(job).into_iter().filter(|line| line["kind"] == "ada_lrs");
                // When they were is no part of them.
                trials.map(|line| line["trial"].clone()).collect()
            };
            assert_eq!(trials(&job), trials(&straight), "{ranks} ranks, stopped at {stop}");
        }
    }
}
