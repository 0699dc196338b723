//! Finding, verifying and opening checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use sail_model::weights::Shards;
use serde::de::DeserializeOwned;
use tch::Tensor;
use tracing::warn;

use super::write::checksum;
use super::{COMPLETE, FORMAT, InitRecord, MANIFEST, Manifest, RunState, STATE, Untouched};
use crate::config::Module;
use crate::error::{Error, Result};
use crate::optim::StateKind;

/// A complete and verified checkpoint.
pub struct Checkpoint {
    dir: PathBuf,
    seal: String,
    manifest: Manifest,
    state: RunState,
    files: BTreeMap<String, Shards>,
    /// Index into the manifest's pieces by `(name, kind)`.
    places: BTreeMap<(String, String), usize>,
}

/// The newest checkpoint of a run that verifies, with a warning for each newer one passed over.
pub fn newest(run_dir: &Path) -> Result<Option<Checkpoint>> {
    for (_, path) in super::list(run_dir)?.into_iter().rev() {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => warn!("passing over a checkpoint that does not verify: {error}"),
        }
    }
    Ok(None)
}

impl Checkpoint {
    /// Opens `dir` after checking that it is complete and every file is what was written.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming what is missing, damaged or of another format.
    pub fn open(dir: &Path) -> Result<Self> {
        let damaged = |reason: String| Error::checkpoint(dir, reason);
        let marker = fs::read_to_string(dir.join(COMPLETE))
            .map_err(|_| damaged(format!("not a complete checkpoint: no readable `{COMPLETE}`")))?;
        let manifest_path = dir.join(MANIFEST);
        if marker.trim() != format!("{:08x}", checksum(&manifest_path)?.crc32) {
            return Err(damaged(format!("`{MANIFEST}` does not match `{COMPLETE}`")));
        }
        let manifest: Manifest = read_json(&manifest_path)?;
        if manifest.format != FORMAT {
            return Err(damaged(format!("format {}, this version reads {FORMAT}", manifest.format)));
        }
        for (name, expected) in &manifest.files {
            let found = checksum(&dir.join(name))?;
            if found.bytes != expected.bytes || found.crc32 != expected.crc32 {
                return Err(damaged(format!(
                    "`{name}` is damaged: its size or checksum is not the manifest's"
                )));
            }
        }
        let mut files = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (i, piece) in manifest.pieces.iter().enumerate() {
            let numel: i64 = piece.shape.iter().product();
            if piece.elements != [0, numel] {
                return Err(damaged(format!(
                    "`{}` is cut into pieces, which this version does not read",
                    piece.name
                )));
            }
            if !files.contains_key(&piece.file) {
                files.insert(piece.file.clone(), Shards::open(&dir.join(&piece.file))?);
            }
            places.insert((piece.name.clone(), piece.kind.clone()), i);
        }
        let state = read_json(&dir.join(STATE))?;
        Ok(Self { dir: dir.to_owned(), seal: marker.trim().to_owned(), manifest, state, files, places })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names exactly this content, see [`InitRecord`].
    pub fn record(&self) -> InitRecord {
        InitRecord { dir: self.dir.clone(), seal: self.seal.clone() }
    }

    /// Step, counters, data position and plan.
    pub fn state(&self) -> &RunState {
        &self.state
    }

    /// Updates the optimizer had made.
    pub fn optimizer_steps(&self) -> u64 {
        self.manifest.optimizer_steps
    }

    /// Modules that are named instead of stored.
    pub fn untouched(&self) -> &BTreeMap<Module, Untouched> {
        &self.manifest.untouched
    }

    /// Names of the stored parameters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let param = StateKind::Param.name();
        self.places.keys().filter(move |(_, kind)| kind == param).map(|(name, _)| name.as_str())
    }

    /// A stored tensor, fp32 on the CPU.
    ///
    /// # Errors
    /// When the checkpoint does not hold it.
    pub fn tensor(&self, name: &str, kind: StateKind) -> Result<Tensor> {
        let place = self.places.get(&(name.to_owned(), kind.name().to_owned()));
        let place = place
            .ok_or_else(|| Error::checkpoint(&self.dir, format!("holds no `{}` of `{name}`", kind.name())))?;
        let piece = &self.manifest.pieces[*place];
        let tensor = self.files[&piece.file].tensor(&piece.key)?;
        if tensor.size() == piece.shape {
            return Ok(tensor);
        }
        let reason = format!("`{}` has shape {:?}, its manifest says {:?}", name, tensor.size(), piece.shape);
        Err(Error::checkpoint(&self.dir, reason))
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|error| Error::checkpoint(path, error.to_string()))
}
