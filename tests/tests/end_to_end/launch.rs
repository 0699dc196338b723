//! `sail-train launch`: ranks as processes, what they print, how they end, and that none is left behind.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::processes::{children_of, free_port, parent_of, signal, until};
use crate::{run, sail_train, stderr, under, weights_file};

/// A launch of two ranks that wait for a configuration which never comes, and the ranks' process numbers.
fn waiting_ranks(dir: &Path) -> (Child, Vec<u32>) {
    let fifo = dir.join("never.yaml");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let args = ["launch", "--nproc", "2", "--", "--config", fifo.to_str().unwrap()];
    let launcher = sail_train(&args).stderr(Stdio::piped()).spawn().unwrap();
    let mut ranks = Vec::new();
    until("two ranks run", || {
        ranks = children_of(launcher.id());
        ranks.len() == 2
    });
    (launcher, ranks)
}

fn rest_of_stderr(launcher: &mut Child) -> String {
    let mut text = String::new();
    launcher.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn each_line_has_its_rank_and_goes_where_the_rank_wrote_it() {
    let alone = String::from_utf8(run(&["--help"], 0).stdout).unwrap();
    let output = run(&["launch", "--nproc", "2", "--", "--help"], 0);
    let both = String::from_utf8(output.stdout.clone()).unwrap();
    for rank in 0..2 {
        let prefix = format!("[rank {rank}] ");
        let lines: String =
            both.split_inclusive('\n').filter_map(|line| line.strip_prefix(&prefix)).collect();
        assert_eq!(lines, alone, "rank {rank}");
    }
    assert_eq!(both.lines().count(), 2 * alone.lines().count());
    let said = stderr(&output);
    assert!(said.starts_with("[launch] ranks 0 to 1 of 2, store at 127.0.0.1:"), "{said}");
    assert!(!said.contains("OMP_NUM_THREADS"), "it was set already: {said}");
}

/// One of them prints it, for as many as there are.
#[test]
fn ranks_that_are_not_to_train_print_one_page() {
    let dry_run = ["--config", "configs/tiny/stage1.yaml", "--dry-run"];
    let alone = String::from_utf8(run(&[&dry_run[..], &["--world", "2"]].concat(), 0).stdout).unwrap();
    let output = run(&[&["launch", "--nproc", "2", "--"], &dry_run[..]].concat(), 0);
    let page = String::from_utf8(output.stdout).unwrap();
    assert_eq!(page.replace("[rank 0] ", ""), alone);
}

#[test]
fn threads_are_shared_where_the_user_has_not_said_how_many() {
    let mut launch =
        sail_train(&["launch", "--nproc", "2", "--config", "configs/tiny/stage1.yaml", "--dry-run"]);
    let output = launch.env_remove("OMP_NUM_THREADS").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "arguments are taken without `--` too");
    assert!(stderr(&output).contains("OMP_NUM_THREADS="), "{}", stderr(&output));
}

#[test]
fn a_rank_that_fails_gives_its_exit_code() {
    let said = stderr(&run(&["launch", "--nproc", "2", "--", "--config", "nowhere.yaml"], 2));
    assert!(said.contains("[rank 0] error: `nowhere.yaml` cannot be read"), "{said}");
    assert!(said.contains("[rank 1] error: the configuration has faults, which the first rank"), "{said}");
    assert!(said.contains("failed first: exit code 2"), "{said}");
}

