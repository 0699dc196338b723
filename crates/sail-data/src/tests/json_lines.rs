//! JSON lines: lines, resuming, keys, and images that are files.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::error::{BadSample, Error};
use crate::shard::{Extent, Shard};
use crate::spec::{DataSpec, Layout, StoreSpec};
use crate::store::Store;
use crate::testing::{Outcome, gradient, outcomes, outcomes_of, png, spec, text_sample};

fn good() -> String {
    text_sample("q", "a")
}

fn keys(bytes: &[u8]) -> Vec<String> {
    outcomes_of("a.b.jsonl", bytes)
        .unwrap()
        .into_iter()
        .map(|(key, outcome)| outcome.map(|_| key).unwrap())
        .collect()
}

#[test]
fn lines_are_samples_however_they_end() {
    let line = good();
    let length = line.len();
    assert_eq!(keys(format!("{line}\n{line}\n").as_bytes()), ["a@0".to_owned(), format!("a@{}", length + 1)]);
    assert_eq!(keys(format!("{line}\n{line}").as_bytes()).len(), 2, "without a last line end");
    assert_eq!(keys(format!("{line}\r\n{line}\r\n").as_bytes()).len(), 2, "as Windows writes");
    assert_eq!(keys(format!("\n \t\n{line}\n\r\n\n{line}\n\n").as_bytes()).len(), 2, "between blank lines");
    assert_eq!(keys(format!("\u{feff}{line}\n").as_bytes()), ["a@0"], "behind a byte order mark");
    assert!(keys(b"").is_empty());
    assert!(keys("\u{feff}\n\n".as_bytes()).is_empty());
}

#[test]
fn keys_are_ids_where_there_are_some() {
    let with = |id: &str| good().replacen('{', &format!("{{\"id\": {id}, "), 1);
    let long = format!("\"{}\"", "x".repeat(300));
    let lines = [
        with("\"x/1\""),
        with("17"),
        with("null"),
        with("\"\""),
        with("[1]"),
        with("1.5"),
        with(&long),
        with("\"a\\nb\""),
    ];
    let keys = keys(lines.join("\n").as_bytes());
    assert_eq!(keys[..2], ["x/1", "17"]);
    assert!(keys[2..].iter().all(|key| key.starts_with("a@")), "{keys:?}");
}

#[test]
fn a_scan_goes_on_from_any_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl").display().to_string();
    // Lines longer than what is read at once, too.
    let lines: Vec<String> = (0..40).map(|n| text_sample("q", &"a".repeat(n * n * 97))).collect();
    fs::write(&path, format!("\u{feff}\n{}", lines.join("\r\n\n"))).unwrap();
    let shard = Shard::open(&Store::new(&StoreSpec::default()).unwrap(), &path).unwrap();
    let all: Vec<Extent> = {
        let mut scanner = shard.scan(0, 0);
        std::iter::from_fn(|| scanner.next_sample().unwrap()).collect()
    };
    assert_eq!(all.len(), 40);
    let mut scanner = shard.scan(0, 0);
    for done in 0..40 {
        assert_eq!(scanner.ordinal(), done as u64);
        let mut resumed = shard.scan(scanner.offset(), scanner.ordinal());
        let rest: Vec<Extent> = std::iter::from_fn(|| resumed.next_sample().unwrap()).collect();
        assert_eq!(rest, all[done..]);
        let place = scanner.next_sample().unwrap().unwrap();
        assert_eq!(&shard.read(place).unwrap().member("json").unwrap().data[..], lines[done].as_bytes());
    }
}

#[test]
fn a_file_that_changed_under_a_reference_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl").display().to_string();
    fs::write(&path, format!("{}\n{}\n", good(), good())).unwrap();
    let open = || Shard::open(&Store::new(&StoreSpec::default()).unwrap(), &path).unwrap();
    let mut scanner = open().scan(0, 0);
    let places = [scanner.next_sample().unwrap().unwrap(), scanner.next_sample().unwrap().unwrap()];
    for changed in
        [String::new(), format!("{}x\n{}\n", good(), good()), good()[..9].to_owned(), good().repeat(5)]
    {
        fs::write(&path, &changed).unwrap();
        assert!(matches!(open().read(places[1]), Err(Error::BrokenShard { .. })), "{changed}");
    }
    let nonsense = Extent { offset: u64::MAX, bytes: u64::MAX };
    assert!(matches!(open().read(nonsense), Err(Error::BrokenShard { .. })));
}

