//! Writing a checkpoint so that an interruption at any moment leaves the older ones in place.
//!
//! The folder is filled under a temporary name, every file and the folder are synced, and only then it takes its
//! name. Done on threads of the [`Saver`](super::Saver).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use sail_model::weights::{self, Bytes};
use serde::{Deserialize, Serialize};

use super::snapshot::Piece;
use super::{COMPLETE, FORMAT, FileRecord, MANIFEST, Manifest, PieceRecord, RunState, STATE, Untouched};
use crate::config::Module;
use crate::error::{Error, Result};
use crate::program;

/// How the names of folders begin that are no checkpoints yet.
const PARTIAL: &str = ".tmp-step-";

/// Bytes of a file that one thread hashes in one go.
const RANGE: u64 = 64 << 20;

/// Bytes that are read at once: they are still in the core's cache when they are hashed.
const READ: usize = 256 << 10;

/// What a rank has written.
#[derive(Serialize, Deserialize)]
pub(super) struct Written {
    file: String,
    record: FileRecord,
    pieces: Vec<PieceRecord>,
}

/// Where the checkpoint of `step` is filled.
pub(super) fn partial(run_dir: &Path, step: u64) -> PathBuf {
    run_dir.join(format!("{PARTIAL}{step:08}"))
}

/// Makes the folder that the ranks fill. What is left of a save that failed goes: one is under way at most.
pub(super) fn prepare(run_dir: &Path, step: u64) -> Result<()> {
    remove_partial(run_dir)?;
    let partial = partial(run_dir, step);
    fs::create_dir(&partial).map_err(Error::io(&partial))
}

/// Removes what interrupted saves have left.
pub(crate) fn remove_partial(run_dir: &Path) -> Result<()> {
    for entry in fs::read_dir(run_dir).map_err(Error::io(run_dir))? {
        let path = entry.map_err(Error::io(run_dir))?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(PARTIAL)) {
            remove_if_there(&path)?;
        }
    }
    Ok(())
}

/// Writes a rank's tensors, fp32 all of them.
///
/// # Errors
/// [`Error::WeightsNotFinite`] where one has a value that is not a number, or 2^64 and more; what was written is then of
/// no use.
pub(super) fn write_pieces(dir: &Path, step: u64, pieces: Vec<Piece>, rank: usize) -> Result<Written> {
    let file = format!("rank-{rank:05}.safetensors");
    let mut tensors = BTreeMap::new();
    let mut records = Vec::with_capacity(pieces.len());
    for Piece { name, kind, shape, elements, tensor } in pieces {
        let key = format!("{}/{name}", kind.name());
        let is_whole = elements.end - elements.start == shape.iter().product::<i64>();
        tensors.insert(key.clone(), if is_whole { tensor.f_view(&shape[..])? } else { tensor });
        records.push(PieceRecord {
            file: file.clone(),
            key,
            name,
            kind: kind.name().to_owned(),
            shape,
            elements: [elements.start, elements.end],
        });
    }
    // The checksum is of what should be there, not of what a disk may have made of it.
    let mut record = FileRecord::default();
    let mut hasher = crc32fast::Hasher::new();
    let mut broken = false;
    weights::write_safetensors_seen(&dir.join(&file), &tensors, &mut |bytes| {
        if let Bytes::Values(values) = bytes {
            broken |= !all_sound(values);
        }
        let (Bytes::Header(bytes) | Bytes::Values(bytes)) = bytes;
        hasher.update(bytes);
        record.bytes += bytes.len() as u64;
    })?;
    if broken {
        return Err(Error::WeightsNotFinite { step });
    }
    record.crc32 = hasher.finalize();
    Ok(Written { record, file, pieces: records })
}

/// Whether all fp32 values are numbers below 2^64, so that fp32 can square them: the norms and moments of the next
/// step are made of squares.
fn all_sound(values: &[u8]) -> bool {
    const MAGNITUDE: u32 = 0x7fff_ffff;
    const BOUND: u32 = 0x5f80_0000;
    let (values, _) = values.as_chunks::<4>();
    // Without leaving early, so that many are looked at together. Infinities and NaNs have the highest exponent.
    !values.iter().fold(false, |found, value| found | (u32::from_le_bytes(*value) & MAGNITUDE >= BOUND))
}

