//! Progressive unfreezing: what a plan names moves from its point on and nothing else does, and a run goes on the
//! same way on either side of a point.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use sail_train::checkpoint::Checkpoint;
use sail_train::optim::StateKind;
use serde_json::Value;
use tch::Tensor;

use crate::processes::{Job, assert_same, steps, until};

const STEPS: u64 = 10;
const BF16: &str = "run.precision=bf16";

/// Points in every form that `at` has. Of the models' two layers each, the upper one first.
const POINTS: &str = "train.unfreeze=[\
    {at: 2, match: 'vision.blocks[1..]', lr: 1e-3, layer_decay: 0.5, warmup: 2}, \
    {at: 3, match: vision, lr: 5e-4, weight_decay: 0.1}, \
    {at: 50%, match: 'llm.blocks[1]', lr: 1e-3, betas: [0.8, 0.9]}, \
    {at: 1300 tokens, match: ['llm.*.mlp.*', 'llm.*.self_attn.*'], lr: 1e-3}, \
    {at: 8, match: llm, lr: 1e-3, warmup: 200 tokens}]";

fn job(sets: &[&str]) -> Job {
    let schedule = format!("schedule={{kind: wsd, decay: 3, warmup: 1, steps: {STEPS}}}");
    let mut job = Job::new(&[&schedule, "batch.tokens_per_pack=128", POINTS]);
    job.set(&["checkpoint={every: 1, keep_last: 99}", "parallel.timeout_secs=60"]);
    job.set(sets);
    job
}

fn start(job: &Job, ranks: usize) -> Command {
    if ranks == 1 { job.alone() } else { job.launch(ranks) }
}

fn weights(job: &Job, step: u64) -> BTreeMap<String, Tensor> {
    let checkpoint = Checkpoint::open(&job.run_dir().join(format!("step-{step:08}"))).unwrap();
    let tensor = |name: &str| (name.to_owned(), checkpoint.tensor(name, StateKind::Param).unwrap());
    checkpoint.names().map(tensor).collect()
}

/// What the plan above trains in the step after `done` ones, said anew.
fn is_trained(name: &str, done: u64, tokens: u64) -> bool {
    let in_upper = name.contains("layers.1.");
    match name.split('.').next() {
        Some("projector") => true,
        Some("vision") => done >= 3 || (done >= 2 && in_upper),
        _ => {
            let inner = name.contains(".mlp.") || name.contains(".self_attn.");
            done >= 8 || (done >= 5 && in_upper) || (tokens >= 1300 && inner)
        }
    }
}

#[test]
fn what_is_named_moves_from_its_point_on() {
    for (ranks, sets) in [(1, vec![]), (2, vec!["parallel.strategy=zero1"])] {
        let job = job(&sets);
        job.run(start(&job, ranks), 0);
        let made = steps(&job.run_dir());
        let count = |step: u64, field: &str| made[step as usize - 1][field].as_u64().unwrap();
        let mut tokens = count(1, "tokens");
        let mut before = weights(&job, 1);
        let mut points = 0;
        for step in 2..=STEPS {
            let after = weights(&job, step);
            assert_eq!(after.len(), before.len());
            let moved: BTreeSet<&String> = after
                .iter()
                .filter(|(name, tensor)| !tensor.equal(&before[*name]))
                .map(|(name, _)| name)
                .collect();
            let named: BTreeSet<&String> =
                after.keys().filter(|name| is_trained(name, step - 1, tokens)).collect();
            assert_eq!(moved, named, "step {step}, {ranks} ranks");
            let now = made[step as usize - 1]["lr"].as_object().unwrap().len();
            assert!(now >= points, "{now} {points}");
            points = now;
            tokens += count(step, "tokens");
            before = after;
        }
        assert!(tokens - count(STEPS, "tokens") > 1300, "the point by tokens is within the run: {tokens}");
        assert_eq!(points, 6, "all parts have a rate at the end");
        let metrics = fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
        let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        assert_eq!(lines.filter(|line| line["kind"] == "unlock").count(), 5);
    }
}

/// Stops a training after each of these steps, and lets it go on to its end each time.
fn assert_resumes_after(stops: impl IntoIterator<Item = u64>, ranks: usize, sets: &[&str]) {
    let straight = job(sets);
    straight.run(start(&straight, ranks), 0);
    for stop in stops {
        let job = job(sets);
        job.run(stop_at(start(&job, ranks), stop), 3);
        job.run(start(&job, ranks), 0);
        assert_same(&format!("{ranks} ranks, {sets:?}, stopped after {stop}"), &job, &straight);
    }
}

fn stop_at(mut command: Command, step: u64) -> Command {
    command.args(["--stop-at", &step.to_string()]);
    command
}

