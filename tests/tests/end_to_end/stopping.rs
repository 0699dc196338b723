//! A run that is asked to stop by a file, or by the end of its time, saves and goes on another time.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use crate::processes::{Job, all_end, signal, steps, together, until};
use crate::{run, sail_train, stderr, under};

/// A run that does not end by itself.
fn long(sets: &[&str]) -> Job {
    let mut job = Job::new(&["schedule.steps=100000", "checkpoint.every=null", "parallel.timeout_secs=60"]);
    job.set(&["batch.tokens_per_pack=128"]);
    job.set(sets);
    job
}

fn command(job: &Job, ranks: usize) -> Command {
    if ranks == 1 { job.alone() } else { job.launch(ranks) }
}

/// It has saved its last step, says so with a reason, and goes on from there.
fn assert_goes_on(job: &mut Job, ranks: usize, said: &str, reason: &str) {
    let step = job.newest().state().step;
    assert_eq!(steps(&job.run_dir()).last().unwrap()["step"].as_u64(), Some(step), "{said}");
    assert!(said.contains(&format!("saved at step {step} and stopped, since")), "{said}");
    assert!(said.contains(reason), "`{reason}` in {said}");
    job.set(&["run.time_limit_secs=null"]);
    let mut next = command(job, ranks);
    next.args(["--stop-at", &(step + 2).to_string()]);
    let said = job.run(next, 3);
    assert!(said.contains(&format!("resumes after step {step}")), "{said}");
    assert_eq!(job.newest().state().step, step + 2);
}

fn by_file(ranks: usize) {
    let mut job = long(&[]);
    let mut process = [job.start("run", command(&job, ranks))];
    job.wait_for_step(3, &mut process);
    let file = job.run_dir().join("stop");
    fs::write(&file, "").unwrap();
    all_end(&mut process, Instant::now(), Duration::from_secs(60));
    assert_eq!(process[0].code(), 3, "{}", process[0].said());
    assert!(!file.exists(), "it is not to stop the next one");
    let said = process[0].said();
    assert_goes_on(&mut job, ranks, &said, "stop` asked for it");
}

fn by_limit(ranks: usize) {
    let mut job = long(&["run.time_limit_secs=6", "run.time_margin_secs=2"]);
    let started = Instant::now();
    let said = job.run(command(&job, ranks), 3);
    assert!(started.elapsed() > Duration::from_secs(4), "{said}");
    assert_goes_on(
        &mut job,
        ranks,
        &said,
        if ranks == 1 { "s are left of its time" } else { "and stopped, since" },
    );
}

fn by_slurm(ranks: usize) {
    let mut job = long(&["run.time_margin_secs=2"]);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let mut limited = command(&job, ranks);
    limited.env("SLURM_JOB_END_TIME", (now + 6).to_string());
    let said = job.run(limited, 3);
    assert_goes_on(
        &mut job,
        ranks,
        &said,
        if ranks == 1 { "s are left of its time" } else { "and stopped, since" },
    );
}

#[test]
fn asked_by_a_file_or_the_end_of_its_time() {
    together(&[
        ("a file, alone", || by_file(1)),
        ("a file, two ranks", || by_file(2)),
        ("a limit, alone", || by_limit(1)),
        ("a limit, two ranks", || by_limit(2)),
        ("Slurm, alone", || by_slurm(1)),
        ("Slurm, two ranks", || by_slurm(2)),
    ]);
}

/// A service manager signals a launcher and its ranks, and the launcher hands its own on: the ranks took the two for
/// one who insists, and ended without a checkpoint.
#[test]
fn one_request_that_comes_twice_is_one() {
    let job = long(&[]);
    let mut process = [job.start("run", job.launch(2))];
    job.wait_for_step(2, &mut process);
    let ranks = [0, 1].map(|rank| process[0].pid_of_rank(rank).unwrap());
    for pid in [process[0].pid(), ranks[0], ranks[1]] {
        signal("TERM", pid);
    }
    all_end(&mut process, Instant::now(), Duration::from_secs(60));
    assert_eq!(process[0].code(), 3, "{}", process[0].said());
    assert!(job.newest().state().step >= 2);
}

/// What only asks was taken for a first request, and the next signal for a second one.
#[test]
fn a_signal_after_one_that_only_asks_is_the_first() {
    let job = long(&[]);
    let mut process = [job.start("run", job.alone())];
    job.wait_for_step(2, &mut process);
    signal("STOP", process[0].pid());
    signal("USR1", process[0].pid());
    signal("TERM", process[0].pid());
    signal("CONT", process[0].pid());
    all_end(&mut process, Instant::now(), Duration::from_secs(60));
    assert_eq!(process[0].code(), 3, "{}", process[0].said());
}

/// A second one ends a process at once, also while it waits for something.
#[test]
fn a_second_request_ends_it_at_once() {
    let job = long(&["batch.packs_per_step=4000", "data.streams=2"]);
    let mut process = [job.start("run", job.alone())];
    until("the run has begun its first step", || process[0].said().contains("starts"));
    signal("TERM", process[0].pid());
    sleep(Duration::from_millis(1500));
    assert!(!process[0].has_ended(), "{}", process[0].said());
    signal("TERM", process[0].pid());
    all_end(&mut process, Instant::now(), Duration::from_secs(10));
    assert_eq!(process[0].code(), 130, "{}", process[0].said());
}

/// Each repetition made one step more.
#[test]
fn a_run_that_has_come_to_its_stop_makes_no_more_steps() {
    let job = long(&[]);
    for _ in 0..2 {
        let mut command = job.alone();
        command.args(["--stop-at", "3"]);
        job.run(command, 3);
        assert_eq!(job.newest().state().step, 3);
    }
    let mut command = job.launch(2);
    command.args(["--stop-at", "2"]);
    job.run(command, 3);
    assert_eq!(job.newest().state().step, 3);
}

#[test]
fn a_time_that_cannot_be_read_is_refused() {
    let job = long(&[]);
    let mut broken = job.alone();
    broken.env("SLURM_JOB_END_TIME", "soon");
    let said = job.run(broken, 2);
    assert!(said.contains("SLURM_JOB_END_TIME=soon") && said.contains("hint:"), "{said}");
}

/// A file that comes while the last step is made ends a curriculum after the stage.
#[test]
fn a_file_at_the_end_of_a_stage_keeps_the_next_one_from_starting() {
    let dir = tempfile::tempdir().unwrap();
    let root = under(dir.path());
    let stage = |number: u8| dir.path().join(format!("runs/tiny/stage{number}"));
    let sets = [&root, "schedule.steps=1", "schedule.warmup=0", "eval=null", "export=null"];
    let mut args = vec!["--config", "configs/tiny/curriculum.yaml"];
    args.extend(sets.iter().flat_map(|set| ["--set", *set]));
    fs::create_dir_all(stage(1)).unwrap();
    fs::write(stage(1).join("stop"), "").unwrap();
    let said = stderr(&run(&args, 3));
    assert!(said.contains("tiny-stage1: finished, and stopped there, since `"), "{said}");
    assert!(stage(1).join("summary.json").exists() && !stage(1).join("stop").exists());
    assert!(!stage(2).exists());
    assert_eq!(sail_train(&args).output().unwrap().status.code(), Some(0));
    assert!(stage(3).join("summary.json").exists());
}
