//! Several processes train what one trains: whatever the strategy, whoever started them, also when they stop and
//! others go on, and when the data has no image or ends.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use sail_train::optim::StateKind;
use serde_json::Value;
use tch::Tensor;

use crate::processes::{Job, Process, all_end, assert_same, steps};
use crate::root;

/// Relative difference of losses, and of each tensor in the 2-norm.
const TOLERANCE: f64 = 1e-5;

const STAGE_2: &str = "train={vision: {lr: 2e-4, weight_decay: 0.01}, projector: {lr: 5e-4}, llm: frozen}";
const STAGE_3: &str = "train={vision: {lr: 2e-4, weight_decay: 0.01}, projector: {lr: 5e-4}, \
                       llm: {lr: 2e-4, weight_decay: 0.01}}";
/// So much text that most packs have no image, and in some steps all but one.
const MIX: [&str; 2] = [
    "data.balance=off",
    r#"data.sources=[{name: caption, shards: "data/demo/caption-train-*.tar"},
        {name: text, shards: "data/demo/text-train-*.tar", weight: 8.0}]"#,
];
const TEXT: &str = r#"data.sources=[{name: text, shards: "data/demo/text-train-*.tar"}]"#;

fn job(sets: &[&str]) -> Job {
    let mut job = Job::new(&["batch.tokens_per_pack=128", "batch.packs_per_step=4", "data.streams=4"]);
    job.set(&["parallel.bucket_mb=1", "parallel.timeout_secs=60", "schedule.steps=8"]);
    job.set(sets);
    job
}

/// The same job on ranks under the launcher, to its end.
fn trained(sets: &[&str], ranks: usize, strategy: &str) -> Job {
    let job = job(&[sets, &[&format!("parallel.strategy={strategy}")]].concat());
    job.run(job.launch(ranks), 0);
    job
}

fn alone(sets: &[&str]) -> Job {
    let job = job(sets);
    job.run(job.alone(), 0);
    job
}

/// Largest relative differences of the losses and of the tensors of two trainings.
fn differences(a: &Job, b: &Job) -> (f64, f64) {
    let losses = [a, b].map(|job| {
        steps(&job.run_dir()).iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<f64>>()
    });
    assert_eq!(losses[0].len(), losses[1].len());
    let largest = |differences: &mut dyn Iterator<Item = f64>| {
        differences.fold(0.0, |largest: f64, next| if next.is_nan() { next } else { largest.max(next) })
    };
    let loss = largest(&mut losses[0].iter().zip(&losses[1]).map(|(a, b)| (a - b).abs() / b.abs()));
    let [a, b] = [a, b].map(Job::newest);
    assert!(a.names().eq(b.names()));
    let difference = |name: &str| {
        let [a, b] = [&a, &b].map(|checkpoint| checkpoint.tensor(name, StateKind::Param).unwrap());
        let norm = |tensor: &Tensor| tensor.norm().double_value(&[]);
        norm(&(&a - &b)) / norm(&b).max(f64::MIN_POSITIVE)
    };
    (loss, largest(&mut b.names().map(difference)))
}

pub(crate) fn assert_close(what: &str, a: &Job, b: &Job) {
    let (loss, weights) = differences(a, b);
    println!("{what}: losses differ by {loss:.1e}, weights by {weights:.1e}");
    assert!(loss < TOLERANCE && weights < TOLERANCE, "{what}: losses {loss:e}, weights {weights:e}");
}

/// Alone and in buckets that leave while the backward pass goes on, of one process and of two.
#[test]
fn blocks_computed_twice_train_the_same() {
    let recompute = "batch.recompute={vision: block, llm: every 2}";
    let plain = alone(&[STAGE_3]);
    assert_same("one process", &alone(&[STAGE_3, recompute]), &plain);
    for strategy in ["ddp", "zero1", "zero2"] {
        assert_close(strategy, &trained(&[STAGE_3, recompute], 2, strategy), &plain);
    }
    // Gradients pass through a frozen language model.
    assert_same("a frozen module", &alone(&[STAGE_2, recompute]), &alone(&[STAGE_2]));
}

