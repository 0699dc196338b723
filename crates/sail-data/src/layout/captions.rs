//! The layout `captions`: an image and its caption, as img2dataset writes them.

use serde::Deserialize;

use super::{Context, Conversation, Names, PictureRef, parse_json, question_and_answer};
use crate::error::BadSample;
use crate::shard::RawSample;

/// What is used of img2dataset's `.json`; in JSON lines `image` names the file.
#[derive(Deserialize, Default)]
struct Metadata {
    caption: Option<String>,
    status: Option<String>,
    error_message: Option<String>,
    #[serde(alias = "images")]
    image: Option<Names>,
}

/// The caption is the `.txt` member, or else `caption` in the `.json`.
pub(super) fn read(raw: &RawSample, context: Context) -> Result<Conversation, BadSample> {
    let metadata: Metadata = raw.json().map_or_else(|| Ok(Metadata::default()), parse_json)?;
    if let Some(status) = metadata.status.filter(|status| status != "success") {
        let message = metadata.error_message.map(|message| format!(" ({message})")).unwrap_or_default();
        return Err(BadSample::NotDownloaded { status: format!("{status}{message}") });
    }
    let names = metadata.image.map_or_else(|| raw.image_names(), Names::into_vec);
    if names.is_empty() {
        return Err(BadSample::NoImage { members: raw.suffixes() });
    }
    let text = raw.text("txt")?.map(str::trim);
    let caption = match (text.filter(|text| !text.is_empty()), &metadata.caption) {
        (Some(text), _) => text,
        (None, Some(caption)) => caption.trim(),
        // An empty text is a caption, and an answer that cannot be learnt.
        (None, None) => text.ok_or_else(|| BadSample::NoAnnotation {
            wanted: "caption in a `.txt` or `.json` member",
            members: raw.suffixes(),
        })?,
    };
    let images = names.into_iter().map(PictureRef::first).collect();
    Ok(question_and_answer(context.question(&raw.key), caption, images))
}
