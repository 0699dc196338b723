//! Stopped or killed at any moment, a run ends with the weights of one that was left alone.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::processes::Job;
use crate::{run, sail_train, stderr, under, weights_file};

const STAGES: [&str; 3] = ["runs/tiny/stage1", "runs/tiny/stage2", "runs/tiny/stage3"];

fn arguments(dir: &Path, checkpoint_every: u64) -> Vec<String> {
    arguments_of("curriculum", dir, checkpoint_every)
}

fn arguments_of(file: &str, dir: &Path, checkpoint_every: u64) -> Vec<String> {
    let mut args = vec!["--config".to_owned(), format!("configs/tiny/{file}.yaml")];
    for set in [
        under(dir),
        "schedule.steps=4".to_owned(),
        "schedule.warmup=1".to_owned(),
        "eval.samples=2".to_owned(),
        "eval.generate=0".to_owned(),
        format!("checkpoint.every={checkpoint_every}"),
    ] {
        args.extend(["--set".to_owned(), set]);
    }
    args
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Every stage of `b` ended like that of `a`, bit for bit, and recorded each step once.
fn assert_same(a: &Path, b: &Path) {
    for stage in STAGES {
        let [left, right] = [a, b].map(|dir| std::fs::read(weights_file(&dir.join(stage))).unwrap());
        assert!(left == right, "{stage}: the tensors differ");
        let losses = [a, b].map(|dir| {
            let text = std::fs::read_to_string(dir.join(stage).join("metrics.jsonl")).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            let train = lines.filter(|line| line["kind"] == "train");
            train.map(|line| (line["step"].as_u64(), line["loss"].as_f64())).collect::<Vec<_>>()
        });
        assert_eq!(losses[0].len(), 4, "{stage}");
        assert_eq!(losses[0], losses[1], "{stage}");
    }
}

#[test]
fn stopped_at_every_step_of_every_stage() {
    let (straight, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&strs(&arguments(straight.path(), 100)), 0);

    for stage in ["stage1", "stage2", "stage3"] {
        let args = arguments_of(stage, stopped.path(), 100);
        for step in ["1", "2", "3"] {
            run(&[&strs(&args)[..], &["--stop-at", step]].concat(), 3);
        }
        run(&strs(&args), 0);
    }
    let said = stderr(&run(&strs(&arguments(stopped.path(), 100)), 0));
    assert_eq!(said.matches("already finished").count(), 3, "{said}");
    assert_same(straight.path(), stopped.path());
}

#[test]
fn killed_at_any_moment() {
    kill_repeatedly(6);
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn killed_at_any_moment_many_times() {
    kill_repeatedly(60);
}

fn kill_repeatedly(kills: u64) {
    let (straight, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(&strs(&arguments(straight.path(), 100)), 0);
    let args = arguments(killed.path(), 1);
    let mut done = false;
    for i in 0..kills {
        let mut child = sail_train(&strs(&args)).stderr(std::process::Stdio::null()).spawn().unwrap();
        // Spread over start-up, steps, checkpoint writing, evaluation and export.
        sleep(Duration::from_millis(300 + (i * 617) % 2500));
        child.kill().unwrap();
        done |= child.wait().unwrap().success();
    }
    if !done {
        run(&strs(&args), 0);
    }
    assert_same(straight.path(), killed.path());
}

#[test]
fn a_signal_saves_and_exits_with_3() {
    for signal in ["TERM", "USR1"] {
        let dir = tempfile::tempdir().unwrap();
        let set = under(dir.path());
        let args = ["--config", "configs/tiny/stage1.yaml", "--set", &set, "--set", "schedule.steps=100000"];
        let mut child = sail_train(&args).stderr(std::process::Stdio::null()).spawn().unwrap();
        let metrics = dir.path().join(STAGES[0]).join("metrics.jsonl");
        while !std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"train\"")) {
            assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
            sleep(Duration::from_millis(50));
        }
        let pid = child.id().to_string();
        let status = std::process::Command::new("kill").args(["-s", signal, &pid]).status().unwrap();
        assert!(status.success());
        assert_eq!(child.wait().unwrap().code(), Some(3), "{signal}");
        assert!(weights_file(&dir.path().join(STAGES[0])).exists(), "{signal}");
    }
}

/// A checkpoint is written while the next step is made, and complete after it at the earliest.
#[test]
fn saving_goes_on_behind_training() {
    let job = Job::new(&["schedule.steps=8", "checkpoint.every=3"]);
    job.run(job.launch(2), 0);
    let text = std::fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let place = |kind: &str, step: u64| {
        lines.iter().position(|line| line["kind"] == kind && line["step"] == step).expect("it is recorded")
    };
    for step in [3, 6] {
        assert!(place("checkpoint", step) > place("train", step + 1), "{text}");
    }
    assert!(place("checkpoint", 8) > place("train", 8), "the last one is waited for");
}
