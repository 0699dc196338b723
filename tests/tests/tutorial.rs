//! docs/tutorial.md as a reader follows it: its blocks in order, with the real programs, in an empty folder.
//!
//! A block with `<!-- file: NAME -->` in front of it is written to that file. `sh` blocks are run by bash and `python`
//! blocks by the Python that has transformers; they must end with 0, or with what `<!-- exit: N -->` says. The lines of a
//! `text` block must appear in the output of the block before it, in their order; `…` stands for anything, and numbers
//! with a decimal point, times, speeds and shares of time for any of their kind. `<!-- set-up -->` is the block that
//! says where SAIL is.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A code block of the page.
#[derive(Debug, Default, PartialEq)]
struct Block {
    /// Where it begins.
    line: usize,
    language: String,
    /// The comment in front of it.
    mark: String,
    text: String,
}

/// The code blocks of a page, in order.
fn blocks(page: &str) -> Vec<Block> {
    let (mut blocks, mut open, mut mark): (Vec<Block>, Option<Block>, String) = Default::default();
    for (index, line) in page.lines().enumerate() {
        match (&mut open, line.strip_prefix("```")) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.text.extend([line, "\n"]),
            (None, Some(language)) => {
                let language = language.to_owned();
                open = Some(Block {
                    line: index + 1,
                    language,
                    mark: std::mem::take(&mut mark),
                    text: String::new(),
                });
            }
            (None, None) => {
                let comment = line.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->"));
                comment.unwrap_or_default().clone_into(&mut mark);
            }
        }
    }
    assert!(open.is_none(), "a block is not closed: {open:?}");
    blocks
}

/// A line's words, with a sign in the place of each figure that another machine may have otherwise.
fn words(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let shape = |(index, word): (usize, &&str)| {
        let number = word.trim_start_matches(['+', 'x']).trim_end_matches([',', '%', 's']);
        let measured =
            number.contains('.') || word.ends_with(['%', 's']) || words.get(index + 1) == Some(&"tok/s");
        let varies = measured && number.parse::<f64>().is_ok();
        if varies { "#".to_owned() } else { (*word).to_owned() }
    };
    words.iter().enumerate().map(shape).collect::<Vec<_>>().join(" ")
}

/// Whether a line of output is the one that was promised.
fn keeps(promise: &str, line: &str) -> bool {
    let (promise, line) = (words(promise), words(line));
    let parts: Vec<&str> = promise.split('…').map(str::trim).collect();
    let [first, middle @ .., last] = &parts[..] else { return promise == line };
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    for part in middle {
        let Some((_, behind)) = rest.split_once(part) else { return false };
        rest = behind;
    }
    rest.ends_with(last)
}

/// The first promised line that the output does not have behind those before it.
fn missing<'a>(promises: &'a str, output: &str) -> Option<&'a str> {
    let mut lines = output.lines();
    promises.lines().find(|promise| !lines.any(|line| keeps(promise, line)))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository").to_owned()
}

/// A folder in which a page is followed.
struct Reader {
    dir: tempfile::TempDir,
    work: PathBuf,
}

impl Reader {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        symlink(env!("CARGO_BIN_EXE_sail-train-under-test"), bin.join("sail-train")).unwrap();
        symlink(env!("CARGO_BIN_EXE_sail-data-under-test"), bin.join("sail-data")).unwrap();
        let work = dir.path().to_owned();
        Self { dir, work }
    }

    /// What a block's program says; it must end as the block promises.
    fn run(&self, block: &Block) -> String {
        let code: i32 = block.mark.strip_prefix("exit: ").map_or(0, |code| code.parse().unwrap());
        let mut command = if block.language == "python" {
            let mut python = Command::new(root().join(".venv/bin/python"));
            python.args(["-c", &block.text]).env("HF_HUB_OFFLINE", "1");
            python
        } else {
            let mut bash = Command::new("bash");
            bash.args(["-eu", "-c", &format!("exec 2>&1\n{}", block.text)]);
            bash
        };
        let path = std::env::var("PATH").unwrap();
        let path = format!("{}:{path}", self.dir.path().join("bin").display());
        // One thread: other tests run beside this one.
        command.current_dir(&self.work).env("PATH", path).env("SAIL", root()).env("OMP_NUM_THREADS", "1");
        // What cargo tells tests of their package a build script of a dependency asks for as well: with other values, a build
        // on a page makes most of the workspace again, and so does the next one from a shell.
        for (name, _) in std::env::vars_os() {
            if ["CARGO_MANIFEST_", "CARGO_PKG_", "OUT_DIR"]
                .iter()
                .any(|start| name.to_string_lossy().starts_with(start))
            {
                command.env_remove(&name);
            }
        }
        let output = command.env_remove("SAIL_LOG").output().unwrap();
        let said = [&output.stdout, &output.stderr]
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
            .concat();
        assert_eq!(output.status.code(), Some(code), "line {}: {}\n{said}", block.line, block.text);
        said
    }

    /// The block that says where SAIL is, with the programs under test.
    fn set_up(&mut self, block: &Block) {
        let said_where = "export SAIL=~/sail ";
        assert!(block.text.starts_with(said_where), "line {}: {}", block.line, block.text);
        let text = block.text.replacen(said_where, ": ", 1);
        self.run(&Block { text, ..Block::default() });
        self.work = self.dir.path().join("tutorial");
    }
}

