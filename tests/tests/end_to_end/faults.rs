//! Checkpoints that cannot be used, and bad data; single damages are in reliability/damage.rs.

use std::fs;

use crate::processes::complete;
use crate::{run, stderr, under};

fn stage1<'a>(set: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["--config", "configs/tiny/stage1.yaml", "--set", set];
    args.extend(["--set", "checkpoint.every=1", "--set", "checkpoint.keep_last=3"]);
    args.extend(["--set", "eval.samples=2", "--set", "eval.generate=0", "--set", "schedule.steps=5"]);
    args.extend(["--set", "schedule.warmup=1"]);
    args.extend(more);
    args
}

/// Where there were checkpoints and none can be used, nothing is trained anew over them.
#[test]
fn a_run_does_not_start_anew_beside_damaged_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    run(&stage1(&set, &["--stop-at", "1"]), 3);
    let weights = dir.path().join("runs/tiny/stage1/step-00000001/rank-00000.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::remove_file(&weights).unwrap();
    let error = stderr(&run(&stage1(&set, &[]), 2));
    assert!(error.contains("none of them verifies") && error.contains("hint:"), "{error}");
    fs::write(&weights, whole).unwrap();
    let error = stderr(&run(&stage1(&set, &["--stop-at", "2"]), 3));
    assert!(error.contains("resumes after step 1"), "{error}");
}

/// A run that resumes before its newest checkpoint leaves that course: what it saves must survive, be
/// the newest, and be what `--resume auto` finds.
#[test]
fn resuming_from_an_older_checkpoint_keeps_what_it_saves() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    run(&stage1(&set, &["--stop-at", "4"]), 3);
    let step = |n: u64| dir.path().join(format!("runs/tiny/stage1/step-{n:08}"));
    let older = step(2).to_str().unwrap().to_owned();
    let keep_one = ["--set", "checkpoint.keep_last=1"];
    run(&stage1(&set, &[&["--resume", &older, "--stop-at", "3"], &keep_one[..]].concat()), 3);
    assert!(step(3).join("COMPLETE").exists() && !step(4).exists() && !step(2).exists());
    let error = stderr(&run(&stage1(&set, &["--stop-at", "4"]), 3));
    assert!(error.contains("resumes after step 3"), "{error}");
}

/// What a kill while the summary is written leaves behind is mended by running again; a step that breaks
/// the weights is not saved.
#[test]
fn a_cut_summary_is_written_again_and_broken_weights_are_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    run(&stage1(&set, &[]), 0);
    let summary = dir.path().join("runs/tiny/stage1/summary.json");
    let whole = fs::read(&summary).unwrap();
    fs::write(&summary, &whole[..40]).unwrap();
    let error = stderr(&run(&stage1(&set, &[]), 0));
    assert!(error.contains("the end of the stage is done again"), "{error}");
    assert!(fs::read(&summary).unwrap() == whole);

    let broken = tempfile::tempdir().unwrap();
    let set = under(broken.path());
    let error = stderr(&run(&stage1(&set, &["--set", "train.projector.lr=1e38"]), 1));
    assert!(error.contains("not finite") && error.contains("hint:"), "{error}");
    assert!(complete(&broken.path().join("runs/tiny/stage1")).is_empty());
}

#[test]
fn a_stage_notices_that_its_predecessor_was_trained_anew() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let short = ["--set", "schedule.steps=2", "--set", "schedule.warmup=1", "--set", "eval.samples=2"];
    let stage = |file: &'static str| [&["--config", file, "--set", &set][..], &short].concat();
    let [first, second] = ["configs/tiny/stage1.yaml", "configs/tiny/stage2.yaml"].map(stage);
    run(&first, 0);
    run(&second, 0);
    fs::remove_dir_all(dir.path().join("runs/tiny/stage1")).unwrap();
    run(&second, 0);
    run(&[&first[..], &["--set", "train.projector.lr=2e-3"]].concat(), 0);
    let error = stderr(&run(&second, 2));
    assert!(error.contains("started from other weights") && error.contains("hint: remove"), "{error}");
}

#[test]
fn a_source_of_bad_samples_stops_the_run_and_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let shard = dir.path().join("bad-000000.tar");
    fs::write(&shard, tar_of_broken_samples(30)).unwrap();
    let set = under(dir.path());
    let source = format!("data.sources=[{{name: bad, shards: {}}}]", shard.display());
    let error = stderr(&run(&stage1(&set, &["--set", &source]), 1));
    assert!(error.contains("bad-000000.tar") && error.contains("sample-00"), "{error}");
    assert!(error.contains("source `bad`") && error.contains("max_error_rate"), "{error}");
}

/// A tar whose samples each have an annotation that is not JSON.
fn tar_of_broken_samples(n: usize) -> Vec<u8> {
    let mut tar = Vec::new();
    for i in 0..n {
        let name = format!("sample-{i:04}.json");
        let content = b"{ not json";
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        tar.extend(header);
        tar.extend(content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}
