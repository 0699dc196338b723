//! One sample as the model sees it: turns, tokens with their labels, images and tiles.
//!
//! `text` and `html` show it.

mod html;
mod text;

use image::RgbImage;

pub(crate) use html::page;
pub(crate) use text::{Paint, report, tiles};

use super::access::{PictureFacts, Setup, pictures, tile_pictures};
use super::error::{Result, ToolError};
use crate::annotation::Turn;
use crate::sample::{IGNORE, Sample, SampleId};
use crate::shard::SampleRef;
use crate::shard::index::Index;
use crate::source::Source;
use crate::text::TextEncoder;

/// A sample, ready to be shown.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) id: SampleId,
    pub(crate) turns: Vec<Turn>,
    /// Empty when text was not tokenised.
    pub(crate) pieces: Vec<Piece>,
    pub(crate) images: Vec<PictureFacts>,
    /// Of all images in turn, each with its thumbnail at the end.
    pub(crate) tiles: Vec<RgbImage>,
    pub(crate) counts: Counts,
}

/// Numbers of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Counts {
    pub(crate) tokens: usize,
    pub(crate) visual: usize,
    pub(crate) answers: usize,
    /// Sum of the loss weights.
    pub(crate) weight: f64,
}

/// What a piece of the token sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Ordinary text.
    Text,
    /// A token that only the template writes.
    Special,
    /// The visual tokens of one image.
    Visual,
}

/// Tokens that are shown together: one, those that share a character, or the visual tokens of an image.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) ids: Vec<i64>,
    pub(crate) text: String,
    pub(crate) kind: Kind,
    /// The loss weight of its tokens when they are learnt.
    pub(crate) weight: Option<f32>,
}

/// Which sample to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// The first with this key.
    Key(String),
    /// This one, counted over all shards from 0.
    Nth(u64),
}

/// Finds a sample and makes everything of it that training would.
///
/// # Errors
/// [`ToolError::NoSample`], [`ToolError::Unusable`], those of the shards.
pub(crate) fn view(setup: &Setup, which: &Which) -> Result<View> {
    let (source, place) = find(setup, which)?;
    let drafted = setup.draft(source, place)?;
    let unusable = |rejected: Box<crate::draft::Rejected>| {
        let (id, cause) = (rejected.id, rejected.cause);
        ToolError::Unusable { shard: id.shard, key: id.key, cause }
    };
    let draft = drafted.draft.map_err(unusable)?;
    let images = pictures(&draft, &setup.spec.image);
    let turns = draft.turns().to_vec();
    let sample = setup.finish(draft).map_err(unusable)?;
    let pieces = if setup.counts_text { pieces(setup, &sample) } else { Vec::new() };
    let counts = Counts {
        tokens: sample.ids.len(),
        visual: sample.image_rows.len(),
        answers: sample.answer_tokens(),
        weight: sample.weights.iter().map(|&weight| f64::from(weight)).sum(),
    };
    let tiles = tile_pictures(&sample, &setup.spec.image);
    Ok(View { id: sample.id, turns, pieces, images, tiles, counts })
}

fn find<'a>(setup: &'a Setup, which: &Which) -> Result<(&'a Source, SampleRef)> {
    let mut passed = 0;
    for source in &setup.sources {
        for shard in 0..source.shards.len() {
            let place = |extent| (source, SampleRef { shard: shard as u32, epoch: 0, extent });
            if let Which::Nth(n) = which
                && let Some(index) = Index::open(&source.store, &source.shards[shard])?
            {
                match index.extent(n - passed)? {
                    Some(extent) => return Ok(place(extent)),
                    None => passed += index.len(),
                }
                continue;
            }
            let opened = source.open(shard)?;
            let mut scanner = opened.scan(0, 0);
            while let Some(extent) = scanner.next_sample()? {
                let found = match which {
                    Which::Nth(n) => passed == *n,
                    Which::Key(key) => opened.read(extent)?.key == *key,
                };
                if found {
                    return Ok(place(extent));
                }
                passed += 1;
            }
        }
    }
    let wanted = match which {
        Which::Key(key) => format!("with the key `{key}`"),
        Which::Nth(n) => format!("number {n}"),
    };
    let searched = match passed {
        0 => "the shards hold none".to_owned(),
        1 => "the shards hold one, number 0".to_owned(),
        _ => format!("the shards hold {passed}, from number 0 on"),
    };
    Err(ToolError::NoSample { wanted, searched })
}

