//! What the trainer makes of the data section: a length, coverage, sources of any layout and resolution.

use std::path::Path;

use serde_json::Value;

use crate::processes::steps;
use crate::{run, sail_train, stderr, under};

fn arguments<'a>(root: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["--config", "configs/tiny/stage1.yaml"];
    for set in [&[root, "eval=null", "schedule.steps=500", "schedule.warmup=1"], sets].concat() {
        args.extend(["--set", set]);
    }
    args
}

const ONE_SOURCE: &str = r#"data.sources=[{"name": "ocr", "shards": "data/demo/ocr-train-000001.tar"}]"#;

#[test]
fn a_stage_ends_with_its_data_and_stays_finished() {
    let (straight, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sets = [ONE_SOURCE, "data.epochs=1", "batch.tokens_per_pack=512", "checkpoint.every=null"];
    let root = under(straight.path());
    let ended = run(&arguments(&root, &sets), 0);
    let told = stderr(&ended);
    assert!(told.contains("the data ends after step"), "{told}");
    let run_dir = straight.path().join("runs/tiny/stage1");
    let last = steps(&run_dir).pop().unwrap();
    let coverage = &last["coverage"]["ocr"];
    let seen = coverage["seen"].as_u64().unwrap();
    assert!(seen > 50 && coverage["repeated"] == 0, "{coverage}");
    let samples: u64 = steps(&run_dir).iter().map(|step| step["samples"].as_u64().unwrap()).sum();
    let skipped: u64 =
        coverage["skipped"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(samples + skipped, seen, "every sample is trained on once");
    assert!(last["packing"]["fill"].as_f64().unwrap() > 0.1, "{last}");
    let summary = std::fs::read_to_string(run_dir.join("summary.json")).unwrap();
    assert!(stderr(&run(&arguments(&root, &sets), 0)).contains("already finished"));
    assert_eq!(std::fs::read_to_string(run_dir.join("summary.json")).unwrap(), summary);

    let next = ["eval=null", "schedule.steps=1", "schedule.warmup=0"].map(|set| ["--set", set]).concat();
    run(&[&["--config", "configs/tiny/stage2.yaml", "--set", &root], &next[..]].concat(), 0);
    assert!(serde_json::from_str::<Value>(&summary).unwrap()["train_loss"].is_number(), "{summary}");

    let root = under(stopped.path());
    let args = [&arguments(&root, &sets)[..], &["--stop-at", "2"]].concat();
    assert_eq!(sail_train(&args).output().unwrap().status.code(), Some(3));
    run(&arguments(&root, &sets), 0);
    let losses = |dir: &Path| steps(dir).iter().map(|step| step["loss"].to_string()).collect::<Vec<_>>();
    assert_eq!(losses(&stopped.path().join("runs/tiny/stage1")), losses(&run_dir));
}

#[test]
fn images_keep_their_aspect_ratio_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let root = under(dir.path());
    let any = r#"data.any_resolution={"min_tokens": 4, "max_tokens": 16}"#;
    run(&arguments(&root, &[any, "schedule.steps=2", "schedule.warmup=0"]), 0);
    let steps = steps(&dir.path().join("runs/tiny/stage1"));
    assert!(steps.iter().all(|step| step["packing"]["visual_tokens"].as_u64().unwrap() > 0), "{steps:?}");
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = under(dir.path());
    for (sets, part) in [
        (["data.epochs=1", "data.samples=5"], "`data.epochs`"),
        (["data.balance=off", "data.visual_tokens_per_pack=5"], "balance: off"),
        (["data.template_file=a.jinja", "data.template=chatml"], "template: jinja"),
        (["data.reencode={\"quality\": [90, 10]}", "data.max_frames=0"], "data.max_frames"),
        (["data.store.cache={\"dir\": \"x\"}", "data.mix_by=tokens"], "max_bytes"),
    ] {
        let told = stderr(&run(&arguments(&root, &sets), 2));
        assert!(told.contains(part), "{sets:?}: {told}");
    }
}
