//! What is exported is used: by `sail-train` itself, and by transformers with the Python code that goes along.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{root, run, under};

/// Five held-out images of the demo corpus.
fn images(dir: &Path) -> Vec<String> {
    let shard = root().join("data/demo/caption-heldout-000000.tar");
    let unpacked = Command::new("tar").arg("xf").arg(shard).arg("-C").arg(dir).status().unwrap();
    assert!(unpacked.success());
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut images: Vec<String> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "png"))
        .map(|path| path.to_str().unwrap().to_owned())
        .collect();
    images.sort();
    images.truncate(5);
    assert_eq!(images.len(), 5);
    images
}

pub(crate) fn python(script: &str, args: &[&str]) {
    let output = Command::new(root().join(".venv/bin/python"))
        .arg(root().join(script))
        .args(args)
        .output()
        .expect("scripts/setup.sh --reference has made .venv");
    assert!(
        output.status.success(),
        "{script} {args:?}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Greedy answers of `sail-train generate` to one question about each image.
fn answers(model: &str, images: &[String], tokens: &str) -> serde_json::Value {
    let answer = |image: &String| {
        let args = ["generate", "--checkpoint", model, "--image", image, "--prompt", "Describe the image."];
        let output = run(&[&args[..], &["--max-new-tokens", tokens, "--json"]].concat(), 0);
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        serde_json::json!({ "image": image, "ids": answer["ids"] })
    };
    images.iter().map(answer).collect()
}

/// The exported model gives transformers the ids that it gives `sail-train`, before and after.
fn mllm_answers_alike(checkpoint: &str, layout: &str, dir: &Path, tokens: &str) {
    let images = images(dir);
    let [mllm, expected] = ["mllm", "expected.json"].map(|name| dir.join(name).to_str().unwrap().to_owned());
    run(&["export", "--checkpoint", checkpoint, "--what", "mllm", "--layout", layout, "--out", &mllm], 0);
    let from_checkpoint = answers(checkpoint, &images, tokens);
    assert_eq!(answers(&mllm, &images, tokens), from_checkpoint);
    std::fs::write(&expected, from_checkpoint.to_string()).unwrap();
    let args = ["--prompt", "Describe the image.", "--tokens", tokens, "--expect", &expected, "--image"];
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    python("scripts/check_mllm_export.py", &[&[mllm.as_str()], &args[..], &images[..]].concat());
}

#[test]
fn what_is_exported_answers_and_scores_as_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    run(
        &[
            "--config",
            "configs/tiny/stage1.yaml",
            "--set",
            &set,
            "--set",
            "schedule.steps=2",
            "--set",
            "eval=null",
        ],
        0,
    );
    let checkpoint = dir.path().join("runs/tiny/stage1");
    let checkpoint = checkpoint.to_str().unwrap();
    mllm_answers_alike(checkpoint, "sail", dir.path(), "12");

    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let score = |model: &str, out: &str| {
        run(&["score", "--model", model, "--data", "data/demo/{vqa,text}-heldout-*.tar", "--out", out], 0);
        std::fs::read_to_string(out).unwrap()
    };
    let (before, after) = (score(checkpoint, &at("a.jsonl")), score(&at("mllm"), &at("b.jsonl")));
    assert_eq!(before, after);
    let line: serde_json::Value = serde_json::from_str(before.lines().next().unwrap()).unwrap();
    let sum: f64 = line["logprobs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).sum();
    assert!((sum - line["sum"].as_f64().unwrap()).abs() < 1e-9 && sum < 0.0);

    // The encoder in SAIL's layout gives the features of the one in transformers' layout.
    let [ours, sail] = ["transformers", "sail"].map(|layout| {
        run(&["export", "--checkpoint", checkpoint, "--layout", layout, "--out", &at(layout)], 0);
        let out = at(&format!("{layout}.safetensors"));
        run(&["embed", "--vit", &at(layout), "--image", "docs/images/sample.png", "--out", &out], 0);
        std::fs::read(out).unwrap()
    });
    assert!(ours == sail, "the same features");
}

/// `InternViT` and Qwen2 leave as transformers' own class.
#[test]
fn an_internvl_answers_alike_in_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let vision = "model.vision.random={model_type: internvl_vision, hidden_size: 64, num_attention_heads: 2, \
                  intermediate_size: 96, num_hidden_layers: 2, image_size: 56, attention_bias: true}";
    let llm = "model.llm.random={model_type: qwen2, vocab_size: 2048, hidden_size: 64, num_attention_heads: 4, \
               num_key_value_heads: 2, intermediate_size: 96, num_hidden_layers: 2, initializer_range: 0.2}";
    let args = ["--config", "configs/tiny/stage1.yaml", "--set", &set, "--set", vision, "--set", llm];
    let sets =
        ["schedule.steps=2", "eval=null", "data.system=Be brief.", "data.tiling={ max: 2, thumbnail: true }"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    run(&[&args[..], &sets].concat(), 0);
    let checkpoint = dir.path().join("runs/tiny/stage1");
    mllm_answers_alike(checkpoint.to_str().unwrap(), "transformers", dir.path(), "12");

    // Its processor always adds a thumbnail.
    let whole = ["--set", "data.tiling.thumbnail=false", "--set", "run.dir=bare"];
    run(&[&args[..], &sets, &whole].concat(), 0);
    let [bare, out] = ["bare", "out"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    let error = run(&["export", "--checkpoint", &bare, "--what", "mllm", "--out", &out], 2);
    assert!(crate::stderr(&error).contains("no tiling without a thumbnail"), "{}", crate::stderr(&error));
}

/// A table of 16 x 16 positions, used and written as 8 x 8: it must be resampled before it is rounded.
#[test]
fn a_resampled_position_table_survives_bf16() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let vision = "model.vision.random={model_type: dinov2, hidden_size: 64, num_attention_heads: 2, \
                  num_hidden_layers: 2, image_size: 224, initializer_range: 0.3}";
    let args = ["--config", "configs/tiny/stage1.yaml", "--set", &set, "--set", vision];
    run(&[&args[..], &["--set", "schedule.steps=2", "--set", "eval=null"]].concat(), 0);
    let checkpoint = dir.path().join("runs/tiny/stage1");
    let mllm = dir.path().join("mllm");
    let [checkpoint, out] = [&checkpoint, &mllm].map(|path| path.to_str().unwrap());
    let args =
        ["export", "--checkpoint", checkpoint, "--what", "mllm", "--layout", "sail", "--dtype", "bf16"];
    run(&[&args[..], &["--out", out]].concat(), 0);
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(mllm.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["vision_config"]["image_size"], &config["dtype"]), (&112.into(), &"bfloat16".into()));
}

#[test]
fn what_cannot_be_exported_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    run(
        &[
            "--config",
            "configs/tiny/stage1.yaml",
            "--set",
            &set,
            "--set",
            "schedule.steps=2",
            "--set",
            "eval=null",
        ],
        0,
    );
    let run_dir = dir.path().join("runs/tiny/stage1");
    let (run_dir, out) = (run_dir.to_str().unwrap(), dir.path().join("out"));
    let out = out.to_str().unwrap();
    let refused = |args: &[&str], expected: &str| {
        let error =
            crate::stderr(&run(&[&["export", "--checkpoint", run_dir, "--out", out], args].concat(), 2));
        assert!(error.contains(expected) && error.contains("hint:"), "{error}");
        assert!(!Path::new(out).exists());
    };
    refused(&["--what", "mllm"], "no `aimv2_vision_model` encoder");
    let ask = ["generate", "--checkpoint", run_dir, "--prompt", "?", "--stop", ""];
    assert!(crate::stderr(&run(&ask, 2)).contains("`--stop` is empty"));
    // Found before a step is trained.
    let vision = "model.vision.random={model_type: siglip_vision_model, hidden_size: 64, num_attention_heads: 2, \
                  image_size: 112, patch_size: 14, num_hidden_layers: 1}";
    let args =
        ["--config", "configs/tiny/stage1.yaml", "--set", &set, "--set", "run.dir=siglip", "--set", vision];
    let error = crate::stderr(&run(&[&args[..], &["--set", "export={ vit: original }"]].concat(), 2));
    assert!(error.contains("`export.vit`: this `siglip_vision_model` has no such layout"), "{error}");
    assert!(!dir.path().join("siglip").exists());
    refused(&["--what", "llm", "--layout", "sail"], "transformers' layout only");
    refused(&["--what", "mllm", "--layout", "original"], "no `original` layout");
}

/// The demo's real weights: forty tokens about five real images. Minutes on a CPU.
#[test]
#[ignore = "loads the demo weights several times; run by ./scripts/test.sh --extended"]
fn the_demo_model_answers_alike_in_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let sets = ["schedule.steps=2", "schedule.warmup=0", "eval=null"];
    let mut args = vec!["--config", "configs/demo/stage1.yaml", "--set", &set];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    run(&args, 0);
    let checkpoint: PathBuf = dir.path().join("runs/demo/stage1");
    mllm_answers_alike(checkpoint.to_str().unwrap(), "sail", dir.path(), "40");
}
