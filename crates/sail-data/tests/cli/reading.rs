//! `index`, `check`, `stats`, `inspect` and `rebalance` on shards, good and bad.

use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::support::{Folder, demo, run, sail_data, succeed};

const SMALL: [&str; 6] = ["--image-px", "16", "--tokens-per-tile", "4", "--max-tiles", "4"];

#[test]
fn the_demo_corpus_is_clean() {
    let clean = succeed(&["check", &demo("*.tar"), "--image-px", "112", "--tokens-per-tile", "16"]);
    assert_eq!(clean, "1 328 samples with 1 088 images in 12 shards: 0 bad; text was not tokenised\n");
}

#[test]
fn bad_samples_and_broken_shards_are_named_and_the_rest_is_read() {
    let folder = Folder::new();
    let whole = std::fs::read(demo("ocr-heldout-000000.tar")).unwrap();
    folder.write("b-0.tar", &whole[..whole.len() / 2]);
    let mut spoiled = whole.clone();
    let at = spoiled.windows(8).position(|window| window == b"\x89PNG\r\n\x1a\n").unwrap();
    spoiled[at + 60..at + 120].fill(0);
    folder.write("a-0.tar", spoiled);
    folder.write("c-0.tar", &whole);
    let json = folder.at("problems.json");
    let (code, stdout, stderr) = run(&["check", &folder.at("*.tar"), "--json", &json]);
    assert_eq!((code, stderr.as_str()), (1, ""));
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].contains("a-0.tar  ocr-") && lines[0].contains("  bad_image: "), "{stdout}");
    assert!(lines[1].contains("b-0.tar` is broken at byte "), "{stdout}");
    assert!(
        stdout.contains("bad_image                 1") && stdout.contains("broken shards             1"),
        "{stdout}"
    );
    let found: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(found["summary"]["bad"]["bad_image"], 1);
    assert_eq!(found["problems"].as_array().unwrap().len(), 2);
    assert!(found["summary"]["samples"].as_u64().unwrap() > 80);
    let (code, _, stderr) = run(&["stats", &folder.at("*.tar")]);
    assert_eq!(code, 1);
    assert!(stderr.contains("b-0.tar` is broken at byte "), "{stderr}");
}

#[test]
fn too_long_samples_are_bad_in_check_and_counted_in_stats() {
    let folder = Folder::new();
    let tokenizer = folder.tokenizer();
    let shards = demo("vqa-*.tar");
    let options = [&SMALL[..], &["--tokenizer", &tokenizer, "--tokens-per-pack", "200"]].concat();
    let (code, stdout, _) = run(&[&["check", &shards], &options[..]].concat());
    assert_eq!(code, 1);
    let row = stdout.lines().find(|line| line.starts_with("  too_long")).unwrap();
    let json = folder.at("stats.json");
    let report = succeed(&[&["stats", &shards, "--json", &json], &options[..]].concat());
    let stats: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(row.split_whitespace().last().unwrap(), stats["total"]["too_long"].to_string(), "{report}");
    assert_eq!(stats["sources"][0]["name"], "vqa");
    let tokens = &stats["total"]["distributions"]["total_tokens"];
    assert_eq!(tokens["count"], 240);
    let bars = tokens["histogram"].as_array().unwrap();
    assert_eq!(bars.iter().map(|bar| bar["count"].as_u64().unwrap()).sum::<u64>(), 240);
}

