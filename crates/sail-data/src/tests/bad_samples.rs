//! Every reason for skipping a sample, counted under its name, and the rate that stops a run.

use std::path::Path;

use serde_json::json;

use crate::error::{BadSample, Error};
use crate::heldout::read_samples;
use crate::loader::{Loader, LoaderOptions};
use crate::sample::Sample;
use crate::spec::DataSpec;
use crate::testing::{encoder_for, gradient, jpeg, png, spec, tar, text_sample};

type Members = Vec<(String, Vec<u8>)>;

fn image_sample(key: &str, image: &serde_json::Value, files: &[(&str, Vec<u8>)]) -> Members {
    let json = json!({"image": image, "conversations": [
        {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]});
    let files = files.iter().map(|(suffix, data)| (format!("{key}.{suffix}"), data.clone()));
    std::iter::once((format!("{key}.json"), json.to_string().into_bytes())).chain(files).collect()
}

fn text_members(key: &str, json: &str) -> Members {
    vec![(format!("{key}.json"), json.as_bytes().to_vec())]
}

/// One sample for every reason, and the reason.
fn bad_samples() -> Vec<(&'static str, Members)> {
    let picture = gradient(20, 20);
    let truncated = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    let twice = vec![("b.json".into(), b"{}".to_vec()), ("b.JSON".into(), b"{}".to_vec())];
    let placed_wrong = json!({"image": "i.png", "conversations": [
        {"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "a"}]});
    vec![
        ("no_annotation", vec![("a.png".into(), png(&picture))]),
        ("duplicate_member", twice),
        ("bad_turns", text_members("e", r#"{"conversations": [{"from": "cat", "value": "x"}]}"#)),
        ("no_answer", text_members("f", &text_sample("q", ""))),
        ("unknown_image", image_sample("g", &json!("other.png"), &[("png", png(&picture))])),
        ("unknown_image", image_sample("h", &json!("h.png"), &[])),
        (
            "image_count",
            vec![("i.json".into(), placed_wrong.to_string().into_bytes()), ("i.png".into(), png(&picture))],
        ),
        ("image_count", image_sample("j", &json!([]), &[])),
        ("bad_image", image_sample("k", &json!("k.jpg"), &[("jpg", truncated(jpeg(&picture)))])),
        ("bad_image", image_sample("l", &json!("l.png"), &[("png", truncated(png(&picture)))])),
        ("bad_image", image_sample("m", &json!("m.png"), &[("png", b"text".to_vec())])),
        ("image_too_large", image_sample("n", &json!("n.png"), &[("png", png(&gradient(1001, 1000)))])),
        ("too_long", text_members("o", &text_sample("q", &"a".repeat(300)))),
        ("bad_image", image_sample("p", &json!("p.png"), &[("png", vec![])])),
        ("bad_image", image_sample("q", &json!("q.jpg"), &[("jpg", b"<html>404</html>".to_vec())])),
        ("unknown_image", image_sample("r", &json!("a.png"), &[("png", png(&picture))])),
        ("unknown_image", image_sample("s", &json!("s.json"), &[])),
        (
            "image_count",
            image_sample(
                "t",
                &json!(["t.1.png", "t.2.png"]),
                &[("1.png", png(&picture)), ("2.png", png(&picture))],
            ),
        ),
        ("bad_json", image_sample("u", &json!({"file": "u.png"}), &[("png", png(&picture))])),
        ("bad_json", image_sample("v", &json!([["v.png"]]), &[("png", png(&picture))])),
    ]
}

fn write_spec(dir: &Path, samples: impl IntoIterator<Item = Members>) -> DataSpec {
    let members: Members = samples.into_iter().flatten().collect();
    let path = dir.join("a.tar");
    std::fs::write(&path, tar(&members)).unwrap();
    spec(&[&path.display().to_string()])
}

fn good(n: usize) -> impl Iterator<Item = Members> {
    (0..n).map(|index| text_members(&format!("good{index}"), &text_sample("q", "a")))
}

fn load(spec: &DataSpec) -> Result<Vec<Sample>, Error> {
    read_samples(spec, &encoder_for(&spec.text), None)
}

#[test]
fn every_bad_sample_is_skipped_and_the_good_ones_are_read() {
    let bad = bad_samples();
    let (count, samples) = (bad.len(), bad.iter().map(|(_, members)| members.clone()));
    let dir = tempfile::tempdir().unwrap();
    let spec = write_spec(dir.path(), good(count).chain(samples));
    let read = load(&spec).unwrap();
    assert_eq!(read.len(), count, "as many bad ones are left out");
    assert!(read.iter().all(|sample| sample.id.key.starts_with("good")));
}

#[test]
fn every_reason_has_its_name() {
    for (reason, members) in bad_samples() {
        let dir = tempfile::tempdir().unwrap();
        let key = members[0].0.clone();
        let error = load(&write_spec(dir.path(), [members])).unwrap_err();
        assert!(
            matches!(&error, Error::NoGoodSample { reason: found, .. } if found == reason),
            "{key}: {error}"
        );
    }
}

#[test]
fn the_loader_counts_by_reason_over_one_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let bad = bad_samples();
    let samples: Vec<Members> = good(30).chain(bad.iter().map(|(_, members)| members.clone())).collect();
    let total = samples.len() as u64;
    let mut spec = write_spec(dir.path(), samples);
    spec.pack_buffer = 1;
    spec.max_error_rate = 0.95;
    let mut loader = Loader::new(&spec, encoder_for(&spec.text), LoaderOptions::alone(2), None).unwrap();
    while loader.tallies()["demo"].seen < total {
        loader.next_pack().unwrap();
    }
    let mut expected = std::collections::BTreeMap::<String, u64>::new();
    for (reason, _) in &bad {
        *expected.entry((*reason).to_owned()).or_default() += 1;
    }
    let skipped = &loader.tallies()["demo"].skipped;
    let seen = loader.tallies()["demo"].seen;
    for (reason, count) in &expected {
        // The pack that ends the epoch may reach into the next one.
        let found = skipped.get(reason).copied().unwrap_or(0);
        assert!((*count..=count + (seen - total)).contains(&found), "{reason}: {found}");
    }
}

#[test]
fn too_many_bad_samples_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let broken = |n: usize| (0..n).map(|index| text_members(&format!("bad{index}"), "{"));
    let mut spec = write_spec(dir.path(), good(80).chain(broken(20)));
    spec.max_error_rate = 0.1;
    let mut loader = Loader::new(&spec, encoder_for(&spec.text), LoaderOptions::alone(2), None).unwrap();
    let error = (0..200).find_map(|_| loader.next_pack().err()).expect("one in five is bad");
    let message = error.to_string();
    assert!(
        message.contains("`demo`") && message.contains("0.1") && message.contains("`bad_json`"),
        "{message}"
    );
    assert!(matches!(loader.next_pack(), Err(Error::Stopped)));
    assert!(matches!(load(&spec), Err(Error::TooManyBad { .. })));

    spec.max_error_rate = 0.3;
    let mut loader = Loader::new(&spec, encoder_for(&spec.text), LoaderOptions::alone(2), None).unwrap();
    (0..200).for_each(|_| drop(loader.next_pack().unwrap()));
}

#[test]
fn a_source_without_any_good_sample_is_an_error_and_no_endless_loop() {
    let truncated = jpeg(&gradient(20, 20));
    let truncated = truncated[..truncated.len() - 10].to_vec();
    let undecodable = image_sample("a", &json!("a.jpg"), &[("jpg", truncated)]);
    for members in
        [text_members("a", "{"), text_members("a", &text_sample("q", &"a".repeat(300))), undecodable]
    {
        for max_error_rate in [0.0, 0.5, 0.95] {
            let dir = tempfile::tempdir().unwrap();
            let mut spec = write_spec(dir.path(), [members.clone()]);
            spec.max_error_rate = max_error_rate;
            spec.streams = 2;
            let mut loader =
                Loader::new(&spec, encoder_for(&spec.text), LoaderOptions::alone(2), None).unwrap();
            assert!(matches!(loader.next_pack(), Err(Error::TooManyBad { .. })));
        }
    }
}

#[test]
fn empty_shards_are_passed_over_and_an_empty_source_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = write_spec(dir.path(), []);
    spec.streams = 3;
    let encoder = encoder_for(&spec.text);
    let mut loader = Loader::new(&spec, encoder.clone(), LoaderOptions::alone(1), None).unwrap();
    assert!(matches!(loader.next_pack(), Err(Error::EmptySource { .. })));
    assert!(matches!(load(&spec), Err(Error::EmptySource { .. })));

    let full = dir.path().join("b.tar");
    std::fs::write(&full, tar(&good(1).flatten().collect::<Members>())).unwrap();
    spec.sources[0].shards.push(full.display().to_string());
    let mut loader = Loader::new(&spec, encoder, LoaderOptions::alone(1), None).unwrap();
    (0..6).for_each(|_| drop(loader.next_pack().unwrap()));
}

#[test]
fn a_truncated_shard_stops_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let spec = write_spec(dir.path(), good(20));
    let path = dir.path().join("a.tar");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let mut loader = Loader::new(&spec, encoder_for(&spec.text), LoaderOptions::alone(2), None).unwrap();
    let error = (0..20).find_map(|_| loader.next_pack().err()).unwrap();
    assert!(matches!(&error, Error::BrokenShard { .. }), "{error}");
    assert!(error.to_string().contains("a.tar"));
}

#[test]
fn images_are_found_by_name_or_suffix_or_taken_as_they_lie() {
    let picture = || png(&gradient(16, 16));
    let free = r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#;
    let mut unnamed = text_members("e", free);
    unnamed.extend([("e.img1.png".into(), picture()), ("e.img2.png".into(), picture())]);
    let samples = [
        image_sample("d/a", &json!("a.png"), &[("png", picture())]),
        image_sample("d/b", &json!(["coco/train/b.png"]), &[("png", picture())]),
        image_sample("d/c", &json!("IMG1.png"), &[("img1.png", picture())]),
        unnamed,
    ];
    let dir = tempfile::tempdir().unwrap();
    let read = load(&write_spec(dir.path(), samples)).unwrap();
    let tiles: Vec<usize> = read.iter().map(|sample| sample.images.len()).collect();
    assert_eq!(
        tiles,
        [1 + 4, 1 + 4, 1 + 4, 2],
        "16 px are more than half of 2x2 tiles of 8 px, shared by two"
    );
    for sample in &read {
        assert_eq!(sample.image_rows.len(), sample.images.len() * 4);
    }
    assert_eq!(read[3].turns[0].text, "<image>\n<image>\nq");
    let asked = read[0].prompt();
    assert_eq!((asked.truth.as_str(), asked.images.len()), ("a", 5));
}

#[test]
fn reasons_are_snake_case() {
    let reasons = [BadSample::NoAnswer.reason(), BadSample::TooLong { tokens: 2, limit: 1 }.reason()];
    assert_eq!(reasons, ["no_answer", "too_long"]);
}
