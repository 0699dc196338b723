//! Finding, verifying and opening checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sail_model::weights::Shards;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};
use tracing::warn;

use super::write::checksum;
use super::{COMPLETE, FORMAT, MANIFEST, Manifest, PieceRecord, RunState, STATE, Untouched};
use crate::config::Module;
use crate::error::{Error, Result};
use crate::lineage::{Ancestor, Lineage};
use crate::optim::StateKind;

/// A complete and verified checkpoint.
pub struct Checkpoint {
    dir: PathBuf,
    seal: String,
    manifest: Manifest,
    state: RunState,
    files: BTreeMap<String, Shards>,
    /// Indices into the manifest's pieces by `(name, kind)`, in the order of their elements.
    places: BTreeMap<(String, String), Vec<usize>>,
}

/// The newest checkpoint of a run that verifies, with a warning for each newer one passed over.
pub fn newest(run_dir: &Path) -> Result<Option<Checkpoint>> {
    newest_before(run_dir, u64::MAX)
}

/// As [`newest`], of those made before `step` was done.
pub fn newest_before(run_dir: &Path, step: u64) -> Result<Option<Checkpoint>> {
    for (_, path) in super::list(run_dir)?.into_iter().rev().filter(|(found, _)| *found < step) {
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
        Self::open_with(dir, true)
    }

    /// The one of a step that this run has written, whole as far as it is known.
    pub(crate) fn of_step(run_dir: &Path, step: u64) -> Result<Self> {
        Self::open_verified(&run_dir.join(super::folder_name(step)))
    }

    /// As [`Checkpoint::open`], where every byte has been looked at already.
    pub(crate) fn open_verified(dir: &Path) -> Result<Self> {
        Self::open_with(dir, false)
    }

    fn open_with(dir: &Path, verify: bool) -> Result<Self> {
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
        for (name, expected) in manifest.files.iter().filter(|_| verify) {
            let found = checksum(&dir.join(name))?;
            if found.bytes != expected.bytes || found.crc32 != expected.crc32 {
                return Err(damaged(format!(
                    "`{name}` is damaged: its size or checksum is not the manifest's"
                )));
            }
        }
        let mut files = BTreeMap::new();
        let mut places: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for (i, piece) in manifest.pieces.iter().enumerate() {
            if !manifest.files.contains_key(&piece.file) {
                let (name, file) = (&piece.name, &piece.file);
                return Err(damaged(format!(
                    "`{name}` is said to be in `{file}`, which the manifest does not list"
                )));
            }
            if !files.contains_key(&piece.file) {
                files.insert(piece.file.clone(), Shards::open(&dir.join(&piece.file))?);
            }
            places.entry((piece.name.clone(), piece.kind.clone())).or_default().push(i);
        }
        for ((name, kind), indices) in &mut places {
            indices.sort_by_key(|i| manifest.pieces[*i].elements);
            covers(indices.iter().map(|i| &manifest.pieces[*i]))
                .map_err(|reason| damaged(format!("`{kind}` of `{name}`: {reason}")))?;
        }
        let state = read_json(&dir.join(STATE))?;
        Ok(Self { dir: dir.to_owned(), seal: marker.trim().to_owned(), manifest, state, files, places })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What its `COMPLETE` holds: a checksum over everything in it.
    pub fn seal(&self) -> &str {
        &self.seal
    }

    /// That of a run that starts from it: itself is the last of the stages.
    pub fn lineage(&self) -> Lineage {
        let RunState { step, totals, plan, lineage, .. } = &self.state;
        let own = Ancestor {
            run: plan.run.name.clone(),
            step: *step,
            totals: *totals,
            plan_hash: plan.hash(),
            dir: self.dir.clone(),
            seal: self.seal.clone(),
        };
        let stages = lineage.stages.iter().cloned().chain([own]).collect();
        Lineage { weights: lineage.weights.clone(), stages }
    }

    /// Step, counters, data position and plan.
    pub fn state(&self) -> &RunState {
        &self.state
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

    /// Whether a tensor of this kind is stored.
    pub fn holds(&self, name: &str, kind: StateKind) -> bool {
        self.places.contains_key(&(name.to_owned(), kind.name().to_owned()))
    }

    /// A stored tensor, fp32 on the CPU, whichever ranks wrote it.
    ///
    /// # Errors
    /// When the checkpoint does not hold it.
    pub fn tensor(&self, name: &str, kind: StateKind) -> Result<Tensor> {
        let shape = &self.manifest.pieces[self.pieces(name, kind)?[0]].shape;
        Ok(self.elements(name, kind, 0..shape.iter().product())?.f_view(&shape[..])?)
    }

    /// A range of the elements of a stored tensor, flat and fp32 on the CPU; nothing else of it is read.
    ///
    /// # Errors
    /// When the checkpoint does not hold it.
    pub fn elements(&self, name: &str, kind: StateKind, elements: Range<i64>) -> Result<Tensor> {
        let numel: i64 = self.manifest.pieces[self.pieces(name, kind)?[0]].shape.iter().product();
        if elements.start < 0 || elements.start > elements.end || elements.end > numel {
            let reason = format!("`{name}` has {numel} elements, {elements:?} were asked for");
            return Err(Error::checkpoint(&self.dir, reason));
        }
        let target = Tensor::f_empty([elements.end - elements.start], (Kind::Float, Device::Cpu))?;
        for i in self.pieces(name, kind)? {
            let piece = &self.manifest.pieces[*i];
            let (start, end) = (piece.elements[0].max(elements.start), piece.elements[1].min(elements.end));
            if start < end {
                let part = target.f_narrow(0, start - elements.start, end - start)?;
                let inside = start - piece.elements[0]..end - piece.elements[0];
                self.files[&piece.file].read_into(&piece.key, inside, &part)?;
            }
        }
        Ok(target)
    }

    fn pieces(&self, name: &str, kind: StateKind) -> Result<&Vec<usize>> {
        let pieces = self.places.get(&(name.to_owned(), kind.name().to_owned()));
        pieces.ok_or_else(|| Error::checkpoint(&self.dir, format!("holds no `{}` of `{name}`", kind.name())))
    }
}

/// Checks that pieces, in the order of their elements, are one whole tensor, each element once.
fn covers<'a>(pieces: impl Iterator<Item = &'a PieceRecord>) -> std::result::Result<(), String> {
    let mut shape: Option<&[i64]> = None;
    let mut end = 0;
    for piece in pieces {
        if shape.is_some_and(|shape| shape != piece.shape) {
            return Err(format!(
                "has shape {:?} in one piece and {:?} in another",
                shape.unwrap_or_default(),
                piece.shape
            ));
        }
        shape = Some(&piece.shape);
        if piece.elements[0] != end || piece.elements[1] < end {
            return Err(format!("a piece holds the elements {:?} after {end}", piece.elements));
        }
        end = piece.elements[1];
    }
    let numel = shape.unwrap_or_default().iter().product::<i64>();
    if end == numel { Ok(()) } else { Err(format!("its pieces hold {end} of {numel} elements")) }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|error| Error::checkpoint(path, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(shape: &[i64], elements: [i64; 2]) -> PieceRecord {
        let text = |text: &str| text.to_owned();
        let (file, key, name, kind) = (text("f"), text("param/a"), text("a"), text("param"));
        PieceRecord { file, key, name, kind, shape: shape.to_vec(), elements }
    }

    #[test]
    fn pieces_must_be_the_whole_tensor_once() {
        let cases: [(&[[i64; 2]], Option<&str>); 7] = [
            (&[[0, 6]], None),
            (&[[0, 2], [2, 6]], None),
            (&[[0, 2], [3, 6]], Some("holds the elements [3, 6] after 2")),
            (&[[0, 4], [2, 6]], Some("holds the elements [2, 6] after 4")),
            (&[[1, 6]], Some("holds the elements [1, 6] after 0")),
            (&[[0, 5]], Some("hold 5 of 6 elements")),
            (&[[0, 7]], Some("hold 7 of 6 elements")),
        ];
        for (ranges, expected) in cases {
            let pieces: Vec<PieceRecord> = ranges.iter().map(|range| piece(&[2, 3], *range)).collect();
            let found = covers(pieces.iter());
            match expected {
                None => assert!(found.is_ok(), "{ranges:?}: {found:?}"),
                Some(text) => {
                    assert!(found.as_ref().is_err_and(|e| e.contains(text)), "{ranges:?}: {found:?}");
                }
            }
        }
        let shapes = [piece(&[2, 3], [0, 2]), piece(&[3, 2], [2, 6])];
        assert!(covers(shapes.iter()).unwrap_err().contains("has shape [2, 3] in one piece and [3, 2]"));
    }
}