#[test]
fn a_specification_file_gives_everything() {
    let folder = Folder::new();
    let tokenizer = folder.tokenizer();
    let shards = demo("caption-heldout-*.tar");
    let spec = format!(
        "tokenizer: {tokenizer}\n\
         data:\n  sources: [{{ name: captions, shards: ['{shards}'], weight: 1.0 }}]\n  mix_by: samples\n  \
         length: {{ epochs: 1 }}\n  streams: 1\n  seed: 0\n  tokens_per_pack: 4096\n  balance: mean\n  \
         too_long: drop\n  shuffle_buffer: 1\n  pack_buffer: 1\n  max_error_rate: 0.1\n  \
         text: {{ template: chatml, system: null, image_tokens: {{ start: '<img>', context: '<IMG_CONTEXT>', end: '</img>' }}, loss_weight: square }}\n  \
         image: {{ tile_px: 32, tokens_per_tile: 4, tiling: {{ min: 1, max: 4, thumbnail: true }}, any_resolution: null, max_frames: 8, \
         alpha: drop, exif_orientation: true, reencode: null, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], max_pixels: 1000000 }}\n  \
         store: {{ retries: 1, timeout_secs: 1.0, read_ahead_bytes: 1000000, cache: null }}\n"
    );
    let spec = folder.write("data.yaml", spec);
    let stats = succeed(&["stats", "--spec", &spec]);
    assert!(
        stats.starts_with("captions: 48 samples in 1 shard\n") && stats.contains("pack of 4096 tokens"),
        "{stats}"
    );
    let shown = succeed(&["inspect", "--spec", &spec]);
    assert!(shown.contains("[0."), "weights of 1/sqrt(n): {shown}");
    let other = succeed(&["stats", "--spec", &spec, &demo("text-heldout-*.tar")]);
    assert!(other.starts_with("text-heldout: 40 samples"), "{other}");
}

#[test]
fn an_index_holds_the_offset_of_every_sample() {
    let folder = Folder::new();
    let shard = folder.write("a.tar", std::fs::read(demo("vqa-heldout-000000.tar")).unwrap());
    let before = succeed(&["inspect", &shard, "--nth", "17"]);
    let printed = succeed(&["index", &shard]);
    assert_eq!(printed, format!("{shard}.idx: 40 samples\n"));
    let index = std::fs::read(format!("{shard}.idx")).unwrap();
    let offsets: Vec<u64> =
        index.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
    // As Python's tarfile counts: a sample begins at the header of its first member.
    let mut archive = tar::Archive::new(std::fs::File::open(&shard).unwrap());
    let (mut expected, mut end, mut key) = (Vec::new(), 0, String::new());
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let stem = name.split_once('.').unwrap().0.to_owned();
        if stem != key {
            expected.push(entry.raw_header_position());
            key = stem;
        }
        end = entry.raw_file_position() + entry.size().next_multiple_of(512);
    }
    expected.push(end);
    assert_eq!(offsets, expected);
    assert_eq!(succeed(&["inspect", &shard, "--nth", "17"]), before, "found through the index");

    // The shard is replaced, the index stays.
    std::fs::write(&shard, std::fs::read(demo("text-heldout-000000.tar")).unwrap()).unwrap();
    let (code, stdout, stderr) = run(&["inspect", &shard, "--nth", "17"]);
    assert_eq!(code, 0);
    assert!(
        stdout.contains("sample text-") && stderr.contains("does not fit its shard"),
        "{stdout} {stderr}"
    );
}

#[test]
fn a_sample_is_shown_in_text_colours_and_html() {
    let folder = Folder::new();
    let tokenizer = folder.tokenizer();
    let (shard, html) = (demo("ocr-heldout-000000.tar"), folder.at("sample.html"));
    let args = [&["inspect", &shard, "--tokenizer", &tokenizer, "--html", &html], &SMALL[..]].concat();
    let plain = succeed(&args);
    assert!(plain.contains("<IMG_CONTEXT> x ") && plain.contains("<|im_end|>⟧[1]"), "{plain}");
    assert!(!plain.contains('\u{1b}'), "no colours into a pipe");
    let coloured = succeed(&[&args[..], &["--color", "always", "--tiles"]].concat());
    assert!(coloured.contains("\u{1b}[32m") && coloured.contains('▀'));
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("data:image/png;base64,") && page.contains("learnt, weight 1"));
    assert!(!page.contains("http"), "the page must not ask the network for anything");
    let output = sail_data().args(&args).env("NO_COLOR", "1").output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), plain);
    let (code, _, stderr) = run(&["inspect", &shard, "--key", "nobody"]);
    assert_eq!(code, 1);
    assert!(stderr.starts_with("error: there is no sample with the key `nobody`"), "{stderr}");
}

