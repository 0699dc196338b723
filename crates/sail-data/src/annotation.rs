//! The annotation of a sample: turns and image references, from the LLaVA conversation form or the
//! `{"messages"}` form. What the references point to is found out in `draft`.

use serde::{Deserialize, Serialize};

use crate::error::BadSample;

/// The mark in a user's text that an image takes the place of.
pub(crate) const IMAGE_MARK: &str = "<image>";

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

    fn parse(name: &str, turn: usize) -> Result<Self, BadSample> {
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

/// A parsed annotation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Annotation {
    pub(crate) turns: Vec<Turn>,
    /// The images it names; `None` when it has no such field.
    pub(crate) images: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct RawAnnotation {
    conversations: Option<Vec<RawTurn>>,
    messages: Option<Vec<RawMessage>>,
    image: Option<Names>,
    images: Option<Names>,
}

#[derive(Deserialize)]
struct RawTurn {
    from: String,
    value: String,
}

#[derive(Deserialize)]
struct RawMessage {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    Text { text: String },
    Image {},
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Many(Vec<String>),
}

impl Annotation {
    /// Parses the `.json` member of a sample.
    ///
    /// Exactly one of `conversations` and `messages` must be there, and at most one of `image` and `images`.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, BadSample> {
        let bad = |detail: String| BadSample::BadJson { detail };
        let raw: RawAnnotation = serde_json::from_slice(json).map_err(|e| bad(e.to_string()))?;
        let turns: Vec<(String, String)> = match (raw.conversations, raw.messages) {
            (Some(turns), None) => turns.into_iter().map(|turn| (turn.from, turn.value)).collect(),
            (None, Some(turns)) => turns.into_iter().map(|turn| (turn.role, turn.content.joined())).collect(),
            (None, None) => return Err(bad("it has neither `conversations` nor `messages`".into())),
            (Some(_), Some(_)) => return Err(bad("it has both `conversations` and `messages`".into())),
        };
        let turns = turns
            .into_iter()
            .enumerate()
            .map(|(index, (role, text))| Ok(Turn { role: Role::parse(&role, index)?, text }))
            .collect::<Result<Vec<Turn>, BadSample>>()?;
        if let Some(turn) = turns.iter().skip(1).position(|turn| turn.role == Role::System) {
            let detail = "a system turn can only be the first".into();
            return Err(BadSample::BadTurns { turn: turn + 1, detail });
        }
        if !turns.iter().any(Turn::is_answer) {
            return Err(BadSample::NoAnswer);
        }
        let images = match (raw.image, raw.images) {
            (Some(_), Some(_)) => return Err(bad("it has both `image` and `images`".into())),
            (Some(names), None) | (None, Some(names)) => Some(names.into_vec()),
            (None, None) => None,
        };
        Ok(Self { turns, images })
    }
}

impl Content {
    fn joined(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Parts(parts) => parts
                .into_iter()
                .map(|part| match part {
                    Part::Text { text } => text,
                    Part::Image {} => IMAGE_MARK.to_owned(),
                })
                .collect(),
        }
    }
}

impl Names {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(name) => vec![name],
            Self::Many(names) => names,
        }
    }
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
    fn both_forms_give_the_same_turns() {
        let llava = br#"{"id": "x", "image": "x.jpg", "license": "CC0", "conversations": [
            {"from": "system", "value": "S"}, {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]}"#;
        let messages = br#"{"images": ["x.jpg"], "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nQ"}]},
            {"role": "assistant", "content": "A"}]}"#;
        let expected = Annotation {
            turns: vec![turn(Role::System, "S"), turn(Role::User, "<image>\nQ"), turn(Role::Assistant, "A")],
            images: Some(vec!["x.jpg".into()]),
        };
        assert_eq!(Annotation::parse(llava).unwrap(), expected);
        assert_eq!(Annotation::parse(messages).unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_understood_has_a_reason() {
        let cases: [(&str, &str); 10] = [
            ("{", "bad_json"),
            ("[]", "bad_json"),
            ("{}", "bad_json"),
            (r#"{"conversations": [], "messages": []}"#, "bad_json"),
            (r#"{"conversations": [{"from": "human"}]}"#, "bad_json"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "video"}]}]}"#, "bad_json"),
            (r#"{"conversations": [{"from": "robot", "value": "x"}]}"#, "bad_turns"),
            (
                r#"{"conversations": [{"from": "gpt", "value": "x"}, {"from": "system", "value": "x"}]}"#,
                "bad_turns",
            ),
            (r#"{"conversations": [{"from": "human", "value": "x"}]}"#, "no_answer"),
            (r#"{"conversations": [{"from": "gpt", "value": " \n"}]}"#, "no_answer"),
        ];
        for (json, reason) in cases {
            assert_eq!(Annotation::parse(json.as_bytes()).unwrap_err().reason(), reason, "{json}");
        }
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
