//! SIGTERM at random moments: exit code 3, and no step is lost.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use super::{Random, assert_nothing_left, assert_nothing_lost, being_written, job, last_step, trained_on};
use crate::processes::{Job, Process, all_end, signal, until};

const WITHIN: Duration = Duration::from_secs(60);
const ENDLESS: &str = "schedule.steps=100000";

#[test]
fn terminated_at_random_moments() {
    terminate_repeatedly(2);
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn terminated_30_times() {
    terminate_repeatedly(30);
}

/// The signal comes to the launcher, or to one of its two ranks.
fn terminate_repeatedly(times: u64) {
    let mut random = Random::new("terminated");
    let sets = [ENDLESS, "parallel.strategy=zero1", "train.vision={lr: 1e-4}"];
    let stopped = job(&[&sets[..], &["checkpoint.every=3"]].concat());
    for time in 0..times {
        let before = last_step(&stopped);
        let mut launcher = [stopped.start(&format!("launch-{time}"), stopped.launch(2))];
        stopped.wait_for_step(before + 1, &mut launcher);
        sleep(random.within(Duration::from_millis(400)));
        let pid = match random.below(4) {
            rank @ 0..2 => launcher[0].pid_of_rank(usize::try_from(rank).unwrap()).unwrap(),
            _ => launcher[0].pid(),
        };
        signal("TERM", pid);
        saved_where_it_stopped(&format!("signal {time}"), &stopped, &mut launcher, before + 1);
    }
    let mut straight = job(&sets);
    straight.set(&["checkpoint.every=1000"]);
    let mut command = straight.launch(2);
    command.args(["--stop-at", &last_step(&stopped).to_string()]);
    straight.run(command, 3);
    assert_nothing_lost("terminated", &stopped, &straight);
    println!("terminated: {times} signals in {} steps", last_step(&stopped));
}

/// It exits with 3, and its newest checkpoint, which verifies, is of the last step that it made.
fn saved_where_it_stopped(what: &str, job: &Job, process: &mut [Process], at_least: u64) {
    all_end(process, Instant::now(), WITHIN);
    assert_eq!(process[0].code(), 3, "{what}: {}", process[0].said());
    let saved = job.newest().state().step;
    assert_eq!(saved, last_step(job), "{what}: the last step made is the one saved");
    assert!(saved >= at_least, "{what}: step {saved} after step {at_least}");
    assert_eq!(trained_on(&job.run_dir()).len() as u64, saved, "{what}: each step once");
    assert_nothing_left(what, job);
    until("the ranks end", || job.left().is_empty());
}

#[test]
fn terminated_while_it_evaluates() {
    let eval = "eval={every: 1, samples: 24, generate: 0, \
                sources: [{name: caption, shards: \"data/demo/caption-heldout-*.tar\"}]}";
    let job = job(&[ENDLESS, eval, "checkpoint.every=1000"]);
    let mut process = [job.start("run", job.alone())];
    // That before the first step, and that after step 1.
    until("it evaluates", || {
        assert!(!process[0].has_ended(), "{}", process[0].said());
        process[0].said().matches("measuring the held-out loss").count() > 1
    });
    signal("TERM", process[0].pid());
    saved_where_it_stopped("while it evaluates", &job, &mut process, 1);
}

#[test]
fn terminated_while_it_saves() {
    let job = job(&[ENDLESS, super::ALL]);
    let (began, mut process) = (SystemTime::now(), [job.start("run", job.alone())]);
    until("it saves", || {
        assert!(!process[0].has_ended(), "{}", process[0].said());
        being_written(&job.run_dir(), began).is_some()
    });
    signal("TERM", process[0].pid());
    saved_where_it_stopped("while it saves", &job, &mut process, 1);
}