#[test]
fn the_page_of_statistics_needs_nothing_else() {
    let folder = Folder::new();
    let html = folder.at("stats.html");
    succeed(&["stats", &demo("vqa-*.tar"), &demo("ocr-*.tar"), "--html", &html]);
    let page = std::fs::read_to_string(html).unwrap();
    assert!(
        page.contains("<svg") && page.contains("prefers-color-scheme:dark") && page.contains("role=\"img\"")
    );
    assert!(page.contains("Bitstream-Vera") && !page.contains("http"), "nothing from the network");
}

/// A specification whose sources `text` and `ocr` are shards of the demo corpus, the first with sampling weights.
fn spec(folder: &Folder, weights: &str) -> String {
    let tokenizer = folder.tokenizer();
    let source =
        |name: &str| json!({"name": name, "shards": [demo(&format!("{name}-*.tar"))], "weight": 1.0});
    let mut text = source("text");
    text["sampling_weights"] = json!(weights);
    let data = json!({
        "sources": [text, source("ocr")], "mix_by": "samples", "length": {"epochs": 1}, "streams": 2, "seed": 1,
        "tokens_per_pack": 4096, "balance": "off", "too_long": "drop", "shuffle_buffer": 8, "pack_buffer": 8,
        "max_error_rate": 0.1, "store": {"retries": 1, "timeout_secs": 1.0, "read_ahead_bytes": 1},
        "text": {
            "template": "chatml", "system": null, "loss_weight": "token",
            "image_tokens": {"start": "<img>", "context": "<IMG_CONTEXT>", "end": "</img>"},
        },
        "image": {
            "tile_px": 16, "tokens_per_tile": 4, "tiling": {"min": 1, "max": 4, "thumbnail": true},
            "any_resolution": null, "max_frames": 8, "alpha": "drop", "exif_orientation": true, "reencode": null,
            "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "max_pixels": 1_000_000,
        },
    });
    folder.write("spec.json", json!({"tokenizer": tokenizer, "data": data}).to_string())
}

#[test]
fn a_source_is_weighed_and_its_weights_are_checked_by_the_others() {
    let folder = Folder::new();
    let (weights, json, shards) = (folder.at("w.safetensors"), folder.at("w.json"), demo("text-*.tar"));
    let rest = ["--n", "2", "--threshold", "0.02", "--memory", "1MiB", "--json", &json];
    let file = || std::fs::read(&weights).unwrap();
    let report = succeed(&[&["rebalance", &shards, "--out", &weights], &rest[..]].concat());
    let written = file();
    let numbers: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let (samples, kept) = (numbers["samples"].as_u64().unwrap(), numbers["kept"].as_f64().unwrap());
    assert_eq!(
        numbers["texts"]["before"].as_f64(),
        Some(samples as f64),
        "the shares of n-grams are shares of these"
    );
    assert!(samples > 100 && kept < samples as f64 && kept > 1.0, "{report}");
    assert!(report.starts_with(&format!("{samples} samples\nan epoch keeps about ")), "{report}");

    let spec = spec(&folder, &weights);
    let by_name = ["rebalance", "--spec", &spec, "--source", "text", "--out", &weights];
    assert_eq!(succeed(&[&by_name[..], &rest[..], &["--threads", "1"]].concat()), report);
    assert!(file() == written, "options, specification and threads do not change a byte");
    for choice in [&[][..], &["--source", "poems"]] {
        let (code, _, stderr) = run(&[&["rebalance", "--spec", &spec, "--out", &weights], choice].concat());
        assert!(code == 2 && stderr.contains("has the sources `text`, `ocr`\n\nhint: choose"), "{stderr}");
    }

    succeed(&["check", "--spec", &spec]);
    folder.write("w.safetensors", &written[..written.len() - 4]);
    let (code, _, stderr) = run(&["check", "--spec", &spec]);
    assert!(code == 1 && stderr.contains("w.safetensors` are no safetensors file: "), "{stderr}");
    succeed(&[&by_name[..], &rest[..]].concat());
}

