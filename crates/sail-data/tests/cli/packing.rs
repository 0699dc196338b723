//! `pack`: what it makes, and that a kill changes nothing.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::{Folder, demo, files, run, sail_data, succeed};

/// Arguments that pack `input` into `out`.
fn args<'a>(input: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["pack", input, "--out", out, "--samples-per-shard", "10"], more].concat()
}

#[test]
fn samples_keep_their_fields_and_bad_ones_are_listed() {
    let folder = Folder::new();
    let (input, out) = (folder.samples("a.json", 32), folder.at("out"));
    let printed = succeed(&args(&input, &out, &["--license", "CC0-1.0", "--source", "made"]));
    assert!(printed.starts_with("30 samples in 3 shards ("), "{printed}");
    assert!(printed.contains("2 skipped: missing_file 1, no_answer 1"), "{printed}");

    let rejected = std::fs::read_to_string(folder.path("out/rejected.jsonl")).unwrap();
    let lines: Vec<Value> = rejected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let short: Vec<(u64, &str)> = lines
        .iter()
        .map(|line| (line["record"].as_u64().unwrap(), line["reason"].as_str().unwrap()))
        .collect();
    assert_eq!(short, [(3, "missing_file"), (5, "no_answer")]);

    let mut archive = tar::Archive::new(std::fs::File::open(folder.path("out/shard-000000.tar")).unwrap());
    let names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .take(6)
        .collect();
    // The images are PNG files whatever their names say.
    let expected = [
        "part_0_x.json",
        "part_1_x.json",
        "part_1_x.jpg",
        "part_2_x.json",
        "part_2_x.img1.png",
        "part_2_x.img2.png",
    ];
    assert_eq!(names, expected);

    let clean = succeed(&["check", &folder.at("out/*.tar")]);
    assert_eq!(clean, "30 samples with 29 images in 3 shards: 0 bad; text was not tokenised\n");
    let stats = succeed(&["stats", &folder.at("out/*.tar")]);
    assert!(
        stats.contains("licences: CC0-1.0 100.0 %") && stats.contains("sources: made 100.0 %"),
        "{stats}"
    );
    let shown = succeed(&["inspect", &folder.at("out/*.tar"), "--key", "part_6_x-000000007"]);
    assert!(shown.contains("Question 7?"), "two samples had the same id: {shown}");
}

