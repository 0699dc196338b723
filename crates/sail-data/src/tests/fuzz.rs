//! Valid shards, annotations and images with bytes changed at random: nothing panics, hangs or stops a run that
//! should go on. A few fixed cases run always; `SAIL_FUZZ_SECS=600 cargo test --release -p sail-data -- --ignored
//! fuzz` goes on for that long with new ones. What it finds becomes a test with a name in the other files.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::json;

use super::bad_images::crc32;
use super::edits::{apply, edits};
use crate::error::Error;
use crate::image::{Picture, Share, frame_count};
use crate::rng::Key;
use crate::sample::Images;
use crate::shard::{Extent, Shard};
use crate::spec::{DataSpec, Layout, PageChoice, StoreSpec};
use crate::store::Store;
use crate::testing::{
    encoder_for, gradient, jpeg, outcomes_with, png, spec, tar, tar_member, text_sample, text_spec,
};
use crate::text::TextEncoder;

/// No case takes longer, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);
const CASES: u32 = 48;

static ENCODER: LazyLock<Arc<TextEncoder>> = LazyLock::new(|| encoder_for(&text_spec()));

/// Runs `check` on fixed cases, or on new ones for a while, and tells how many there were.
fn run<S: Strategy>(strategy: &S, forever: bool, check: impl Fn(S::Value)) -> u64 {
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let mut runner = if forever {
        TestRunner::new(config)
    } else {
        TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
    };
    let timed = |value| {
        let start = Instant::now();
        check(value);
        assert!(start.elapsed() < PATIENCE, "it took {:?}", start.elapsed());
        Ok(())
    };
    runner.run(strategy, timed).unwrap_or_else(|failure| panic!("{failure}"));
    u64::from(CASES)
}

struct Place {
    _dir: tempfile::TempDir,
    path: PathBuf,
    spec: DataSpec,
}

fn place(name: &str) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, "").unwrap();
    std::fs::write(dir.path().join("x.png"), png(&gradient(9, 8))).unwrap();
    let mut spec = spec(&[&path.display().to_string()]);
    spec.tokens_per_pack = 4096;
    Place { _dir: dir, path, spec }
}

