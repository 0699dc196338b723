//! Every file in `configs/` is checked and planned, offline: of the models that it names there is `config.json` alone.
//!
//! `goldens/published` has the keys of those files as they are published, `ORG--NAME.json` for each.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{root, sail_train, stderr};

/// The demo's models, which elsewhere are folders that have to be fetched.
const DEMO: [&str; 4] = [
    "--set",
    "model.vision.from=hf:facebook/dinov2-small",
    "--set",
    "model.llm.from=hf:HuggingFaceTB/SmolLM2-135M-Instruct",
];

/// What `main` is in the cache.
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A cache that holds the published models' `config.json`.
fn cache() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(root().join("tests/goldens/published")).unwrap() {
        let config = entry.unwrap().path();
        let name = config.file_stem().unwrap().to_str().unwrap();
        let model = home.path().join(format!("hub/models--{name}"));
        let snapshot = model.join("snapshots").join(COMMIT);
        for folder in [&snapshot, &model.join("refs")] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(model.join("refs/main"), COMMIT).unwrap();
        fs::copy(&config, snapshot.join("config.json")).unwrap();
    }
    home
}

/// Standard output of a command that finds models in this cache alone.
fn printed(args: &[&str], home: &Path) -> String {
    let mut command: Command = sail_train(args);
    for unset in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        command.env_remove(unset);
    }
    let output = command.env("HF_HOME", home).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Configurations below a folder, by their paths in the repository.
fn files(folder: &str, found: &mut Vec<String>) {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = format!("{folder}/{}", path.file_name().unwrap().to_str().unwrap());
        if path.is_dir() {
            files(&name, found);
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            found.push(name);
        }
    }
}

/// Ranks for which a file is meant, and what has to be set first.
fn ranks(file: &str) -> (&str, &[&str]) {
    match file.split('/').nth(1).unwrap() {
        "tiny" => ("2", &[]),
        "demo" => ("2", &DEMO),
        "gpu-check" => ("8", &[]),
        _ => ("64", &[]),
    }
}

