//! The laws of the loader: every sample once an epoch, an order that depends on seed and data alone, shares that
//! are kept.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use crate::loader::{Loaded, Loader, LoaderOptions};
use crate::order::{Cursor, Order};
use crate::sample::Pack;
use crate::source::Source;
use crate::spec::{Balance, DataSpec, Length, MixBy, SourceSpec};
use crate::state::Position;
use crate::testing::{encoder_for, gradient, png, spec, tar, text_sample, write_shards};

pub(super) fn shards_spec(dir: &Path, counts: &[usize]) -> DataSpec {
    let paths = write_shards(dir, counts);
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    spec(&paths.iter().map(String::as_str).collect::<Vec<_>>())
}

pub(super) fn open(spec: &DataSpec, options: LoaderOptions, position: Option<Position>) -> Loader {
    Loader::new(spec, encoder_for(&spec.text), options, position).unwrap()
}

pub(super) fn loader(spec: &DataSpec, threads: usize) -> Loader {
    open(spec, LoaderOptions::alone(threads), None)
}

pub(super) fn take(loader: &mut Loader, n: usize) -> Vec<Loaded> {
    (0..n).map(|_| loader.next_pack().unwrap()).collect()
}

/// Two sources, one of them with images and some broken samples.
pub(super) fn mixed_spec(dir: &Path) -> DataSpec {
    let mut spec = shards_spec(dir, &[9, 4, 13]);
    let mut members: Vec<(String, Vec<u8>)> = Vec::new();
    for n in 0..12_u32 {
        let mut image = png(&gradient(8 + n, 12));
        if n % 4 == 1 {
            image.truncate(image.len() * 2 / 3);
        }
        let json = if n % 6 == 2 { "{".to_owned() } else { text_sample("<image>\nwhat?", "that") };
        members.extend([(format!("i{n}.json"), json.into_bytes()), (format!("i{n}.png"), image)]);
    }
    let path = dir.join("images.tar");
    std::fs::write(&path, tar(&members)).unwrap();
    let images = SourceSpec::new("images", vec![path.display().to_string()]);
    spec.sources.push(SourceSpec { weight: 0.5, ..images });
    spec.streams = 3;
    spec.max_error_rate = 0.9;
    spec
}

#[test]
fn packs_are_well_formed() {
    let dir = tempfile::tempdir().unwrap();
    let spec = mixed_spec(dir.path());
    let mut loader = loader(&spec, 2);
    for (index, Loaded { pack, stream, .. }) in take(&mut loader, 30).into_iter().enumerate() {
        assert_eq!(stream, index % 3);
        let Some(Pack {
            ids,
            targets,
            weights,
            positions,
            cu_seqlens,
            images,
            images_per_sample,
            image_rows,
            samples,
        }) = pack
        else {
            panic!("stream {stream} is endless");
        };
        assert!(!samples.is_empty() && ids.len() <= spec.tokens_per_pack);
        assert_eq!([targets.len(), weights.len(), positions.len()], [ids.len(); 3]);
        assert_eq!((cu_seqlens.len(), cu_seqlens.last()), (samples.len() + 1, Some(&(ids.len() as i64))));
        for bounds in cu_seqlens.windows(2) {
            assert_eq!(positions[bounds[0] as usize], 0);
            assert_eq!(positions[bounds[1] as usize - 1], bounds[1] - bounds[0] - 1);
        }
        assert_eq!((images_per_sample.len(), images_per_sample.iter().sum()), (samples.len(), images.len()));
        assert_eq!(image_rows.len(), images.len() * spec.image.tokens_per_tile);
        assert_eq!(images.pixels.len(), images.len() * 3 * 8 * 8);
        assert!(image_rows.iter().all(|&row| ids[row as usize] == 259));
    }
    assert!(loader.tallies()["images"].skipped.contains_key("bad_json"));
    assert!(loader.tallies()["images"].skipped.contains_key("bad_image"));
}

#[test]
fn threads_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = mixed_spec(dir.path());
    for streams in [1, 3, 5] {
        spec.streams = streams;
        let expected = take(&mut loader(&spec, 1), 25);
        for threads in [2, 7] {
            assert!(
                take(&mut loader(&spec, threads), 25) == expected,
                "{streams} streams, {threads} threads"
            );
        }
    }
}

