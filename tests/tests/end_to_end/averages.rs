//! Moving averages of parameters: kept through stops, measured and exported in place of what is trained.

use std::fs;
use std::process::Command;

use sail_model::weights::Shards;
use sail_train::optim::StateKind;
use serde_json::Value;

use crate::processes::{Job, assert_same};
use crate::{run, stderr};

const EMA: &str = "optimizer.ema={decay: 0.7, modules: [vision, projector]}";

/// The upper half of the encoder is trained from step 3 on.
fn job(sets: &[&str]) -> Job {
    let eval = "eval={every: 2, samples: 4, generate: 0, sources: [{name: caption, shards: data/demo/caption-heldout-*.tar}]}";
    let unlock = "train.unfreeze=[{at: 3, match: 'vision.blocks[1..]', lr: 1e-3}]";
    let mut job = Job::new(&["schedule.steps=6", "batch.tokens_per_pack=128", eval, unlock, EMA]);
    job.set(&["checkpoint={every: 1, keep_last: 99}", "export={vit: transformers}"]);
    job.set(sets);
    job
}

fn start(job: &Job, ranks: usize) -> Command {
    if ranks == 1 { job.alone() } else { job.launch(ranks) }
}

fn summary(job: &Job) -> Value {
    serde_json::from_slice(&fs::read(job.run_dir().join("summary.json")).unwrap()).unwrap()
}

#[test]
fn averages_are_kept_measured_and_exported() {
    let bf16 = "run.precision=bf16";
    for (ranks, sets, stops) in [
        (1, vec![], &[1, 2, 3, 4][..]),
        (1, vec![bf16], &[3]),
        (2, vec!["parallel.strategy=zero1"], &[3]),
        (2, vec!["parallel.strategy=ddp", bf16], &[4]),
    ] {
        let what = format!("{ranks} ranks, {sets:?}");
        let straight = job(&sets);
        straight.run(start(&straight, ranks), 0);
        for stop in stops {
            let job = job(&sets);
            let mut command = start(&job, ranks);
            command.args(["--stop-at", &stop.to_string()]);
            job.run(command, 3);
            job.run(start(&job, ranks), 0);
            assert_same(&format!("{what}, stopped after {stop}"), &job, &straight);
            assert_eq!(summary(&job)["after"], summary(&straight)["after"], "{what}, stopped after {stop}");
        }

        let last = straight.newest();
        let export = Shards::open(&straight.run_dir().join("export/vit")).unwrap();
        let mut averaged = 0;
        for name in last.names().filter(|name| name.starts_with("vision.")) {
            let kind = if last.holds(name, StateKind::Ema) { StateKind::Ema } else { StateKind::Param };
            let expected = last.tensor(name, kind).unwrap();
            assert!(export.tensor(&name["vision.".len()..]).unwrap().equal(&expected), "{what}: {name}");
            averaged += usize::from(!expected.equal(&last.tensor(name, StateKind::Param).unwrap()));
        }
        assert!(averaged > 5, "{what}: {averaged} of the encoder differ from what is trained");

        let [dir, json] = ["", "report.json"].map(|file| straight.run_dir().join(file).display().to_string());
        run(&["eval", "--checkpoint", &dir, "--json", &json], 0);
        let report: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
        let [found, expected] =
            [&report, &summary(&straight)["after"]].map(|report| report["total"]["loss"].as_f64().unwrap());
        assert!((found - expected).abs() <= 1e-6 * expected, "{what}: {found}, in the run {expected}");
    }
}

/// Averages change nothing of the training itself, and a run that is given them on its way begins with its parameters.
#[test]
fn averages_can_be_added_on_the_way() {
    let (with, without) = (job(&[]), job(&["optimizer.ema=null"]));
    with.run(with.alone(), 0);
    without.run(without.alone(), 0);
    let [a, b] = [&with, &without].map(Job::newest);
    for name in a.names() {
        let [a, b] = [&a, &b].map(|checkpoint| checkpoint.tensor(name, StateKind::Param).unwrap());
        assert!(a.equal(&b), "{name}");
    }
    // The same weights, measured at the end once with averages and once without.
    let [a, b] = [&with, &without].map(summary);
    assert_eq!(a["before"]["total"], b["before"]["total"]);
    assert_ne!(a["after"]["total"]["loss"], b["after"]["total"]["loss"]);
    let mut later = job(&["optimizer.ema=null"]);
    let mut command = later.alone();
    command.args(["--stop-at", "4"]);
    later.run(command, 3);
    later.set(&[EMA]);
    let refused = later.run(later.alone(), 2);
    assert!(refused.contains("optimizer.ema"), "{refused}");
    let mut command = later.alone();
    command.args(["--allow-config-change", "--stop-at", "5"]);
    later.run(command, 3);
    let (name, kinds) = ("projector.1.weight", [StateKind::Ema, StateKind::Param]);
    let before = sail_train::checkpoint::Checkpoint::open(&later.run_dir().join("step-00000004")).unwrap();
    let after = later.newest();
    let [average, trained] = kinds.map(|kind| after.tensor(name, kind).unwrap());
    let decay = 6.0 / 15.0;
    let expected = before.tensor(name, StateKind::Param).unwrap() * decay + trained * (1.0 - decay);
    let difference = (average - expected).abs().max().double_value(&[]);
    assert!(difference < 1e-6, "{difference}");
}