/// A shard of any bytes is read to its end or refused as broken, the same from every sample on.
fn check_shard(place: &Place, bytes: &[u8]) {
    std::fs::write(&place.path, bytes).unwrap();
    let shard = Shard::open(&Store::new(&StoreSpec::default()).unwrap(), &place.path.display().to_string());
    let shard = match shard {
        Ok(shard) => shard,
        Err(Error::CompressedShard { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let mut scanner = shard.scan(0, 0);
    let mut found: Vec<Extent> = Vec::new();
    let mut resumed = Vec::new();
    let whole = loop {
        resumed.push((scanner.offset(), scanner.ordinal()));
        match scanner.next_sample() {
            Ok(Some(extent)) => found.push(extent),
            Ok(None) => break true,
            Err(Error::BrokenShard { .. }) => break false,
            Err(error) => panic!("{error}"),
        }
    };
    for extent in &found {
        shard.read(*extent).unwrap();
    }
    let middle = resumed.len() / 2;
    let mut again = shard.scan(resumed[middle].0, resumed[middle].1);
    for extent in &found[middle..] {
        assert_eq!(again.next_sample().unwrap(), Some(*extent));
    }
    if whole {
        assert_eq!(outcomes_with(&place.spec, &ENCODER, 0).unwrap().len(), found.len());
    }
}

fn tar_base() -> Vec<u8> {
    let mut bytes: Vec<u8> = [
        tar_member(b"pax", b'x', b"17 path=d/a.json\n22 mtime=1700000000.5\n"),
        tar_member(b"short.json", b'0', text_sample("<image>q", "a").as_bytes()),
        tar_member(b"././@LongLink", b'L', b"d/a.png\0"),
        tar_member(b"short.png", b'0', &png(&gradient(9, 8))),
        tar_member(b"d/", b'5', b""),
        tar_member(b"d/b.json", b'0', text_sample("q", "a").as_bytes()),
        tar_member(b"d/c.jpg", b'0', &jpeg(&gradient(9, 8))),
        tar_member(b"d/c.json", b'0', text_sample("q", "a").as_bytes()),
    ]
    .concat();
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

/// Makes the checksums of what looks like headers right, so that changes get past them.
fn mend_tar(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

const TAR_TOKENS: [&[u8]; 14] = [
    &[0; 512],
    &[0; 12],
    &[0xff; 12],
    b"77777777777\0",
    b"\x80\0\0\0\x10\0\0\0\0\0\0\0",
    b"00000000777\0",
    b"x",
    b"L",
    b"S",
    b"5",
    b"1 path=",
    b"99 size=9\n",
    b"a.json\0",
    b"ustar\x0000",
];

fn fuzz_tar(forever: bool) -> u64 {
    let (place, base) = (place("a.tar"), tar_base());
    run(&(edits(), any::<bool>()), forever, |(edits, mend)| {
        let mut bytes = apply(&base, &edits, &TAR_TOKENS);
        if mend {
            mend_tar(&mut bytes);
        }
        check_shard(&place, &bytes);
    })
}

const JSON_TOKENS: [&[u8]; 20] = [
    b"null",
    b"\"\"",
    b"[]",
    b"{}",
    b"[",
    b"{\"",
    b"1e999",
    b"-0",
    b"NaN",
    b"\\u0000",
    b"\\ud800",
    b"<image>",
    b"<video>",
    b"\"x.png\"",
    b"\"../x.png\"",
    b"\"from\":\"gpt\"",
    b"\xff",
    b"\n",
    b"\xef\xbb\xbf",
    b"<|im_end|>",
];

fn annotations() -> [(Layout, String); 6] {
    let messages = json!({"messages": [
        {"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "image_url", "image_url": {"url": "x.png"}},
                                     {"type": "video", "video": ["x.png", "x.png"]}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"}], "images": null});
    let video = json!({"video": "x.png", "image": ["x.png", {"path": "x.png"}], "conversations": [
        {"from": "system", "value": "s"}, {"from": "human", "value": "<video><image><image>q"}, {"from": "gpt", "value": "a"}]});
    let caption =
        json!({"caption": "c", "status": "success", "error_message": null, "image": "x.png", "width": 8});
    let pages = json!({"pages": [{"text": []}, {"text": ["a", "b"], "bbox": [[0.1, 0.2]]}, {"text": "c"}], "image": "x.png"});
    let interleaved =
        json!({"images": [null, "x.png", "x.png", null, null], "texts": ["a", null, null, "b", "c"]});
    [
        (Layout::Conversations, text_sample("<image>q", "a")),
        (Layout::Conversations, messages.to_string()),
        (Layout::Conversations, video.to_string()),
        (Layout::Captions, caption.to_string()),
        (Layout::Pages, pages.to_string()),
        (Layout::Interleaved, interleaved.to_string()),
    ]
}

/// An annotation of any bytes is a sample or a bad one, in an archive and, where it is whole lines, in JSON lines.
fn fuzz_json(forever: bool) -> u64 {
    let (mut archive, mut lines) = (place("a.tar"), place("a.jsonl"));
    for spec in [&mut archive.spec, &mut lines.spec] {
        spec.sources[0].page = PageChoice::Random;
    }
    let of = |place: &Place, layout| {
        let mut spec = place.spec.clone();
        spec.sources[0].layout = layout;
        Place { _dir: tempfile::tempdir().unwrap(), path: place.path.clone(), spec }
    };
    run(&(any::<Index>(), edits()), forever, |(which, edits)| {
        let bases = annotations();
        let (layout, base) = &bases[which.index(bases.len())];
        let annotation = apply(base.as_bytes(), &edits, &JSON_TOKENS);
        let image = png(&gradient(9, 8));
        let members =
            [("x.json", &annotation), ("x.png", &image), ("y.json", &text_sample("q", "a").into_bytes())];
        check_shard(&of(&archive, *layout), &tar(&members));
        let text = [annotation, b"\r\n".to_vec(), text_sample("q", "a").into_bytes()].concat();
        check_shard(&of(&lines, *layout), &text);
    })
}

/// Makes the checksums of the chunks of a PNG right.
fn mend_png(bytes: &mut [u8]) {
    let mut at = 8;
    while let Some(length) = bytes.get(at..at + 4) {
        let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
        let Some(end) = at.checked_add(8 + length).filter(|end| end + 4 <= bytes.len()) else { break };
        let crc = crc32(&bytes[at + 4..end]);
        bytes[end..end + 4].copy_from_slice(&crc.to_be_bytes());
        at = end + 4;
    }
}

/// An image of any bytes is decoded or refused.
fn fuzz_images(forever: bool) -> u64 {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| {
        path.extension()
            .is_some_and(|end| ["jpg", "png", "webp", "gif", "tif", "bmp"].iter().any(|known| end == *known))
    });
    names.sort();
    let bases: Vec<Vec<u8>> =
        names.iter().map(|path| std::fs::read(path).unwrap()).filter(|b| b.len() < 40_000).collect();
    let spec = spec(&["a.tar"]).image;
    let tokens: [&[u8]; 10] = [
        &[0xff; 2],
        &[0; 4],
        &[0xff; 4],
        &[0x7f, 0xff, 0xff, 0xff],
        b"IHDR",
        b"VP8X",
        b"\xff\xc2",
        b"\xff\xda",
        b"II*\0",
        b"GIF89a",
    ];
    run(&(any::<Index>(), any::<bool>(), edits()), forever, |(which, head, edits)| {
        let base = &bases[which.index(bases.len())];
        // Most of what matters stands at the front.
        let split = if head { base.len().min(64) } else { base.len() };
        let mut bytes = [apply(&base[..split], &edits, &tokens), base[split..].to_vec()].concat();
        mend_png(&mut bytes);
        let bytes: bytes::Bytes = bytes.into();
        let frames = frame_count("x", &bytes).unwrap_or(1);
        for frame in [0, frames.saturating_sub(1)] {
            let mut images = Images::default();
            let planned = Picture::plan("x".into(), bytes.clone(), frame, Share::OneOf(1), &spec);
            if let Ok(()) = planned.and_then(|picture| picture.render(&spec, Key::new(0), &mut images)) {
                assert!(images.pixels.iter().all(|value| value.is_finite()));
            }
        }
    })
}

#[test]
fn changed_archives_harm_nothing() {
    fuzz_tar(false);
}

#[test]
fn changed_annotations_harm_nothing() {
    fuzz_json(false);
}

#[test]
fn changed_images_harm_nothing() {
    fuzz_images(false);
}

#[test]
#[ignore = "runs for SAIL_FUZZ_SECS seconds"]
fn fuzz_for_long() {
    let seconds = std::env::var("SAIL_FUZZ_SECS").map_or(600, |text| text.parse().unwrap());
    let start = Instant::now();
    let mut cases = [0; 3];
    while start.elapsed() < Duration::from_secs(seconds) {
        cases[0] += fuzz_tar(true);
        cases[1] += fuzz_json(true);
        cases[2] += fuzz_images(true);
    }
    let [archives, annotations, images] = cases;
    println!("{archives} archives, {annotations} annotations and {images} images in {:?}", start.elapsed());
}
