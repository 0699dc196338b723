//! Packs conversations and their images into tar shards that the WebDataset libraries read.
//!
//! Records are read in order, prepared on all threads, and written in order, so the bytes depend on the input and
//! the options alone. A shard is written under a temporary name, flushed and renamed, then the manifest names it
//! and the place behind it: after a kill the same command goes on from there and ends with the same bytes.

mod input;
mod manifest;
mod records;
mod sample;
mod shard_writer;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use self::input::{Inputs, Position, Record};
use self::manifest::Manifest;
use self::sample::{Keys, Prepared, Refused, prepare};
use self::shard_writer::{ShardWriter, size, verify};
use super::error::{Result, ToolError};
use super::walk::Progress;
use crate::spec::Layout;

/// The list of skipped records in the output folder.
const REJECTED: &str = "rejected.jsonl";
/// Records in work at a time, per thread.
const BATCH_PER_THREAD: usize = 16;

/// What to pack, and how.
#[derive(Clone, Debug)]
pub(crate) struct PackOptions {
    /// Patterns of JSON files and shards.
    pub(crate) inputs: Vec<String>,
    pub(crate) out: PathBuf,
    /// Shards are called `{prefix}-000000.tar`.
    pub(crate) prefix: String,
    pub(crate) limit: Limit,
    /// Where image names in JSON begin; `None`: at the JSON file's folder.
    pub(crate) images: Option<PathBuf>,
    /// Of the shards among the inputs.
    pub(crate) layout: Layout,
    /// For samples that have none of their own.
    pub(crate) license: Option<String>,
    pub(crate) source: Option<String>,
    /// A bad sample is an error.
    pub(crate) strict: bool,
}

/// When a shard is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Limit {
    Samples(u64),
    /// Bytes of its members, the end mark not counted. A larger sample has a shard to itself.
    Bytes(u64),
}

/// What lies in the output folder now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packed {
    pub(crate) shards: usize,
    pub(crate) samples: u64,
    pub(crate) bytes: u64,
    /// Skipped records, by reason.
    pub(crate) rejected: BTreeMap<String, u64>,
    /// Shards that were there already.
    pub(crate) resumed: usize,
}

/// Packs everything, or what an earlier run has left to do.
///
/// # Errors
/// Those of the inputs and of writing, [`ToolError::Changed`], [`ToolError::Damaged`], [`ToolError::Occupied`],
/// [`ToolError::Locked`], [`ToolError::Strict`].
pub(crate) fn pack(options: &PackOptions, progress: &dyn Progress) -> Result<Packed> {
    let inputs = Inputs::find(options)?;
    let out = options.out.as_path();
    std::fs::create_dir_all(out).map_err(ToolError::io("create", out))?;
    let _lock = lock(out)?;
    let wanted = Manifest::new(options, inputs.identify()?);
    let manifest = if let Some(manifest) = Manifest::load(out, &wanted)? {
        manifest
    } else {
        check_free(options)?;
        wanted.save(out)?;
        wanted
    };
    let resumed = manifest.shards.len();
    let mut keys = Keys::default();
    for done in &manifest.shards {
        verify(out, done, &mut keys)?;
        progress.shard();
    }
    let mut packer = Packer::new(options, &inputs, manifest, keys)?;
    if !packer.manifest.complete {
        packer.run(progress)?;
    }
    let Manifest { shards, rejected, .. } = packer.manifest;
    Ok(Packed {
        samples: shards.iter().map(|shard| shard.samples).sum(),
        bytes: shards.iter().map(|shard| shard.bytes).sum(),
        shards: shards.len(),
        rejected,
        resumed,
    })
}

/// Held while this process packs into a folder; the system lets go of it when the process ends.
fn lock(out: &Path) -> Result<File> {
    let folder = File::open(out).map_err(ToolError::io("open", out))?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => Err(ToolError::Locked { out: out.to_path_buf() }),
        Err(TryLockError::Error(cause)) => {
            // Some network file systems lock no folders.
            tracing::warn!(out = %out.display(), "other processes cannot be kept out: {cause}");
            Ok(folder)
        }
    }
}

/// Nothing that was not made here is overwritten.
fn check_free(options: &PackOptions) -> Result<()> {
    let out = &options.out;
    let entries = std::fs::read_dir(out).map_err(ToolError::io("read", out))?;
    for entry in entries {
        let name = entry.map_err(ToolError::io("read", out))?.file_name();
        let name = name.to_string_lossy();
        let shard = name.strip_prefix(options.prefix.as_str()).is_some_and(|rest| rest.starts_with('-'));
        if name == REJECTED || (shard && name.ends_with(".tar")) {
            return Err(ToolError::Occupied { path: out.join(&*name) });
        }
    }
    Ok(())
}