#[test]
fn a_line_without_an_end_is_an_error_that_names_it() {
    let bytes = format!("{}\n{}", good(), " ".repeat((64 << 20) + 1));
    let error = outcomes_of("a.jsonl", bytes.as_bytes()).unwrap_err();
    assert!(matches!(error, Error::BrokenShard { .. }) && error.to_string().contains("line 2"), "{error}");
}

/// A folder with `a.jsonl`, images and traps.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["images/v", "images/empty", "images/d.png", "outside"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    for name in ["images/x.png", "images/v/10.png", "images/v/09.PNG", "outside/y.png"] {
        fs::write(at(name), png(&gradient(8, 8))).unwrap();
    }
    fs::write(at("images/v/notes.txt"), "no frame").unwrap();
    fs::write(at("images/zero.png"), "").unwrap();
    std::os::unix::fs::symlink(at("images/loop.png"), at("images/loop.png")).unwrap();
    std::os::unix::fs::symlink(at("outside/y.png"), at("images/link.png")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(at("images/pipe.png")).status().unwrap().success());
    let hole = fs::File::create(at("images/huge.png")).unwrap();
    hole.set_len(3 << 30).unwrap();
    dir
}

fn read(dir: &Path, lines: &[String], adjust: impl Fn(&mut DataSpec)) -> Vec<Outcome> {
    fs::write(dir.join("a.jsonl"), lines.join("\n")).unwrap();
    let mut spec = spec(&[&dir.join("a.jsonl").display().to_string()]);
    adjust(&mut spec);
    outcomes(&spec, 0).unwrap().into_iter().map(|(_, outcome)| outcome).collect()
}

fn line(key: &str, name: &str) -> String {
    json!({key: name, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
        .to_string()
}

#[test]
fn images_are_files_below_the_folder_and_nothing_else() {
    let dir = folder();
    let cases = [
        ("x.png", None),
        ("v/../x.png", None),
        ("link.png", None),
        ("", None),
        ("missing.png", Some("missing_file")),
        ("x.png/y.png", Some("missing_file")),
        ("d.png", Some("missing_file")),
        ("pipe.png", Some("missing_file")),
        ("loop.png", Some("missing_file")),
        ("huge.png", Some("missing_file")),
        ("zero.png", Some("bad_image")),
        ("v/notes.txt", Some("bad_image")),
        ("../outside/y.png", Some("bad_path")),
        ("/etc/hostname", Some("bad_path")),
        ("file:///etc/hostname", Some("bad_path")),
        ("https://example.org/x.png", Some("bad_path")),
        ("x.png\0", Some("bad_path")),
        ("..", Some("bad_path")),
    ];
    let long = "n".repeat(5000);
    let lines: Vec<String> =
        cases.iter().map(|(name, _)| line("image", name)).chain([line("image", &long)]).collect();
    let root = dir.path().join("images").display().to_string();
    let found = read(dir.path(), &lines, |spec| spec.sources[0].images = Some(root.clone()));
    for ((name, expected), outcome) in
        cases.into_iter().chain([("a long name", Some("missing_file"))]).zip(found)
    {
        assert_eq!(outcome.err().as_ref().map(BadSample::reason), expected, "{name:?}");
    }
    let beside = read(dir.path(), &[line("image", "images/x.png"), line("image", "x.png")], |_| {});
    assert!(beside[0].is_ok() && beside[1].is_err());
}

#[test]
fn a_folder_of_frames_is_a_video() {
    let dir = folder();
    let lines = ["images/v", "images/v/", "images/empty", "images/x.png"].map(|name| line("video", name));
    let found = read(dir.path(), &lines, |_| {});
    for outcome in &found[..2] {
        let sample = outcome.as_ref().unwrap();
        assert_eq!(
            (sample.images.len(), sample.turns[0].text.as_str()),
            (2, "Frame-1: <image>\nFrame-2: <image>\nq")
        );
    }
    assert_eq!(found[2].as_ref().unwrap_err().reason(), "bad_image");
    assert_eq!(found[3].as_ref().unwrap().images.len(), 1);
}

#[test]
fn captions_and_pages_are_lines_too() {
    let dir = folder();
    let caption = json!({"image": "images/x.png", "caption": "A cat."}).to_string();
    let found = read(dir.path(), &[caption], |spec| spec.sources[0].layout = Layout::Captions);
    assert_eq!(found[0].as_ref().unwrap().turns[1].text, "A cat.");
    let page = json!({"image": "images/x.png", "pages": [{"text": ["A", "B"]}]}).to_string();
    let found = read(dir.path(), &[page], |spec| spec.sources[0].layout = Layout::Pages);
    assert_eq!(found[0].as_ref().unwrap().turns[1].text, "A\nB");
}
