//! `kill -9` of a reading process at any moment loses and repeats nothing.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use sail_data::{Loader, LoaderOptions, Position};
use serde::{Deserialize, Serialize};

use crate::support::{demo_spec, encoder, line, root};

const FOLDER: &str = "SAIL_TEST_READER_FOLDER";
const PACKS: usize = 160;

/// What a reading process keeps between two lives.
#[derive(Serialize, Deserialize)]
struct Saved {
    packs: usize,
    position: Position,
}

/// The reading process: this test, started by the next one.
#[test]
#[ignore = "the process that `a_killed_reader_goes_on_where_it_was` starts and kills"]
fn reader() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let folder = Path::new(&folder);
    let (lines, state) = (folder.join("lines"), folder.join("state.json"));
    let saved: Option<Saved> = fs::read(&state).ok().map(|text| serde_json::from_slice(&text).unwrap());
    let mut done = saved.as_ref().map_or(0, |saved| saved.packs);
    // Lines that were written after the state are written again. Cut off in place: rewriting the file would lose
    // lines to a kill between emptying and filling it.
    let written = fs::read_to_string(&lines).unwrap_or_default();
    let kept: usize = written.split_inclusive('\n').take(done).map(str::len).sum();
    assert!(written[..kept].lines().count() == done, "the state is ahead of the lines");
    let mut out = fs::OpenOptions::new().create(true).append(true).open(&lines).unwrap();
    out.set_len(kept as u64).unwrap();
    let spec = demo_spec(&root().join("data/demo").display().to_string(), 4);
    let options = LoaderOptions::alone(1 + std::process::id() as usize % 3);
    let position = saved.map(|saved| saved.position);
    let mut loader = Loader::new(&spec, encoder(), options, position).unwrap();
    while done < PACKS {
        writeln!(out, "{}", line(&loader.next_pack().unwrap())).unwrap();
        done += 1;
        let text = serde_json::to_vec(&Saved { packs: done, position: loader.position() }).unwrap();
        let partial = folder.join("state.partial");
        fs::write(&partial, text).unwrap();
        fs::rename(&partial, &state).unwrap();
    }
}

fn start(folder: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "kills::reader"]).env(FOLDER, folder);
    command.stdout(std::process::Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_reader_goes_on_where_it_was() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    assert!(start(whole.path()).wait().unwrap().success());
    let (mut kills, mut in_between) = (0, 0);
    let mut bits = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(std::process::id());
    while kills < 20 {
        let mut child = start(killed.path());
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_micros(20_000 + (bits >> 33) % 120_000));
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        let done = fs::read_to_string(killed.path().join("lines")).unwrap_or_default().lines().count();
        in_between += usize::from(0 < done && done < PACKS);
    }
    assert!(in_between >= 3, "only {in_between} kills fell between the first pack and the last");
    assert!(start(killed.path()).wait().unwrap().success());
    let [whole, killed] =
        [whole, killed].map(|folder| fs::read_to_string(folder.path().join("lines")).unwrap());
    assert_eq!(whole.lines().count(), PACKS);
    for (number, (expected, found)) in whole.lines().zip(killed.lines()).enumerate() {
        assert_eq!(found, expected, "pack {number} after {kills} kills");
    }
    assert_eq!(killed.lines().count(), PACKS);
}