struct Packer<'a> {
    options: &'a PackOptions,
    inputs: &'a Inputs,
    manifest: Manifest,
    keys: Keys,
    current: Option<ShardWriter>,
    rejected: BufWriter<File>,
    /// Counts that become part of the manifest with the current shard.
    rejected_bytes: u64,
    rejected_by_reason: BTreeMap<String, u64>,
}

impl<'a> Packer<'a> {
    fn new(options: &'a PackOptions, inputs: &'a Inputs, manifest: Manifest, keys: Keys) -> Result<Self> {
        let path = options.out.join(REJECTED);
        let failed = || ToolError::io("write", &path);
        // What a killed run listed behind its last shard is listed again.
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed())?;
        if file.metadata().map_err(failed())?.len() < manifest.rejected_bytes {
            return Err(ToolError::Damaged { shard: path, detail: "is shorter than was written".into() });
        }
        file.set_len(manifest.rejected_bytes).map_err(failed())?;
        Ok(Self {
            options,
            inputs,
            keys,
            current: None,
            rejected: BufWriter::new(file),
            rejected_bytes: manifest.rejected_bytes,
            rejected_by_reason: manifest.rejected.clone(),
            manifest,
        })
    }

    fn run(&mut self, progress: &dyn Progress) -> Result<()> {
        let mut reader = self.inputs.read(self.manifest.next);
        let most = BATCH_PER_THREAD * rayon::current_num_threads();
        loop {
            let mut batch: Vec<Record> = Vec::with_capacity(most);
            while batch.len() < most {
                match reader.next()? {
                    Some(record) => batch.push(record),
                    None => break,
                }
            }
            if batch.is_empty() {
                break;
            }
            let prepared: Vec<_> =
                batch.par_iter().map(|record| prepare(self.inputs, self.options, record)).collect();
            progress.samples(batch.len() as u64);
            for (record, prepared) in batch.iter().zip(prepared) {
                match prepared? {
                    Ok(sample) => self.add(record.at, sample, progress)?,
                    Err(refused) => self.refuse(record, refused)?,
                }
            }
        }
        self.close(reader.position(), progress)?;
        self.manifest.complete = true;
        self.save(reader.position())
    }

    fn add(&mut self, at: Position, sample: Prepared, progress: &dyn Progress) -> Result<()> {
        let key = self.keys.give(sample.id(), at.total);
        let members = sample.members(&key);
        let full = self.current.as_ref().is_some_and(|shard| match self.options.limit {
            Limit::Samples(most) => shard.samples >= most,
            Limit::Bytes(most) => shard.bytes() + size(&members) > most,
        });
        if full {
            self.close(at, progress)?;
        }
        let shard = if let Some(shard) = self.current.take() {
            shard
        } else {
            let name = format!("{}-{:06}.tar", self.options.prefix, self.manifest.shards.len());
            ShardWriter::create(self.options.out.join(name))?
        };
        self.current.insert(shard).append(&members)
    }

    fn refuse(&mut self, record: &Record, refused: Refused) -> Result<()> {
        let Position { input, offset, ordinal, .. } = record.at;
        let path = &self.inputs.list[input].path;
        let Refused { id, cause } = refused;
        if self.options.strict {
            return Err(ToolError::Strict { place: format!("`{path}`, record {ordinal}"), cause });
        }
        let (reason, detail) = (cause.reason(), cause.to_string());
        let line = json!({
            "input": path, "record": ordinal, "offset": offset, "id": id, "reason": reason, "detail": detail,
        });
        let line = format!("{line}\n");
        self.rejected
            .write_all(line.as_bytes())
            .map_err(ToolError::io("write", &self.options.out.join(REJECTED)))?;
        self.rejected_bytes += line.len() as u64;
        *self.rejected_by_reason.entry(reason.to_owned()).or_default() += 1;
        Ok(())
    }

    /// Finishes the current shard; what follows begins at `next`.
    fn close(&mut self, next: Position, progress: &dyn Progress) -> Result<()> {
        let Some(shard) = self.current.take() else { return Ok(()) };
        let done = shard.finish()?;
        self.manifest.shards.push(done);
        self.save(next)?;
        progress.shard();
        Ok(())
    }

    fn save(&mut self, next: Position) -> Result<()> {
        let flush = |rejected: &mut BufWriter<File>| {
            rejected.flush()?;
            rejected.get_ref().sync_all()
        };
        flush(&mut self.rejected).map_err(ToolError::io("write", &self.options.out.join(REJECTED)))?;
        self.manifest.next = next;
        self.manifest.rejected = self.rejected_by_reason.clone();
        self.manifest.rejected_bytes = self.rejected_bytes;
        self.manifest.save(&self.options.out)
    }
}
