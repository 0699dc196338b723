//! What has been packed: written anew after every shard, so that a run that was killed goes on behind the last.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::PackOptions;
use super::input::{Identity, Position};
use crate::tools::error::{Result, ToolError};
use crate::tools::files::write_atomically;

/// Its name in the output folder.
pub(super) const NAME: &str = "pack.json";
const FORMAT: u32 = 1;

/// One finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DoneShard {
    pub(super) name: String,
    pub(super) samples: u64,
    pub(super) bytes: u64,
    pub(super) crc32: u32,
}

/// The state of a folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    format: u32,
    pub(super) complete: bool,
    /// Everything that decides which bytes are written.
    options: Value,
    inputs: Vec<Identity>,
    /// Where the first record behind the finished shards begins.
    pub(super) next: Position,
    /// Skipped records, by reason, and the bytes of their list.
    pub(super) rejected: BTreeMap<String, u64>,
    pub(super) rejected_bytes: u64,
    pub(super) shards: Vec<DoneShard>,
}

impl Manifest {
    /// Of a folder in which nothing has been done.
    pub(super) fn new(options: &PackOptions, inputs: Vec<Identity>) -> Self {
        let images = options.images.as_ref().map(|folder| folder.display().to_string());
        let options = json!({
            "prefix": options.prefix, "limit": options.limit, "images": images,
            "layout": options.layout, "license": options.license, "source": options.source,
        });
        let (next, rejected) = (Position::default(), BTreeMap::new());
        Self {
            format: FORMAT,
            complete: false,
            options,
            inputs,
            next,
            rejected,
            rejected_bytes: 0,
            shards: Vec::new(),
        }
    }

    /// The manifest of a folder, which must be that of the same work as `wanted`; `None` without one.
    ///
    /// # Errors
    /// [`ToolError::Changed`].
    pub(super) fn load(out: &Path, wanted: &Self) -> Result<Option<Self>> {
        let path = out.join(NAME);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ToolError::io("read", &path)(error)),
        };
        let changed = |detail: String| ToolError::Changed { out: out.to_path_buf(), detail };
        let found: Self = serde_json::from_slice(&text)
            .map_err(|error| changed(format!("its `{NAME}` cannot be read: {error}")))?;
        match found.difference(wanted) {
            Some(detail) => Err(changed(detail)),
            None => Ok(Some(found)),
        }
    }

    fn difference(&self, wanted: &Self) -> Option<String> {
        if self.format != FORMAT {
            return Some(format!("its `{NAME}` has format {}, this is {FORMAT}", self.format));
        }
        if let Value::Object(options) = &wanted.options {
            for (name, value) in options {
                let before = &self.options[name.as_str()];
                if before != value {
                    return Some(format!("`{name}` was {before} and is {value} now"));
                }
            }
        }
        if self.inputs.len() != wanted.inputs.len() {
            return Some(format!(
                "it had {} inputs, now there are {}",
                self.inputs.len(),
                wanted.inputs.len()
            ));
        }
        wanted.inputs.iter().zip(&self.inputs).find_map(|(now, before)| now.difference(before))
    }

    /// Replaces the manifest of a folder.
    pub(super) fn save(&self, out: &Path) -> Result<()> {
        let mut text = json!(self).to_string().into_bytes();
        text.push(b'\n');
        write_atomically(&out.join(NAME), &text)
    }
}
