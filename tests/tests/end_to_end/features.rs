//! Features of a frozen encoder that are kept: a stage trains with them as it does without, to the last bit, cold and
//! warm, alone and on ranks, whatever happens to the files.
//!
//! In fp32 on the CPU, where the matrix library gives a row the same bits whatever lies beside it; in bf16 a cold and a
//! warm run are alike.

use std::fs;
use std::path::{Path, PathBuf};

use sail_train::checkpoint;
use serde_json::Value;
use tempfile::TempDir;

use crate::parallel::assert_close;
use crate::processes::{Job, assert_same, signal, steps, until};
use crate::stderr;

/// Twice through 88 samples.
const DATA: &str = r#"data.sources=[{name: caption, shards: "data/demo/caption-heldout-*.tar", weight: 48},
    {name: ocr, shards: "data/demo/ocr-heldout-*.tar", weight: 40}]"#;
const TILES: &str = "data.tiling={max: 3}";
const ANY: &str = "data.any_resolution={min_tokens: 4, max_tokens: 20}";
const EVAL: &str = r#"eval={every: 6, samples: 8, generate: 2, max_new_tokens: 4,
    sources: [{name: ocr, shards: "data/demo/ocr-heldout-*.tar"}]}"#;

fn job(sets: &[&str]) -> Job {
    let mut job = Job::new(&[DATA, "data.epochs=2", "data.streams=4", "batch.packs_per_step=4"]);
    job.set(&["schedule.steps=500", "checkpoint.every=4", "parallel.timeout_secs=60"]);
    job.set(sets);
    job
}

/// Runs the job alone; what it has said.
fn alone(job: &Job) -> String {
    job.run(job.alone(), 0)
}

fn off(sets: &[&str]) -> Job {
    let job = job(sets);
    alone(&job);
    job
}

fn with_cache(dir: &Path, sets: &[&str]) -> Job {
    let mut job = job(sets);
    job.set(&[&format!("data.feature_cache={{dir: {}, max_bytes: 100000000}}", dir.display())]);
    job
}

/// Images found and computed, over all steps.
fn hits_and_misses(job: &Job) -> (u64, u64) {
    let steps = steps(&job.run_dir());
    let sum = |name| steps.iter().map(|line| line["feature_cache"][name].as_u64().unwrap()).sum();
    (sum("hits"), sum("misses"))
}

fn evaluations(job: &Job) -> Vec<Value> {
    let text = fs::read_to_string(job.run_dir().join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let evaluations = lines.filter(|line| line["kind"] == "eval");
    // When it was is no part of it.
    let without_time = |mut line: Value| {
        line.as_object_mut().unwrap().remove("time").expect("every line has it");
        line
    };
    evaluations.map(without_time).collect()
}

/// Files of a kind in the folders of a cache.
fn files(cache: &Path, extension: &str) -> Vec<PathBuf> {
    let inside = |dir: PathBuf| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let all = inside(cache.to_owned()).flat_map(inside);
    let mut files: Vec<PathBuf> = all.filter(|path| path.extension().unwrap() == extension).collect();
    files.sort();
    files
}

#[test]
fn cold_and_warm_runs_train_what_a_run_without_trains() {
    for shape in [TILES, ANY] {
        let sets = [shape, EVAL];
        let plain = off(&sets);
        let line = steps(&plain.run_dir()).pop().unwrap();
        assert!(line["feature_cache"].is_null(), "{line}");
        let dir = TempDir::new().unwrap();
        let cold = with_cache(dir.path(), &sets);
        alone(&cold);
        assert_same("cold", &cold, &plain);
        let (hits, misses) = hits_and_misses(&cold);
        // Some were seen in the evaluation before the first step.
        assert!(misses > 0 && misses < hits, "{hits} {misses}");

        let warm = with_cache(dir.path(), &sets);
        let said = alone(&warm);
        assert_same("warm", &warm, &plain);
        assert_eq!(hits_and_misses(&warm), (hits + misses, 0));
        let end = format!("features of {} images were in the cache, of 0 they were computed", hits + misses);
        assert!(said.contains(&end), "{said}");
        assert_eq!(evaluations(&cold), evaluations(&plain));
        assert_eq!(evaluations(&warm), evaluations(&plain));
        assert_eq!(files(dir.path(), "index").len(), 1, "a warm run writes nothing");
    }
}

/// How many packs' images a frozen encoder takes at once changes no number, nor does another limit after a kill, nor that the
/// encoder begins to be trained; some packs have no image.
#[test]
fn images_ahead_change_no_number() {
    const MIXED: &str = r#"data.sources=[{name: caption, shards: "data/demo/caption-heldout-*.tar", weight: 1},
        {name: text, shards: "data/demo/text-train-*.tar", weight: 1}]"#;
    let ahead = |images: usize| format!("batch.vision_images={images}");
    let unlock = "train.unfreeze=[{at: 3, match: vision, lr: 1e-4}]";
    for shape in [TILES, ANY] {
        let sets = [MIXED, shape, unlock, "data.balance=off", "schedule.steps=6"];
        let made = |images: usize| off(&[&sets[..], &[&ahead(images)]].concat());
        let one = made(1);
        assert_same("five at a time", &made(5), &one);
        assert_same("all of a step", &made(1000), &one);

        let mut resumed = job(&[&sets[..], &[&ahead(1000)]].concat());
        let mut stopped = resumed.alone();
        stopped.args(["--stop-at", "2"]);
        resumed.run(stopped, 3);
        resumed.set(&[&ahead(1)]);
        alone(&resumed);
        assert_same("with another limit", &resumed, &one);
    }
}