#[test]
fn ranks_train_what_one_process_trains() {
    let all = [STAGE_3, MIX[0], MIX[1]];
    let one = alone(&all);
    let alone_with_images = |line: &Value| line["packing"]["visual_imbalance"].as_f64() == Some(3.0);
    assert!(steps(&one.run_dir()).iter().any(alone_with_images), "one pack of four");
    let two = ["ddp", "zero1", "zero2"].map(|strategy| trained(&all, 2, strategy));
    for (strategy, two) in ["ddp", "zero1", "zero2"].iter().zip(&two) {
        assert_close(&format!("2 ranks, {strategy}"), two, &one);
    }
    assert_close("4 ranks, zero2", &trained(&all, 4, "zero2"), &one);

    // Stopped and gone on with; with other numbers of ranks and strategies in reliability/elastic.rs.
    let same = job(&[&all[..], &["parallel.strategy=zero1"]].concat());
    let mut stopped = same.launch(2);
    stopped.args(["--stop-at", "3"]);
    same.run(stopped, 3);
    same.run(same.launch(2), 0);
    assert_same("stopped at step 3", &same, &two[1]);
}

/// Frozen tensors are what they were, and have no moments; a stage that trains nothing which text reaches goes on.
#[test]
fn frozen_parts_and_packs_without_images() {
    let sets = [STAGE_2, MIX[0], MIX[1], "schedule.steps=4"];
    let (one, two) = (alone(&sets), trained(&sets, 2, "zero1"));
    assert_close("frozen", &two, &one);
    let [one, two] = [one, two].map(|job| job.newest());
    let frozen: Vec<&str> = two.names().filter(|name| name.starts_with("llm.")).collect();
    assert!(!frozen.is_empty());
    for name in frozen {
        let [a, b] = [&one, &two].map(|checkpoint| checkpoint.tensor(name, StateKind::Param).unwrap());
        assert!(a == b, "`{name}` is frozen");
        assert!(two.tensor(name, StateKind::ExpAvg).is_err(), "`{name}` is frozen");
    }
    assert!(two.tensor("projector.1.weight", StateKind::ExpAvg).is_ok());

    let sets = [STAGE_2, TEXT, "schedule.steps=3"];
    let one = alone(&sets);
    for (ranks, strategy) in [(2, "ddp"), (4, "zero2")] {
        let many = trained(&sets, ranks, strategy);
        assert_close("text alone", &many, &one);
        assert!(steps(&many.run_dir()).iter().all(|line| line["grad_norm"] == 0.0));
    }
}

/// Some ranks have used up their data while others go on, also within a step.
#[test]
fn data_that_ends() {
    for length in ["data.samples=13", "data.samples=25"] {
        let sets = [length, "batch.packs_per_step=2", "checkpoint.every=1", "schedule.steps=100"];
        let one = alone(&sets);
        let count = steps(&one.run_dir()).len();
        assert!((3..20).contains(&count), "{length}: {count} steps");
        let two = job(&sets);
        let said = two.run(two.launch(2), 0);
        assert!(said.contains("the data ends after step"), "{said}");
        assert_close(length, &two, &one);
        let coverage = |job: &Job| steps(&job.run_dir()).pop().unwrap()["coverage"].clone();
        assert_eq!(coverage(&two), coverage(&one), "{length}");

        // Stopped at its last step but one.
        let other = job(&sets);
        let mut stopped = other.launch(2);
        stopped.args(["--stop-at", &(count - 1).to_string()]);
        other.run(stopped, 3);
        other.run(other.alone(), 0);
        assert_close(length, &other, &one);
    }
}

