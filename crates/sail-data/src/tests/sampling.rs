//! Sampling weights: each sample is read as often as its weight says, wherever the stream stops, and a file that does
//! not fit is refused.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::loading::{epoch_counts, loader, mixed_spec, open, shards_spec, take};
use crate::error::{Error, Result};
use crate::loader::{Loader, LoaderOptions};
use crate::sample::Pack;
use crate::spec::{DataSpec, Layout, Length, PageChoice};
use crate::tally::Tally;
use crate::testing::{encoder_for, tar, text_sample, weigh};
use crate::weights::{Origin, to_bytes};

/// All packs up to the end of all streams.
fn packs_to_the_end(loader: &mut Loader, streams: usize) -> Vec<Pack> {
    let mut packs = Vec::new();
    let mut empty = 0;
    while empty < streams {
        match loader.next_pack().unwrap().pack {
            Some(pack) => {
                packs.push(pack);
                empty = 0;
            }
            None => empty += 1,
        }
    }
    packs
}

#[test]
fn a_sample_is_read_as_often_as_its_weight_says() {
    const EPOCHS: u64 = 1500;
    let dir = tempfile::tempdir().unwrap();
    let counts = [6, 5];
    let weight = |shard: usize, n: usize| [1.0, 0.9, 0.5, 0.25, 0.02, 0.0][(shard * 3 + n) % 6];
    let mut spec = shards_spec(dir.path(), &counts);
    weigh(&mut spec, dir.path(), &counts, weight);
    let epochs = epoch_counts(&spec, EPOCHS);
    let offsets = |shard: u32| {
        let all = epoch_counts(&shards_spec(dir.path(), &counts), 1).remove(0);
        all.into_keys().filter(|key| key.0 == shard).map(|key| key.1).collect::<Vec<u64>>()
    };
    for (shard, samples) in counts.into_iter().enumerate() {
        for (n, offset) in offsets(shard as u32).into_iter().enumerate() {
            assert!(n < samples);
            let times = epochs.iter().filter_map(|epoch| epoch.get(&(shard as u32, offset))).sum::<usize>();
            let weight = f64::from(weight(shard, n));
            let (mean, deviation) =
                (weight * EPOCHS as f64, (EPOCHS as f64 * weight * (1.0 - weight)).sqrt());
            let off = (times as f64 - mean).abs();
            assert!(off <= 3.5 * deviation, "sample {n} of {shard}: {times} times at {weight}");
        }
    }
    for streams in [2, 5] {
        let other = DataSpec { streams, ..spec.clone() };
        assert!(epoch_counts(&other, 20)[..] == epochs[..20], "{streams} streams keep others");
    }
}

#[test]
fn what_is_left_out_is_counted_wherever_a_run_stops() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = mixed_spec(dir.path());
    weigh(&mut spec, dir.path(), &[9, 4, 13], |_, n| [0.8, 0.3][n % 2]);
    spec.length = Length::Epochs(3);
    let mut whole = loader(&spec, 2);
    let expected = packs_to_the_end(&mut whole, spec.streams);
    let tally = &whole.tallies()["demo"];
    assert_eq!(tally.seen + tally.left_out, 3 * 26, "{tally}");
    assert!((20..60).contains(&tally.left_out) && whole.tallies()["images"].left_out == 0, "{tally}");
    for stop in 1..expected.len() {
        let mut start = loader(&spec, 1);
        // Streams end at different packs: these turns have a pack each.
        let turns: Vec<Pack> = take(&mut start, stop).into_iter().filter_map(|turn| turn.pack).collect();
        let mut resumed = open(&spec, LoaderOptions::alone(2), Some(start.position()));
        let rest = packs_to_the_end(&mut resumed, spec.streams);
        assert!([turns, rest].concat() == expected, "stopped after turn {stop}");
        assert_eq!(resumed.tallies(), whole.tallies(), "stopped after turn {stop}");
    }
}

#[test]
fn a_number_of_samples_is_of_those_that_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = shards_spec(dir.path(), &[20]);
    weigh(&mut spec, dir.path(), &[20], |_, n| if n == 0 { 1.0 } else { 0.2 });
    spec.length = Length::Samples(30);
    let mut loader = loader(&spec, 1);
    packs_to_the_end(&mut loader, 1);
    let Tally { seen, left_out, .. } = loader.tallies()["demo"];
    assert!(seen == 30 && left_out > 60, "{seen} {left_out}");
}

