//! What the tests of this crate share: a tiny tokenizer, tiny images and tiny shards.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use serde_json::json;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::draft::Draft;
use crate::error::{BadSample, Result};
use crate::image::{Header, Treatment, decode};
use crate::sample::Sample;
use crate::shard::{RawSample, SampleRef, Shard};
use crate::source::Source;
use crate::spec::{
    Alpha, Balance, DataSpec, ImageSpec, Layout, Length, MixBy, SourceSpec, StoreSpec, TextSpec, Tiling,
    TooLong,
};
use crate::store::Store;
use crate::text::TextEncoder;
use crate::weights::{Origin, to_bytes};

pub(crate) const SPECIALS: [&str; 5] = ["<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>"];

pub(crate) fn text_spec() -> TextSpec {
    let [_, _, start, context, end] = SPECIALS;
    crate::tools::access::text_spec([start, context, end])
}

/// One stream over these shards, 8 px tiles of 4 tokens.
pub(crate) fn spec(shards: &[&str]) -> DataSpec {
    DataSpec {
        sources: vec![SourceSpec::new("demo", shards.iter().map(|&shard| shard.to_owned()).collect())],
        mix_by: MixBy::Samples,
        length: Length::Endless,
        streams: 1,
        seed: 7,
        tokens_per_pack: 256,
        balance: Balance::Off,
        too_long: TooLong::Drop,
        shuffle_buffer: 4,
        pack_buffer: 3,
        max_error_rate: 0.5,
        text: text_spec(),
        image: ImageSpec {
            tile_px: 8,
            tokens_per_tile: 4,
            tiling: Tiling { min: 1, max: 4, thumbnail: true },
            mean: [0.5; 3],
            std: [0.5; 3],
            any_resolution: None,
            max_frames: 8,
            alpha: Alpha::Drop,
            exif_orientation: true,
            reencode: None,
            max_pixels: 1_000_000,
        },
        store: StoreSpec::default(),
    }
}

/// A byte-level `tokenizer.json` without merges: one token per byte, and the special tokens at 256..261.
pub(crate) fn tokenizer_json(specials: &[&str], special: bool) -> String {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<String, serde_json::Value> =
        alphabet.into_iter().enumerate().map(|(id, byte)| (byte.to_string(), json!(id))).collect();
    let added: Vec<serde_json::Value> = specials
        .iter()
        .enumerate()
        .map(|(index, token)| {
            json!({"id": 256 + index, "content": token, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": special})
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 10, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": vocab, "merges": []}
    })
    .to_string()
}

pub(crate) fn encoder_for(spec: &TextSpec) -> Arc<TextEncoder> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer_json(&SPECIALS, true)).unwrap();
    Arc::new(TextEncoder::new(&path, spec).unwrap())
}

pub(crate) fn gradient(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| Rgb([(x * 7) as u8, (y * 11) as u8, (x * y) as u8]))
}

