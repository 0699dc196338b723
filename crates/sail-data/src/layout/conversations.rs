//! The layout `conversations`: an annotation that holds the turns, in the form of LLaVA and InternVL
//! (`conversations`) or of chat completions (`messages`).

use serde::Deserialize;

use super::{Conversation, Name, Names, PictureRef, VideoRef, json_of, parse_json};
use crate::annotation::{IMAGE_MARK, Role, Turn, VIDEO_MARK};
use crate::error::BadSample;
use crate::shard::RawSample;

#[derive(Deserialize)]
struct Annotation {
    conversations: Option<Vec<RawTurn>>,
    messages: Option<Vec<Message>>,
    // The outer layer tells a field that is missing from one that is null.
    #[serde(default, deserialize_with = "present")]
    image: Option<Names>,
    #[serde(default, deserialize_with = "present")]
    images: Option<Names>,
    video: Option<Video>,
    videos: Option<Vec<Video>>,
}

#[derive(Deserialize)]
struct RawTurn {
    from: String,
    value: String,
}

#[derive(Deserialize)]
struct Message {
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
    Text {
        text: String,
    },
    Image {
        #[serde(alias = "path", alias = "url")]
        image: Option<Name>,
    },
    ImageUrl {
        image_url: Url,
    },
    Video {
        video: Option<Video>,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Url {
    Text(String),
    Object { url: String },
}

/// A file or folder, or the names of frames.
#[derive(Deserialize)]
#[serde(untagged)]
enum Video {
    Whole(String),
    Frames(Vec<String>),
}

/// What an annotation names: the pictures of its fields, and those inside its messages.
#[derive(Default)]
struct Named {
    images: Vec<String>,
    videos: Vec<VideoRef>,
    /// Parts of messages that say nothing about where their image is.
    unnamed: usize,
}

fn present<'de, D: serde::Deserializer<'de>>(field: D) -> Result<Option<Names>, D::Error> {
    Names::deserialize(field).map(Some)
}

/// Exactly one of `conversations` and `messages` must be there, and at most one of `image` and `images`. Without either
/// the images are all image members.
pub(super) fn read(raw: &RawSample) -> Result<Conversation, BadSample> {
    let bad = |detail: &str| BadSample::BadJson { detail: detail.to_owned() };
    let annotation: Annotation = parse_json(json_of(raw)?)?;
    let mut named = Named::default();
    let turns: Vec<(String, String)> = match (annotation.conversations, annotation.messages) {
        (Some(turns), None) => turns.into_iter().map(|turn| (turn.from, turn.value)).collect(),
        (None, Some(messages)) => {
            messages.into_iter().map(|message| (message.role, message.content.joined(&mut named))).collect()
        }
        (None, None) => return Err(bad("it has neither `conversations` nor `messages`")),
        (Some(_), Some(_)) => return Err(bad("it has both `conversations` and `messages`")),
    };
    let listed = match (annotation.image, annotation.images) {
        (None, None) => None,
        (Some(names), None) | (None, Some(names)) => Some(names.into_vec()),
        (Some(image), Some(images)) => match (image.into_vec(), images.into_vec()) {
            (one, other) if one.is_empty() || other.is_empty() => Some([one, other].concat()),
            _ => return Err(bad("it has both `image` and `images`")),
        },
    };
    let listed_videos: Vec<VideoRef> = annotation
        .video
        .into_iter()
        .chain(annotation.videos.into_iter().flatten())
        .filter_map(Video::named)
        .collect();
    let videos = one_of(named.videos, listed_videos).ok_or_else(|| bad("it names videos in two places"))?;
    let images = match listed {
        None if named.images.is_empty() && videos.is_empty() => raw.image_names(),
        None => named.images,
        Some(listed) => one_of(named.images, listed).ok_or_else(|| bad("it names images in two places"))?,
    };
    if named.unnamed > images.len() {
        return Err(BadSample::ImageCount { marks: named.unnamed, images: images.len() });
    }
    Ok(Conversation {
        turns: roles(turns)?,
        images: images.into_iter().map(PictureRef::first).collect(),
        videos,
    })
}

/// The list that is not empty; none when both have something.
fn one_of<T>(a: Vec<T>, b: Vec<T>) -> Option<Vec<T>> {
    match (a.is_empty(), b.is_empty()) {
        (false, false) => None,
        (false, true) => Some(a),
        _ => Some(b),
    }
}

fn roles(turns: Vec<(String, String)>) -> Result<Vec<Turn>, BadSample> {
    let parse = |(index, (role, text)): (usize, (String, String))| {
        Ok(Turn { role: Role::parse(&role, index)?, text })
    };
    let turns = turns.into_iter().enumerate().map(parse).collect::<Result<Vec<Turn>, BadSample>>()?;
    match turns.iter().skip(1).position(|turn| turn.role == Role::System) {
        Some(turn) => {
            Err(BadSample::BadTurns { turn: turn + 1, detail: "a system turn can only be the first".into() })
        }
        None => Ok(turns),
    }
}

impl Content {
    /// The text with marks in the place of pictures, whose names go to `named`.
    fn joined(self, named: &mut Named) -> String {
        let parts = match self {
            Self::Text(text) => return text,
            Self::Parts(parts) => parts,
        };
        let mut text = String::new();
        for part in parts {
            let image = match part {
                Part::Text { text: piece } => {
                    text.push_str(&piece);
                    continue;
                }
                Part::Video { video } => {
                    text.push_str(VIDEO_MARK);
                    named.videos.extend(video.and_then(Video::named));
                    continue;
                }
                Part::Image { image } => image.map(Name::into_text),
                Part::ImageUrl { image_url: Url::Text(url) | Url::Object { url } } => Some(url),
            };
            text.push_str(IMAGE_MARK);
            match image {
                Some(name) => named.images.push(name),
                None => named.unnamed += 1,
            }
        }
        text
    }
}

impl Video {
    /// None where it is an empty string or list.
    fn named(self) -> Option<VideoRef> {
        match self {
            Self::Whole(name) => (!name.is_empty()).then_some(VideoRef::Whole(name)),
            Self::Frames(names) => (!names.is_empty()).then_some(VideoRef::Frames(names)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::raw_sample;

    fn parse(json: &str) -> Result<Conversation, BadSample> {
        read(&raw_sample("x", &[("json", json.as_bytes()), ("png", b""), ("jpg", b"")]))
    }

    fn images(names: &[&str]) -> Vec<PictureRef> {
        names.iter().map(|name| PictureRef::first((*name).to_owned())).collect()
    }

    #[test]
    fn both_forms_give_the_same_turns() {
        let llava = r#"{"id": "x", "image": "x.jpg", "license": "CC0", "conversations": [
            {"from": "system", "value": "S"}, {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]}"#;
        let rest = r#"{"type": "text", "text": "\nQ"}]}, {"role": "assistant", "content": "A"}]}"#;
        let start = r#""messages": [{"role": "system", "content": "S"}, {"role": "user", "content": ["#;
        let expected = parse(llava).unwrap();
        assert_eq!(expected.turns[1], Turn { role: Role::User, text: "<image>\nQ".into() });
        assert_eq!(expected.images, images(&["x.jpg"]));
        for (list, part) in [
            (r#""images": ["x.jpg"],"#, r#"{"type": "image"}"#),
            (r#""images": [{"path": "x.jpg", "bytes": null}],"#, r#"{"type": "image", "index": 0}"#),
            ("", r#"{"type": "image", "image": "x.jpg"}"#),
            ("", r#"{"type": "image", "path": "x.jpg"}"#),
            (r#""images": [],"#, r#"{"type": "image_url", "image_url": "x.jpg"}"#),
            (r#""image": null,"#, r#"{"type": "image_url", "image_url": {"url": "x.jpg", "detail": "low"}}"#),
        ] {
            assert_eq!(
                parse(&format!("{{{list} {start} {part}, {rest}")).unwrap(),
                expected,
                "{list} {part}"
            );
        }
    }

    #[test]
    fn no_image_is_an_empty_string_or_null_and_no_field_is_every_image() {
        let with = |fields: &str| {
            let turns =
                r#""conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]"#;
            parse(&format!("{{{fields} {turns}}}")).unwrap()
        };
        for none in
            [r#""image": "","#, r#""image": null,"#, r#""images": [],"#, r#""image": null, "images": null,"#]
        {
            assert_eq!(with(none).images, [], "{none}");
        }
        assert_eq!(with("").images, images(&["x.png", "x.jpg"]));
        assert_eq!(with(r#""image": null, "images": ["a"],"#).images, images(&["a"]));
        let video = with(r#""video": "x.gif","#);
        assert_eq!((video.images.len(), video.videos), (0, vec![VideoRef::Whole("x.gif".into())]));
        let frames = with(r#""videos": [["1", "2"], "y.webp"], "image": "x.png","#);
        let expected = [VideoRef::Frames(vec!["1".into(), "2".into()]), VideoRef::Whole("y.webp".into())];
        assert_eq!((frames.images, frames.videos), (images(&["x.png"]), expected.to_vec()));
        assert_eq!(with(r#""video": null, "videos": null, "image": "","#).videos, []);
    }

    #[test]
    fn what_cannot_be_understood_has_a_reason() {
        let cases = [
            ("{", "bad_json"),
            ("[]", "bad_json"),
            ("{}", "bad_json"),
            (r#"{"conversations": [], "messages": []}"#, "bad_json"),
            (r#"{"conversations": [], "image": "a", "images": ["b"]}"#, "bad_json"),
            (r#"{"conversations": [], "image": 7}"#, "bad_json"),
            (r#"{"conversations": [], "images": [null]}"#, "bad_json"),
            (r#"{"conversations": [{"from": "human"}]}"#, "bad_json"),
            (r#"{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}"#, "bad_json"),
            (
                r#"{"image": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": "b"}]}]}"#,
                "bad_json",
            ),
            (
                r#"{"video": "a", "messages": [{"role": "user", "content": [{"type": "video", "video": "b"}]}]}"#,
                "bad_json",
            ),
            (
                r#"{"images": [], "messages": [{"role": "user", "content": [{"type": "image"}]}]}"#,
                "image_count",
            ),
            (r#"{"conversations": [{"from": "robot", "value": "x"}]}"#, "bad_turns"),
            (
                r#"{"conversations": [{"from": "gpt", "value": "x"}, {"from": "system", "value": "x"}]}"#,
                "bad_turns",
            ),
        ];
        for (json, reason) in cases {
            assert_eq!(parse(json).unwrap_err().reason(), reason, "{json}");
        }
    }
}
