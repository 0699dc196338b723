//! The `sail-train` command on the demo corpus with the tiny models, as a user runs it.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod averages;
mod changes;
mod curriculum;
mod data;
mod exports;
mod faults;
mod features;
mod first_step;
mod guards;
mod help;
mod hub;
mod launch;
mod measuring;
mod metrics;
mod mistakes;
mod networks;
mod parallel;
mod processes;
mod profiling;
mod rank_faults;
mod recipes;
mod reliability;
mod resume;
mod searching;
mod shard_server;
mod stopping;
mod unlocking;
mod usage;
mod watchdog;
mod wrong_files;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository").to_owned()
}

/// `sail-train` with these arguments, started in the repository, quiet about what it skips.
fn sail_train(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sail-train-under-test"));
    // One thread: the tests run side by side, and sums are then the same whatever else runs.
    command.current_dir(root()).args(args).env("OMP_NUM_THREADS", "1").env_remove("SAIL_LOG");
    command
}

/// Runs it and expects this exit code.
fn run(args: &[&str], code: i32) -> Output {
    let output = sail_train(args).output().expect("the command starts");
    assert_eq!(
        output.status.code(),
        Some(code),
        "sail-train {args:?}\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `--set run.root=…`, which moves every run of a configuration under a folder.
fn under(dir: &Path) -> String {
    format!("run.root={}", dir.display())
}

/// The one file of tensors in the newest checkpoint of a run.
fn weights_file(run: &Path) -> PathBuf {
    let mut steps: Vec<PathBuf> = std::fs::read_dir(run)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("step-"))
        .collect();
    steps.sort();
    steps.pop().expect("the run has a checkpoint").join("rank-00000.safetensors")
}