#[test]
fn seeds_and_epochs_change_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = shards_spec(dir.path(), &[30]);
    spec.shuffle_buffer = 16;
    let keys = |spec: &DataSpec| -> Vec<String> {
        let packs = take(&mut loader(spec, 1), 40);
        packs
            .into_iter()
            .filter_map(|loaded| loaded.pack)
            .flat_map(|pack| pack.samples)
            .map(|id| id.key)
            .collect()
    };
    let order = keys(&spec);
    assert_ne!(order[..30], order[30..60], "epochs differ");
    spec.seed += 1;
    assert_ne!(keys(&spec)[..30], order[..30], "seeds differ");
}

#[test]
fn sources_are_mixed_by_weight() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = shards_spec(dir.path(), &[10, 10]);
    let second = spec.sources[0].shards.pop().unwrap();
    spec.sources.push(SourceSpec { weight: 3.0, ..SourceSpec::new("second", vec![second]) });
    spec.streams = 2;
    let mut loader = loader(&spec, 2);
    take(&mut loader, 300);
    let tallies = loader.tallies();
    let share = tallies["second"].seen as f64 / (tallies["second"].seen + tallies["demo"].seen) as f64;
    assert!((share - 0.75).abs() < 0.04, "{share}");
}

#[test]
fn sources_are_mixed_by_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = mixed_spec(dir.path());
    (spec.mix_by, spec.tokens_per_pack) = (MixBy::Tokens, 400);
    let mut loader = loader(&spec, 2);
    take(&mut loader, 300);
    let tallies = loader.tallies();
    let tokens = |name: &str| tallies[name].tokens as f64;
    let share = tokens("images") / (tokens("images") + tokens("demo"));
    assert!((share - 1.0 / 3.0).abs() < 0.01, "{share}");
    assert!(tallies["images"].visual_tokens > 0 && tallies["demo"].visual_tokens == 0);
}

#[test]
fn a_limited_stream_gives_every_sample_as_often_as_asked() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = shards_spec(dir.path(), &[9, 4, 0, 13]);
    (spec.streams, spec.length) = (3, Length::Epochs(2));
    let mut loader = loader(&spec, 2);
    let mut times: BTreeMap<String, u64> = BTreeMap::new();
    while !loader.has_ended() {
        for id in loader.next_pack().unwrap().pack.into_iter().flat_map(|pack| pack.samples) {
            *times.entry(id.key).or_default() += 1;
        }
    }
    assert!(times.len() == 26 && times.values().all(|&n| n == 2), "{times:?}");
    let tally = &loader.tallies()["demo"];
    assert_eq!((tally.seen, tally.repeated, tally.total_skipped()), (52, 26, 0));
    assert!(take(&mut loader, 6).iter().all(|loaded| loaded.pack.is_none()), "it stays at its end");
}

#[test]
fn a_number_of_samples_is_kept_over_all_streams() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = mixed_spec(dir.path());
    for (samples, streams) in [(1, 3), (2, 3), (100, 3), (101, 4)] {
        (spec.length, spec.streams) = (Length::Samples(samples), streams);
        let mut loader = loader(&spec, 2);
        while !loader.has_ended() {
            loader.next_pack().unwrap();
        }
        assert_eq!(loader.tallies().values().map(|tally| tally.seen).sum::<u64>(), samples);
    }
}

#[test]
fn packs_are_full_and_have_equal_visual_work() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = mixed_spec(dir.path());
    (spec.tokens_per_pack, spec.pack_buffer, spec.shuffle_buffer) = (600, 96, 8);
    let measure = |balance| {
        let spec = DataSpec { balance, ..spec.clone() };
        let packs = take(&mut loader(&spec, 2), 150).into_iter().skip(30).filter_map(|loaded| loaded.pack);
        let loads: Vec<(usize, usize)> = packs.map(|pack| (pack.ids.len(), pack.image_rows.len())).collect();
        let n = loads.len() as f64;
        let fill = loads.iter().map(|(tokens, _)| *tokens as f64).sum::<f64>() / (600.0 * n);
        let mean = loads.iter().map(|(_, visual)| *visual as f64).sum::<f64>() / n;
        let deviation = loads.iter().map(|(_, visual)| (*visual as f64 - mean).abs()).sum::<f64>() / n / mean;
        (fill, deviation)
    };
    let (fill, uneven) = measure(Balance::Off);
    assert!(fill > 0.98, "{fill}");
    let (fill, even) = measure(Balance::Mean);
    assert!(fill > 0.97 && even < 0.5 * uneven, "fill {fill}, deviation {even} instead of {uneven}");
}

