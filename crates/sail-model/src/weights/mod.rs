//! Weights on disk: Hugging Face folders in, from here or from a hub, Hugging Face folders out.
//!
//! Knows files, names and shapes, no architecture: which names a model has is the model's concern.
//! Called by the trainer when it builds or exports a model.

mod disk;
mod hub;
mod layout;
mod read;
mod shards;
mod write;

use std::fmt::Display;
use std::path::Path;

use serde_json::Value;

pub use hub::{Hub, Limits, ModelRef, Wanted};
pub use layout::{Layout, Naming, Piece, Stored, arrange, own_names};
pub use read::FileSource;
pub use shards::Shards;
pub use write::{Bytes, Folder, write_safetensors, write_safetensors_seen};

use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";

/// Reads a JSON file.
///
/// # Errors
/// [`Error::File`] when it cannot be read or is not JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(file_error(path))?;
    serde_json::from_str(&text).map_err(file_error(path))
}

/// Puts the file's name before the reason.
fn file_error<E: Display>(path: &Path) -> impl FnOnce(E) -> Error + '_ {
    move |reason| Error::File { path: path.to_owned(), reason: reason.to_string() }
}