pub(crate) fn encode(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

pub(crate) fn jpeg(image: &RgbImage) -> Vec<u8> {
    let (width, height) = image.dimensions();
    let (width, height) = (width as usize, height as usize);
    let (format, chroma) = (libjpeg_turbo_rs::PixelFormat::Rgb, libjpeg_turbo_rs::Subsampling::S420);
    libjpeg_turbo_rs::compress(image.as_raw(), width, height, format, 75, chroma).unwrap()
}

pub(crate) fn png(image: &RgbImage) -> Vec<u8> {
    encode(&image.clone().into(), ImageFormat::Png)
}

/// The header of a tar member, with its checksum made right.
pub(crate) fn tar_header(name: &[u8], kind: u8, size: &[u8]) -> [u8; 512] {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name);
    header[100..108].copy_from_slice(b"0000644\0");
    header[124..124 + size.len()].copy_from_slice(size);
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// A member of a tar archive, with its padding.
pub(crate) fn tar_member(name: &[u8], kind: u8, data: &[u8]) -> Vec<u8> {
    let mut member = tar_header(name, kind, format!("{:011o}\0", data.len()).as_bytes()).to_vec();
    member.extend_from_slice(data);
    member.resize(member.len().next_multiple_of(512), 0);
    member
}

/// A ustar archive with these members.
pub(crate) fn tar<N: AsRef<str>, D: AsRef<[u8]>>(members: &[(N, D)]) -> Vec<u8> {
    let member = |(name, data): &(N, D)| tar_member(name.as_ref().as_bytes(), b'0', data.as_ref());
    let mut archive: Vec<u8> = members.iter().flat_map(member).collect();
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// A text-only annotation.
pub(crate) fn text_sample(question: &str, answer: &str) -> String {
    json!({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]})
        .to_string()
}

/// Shards of text-only samples: shard s has `counts[s]`, with answers of different lengths.
pub(crate) fn write_shards(dir: &Path, counts: &[usize]) -> Vec<PathBuf> {
    let write = |(shard, &count): (usize, &usize)| {
        let members: Vec<(String, String)> = (0..count)
            .map(|n| {
                (format!("{shard}-{n}.json"), text_sample("q", &"a".repeat(1 + (shard * 31 + n * 17) % 50)))
            })
            .collect();
        let path = dir.join(format!("{shard:03}.tar"));
        std::fs::write(&path, tar(&members)).unwrap();
        path
    };
    counts.iter().enumerate().map(write).collect()
}

/// Gives the first source, whose shards have `counts` samples, sampling weights by the numbers of shard and sample.
pub(crate) fn weigh(spec: &mut DataSpec, dir: &Path, counts: &[usize], weight: impl Fn(usize, usize) -> f32) {
    let weights = |(shard, &count): (usize, &usize)| {
        (spec.sources[0].shards[shard].clone(), (0..count).map(|n| weight(shard, n)).collect())
    };
    let weights = counts.iter().enumerate().map(weights).collect();
    let origin =
        Origin { n: 4, threshold: 1e-3, layout: Layout::Conversations, shard_bytes: BTreeMap::new() };
    let path = dir.join("weights.safetensors");
    std::fs::write(&path, to_bytes(&origin, &weights).unwrap()).unwrap();
    spec.sources[0].sampling_weights = Some(path);
}

/// What becomes of a sample: the sample, or why it is skipped.
pub(crate) type Outcome = std::result::Result<Sample, BadSample>;

/// What becomes of every sample of all shards of the first source, in order, with its key.
pub(crate) fn outcomes(spec: &DataSpec, epoch: u32) -> Result<Vec<(String, Outcome)>> {
    outcomes_with(spec, &encoder_for(&spec.text), epoch)
}

/// As [`outcomes`], with an encoder made before.
pub(crate) fn outcomes_with(
    spec: &DataSpec,
    encoder: &TextEncoder,
    epoch: u32,
) -> Result<Vec<(String, Outcome)>> {
    let source = Source::open_all(spec)?.remove(0);
    let mut outcomes = Vec::new();
    for shard in 0..source.shards.len() {
        let mut scanner = source.open(shard)?.scan(0, 0);
        while let Some(extent) = scanner.next_sample()? {
            let place = SampleRef { shard: shard as u32, epoch, extent };
            let draft = Draft::read(spec, encoder, &source, place)?;
            outcomes.push(match draft.and_then(|draft| draft.finish(&spec.image)) {
                Ok(sample) => (sample.id.key.clone(), Ok(sample)),
                Err(rejected) => (rejected.id.key, Err(rejected.cause)),
            });
        }
    }
    Ok(outcomes)
}

/// As [`outcomes`], of a shard with these bytes.
pub(crate) fn outcomes_of(name: &str, bytes: &[u8]) -> Result<Vec<(String, Outcome)>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    outcomes(&spec(&[&path.display().to_string()]), 0)
}

/// A sample with these members, by suffix.
pub(crate) fn raw_sample(key: &str, members: &[(&str, &[u8])]) -> RawSample {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar").display().to_string();
    let named: Vec<_> = members.iter().map(|(suffix, data)| (format!("{key}.{suffix}"), data)).collect();
    std::fs::write(&path, tar(&named)).unwrap();
    let shard = Shard::open(&Store::new(&StoreSpec::default()).unwrap(), &path).unwrap();
    let place = shard.scan(0, 0).next_sample().unwrap().unwrap();
    shard.read(place).unwrap()
}

/// All pixels of an image, not turned, alpha dropped.
pub(crate) fn decoded(name: &str, bytes: &[u8]) -> RgbImage {
    decoded_frame(name, bytes, 0).unwrap()
}

/// The same of a frame, or why it cannot be.
pub(crate) fn decoded_frame(
    name: &str,
    bytes: &[u8],
    frame: usize,
) -> std::result::Result<RgbImage, BadSample> {
    let treatment = Treatment { alpha: Alpha::Drop, turn: false, max_pixels: 1 << 22 };
    decode(name, bytes, frame, &Header::read(name, bytes, frame, treatment.max_pixels)?, treatment)
}
