//! The clock of the day is set forward or back by a day while a run trains: nothing comes of it.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{assert_nothing_lost, job};
use crate::processes::all_end;
use crate::root;

#[test]
fn the_clock_is_set_forward() {
    jump("86400");
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn the_clock_is_set_back() {
    jump("-86400");
}

fn jump(secs: &str) {
    let dir = tempfile::tempdir().unwrap();
    let library = dir.path().join("clock.so");
    let source = root().join("tests/tests/end_to_end/reliability/clock.c");
    let compiler =
        Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
    match compiler {
        Ok(status) => assert!(status.success(), "cc: {status}"),
        Err(error) => {
            println!("skipped: there is no C compiler: {error}");
            return;
        }
    }
    let sets = ["schedule.steps=24", "parallel.strategy=zero1", "run.time_limit_secs=3000"];
    let straight = job(&sets);
    straight.run(straight.launch(2), 0);
    let jumped = job(&sets);
    let now = jumped.dir.path().join("now");
    let mut command = jumped.launch(2);
    command.env("LD_PRELOAD", &library).env("CLOCK_JUMP_SECS", secs).env("CLOCK_JUMP_FILE", &now);
    let mut process = [jumped.start("launch", command)];
    jumped.wait_for_step(2, &mut process);
    fs::write(now, "").unwrap();
    all_end(&mut process, Instant::now(), Duration::from_secs(60));
    let said = process[0].said();
    assert_eq!(process[0].code(), 0, "{said}");
    for rank in 0..2 {
        assert!(said.contains(&format!("[rank {rank}] the clock jumps")), "{said}");
    }
    assert_nothing_lost(secs, &jumped, &straight);
}
