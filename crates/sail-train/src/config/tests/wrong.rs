//! One slip at a time, and what is said of it: `snapshots/` has every message.

use std::fmt::Write;
use std::panic::catch_unwind;

use super::cases::{STAGE, wrong_files};
use super::faults_of;

#[test]
fn every_slip_has_its_message() {
    let mut said = String::new();
    for (what, text) in wrong_files() {
        assert_ne!(text, STAGE, "{what}");
        let found = catch_unwind(|| faults_of(&[("stage.yaml", &text)], &[]));
        let found = found.unwrap_or_else(|_| panic!("{what}: no faults, or a panic"));
        // One slip has few consequences; what follows from a missing half of the file is cut.
        let shown: Vec<&str> = found.trim_end().lines().take(12).collect();
        let what: String = what.chars().take(100).collect();
        // Writing to a string does not fail.
        let _ = writeln!(said, "#### {}\n{}\n", what.replace('\n', "\\n"), shown.join("\n"));
    }
    insta::assert_snapshot!("messages", said);
}
