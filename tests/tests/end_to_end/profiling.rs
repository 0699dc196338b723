//! Where the time of steps goes: `--profile N` writes traces of whole steps and changes nothing of a training, and
//! `metrics.jsonl` has the parts of each step and how much of the devices' speed it used.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::processes::{Job, assert_same, steps};

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
    for name in parts.into_iter().chain(["aten::mm", "autograd::engine::evaluate_function: GeluBackward0"]) {
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

/// The parts of each step but the first, which is checked parameter by parameter; together they are all of it.
fn parts(job: &Job) -> Vec<BTreeMap<String, f64>> {
    let mut all = Vec::new();
    for line in steps(&job.run_dir()) {
        let secs = line["step_secs"].as_f64().unwrap();
        let parts: BTreeMap<String, f64> = serde_json::from_value(line["parts_secs"].clone()).unwrap();
        let sum: f64 = parts.values().sum();
        assert!((sum - secs).abs() < 0.02 * secs && parts.values().all(|secs| *secs >= 0.0), "{line}");
        if line["step"] != 1 {
            println!("{parts:.3?}");
            all.push(parts);
        }
    }
    all
}

fn sum(steps: &[BTreeMap<String, f64>], part: &str) -> f64 {
    steps.iter().map(|parts| parts[part]).sum()
}

/// In the step in which it was: whatever else the machine does takes time as well.
fn fastest(steps: &[BTreeMap<String, f64>], part: &str) -> f64 {
    steps.iter().map(|parts| parts[part]).fold(f64::INFINITY, f64::min)
}

/// Parts that no step had.
fn zeros(steps: &[BTreeMap<String, f64>]) -> Vec<&str> {
    steps[0].keys().map(String::as_str).filter(|part| sum(steps, part) == 0.0).collect()
}

const TEXT: &str = r#"data.sources=[{name: text, shards: "data/demo/text-train-*.tar"}]"#;

#[test]
fn the_parts_of_a_step_are_told_apart() {
    let several = ["schedule.steps=6", "batch.packs_per_step=4", "data.streams=4"];
    let trained = |sets: &[&str]| {
        let job = Job::new(&[&several, sets].concat());
        job.run(job.alone(), 0);
        parts(&job)
    };
    let frozen = trained(&["train={vision: frozen, projector: {lr: 1e-3}, llm: frozen}"]);
    assert_eq!(zeros(&frozen), ["communication"]);
    let all = trained(&[TRAINED]);
    assert_eq!(zeros(&all), ["communication"]);
    let whole: f64 = all.iter().flat_map(BTreeMap::values).sum();
    assert!(sum(&all, "other") < 0.2 * whole, "{all:?}");
    // Of a trained encoder the backward pass, which takes two thirds, counts as well.
    let share = |steps: &[BTreeMap<String, f64>]| fastest(steps, "vision") / fastest(steps, "llm");
    let vision = trained(&["train={vision: {lr: 2e-4}, projector: {lr: 1e-3}, llm: frozen}"]);
    assert!(share(&vision) > 1.5 * share(&frozen), "{vision:?}, {frozen:?}");
    let again = trained(&[TRAINED, "batch.recompute={vision: block, llm: block}"]);
    assert_eq!(zeros(&again), ["communication"]);
    let text = trained(&[TRAINED, "data.balance=off", TEXT]);
    assert_eq!(zeros(&text), ["communication", "projector", "vision"]);
    // Nothing that is trained is reached: there is no backward pass.
    let nothing = trained(&["data.balance=off", TEXT]);
    assert_eq!(zeros(&nothing), ["communication", "projector", "vision"]);
    let experts = trained(&[
        TRAINED,
        "model.llm.random={model_type: qwen3_moe, vocab_size: 2048, hidden_size: 64, intermediate_size: 96, \
         num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, num_experts: 4, \
         num_experts_per_tok: 2, moe_intermediate_size: 64}",
    ]);
    assert_eq!(zeros(&experts), ["communication"]);
}

/// Over a link that takes many times longer than computation most of a step is waiting, whichever way parameters and
/// gradients go.
#[test]
fn waiting_for_other_ranks_is_a_part_of_its_own() {
    // Slow enough that computation is little beside it on a busy machine as well.
    const BYTES_PER_SEC: f64 = 4e6;
    for strategy in ["ddp", "zero1", "zero2"] {
        let set = format!("parallel.strategy={strategy}");
        let job = Job::new(&["schedule.steps=3", TRAINED, &set]);
        let mut slow = job.launch(2);
        slow.env("SAIL_SIMULATED_LINK_BYTES_PER_SEC", BYTES_PER_SEC.to_string());
        job.run(slow, 0);
        let parts = parts(&job);
        assert_eq!(zeros(&parts), Vec::<&str>::new(), "{strategy}");
        let sent: Vec<f64> =
            steps(&job.run_dir()).iter().skip(1).map(|line| line["sent_bytes"].as_f64().unwrap()).collect();
        // Half of what is sent are parameters, which travel in the step after; after the last one there is none.
        let unseen = if strategy == "ddp" { 0.0 } else { sent[sent.len() - 1] / 2.0 };
        let on_the_way = (sent.iter().sum::<f64>() - unseen) / BYTES_PER_SEC;
        let whole: f64 = parts.iter().flat_map(BTreeMap::values).sum();
        let waiting = sum(&parts, "communication");
        assert!(whole > 0.9 * on_the_way && waiting > 0.7 * whole, "{strategy}: {parts:?}, {sent:?} bytes");
    }
}

/// Operations of each step by module.
fn flops(job: &Job) -> Vec<BTreeMap<String, u64>> {
    let lines = steps(&job.run_dir());
    lines.iter().map(|line| serde_json::from_value(line["flops"].clone()).unwrap()).collect()
}

#[test]
fn utilisation_is_operations_over_what_all_ranks_could_do() {
    let sets = ["schedule.steps=4", "batch.packs_per_step=4", "data.streams=4", "log.peak_tflops=0.05"];
    let (one, two) = (Job::new(&sets), Job::new(&sets));
    let said = one.run(one.alone(), 0);
    assert!(said.contains("tok/s mfu ") && !said.contains("no `mfu`"), "{said}");
    two.run(two.launch(2), 0);
    assert_eq!(flops(&one), flops(&two), "the packs of all ranks are those of one");
    for (job, ranks) in [(&one, 1.0), (&two, 2.0)] {
        for (line, flops) in steps(&job.run_dir()).iter().zip(flops(job)) {
            let [mfu, secs] = ["mfu", "step_secs"].map(|key| line[key].as_f64().unwrap());
            let expected = flops.values().sum::<u64>() as f64 / (secs * ranks * 0.05e12);
            assert!((mfu / expected - 1.0).abs() < 1e-9 && mfu > 0.0, "{line}");
        }
    }
}

#[test]
fn operations_follow_what_is_trained_and_a_peak_that_nobody_knows_is_told() {
    let job = Job::new(&["schedule.steps=4", "train.unfreeze=[{at: 2, match: vision, lr: 1e-4}]"]);
    let said = job.run(job.alone(), 0);
    assert!(said.contains("no `mfu`") && said.contains("`log.peak_tflops`"), "{said}");
    let lines = steps(&job.run_dir());
    assert!(lines.iter().all(|line| line["mfu"].is_null() && line.as_object().unwrap().contains_key("mfu")));
    // All images are of one size.
    let for_a_token = |line: &Value| {
        line["flops"]["vision"].as_f64().unwrap() / line["packing"]["visual_tokens"].as_f64().unwrap()
    };
    let [a, b, c, d] = [0, 1, 2, 3].map(|step| for_a_token(&lines[step]));
    assert_eq!((a.to_bits(), c.to_bits()), (b.to_bits(), d.to_bits()), "{a} {b} {c} {d}");
    assert!((2.5..3.0).contains(&(c / a)), "{a} {c}");
}
