//! Tests of the configuration: `faults` and `senseless` snapshot every kind of message, `plans` what good files resolve
//! to, `recipes` what the experiments in `configs/` have in common.

mod cases;
mod faults;
mod plans;
mod recipes;
mod schema;
mod senseless;
mod tasks;
mod wrong;

use std::fs;
use std::path::Path;

use self::cases::{STAGE, edited};
use super::{Config, ConfigErrors, Plan, load};

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
