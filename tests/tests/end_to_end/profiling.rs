//! `--profile N` writes traces of whole steps, and changes nothing of a training.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::processes::{Job, assert_same};

const TRAINED: &str = "train={vision: {lr: 2e-4}, projector: {lr: 5e-4}, llm: {lr: 2e-4}}";

/// The traces of a run, and for each the names of what is in it.
fn traces(run_dir: &Path) -> Vec<(String, BTreeSet<String>)> {
    let Ok(folder) = fs::read_dir(run_dir.join("profile")) else { return Vec::new() };
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        let trace: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let events = trace["traceEvents"].as_array().expect("it is a trace");
        let names =
            events.iter().filter(|event| event["ph"] == "X").filter_map(|event| event["name"].as_str());
        (path.file_name().unwrap().to_string_lossy().into_owned(), names.map(str::to_owned).collect())
    };
    let mut traces: Vec<_> = folder.map(read).collect();
    traces.sort();
    traces
}

fn steps_in(names: &BTreeSet<String>) -> Vec<&str> {
    names.iter().filter_map(|name| name.strip_prefix("ProfilerStep#")).collect()
}

#[test]
fn a_trace_has_the_steps_and_their_parts_and_changes_no_number() {
    let sets = [TRAINED, "schedule.steps=7"];
    let (plain, profiled) = (Job::new(&sets), Job::new(&sets));
    plain.run(plain.alone(), 0);
    let mut command = profiled.alone();
    command.args(["--profile", "2"]);
    let said = profiled.run(command, 0);
    assert!(said.contains("the trace of steps 4 to 5 is in"), "{said}");
    assert_same("a profiled run", &profiled, &plain);
    let traces = traces(&profiled.run_dir());
    let [(file, names)] = &traces[..] else { panic!("one trace, got {traces:?}") };
    assert_eq!(file, "step-00000004-rank-00000.json");
    assert_eq!(steps_in(names), ["4", "5"]);
    let parts = ["data wait", "to device", "vision", "projector", "llm", "backward", "optimizer"];
    for name in parts.into_iter().chain(["aten::mm", "autograd::engine::evaluate_function: MmBackward0"]) {
        assert!(names.contains(name), "`{name}` among {names:?}");
    }
}

#[test]
fn every_rank_writes_what_there_was_when_the_run_ends_before() {
    let job = Job::new(&["schedule.steps=9"]);
    let mut stopped = job.launch(2);
    stopped.args(["--profile", "100", "--stop-at", "5"]);
    job.run(stopped, 3);
    let traces = traces(&job.run_dir());
    let files: Vec<&str> = traces.iter().map(|(file, _)| file.as_str()).collect();
    assert_eq!(files, ["step-00000004-rank-00000.json", "step-00000004-rank-00001.json"]);
    for (file, names) in &traces {
        assert_eq!(steps_in(names), ["4", "5"], "{file}");
        assert!(names.contains("communication"), "{file}: {names:?}");
    }
    // The first steps of a process are not profiled: none are left.
    let mut rest = job.launch(2);
    rest.args(["--profile", "1", "--stop-at", "7"]);
    let said = job.run(rest, 3);
    assert!(said.contains("no step was profiled: 2 were made"), "{said}");
}