#[test]
fn a_position_of_other_weights_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let plain = shards_spec(dir.path(), &[12]);
    let weighed = |weight: f32| {
        let mut spec = plain.clone();
        weigh(&mut spec, dir.path(), &[12], |_, n| if n == 7 { weight } else { 0.5 });
        spec
    };
    let spec = weighed(0.5);
    let mut start = loader(&spec, 1);
    take(&mut start, 1);
    let position = start.position();
    let resume = |spec: &DataSpec| {
        let alone = LoaderOptions::alone(1);
        Loader::new(spec, encoder_for(&spec.text), alone, Some(position.clone())).map(drop)
    };
    assert!(matches!(resume(&weighed(0.6)), Err(Error::StateMismatch { .. })));
    assert!(matches!(resume(&plain), Err(Error::StateMismatch { .. })));
    assert!(resume(&weighed(0.5)).is_ok(), "the same weights, written again");
}

/// What comes of a source of the shard `a.tar` with 3 samples, whose weights are this file.
fn outcome(file: impl FnOnce(&str) -> Vec<u8>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let shard = dir.path().join("a.tar").display().to_string();
    let members = ["0.json", "1.json", "2.json"].map(|name| (name, text_sample("q", "a")));
    std::fs::write(&shard, tar(&members)).unwrap();
    std::fs::write(dir.path().join("w.safetensors"), file(&shard)).unwrap();
    let read = read_all(&shard, &dir.path().join("w.safetensors"));
    let root = dir.path().display().to_string();
    read.map_or_else(|error| error.to_string().replace(&root, "DIR"), |()| "fine".to_owned())
}

fn read_all(shard: &str, weights: &Path) -> Result<()> {
    let mut spec = crate::testing::spec(&[shard]);
    spec.sources[0].sampling_weights = Some(weights.to_owned());
    spec.length = Length::Epochs(1);
    let mut loader = Loader::new(&spec, encoder_for(&spec.text), LoaderOptions::alone(1), None)?;
    while loader.next_pack()?.pack.is_some() {}
    Ok(())
}

/// A file with one tensor.
fn tensor(name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
    let view = TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
    safetensors::serialize([(name, view)], None).unwrap()
}

/// A file with these weights for a shard, as another program may write it.
fn plain(shard: &str, weights: &[f32]) -> Vec<u8> {
    let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    tensor(shard, Dtype::F32, &[weights.len()], &bytes)
}

/// The same as `sail-data rebalance` writes it, of a shard of this size and layout.
fn made_of(shard: &str, bytes: u64, layout: Layout) -> Vec<u8> {
    let shard_bytes = BTreeMap::from([(shard.to_owned(), bytes)]);
    let origin = Origin { n: 4, threshold: 0.001, layout, shard_bytes };
    to_bytes(&origin, &BTreeMap::from([(shard.to_owned(), vec![1.0, 0.5, 0.5])])).unwrap()
}

