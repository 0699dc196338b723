//! Writing a checkpoint so that an interruption at any moment leaves the older ones in place.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use sail_model::weights;
use serde::{Deserialize, Serialize};
use tch::Tensor;
use tracing::warn;

use super::{COMPLETE, FORMAT, FileRecord, MANIFEST, Manifest, PieceRecord, RunState, STATE, Untouched};
use crate::config::Module;
use crate::error::{Error, Result};
use crate::world::World;

/// A tensor to be stored, or a part of one.
pub struct Piece<'a> {
    /// Full parameter name.
    pub name: &'a str,
    /// `param`, `exp_avg` or `exp_avg_sq`.
    pub kind: &'static str,
    /// Of the whole tensor.
    pub shape: Vec<i64>,
    /// Elements of the flattened tensor that this is.
    pub elements: Range<i64>,
    /// These, flat. Shared with the running training: it must not step while they are written.
    pub tensor: Tensor,
}

impl<'a> Piece<'a> {
    /// All of a tensor.
    pub fn whole(name: &'a str, kind: &'static str, tensor: &Tensor) -> Self {
        let numel = tensor.numel() as i64;
        Self { name, kind, shape: tensor.size(), elements: 0..numel, tensor: tensor.reshape([-1]) }
    }
}

/// What a checkpoint holds: everything but tensors, and this rank's part of these.
pub struct Snapshot<'a> {
    /// Step, counters, data position and plan.
    pub state: RunState,
    /// Updates the optimizer has made.
    pub optimizer_steps: u64,
    /// Tensors in file order.
    pub pieces: Vec<Piece<'a>>,
    /// Modules that are named instead of stored.
    pub untouched: BTreeMap<Module, Untouched>,
}

/// What a rank has written.
#[derive(Serialize, Deserialize)]
struct Written {
    file: String,
    record: FileRecord,
    pieces: Vec<PieceRecord>,
}

/// Writes `run_dir/step-…` and returns its path. One of the same step is replaced. Every rank makes the same
/// call with its part.
///
/// The folder is filled under a temporary name, every file and the folder are synced, and only
/// then it takes its name.
///
/// # Errors
/// When a rank cannot write something, on all ranks; the temporary folder is removed and older checkpoints stay.
pub fn save(run_dir: &Path, snapshot: &Snapshot, world: &World) -> Result<PathBuf> {
    let name = super::folder_name(snapshot.state.step);
    let target = run_dir.join(&name);
    let temporary = run_dir.join(format!(".tmp-{name}"));
    world.from_main(|| {
        fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
        remove_if_there(&temporary)?;
        fs::create_dir(&temporary).map_err(Error::io(&temporary))
    })?;
    let own = write_pieces(&temporary, &snapshot.pieces, world.rank());
    let own = own.map_err(|error| format!("rank {}: {error}", world.rank()));
    let written: std::result::Result<Vec<Written>, String> = world.gather(&own)?.into_iter().collect();
    world.from_main(|| {
        let sealed = written
            .map_err(|reason| Error::checkpoint(&target, reason))
            .and_then(|written| seal_folder(&temporary, snapshot, written))
            .and_then(|()| {
                remove_if_there(&target)?;
                fs::rename(&temporary, &target).map_err(Error::io(&target))?;
                sync(run_dir)
            });
        if sealed.is_err() {
            // The first error is the one to report; a leftover is removed by the next save.
            drop(fs::remove_dir_all(&temporary));
        }
        sealed
    })?;
    Ok(target)
}

/// After the checkpoint of `step` was written: removes all but the newest `keep` up to it, and those of
/// later steps, which belong to a course that this run has left (it resumed before them).
pub fn keep_last(run_dir: &Path, step: u64, keep: usize) -> Result<()> {
    let (current, abandoned): (Vec<_>, Vec<_>) =
        super::list(run_dir)?.into_iter().partition(|(found, _)| *found <= step);
    if !abandoned.is_empty() {
        let names: Vec<String> = abandoned.iter().map(|(_, path)| path.display().to_string()).collect();
        warn!("removing checkpoints of later steps, which this run does not continue: {}", names.join(" "));
    }
    let old = &current[..current.len().saturating_sub(keep)];
    for (_, path) in old.iter().chain(&abandoned) {
        // Without its marker a half-removed folder is no checkpoint.
        let marker = path.join(COMPLETE);
        if marker.exists() {
            fs::remove_file(&marker).map_err(Error::io(&marker))?;
        }
        fs::remove_dir_all(path).map_err(Error::io(path))?;
    }
    Ok(())
}

/// Writes a rank's tensors.
fn write_pieces(dir: &Path, pieces: &[Piece], rank: usize) -> Result<Written> {
    let file = format!("rank-{rank:05}.safetensors");
    let mut tensors = BTreeMap::new();
    let mut records = Vec::with_capacity(pieces.len());
    for Piece { name, kind, shape, elements, tensor } in pieces {
        let key = format!("{kind}/{name}");
        let is_whole = elements.end - elements.start == shape.iter().product::<i64>();
        let tensor = if is_whole { tensor.f_view(&shape[..])? } else { tensor.shallow_clone() };
        tensors.insert(key.clone(), tensor);
        records.push(PieceRecord {
            file: file.clone(),
            key,
            name: (*name).to_owned(),
            kind: (*kind).to_owned(),
            shape: shape.clone(),
            elements: [elements.start, elements.end],
        });
    }
    weights::write_safetensors(&dir.join(&file), &tensors)?;
    Ok(Written { record: seal(&dir.join(&file))?, file, pieces: records })
}

/// Adds to the tensors of all ranks what makes them a checkpoint.
fn seal_folder(dir: &Path, snapshot: &Snapshot, written: Vec<Written>) -> Result<()> {
    write_json(&dir.join(STATE), &snapshot.state)?;
    let world_size = written.len() as u32;
    let mut files = BTreeMap::from([(STATE.to_owned(), seal(&dir.join(STATE))?)]);
    let mut pieces = Vec::new();
    for rank in written {
        files.insert(rank.file, rank.record);
        pieces.extend(rank.pieces);
    }
    let manifest = Manifest {
        format: FORMAT,
        sail_version: env!("CARGO_PKG_VERSION").to_owned(),
        plan_hash: snapshot.state.plan.hash(),
        world_size,
        optimizer_steps: snapshot.optimizer_steps,
        untouched: snapshot.untouched.clone(),
        files,
        pieces,
    };
    let path = dir.join(MANIFEST);
    write_json(&path, &manifest)?;
    let sealed = seal(&path)?;
    let marker = dir.join(COMPLETE);
    fs::write(&marker, format!("{:08x}\n", sealed.crc32)).map_err(Error::io(&marker))?;
    sync(&marker)?;
    sync(dir)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text =
        serde_json::to_vec_pretty(value).map_err(|error| Error::checkpoint(path, error.to_string()))?;
    text.push(b'\n');
    File::create(path).and_then(|mut file| file.write_all(&text)).map_err(Error::io(path))
}

/// Syncs a file and takes its size and checksum.
fn seal(path: &Path) -> Result<FileRecord> {
    sync(path)?;
    checksum(path)
}

/// Size and CRC-32 of a file.
pub(crate) fn checksum(path: &Path) -> Result<FileRecord> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer).map_err(Error::io(path))?;
        if n == 0 {
            return Ok(FileRecord { bytes, crc32: hasher.finalize() });
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

fn remove_if_there(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(dir)(error)),
        _ => Ok(()),
    }
}
