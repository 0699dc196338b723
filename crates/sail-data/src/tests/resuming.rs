//! Exact and elastic resumption: the sequence of packs does not depend on ranks, threads or restarts.

use proptest::prelude::*;

use super::loading::{loader, mixed_spec, open, shards_spec, take};
use crate::error::Error;
use crate::loader::{Loaded, Loader, LoaderOptions};
use crate::source::Source;
use crate::spec::{Balance, DataSpec, Length, MixBy};
use crate::state::{Position, StreamState};
use crate::testing::{encoder_for, weigh};
use crate::tools::index::write_index;

/// Turns of all streams as `world` ranks read them, put together in the global order.
fn read_with(
    spec: &DataSpec,
    (world, threads): (usize, usize),
    position: Option<&Position>,
    turns: usize,
) -> (Vec<Loaded>, Vec<Loader>) {
    let options = |rank| LoaderOptions { threads, rank, world };
    let mut ranks: Vec<Loader> =
        (0..world).map(|rank| open(spec, options(rank), position.cloned())).collect();
    ((0..turns).map(|turn| ranks[turn % world].next_pack().unwrap()).collect(), ranks)
}

/// Where the ranks stand, as a checkpoint keeps it.
fn saved_position(ranks: &[Loader]) -> Position {
    let merged = Position::merge(ranks.iter().rev().map(Loader::position).collect()).unwrap();
    let saved = serde_json::to_string(&merged).unwrap();
    let read: Position = serde_json::from_str(&saved).unwrap();
    assert!(read == merged && serde_json::to_string(&read).unwrap() == saved);
    read
}

#[test]
fn a_run_resumes_exactly_after_every_pack() {
    let dir = tempfile::tempdir().unwrap();
    let spec = mixed_spec(dir.path());
    let expected = take(&mut loader(&spec, 2), 40);
    let mut start = loader(&spec, 1);
    for stop in 1..24 {
        start.next_pack().unwrap();
        let mut resumed = open(&spec, LoaderOptions::alone(2), Some(start.position()));
        assert_eq!(resumed.tallies(), start.tallies());
        assert!(take(&mut resumed, 8) == expected[stop..stop + 8], "stopped after pack {stop}");
    }
}

#[test]
fn indexes_change_nothing_but_the_way_through_a_shard() {
    let dir = tempfile::tempdir().unwrap();
    let spec = DataSpec { streams: 5, ..shards_spec(dir.path(), &[9, 30]) };
    let expected = take(&mut loader(&spec, 2), 60);
    let mut without = loader(&spec, 1);
    take(&mut without, 20);
    let before = without.position();
    let source = Source::open_all(&spec).unwrap().remove(0);
    for shard in 0..2 {
        write_index(&source, shard).unwrap();
    }
    let mut with = loader(&spec, 2);
    assert!(take(&mut with, 60) == expected);
    let mut resumed = open(&spec, LoaderOptions::alone(1), Some(before));
    assert!(take(&mut resumed, 20) == expected[20..40], "an index came between stop and resume");
    let between = resumed.position();
    for shard in &source.shards {
        std::fs::remove_file(format!("{shard}.idx")).unwrap();
    }
    let mut resumed = open(&spec, LoaderOptions::alone(1), Some(between));
    assert!(take(&mut resumed, 20) == expected[40..], "and went again");
}

#[test]
fn a_state_of_other_data_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spec = shards_spec(dir.path(), &[5, 5]);
    let encoder = encoder_for(&spec.text);
    let alone = LoaderOptions::alone(1);
    let mut saved = loader(&spec, 1);
    saved.next_pack().unwrap();
    let position = saved.position();
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
        let refused = Loader::new(&changed, encoder.clone(), alone, Some(position.clone()));
        assert!(matches!(refused, Err(Error::StateMismatch { .. })));
    }
    let shard = &spec.sources[0].shards[1];
    let whole = std::fs::read(shard).unwrap();
    std::fs::write(shard, [&whole[..], &[0; 512]].concat()).unwrap();
    let refused = Loader::new(&spec, encoder.clone(), alone, Some(position.clone()));
    assert!(matches!(refused, Err(Error::StateMismatch { .. })), "a shard of another size");
    std::fs::write(shard, whole).unwrap();
    let harmless = DataSpec { pack_buffer: 9, ..spec.clone() };
    assert!(Loader::new(&harmless, encoder.clone(), alone, Some(position.clone())).is_ok());
    let refusals = [
        LoaderOptions { threads: 0, ..alone },
        LoaderOptions { world: 2, ..alone },
        LoaderOptions { rank: 1, ..alone },
        LoaderOptions { world: 0, ..alone },
    ];
    for options in refusals {
        let refused = Loader::new(&spec, encoder.clone(), options, None);
        assert!(matches!(refused, Err(Error::InvalidSpec { .. })), "{options:?}");
    }
    assert!(matches!(Position::merge(vec![position.clone(), position]), Err(Error::StateMismatch { .. })));
}

#[test]
fn a_position_inside_a_step_of_all_ranks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spec = DataSpec { streams: 4, ..shards_spec(dir.path(), &[5, 5]) };
    let position = saved_position(&read_with(&spec, (1, 1), None, 3).1);
    for world in [2, 4] {
        let options = LoaderOptions { threads: 1, rank: 0, world };
        let refused = Loader::new(&spec, encoder_for(&spec.text), options, Some(position.clone()));
        assert!(matches!(refused, Err(Error::StateMismatch { .. })));
    }
}

