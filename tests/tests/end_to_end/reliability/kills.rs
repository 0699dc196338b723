//! `kill -9` at random moments: of one process, of a rank or the launcher, and while a checkpoint is written.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use super::{ALL, Random, assert_nothing_lost, being_written, job, names_in};
use crate::processes::{Job, Process, all_end, until};

const WITHIN: Duration = Duration::from_secs(60);

/// When a kill comes.
#[derive(Clone, Copy)]
enum Moment {
    /// Any time from the start of a process to the end of the run.
    Any,
    /// Up to this long after a save has begun.
    Saving(Duration),
}

const SAVING: Moment = Moment::Saving(Duration::from_millis(30));

#[test]
fn one_process_is_killed() {
    kill_repeatedly("one process", 1, 2, 8, Moment::Any);
}

#[test]
fn ranks_are_killed() {
    kill_repeatedly("2 ranks", 2, 2, 8, Moment::Any);
}

#[test]
fn killed_while_saving() {
    kill_repeatedly("while saving", 1, 2, 8, SAVING);
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn one_process_is_killed_20_times() {
    kill_repeatedly("one process", 1, 20, 16, Moment::Any);
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn ranks_are_killed_20_times() {
    kill_repeatedly("2 ranks", 2, 20, 16, Moment::Any);
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn killed_while_saving_20_times() {
    kill_repeatedly("while saving", 1, 10, 16, SAVING);
    kill_repeatedly("2 ranks while saving", 2, 10, 16, SAVING);
}

/// Kills, and resumes by the same command, this many times; a run that comes to its end meanwhile is compared,
/// and another one takes its place.
fn kill_repeatedly(what: &str, ranks: usize, kills: u64, steps: u64, moment: Moment) {
    let mut random = Random::new(what);
    let steps = format!("schedule.steps={steps}");
    let sets = [ALL, "parallel.strategy=zero2", &steps];
    let command = |job: &Job| if ranks == 1 { job.alone() } else { job.launch(ranks) };
    let straight = job(&sets);
    let started = Instant::now();
    straight.run(command(&straight), 0);
    let whole = started.elapsed();
    let (mut done, mut runs, mut cut) = (0, 0, 0);
    while done < kills {
        let killed = job(&sets);
        runs += 1;
        while done < kills {
            let mut run = [killed.start(&format!("run-{done}"), command(&killed))];
            wait_for(moment, whole, &killed, &mut run[0], &mut random);
            kill_one(&run[0], ranks, &mut random);
            all_end(&mut run, Instant::now(), WITHIN);
            until("the ranks end", || killed.left().is_empty());
            match run[0].code() {
                137 => done += 1,
                0 => break,
                code => panic!("{what}: exit code {code}:\n{}", run[0].said()),
            }
            cut += usize::from(names_in(&killed.run_dir()).iter().any(|name| name.starts_with(".tmp-step-")));
        }
        killed.run(command(&killed), 0);
        assert_nothing_lost(what, &killed, &straight);
    }
    println!("{what}: {done} kills in {runs} runs, {cut} of them while a checkpoint was written");
    if matches!(moment, Moment::Saving(_)) {
        assert!(cut > 0, "{what}: no kill came while a checkpoint was written");
    }
}

fn wait_for(moment: Moment, whole: Duration, job: &Job, process: &mut Process, random: &mut Random) {
    match moment {
        Moment::Any => {
            let (began, until) = (Instant::now(), random.within(whole));
            while began.elapsed() < until && !process.has_ended() {
                sleep(Duration::from_millis(1));
            }
        }
        Moment::Saving(within) => {
            let (began, mut saves) = (SystemTime::now(), 1 + random.below(3));
            let mut last = None;
            while saves > 0 && !process.has_ended() {
                let step = being_written(&job.run_dir(), began);
                saves -= u64::from(step.is_some() && step != last);
                last = step.or(last);
                sleep(Duration::from_micros(500));
            }
            sleep(random.within(within));
        }
    }
}

/// Kills the process, or a rank or the launcher where it is one. What has just ended cannot be killed.
fn kill_one(process: &Process, ranks: usize, random: &mut Random) {
    let rank = usize::try_from(random.below(ranks as u64 + 1)).unwrap();
    let rank = (ranks > 1 && rank < ranks).then(|| process.pid_of_rank(rank)).flatten();
    let pid = rank.unwrap_or(process.pid()).to_string();
    drop(Command::new("kill").args(["-KILL", &pid]).output().unwrap());
}
