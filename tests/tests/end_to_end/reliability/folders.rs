//! Two processes in one run folder, and a run folder that goes away under a training.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{assert_nothing_lost, job};
use crate::processes::{Job, all_end, signal, until};

const WITHIN: Duration = Duration::from_secs(60);
const STEPS: &str = "schedule.steps=24";

#[test]
fn a_second_process_is_refused_and_the_first_one_goes_on() {
    let sets = [STEPS];
    let (straight, first) = (job(&sets), job(&sets));
    straight.run(straight.alone(), 0);
    let mut process = [first.start("first", first.alone())];
    first.wait_for_step(2, &mut process);
    // It waits, so that it is there as long as the other ones are.
    signal("STOP", process[0].pid());
    // A thread that writes stops when the system has written.
    until("all its threads stand still", || stands_still(process[0].pid()));
    let before = bytes_in(&first.run_dir());
    for command in [first.alone(), first.launch(2)] {
        let said = first.run(command, 2);
        assert!(said.contains("another process is at work in") && said.contains("hint:"), "{said}");
    }
    assert!(bytes_in(&first.run_dir()) == before, "those that were refused have changed nothing");
    signal("CONT", process[0].pid());
    all_end(&mut process, Instant::now(), WITHIN);
    assert_eq!(process[0].code(), 0, "{}", process[0].said());
    assert_nothing_lost("beside others", &first, &straight);
}

/// All files below a folder with their content, but for those that change names.
fn bytes_in(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(bytes_in(&path));
        } else {
            found.push((path.display().to_string(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn a_run_whose_folder_is_removed_ends_and_makes_no_new_one() {
    let job = job(&["schedule.steps=100000"]);
    let mut process = [job.start("run", job.alone())];
    job.wait_for_step(2, &mut process);
    remove_under(&job, process[0].pid());
    all_end(&mut process, Instant::now(), WITHIN);
    let said = process[0].said();
    assert_eq!(process[0].code(), 1, "{said}");
    assert!(said.contains("was removed or replaced") && said.contains("hint:"), "{said}");
    assert!(!job.run_dir().exists());
}

/// After the last save nobody looked any more: an export and a summary went into whatever was there.
#[test]
fn a_folder_that_is_replaced_during_the_last_evaluation_gets_nothing() {
    let eval = "eval={samples: 1, generate: 16, max_new_tokens: 900, sources: [{name: caption, shards: \
                'data/demo/caption-heldout-*.tar'}]}";
    let mut job = job(&["schedule.steps=2", "checkpoint.every=null", "export={vit: transformers}"]);
    job.set(&["guard.self_check=false"]);
    job.run(job.alone(), 0);
    fs::remove_dir_all(job.run_dir().join("export")).unwrap();
    fs::remove_file(job.run_dir().join("summary.json")).unwrap();
    job.set(&[eval]);
    // It resumes after the last step: what is left is to evaluate and to export.
    let mut process = [job.start("run", job.alone())];
    until("it evaluates", || process[0].said().contains("measuring the held-out loss"));
    fs::rename(job.run_dir(), job.dir.path().join("elsewhere")).unwrap();
    fs::create_dir_all(job.run_dir()).unwrap();
    all_end(&mut process, Instant::now(), 6 * WITHIN);
    let said = process[0].said();
    assert_eq!(process[0].code(), 1, "{said}");
    assert!(said.contains("was removed or replaced"), "{said}");
    assert_eq!(fs::read_dir(job.run_dir()).unwrap().count(), 0);
}

/// What starts anew in the place of a removed folder is not disturbed by the run that was there.
#[test]
fn a_run_whose_folder_is_replaced_leaves_the_new_one_alone() {
    let sets = [STEPS];
    let (straight, new) = (job(&sets), job(&sets));
    straight.run(straight.alone(), 0);
    let mut old = [new.start("old", new.alone())];
    new.wait_for_step(2, &mut old);
    remove_under(&new, old[0].pid());
    signal("STOP", old[0].pid());
    let mut process = [new.start("new", new.alone())];
    new.wait_for_step(2, &mut process);
    signal("CONT", old[0].pid());
    all_end(&mut old, Instant::now(), WITHIN);
    let said = old[0].said();
    assert_eq!(old[0].code(), 1, "{said}");
    assert!(said.contains("was removed or replaced"), "{said}");
    all_end(&mut process, Instant::now(), WITHIN);
    assert_eq!(process[0].code(), 0, "{}", process[0].said());
    assert_nothing_lost("in the place of another", &new, &straight);
}

fn stands_still(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut stats = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).unwrap());
    stats.all(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
}

/// Removes the run folder while the training holds still, so that nothing is added to it meanwhile.
fn remove_under(job: &Job, pid: u32) {
    signal("STOP", pid);
    fs::remove_dir_all(job.run_dir()).unwrap();
    signal("CONT", pid);
}
