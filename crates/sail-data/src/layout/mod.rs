//! How a sample's members become a conversation with pictures: one file for each [`Layout`].
//!
//! A layout reads text and names only. `gather` then fetches the pictures and sets videos out as frames, the same
//! way for all layouts, and `draft` does the rest.

mod captions;
mod conversations;
mod gather;
mod interleaved;
mod pages;

use serde::Deserialize;
use serde::de::DeserializeOwned;

pub(crate) use self::gather::{Gathered, gather};
use crate::annotation::{Role, Turn};
use crate::error::BadSample;
use crate::rng::Key;
use crate::shard::RawSample;
use crate::source::Source;
use crate::spec::{Layout, SourceSpec};

/// The turns of a sample and the pictures that belong to their marks, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Conversation {
    pub(crate) turns: Vec<Turn>,
    /// One per `<image>` in the user's turns, or for the head of the first where there is none.
    pub(crate) images: Vec<PictureRef>,
    /// One per `<video>` in the user's turns, or for the head of the first where there is none.
    pub(crate) videos: Vec<VideoRef>,
}

/// A picture that an annotation names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PictureRef {
    /// As [`RawSample::image`] takes it.
    pub(crate) name: String,
    /// Which page or frame of it.
    pub(crate) frame: usize,
}

/// A video that an annotation names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VideoRef {
    /// An image file of several frames, or a folder of them.
    Whole(String),
    /// The names of its frames.
    Frames(Vec<String>),
}

/// What a layout may ask about, beside the sample.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    spec: &'a SourceSpec,
    /// The source's sequence of random draws.
    key: Key,
    epoch: u32,
}

impl<'a> Context<'a> {
    /// For a sample drawn in this epoch.
    pub(crate) fn new(source: &'a Source, epoch: u32) -> Self {
        Self { spec: &source.spec, key: source.key, epoch }
    }

    /// One of the questions, by the sample's key alone: the same in every epoch and run.
    fn question(&self, key: &str) -> &'a str {
        match self.spec.questions.as_slice() {
            [] => self.spec.layout.default_question(),
            questions => {
                &questions[Key::new(0).with_name("question").with_name(key).below(0, questions.len())]
            }
        }
    }
}

/// Reads a sample as its source's layout says.
///
/// # Errors
/// The reasons of the layout.
pub(crate) fn read(raw: &RawSample, context: Context) -> Result<Conversation, BadSample> {
    raw.check_unique()?;
    let conversation = match context.spec.layout {
        Layout::Conversations => conversations::read(raw),
        Layout::Captions => captions::read(raw, context),
        Layout::Pages => pages::read(raw, context),
        Layout::Interleaved => interleaved::read(raw),
    }?;
    if conversation.turns.iter().any(Turn::is_answer) { Ok(conversation) } else { Err(BadSample::NoAnswer) }
}

/// One question about all the images of a sample, and its answer.
fn question_and_answer(question: &str, answer: &str, images: Vec<PictureRef>) -> Conversation {
    let turn = |role, text: &str| Turn { role, text: text.to_owned() };
    let turns = vec![turn(Role::User, question), turn(Role::Assistant, answer)];
    Conversation { turns, images, videos: Vec::new() }
}

impl PictureRef {
    fn first(name: String) -> Self {
        Self { name, frame: 0 }
    }
}

fn parse_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, BadSample> {
    serde_json::from_slice(json).map_err(|error| BadSample::BadJson { detail: error.to_string() })
}

fn json_of(raw: &RawSample) -> Result<&[u8], BadSample> {
    raw.json().ok_or_else(|| BadSample::NoAnnotation { wanted: "`.json` member", members: raw.suffixes() })
}

/// Names in an annotation: one, several, or none as null or an empty string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(Name),
    Many(Vec<Name>),
    None(()),
}

/// A name, or an object with a `path`, as dataset libraries write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Name {
    Text(String),
    Object { path: String },
}

impl Name {
    fn into_text(self) -> String {
        match self {
            Self::Text(name) | Self::Object { path: name } => name,
        }
    }
}

impl Names {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(name) => Some(name.into_text()).filter(|name| !name.is_empty()).into_iter().collect(),
            Self::Many(names) => names.into_iter().map(Name::into_text).collect(),
            Self::None(()) => Vec::new(),
        }
    }
}
