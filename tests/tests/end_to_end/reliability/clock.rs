//! The clock of the day is set forward or back by a day while a run trains: nothing comes of it.

use std::process::Command;

use super::{assert_nothing_lost, job};
use crate::root;

#[test]
fn the_clock_jumps() {
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
    let sets = ["schedule.steps=40", "parallel.strategy=zero1", "run.time_limit_secs=3000"];
    let straight = job(&sets);
    straight.run(straight.launch(2), 0);
    for secs in ["86400", "-86400"] {
        let jumped = job(&sets);
        let mut command = jumped.launch(2);
        command.env("LD_PRELOAD", &library).env("CLOCK_JUMP_SECS", secs).env("CLOCK_JUMP_AFTER_SECS", "2");
        let said = jumped.run(command, 0);
        assert!(said.contains("the clock jumps"), "{said}");
        assert_nothing_lost(secs, &jumped, &straight);
    }
}