#[test]
fn every_way_of_naming_images_is_read_back() {
    let folder = Folder::new();
    folder.samples("a.json", 3);
    let image = "images/1-0.JPEG";
    let asked = r#""conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]"#;
    let part = format!(r#"{{"type": "image", "image": "{image}"}}"#);
    let url = format!(r#"{{"type": "image_url", "image_url": {{"url": "{image}"}}}}"#);
    let messages = |parts: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": [{parts}, {{"type": "text", "text": "Q"}}]}},
                {{"role": "assistant", "content": "A"}}]}}"#
        )
    };
    let lines = [
        format!(r#"{{"image": "{image}", "images": null, {asked}}}"#),
        format!(r#"{{"image": "{image}", "images": [], {asked}}}"#),
        format!(r#"{{"images": ["{image}", "{image}"], {asked}}}"#),
        messages(&part),
        messages(&url),
        messages(&format!("{part}, {part}")),
        format!(r#"{{"image": "", {asked}}}"#),
    ];
    let text: Vec<String> = lines.iter().map(|line| line.replace('\n', " ")).collect();
    let input = folder.write("forms.jsonl", text.join("\n"));
    let packed = succeed(&args(&input, &folder.at("out"), &[]));
    assert!(packed.starts_with("7 samples in 1 shard"), "{packed}");
    let clean = succeed(&["check", &folder.at("out/*.tar")]);
    assert!(clean.starts_with("7 samples with 8 images in 1 shard: 0 bad"), "{clean}");
}

#[test]
fn frames_of_a_video_become_images_of_their_own() {
    let folder = Folder::new();
    let mut gif = Vec::new();
    let mut encoder = image::codecs::gif::GifEncoder::new(&mut gif);
    for n in 0..3 {
        encoder.encode(&[n * 80; 16 * 8 * 3], 16, 8, image::ExtendedColorType::Rgb8).unwrap();
    }
    drop(encoder);
    folder.write("clip.gif", gif);
    let input = folder.write(
        "a.jsonl",
        r#"{"id": "v", "video": "clip.gif", "conversations": [
            {"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "It grows lighter."}]}"#
            .replace('\n', " "),
    );
    succeed(&args(&input, &folder.at("out"), &[]));
    let mut archive = tar::Archive::new(std::fs::File::open(folder.path("out/shard-000000.tar")).unwrap());
    let mut members = std::collections::BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        members.insert(entry.path().unwrap().display().to_string(), bytes);
    }
    assert!(members.keys().eq(["v.img1.png", "v.img2.png", "v.img3.png", "v.json"]), "{:?}", members.keys());
    for (n, name) in ["v.img1.png", "v.img2.png", "v.img3.png"].iter().enumerate() {
        let frame = image::load_from_memory(&members[*name]).unwrap().into_rgb8();
        assert!(frame.pixels().all(|pixel| pixel.0.iter().all(|&value| value.abs_diff(n as u8 * 80) < 4)));
    }
    let json: Value = serde_json::from_slice(&members["v.json"]).unwrap();
    assert_eq!(json["video"], serde_json::json!(["v.img1.png", "v.img2.png", "v.img3.png"]));
    assert_eq!(json["conversations"][0]["value"], "<video>\nWhat happens?", "it stays a video");
    let clean = succeed(&["check", &folder.at("out/*.tar")]);
    assert!(
        clean.starts_with("1 samples with 3 images") || clean.starts_with("1 sample with 3 images"),
        "{clean}"
    );
}

#[test]
fn the_number_of_threads_and_the_form_of_the_input_change_no_byte() {
    let folder = Folder::new();
    let input = folder.samples("a.json", 60);
    let list: Vec<Value> = serde_json::from_slice(&std::fs::read(&input).unwrap()).unwrap();
    let lines: Vec<String> = list.iter().map(Value::to_string).collect();
    let lines = folder.write("a.jsonl", lines.join("\n"));
    for (input, out, threads) in [(&input, "one", "1"), (&input, "four", "4"), (&lines, "lines", "3")] {
        succeed(&args(input, &folder.at(out), &["--threads", threads]));
    }
    let shards = |out: &str| {
        let mut files = files(&folder.path(out));
        files.retain(|name, _| name.contains(".tar"));
        files
    };
    assert_eq!(shards("one").len(), 6);
    assert_eq!(shards("one"), shards("four"));
    assert_eq!(shards("one"), shards("lines"));
    assert_eq!(files(&folder.path("one")), files(&folder.path("four")), "lists and manifests as well");
}

#[test]
fn a_killed_run_goes_on_and_ends_with_the_same_bytes() {
    let folder = Folder::new();
    let input = folder.samples("a.json", 300);
    let whole = folder.at("whole");
    succeed(&args(&input, &whole, &[]));
    for (round, shards) in [0, 1, 5, 12, 20].into_iter().enumerate() {
        let out = folder.at(&format!("killed-{round}"));
        let mut child = sail_data().args(args(&input, &out, &["--threads", "2"])).spawn().unwrap();
        // Killed as soon as so many shards are there, in the middle of the next one.
        let last = Path::new(&out).join(format!("shard-{:06}.tar", shards - i32::from(shards > 0)));
        while shards > 0 && !last.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        succeed(&args(&input, &out, &["--threads", "1"]));
        assert_eq!(files(Path::new(&out)), files(Path::new(&whole)), "killed behind {shards} shards");
    }
    let again = succeed(&args(&input, &whole, &[]));
    assert!(again.contains("30 of the shards were there already"), "{again}");
}

#[test]
fn only_the_same_work_goes_on() {
    let folder = Folder::new();
    let (input, out) = (folder.samples("a.json", 30), folder.at("out"));
    succeed(&args(&input, &out, &[]));
    let refused = |args: &[&str], part: &str| {
        let (code, _, stderr) = run(args);
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains(part) && stderr.contains("\n\nhint: "), "{part}: {stderr}");
    };
    refused(&args(&input, &out, &["--license", "MIT"]), "`license` was null and is \"MIT\" now");
    let shard = folder.path("out/shard-000001.tar");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[600] ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    refused(&args(&input, &out, &[]), "shard-000001.tar");
    let mut text = std::fs::read(&input).unwrap();
    text.push(b'\n');
    std::fs::write(&input, text).unwrap();
    refused(&args(&input, &out, &[]), "a.json` has changed since");
    std::fs::remove_file(folder.path("out/pack.json")).unwrap();
    refused(&args(&input, &out, &[]), "would be overwritten");
}

#[test]
fn strict_stops_at_the_first_bad_sample_and_a_broken_array_at_its_place() {
    let folder = Folder::new();
    let input = folder.samples("a.json", 10);
    let (code, _, stderr) = run(&args(&input, &folder.at("out"), &["--strict"]));
    assert_eq!(code, 1);
    assert!(stderr.contains("a.json`, record 3: cannot read `"), "{stderr}");
    assert!(stderr.contains("images/absent.jpg`"), "{stderr}");
    let text = std::fs::read(&input).unwrap();
    let cut = folder.write("cut.json", &text[..text.len() / 2]);
    let (code, _, stderr) = run(&args(&cut, &folder.at("cut"), &[]));
    assert_eq!(code, 1);
    assert!(stderr.contains("cut.json` is broken at byte "), "{stderr}");
}

#[test]
fn shards_are_packed_anew() {
    let folder = Folder::new();
    let (input, out) = (demo("vqa-train-*.tar"), folder.at("out"));
    succeed(&["pack", &input, "--out", &out, "--bytes-per-shard", "100KB", "--prefix", "vqa"]);
    let clean = succeed(&["check", &folder.at("out/vqa-*.tar")]);
    assert!(clean.starts_with("200 samples with 200 images in "), "{clean}");
    let largest = files(Path::new(&out))
        .into_iter()
        .filter(|(name, _)| name.contains(".tar"))
        .map(|(_, bytes)| bytes.len());
    assert!(largest.max().unwrap() <= 100_000 + 1024);
    let show = |shards: &str| {
        let shown = succeed(&["inspect", shards, "--key", "vqa-00007"]);
        shown.split_once("turns").unwrap().1.to_owned()
    };
    assert_eq!(show(&input), show(&folder.at("out/*.tar")));
}