#[test]
fn a_run_resumes_on_either_side_of_every_point() {
    assert_resumes_after(1..STEPS, 1, &[]);
    assert_resumes_after([3, 5], 1, &[BF16]);
    assert_resumes_after([5], 2, &["parallel.strategy=zero2", BF16]);
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn ranks_resume_on_either_side_of_every_point() {
    for strategy in ["ddp", "zero1", "zero2"] {
        let strategy = format!("parallel.strategy={strategy}");
        assert_resumes_after(1..STEPS, 2, &[&strategy]);
        assert_resumes_after(1..STEPS, 2, &[&strategy, BF16]);
    }
}

/// Two ranks that start anew for every step, each time from what the last ones left.
#[test]
fn ranks_may_stop_after_every_step() {
    let sets = ["parallel.strategy=zero1"];
    let straight = job(&sets);
    straight.run(start(&straight, 2), 0);
    let job = job(&sets);
    for step in 1..STEPS {
        job.run(stop_at(start(&job, 2), step), 3);
    }
    job.run(start(&job, 2), 0);
    assert_same("stopped after every step", &job, &straight);
}

/// In bf16 the rest of a module of which a part was unlocked was stored as it computes, not as it was read.
#[test]
fn what_stays_frozen_in_a_module_that_is_unlocked_stays_exact() {
    let unlock = "train.unfreeze=[{at: 1, match: 'llm.blocks[1]', lr: 1e-3}]";
    let sets =
        ["checkpoint={every: 1, keep_last: 9}", "schedule.steps=2", "batch.tokens_per_pack=128", unlock];
    let [exact, rounded] = ["fp32", "bf16"].map(|precision| {
        let mut job = Job::new(&sets);
        job.set(&[&format!("run.precision={precision}")]);
        job.run(job.alone(), 0);
        job
    });
    let (read, kept) = (weights(&exact, 1), weights(&rounded, 2));
    let frozen = read.iter().filter(|(name, _)| name.starts_with("llm.") && !name.contains("layers.1."));
    let mut count = 0;
    for (name, tensor) in frozen {
        assert!(kept[name].equal(tensor) && kept[name].kind() == tensor.kind(), "{name}");
        count += 1;
    }
    assert!(count > 5);
}

/// A kill between an unlock point and the next save left its line in the record, and the run wrote it once more.
#[test]
fn a_point_is_recorded_once_though_the_run_is_killed_after_it() {
    let unlock = "train.unfreeze=[{at: 2, match: 'llm.blocks[1]', lr: 1e-3}]";
    let mut job = Job::new(&["checkpoint={every: 2, keep_last: 9999}", "batch.tokens_per_pack=128", unlock]);
    job.set(&["schedule.steps=100000"]);
    let count = || {
        let metrics = fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
        metrics.lines().filter(|line| line.contains("\"unlock\"")).count()
    };
    let mut process = [job.start("run", job.alone())];
    job.wait_for_step(3, &mut process);
    // It is written while training goes on.
    until("a checkpoint before the point", || job.run_dir().join("step-00000002").exists());
    drop(process);
    assert_eq!(count(), 1);
    // Back to before the point, as if the later checkpoints had not been written in time.
    for step in 3..1000 {
        let path = job.run_dir().join(format!("step-{step:08}"));
        if path.exists() {
            fs::remove_dir_all(path).unwrap();
        }
    }
    let said = job.run(stop_at(job.alone(), 4), 3);
    assert!(said.contains("resumes after step 2"), "{said}");
    assert_eq!(count(), 1);
}

/// Each stop on other ranks than before: what is unlocked is cut anew.
#[test]
fn other_ranks_go_on_with_what_is_unlocked() {
    // A first update moves by the rate whatever the gradient: at lower rates rounding makes less of a difference.
    let points = POINTS.replace("e-3", "e-4");
    let sets = ["batch.packs_per_step=4", "data.streams=4", &points];
    let straight = job(&sets);
    straight.run(straight.alone(), 0);
    let mut elastic = job(&sets);
    for (ranks, strategy, stop_at) in
        [(1, "zero1", Some("2")), (2, "zero2", Some("5")), (4, "ddp", Some("8")), (1, "zero1", None)]
    {
        elastic.set(&[&format!("parallel.strategy={strategy}")]);
        let mut command = elastic.launch(ranks);
        command.args(stop_at.iter().flat_map(|step| ["--stop-at", step]));
        elastic.run(command, if stop_at.is_some() { 3 } else { 0 });
    }
    crate::parallel::assert_close("1, 2, 4, 1 ranks", &elastic, &straight);
}

#[test]
fn a_stage_of_tokens_ends_with_the_step_that_reaches_them() {
    let mut job = job(&["checkpoint.every=null"]);
    job.set(&["schedule={kind: linear, tokens: 1000, warmup: 20%}", "train.unfreeze=[]"]);
    job.run(job.alone(), 0);
    let made = steps(&job.run_dir());
    let tokens: Vec<u64> = made.iter().map(|step| step["tokens"].as_u64().unwrap()).collect();
    let all: u64 = tokens.iter().sum();
    assert!(all >= 1000 && all - tokens.last().unwrap() < 1000, "{tokens:?}");
    let done = |steps: usize| tokens[..steps].iter().sum::<u64>() as f64;
    for (index, step) in made.iter().enumerate() {
        let after = done(index + 1);
        let share = ((after - 200.0) / 800.0).min(1.0);
        let factor = if after <= 200.0 { after / 200.0 } else { 0.1 + 0.9 * (1.0 - share) };
        let lr = step["lr"]["projector"].as_f64().unwrap();
        assert!((lr - 1e-3 * factor).abs() < 1e-12, "{step}");
    }
    assert!(job.run(job.alone(), 0).contains("already finished"));
}

#[test]
fn parts_that_are_not_there_are_refused_before_training() {
    for (set, said) in [
        ("train.rules=[{match: 'vision.*qkv*', train: frozen}]", "names no parameter"),
        ("train.rules=[{match: 'llm.blocks[2..4]', train: {lr: 1e-3}}]", "names block 2 of 2"),
        ("train.unfreeze=[{at: 1, match: projector, lr: 1e-3}]", "unlocks nothing"),
        ("train.unfreeze=[{at: 1, match: 'llm.head.*', lr: 1e-3}]", "names no parameter"),
    ] {
        let mut job = Job::new(&["schedule.steps=2"]);
        job.set(&[set]);
        let text = job.run(job.alone(), 2);
        assert!(text.contains(said) && text.contains(".match") && text.contains("hint:"), "{set}: {text}");
        assert!(!job.run_dir().join("metrics.jsonl").exists());
    }
}
