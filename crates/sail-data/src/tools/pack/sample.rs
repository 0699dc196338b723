//! From a record to the members of a sample in a shard, and keys.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::PackOptions;
use super::input::{Content, Inputs, Record};
use crate::draft::Draft;
use crate::error::BadSample;
use crate::tools::access::image_files;

/// A sample that waits for its key.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prepared {
    /// What it is called in its input.
    id: Option<String>,
    annotation: Map<String, Value>,
    /// Where the annotation names its images.
    field: &'static str,
    /// Extension and contents of each image.
    images: Vec<(&'static str, Vec<u8>)>,
}

/// A record that is no sample.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    pub(super) id: Option<String>,
    pub(super) cause: BadSample,
}

/// Reads a record's images and makes sure that it is a sample that training can use.
///
/// # Errors
/// The outer error is one of a shard; the inner one concerns this record only.
pub(super) fn prepare(
    inputs: &Inputs,
    options: &PackOptions,
    record: &Record,
) -> crate::Result<Result<Prepared, Refused>> {
    let input = &inputs.list[record.at.input];
    let source = &inputs.setup.sources[input.source];
    let (id, annotation, draft) = match &record.content {
        Content::Json { text } => {
            let parsed: serde_json::Result<Map<String, Value>> = serde_json::from_slice(text);
            let annotation = match parsed {
                Ok(annotation) => annotation,
                Err(error) => {
                    let cause = BadSample::BadJson { detail: error.to_string() };
                    return Ok(Err(Refused { id: None, cause }));
                }
            };
            let id = id_of(&annotation);
            let folder = input.images.as_deref().unwrap_or(Path::new("."));
            let key = id.clone().unwrap_or_default();
            (id, Some(annotation), inputs.setup.draft_of(source, &key, text.clone(), folder)?)
        }
        Content::Sample(place) => {
            let drafted = inputs.setup.draft(source, *place)?;
            let parsed = drafted.annotation.as_deref().and_then(|json| serde_json::from_slice(json).ok());
            let annotation: Option<Map<String, Value>> = parsed;
            let id = annotation.as_ref().and_then(id_of).unwrap_or(drafted.key);
            (Some(id), annotation, drafted.draft)
        }
    };
    let prepared = draft
        .map_err(|rejected| rejected.cause)
        .and_then(|draft| Prepared::new(id.clone(), annotation.unwrap_or_default(), &draft, options));
    Ok(prepared.map_err(|cause| Refused { id, cause }))
}

fn id_of(annotation: &Map<String, Value>) -> Option<String> {
    match annotation.get("id")? {
        Value::String(id) => Some(id.clone()),
        Value::Number(id) => Some(id.to_string()),
        _ => None,
    }
}

/// What has to become of an annotation for its images to be members.
enum Form {
    /// Turns of text, and images in `image` or `images`.
    Plain,
    /// Turns of text, and one video: its frames can be named in its place.
    Video,
    /// Another layout, parts of messages that name images, or images beside videos.
    Other,
}

impl Form {
    fn of(annotation: &Map<String, Value>) -> Self {
        let given = |field: &str| {
            annotation.get(field).is_some_and(|value| {
                !(value.is_null() || value == "" || value.as_array().is_some_and(Vec::is_empty))
            })
        };
        let is_text = |message: &Value| message.get("content").is_none_or(Value::is_string);
        let messages = annotation.get("messages").and_then(Value::as_array);
        let of_text = match messages {
            Some(messages) => messages.iter().all(is_text),
            None => annotation.contains_key("conversations"),
        };
        let images = given("image") || given("images");
        match (of_text, given("video"), given("videos")) {
            (true, false, false) => Self::Plain,
            (true, true, false) if !images => Self::Video,
            _ => Self::Other,
        }
    }
}

impl Prepared {
    fn new(
        id: Option<String>,
        mut annotation: Map<String, Value>,
        draft: &Draft,
        options: &PackOptions,
    ) -> Result<Self, BadSample> {
        let field = match Form::of(&annotation) {
            Form::Video => "video",
            Form::Plain if annotation.get("images").is_some_and(Value::is_array) => "images",
            Form::Plain => "image",
            Form::Other => {
                // The conversation that it stands for is written out.
                annotation.shift_remove("conversations");
                let turn = |turn: &crate::Turn| json!({"role": turn.role.name(), "content": turn.text});
                annotation.insert("messages".into(), draft.turns().iter().map(turn).collect());
                "images"
            }
        };
        for (field, value) in [("license", &options.license), ("source", &options.source)] {
            if let Some(value) = value.as_ref().filter(|_| annotation.get(field).is_none_or(Value::is_null)) {
                annotation.insert(field.into(), Value::String(value.clone()));
            }
        }
        Ok(Self { id, annotation, field, images: image_files(draft)? })
    }