#[test]
fn numbers_that_make_no_sense_and_a_port_in_use_are_refused() {
    let taken = TcpListener::bind("0.0.0.0:0").unwrap();
    let taken = format!("localhost:{}", taken.local_addr().unwrap().port());
    let cases: [(&[&str], &str); 6] = [
        (&["--nproc", "0"], "`--nproc 0` must be from 1"),
        (&["--nproc", "2", "--nnodes", "2"], "`--nnodes 2` needs `--node-rank R`"),
        (&["--nproc", "2", "--nnodes", "2", "--node-rank", "0"], "`--nnodes 2` needs `--rdzv HOST:PORT`"),
        (&["--nproc", "2", "--node-rank", "1"], "`--node-rank 1` is not below `--nnodes 1`"),
        (&["--nproc", "2", "--rdzv", "localhost"], "`--rdzv localhost` is not HOST:PORT"),
        (&["--nproc", "2", "--rdzv", &taken], "another process may have the port"),
    ];
    for (args, expected) in cases {
        let said = stderr(&run(&[&["launch"], args, &["--", "--config", "nowhere.yaml"]].concat(), 2));
        assert!(said.contains(expected) && said.contains("hint:"), "{args:?}: {said}");
        assert!(!said.contains("[rank"), "no rank is started: {said}");
    }
}

/// Two machines, played by two launchers on this one.
#[test]
fn machines_meet_at_the_first_ones_store() {
    let rdzv = format!("127.0.0.1:{}", free_port());
    let launch = |node_rank: &str| {
        let args = ["launch", "--nproc", "2", "--nnodes", "2", "--node-rank", node_rank, "--rdzv", &rdzv];
        let ranks = ["--", "--help"];
        sail_train(&[&args[..], &ranks].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    // The second one waits for the first.
    let second = launch("1");
    sleep(Duration::from_millis(300));
    let first = launch("0");
    for (launcher, ranks) in [(first, ["[rank 0] ", "[rank 1] "]), (second, ["[rank 2] ", "[rank 3] "])] {
        let output = launcher.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(ranks.iter().all(|rank| printed.contains(rank)), "{printed}");
    }
}

#[test]
fn a_signal_reaches_every_rank() {
    let dir = tempfile::tempdir().unwrap();
    let (mut launcher, ranks) = waiting_ranks(dir.path());
    signal("TERM", launcher.id());
    let said = rest_of_stderr(&mut launcher);
    // They wait where no handler is set up yet, so that the signal ends them.
    assert_eq!(launcher.wait().unwrap().code(), Some(143), "{said}");
    assert!(said.contains("[launch] SIGTERM handed on to ranks 0, 1"), "{said}");
    assert!(said.contains("ended by SIGTERM"), "{said}");
    assert!(ranks.iter().all(|pid| parent_of(*pid).is_none()));
}

/// A rank that was interrupted saves, and the launcher's exit code says so.
#[test]
fn an_interrupted_rank_saves() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let args = ["launch", "--nproc", "1", "--", "--config", "configs/tiny/stage1.yaml"];
    let long = ["--set", &set, "--set", "schedule.steps=100000"];
    let mut launcher = sail_train(&[&args[..], &long].concat()).stderr(Stdio::null()).spawn().unwrap();
    let run = dir.path().join("runs/tiny/stage1");
    until("the run trains", || {
        assert!(launcher.try_wait().unwrap().is_none(), "the launcher ended by itself");
        fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|text| text.contains("\"train\""))
    });
    signal("INT", launcher.id());
    assert_eq!(launcher.wait().unwrap().code(), Some(3));
    assert!(weights_file(&run).exists());
}

#[test]
fn no_rank_outlives_a_killed_launcher() {
    let dir = tempfile::tempdir().unwrap();
    let (mut launcher, ranks) = waiting_ranks(dir.path());
    signal("KILL", launcher.id());
    launcher.wait().unwrap();
    until("the ranks end", || ranks.iter().all(|pid| parent_of(*pid).is_none()));
}

/// A killed rank is named, and the other one, which does not notice, is killed.
#[test]
fn a_killed_rank_ends_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let (mut launcher, ranks) = waiting_ranks(dir.path());
    signal("KILL", ranks[0]);
    let said = rest_of_stderr(&mut launcher);
    assert_eq!(launcher.wait().unwrap().code(), Some(137), "{said}");
    assert!(
        said.contains("failed first: ended by SIGKILL") && said.contains("did not end: killed"),
        "{said}"
    );
    assert!(ranks.iter().all(|pid| parent_of(*pid).is_none()));
}