#[test]
fn a_sample_that_went_bad_while_it_waited_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let spec = DataSpec { tokens_per_pack: 80, ..shards_spec(dir.path(), &[40]) };
    let mut start = loader(&spec, 1);
    start.next_pack().unwrap();
    let position = start.position();
    assert!(position.streams[0].waiting() > 0);
    let shard = &spec.sources[0].shards[0];
    let spoiled = String::from_utf8(std::fs::read(shard).unwrap()).unwrap().replace("gpt", "cat");
    std::fs::write(shard, spoiled).unwrap();
    let error = open(&spec, LoaderOptions::alone(1), Some(position)).next_pack().unwrap_err();
    assert!(matches!(&error, Error::StateMismatch { detail } if detail.contains("is not now")), "{error}");
}

#[test]
fn going_to_a_position_of_other_data_leaves_a_loader_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let spec = mixed_spec(dir.path());
    let other = loader(&DataSpec { seed: 8, ..spec.clone() }, 1).position();
    let expected = take(&mut loader(&spec, 1), 12);
    let mut stays = loader(&spec, 3);
    assert!(take(&mut stays, 4) == expected[..4]);
    assert!(matches!(stays.go_to(other), Err(Error::StateMismatch { .. })));
    assert!(take(&mut stays, 8) == expected[4..]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn going_to_a_position_is_resuming_there(
        // Packs taken, then the position gone to, before or after where the loader stands.
        moves in prop::collection::vec((0_usize..14, 0_usize..14), 1..5),
        (world, threads) in (prop::sample::select(vec![1_usize, 2]), 1_usize..5),
        ends in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = mixed_spec(dir.path());
        spec.streams = 4;
        // Short enough for streams to end on the way.
        spec.length = if ends { Length::Epochs(2) } else { Length::Endless };
        let options = LoaderOptions { threads, rank: world - 1, world };
        let mut whole = open(&spec, LoaderOptions { threads: 1, ..options }, None);
        let mut positions = vec![whole.position()];
        let mut expected = Vec::new();
        for _ in 0..32 {
            expected.extend(take(&mut whole, 1));
            positions.push(whole.position());
        }
        let mut moved = open(&spec, options, None);
        let mut at = 0;
        for (packs, to) in moves {
            prop_assert!(take(&mut moved, packs) == expected[at..at + packs], "{packs} packs after {at}");
            moved.go_to(positions[to].clone()).unwrap();
            let mut resumed = open(&spec, options, Some(positions[to].clone()));
            prop_assert_eq!(moved.position(), resumed.position());
            prop_assert_eq!(moved.tallies(), resumed.tallies());
            prop_assert!(take(&mut resumed, 4) == expected[to..to + 4]);
            at = to;
        }
        prop_assert!(take(&mut moved, 8) == expected[at..at + 8], "{world} ranks, {threads} threads");
        prop_assert_eq!(moved.position(), positions[at + 8].clone());
    }

    #[test]
    fn any_world_gives_the_same_packs_and_resumes_in_any_other(
        counts in prop::collection::vec(0_usize..7, 1..5).prop_filter("a sample", |c| c.iter().any(|&n| n > 0)),
        streams in prop::sample::select(vec![1_usize, 2, 4, 6, 12]),
        worlds in (0_usize..8, 0_usize..8),
        (shuffle_buffer, pack_buffer) in (1_usize..6, 1_usize..9),
        (before, after) in (0_usize..40, 1_usize..20),
        (by_tokens, mean, weighed, length) in (any::<bool>(), any::<bool>(), any::<bool>(), 0_u64..3),
        seed in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = shards_spec(dir.path(), &counts);
        if weighed {
            let first = counts.iter().position(|&n| n > 0).unwrap();
            weigh(&mut spec, dir.path(), &counts, |shard, n| if (shard, n) == (first, 0) { 1.0 } else { 0.6 });
        }
        // In a folder of its own, as its shards have the same names.
        let folder = tempfile::tempdir().unwrap();
        let mixed = mixed_spec(folder.path());
        spec.sources.extend(mixed.sources.into_iter().skip(1));
        (spec.streams, spec.seed, spec.tokens_per_pack, spec.max_error_rate) = (streams, seed, 150, 0.9);
        (spec.shuffle_buffer, spec.pack_buffer) = (shuffle_buffer, pack_buffer);
        spec.mix_by = if by_tokens { MixBy::Tokens } else { MixBy::Samples };
        spec.balance = if mean { Balance::Mean } else { Balance::Off };
        spec.length = [Length::Endless, Length::Epochs(2), Length::Samples(33)][length as usize];
        let divisors: Vec<usize> = (1..=streams).filter(|world| streams % world == 0).collect();
        let (first, second) = (divisors[worlds.0 % divisors.len()], divisors[worlds.1 % divisors.len()]);
        // A step is a whole number of turns of every rank, before the stop and after it.
        let before = before.next_multiple_of(first * second);
        let (expected, _) = read_with(&spec, (1, 1), None, before + after);
        let (mut taken, ranks) = read_with(&spec, (first, 2), None, before);
        let position = saved_position(&ranks);
        taken.extend(read_with(&spec, (second, 3), Some(&position), after).0);
        prop_assert!(taken == expected, "{first} ranks, then {second}");
        for pack in taken.iter().filter_map(|loaded| loaded.pack.as_ref()) {
            prop_assert!(pack.ids.len() <= spec.tokens_per_pack);
        }
        prop_assert!(position.streams.iter().map(StreamState::stream).eq(0..streams));
    }
}