/// Averages are cut anew for other ranks.
#[test]
fn other_ranks_go_on_with_the_averages() {
    let sets = ["batch.packs_per_step=4", "data.streams=4", "train.projector.lr=1e-4", "eval=null"];
    let straight = job(&sets);
    straight.run(straight.alone(), 0);
    let mut elastic = job(&sets);
    for (ranks, strategy, stop_at) in [(2, "zero1", Some("2")), (4, "zero2", Some("4")), (1, "ddp", None)] {
        elastic.set(&[&format!("parallel.strategy={strategy}")]);
        let mut command = elastic.launch(ranks);
        command.args(stop_at.iter().flat_map(|step| ["--stop-at", step]));
        elastic.run(command, if stop_at.is_some() { 3 } else { 0 });
    }
    let [a, b] = [&elastic, &straight].map(Job::newest);
    let mut averages = 0;
    for name in a.names().filter(|name| a.holds(name, StateKind::Ema)) {
        let [a, b] = [&a, &b].map(|checkpoint| checkpoint.tensor(name, StateKind::Ema).unwrap());
        let difference = (&a - &b).norm().double_value(&[]);
        assert!(difference <= 1e-4 * b.norm().double_value(&[]), "{name}: {difference}");
        averages += 1;
    }
    assert!(averages > 5, "{averages}");
}

#[test]
fn a_stage_ends_early() {
    // The loss never falls by so much: the first measurement stays the lowest one.
    let stop = "schedule.early_stop={patience: 2, min_delta: 100}";
    let evaluated = |job: &Job| {
        let metrics = fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
        let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let evaluations = lines.filter(|line| line["kind"] == "eval");
        evaluations.map(|line| line["step"].as_u64().unwrap()).collect::<Vec<u64>>()
    };
    for ranks in [1, 2] {
        let straight = job(&[stop]);
        let said = straight.run(start(&straight, ranks), 0);
        assert!(said.contains("ends early, after step 4") && said.contains("lowest"), "{said}");
        assert_eq!(summary(&straight)["steps"], 4);
        assert_eq!(evaluated(&straight), [0, 2, 4], "the last one is not made again for the summary");
        for at in [1, 2, 3] {
            let job = job(&[stop]);
            let mut command = start(&job, ranks);
            command.args(["--stop-at", &at.to_string()]);
            job.run(command, 3);
            // What was measured is in the checkpoint, whatever becomes of the record.
            if at == 3 {
                fs::remove_file(job.run_dir().join("metrics.jsonl")).unwrap();
                job.run(start(&job, ranks), 0);
                assert_eq!(summary(&job)["steps"], 4);
                continue;
            }
            job.run(start(&job, ranks), 0);
            assert_same(&format!("{ranks} ranks, stopped after {at}"), &job, &straight);
        }
        // It has ended: the same command does nothing, and the next stage takes it.
        assert!(straight.run(straight.alone(), 0).contains("already finished"));
        let mut next = Job::new(&["schedule.steps=1", "batch.tokens_per_pack=128"]);
        next.set(&[&format!("init.from={}", straight.run_dir().display())]);
        next.run(next.alone(), 0);
        // Other held-out samples would end it elsewhere.
        let mut other = straight.alone();
        other.args(["--set", "eval.samples=2"]);
        assert!(straight.run(other, 2).contains("eval.samples"));
        // Given more patience, it goes on.
        let mut longer = straight;
        longer.set(&["schedule.early_stop=null"]);
        let mut command = longer.alone();
        command.arg("--allow-config-change");
        longer.run(command, 0);
        assert_eq!(summary(&longer)["steps"], 6);
    }
}

#[test]
fn averages_of_what_is_never_trained_are_refused() {
    let job = job(&["optimizer.ema={modules: [llm]}", "schedule.early_stop={patience: 0}"]);
    let said = stderr(&job.alone().output().unwrap());
    assert!(said.contains("`llm` is never trained") && said.contains("early_stop.patience"), "{said}");
}
