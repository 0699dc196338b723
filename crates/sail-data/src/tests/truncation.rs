//! Samples with more tokens than a pack: cut, dropped, or the end of the run.

use proptest::prelude::*;

use crate::annotation::{Role, Turn};
use crate::error::{BadSample, Error};
use crate::heldout::read_samples;
use crate::sample::IGNORE;
use crate::spec::{DataSpec, LossWeight, TextSpec, TooLong};
use crate::testing::{encoder_for, gradient, jpeg, spec, tar, text_sample, text_spec};

/// Images of 3 visual tokens; the byte-level test tokenizer has 256 and 257 as start and end of a turn.
const BLOCK: [i64; 5] = [258, 259, 259, 259, 260];

fn conversation() -> impl Strategy<Value = Vec<Turn>> {
    let turn = (any::<bool>(), "[a-z ]{0,12}", 0..3usize).prop_map(|(asks, text, images)| {
        let (role, images) = if asks { (Role::User, images) } else { (Role::Assistant, 0) };
        Turn { role, text: format!("{}{text}", "<image>x".repeat(images)) }
    });
    proptest::collection::vec(turn, 1..8)
}

fn marks(turns: &[Turn]) -> usize {
    turns.iter().map(|turn| turn.text.matches("<image>").count()).sum()
}

proptest! {
    #[test]
    fn a_cut_sample_is_the_beginning_of_the_whole(turns in conversation(), limit in 0..160usize) {
        let encoder = encoder_for(&TextSpec { loss_weight: LossWeight::Sample, ..text_spec() });
        let images = marks(&turns);
        let visual_tokens = vec![3; images];
        let whole = match encoder.encode(&turns, &visual_tokens) {
            Ok(whole) => whole,
            Err(cause) => {
                prop_assert_eq!(encoder.encode_within(&turns, &visual_tokens, usize::MAX), Err(cause));
                return Ok(());
            }
        };
        prop_assert_eq!(whole.images, images);
        let tokens = whole.ids.len();
        let cut = match encoder.encode_within(&turns, &visual_tokens, limit) {
            Ok(cut) => cut,
            Err(cause) => {
                prop_assert_eq!(cause, BadSample::TooLong { tokens, limit });
                let learnt = whole.targets[..limit.saturating_sub(1)].iter().any(|&target| target != IGNORE);
                // Only an image before the first answer takes what the limit would leave.
                prop_assert!(!learnt || whole.image_rows.contains(&(limit as i64)));
                return Ok(());
            }
        };
        let length = cut.ids.len();
        prop_assert!(length <= limit.min(tokens));
        prop_assert_eq!(&cut.ids[..], &whole.ids[..length]);
        if tokens <= limit {
            prop_assert_eq!(&cut, &whole);
        } else {
            // What is missing from the limit is an image that it would have split.
            prop_assert!(limit - length < BLOCK.len());
            prop_assert!(length == limit || whole.ids[length..].starts_with(&BLOCK));
        }
        prop_assert_eq!(cut.ids.iter().filter(|&&id| id == BLOCK[0]).count(), cut.images);
        prop_assert_eq!(cut.ids.windows(5).filter(|window| *window == BLOCK).count(), cut.images);
        prop_assert_eq!(&cut.image_rows[..], &whole.image_rows[..3 * cut.images]);
        prop_assert_eq!(&cut.targets[..length - 1], &whole.targets[..length - 1]);
        prop_assert_eq!(cut.targets[length - 1], IGNORE);
        let weight: f32 = cut.weights.iter().sum();
        prop_assert!((weight - 1.0).abs() < 1e-5, "a cut sample counts as one: {}", weight);
    }
}

#[test]
fn a_cut_answer_is_learnt_up_to_the_cut() {
    let encoder = encoder_for(&text_spec());
    let turns = [(Role::User, "q"), (Role::Assistant, "abcdef")];
    let turns = turns.map(|(role, text)| Turn { role, text: text.to_owned() });
    let whole = encoder.encode(&turns, &[]).unwrap();
    let learnt: Vec<i64> = whole.targets.iter().copied().filter(|&id| id != IGNORE).collect();
    let header = whole.targets.iter().position(|&id| id != IGNORE).unwrap() + 1;
    let cut = encoder.encode_within(&turns, &[], header + 2).unwrap();
    let kept: Vec<i64> = cut.targets.iter().copied().filter(|&id| id != IGNORE).collect();
    assert_eq!(kept, learnt[..2], "no end token is invented");
    let too_short = BadSample::TooLong { tokens: whole.ids.len(), limit: header };
    assert_eq!(encoder.encode_within(&turns, &[], header), Err(too_short));
}

fn data(dir: &std::path::Path, too_long: TooLong, tokens_per_pack: usize) -> DataSpec {
    let path = dir.join("long.tar");
    let long = text_sample("<image>q<image>", &"a".repeat(90));
    let picture = jpeg(&gradient(8, 8));
    let members: Vec<(String, Vec<u8>)> = vec![
        ("long.json".into(), long.into_bytes()),
        ("long.0.jpg".into(), picture.clone()),
        ("long.1.jpg".into(), picture),
        ("short.json".into(), text_sample("q", "a").into_bytes()),
    ];
    std::fs::write(&path, tar(&members)).unwrap();
    DataSpec { too_long, tokens_per_pack, max_error_rate: 0.9, ..spec(&[path.to_str().unwrap()]) }
}

#[test]
fn the_specification_says_what_becomes_of_a_long_sample() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = encoder_for(&text_spec());
    let read = |too_long, limit| read_samples(&data(dir.path(), too_long, limit), &encoder, None);

    let dropped = read(TooLong::Drop, 60).unwrap();
    assert_eq!(dropped.iter().map(|sample| sample.id.key.as_str()).collect::<Vec<_>>(), ["short"]);

    let cut = read(TooLong::TruncateText, 60).unwrap();
    assert_eq!(cut.iter().map(|sample| sample.ids.len()).collect::<Vec<_>>(), [60, cut[1].ids.len()]);
    assert_eq!((cut[0].images.len(), cut[0].image_rows.len()), (2, 8));

    let error = read(TooLong::Error, 60).unwrap_err();
    assert!(matches!(&error, Error::SampleTooLong { key, limit: 60, .. } if key == "long"), "{error}");
    let message = error.to_string();
    assert!(
        message.contains("`long`") && message.contains("long.tar") && message.contains("hint"),
        "{message}"
    );
}

#[test]
fn images_behind_the_cut_are_not_decoded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late.tar");
    let turns = serde_json::json!({"conversations": [
        {"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"},
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]});
    let picture = jpeg(&gradient(8, 8));
    let members: Vec<(String, Vec<u8>)> = vec![
        ("late.json".into(), turns.to_string().into_bytes()),
        ("late.0.jpg".into(), picture.clone()),
        ("late.1.jpg".into(), picture),
    ];
    std::fs::write(&path, tar(&members)).unwrap();
    let base = spec(&[path.to_str().unwrap()]);
    let cut = DataSpec { too_long: TooLong::TruncateText, tokens_per_pack: 38, ..base };
    let samples = read_samples(&cut, &encoder_for(&text_spec()), None).unwrap();
    assert_eq!((samples[0].images.len(), samples[0].image_rows.len()), (1, 4));
}
