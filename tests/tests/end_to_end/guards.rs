//! Steps that would do harm are found where they are, and not made; `replay` makes them again.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use sail_train::checkpoint::Checkpoint;
use sail_train::optim::StateKind;
use serde_json::Value;

use crate::parallel::assert_close;
use crate::processes::{Job, assert_same, complete, signal, steps, until};
use crate::{run, sail_train, stderr};

/// Samples of the shard, in its order.
const SAMPLES: usize = 120;
/// Steps of a run.
const STEPS: u64 = 18;
/// A sample that is not like the others, and its step.
pub(crate) const GARBAGE: (usize, u64) = (24, 13);

/// A training of the language model on text whose samples say the same, but for those in `garbage`. A pack holds one
/// sample and a step two packs, each of its own stream: sample n is in step n / 2 + 1.
pub(crate) fn job(garbage: &[usize], sets: &[&str]) -> Job {
    let mut job = Job::new(&[
        "train={vision: frozen, projector: frozen, llm: {lr: 5e-4}}",
        "batch={tokens_per_pack: 50, packs_per_step: 2}",
        "schedule={kind: constant, warmup: 0}",
        &format!("schedule.steps={STEPS}"),
        "checkpoint={every: 5, keep_last: 9}",
        "guard={window: 6, spike_z: 4}",
        "data.shuffle_buffer=1",
        "data.pack_buffer=1",
        "parallel.timeout_secs=60",
    ]);
    let line = |n: usize| {
        let (kind, answer) = if garbage.contains(&n) {
            ("garbage", "zq 7# ~} vex @@ 19 kw% jjx ]] 0p &! uu")
        } else {
            ("easy", "one two one two one two one two one two one two one two one two")
        };
        let turns =
            serde_json::json!([{"from": "human", "value": "Count."}, {"from": "gpt", "value": answer}]);
        format!("{}\n", serde_json::json!({"id": format!("{kind}-{n}"), "conversations": turns}))
    };
    let shard = job.dir.path().join("text.jsonl");
    fs::write(&shard, (0..SAMPLES).map(line).collect::<String>()).unwrap();
    job.set(&[&format!("data.sources=[{{name: text, shards: \"{}\"}}]", shard.display())]);
    job.set(sets);
    job
}

/// The same, alone and to its end.
fn alone(garbage: &[usize], sets: &[&str]) -> Job {
    let job = job(garbage, sets);
    job.run(job.alone(), 0);
    job
}

fn stop_at(mut command: Command, step: u64) -> Command {
    command.args(["--stop-at", &step.to_string()]);
    command
}

