//! `sail-train eval --tasks`: what it writes of a checkpoint and of its exported encoder, what it does not measure twice,
//! and what it refuses.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::processes::{Job, all_end};
use crate::{root, run, sail_train, stderr};

/// Images of one shape each, in a folder for each shape, from a shard of the demo corpus; how many of each.
fn shapes(shard: &str, dir: &Path) -> BTreeMap<String, usize> {
    let unpacked = dir.join("unpacked");
    fs::create_dir_all(&unpacked).unwrap();
    let shard = root().join("data/demo").join(shard);
    assert!(Command::new("tar").arg("xf").arg(shard).arg("-C").arg(&unpacked).status().unwrap().success());
    let mut counts = BTreeMap::new();
    let mut files: Vec<PathBuf> =
        fs::read_dir(&unpacked).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().unwrap() == "json") {
        let sample: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        let turns = sample["conversations"].as_array().unwrap();
        let asks = |turn: &Value| turn["value"].as_str().unwrap().contains("What shape");
        let Some(answer) = turns.iter().skip_while(|turn| !asks(turn)).nth(1) else { continue };
        let class = answer["value"].as_str().unwrap();
        let image = sample["image"].as_str().unwrap();
        fs::create_dir_all(dir.join("classes").join(class)).unwrap();
        fs::copy(unpacked.join(image), dir.join("classes").join(class).join(image)).unwrap();
        *counts.entry(class.to_owned()).or_default() += 1;
    }
    counts
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// When each file of a folder was written.
fn written(folder: &Path) -> BTreeMap<PathBuf, std::time::SystemTime> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.map(|file| (file.clone(), fs::metadata(&file).unwrap().modified().unwrap())).collect()
}

