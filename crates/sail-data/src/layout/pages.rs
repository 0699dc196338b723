//! The layout `pages`: a document as a multi-page TIFF and the text of its pages, as in IDL-WDS. One page of it
//! becomes the sample.

use serde::Deserialize;

use super::{Context, Conversation, Names, PictureRef, json_of, parse_json, question_and_answer};
use crate::error::BadSample;
use crate::shard::RawSample;
use crate::spec::PageChoice;

#[derive(Deserialize)]
struct Document {
    pages: Vec<Page>,
    /// In JSON lines, the file.
    image: Option<Names>,
}

#[derive(Deserialize)]
struct Page {
    text: Lines,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Lines {
    Many(Vec<String>),
    One(String),
    None(()),
}

impl Lines {
    fn joined(&self) -> String {
        match self {
            Self::Many(lines) => lines.join("\n").trim().to_owned(),
            Self::One(text) => text.trim().to_owned(),
            Self::None(()) => String::new(),
        }
    }
}

/// The answer is the text of one page that has any, the image the same page of the TIFF.
pub(super) fn read(raw: &RawSample, context: Context) -> Result<Conversation, BadSample> {
    let document: Document = parse_json(json_of(raw)?)?;
    let name = match document.image.map(Names::into_vec) {
        Some(names) => names.into_iter().next(),
        None => document_image(raw),
    };
    let name = name.ok_or_else(|| BadSample::NoImage { members: raw.suffixes() })?;
    let texts: Vec<(usize, String)> = document
        .pages
        .iter()
        .map(|page| page.text.joined())
        .enumerate()
        .filter(|(_, text)| !text.is_empty())
        .collect();
    if texts.is_empty() {
        return Err(BadSample::NoAnswer);
    }
    let chosen = match context.spec.page {
        PageChoice::First => 0,
        PageChoice::Random => {
            let key = context.key.with_name("page").with_name(&raw.key);
            key.below(u64::from(context.epoch), texts.len())
        }
    };
    let (page, text) = &texts[chosen];
    let images = vec![PictureRef { name, frame: *page }];
    Ok(question_and_answer(context.question(&raw.key), text, images))
}

/// The TIFF, or else the first image.
fn document_image(raw: &RawSample) -> Option<String> {
    let mut names = raw.image_names();
    let is_tiff =
        |name: &String| [".tif", ".tiff"].iter().any(|end| name.to_ascii_lowercase().ends_with(end));
    let at = names.iter().position(is_tiff).unwrap_or(0);
    (at < names.len()).then(|| names.swap_remove(at))
}