fn trips(job: &Job) -> Vec<Value> {
    let text = fs::read_to_string(job.run_dir().join("trips.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The trips of two runs are the same, but for what names the folder that their shard is in.
fn assert_same_trips(a: &Job, b: &Job) {
    let told = |job: &Job| {
        let mut trips = trips(job);
        for stream in trips.iter_mut().flat_map(|trip| trip["position"]["streams"].as_array_mut().unwrap()) {
            assert!(stream.as_object_mut().unwrap().remove("fingerprint").is_some());
        }
        trips
    };
    assert_eq!(told(a), told(b));
}

/// Step and action of each trip.
fn trip_list(job: &Job) -> Vec<(u64, String)> {
    let of = |trip: &Value| (trip["step"].as_u64().unwrap(), trip["action"].as_str().unwrap().to_owned());
    trips(job).iter().map(of).collect()
}

fn steps_made(job: &Job) -> Vec<u64> {
    steps(&job.run_dir()).iter().map(|line| line["step"].as_u64().unwrap()).collect()
}

/// The one trip of a run is that of the garbage.
fn assert_tripped(job: &Job, action: &str) {
    assert_eq!(trip_list(job), [(GARBAGE.1, action.to_owned())]);
    let trip = &trips(job)[0];
    assert_eq!(trip["reason"]["kind"], "spike", "{trip}");
    assert!(trip["reason"]["z"].as_f64().unwrap() > 4.0, "{trip}");
    let mut samples: Vec<String> =
        serde_json::from_value::<Vec<Vec<String>>>(trip["samples"].clone()).unwrap().concat();
    samples.sort();
    let key = |sample: &String| sample.rsplit_once('/').unwrap().1.to_owned();
    let (n, _) = GARBAGE;
    assert_eq!(
        samples.iter().map(key).collect::<Vec<_>>(),
        [format!("easy-{}", n + 1), format!("garbage-{n}")]
    );
}

#[test]
fn a_spike_is_skipped() {
    let sets = ["guard.spike=skip"];
    let skipped = alone(&[GARBAGE.0], &sets);
    assert_tripped(&skipped, "skip");
    assert_eq!(steps_made(&skipped), (1..=STEPS).filter(|step| *step != GARBAGE.1).collect::<Vec<_>>());
    for strategy in ["ddp", "zero2"] {
        let two = job(&[GARBAGE.0], &[&sets[..], &[&format!("parallel.strategy={strategy}")]].concat());
        two.run(two.launch(2), 0);
        assert_tripped(&two, "skip");
        assert_close(strategy, &two, &skipped);
    }
    // What is not asked for is not done.
    let made = alone(&[GARBAGE.0], &[]);
    assert_eq!((trip_list(&made), steps_made(&made).len()), (vec![], STEPS as usize));

    // Stopped before the trip and at it, killed after it.
    let resumed = job(&[GARBAGE.0], &sets);
    resumed.run(stop_at(resumed.alone(), GARBAGE.1 - 1), 3);
    let said = resumed.run(stop_at(resumed.alone(), GARBAGE.1), 3);
    assert!(said.contains("a spike") && said.contains("skipped"), "{said}");
    let mut process = [resumed.start("killed", resumed.alone())];
    until("a step after the trip", || {
        process[0].has_ended() || steps_made(&resumed).last().is_some_and(|step| *step > GARBAGE.1)
    });
    if !process[0].has_ended() {
        signal("KILL", process[0].pid());
        until("the end", || process[0].has_ended());
    }
    resumed.run(resumed.alone(), 0);
    assert_same("stopped, stopped and killed", &resumed, &skipped);
    assert_same_trips(&resumed, &skipped);
}

#[test]
fn a_spike_sends_the_run_back() {
    let sets = ["guard.spike=rollback"];
    let back = job(&[GARBAGE.0], &sets);
    let said = back.run(back.alone(), 0);
    assert!(said.contains("back to step 10, with the data that follows"), "{said}");
    assert_tripped(&back, "rollback");
    assert_eq!(steps_made(&back), (1..=STEPS).collect::<Vec<_>>(), "each step is there once");
    // Steps 11 and 12 were made twice, and the garbage is left out.
    let seen: Vec<u64> = steps(&back.run_dir())
        .iter()
        .map(|line| line["coverage"]["text"]["seen"].as_u64().unwrap())
        .collect();
    assert_eq!(seen[seen.len() - 1] - seen[0], 2 * (STEPS + 3 - 1));
    for strategy in ["ddp", "zero1"] {
        let two = job(&[GARBAGE.0], &[&sets[..], &[&format!("parallel.strategy={strategy}")]].concat());
        two.run(two.launch(2), 0);
        assert_tripped(&two, "rollback");
        assert_close(strategy, &two, &back);
    }

    // Asked to stop while it goes back, it remembers where its data is.
    let stopped = job(&[GARBAGE.0], &sets);
    let said = stopped.run(stop_at(stopped.alone(), GARBAGE.1), 3);
    assert!(said.contains("saved at step 10 and stopped"), "{said}");
    let said = stopped.run(stop_at(stopped.alone(), 12), 3);
    assert!(said.contains("resumes after step 10"), "{said}");
    assert_tripped(&stopped, "rollback");
    stopped.run(stopped.alone(), 0);
    assert_same("stopped while it went back", &stopped, &back);
    assert_same_trips(&stopped, &back);

    // A process goes back no further than to where it began.
    let later = job(&[GARBAGE.0], &sets);
    later.run(stop_at(later.alone(), 12), 3);
    let said = later.run(later.alone(), 0);
    assert!(said.contains("back to step 12"), "{said}");
    assert_tripped(&later, "rollback");
}

/// A sample at fault within a window that is made at two learning rates: it is skipped at both, is no word against the
/// higher rate, and is recorded once, whichever way the run goes on. The windows begin after step 10.
#[test]
fn a_spike_is_skipped_at_both_rates_of_a_trial() {
    for (alpha, verdict) in [(3, "keep"), (20, "leave"), (60, "go_back")] {
        let search = format!(
            "schedule={{kind: constant, warmup: 10, steps: {STEPS}, \
             ada_lrs: {{window: 5, alpha: {alpha}, beta: 7, lambda: 0.001}}}}"
        );
        let searched = alone(&[GARBAGE.0], &[&search, "guard.spike=skip", "checkpoint.every=10"]);
        let metrics = fs::read_to_string(searched.run_dir().join("metrics.jsonl")).unwrap();
        let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let trials: Vec<Value> = lines.filter(|line| line["kind"] == "ada_lrs").collect();
        assert_eq!(trials.len(), 1, "{trials:?}");
        assert_eq!(
            (trials[0]["trial"]["verdict"].as_str(), trials[0]["from"].as_u64()),
            (Some(verdict), Some(10))
        );
        // What breaks off the last one is a step that was made at the lower rate.
        assert_eq!(trials[0]["trial"]["gain"].is_null(), verdict == "go_back", "{trials:?}");
        assert_tripped(&searched, "skip");
        assert_eq!(steps_made(&searched), (1..=STEPS).filter(|step| *step != GARBAGE.1).collect::<Vec<_>>());

        // What follows is made again as it was.
        let (dir, last) = (searched.run_dir(), STEPS.to_string());
        let checkpoint = dir.join("step-00000010");
        let args = ["replay", "--run", dir.to_str().unwrap(), "--step", &last];
        let said = run(&[&args[..], &["--checkpoint", checkpoint.to_str().unwrap()]].concat(), 0);
        let said = String::from_utf8(said.stdout).unwrap();
        let losses: Vec<f64> = said
            .split("loss ")
            .skip(1)
            .map(|rest| rest.split_whitespace().next().unwrap().parse().unwrap())
            .collect();
        let recorded = steps(&dir).pop().unwrap()["loss"].as_f64().unwrap();
        assert!((losses.iter().sum::<f64>() / 2.0 - recorded).abs() < 1e-4, "{recorded}: {said}");
    }
}

/// Half of the language model joins after this step, later than the newest checkpoint before the garbage.
const UNLOCKED: u64 = 12;

fn half_joins(lr: &str) -> [String; 2] {
    [
        "train.rules=[{match: 'llm.blocks[1]', train: frozen}]".to_owned(),
        format!("train.unfreeze=[{{at: {UNLOCKED}, match: 'llm.blocks[1]', lr: {lr}}}]"),
    ]
}

/// A snapshot is taken where parts join, so that what is put back is what is trained.
#[test]
fn a_run_goes_back_to_where_parts_joined() {
    let [rules, unfreeze] = half_joins("5e-4");
    let back_sets = [&rules, &unfreeze, "guard.spike=rollback"].map(|set| set as &str);
    let back = job(&[GARBAGE.0], &back_sets);
    let said = back.run(back.alone(), 0);
    assert!(said.contains(&format!("back to step {UNLOCKED}, with the data that follows")), "{said}");
    assert_tripped(&back, "rollback");
    assert_eq!(steps_made(&back), (1..=STEPS).collect::<Vec<_>>());

    // To go back to before the step and to leave it out are the same; the latter counts the step.
    let longer = format!("schedule.steps={}", STEPS + 1);
    let skipped = alone(&[GARBAGE.0], &[&rules, &unfreeze, "guard.spike=skip", &longer]);
    let weights = [&back, &skipped].map(Job::newest);
    let frozen = Checkpoint::open(&back.run_dir().join("step-00000010")).unwrap();
    let mut joined = 0;
    for name in weights[0].names() {
        for kind in StateKind::ALL {
            let [found, expected] = [&weights[0], &weights[1]].map(|weights| weights.tensor(name, kind));
            assert_eq!(found.ok(), expected.ok(), "{kind:?} of `{name}`");
        }
        if name.starts_with("llm.model.layers.1.") {
            joined += 1;
            assert!(frozen.tensor(name, StateKind::ExpAvg).is_err(), "`{name}`");
            assert!(weights[0].tensor(name, StateKind::ExpAvg).is_ok(), "`{name}`");
        }
    }
    assert!(joined > 5);

    for strategy in ["ddp", "zero2"] {
        let two = job(&[GARBAGE.0], &[&back_sets[..], &[&format!("parallel.strategy={strategy}")]].concat());
        two.run(two.launch(2), 0);
        assert_tripped(&two, "rollback");
        assert_close(strategy, &two, &back);
    }

    // What is saved there is trained on with the part that joined.
    let stopped = job(&[GARBAGE.0], &back_sets);
    let said = stopped.run(stop_at(stopped.alone(), GARBAGE.1), 3);
    assert!(said.contains(&format!("saved at step {UNLOCKED} and stopped")), "{said}");
    stopped.run(stopped.alone(), 0);
    assert_same("stopped while it went back", &stopped, &back);
    assert_same_trips(&stopped, &back);
}

/// A part that breaks the weights when it joins does so again after the run went back to there.
#[test]
fn a_part_that_breaks_the_weights_ends_the_run() {
    let [rules, unfreeze] = half_joins("1e30");
    let job = job(&[], &[&rules, &unfreeze, "guard.not_finite=rollback"]);
    let said = job.run(job.alone(), 1);
    assert!(said.contains("not finite") && said.contains("hint:"), "{said}");
    let step = UNLOCKED + 2;
    let actions = ["rollback", "rollback", "rollback", "stop"].map(|action| (step, action.to_owned()));
    assert_eq!(trip_list(&job), actions);
    assert_eq!(complete(&job.run_dir()).last().map(String::as_str), Some("step-00000010"));
}

#[test]
fn a_spike_ends_the_run_before_it_does_harm() {
    let mut stopped = job(&[GARBAGE.0], &["guard.spike=stop"]);
    for _ in 0..2 {
        // The same command comes to the same end.
        let said = stopped.run(stopped.alone(), 1);
        for part in ["step 13: loss", "a spike", "garbage-24", "sail-train replay --run", "hint:"] {
            assert!(said.contains(part), "`{part}` in {said}");
        }
        assert_tripped(&stopped, "stop");
        assert_eq!(stopped.newest().state().step, GARBAGE.1 - 1);
    }
    let before = job(&[GARBAGE.0], &["guard.spike=stop"]);
    before.run(stop_at(before.alone(), GARBAGE.1 - 1), 3);
    assert_same("as before the step", &stopped, &before);

    let two = job(&[GARBAGE.0], &["guard.spike=stop", "parallel.strategy=zero1"]);
    let said = two.run(two.launch(2), 1);
    assert!(said.contains("garbage-24"), "{said}");
    assert_tripped(&two, "stop");
    assert_close("stopped", &two, &before);

    stopped.set(&["guard.spike=skip"]);
    stopped.run(stopped.alone(), 0);
    let skipped = alone(&[GARBAGE.0], &["guard.spike=skip"]);
    assert_same("gone on with by skipping", &stopped, &skipped);
    assert_same_trips(&stopped, &skipped);
}

#[test]
fn a_spike_too_many_ends_the_run() {
    let sets = ["guard.spike=skip", "guard.max_trips=1"];
    let mut many = job(&[GARBAGE.0, GARBAGE.0 + 5], &sets);
    let said = many.run(many.alone(), 1);
    assert!(said.contains("garbage-29") && said.contains("guard.max_trips"), "{said}");
    assert_eq!(trip_list(&many), [(13, "skip".to_owned()), (15, "stop".to_owned())]);
    assert_eq!(many.newest().state().step, 14);
    many.set(&["guard.max_trips=2"]);
    many.run(many.alone(), 0);
    assert_eq!(trip_list(&many), [(13, "skip".to_owned()), (15, "skip".to_owned())]);
}

/// Updates that break the weights: whatever the guard is told to do, the run ends and nothing broken is saved.
#[test]
fn what_is_not_finite_ends_in_an_error_and_no_checkpoint() {
    let sets = ["train.llm.lr=1e30", "checkpoint.every=null"];
    for (action, ranks, expected) in [("stop", 1, 1), ("skip", 1, 4), ("rollback", 1, 4), ("rollback", 2, 4)]
    {
        let job = job(&[], &[&sets[..], &[&format!("guard.not_finite={action}")]].concat());
        let said = job.run(if ranks == 1 { job.alone() } else { job.launch(ranks) }, 1);
        assert!(said.contains("step 2: loss") && said.contains("not finite"), "{said}");
        assert!(said.contains("hint:") && said.contains("train.*.lr"), "{said}");
        assert!(!said.contains("panicked") && !said.contains("internal"), "{said}");
        let list = trip_list(&job);
        assert_eq!(list.len(), expected, "{action}: {list:?}");
        assert!(list[..expected - 1].iter().all(|(_, found)| found == action), "{action}: {list:?}");
        assert_eq!(list[expected - 1].1, "stop");
        assert_eq!(complete(&job.run_dir()), Vec::<String>::new(), "{action}");
    }
    // With checkpoints on the way.
    for action in ["skip", "rollback"] {
        let sets = ["train.llm.lr=1e30", "checkpoint.every=1", &format!("guard.not_finite={action}")];
        let job = job(&[], &sets);
        let said = job.run(job.alone(), 1);
        assert!(said.contains("not finite") && said.contains("hint:"), "{said}");
        assert_eq!(complete(&job.run_dir()), Vec::<String>::new(), "{action}");
    }
}

/// Every file below a folder with its size and time.
fn files(dir: &Path) -> Vec<(String, u64, SystemTime)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let data = fs::metadata(&path).unwrap();
        found.push((path.display().to_string(), data.len(), data.modified().unwrap()));
        if data.is_dir() {
            found.extend(files(&path));
        }
    }
    found.sort();
    found
}

/// What `replay` says of a step, and that it writes nothing.
fn replay(job: &Job, step: u64, more: &[&str]) -> String {
    let (dir, step) = (job.run_dir().display().to_string(), step.to_string());
    let before = files(&job.run_dir());
    let output = sail_train(&[&["replay", "--run", &dir, "--step", &step], more].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(files(&job.run_dir()), before, "nothing is written");
    String::from_utf8(output.stdout).unwrap()
}

/// The losses and samples of the packs that `replay` lists.
fn packs(said: &str) -> Vec<(f64, String)> {
    let lines: Vec<&str> = said.lines().collect();
    let of = |at: usize| {
        let loss = lines[at].split_once(" loss ")?.1.split_whitespace().next()?.parse().ok()?;
        Some((loss, lines[at + 1].trim().strip_prefix("samples: ")?.to_owned()))
    };
    (0..lines.len().saturating_sub(1)).filter_map(of).collect()
}

fn assert_shows_garbage(what: &str, said: &str) {
    assert!(said.contains("its samples are those of `trips.jsonl`"), "{what}: {said}");
    let mut packs = packs(said);
    packs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let [(easy_loss, easy), (loss, garbage)] = &packs[..] else { panic!("{what}: two packs: {said}") };
    assert!(easy.ends_with("easy-25") && garbage.ends_with("garbage-24"), "{what}: {said}");
    assert!(*loss > 3.0 * easy_loss, "{what}: {said}");
    assert!(said.contains("gradient norm llm "), "{what}: {said}");
}

#[test]
fn a_step_is_made_again() {
    let skipped = alone(&[GARBAGE.0], &["guard.spike=skip"]);
    assert_shows_garbage("skip", &replay(&skipped, GARBAGE.1, &[]));
    // The losses of the packs of a step that was made are that of the step.
    let said = replay(&skipped, 15, &[]);
    let found = packs(&said);
    let recorded = steps(&skipped.run_dir())[13]["loss"].as_f64().unwrap();
    let mean = found.iter().map(|pack| pack.0).sum::<f64>() / 2.0;
    assert!(!said.contains("trips.jsonl") && (mean - recorded).abs() < 2e-4, "{recorded}: {said}");

    let stopped = job(&[GARBAGE.0], &["guard.spike=stop"]);
    stopped.run(stopped.alone(), 1);
    assert_shows_garbage("stop", &replay(&stopped, GARBAGE.1, &[]));

    let back = alone(&[GARBAGE.0], &["guard.spike=rollback", "checkpoint.every=2"]);
    assert_shows_garbage("rollback", &replay(&back, GARBAGE.1, &[]));
    // Those of steps 10 and 12 are of the course after it went back: before the step, and not before the trip.
    let left = job(&[GARBAGE.0], &["guard.spike=rollback"]);
    left.run(stop_at(left.alone(), GARBAGE.1), 3);
    left.run(stop_at(left.alone(), 12), 3);
    assert_eq!(complete(&left.run_dir()), ["step-00000005", "step-00000010", "step-00000012"]);
    assert_shows_garbage("the course that was left", &replay(&left, GARBAGE.1, &[]));
    let two = job(&[GARBAGE.0], &["guard.spike=rollback", "parallel.strategy=zero2"]);
    two.run(two.launch(2), 0);
    assert_shows_garbage("two ranks", &replay(&two, GARBAGE.1, &[]));

    let dir = back.run_dir().display().to_string();
    let refused = |args: &[&str], expected: &str| {
        let error = stderr(&run(&[&["replay", "--run", &dir], args].concat(), 2));
        assert!(error.contains(expected) && error.contains("hint:"), "{args:?}: {error}");
    };
    refused(&["--step", "2"], "has no checkpoint before step 2");
    let old = back.run_dir().join("step-00000012").display().to_string();
    refused(&["--step", "12", "--checkpoint", &old], "which is not before step 12");
    let older = back.run_dir().join("step-00000010").display().to_string();
    refused(&["--step", "16", "--checkpoint", &older], "the run went back or ended at step 13");
    refused(&["--step", "3", "--checkpoint", "nowhere"], "nowhere");
}