#[test]
fn a_checkpoint_and_its_encoder_are_measured_once() {
    let job = Job::new(&["schedule.steps=1", "data.tiling.max=1"]);
    job.run(job.alone(), 0);
    let dir = job.dir.path();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let checkpoint = text(&job.run_dir());
    let counts = shapes("vqa-train-000000.tar", &dir.join("train"));
    let mut tested = shapes("vqa-heldout-000000.tar", &dir.join("test"));
    // One that may not be answered there.
    let (left_out, _) = tested.pop_last().unwrap();
    fs::remove_dir_all(dir.join("test/classes").join(left_out)).unwrap();
    assert!(counts.len() > tested.len() && !tested.is_empty(), "{counts:?} {tested:?}");
    let [train, test, tasks] =
        ["train/classes", "test/classes", "tasks.yaml"].map(|name| text(&dir.join(name)));
    let recognition = format!(
        "recognition:
  - name: shapes
    train: {{ folder: {train} }}
    tests:
      - {{ name: seen, folder: {train} }}
      - {{ name: new, folder: {test}, own_classes: true }}
    knn: {{ k: 1 }}
    mlp: {{ hidden: 64, epochs: 20, batch: 16 }}
    attentive: {{ heads: 4, epochs: 20, batch: 16 }}
"
    );
    let affinity = "affinity:
  - { name: words, shards: data/demo/caption-heldout-000000.tar, images: 3, points: 20 }
";
    fs::write(&tasks, format!("{recognition}{affinity}")).unwrap();
    let out = text(&dir.join("whole"));
    let said = run(&["eval", "--tasks", &tasks, "--checkpoint", &checkpoint, "--out", &out], 0);
    let results = json(&dir.join("whole/results.json"));
    let shapes = &results["recognition"][0];
    assert_eq!(shapes["train_images"], counts.values().sum::<usize>());
    assert_eq!(shapes["classes"], counts.len());
    assert_eq!(shapes["tests"][0]["top1"]["knn"], 1.0, "each image is its own nearest neighbour");
    // It has learned something of the images it was trained on: better than any guess.
    let (classes, largest) = (counts.len() as f64, *counts.values().max().unwrap() as f64);
    let commonest = largest / counts.values().sum::<usize>() as f64;
    for probe in ["mlp", "attentive"] {
        assert!(shapes[format!("{probe}_loss")].as_f64().unwrap() < classes.ln(), "{shapes}");
        assert!(shapes["tests"][0]["top1"][probe].as_f64().unwrap() > commonest, "{shapes}");
    }
    let lines = fs::read_to_string(dir.join("whole/shapes/new.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), tested.values().sum::<usize>());
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(
            ["image", "class", "knn", "mlp", "attentive"].iter().all(|field| line[field].is_string()),
            "{line}"
        );
        for probe in ["mlp", "attentive"] {
            assert!(tested.contains_key(line[probe].as_str().unwrap()), "{line}");
        }
    }
    let words = &results["affinity"][0];
    assert_eq!((words["words"].as_i64(), words["samples"].as_array().unwrap().len()), (Some(2048), 3));
    for (side, tokens) in [("before", 3 * 64), ("after", 3 * 16)] {
        assert_eq!(words[side]["visual_tokens"], tokens);
        assert!(
            ["nearest", "wasserstein", "mean"].iter().all(|name| words[side][name].as_f64().unwrap() > 0.0)
        );
        assert!(words[side]["mean"].as_f64() > words[side]["nearest"].as_f64());
        let svg = fs::read_to_string(dir.join("whole/words").join(format!("{side}.svg"))).unwrap();
        assert!(svg.contains(&format!("{tokens} visual tokens")), "{}", &svg[..600]);
    }
    let tables = fs::read_to_string(dir.join("whole/results.md")).unwrap();
    assert!(String::from_utf8_lossy(&said.stdout).starts_with(&tables), "{tables}");
    assert!(tables.contains("| seen |") && tables.contains("| after the projector | 48 |"), "{tables}");

    // A measurement that was killed after its features: they are not computed again, and the results are the same.
    let features = written(&dir.join("whole/shapes/features"));
    fs::remove_file(dir.join("whole/shapes/result.json")).unwrap();
    fs::remove_file(dir.join("whole/results.json")).unwrap();
    run(&["eval", "--tasks", &tasks, "--checkpoint", &checkpoint, "--out", &out], 0);
    assert_eq!(json(&dir.join("whole/results.json")), results);
    assert_eq!(written(&dir.join("whole/shapes/features")), features);

    // The exported encoder alone says the same of the same images.
    let vit = text(&dir.join("vit"));
    run(&["export", "--checkpoint", &checkpoint, "--out", &vit], 0);
    let alone = text(&dir.join("alone"));
    let refused = run(&["eval", "--tasks", &tasks, "--vit", &vit, "--out", &alone], 2);
    assert!(stderr(&refused).contains("`words` needs a language model"), "{}", stderr(&refused));
    fs::write(&tasks, recognition).unwrap();
    run(&["eval", "--tasks", &tasks, "--vit", &vit, "--out", &alone], 0);
    assert_eq!(json(&dir.join("alone/results.json"))["recognition"], results["recognition"]);

    // Neither other tasks nor other weights go into a folder of results.
    let other = run(&["eval", "--tasks", &tasks, "--checkpoint", &checkpoint, "--out", &out], 2);
    assert!(stderr(&other).contains("holds results of other tasks"), "{}", stderr(&other));
    let other = run(&["eval", "--tasks", &tasks, "--checkpoint", &checkpoint, "--out", &alone], 2);
    assert!(stderr(&other).contains("holds results of other weights"), "{}", stderr(&other));
}

/// Every checkpoint, by a process that began before there was one, and by another after checkpoints are gone.
#[test]
fn checkpoints_are_measured_as_they_are_written() {
    let sets = ["schedule.steps=3", "data.tiling.max=1", "checkpoint.every=1", "checkpoint.keep_last=3"];
    let mut job = Job::new(&sets);
    let dir = job.dir.path().to_owned();
    shapes("vqa-heldout-000000.tar", &dir.join("test"));
    let images = dir.join("test/classes");
    let tasks = dir.join("tasks.yaml");
    let images = images.display();
    let probe = format!(
        "{{ name: shapes, train: {{ folder: {images} }}, tests: [{{ name: same, folder: {images} }}], knn: {{ k: 1 }} }}"
    );
    fs::write(&tasks, format!("recognition: [{probe}]\n")).unwrap();
    let (run_dir, out) = (job.run_dir(), dir.join("out"));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let [tasks, run_path, out_path] = [&tasks, &run_dir, &out].map(|path| text(path));
    let args = ["eval", "--tasks", &tasks, "--checkpoint", &run_path, "--out", &out_path, "--follow"];
    let refused = run(&args, 2);
    assert!(stderr(&refused).contains("is not a run's folder"), "{}", stderr(&refused));
    fs::create_dir_all(&run_dir).unwrap();
    let mut following = [job.start("follow", sail_train(&args))];
    job.run(job.alone(), 0);
    all_end(&mut following, Instant::now(), Duration::from_secs(180));
    assert_eq!(following[0].code(), 0, "{}", following[0].said());
    let lines = fs::read_to_string(out.join("results.jsonl")).unwrap();
    let steps: Vec<u64> = lines.lines().map(step_of).collect();
    assert_eq!(steps, [1, 2, 3], "{lines}");
    let last = json(&out.join("step-00000003/results.json"));
    let of_last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(of_last["recognition"], last["recognition"]);
    assert_eq!(last["recognition"][0]["tests"][0]["top1"]["knn"].as_f64(), Some(1.0), "{last}");
    fs::remove_dir_all(run_dir.join("step-00000001")).unwrap();
    let measured = written(&out.join("step-00000003/shapes/features"));
    run(&args, 0);
    assert_eq!(fs::read_to_string(out.join("results.jsonl")).unwrap(), lines);
    assert_eq!(written(&out.join("step-00000003/shapes/features")), measured);

    // A run that has more to do after its end.
    job.set(&["schedule.steps=4", "checkpoint.keep_last=4"]);
    let mut command = job.alone();
    command.arg("--allow-config-change");
    job.run(command, 0);
    run(&args, 0);
    let lines = fs::read_to_string(out.join("results.jsonl")).unwrap();
    assert_eq!(lines.lines().map(step_of).collect::<Vec<_>>(), [1, 2, 3, 4], "{lines}");
}

fn step_of(line: &str) -> u64 {
    serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap()
}

#[test]
fn answers_are_scored_and_none_is_asked_for_twice() {
    let job = Job::new(&["schedule.steps=1"]);
    job.run(job.alone(), 0);
    let dir = job.dir.path();
    let tasks = dir.join("tasks.yaml");
    let line =
        |i: u32| format!("{{\"key\": \"vqa-00{i}\", \"truths\": [\"yes\", \"no\", \"yes\", \"yes\"]}}\n");
    let references = (200..240).map(line).collect::<Vec<_>>().concat();
    fs::write(dir.join("references.jsonl"), references).unwrap();
    let references = dir.join("references.jsonl").display().to_string();
    let text = format!(
        "loss:
  - {{ name: images, shards: data/demo/vqa-heldout-000000.tar, samples: 8 }}
  - {{ name: text, shards: data/demo/text-heldout-000000.tar, samples: 4, tokens_per_pack: 1000 }}
generation:
  - {{ name: vqa, shards: data/demo/vqa-heldout-000000.tar, samples: 6, max_new_tokens: 4 }}
  - {{ name: many, shards: data/demo/vqa-heldout-000000.tar, samples: 2, max_new_tokens: 2, references: {references} }}
choice:
  - {{ name: ocr, shards: data/demo/vqa-heldout-000000.tar, samples: 6, choices: {} }}
",
        answers("vqa-heldout-000000.tar", dir)
    );
    fs::write(&tasks, text).unwrap();
    let (checkpoint, out) = (job.run_dir(), dir.join("out"));
    let args =
        ["eval", "--tasks", tasks.to_str().unwrap(), "--checkpoint", checkpoint.to_str().unwrap(), "--out"];
    let args = [&args[..], &[out.to_str().unwrap()]].concat();
    run(&args, 0);
    let results = json(&out.join("results.json"));
    let loss = &results["loss"][0];
    assert_eq!(loss["samples"], 8);
    let with_images = loss["images"]["true_image"].as_f64().unwrap();
    let none = loss["no_image"].as_f64().unwrap();
    assert!(none > 0.0 && (none - with_images).abs() > 1e-6, "{loss}");
    let close = |found: &Value, expected: f64| (found.as_f64().unwrap() / expected - 1.0).abs() < 1e-9;
    assert!(close(&loss["perplexity"], loss["loss"].as_f64().unwrap().exp()), "{loss}");
    assert!(results["loss"][1]["no_image"].is_null() && results["loss"][1]["images"].is_null());
    assert_eq!(
        (&results["generation"][0]["samples"], &results["generation"][1]["samples"]),
        (&6.into(), &2.into())
    );

    let lines = |path: &Path| -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for line in lines(&out.join("many/answers.jsonl")) {
        assert_eq!(line["truths"], serde_json::json!(["yes", "no", "yes", "yes"]), "those of the file");
    }

    // The choices' likelihoods are those that `score` gives the truth.
    let scores = dir.join("scores.jsonl");
    let data = "data/demo/vqa-heldout-000000.tar";
    let model = checkpoint.to_str().unwrap();
    run(&["score", "--model", model, "--data", data, "--out", scores.to_str().unwrap()], 0);
    let all = lines(&out.join("ocr/choices.jsonl"));
    assert_eq!(all.len(), 6);
    for (chosen, scored) in all.iter().zip(lines(&scores)) {
        // Each choice has its own.
        let logprobs = chosen["logprobs"].as_array().unwrap();
        let different: std::collections::BTreeSet<String> = logprobs.iter().map(Value::to_string).collect();
        assert_eq!(different.len(), logprobs.len(), "{chosen}");
        let truth = chosen["truth"].as_u64().unwrap() as usize;
        let tokens = chosen["tokens"][truth].as_u64().unwrap() as usize;
        let logprobs = scored["logprobs"].as_array().unwrap();
        let first: f64 = logprobs[..tokens].iter().map(|logprob| logprob.as_f64().unwrap()).sum();
        let found = chosen["logprobs"][truth].as_f64().unwrap();
        assert!((found - first).abs() < 1e-4, "{found} {first} {chosen}");
    }

    // Killed within a line: the samples before it are not asked again.
    let answers = out.join("vqa/answers.jsonl");
    let whole = fs::read_to_string(&answers).unwrap();
    let mut kept: Vec<String> = whole.lines().map(str::to_owned).collect();
    kept.truncate(4);
    let marked = kept[0].replacen("\"said\":\"", "\"said\":\"as it was ", 1);
    assert_ne!(marked, kept[0]);
    kept[0] = marked;
    fs::write(&answers, format!("{}\n{}", kept.join("\n"), &whole.lines().nth(4).unwrap()[..9])).unwrap();
    for file in ["vqa/result.json", "results.json", "results.md"] {
        fs::remove_file(out.join(file)).unwrap();
    }
    run(&args, 0);
    let again = fs::read_to_string(&answers).unwrap();
    assert_eq!(again.lines().take(4).collect::<Vec<_>>(), kept);
    assert_eq!(again.lines().skip(4).collect::<Vec<_>>(), whole.lines().skip(4).collect::<Vec<_>>());
    let right = all.iter().filter(|line| {
        let logprobs: Vec<f64> = serde_json::from_value(line["logprobs"].clone()).unwrap();
        let best = (0..logprobs.len()).max_by(|a, b| logprobs[*a].total_cmp(&logprobs[*b])).unwrap();
        line["truth"].as_u64() == Some(best as u64)
    });
    assert!(close(
        &serde_json::json!(results["choice"][0]["accuracy"].as_f64().unwrap() + 1.0),
        right.count() as f64 / 6.0 + 1.0
    ));

    // Other data do not go into a folder of results.
    let text = fs::read_to_string(dir.join("references.jsonl")).unwrap().replace("\"no\"", "\"perhaps\"");
    fs::write(dir.join("references.jsonl"), text).unwrap();
    let other = run(&args, 2);
    assert!(stderr(&other).contains("holds results of other data"), "{}", stderr(&other));
    let tables = fs::read_to_string(out.join("results.md")).unwrap();
    assert!(
        ["## Held-out loss", "## Generated answers", "## Multiple choice"]
            .iter()
            .all(|it| tables.contains(it))
    );
}

/// Two samples of one key shared their truths.
#[test]
fn references_know_a_sample_by_its_key_alone() {
    let job = Job::new(&["schedule.steps=1"]);
    job.run(job.alone(), 0);
    let dir = job.dir.path();
    answers("vqa-heldout-000000.tar", dir);
    let shards = ["a", "b"].map(|name| {
        let shard = dir.join(format!("{name}.tar"));
        let mut tar = Command::new("tar");
        tar.arg("cf").arg(&shard).arg("-C").arg(dir.join("all")).args(["vqa-00200.json", "vqa-00200.png"]);
        assert!(tar.status().unwrap().success());
        shard.display().to_string()
    });
    let references = dir.join("references.jsonl");
    fs::write(&references, "{\"key\": \"vqa-00200\", \"truths\": [\"yes\"]}\n").unwrap();
    let (tasks, out, checkpoint) = (dir.join("tasks.yaml"), dir.join("out"), job.run_dir());
    let text = format!(
        "generation:\n  - {{ name: twice, shards: [{}], max_new_tokens: 2, references: {} }}\n",
        shards.join(", "),
        references.display()
    );
    fs::write(&tasks, text).unwrap();
    let [tasks, out, checkpoint] = [&tasks, &out, &checkpoint].map(|path| path.to_str().unwrap());
    // Also where the first one is done already.
    for _ in 0..2 {
        let said = stderr(&run(&["eval", "--tasks", tasks, "--checkpoint", checkpoint, "--out", out], 2));
        assert!(said.contains("twice/b.tar/vqa-00200` has the key of another sample"), "{said}");
    }
    // A place for the report is looked at before anything is measured.
    let nowhere = dir.join("no/where.json");
    let said = stderr(&run(&["eval", "--checkpoint", checkpoint, "--json", nowhere.to_str().unwrap()], 2));
    assert!(said.contains("its folder does not exist"), "{said}");
}

/// The first answers of a shard, each once, as a list in YAML.
fn answers(shard: &str, dir: &Path) -> String {
    let unpacked = dir.join("all");
    fs::create_dir_all(&unpacked).unwrap();
    let shard = root().join("data/demo").join(shard);
    assert!(Command::new("tar").arg("xf").arg(shard).arg("-C").arg(&unpacked).status().unwrap().success());
    let files = fs::read_dir(&unpacked).unwrap().map(|entry| entry.unwrap().path());
    let first = |file: PathBuf| json(&file)["conversations"][1]["value"].as_str().unwrap().to_owned();
    let jsons = files.filter(|file| file.extension().unwrap() == "json");
    let all: std::collections::BTreeSet<String> = jsons.map(first).collect();
    serde_json::to_string(&all).unwrap()
}

#[test]
fn what_cannot_be_measured_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = dir.path().join("tasks.yaml");
    let name = tasks.to_str().unwrap();
    fs::write(&tasks, "recognition:\n  - name: x\n    train: { folder: a }\n    tests: []\n    knn: {}\n")
        .unwrap();
    let out = dir.path().join("out");
    let output = run(&["eval", "--tasks", name, "--vit", "nowhere", "--out", out.to_str().unwrap()], 2);
    let said = stderr(&output);
    assert!(said.contains("`recognition[0].tests`: is empty") && said.contains("tasks.yaml:4"), "{said}");
    assert!(said.contains("hint:") && !out.exists(), "{said}");
    for (args, missing) in [
        (&["--tasks", name, "--vit", "x"][..], "--out"),
        (&["--vit", "x", "--out", "y"], "--tasks"),
        (&["--tasks", name, "--out", "y"], "--checkpoint"),
    ] {
        let said = stderr(&run(&[&["eval"], args].concat(), 2));
        assert!(said.contains("required") && said.contains(missing), "{args:?}: {said}");
    }
}
