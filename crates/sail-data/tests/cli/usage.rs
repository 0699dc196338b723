//! Help and mistakes in the arguments.

use std::process::Command;

use crate::support::{Folder, demo, run, sail_data, succeed};

#[test]
fn help_has_examples() {
    for command in ["", "pack", "index", "check", "stats", "inspect", "rebalance"] {
        let args: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let help = succeed(&args);
        assert!(help.contains("Example"), "{help}");
        let name = if command.is_empty() { "help" } else { command };
        insta::assert_snapshot!(name, help);
    }
}

/// Eight digits of the commit that is checked out where this is compiled, or that there is none.
#[test]
fn the_version_names_the_commit() {
    let said = succeed(&["--version"]);
    let commit = said.strip_prefix(concat!("sail-data ", env!("CARGO_PKG_VERSION"), " ("));
    let commit = commit.and_then(|rest| rest.strip_suffix(")\n")).expect(&said);
    let digits = commit.strip_suffix("-dirty").unwrap_or(commit);
    let known = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let in_git =
        Command::new("git").args(["rev-parse", "HEAD"]).output().is_ok_and(|git| git.status.success());
    assert!(if in_git { known } else { commit == "built outside of git" }, "{said}");
}

#[test]
fn mistakes_exit_with_2_and_say_what_to_do() {
    let folder = Folder::new();
    let spec = folder.write("spec.yaml", "tokenizer: t\ndata: {}\n");
    let tokenizer = folder.tokenizer();
    let shard = demo("text-heldout-000000.tar");
    let json = folder.samples("a.json", 2);
    let out = folder.at("out");
    let cases: &[(&[&str], &str)] = &[
        (&["check"], "SHARD"),
        (&["check", "no-such-*.tar"], "matches no file"),
        (&["check", &shard, "--template", "chatml"], "--tokenizer"),
        (&["check", &shard, "--tokenizer", "no.json"], "no.json"),
        (&["check", &shard, "--spec", &spec, "--image-px", "8"], "cannot be used with"),
        (&["check", "--spec", &spec], "hint: it has the keys `tokenizer` and `data`"),
        (&["check", "--spec", &spec, "--layout", "pages"], "SHARD"),
        (&["check", &shard, "--layout", "poems"], "unknown variant `poems`"),
        (&["check", &shard, "--image-px", "0"], "`image.tile_px` is 0"),
        (&["check", &shard, "--tokenizer", &tokenizer, "--image-tokens", "a,b"], "has 2 names"),
        (
            &["check", &shard, "--tokenizer", &tokenizer, "--image-tokens", "<a>,<b>,<c>"],
            "hint: name tokens that it has",
        ),
        (&["inspect", &shard, "--tiles"], "hint: `--html FILE`"),
        (&["inspect", &shard, "--nth", "1", "--key", "a"], "cannot be used with"),
        (&["pack", &json], "--out"),
        (&["pack", &json, "--out", &out, "--prefix", "a/b"], "letters, digits"),
        (&["pack", &json, "--out", &out, "--bytes-per-shard", "1 mile"], "MiB"),
        (&["pack", &json, "--out", &out, "--layout", "captions"], "hint: `--layout` says"),
        (&["index", "s3://bucket/a.tar"], "is not a local file"),
        (&["rebalance", &shard], "--out"),
        (&["rebalance", "--out", &out], "SHARD"),
        (&["rebalance", &shard, "--out", &out, "--spec", &spec], "cannot be used with"),
        (&["rebalance", &shard, "--out", &out, "--source", "a"], "cannot be used with"),
        (&["rebalance", &shard, "--out", &out, "--n", "0"], "0 is not in 1..=64"),
        (&["rebalance", &shard, "--out", &out, "--threshold", "0"], "above 0 and at most 1"),
        (&["rebalance", &shard, "--out", &out, "--memory", "0"], "it is out of range"),
        (&["rebalance", &shard, "--out", &out, "--memory", "15"], "expected at least 16 bytes"),
        (
            &["rebalance", &shard, "--out", &out, "--threshold", "0.1", "--memory", "16"],
            "hint: `--memory 1MiB` is enough",
        ),
        (&["rebalance", &shard, "--out", &out, "--threshold", "1e-4"], "hint: give a higher `--threshold`"),
    ];
    for (args, part) in cases {
        let (code, stdout, stderr) = run(args);
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(part), "{args:?}: {stderr}");
        assert_eq!(stdout, "", "{args:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = sail_data()
        .args(["stats", &demo("*.tar")])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn a_full_disk_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = sail_data().args(["stats", &demo("text-*.tar")]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.starts_with("error: cannot write `standard output`: "), "{stderr}");
}