fn pieces(setup: &Setup, sample: &Sample) -> Vec<Piece> {
    let specials = setup.encoder.structure_tokens();
    let special = |id: i64| specials.iter().find(|(_, known)| *known == id).map(|(name, _)| name);
    // Targets are shifted: what is learnt of a token stands at the position before it.
    let weight = |at: usize| {
        let before = at.checked_sub(1)?;
        (sample.targets[before] != IGNORE).then(|| sample.weights[before])
    };
    let context = setup.encoder.image_context_id();
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    while at < sample.ids.len() {
        let id = sample.ids[at];
        let (length, text, kind) = if id == context {
            let length = sample.ids[at..].iter().take_while(|&&next| next == context).count();
            (length, special(id).cloned().unwrap_or_default(), Kind::Visual)
        } else if let Some(name) = special(id) {
            (1, name.clone(), Kind::Special)
        } else {
            let rest = &sample.ids[at..];
            let end = rest.iter().position(|&next| special(next).is_some()).unwrap_or(rest.len());
            let (length, text) = readable(&setup.encoder, &rest[..end]);
            (length, text, Kind::Text)
        };
        let ids = sample.ids[at..at + length].to_vec();
        pieces.push(Piece { ids, text, kind, weight: weight(at) });
        at += length;
    }
    pieces
}

/// The fewest first tokens that are text together (a character may be spread over several), and that text.
fn readable(encoder: &TextEncoder, ids: &[i64]) -> (usize, String) {
    /// No character of UTF-8 has more bytes, and no token is less than one.
    const LONGEST: usize = 4;
    for length in 1..=LONGEST.min(ids.len()) {
        match encoder.decode(&ids[..length]) {
            Ok(text) if !text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER) => {
                return (length, text);
            }
            _ => {}
        }
    }
    let name = encoder.token_name(ids[0]);
    (1, name.unwrap_or_else(|| format!("<{}>", ids[0])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SPECIALS, gradient, png, spec, tar, tokenizer_json};

    fn setup(dir: &std::path::Path) -> Setup {
        let tokenizer = dir.join("tokenizer.json");
        std::fs::write(&tokenizer, tokenizer_json(&SPECIALS, true)).unwrap();
        let turns =
            r#"{"conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "é"}]}"#;
        let image = png(&gradient(16, 8));
        let members = [("a.json", turns.as_bytes()), ("a.png", &image), ("b.json", b"{}")];
        let shard = dir.join("a.tar");
        std::fs::write(&shard, tar(&members)).unwrap();
        Setup::open(spec(&[&shard.display().to_string()]), Some(&tokenizer)).unwrap()
    }

    #[test]
    fn tokens_carry_their_labels() {
        let dir = tempfile::tempdir().unwrap();
        let view = view(&setup(dir.path()), &Which::Nth(0)).unwrap();
        assert_eq!((view.images[0].columns, view.images[0].rows, view.tiles.len()), (2, 1, 3));
        assert_eq!(view.counts, Counts { tokens: view.counts.tokens, visual: 12, answers: 3, weight: 3.0 });
        let visual: Vec<&Piece> = view.pieces.iter().filter(|piece| piece.kind == Kind::Visual).collect();
        assert_eq!((visual.len(), visual[0].ids.len()), (1, 12));
        let learnt: Vec<(&str, usize)> = view
            .pieces
            .iter()
            .filter(|piece| piece.weight.is_some())
            .map(|piece| (piece.text.as_str(), piece.ids.len()))
            .collect();
        assert_eq!(learnt, [("é", 2), ("<|im_end|>", 1)]);
        let total: usize = view.pieces.iter().map(|piece| piece.ids.len()).sum();
        assert_eq!(total, view.counts.tokens);
    }

    #[test]
    fn samples_are_found_by_key_and_number() {
        let dir = tempfile::tempdir().unwrap();
        let setup = setup(dir.path());
        assert_eq!(view(&setup, &Which::Key("a".into())).unwrap().id.key, "a");
        let messages = [
            (Which::Nth(1), "(bad_json)"),
            (Which::Nth(2), "number 2; the shards hold 2"),
            (Which::Key("c".into()), "with the key `c`"),
        ];
        for (which, part) in &messages {
            let message = view(&setup, which).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        crate::tools::index::write_index(&setup.sources[0], 0).unwrap();
        for (which, part) in messages {
            let message = view(&setup, &which).unwrap_err().to_string();
            assert!(message.contains(part), "with an index: {message}");
        }
    }
}