#[test]
fn no_sample_waits_longer_than_the_candidates() {
    // With a long and many short samples, best fit alone would put the long one off for ever.
    let dir = tempfile::tempdir().unwrap();
    let mut members = vec![("long.json".to_owned(), text_sample("q", &"a".repeat(200)))];
    members.extend((0..40).map(|n| (format!("s{n}.json"), text_sample("q", &"a".repeat(60)))));
    let path = dir.path().join("a.tar");
    std::fs::write(&path, tar(&members)).unwrap();
    let mut spec = spec(&[&path.display().to_string()]);
    spec.shuffle_buffer = 1;
    spec.pack_buffer = 8;
    let packs = take(&mut loader(&spec, 1), 12);
    let samples =
        packs.iter().take(9).filter_map(|loaded| loaded.pack.as_ref()).flat_map(|pack| &pack.samples);
    let keys = samples.map(|id| id.key.as_str());
    assert_eq!(keys.filter(|key| *key == "long").count(), 1);
}

/// All streams' samples, epoch by epoch, as the orders give them.
pub(super) fn epoch_counts(spec: &DataSpec, epochs: u64) -> Vec<BTreeMap<(u32, u64), usize>> {
    let source = std::sync::Arc::new(Source::open_all(spec).unwrap().remove(0));
    let mut counts = vec![BTreeMap::new(); epochs as usize];
    for stream in 0..spec.streams {
        let mut order =
            Order::new(source.clone(), stream, spec.streams, spec.shuffle_buffer, Cursor::default());
        loop {
            let sample = order.next_sample(&mut 0).unwrap().expect("it is endless");
            let Some(counts) = counts.get_mut(sample.epoch as usize) else { break };
            *counts.entry((sample.shard, sample.extent.offset)).or_default() += 1;
        }
    }
    counts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_epoch_sees_every_sample_once(
        counts in prop::collection::vec(0_usize..9, 1..7).prop_filter("a sample", |c| c.iter().any(|&n| n > 0)),
        streams in 1_usize..9,
        shuffle_buffer in 1_usize..9,
        seed in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = shards_spec(dir.path(), &counts);
        (spec.streams, spec.shuffle_buffer, spec.seed) = (streams, shuffle_buffer, seed);
        for epoch in epoch_counts(&spec, 3) {
            prop_assert_eq!(epoch.len(), counts.iter().sum::<usize>());
            prop_assert!(epoch.values().all(|&times| times == 1));
        }
    }

    #[test]
    fn packs_lose_and_repeat_nothing(
        counts in prop::collection::vec(1_usize..9, 1..5),
        streams in 1_usize..4,
        pack_buffer in 1_usize..8,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = shards_spec(dir.path(), &counts);
        (spec.streams, spec.pack_buffer, spec.tokens_per_pack) = (streams, pack_buffer, 150);
        let mut loader = loader(&spec, 2);
        let mut packed = 0;
        let mut times: BTreeMap<String, u64> = BTreeMap::new();
        let mut waiting = vec![0; streams];
        for _ in 0..40 {
            let Loaded { pack, stream, state } = loader.next_pack().unwrap();
            let samples = pack.unwrap().samples;
            packed += samples.len() as u64;
            waiting[stream] = state.waiting();
            for id in samples {
                *times.entry(id.key).or_default() += 1;
            }
        }
        let seen = loader.tallies()["demo"].seen;
        prop_assert_eq!(seen, packed + waiting.iter().sum::<usize>() as u64);
        if streams == 1 {
            // Epochs do not mix, so counts differ by the current epoch and by what waits as a candidate.
            let (least, most) = (times.values().min().unwrap(), times.values().max().unwrap());
            // There are enough for two packs, each sample of 20 tokens at least.
            let waiting = pack_buffer.max(2 * 150 / 20 + 8) as u64;
            prop_assert!(most - least <= 1 + waiting, "{:?}", times);
        }
    }
}