#[test]
fn every_recipe_is_planned() {
    let (home, mut found, mut pages) = (cache(), Vec::new(), String::new());
    files("configs", &mut found);
    for file in &found {
        let (world, sets) = ranks(file);
        let checked = printed(&[&["config", "check", file], sets].concat(), home.path());
        assert!(checked.contains("no faults"), "{checked}");
        // A curriculum has the pages of its stages.
        let stem = file.rsplit('/').next().unwrap();
        if ["stage1.yaml", "stage2.yaml", "stage3.yaml"].contains(&stem) {
            continue;
        }
        let dry_run = ["--config", file, "--dry-run", "--world", world];
        let page = printed(&[&dry_run, sets].concat(), home.path());
        assert!(!page.contains("would refuse"), "{page}");
        let told = page.lines().filter(|line| {
            line.ends_with(" for each in a step")
                || line.ends_with("FLOP") && line.starts_with("a step: ")
                || ["parameters: ", "its unlock points: ", "the stage: "]
                    .iter()
                    .any(|head| line.starts_with(head))
        });
        pages.extend(told.flat_map(|line| [line, "\n"]));
    }
    insta::assert_snapshot!(pages, @r"
    direct-cotraining: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G trained; 166 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 21.0 PFLOP
    the stage: 114,258 steps, 120G tokens, 58.5M samples, 2.40 ZFLOP, 26.4 h
    projector-and-llm: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M frozen, projector 8.66M trained, llm 1.54G trained; 117 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 15.0 PFLOP
    the stage: 98,633 steps, 103G tokens, 50.5M samples, 1.48 ZFLOP, 16.3 h
    without-stage1-stage2: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G frozen; 51 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 17.8 PFLOP
    the stage: 42,969 steps, 45.1G tokens, 22.0M samples, 764 EFLOP, 8.39 h
    without-stage1-stage3: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G trained; 166 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 21.0 PFLOP
    the stage: 71,289 steps, 74.8G tokens, 36.5M samples, 1.50 ZFLOP, 16.5 h
    without-stage2: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G trained; 166 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 21.0 PFLOP
    the stage: 98,633 steps, 103G tokens, 50.5M samples, 2.07 ZFLOP, 22.8 h
    anyres-stage1: 64 GPUs on 8 nodes of 8, bf16, 8 packs for each in a step
    parameters: vision 310M frozen, projector 8.66M trained, llm 1.54G frozen; 2 buckets
    a step: 512 packs, 4,194,304 tokens, 1,920 samples of 2,185 tokens, 72.4 PFLOP
    the stage: 4,167 steps, 17.5G tokens, 8.00M samples, 302 EFLOP, 3.31 h
    anyres-stage2: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G frozen; 51 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 36.8 PFLOP
    the stage: 27,344 steps, 28.7G tokens, 14.0M samples, 1.01 ZFLOP, 11.0 h
    anyres-stage3: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G trained; 166 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 40.0 PFLOP
    the stage: 71,289 steps, 74.8G tokens, 36.5M samples, 2.85 ZFLOP, 31.3 h
    demo-stage1: 2 GPUs on 1 node, bf16, 1 pack for each in a step
    parameters: vision 22.1M frozen, projector 1.22M trained, llm 135M frozen; 1 bucket
    a step: 2 packs, 1,024 tokens, 2 samples of 512 tokens, 796 GFLOP
    the stage: 40 steps, 40,960 tokens, 80 samples, 31.9 TFLOP, 0.0407 s
    demo-stage2: 2 GPUs on 1 node, bf16, 1 pack for each in a step
    parameters: vision 22.1M trained, projector 1.22M trained, llm 135M frozen; 5 buckets
    a step: 2 packs, 1,024 tokens, 2 samples of 512 tokens, 1.16 TFLOP
    the stage: 24 steps, 24,576 tokens, 48 samples, 27.9 TFLOP, 0.0356 s
    demo-stage3: 2 GPUs on 1 node, bf16, 1 pack for each in a step
    parameters: vision 22.1M trained, projector 1.22M trained, llm 135M trained; 21 buckets
    a step: 2 packs, 1,024 tokens, 2 samples of 512 tokens, 1.44 TFLOP
    the stage: 24 steps, 24,576 tokens, 48 samples, 34.5 TFLOP, 0.0455 s
    throughput: 8 GPUs on 1 node, bf16, 1 pack for each in a step
    parameters: vision 310M trained, projector 4.48M trained, llm 494M trained; 124 buckets
    a step: 8 packs, 32,768 tokens, 8 samples of 4,096 tokens, 398 TFLOP
    the stage: 100,000 steps, 3.28G tokens, 800,000 samples, 39.8 EFLOP, 3.51 h
    moe-stage1: 64 GPUs on 8 nodes of 8, bf16, 16 packs for each in a step
    parameters: vision 310M frozen, projector 12.6M trained, llm 30.5G frozen; 3 buckets
    a step: 1024 packs, 4,194,304 tokens, 1,920 samples of 2,185 tokens, 83.7 PFLOP
    the stage: 4,167 steps, 17.5G tokens, 8.00M samples, 349 EFLOP, 3.83 h
    moe-stage2: 64 GPUs on 8 nodes of 8, bf16, 4 packs for each in a step
    parameters: vision 310M trained, projector 12.6M trained, llm 30.5G frozen; 52 buckets
    a step: 256 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 26.9 PFLOP
    the stage: 27,344 steps, 28.7G tokens, 14.0M samples, 737 EFLOP, 8.09 h
    moe-stage3: 64 GPUs on 8 nodes of 8, bf16, 4 packs for each in a step
    parameters: vision 310M trained, projector 12.6M trained, llm 30.5G trained; 392 buckets
    a step: 256 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 33.3 PFLOP
    the stage: 71,289 steps, 74.8G tokens, 36.5M samples, 2.38 ZFLOP, 38.8 h
    sailvit-huge-stage1: 64 GPUs on 8 nodes of 8, bf16, 8 packs for each in a step
    parameters: vision 682M frozen, projector 16.8M trained, llm 1.72G frozen; 3 buckets
    a step: 512 packs, 4,194,304 tokens, 1,920 samples of 2,185 tokens, 66.5 PFLOP
    the stage: 4,167 steps, 17.5G tokens, 8.00M samples, 277 EFLOP, 3.04 h
    sailvit-huge-stage2: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 682M trained, projector 16.8M trained, llm 1.72G frozen; 124 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 29.3 PFLOP
    the stage: 27,344 steps, 28.7G tokens, 14.0M samples, 801 EFLOP, 8.79 h
    sailvit-huge-stage3: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 682M trained, projector 16.8M trained, llm 1.72G trained; 267 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 32.9 PFLOP
    the stage: 71,289 steps, 74.8G tokens, 36.5M samples, 2.35 ZFLOP, 25.8 h
    sailvit-large-stage1: 64 GPUs on 8 nodes of 8, bf16, 8 packs for each in a step
    parameters: vision 310M frozen, projector 8.66M trained, llm 1.54G frozen; 2 buckets
    a step: 512 packs, 4,194,304 tokens, 1,920 samples of 2,185 tokens, 47.0 PFLOP
    the stage: 4,167 steps, 17.5G tokens, 8.00M samples, 196 EFLOP, 2.15 h
    sailvit-large-stage2: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G frozen; 51 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 17.8 PFLOP
    the stage: 27,344 steps, 28.7G tokens, 14.0M samples, 486 EFLOP, 5.34 h
    sailvit-large-stage3: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G trained; 166 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 21.0 PFLOP
    the stage: 71,289 steps, 74.8G tokens, 36.5M samples, 1.50 ZFLOP, 16.5 h
    sailvit-large-stage3-progressive: 64 GPUs on 8 nodes of 8, bf16, 2 packs for each in a step
    parameters: vision 310M trained, projector 8.66M trained, llm 1.54G trained; 169 buckets
    a step: 128 packs, 1,048,576 tokens, 512 samples of 2,048 tokens, 21.0 PFLOP
    its unlock points: 11.8 PFLOP at first, 17.8 PFLOP after step 1,426, 21.0 PFLOP after step 7,129
    the stage: 71,289 steps, 74.8G tokens, 36.5M samples, 1.47 ZFLOP, 16.1 h
    tiny-stage1: 2 GPUs on 1 node, bf16, 1 pack for each in a step
    parameters: vision 2.78M frozen, projector 264k trained, llm 3.67M frozen; 1 bucket
    a step: 2 packs, 512 tokens, 2 samples of 256 tokens, 21.1 GFLOP
    the stage: 12 steps, 6,144 tokens, 24 samples, 253 GFLOP, 0.000386 s
    tiny-stage2: 2 GPUs on 1 node, bf16, 1 pack for each in a step
    parameters: vision 2.78M trained, projector 264k trained, llm 3.67M frozen; 3 buckets
    a step: 2 packs, 512 tokens, 2 samples of 256 tokens, 44.5 GFLOP
    the stage: 12 steps, 6,144 tokens, 24 samples, 534 GFLOP, 0.000760 s
    tiny-stage3: 2 GPUs on 1 node, bf16, 1 pack for each in a step
    parameters: vision 2.78M trained, projector 264k trained, llm 3.67M trained; 5 buckets
    a step: 2 packs, 512 tokens, 2 samples of 256 tokens, 48.2 GFLOP
    the stage: 12 steps, 6,144 tokens, 24 samples, 579 GFLOP, 0.000854 s
    ");
}
