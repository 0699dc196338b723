//! The mistakes that are made first, and what is said of each: what happened, where, and what to do.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::scope;

use crate::{root, run, sail_train, stderr, under};

const STAGE: [&str; 2] = ["--config", "configs/tiny/stage1.yaml"];

/// Makes little before a parameter of 4 TB.
const HUGE: [&str; 5] = [
    "model.vision.image_px=4",
    "model.vision.random.image_size=4",
    "model.vision.random.patch_size=1",
    "model.vision.random.hidden_size=1048576",
    "model.vision.random.num_attention_heads=16",
];

/// One mistake, as a command.
struct Mistake {
    what: &'static str,
    args: Vec<String>,
    environment: Vec<(&'static str, String)>,
    code: i32,
}

/// A usual command line with values of its own.
fn training(what: &'static str, sets: &[&str]) -> Mistake {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    command(what, &STAGE.into_iter().chain(sets).collect::<Vec<_>>())
}

fn command(what: &'static str, args: &[&str]) -> Mistake {
    Mistake { what, args: args.iter().map(ToString::to_string).collect(), environment: vec![], code: 2 }
}

impl Mistake {
    fn with_code(self, code: i32) -> Self {
        Self { code, ..self }
    }

    fn with_environment(self, environment: &[(&'static str, &str)]) -> Self {
        let environment = environment.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Self { environment, ..self }
    }
}

/// A folder with what the mistakes need.
struct Bed {
    dir: tempfile::TempDir,
    /// A port that somebody listens at.
    taken: TcpListener,
}

impl Bed {
    fn new() -> Self {
        let bed =
            Self { dir: tempfile::tempdir().unwrap(), taken: TcpListener::bind(("127.0.0.1", 0)).unwrap() };
        // A run of one step, for what is done with one.
        let quick =
            ["schedule={steps: 1, warmup: 0}", "eval=null", "export=null", &under(&bed.path("trained"))];
        let args: Vec<&str> = STAGE.into_iter().chain(quick.iter().flat_map(|set| ["--set", set])).collect();
        run(&args, 0);
        bed.file("file", "no folder");
        bed.file("empty/.keep", "");
        // The first file of a run, on a disk that takes nothing.
        fs::create_dir(bed.path("full")).unwrap();
        std::os::unix::fs::symlink("/dev/full", bed.path("full/plan.yaml")).unwrap();
        bed.file("tabs.yaml", "run:\n\tname: x\n");
        bed.file(
            "older.yaml",
            "run: { name: old, dir: old }\nfreeze_vision: true\ntrain: { lr_vision: 1e-4 }\n",
        );
        bed.file("no-tar-000000.tar", "this is text, and no archive of anything at all");
        // Another model's tokenizer: it knows no tokens for images.
        let tokenizer = fs::read_to_string(root().join("configs/tiny/tokenizer.json")).unwrap();
        bed.file("tokenizer.json", &tokenizer.replace("<IMG_CONTEXT>", "<something>"));
        let image = fs::read(root().join("docs/images/sample.png")).unwrap();
        fs::write(bed.path("image.png"), image).unwrap();
        bed.file("data.json", r#"[{"id": "a", "image": "image.png", "conversations": [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A sample."}]}]"#);
        bed.file("late.jsonl", &"{\"image\": \"image.png\", \"conversations\": [{\"from\": \"human\", \"value\": \"<image>\\n<image>\\nWhat differs?\"}, {\"from\": \"gpt\", \"value\": \"A sample.\"}]}\n".repeat(30));
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn at(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    fn mistakes(&self) -> Vec<Mistake> {
        let shards = |name: &str| format!("data.sources=[{{name: mine, shards: \"{}\"}}]", self.at(name));
        let [none, file, empty] = ["none", "file", "empty"].map(|name| self.at(name));
        let [out, trained] = ["out", "trained/runs/tiny/stage1"].map(|name| self.at(name));
        let port = format!("127.0.0.1:{}", self.taken.local_addr().unwrap().port());
        let weights = format!("model.vision.from={none}");
        let folder = format!("model.llm.from={empty}");
        let tokenizer = format!("model.llm.tokenizer={}", self.at("tokenizer.json"));
        let [run_dir, full] = [&file, &self.at("full")].map(|dir| format!("run.dir={dir}"));
        let (tabs, older) = (self.at("tabs.yaml"), self.at("older.yaml"));
        let image = self.at("image.png");
        vec![
            command("no file of that name", &["--config", &none]),
            command("a folder for a file", &["--config", &empty]),
            command("tabs in YAML", &["--config", &tabs]),
            command("fields of another trainer", &["--config", &older]),
            command("a command with a typing error", &["trian", "--config", "configs/tiny/stage1.yaml"]),
            command("a value without a field", &["--config", "configs/tiny/stage1.yaml", "--set", "1e-3"]),
            training("a field with a typing error", &["train.projetor.lr=1e-3"]),
            training("missing weights", &["model.vision.random=null", &weights]),
            training("a folder without weights", &["model.llm.random=null", &folder]),
            training("no such GPU", &["run.device=cuda:77"]),
            training("another model's tokenizer", &[&tokenizer]),
            training("no shards of that name", &[&shards("no-such-{0000..0003}.tar")]),
            training("a shard that is no archive", &[&shards("no-tar-000000.tar")]).with_code(1),
            training("more marks `<image>` than images", &[&shards("late.jsonl")]).with_code(1),
            training("a pack too small for one image", &["batch.tokens_per_pack=8"]).with_code(1),
            training("a model larger than the memory", &HUGE).with_code(1),
            training("a folder of runs that is a file", &[&run_dir]),
            training("a disk without room", &[&full]).with_code(1),
            command("the stage before was not trained", &["--config", "configs/tiny/stage2.yaml"]),
            command("no checkpoint of that name", &[&STAGE[..], &["--resume", &none]].concat()),
            command(
                "a port in use",
                &[
                    &["launch", "--nproc", "1", "--nnodes", "2", "--node-rank", "0", "--rdzv", &port, "--"],
                    &STAGE[..],
                ]
                .concat(),
            ),
            command("`launch` without `--`", &["launch", "--config", "configs/tiny/stage1.yaml"]),
            command("half of a launcher's variables", &STAGE).with_environment(&[("RANK", "0")]),
            command("nothing to export", &["export", "--checkpoint", &none, "--out", &out]),
            command("an export over something", &["export", "--checkpoint", &trained, "--out", &empty]),
            command(
                "a question about no image",
                &["generate", "--checkpoint", &trained, "--image", &none, "--prompt", "What?"],
            )
            .with_code(1),
            command("an encoder that is none", &["embed", "--vit", &empty, "--image", &image, "--out", &out])
                .with_code(1),
            command("a report about nothing", &["report", &empty]),
            command("a page at a port in use", &["report", &trained, &format!("--serve={port}")]),
            command("an evaluation of nothing", &["eval", "--checkpoint", &empty]),
        ]
    }
}

/// What is said, without what differs from machine to machine.
fn said(index: usize, mistake: &Mistake, bed: &Path) -> String {
    let args: Vec<&str> = mistake.args.iter().map(String::as_str).collect();
    let mut command: Command = sail_train(&args);
    // What trains all the same, trains there.
    if args.contains(&"--config") {
        command.args(["--set", &under(&bed.join(format!("runs-{index}")))]);
    }
    command.envs(mistake.environment.iter().map(|(name, value)| (name, value)));
    let output = command.output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(mistake.code), "{}: {text}", mistake.what);
    assert!(text.contains("error: ") && !text.contains("panicked"), "{}: {text}", mistake.what);
    assert!(output.stdout.is_empty(), "{}", mistake.what);
    let dir = bed.to_str().unwrap();
    let lines = text.replace(dir, "DIR").replace(root().to_str().unwrap(), "REPOSITORY");
    // As many as this machine has.
    let lines = lines.replace(&format!("sees {} CUDA", tch::Cuda::device_count()), "sees N CUDA");
    let text = without_times(&lines);
    let shown: Vec<String> = args.iter().map(|arg| arg.replace(dir, "DIR")).collect();
    format!("## {}\n$ sail-train {}\n{text}\n", mistake.what, shown.join(" "))
}

/// Lines of the log without their time; ports and numbers of processes as one word.
fn without_times(text: &str) -> String {
    let is_time = |word: &str| word.len() > 20 && word.ends_with('Z') && word.as_bytes()[10] == b'T';
    let line = |line: &str| match line.split_once(' ') {
        Some((time, rest)) if is_time(time) => rest.trim_start().to_owned(),
        _ => line.to_owned(),
    };
    // What a run did before is not the point.
    let from = text.find("error: ").unwrap_or(0);
    text[from..].lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn first_mistakes_are_answered_with_what_to_do() {
    let bed = Bed::new();
    let port = bed.taken.local_addr().unwrap().port().to_string();
    let mistakes = bed.mistakes();
    assert!(mistakes.len() >= 25);
    let (next, answers) = (AtomicUsize::new(0), Mutex::new(vec![String::new(); mistakes.len()]));
    let work = || {
        let mut index = next.fetch_add(1, Ordering::Relaxed);
        while let Some(mistake) = mistakes.get(index) {
            let answer = said(index, mistake, bed.dir.path()).replace(&port, "PORT");
            answers.lock().unwrap_or_else(PoisonError::into_inner)[index] = answer;
            index = next.fetch_add(1, Ordering::Relaxed);
        }
    };
    scope(|threads| (0..2).for_each(|_| drop(threads.spawn(work))));
    let answers = answers.into_inner().unwrap();
    let without: Vec<&String> = answers
        .iter()
        .filter(|answer| !["hint: ", "--help", "as in `"].iter().any(|word| answer.contains(word)))
        .collect();
    assert!(without.is_empty(), "nothing says what to do: {without:#?}");
    insta::assert_snapshot!(answers.join("\n"));
}
