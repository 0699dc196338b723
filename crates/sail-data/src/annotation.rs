//! The turns of a conversation, and the marks in them that pictures take the place of. How a sample's members
//! become turns is told in `layout`.

use serde::{Deserialize, Serialize};

use crate::error::BadSample;

/// The mark in a user's text that an image takes the place of.
pub(crate) const IMAGE_MARK: &str = "<image>";
/// The mark in a user's text that a video's frames take the place of.
pub(crate) const VIDEO_MARK: &str = "<video>";

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The frame of the conversation; only as the first turn.
    System,
    /// The questioner; images stand in these turns.
    User,
    /// The model; these turns are learnt.
    Assistant,
}

impl Role {
    /// The name in a chat template.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }

    /// The role with this name in an annotation, of turn number `turn`.
    pub(crate) fn parse(name: &str, turn: usize) -> Result<Self, BadSample> {
        match name {
            "system" => Ok(Self::System),
            "user" | "human" => Ok(Self::User),
            "assistant" | "gpt" => Ok(Self::Assistant),
            _ => Err(BadSample::BadTurns { turn, detail: format!("the role `{name}` is not known") }),
        }
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said, as written; `<image>` in a user's turn stands for an image.
    pub text: String,
}

/// Makes the marks in the user's turns match the number of images.
///
/// Without any mark, one per image is put at the head of the first user turn, each on a line of its own.
///
/// # Errors
/// [`BadSample::ImageCount`] when there are marks, but not as many as images, or images without a user turn.
pub(crate) fn place_marks(turns: &mut [Turn], images: usize) -> Result<(), BadSample> {
    let users = || turns.iter().filter(|turn| turn.role == Role::User);
    let marks: usize = users().map(|turn| turn.text.matches(IMAGE_MARK).count()).sum();
    if marks == images {
        return Ok(());
    }
    match turns.iter_mut().find(|turn| turn.role == Role::User) {
        Some(first) if marks == 0 => {
            let head = format!("{IMAGE_MARK}\n").repeat(images);
            first.text.insert_str(0, &head);
            Ok(())
        }
        _ => Err(BadSample::ImageCount { marks, images }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(role: Role, text: &str) -> Turn {
        Turn { role, text: text.into() }
    }

    #[test]
    fn marks_are_placed_only_where_none_is() {
        let mut turns = vec![turn(Role::Assistant, "<image>"), turn(Role::User, "Q"), turn(Role::User, "R")];
        place_marks(&mut turns, 2).unwrap();
        assert_eq!(turns[1].text, "<image>\n<image>\nQ");
        assert_eq!(turns[2].text, "R");
        place_marks(&mut turns, 2).unwrap();
        assert_eq!(place_marks(&mut turns, 1), Err(BadSample::ImageCount { marks: 2, images: 1 }));
        assert_eq!(place_marks(&mut turns, 0), Err(BadSample::ImageCount { marks: 2, images: 0 }));
        let mut answer_only = vec![turn(Role::Assistant, "A")];
        assert_eq!(place_marks(&mut answer_only, 1), Err(BadSample::ImageCount { marks: 0, images: 1 }));
    }
}
