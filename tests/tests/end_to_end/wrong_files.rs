//! Wrong configuration files end the command with exit code 2, and with what is wrong where.

#[path = "../../../crates/sail-train/src/config/tests/cases.rs"]
mod cases;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{available_parallelism, scope};

use crate::{run, stderr};

/// Checks a wrong file and starts a training by it.
fn check(what: &str, text: &str, file: &Path) {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, text).unwrap();
    let file = file.to_str().unwrap();
    let [checked, started] = [&["config", "check", file][..], &["--config", file]].map(|args| run(args, 2));
    let said = stderr(&checked);
    assert!(checked.stdout.is_empty() && started.stdout.is_empty(), "{what}");
    assert_eq!(said, stderr(&started), "{what}");
    let place = format!("{file}:");
    let mut after = said.match_indices(&place).map(|(start, _)| &said[start + place.len()..]);
    let has_line = after.any(|rest| rest.starts_with(|first: char| first.is_ascii_digit()));
    assert!(has_line && said.starts_with("error: ") && !said.contains("panicked"), "{what}: {said}");
}

#[test]
fn every_wrong_file_is_refused_with_its_lines() {
    let dir = tempfile::tempdir().unwrap();
    let (files, next) = (cases::wrong_files(), AtomicUsize::new(0));
    assert!(files.len() > 90);
    let work = || {
        let mut index = next.fetch_add(1, Ordering::Relaxed);
        while let Some((what, text)) = files.get(index) {
            check(what, text, &dir.path().join(index.to_string()).join("stage.yaml"));
            index = next.fetch_add(1, Ordering::Relaxed);
        }
    };
    scope(|threads| {
        for _ in 0..available_parallelism().unwrap().get() {
            threads.spawn(work);
        }
    });
}
