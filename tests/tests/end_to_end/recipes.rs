//! Every file in `configs/` is checked and planned, offline: of the models that it names there is `config.json` alone.
//!
//! `snapshots/` has what is said of each; `goldens/published` the keys of those files as they are published, in
//! `ORG--NAME.json`.

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
    insta::assert_snapshot!("pages", pages);
}
