//! Tests of the configuration: `faults` snapshots every kind of message, `plans` what good files resolve to.

mod faults;
mod plans;
mod schema;
mod wrong;

use std::fs;
use std::path::Path;

use super::{Config, ConfigErrors, Plan, load};

/// The shortest stage there is, with the line numbers that the snapshots name.
const STAGE: &str = r#"run: { name: demo, dir: runs/demo }
model:
  vision: { from: weights/vit, image_px: 112 }
  llm: { from: weights/llm }
train:
  vision: frozen
  projector: { lr: 1e-3 }
  llm: frozen
schedule: { steps: 60 }
batch: { tokens_per_pack: 512, packs_per_step: 8 }
data:
  streams: 2
  sources:
    - { name: caption, shards: "caption-*.tar" }
"#;

/// [`STAGE`] with pieces of text replaced.
fn edited(edits: &[(&str, &str)]) -> String {
    edits.iter().fold(STAGE.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "`{old}` is not in the stage");
        text.replace(old, new)
    })
}

/// Writes the files into a new folder and loads the first.
fn load_files(files: &[(&str, &str)], sets: &[&str]) -> Result<Config, ConfigErrors> {
    let folder = tempfile::tempdir().unwrap();
    load_in(folder.path(), files, sets)
}

fn load_in(folder: &Path, files: &[(&str, &str)], sets: &[&str]) -> Result<Config, ConfigErrors> {
    for (name, text) in files {
        fs::write(folder.join(name), text).unwrap();
    }
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    load(&folder.join(files[0].0), &sets)
}

/// The plan of one stage that must be good.
fn plan(text: &str, sets: &[&str]) -> Plan {
    match load_files(&[("stage.yaml", text)], sets) {
        Ok(Config::Stage(plan)) => *plan,
        Ok(Config::Curriculum(_)) => panic!("a curriculum"),
        Err(errors) => panic!("{errors}"),
    }
}

/// What is printed for files that must be bad; the folder they are in is left out.
fn faults_of(files: &[(&str, &str)], sets: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let errors = load_in(folder.path(), files, sets).expect_err("the files are bad");
    errors.to_string().replace(&format!("{}/", folder.path().display()), "")
}

/// The same for one edited stage.
fn faults(edits: &[(&str, &str)]) -> String {
    faults_of(&[("stage.yaml", &edited(edits))], &[])
}