#[test]
fn the_tutorial_keeps_what_it_promises() {
    let page = fs::read_to_string(root().join("docs/tutorial.md")).unwrap();
    let (mut reader, mut said, mut promises) = (Reader::new(), String::new(), 0);
    for block in blocks(&page) {
        match (block.language.as_str(), block.mark.as_str()) {
            ("sh", "set-up") => reader.set_up(&block),
            (_, mark) if mark.starts_with("file: ") => {
                fs::write(reader.work.join(&mark["file: ".len()..]), &block.text).unwrap();
            }
            ("sh" | "python", _) => said = reader.run(&block),
            ("text", _) => {
                let missing = missing(&block.text, &said);
                assert_eq!(missing, None, "line {}: this is not in the output\n{said}", block.line);
                promises += 1;
            }
            _ => panic!("line {}: what is to be done with a block of `{}`?", block.line, block.language),
        }
    }
    // What the page is about was done, whatever it says of it.
    let there = |path: &str| reader.work.join(path).exists();
    for path in [
        "shards/train/shard-000002.tar",
        "runs/stage1/summary.json",
        "runs/stage2/summary.json",
        "runs/stage2/export/vit/model.safetensors",
        "runs/report.html",
        "eval.json",
        "vit/model.safetensors",
        "mllm/model.safetensors",
    ] {
        assert!(there(path), "there is no {path}");
    }
    assert!(promises >= 15, "only {promises} blocks of output");
}

#[test]
fn a_page_is_taken_apart() {
    let page = "text\n<!-- exit: 3 -->\n```sh\nls\n```\n\n```text\na\n```\n";
    let [ls, text] = &blocks(page)[..] else { panic!("two blocks") };
    assert_eq!(
        (ls.line, ls.language.as_str(), ls.mark.as_str(), ls.text.as_str()),
        (3, "sh", "exit: 3", "ls\n")
    );
    assert_eq!((text.mark.as_str(), text.text.as_str()), ("", "a\n"));
}

/// Figures may differ, words and counts may not.
#[test]
fn promises_that_are_not_kept_are_found() {
    let line = "connector step 4/12 loss 7.2203 lr x0.97 1039 tok/s wait 0% eta 7s";
    for (promise, kept) in [
        ("connector step 4/12 loss 1.5 lr x1.00 3 tok/s wait 20% eta 9s", true),
        ("connector step 5/12 loss 1.5 lr x1.00 3 tok/s wait 20% eta 9s", false),
        ("connector step 4/12 loss nan lr x1.00 3 tok/s wait 20% eta 9s", false),
        ("connector step 4/12 loss …", true),
        ("… lr … eta 7s", true),
        ("… lr … eta 7 min", false),
        ("connector step 4/12", false),
    ] {
        assert_eq!(keeps(promise, line), kept, "{promise}");
    }
    assert_eq!(missing("b\nc\n", "a\nb\nc\n"), None);
    assert_eq!(missing("c\nb\n", "a\nb\nc\n"), Some("b"), "in their order");
    assert_eq!(missing("540 samples\n", "539 samples\n"), Some("540 samples"));
}