/// `--out` and `--json` replaced whatever they named: shards, devices, each other.
#[test]
fn what_is_read_is_not_written_over() {
    let folder = Folder::new();
    let weights = folder.at("w.safetensors");
    // Copies: they would be lost where this fails.
    let bytes = std::fs::read(demo("text-train-000000.tar")).unwrap();
    let [shard, _] = ["a-0.tar", "a-1.tar"].map(|name| folder.write(name, &bytes));
    let pattern = folder.at("a-*.tar");
    let notes = folder.write("notes.txt", "mine");
    std::os::unix::fs::symlink(&shard, folder.at("link")).unwrap();
    let [link, nowhere] = ["link", "no/w.safetensors"].map(|name| folder.at(name));
    let before = std::fs::read(&shard).unwrap();
    let rest = ["--n", "2", "--threshold", "0.02", "--memory", "1MiB"];
    for (out, json, said) in [
        (&shard, None, "is a file that is read"),
        (&link, None, "is a file that is read"),
        (&weights, Some(&shard), "is a file that is read"),
        (&weights, Some(&weights), "are one file"),
        (&notes, None, "holds no sampling weights"),
        (&nowhere, None, "is in a folder that does not exist"),
        (&"/dev/null".to_owned(), None, "is no file that could be replaced"),
    ] {
        let mut args = [&["rebalance", &pattern, "--out", out], &rest[..]].concat();
        args.extend(json.iter().flat_map(|json| ["--json", json.as_str()]));
        let (code, _, stderr) = run(&args);
        assert!(code == 2 && stderr.contains(said) && stderr.contains("hint:"), "{out} {json:?}: {stderr}");
    }
    assert!(std::fs::read(&shard).unwrap() == before && !Path::new(&weights).exists());
    assert_eq!(std::fs::read_to_string(&notes).unwrap(), "mine");
    // Weights are replaced by newer ones.
    for _ in 0..2 {
        succeed(&[&["rebalance", &pattern, "--out", &weights], &rest[..]].concat());
    }
}

#[test]
fn weights_for_another_number_of_samples_do_not_pass() {
    let folder = Folder::new();
    let weights = folder.at("w.safetensors");
    let spec = spec(&folder, &weights);
    let data: Value = serde_json::from_slice(&std::fs::read(&spec).unwrap()).unwrap();
    let pattern = data["data"]["sources"][0]["shards"][0].as_str().unwrap();
    let rest = ["--n", "2", "--threshold", "0.02", "--memory", "1MiB", "--out", &weights];
    succeed(&[&["rebalance", pattern], &rest[..]].concat());
    let written = std::fs::read(&weights).unwrap();
    let file = SafeTensors::deserialize(&written).unwrap();
    let shard = file.names().into_iter().min().unwrap().to_owned();
    let (shards, samples) = (file.len(), file.tensor(&shard).unwrap().shape()[0]);
    for number in [samples - 1, samples + 1] {
        let other = 1.0_f32.to_le_bytes().repeat(number);
        let other = TensorView::new(Dtype::F32, vec![number], &other).unwrap();
        let tensor = |name: &str| if name == shard { other.clone() } else { file.tensor(name).unwrap() };
        let tensors = file.names().into_iter().map(|name| (name, tensor(name)));
        folder.write("w.safetensors", safetensors::serialize(tensors, None).unwrap());
        let part = format!("have {number} weights for the shard `{shard}`, which has {samples} samples");
        let json = folder.at("problems.json");
        let (code, stdout, stderr) = run(&["check", "--spec", &spec, "--json", &json]);
        assert!(code == 1 && stdout.contains(&part), "{stdout} {stderr}");
        assert!(stdout.contains("  unfit weights             1\n"), "{stdout}");
        let found: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        assert_eq!(found["problems"][0]["kind"], "unfit_weights");
        assert!(
            shards > 1 && found["summary"]["samples"].as_u64().unwrap() > 240,
            "the rest is read: {stdout}"
        );
        let (code, stdout, stderr) = run(&["stats", "--spec", &spec]);
        assert!(code == 1 && stdout.is_empty() && stderr.contains(&part), "{stdout} {stderr}");
    }
}