#[test]
fn a_file_that_does_not_fit_is_refused_and_told_why() {
    assert_eq!(outcome(|shard| plain(shard, &[1.0, 0.0, 0.5])), "fine");
    let size = |shard: &str| std::fs::metadata(shard).unwrap().len();
    assert_eq!(outcome(|shard| made_of(shard, size(shard), Layout::Conversations)), "fine");
    let messages = [
        outcome(|_| b"{}".to_vec()),
        outcome(|shard| plain(&format!("other/{shard}"), &[1.0; 3])),
        outcome(|shard| tensor(shard, Dtype::F16, &[3], &[0; 6])),
        outcome(|shard| tensor(shard, Dtype::F32, &[3, 1], &[0; 12])),
        outcome(|shard| plain(shard, &[1.0, 1.5, 1.0])),
        outcome(|shard| plain(shard, &[-0.5, 1.0, 1.0])),
        outcome(|shard| plain(shard, &[1.0, 1.0, f32::NAN])),
        outcome(|shard| plain(shard, &[0.25, 0.25, 0.0])),
        outcome(|shard| plain(shard, &[1.0; 2])),
        outcome(|shard| plain(shard, &[1.0; 4])),
        outcome(|shard| made_of(shard, 99, Layout::Conversations)),
        outcome(|shard| made_of(shard, size(shard), Layout::Captions)),
        outcome(|_| {
            let metadata = HashMap::from([("rebalance".to_owned(), "{".to_owned())]);
            safetensors::serialize(Vec::<(&str, TensorView)>::new(), Some(metadata)).unwrap()
        }),
    ];
    // All have the hint that the next test shows.
    let messages = messages.map(|message| message.split_once("\n\nhint: ").unwrap().0.to_owned());
    insta::assert_snapshot!(messages.join("\n"), @r"
    source `demo`: the sampling weights `DIR/w.safetensors` are no safetensors file: header too small
    source `demo`: the sampling weights `DIR/w.safetensors` have none for the shard `DIR/a.tar`
    source `demo`: the sampling weights `DIR/w.safetensors` have F16 of [3] for the shard `DIR/a.tar`, expected F32 of [samples]
    source `demo`: the sampling weights `DIR/w.safetensors` have F32 of [3, 1] for the shard `DIR/a.tar`, expected F32 of [samples]
    source `demo`: the sampling weights `DIR/w.safetensors` give sample 1 of the shard `DIR/a.tar` the weight 1.5, expected a number from 0 to 1
    source `demo`: the sampling weights `DIR/w.safetensors` give sample 0 of the shard `DIR/a.tar` the weight -0.5, expected a number from 0 to 1
    source `demo`: the sampling weights `DIR/w.safetensors` give sample 2 of the shard `DIR/a.tar` the weight NaN, expected a number from 0 to 1
    source `demo`: the sampling weights `DIR/w.safetensors` keep 0.500 samples an epoch, expected at least 1
    source `demo`: the sampling weights `DIR/w.safetensors` have 2 weights for the shard `DIR/a.tar`, which has more samples
    source `demo`: the sampling weights `DIR/w.safetensors` have 4 weights for the shard `DIR/a.tar`, which has 3 samples
    source `demo`: the sampling weights `DIR/w.safetensors` were made of the shard `DIR/a.tar` when it had 99 bytes, now 4096
    source `demo`: the sampling weights `DIR/w.safetensors` were made of samples read as `captions`, and the source reads `conversations`
    source `demo`: the sampling weights `DIR/w.safetensors` have metadata that cannot be read: EOF while parsing an object at line 1 column 1
    ");
}

#[test]
fn weights_of_one_page_are_not_those_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = shards_spec(dir.path(), &[3]);
    let (shard, path) = (spec.sources[0].shards[0].clone(), dir.path().join("w.safetensors"));
    (spec.sources[0].layout, spec.sources[0].sampling_weights) = (Layout::Pages, Some(path.clone()));
    let bytes = std::fs::metadata(&shard).unwrap().len();
    std::fs::write(&path, made_of(&shard, bytes, Layout::Pages)).unwrap();
    assert!(crate::check_sources(&spec).is_ok());
    spec.sources[0].page = PageChoice::Random;
    let message = crate::check_sources(&spec).unwrap_err().to_string();
    assert!(message.contains("takes a random one, expected `page: first`\n"), "{message}");
    // Who wrote weights of whole documents did so on purpose.
    std::fs::write(&path, plain(&shard, &[1.0; 3])).unwrap();
    assert!(crate::check_sources(&spec).is_ok());
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = shards_spec(dir.path(), &[1]);
    spec.sources[0].sampling_weights = Some("no/w.safetensors".into());
    insta::assert_snapshot!(crate::check_sources(&spec).unwrap_err(), @r"
    source `demo`: the sampling weights `no/w.safetensors` cannot be read: No such file or directory (os error 2)

    hint: write them again with `sail-data rebalance`, with the shards and the `layout` of the source
    ");
    spec.sources[0].sampling_weights = Some("s3://bucket/w.safetensors".into());
    let error = crate::check_sources(&spec).unwrap_err().to_string();
    assert!(error.contains("are elsewhere, expected a local file"), "{error}");
}