/// Also in a type in which the matrix library's sums depend on how many rows there are.
#[test]
fn a_second_epoch_finds_all_of_the_first() {
    let dir = TempDir::new().unwrap();
    let sets = [TILES, "run.precision=bf16"];
    let cold = with_cache(dir.path(), &sets);
    alone(&cold);
    let (hits, misses) = hits_and_misses(&cold);
    assert!(misses > 88 && misses <= hits, "{hits} {misses}");
    let warm = with_cache(dir.path(), &sets);
    alone(&warm);
    assert_same("warm", &warm, &cold);

    // Other weights, another type and other pixels find nothing of these.
    for other in ["run.seed=7", "run.precision=fp32", "data.mean=[0.5, 0.5, 0.5]"] {
        let sets = [&sets[..], &["schedule.steps=1", other]].concat();
        // An image may come twice within a run.
        let empty = TempDir::new().unwrap();
        let [found, expected] = [dir.path(), empty.path()].map(|dir| {
            let job = with_cache(dir, &sets);
            alone(&job);
            hits_and_misses(&job)
        });
        assert_eq!(found, expected, "{other}");
    }
}

#[test]
fn ranks_share_it() {
    let plain = off(&[TILES]);
    let dir = TempDir::new().unwrap();
    let run = |ranks| {
        let job = with_cache(dir.path(), &[TILES]);
        job.run(job.launch(ranks), 0);
        job
    };
    let cold = run(2);
    assert_close("two ranks, cold", &cold, &plain);
    let (hits, misses) = hits_and_misses(&cold);
    assert!(misses > 88 && misses <= hits, "what one has seen the other one finds: {hits} {misses}");
    assert_eq!(files(dir.path(), "features").len(), 2, "files of each");
    let warm = run(2);
    assert_same("two ranks, warm", &warm, &cold);
    assert_eq!(hits_and_misses(&warm), (hits + misses, 0));
    let one = with_cache(dir.path(), &[TILES]);
    alone(&one);
    assert_same("one process, warm", &one, &plain);
    assert_eq!(hits_and_misses(&one), (hits + misses, 0));
}

#[test]
fn a_run_may_be_killed_and_resume_without_it_or_with_damaged_files() {
    let plain = off(&[TILES]);
    let dir = TempDir::new().unwrap();
    let killed = with_cache(dir.path(), &[TILES]);
    let mut running = [killed.start("killed", killed.alone())];
    let has_saved = || checkpoint::newest(&killed.run_dir()).is_ok_and(|newest| newest.is_some());
    until("a checkpoint", || running[0].has_ended() || has_saved());
    signal("KILL", running[0].pid());
    while !running[0].has_ended() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let said = killed.run(killed.alone(), 0);
    assert!(said.contains("resumes after step"), "{said}");
    assert_same("killed and resumed", &killed, &plain);

    let mut switched = with_cache(dir.path(), &[TILES]);
    let mut stopped = switched.alone();
    stopped.args(["--stop-at", "3"]);
    switched.run(stopped, 3);
    switched.set(&["data.feature_cache=null"]);
    alone(&switched);
    assert_same("resumed without", &switched, &plain);

    for path in files(dir.path(), "features") {
        let mut bytes = fs::read(&path).unwrap();
        bytes[1000] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let index = files(dir.path(), "index").remove(0);
    let mut lines = fs::read(&index).unwrap();
    lines.truncate(lines.len() - 30);
    fs::write(index, lines).unwrap();
    let mended = with_cache(dir.path(), &[TILES]);
    let said = alone(&mended);
    assert!(said.contains("damaged so far are computed anew"), "{said}");
    assert_same("damaged", &mended, &plain);
    assert!(hits_and_misses(&mended).1 > 1);
    let warm = with_cache(dir.path(), &[TILES]);
    alone(&warm);
    assert_eq!(hits_and_misses(&warm).1, 0, "what was damaged is there again");
}

#[test]
fn one_that_is_full_is_read_on() {
    let plain = off(&[TILES]);
    let dir = TempDir::new().unwrap();
    let run = || {
        let mut job = with_cache(dir.path(), &[TILES]);
        job.set(&["data.feature_cache.max_bytes=1000000"]);
        let said = alone(&job);
        assert!(said.contains("`data.feature_cache.max_bytes`"), "{said}");
        assert_same("full", &job, &plain);
        let files = files(dir.path(), "features");
        let sizes = files.iter().map(|path| fs::metadata(path).unwrap().len());
        assert!(sizes.sum::<u64>() <= 1_000_000);
        hits_and_misses(&job)
    };
    let (cold, warm) = (run(), run());
    // 64 patches of 192 numbers: 20 images, once more in the first epoch.
    assert_eq!((warm.0 - cold.0, cold.1 - warm.1), (20, 20));

    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let job = with_cache(&file, &[TILES]);
    let output = job.alone().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains(file.to_str().unwrap()), "{}", stderr(&output));
}