#[test]
fn numbers_of_ranks_that_do_not_divide_are_refused() {
    for (streams, ranks, expected) in [
        ("data.streams=4", 3, "[rank 2] error: `batch.packs_per_step`, 4, and `data.streams`, 4, must be"),
        ("data.streams=2", 4, "[rank 1] error: `batch.packs_per_step`, 4, and `data.streams`, 2, must be"),
    ] {
        let job = job(&[streams]);
        let said = job.run(job.launch(ranks), 2);
        assert!(said.contains(expected) && said.contains("hint:"), "{said}");
    }
}

/// What a rank reads from its environment is the same training whoever has started it.
#[test]
fn launchers_make_no_difference() {
    let sets = ["schedule.steps=3", "parallel.strategy=zero1"];
    let launched = job(&sets);
    launched.run(launched.launch(2), 0);
    let torchrun = root().join(".venv/bin/torchrun");
    if torchrun.exists() {
        let by_torchrun = job(&sets);
        let rank = by_torchrun.alone();
        let mut command = Command::new(torchrun);
        command.args(["--standalone", "--no-python", "--nproc-per-node", "2"]);
        command.arg(rank.get_program()).args(rank.get_args());
        command.current_dir(root()).env("OMP_NUM_THREADS", "1");
        by_torchrun.run(command, 0);
        assert_same_files("torchrun", &by_torchrun, &launched);
    } else {
        println!("skipped: there is no {}", torchrun.display());
    }

    let by_slurm = job(&sets);
    // The port follows from the job's number.
    let free = |port: &u16| TcpListener::bind(("0.0.0.0", *port)).is_ok();
    let port = (15_000..25_000).rev().find(free).unwrap();
    let mut ranks: Vec<Process> =
        (0..2).map(|rank| by_slurm.start(&rank.to_string(), task(&by_slurm, port, rank))).collect();
    all_end(&mut ranks, Instant::now(), Duration::from_secs(60));
    for rank in &ranks {
        assert_eq!(rank.code(), 0, "{}", rank.said());
    }
    assert_same_files("slurm", &by_slurm, &launched);
}

/// A rank as `srun` starts it on one node.
fn task(job: &Job, port: u16, rank: usize) -> Command {
    let mut command = job.alone();
    let rank = rank.to_string();
    command.envs([
        ("SLURM_JOB_ID", (port - 15_000).to_string().as_str()),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_NUM_TASKS", "2"),
        ("SLURM_NTASKS", "2"),
        ("SLURM_PROCID", &rank),
        ("SLURM_LOCALID", &rank),
        ("SLURM_NODEID", "0"),
        ("SLURM_JOB_NODELIST", "localhost"),
        ("SLURM_STEP_NODELIST", "localhost"),
        ("SLURM_STEP_TASKS_PER_NODE", "2"),
    ]);
    command
}

/// Metrics but for times, and checkpoints, byte by byte.
fn assert_same_files(what: &str, a: &Job, b: &Job) {
    let metrics = [a, b].map(|job| {
        let mut lines = steps(&job.run_dir());
        for line in &mut lines {
            for time in ["time", "step_secs", "data_wait_secs", "tokens_per_sec", "parts_secs"] {
                line.as_object_mut().unwrap().remove(time).unwrap();
            }
        }
        lines.iter().map(Value::to_string).collect::<Vec<_>>()
    });
    assert_eq!(metrics[0], metrics[1], "{what}");
    for rank in ["rank-00000.safetensors", "rank-00001.safetensors"] {
        let [a, b] = [a, b].map(|job| fs::read(job.newest().dir().join(rank)).unwrap());
        assert!(a == b, "{what}: {rank}");
    }
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn every_strategy_on_every_world_for_30_steps() {
    for (name, plan) in [("stage 2", STAGE_2), ("stage 3", STAGE_3)] {
        let sets = [plan, MIX[0], MIX[1], "schedule.steps=30"];
        let one = alone(&sets);
        for ranks in [1, 2, 4] {
            for strategy in ["ddp", "zero1", "zero2"] {
                assert_close(
                    &format!("{name}, {ranks} ranks, {strategy}"),
                    &trained(&sets, ranks, strategy),
                    &one,
                );
            }
        }
    }
}