    /// The members of the sample: the annotation, which names the images, then these.
    pub(super) fn members(mut self, key: &str) -> Vec<(String, Vec<u8>)> {
        let single = self.images.len() == 1;
        let name = |(index, (extension, _)): (usize, &(&str, Vec<u8>))| {
            if single { format!("{key}.{extension}") } else { format!("{key}.img{}.{extension}", index + 1) }
        };
        let names: Vec<String> = self.images.iter().enumerate().map(name).collect();
        let was_list = self.annotation.get(self.field).is_some_and(Value::is_array);
        // Whatever was there names files, not members; an empty list beside the other field is legal too.
        for field in ["image", "images", "video", "videos"] {
            if field != self.field || names.is_empty() {
                self.annotation.shift_remove(field);
            }
        }
        if !names.is_empty() {
            let one = single && !was_list && self.field == "image";
            let value = if one { json!(names[0]) } else { json!(names) };
            self.annotation.insert(self.field.into(), value);
        }
        let json = Value::Object(self.annotation).to_string().into_bytes();
        let images = names.into_iter().zip(self.images).map(|(name, (_, bytes))| (name, bytes));
        std::iter::once((format!("{key}.json"), json)).chain(images).collect()
    }

    /// What it is called in its input.
    pub(super) fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }
}

/// The keys given so far, so that none is given twice. It remembers 8 bytes of each.
#[derive(Debug, Default)]
pub(super) struct Keys(HashSet<u64>);

impl Keys {
    /// Member names have at most 100 bytes, and the suffix needs some of them.
    const LONGEST: usize = 72;

    /// Notes a key that is in use.
    pub(super) fn note(&mut self, key: &str) -> bool {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        self.0.insert(hasher.finish())
    }

    /// A key for the record with this id and number: the id where it can be one, with the number after it
    /// where it is in use already.
    pub(super) fn give(&mut self, id: Option<&str>, number: u64) -> String {
        let safe = |character: char| match character {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => character,
            _ => '_',
        };
        let base: String = id.unwrap_or_default().chars().map(safe).collect();
        let base = base.trim_matches('_');
        let mut key = match base {
            "" => format!("{number:09}"),
            _ if base.len() > Self::LONGEST => format!("{}-{number:09}", &base[..Self::LONGEST - 10]),
            _ => base.to_owned(),
        };
        while !self.note(&key) {
            key = format!("{}-{number:09}", &key[..key.len().min(Self::LONGEST)]);
        }
        key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_unique_and_safe() {
        let mut keys = Keys::default();
        let long = "x".repeat(200);
        let given: Vec<String> = [
            Some("a/b.c"),
            Some("a_b_c"),
            None,
            Some("../"),
            Some("__meta__"),
            Some("é!"),
            Some(&long),
            Some(&long),
        ]
        .into_iter()
        .enumerate()
        .map(|(n, id)| keys.give(id, n as u64))
        .collect();
        let expected = ["a_b_c", "a_b_c-000000001", "000000002", "000000003", "meta", "000000005"];
        assert_eq!(&given[..6], &expected);
        assert_eq!(given.iter().collect::<HashSet<_>>().len(), given.len());
        assert!(given.iter().all(|key| key.len() <= 84), "{given:?}");
    }

    #[test]
    fn annotations_name_their_members() {
        let annotation = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        let names = |text: &str, images: usize| {
            let images = vec![("png", vec![1]); images];
            let annotation = annotation(text);
            let field =
                if annotation.get("images").is_some_and(Value::is_array) { "images" } else { "image" };
            let members = Prepared { id: None, annotation, field, images }.members("k");
            let json = String::from_utf8(members[0].1.clone()).unwrap();
            let names: Vec<String> = members.into_iter().map(|(name, _)| name).collect();
            (json, names)
        };
        let cases = [
            (r#"{"image":"x/y.png","z":1}"#, 1, r#"{"image":"k.png","z":1}"#),
            (r#"{"image":["x.png"]}"#, 1, r#"{"image":["k.png"]}"#),
            (r#"{"images":["x","y"]}"#, 2, r#"{"images":["k.img1.png","k.img2.png"]}"#),
            (r#"{"id":7}"#, 0, r#"{"id":7}"#),
            (r#"{"id":7}"#, 1, r#"{"id":7,"image":"k.png"}"#),
        ];
        for (text, images, expected) in cases {
            assert_eq!(names(text, images).0, expected);
        }
        assert_eq!(names("{}", 2).1, ["k.json", "k.img1.png", "k.img2.png"]);
    }
}