/// Adds to the tensors of all ranks what makes them a checkpoint, and gives the folder its name. One of the same
/// step is replaced.
pub(super) fn seal(
    run_dir: &Path,
    state: &RunState,
    untouched: BTreeMap<Module, Untouched>,
    written: Vec<Written>,
) -> Result<()> {
    let dir = partial(run_dir, state.step);
    let world_size = written.len() as u32;
    let mut files = BTreeMap::from([(STATE.to_owned(), write_json(&dir.join(STATE), state)?)]);
    let mut pieces = Vec::new();
    for rank in written {
        files.insert(rank.file, rank.record);
        pieces.extend(rank.pieces);
    }
    let (sail_version, torch_version) = (program::version(), sail_torch::version());
    let plan_hash = state.plan.hash();
    let manifest = Manifest {
        format: FORMAT,
        sail_version,
        torch_version,
        plan_hash,
        world_size,
        untouched,
        files,
        pieces,
    };
    let sealed = write_json(&dir.join(MANIFEST), &manifest)?;
    write_bytes(&dir.join(COMPLETE), format!("{:08x}\n", sealed.crc32).as_bytes())?;
    sync(&dir)?;
    let target = run_dir.join(super::folder_name(state.step));
    if target.exists() {
        return replace(&dir, &target).and_then(|()| sync(run_dir));
    }
    fs::rename(&dir, &target).map_err(Error::io(&target))?;
    sync(run_dir)
}

/// Puts `new` in the place of `old` so that one of them is there at any moment.
fn replace(new: &Path, old: &Path) -> Result<()> {
    match renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE) {
        // Under the name of what is not complete yet, the old one is in nobody's way.
        Ok(()) => remove_if_there(new),
        // File systems over a network do not exchange.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            remove_if_there(old)?;
            fs::rename(new, old).map_err(Error::io(old))
        }
        Err(error) => Err(Error::io(old)(error.into())),
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<FileRecord> {
    let mut text =
        serde_json::to_vec_pretty(value).map_err(|error| Error::checkpoint(path, error.to_string()))?;
    text.push(b'\n');
    write_bytes(path, &text)?;
    Ok(FileRecord { bytes: text.len() as u64, crc32: crc32fast::hash(&text) })
}

fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(path))
}

/// Size and CRC-32 of a file.
pub(crate) fn checksum(path: &Path) -> Result<FileRecord> {
    checksum_by(path, RANGE).map_err(Error::io(path))
}

/// The same by ranges of so many bytes, on several threads: one that hashes keeps no other from reading.
fn checksum_by(path: &Path, range: u64) -> io::Result<FileRecord> {
    let bytes = fs::metadata(path)?.len();
    let hash = |i: u64| {
        // Opened for each, since the system reads ahead by open file.
        let file = File::open(path)?;
        let (mut at, end) = (i * range, bytes.min((i + 1) * range));
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = vec![0; READ.min((end - at) as usize)];
        while at < end {
            let part = READ.min((end - at) as usize);
            file.read_exact_at(&mut buffer[..part], at)?;
            hasher.update(&buffer[..part]);
            at += part as u64;
        }
        Ok(hasher)
    };
    let hashers: io::Result<Vec<_>> = (0..bytes.div_ceil(range)).into_par_iter().map(hash).collect();
    let mut whole = crc32fast::Hasher::new();
    for hasher in &hashers? {
        whole.combine(hasher);
    }
    Ok(FileRecord { bytes, crc32: whole.finalize() })
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

pub(super) fn remove_if_there(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(dir)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_by_ranges_is_that_of_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        let bytes: Vec<u8> =
            (0..3 * READ as u32 + 11).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let range = READ + 3;
        for size in [0, 1, READ, range - 1, range, range + 1, 2 * range, bytes.len()] {
            fs::write(&path, &bytes[..size]).unwrap();
            let expected = crc32fast::hash(&bytes[..size]);
            for range in [range as u64, 2 * range as u64, RANGE] {
                let found = checksum_by(&path, range).unwrap();
                assert_eq!((found.bytes, found.crc32), (size as u64, expected), "{size} by {range}");
            }
        }
    }

    #[test]
    fn broken_values_are_seen() {
        let sound = |value: f32| all_sound(&[1.0, value, -2.0].map(f32::to_le_bytes).concat());
        let bound = 64.0_f32.exp2();
        assert!(
            [0.0, -0.0, f32::MIN_POSITIVE, 1e-45, bound.next_down(), -bound.next_down()]
                .into_iter()
                .all(sound)
        );
        let broken = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, bound, -bound, f32::MAX];
        assert!(!broken.into_iter().any(sound));
        assert!((bound.next_down() * bound.next_down()).is_finite() && (bound * bound).is_infinite());
    }

    /// A kill between the removal of a checkpoint and the renaming of its successor lost both.
    #[test]
    fn a_checkpoint_of_the_same_step_is_replaced_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let [new, old] = ["new", "old"].map(|name| dir.path().join(name));
        for (path, text) in [(&new, "new"), (&old, "old")] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("text"), text).unwrap();
        }
        replace(&new, &old).unwrap();
        assert_eq!(fs::read_to_string(old.join("text")).unwrap(), "new");
        assert!(!new.exists());
    }
}
