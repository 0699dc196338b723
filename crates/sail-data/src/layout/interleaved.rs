//! The layout `interleaved`: images and texts in the order of a web page, as in Energon and OBELICS.

use serde::Deserialize;

use super::{Conversation, PictureRef, json_of, parse_json};
use crate::annotation::{IMAGE_MARK, Role, Turn};
use crate::error::BadSample;
use crate::shard::RawSample;

/// Two lists of one length; at each place one of them has something and the other null.
#[derive(Deserialize)]
struct Annotation {
    images: Vec<Option<String>>,
    texts: Vec<Option<String>>,
}

/// A text after an image is an answer; one before the first image begins the user's turn. Images that no text
/// follows are left out, as nothing is learnt from them.
pub(super) fn read(raw: &RawSample) -> Result<Conversation, BadSample> {
    let Annotation { images, texts } = parse_json(json_of(raw)?)?;
    if images.len() != texts.len() {
        let detail = format!("{} `images` stand beside {} `texts`", images.len(), texts.len());
        return Err(BadSample::BadJson { detail });
    }
    let mut turns: Vec<Turn> = Vec::new();
    let mut pictures = Vec::new();
    // Images of the last turn, when it is the user's.
    let mut open = 0;
    for (index, pair) in images.into_iter().zip(texts).enumerate() {
        match pair {
            (Some(name), None) => {
                let begins_turn = turns.last().is_none_or(|turn| turn.role == Role::Assistant);
                open = if begins_turn { 1 } else { open + 1 };
                append(&mut turns, Role::User, IMAGE_MARK, "\n");
                pictures.push(PictureRef::first(name));
            }
            (None, Some(text)) => {
                let role = if pictures.is_empty() { Role::User } else { Role::Assistant };
                append(&mut turns, role, &text, "\n\n");
            }
            (given, _) => {
                let what =
                    if given.is_some() { "both an image and a text" } else { "neither image nor text" };
                return Err(BadSample::BadJson { detail: format!("place {index} holds {what}") });
            }
        }
    }
    if !pictures.is_empty() && turns.pop_if(|turn| turn.role == Role::User).is_some() {
        pictures.truncate(pictures.len() - open);
    }
    Ok(Conversation { turns, images: pictures, videos: Vec::new() })
}

/// Adds to the last turn, or begins one when another speaks.
fn append(turns: &mut Vec<Turn>, role: Role, text: &str, separator: &str) {
    match turns.last_mut().filter(|turn| turn.role == role) {
        Some(turn) => {
            if !turn.text.is_empty() {
                turn.text.push_str(separator);
            }
            turn.text.push_str(text);
        }
        None => turns.push(Turn { role, text: text.to_owned() }),
    }
}
