//! What is packed: JSON files and shards, in the order of the arguments, and a position in them.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::PackOptions;
use super::records::Records;
use crate::shard::{SampleRef, Scanner};
use crate::spec::{DataSpec, ImageSpec, Layout, SourceSpec};
use crate::store::is_remote;
use crate::tools::access::{IMAGE_TOKENS, Setup, find_files, text_spec};
use crate::tools::error::{Result, ToolError};

/// Where the next record begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    /// Number of the input.
    pub(super) input: usize,
    /// Bytes into it.
    pub(super) offset: u64,
    /// Records before it, in this input and in all.
    pub(super) ordinal: u64,
    pub(super) total: u64,
}

/// One record to pack.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) at: Position,
    pub(super) content: Content,
}

/// Where a record's text and images are.
#[derive(Debug)]
pub(super) enum Content {
    /// In a JSON file, with images in a folder.
    Json { text: Vec<u8> },
    /// In a shard.
    Sample(SampleRef),
}

/// One file.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub(super) path: String,
    /// Index of its source in the setup, and of its shard in the source.
    pub(super) source: usize,
    shard: usize,
    /// The folder of its images; `None` for a shard.
    pub(super) images: Option<PathBuf>,
}

/// What tells an input from a changed one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    path: String,
    bytes: u64,
    /// Of a JSON file: SHA-256 of its contents. Of a shard: when it was modified, in nanoseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    modified: Option<u64>,
}

/// All inputs, found.
#[derive(Debug)]
pub(super) struct Inputs {
    pub(super) setup: Setup,
    pub(super) list: Vec<Input>,
}

impl Inputs {
    /// Finds the files of all arguments.
    ///
    /// # Errors
    /// Those of patterns that match nothing.
    pub(super) fn find(options: &PackOptions) -> Result<Self> {
        let (mut specs, mut found) = (Vec::new(), Vec::new());
        for pattern in &options.inputs {
            let name = format!("input {}", specs.len() + 1);
            if !is_json(pattern) {
                let layout = options.layout;
                let images = options.images.as_ref().map(|folder| folder.display().to_string());
                specs.push(SourceSpec { images, layout, ..SourceSpec::new(&name, vec![pattern.clone()]) });
                found.push(false);
                continue;
            }
            if options.layout != Layout::Conversations {
                return Err(ToolError::usage(
                    format!("`{pattern}` cannot be read with another `--layout` than `conversations`"),
                    "`--layout` says what is in shards; JSON files hold conversations",
                ));
            }
            for path in find_files(pattern)? {
                let name = format!("input {}", specs.len() + 1);
                specs.push(SourceSpec::new(&name, vec![glob::Pattern::escape(&path)]));
                found.push(true);
            }
        }
        // Every frame of a video is kept.
        let image = ImageSpec { max_frames: usize::MAX, ..ImageSpec::square(448, 1) };
        let spec = DataSpec::in_order(specs, text_spec(IMAGE_TOKENS), image);
        let setup = Setup::open(spec, None)?;
        let mut list = Vec::new();
        for (index, source) in setup.sources.iter().enumerate() {
            for (shard, path) in source.shards.iter().enumerate() {
                let beside = || Path::new(path).parent().unwrap_or(Path::new("")).to_owned();
                let images = found[index].then(|| options.images.clone().unwrap_or_else(beside));
                list.push(Input { path: path.clone(), source: index, shard, images });
            }
        }
        Ok(Self { setup, list })
    }

    /// What tells these inputs from changed ones. Reads JSON files once.
    pub(super) fn identify(&self) -> Result<Vec<Identity>> {
        self.list.iter().map(identify).collect()
    }

    /// Reads records from a position on.
    pub(super) fn read(&self, position: Position) -> Reader<'_> {
        Reader { inputs: self, position, open: None }
    }
}

/// JSON files are told by their extension; everything else is a shard.
fn is_json(pattern: &str) -> bool {
    let extension = Path::new(pattern).extension().map(std::ffi::OsStr::to_ascii_lowercase);
    extension.is_some_and(|extension| ["json", "jsonl", "ndjson"].iter().any(|json| extension == *json))
}

fn identify(input: &Input) -> Result<Identity> {
    if is_remote(&input.path) {
        return Err(ToolError::usage(
            format!("`{}` is not a local file", input.path),
            "copy it first: what is packed must be the same after an interruption",
        ));
    }
    let path = Path::new(&input.path);
    let failed = || ToolError::io("read", path);
    // Asked before it is opened, since opening a FIFO waits for a writer.
    if !std::fs::metadata(path).map_err(failed())?.is_file() {
        return Err(failed()(std::io::Error::other("it is not a regular file")));
    }
    let mut file = File::open(path).map_err(failed())?;
    let metadata = file.metadata().map_err(failed())?;
    let mut identity =
        Identity { path: input.path.clone(), bytes: metadata.len(), sha256: None, modified: None };
    if input.images.is_none() {
        let modified = metadata.modified().map_err(failed())?.duration_since(UNIX_EPOCH);
        identity.modified = modified.ok().map(|since| since.as_nanos() as u64);
        return Ok(identity);
    }
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(failed())? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    identity.sha256 = Some(hex(&hash.finalize()));
    Ok(identity)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Identity {
    /// What differs from the input as it was.
    pub(super) fn difference(&self, before: &Self) -> Option<String> {
        if self.path != before.path {
            return Some(format!("it read `{}` where there is `{}` now", before.path, self.path));
        }
        (self != before).then(|| format!("`{}` has changed since", self.path))
    }
}

/// Reads records in order.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    inputs: &'a Inputs,
    position: Position,
    open: Option<Open>,
}

#[derive(Debug)]
enum Open {
    Json(Records),
    Shard(Box<Scanner>),
}

impl Reader<'_> {
    /// The next record of all inputs; `None` at the end.
    ///
    /// # Errors
    /// Those of reading, and of a broken array or shard.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        while let Some(input) = self.inputs.list.get(self.position.input) {
            let position = self.position;
            let next = match self.open(input)? {
                Open::Json(records) => {
                    records.next()?.map(|raw| (raw.offset, Content::Json { text: raw.text }))
                }
                Open::Shard(scanner) => scanner.next_sample()?.map(|extent| {
                    let shard = input.shard as u32;
                    (extent.offset, Content::Sample(SampleRef { shard, epoch: 0, extent }))
                }),
            };
            if let Some((offset, content)) = next {
                self.position.ordinal += 1;
                self.position.total += 1;
                return Ok(Some(Record { at: Position { offset, ..position }, content }));
            }
            let Position { input, total, .. } = position;
            self.position = Position { input: input + 1, offset: 0, ordinal: 0, total };
            self.open = None;
        }
        Ok(None)
    }

    /// Where reading is, after the last record.
    pub(super) fn position(&self) -> Position {
        self.position
    }

    fn open(&mut self, input: &Input) -> Result<&mut Open> {
        let Position { offset, ordinal, .. } = self.position;
        let opened = match self.open.take() {
            Some(open) => open,
            None if input.images.is_some() => Open::Json(Records::open(Path::new(&input.path), offset)?),
            None => {
                let source = &self.inputs.setup.sources[input.source];
                Open::Shard(Box::new(source.open(input.shard)?.scan(offset, ordinal)))
            }
        };
        Ok(self.open.insert(opened))
    }
}
