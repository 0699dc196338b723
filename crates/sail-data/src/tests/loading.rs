//! The laws of the loader: every sample once an epoch, order that depends on seed and data alone, exact
//! resumption from every state.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use crate::error::Error;
use crate::loader::{Loaded, Loader};
use crate::order::{Cursor, Order};
use crate::sample::Pack;
use crate::source::Source;
use crate::spec::{DataSpec, SourceSpec};
use crate::stream::StreamState;
use crate::testing::{encoder_for, gradient, png, spec, tar, text_sample, write_shards};

fn shards_spec(dir: &Path, counts: &[usize]) -> DataSpec {
    let paths = write_shards(dir, counts);
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    spec(&paths.iter().map(String::as_str).collect::<Vec<_>>())
}

fn loader(spec: &DataSpec, threads: usize) -> Loader {
    Loader::new(spec, encoder_for(&spec.text), None, 0, threads).unwrap()
}

fn take(loader: &mut Loader, n: usize) -> Vec<Loaded> {
    (0..n).map(|_| loader.next_pack().unwrap()).collect()
}

/// Two sources, one of them with images and some broken samples.
fn mixed_spec(dir: &Path) -> DataSpec {
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
        let Pack {
            ids,
            targets,
            weights,
            positions,
            cu_seqlens,
            images,
            images_per_sample,
            image_rows,
            samples,
        } = pack;
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
    assert!(loader.skipped()["images"].contains_key("bad_json"));
    assert!(loader.skipped()["images"].contains_key("bad_image"));
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
fn a_run_resumes_exactly_from_every_state() {
    let dir = tempfile::tempdir().unwrap();
    let spec = mixed_spec(dir.path());
    let encoder = encoder_for(&spec.text);
    let expected = take(&mut loader(&spec, 2), 40);
    let mut start = loader(&spec, 1);
    let mut latest: Vec<Option<StreamState>> = vec![None; 3];
    for stop in 0..24 {
        let loaded = start.next_pack().unwrap();
        latest[loaded.stream] = Some(loaded.state);
        let Some(states) = latest.iter().cloned().collect::<Option<Vec<_>>>() else { continue };
        let saved = serde_json::to_string(&states).unwrap();
        let states: Vec<StreamState> = serde_json::from_str(&saved).unwrap();
        assert_eq!(serde_json::to_string(&states).unwrap(), saved);
        let next_stream = (stop + 1) % 3;
        let mut resumed = Loader::new(&spec, encoder.clone(), Some(states), next_stream, 2).unwrap();
        assert_eq!(resumed.tallies(), start.tallies());
        assert!(take(&mut resumed, 8) == expected[stop + 1..stop + 9], "stopped after pack {stop}");
    }
}

#[test]
fn a_state_of_other_data_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spec = shards_spec(dir.path(), &[5, 5]);
    let encoder = encoder_for(&spec.text);
    let state = loader(&spec, 1).next_pack().unwrap().state;
    let changes: [fn(&mut DataSpec); 5] = [
        |s| s.seed = 8,
        |s| s.streams = 2,
        |s| s.sources[0].name = "other".into(),
        |s| drop(s.sources[0].shards.pop()),
        |s| s.sources[0].shards.reverse(),
    ];
    for change in changes {
        let mut changed = spec.clone();
        change(&mut changed);
        let refused = Loader::new(&changed, encoder.clone(), Some(vec![state.clone()]), 0, 1);
        assert!(matches!(refused, Err(Error::StateMismatch { .. })));
    }
    let mut harmless = spec.clone();
    harmless.pack_buffer = 9;
    assert!(Loader::new(&harmless, encoder.clone(), Some(vec![state]), 0, 1).is_ok());
    for (next_stream, threads) in [(1, 1), (0, 0)] {
        let refused = Loader::new(&spec, encoder.clone(), None, next_stream, threads);
        assert!(matches!(refused, Err(Error::InvalidSpec { .. })));
    }
}

#[test]
fn seeds_and_epochs_change_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = shards_spec(dir.path(), &[30]);
    spec.shuffle_buffer = 16;
    let keys = |spec: &DataSpec| -> Vec<String> {
        let packs = take(&mut loader(spec, 1), 40);
        packs.into_iter().flat_map(|loaded| loaded.pack.samples).map(|id| id.key).collect()
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
    let keys = packs.iter().take(9).flat_map(|loaded| &loaded.pack.samples).map(|id| id.key.as_str());
    assert_eq!(keys.filter(|key| *key == "long").count(), 1);
}

/// All streams' samples, epoch by epoch, as the orders give them.
fn epoch_counts(spec: &DataSpec, epochs: u64) -> Vec<BTreeMap<(u32, u64), usize>> {
    let source = std::sync::Arc::new(Source::open_all(spec).unwrap().remove(0));
    let mut counts = vec![BTreeMap::new(); epochs as usize];
    for stream in 0..spec.streams {
        let mut order =
            Order::new(source.clone(), stream, spec.streams, spec.shuffle_buffer, Cursor::default());
        loop {
            let sample = order.next_sample().unwrap();
            if order.cursor().epoch() >= epochs {
                break;
            }
            *counts[order.cursor().epoch() as usize]
                .entry((sample.shard, sample.extent.offset))
                .or_default() += 1;
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
    fn any_stream_resumes_from_any_state(
        counts in prop::collection::vec(0_usize..7, 1..5).prop_filter("a sample", |c| c.iter().any(|&n| n > 0)),
        streams in 1_usize..5,
        (shuffle_buffer, pack_buffer) in (1_usize..6, 1_usize..6),
        packs in 1_usize..12,
        seed in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = shards_spec(dir.path(), &counts);
        (spec.streams, spec.seed, spec.tokens_per_pack) = (streams, seed, 150);
        (spec.shuffle_buffer, spec.pack_buffer) = (shuffle_buffer, pack_buffer);
        let rounds = take(&mut loader(&spec, 2), streams * (packs + 3));
        let (before, after) = rounds.split_at(streams * packs);
        let states = before[before.len() - streams..].iter().map(|loaded| loaded.state.clone()).collect();
        let mut resumed = Loader::new(&spec, encoder_for(&spec.text), Some(states), 0, 3).unwrap();
        prop_assert!(take(&mut resumed, after.len()) == after);
        for loaded in rounds {
            prop_assert!(loaded.pack.ids.len() <= spec.tokens_per_pack);
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
            let loaded = loader.next_pack().unwrap();
            packed += loaded.pack.samples.len() as u64;
            waiting[loaded.stream] = loaded.state.waiting();
            for id in loaded.pack.samples {
                *times.entry(id.key).or_default() += 1;
            }
        }
        let seen = loader.tallies()["demo"].seen;
        prop_assert_eq!(seen, packed + waiting.iter().sum::<usize>() as u64);
        if streams == 1 {
            // Epochs do not mix, so counts differ by the current epoch and by what waits as a candidate.
            let (least, most) = (times.values().min().unwrap(), times.values().max().unwrap());
            prop_assert!(most - least <= 1 + pack_buffer as u64, "{:?}", times);
        }
    }
}
