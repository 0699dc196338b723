//! Safetensors files and whole model folders, complete or not there at all.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::{panic, thread};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::layout::Stored;
use super::{CONFIG, INDEX, SINGLE, file_error};
use crate::error::Result;
use crate::params::CHUNK;

/// Largest file of weights, bytes; what is more goes into several with an index, as transformers does.
const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// Bytes that are written at once: a chunk of the widest type.
const WRITE: usize = 8 * CHUNK as usize;

/// Buffers of so many bytes besides the one that is filled.
const SPARE_BUFFERS: usize = 3;

/// A model folder to be written.
#[derive(Debug, Default)]
pub struct Folder {
    tensors: BTreeMap<String, Stored>,
    files: BTreeMap<String, Vec<u8>>,
    /// The type floats are written in; None: the one they have.
    kind: Option<Kind>,
    max_shard_bytes: Option<usize>,
}

impl Folder {
    /// A folder with these tensors.
    pub fn new(tensors: BTreeMap<String, Stored>) -> Self {
        Self { tensors, ..Self::default() }
    }

    /// Adds a file.
    #[must_use]
    pub fn file(mut self, name: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.insert(name.into(), bytes.into());
        self
    }

    /// Adds a JSON file.
    #[must_use]
    pub fn json(self, name: impl Into<String>, value: &Value) -> Self {
        self.file(name, format!("{value:#}\n"))
    }

    /// Converts the tensors to `kind` while they are written.
    #[must_use]
    pub fn in_kind(self, kind: Kind) -> Self {
        Self { kind: Some(kind), ..self }
    }

    /// Begins another file of weights after this many bytes.
    #[must_use]
    pub fn sharded_at(self, bytes: usize) -> Self {
        Self { max_shard_bytes: Some(bytes), ..self }
    }

    /// Writes the folder.
    ///
    /// Everything is written and synced in a directory beside `dir`, which is then renamed, so that
    /// `dir` is whole whenever it exists. A model folder already there is replaced.
    ///
    /// # Errors
    /// [`crate::Error::File`] when `dir` exists and is neither empty nor a model folder, or on an IO
    /// error.
    pub fn write(self, dir: &Path) -> Result<()> {
        self.write_checked(dir, |_| Ok(()))
    }

    /// As [`Folder::write`], but what `check` says of the folder, complete and under another name, decides
    /// whether it is put in its place; if not, nothing is left of it. The tensors are let go before
    /// `check` is called, so that it can hold a model of its own.
    ///
    /// # Errors
    /// Those of [`Folder::write`] and of `check`.
    pub fn write_checked<E: From<crate::Error>>(
        mut self,
        dir: &Path,
        check: impl FnOnce(&Path) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let replaces = replaceable(dir)?;
        let (partial, old) = (sibling(dir, "partial")?, sibling(dir, "old")?);
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(file_error(&partial))?;
        }
        fs::create_dir_all(&partial).map_err(file_error(&partial))?;
        let filled = self.fill(&partial);
        self.tensors.clear();
        let written = filled.map_err(E::from).and_then(|()| check(&partial)).and_then(|()| {
            if replaces {
                fs::rename(dir, &old).map_err(file_error(dir))?;
            }
            Ok(fs::rename(&partial, dir).map_err(file_error(dir))?)
        });
        if let Err(error) = written {
            // The first error is the one to report; what is left bears `.partial-` or `.old-` in its name.
            drop(fs::remove_dir_all(&partial));
            if old.exists() && !dir.exists() {
                drop(fs::rename(&old, dir));
            }
            return Err(error);
        }
        sync(partial.parent().unwrap_or(Path::new("/")))?;
        if replaces {
            fs::remove_dir_all(&old).map_err(file_error(&old))?;
        }
        Ok(())
    }

    fn fill(&self, dir: &Path) -> Result<()> {
        let shards = self.shards();
        if let [tensors] = &shards[..] {
            write_file(&dir.join(SINGLE), tensors, self.kind, &mut |_| ())?;
        } else {
            let (mut weight_map, mut total_size) = (serde_json::Map::new(), 0);
            for (i, tensors) in shards.iter().enumerate() {
                let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
                write_file(&dir.join(&name), tensors, self.kind, &mut |_| ())?;
                for (tensor, stored) in tensors {
                    total_size += self.bytes(stored);
                    weight_map.insert((*tensor).clone(), name.clone().into());
                }
            }
            let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
            write_bytes(&dir.join(INDEX), format!("{index:#}\n").as_bytes())?;
        }
        for (name, bytes) in &self.files {
            write_bytes(&dir.join(name), bytes)?;
        }
        sync(dir)
    }

    /// The tensors by file, in the order of their names.
    fn shards(&self) -> Vec<Vec<(&String, &Stored)>> {
        let limit = self.max_shard_bytes.unwrap_or(MAX_SHARD_BYTES);
        let (mut shards, mut bytes) = (vec![Vec::new()], 0);
        for (name, stored) in &self.tensors {
            let size = self.bytes(stored);
            if bytes + size > limit && bytes > 0 {
                shards.push(Vec::new());
                bytes = 0;
            }
            bytes += size;
            if let Some(shard) = shards.last_mut() {
                shard.push((name, stored));
            }
        }
        shards
    }

    fn bytes(&self, stored: &Stored) -> usize {
        stored.numel() as usize * self.kind.unwrap_or(stored.kind()).elt_size_in_bytes()
    }
}

/// Writes one safetensors file and syncs it. Tensors keep their type, go to the CPU piece by piece and
/// lie in the order of their names.
///
/// # Errors
/// [`crate::Error::File`] on an IO error, or for a type that safetensors or this crate does not have.
pub fn write_safetensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    write_safetensors_seen(path, tensors, &mut |_| ())
}

/// As [`write_safetensors`]; `seen` gets every byte of the file in its order.
///
/// # Errors
/// [`crate::Error::File`] on an IO error, or for a type that safetensors or this crate does not have.
pub fn write_safetensors_seen(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    seen: &mut impl FnMut(&[u8]),
) -> Result<()> {
    let stored: Vec<(&String, Stored)> =
        tensors.iter().map(|(name, tensor)| (name, Stored::from(tensor))).collect();
    let tensors: Vec<(&String, &Stored)> = stored.iter().map(|(name, stored)| (*name, stored)).collect();
    write_file(path, &tensors, None, seen)
}

fn write_file(
    path: &Path,
    tensors: &[(&String, &Stored)],
    to: Option<Kind>,
    seen: &mut impl FnMut(&[u8]),
) -> Result<()> {
    let mut infos = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (name, stored) in tensors {
        let kind = to.unwrap_or(stored.kind());
        let no_type = || file_error(path)(format!("tensor `{name}` is {kind:?}, which is not written"));
        let dtype = dtype(kind).ok_or_else(no_type)?;
        let start = end;
        end += stored.numel() as usize * kind.elt_size_in_bytes();
        let shape = stored.shape.iter().map(|&size| size as usize).collect();
        infos.push(((*name).clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
    }
    // transformers refuses a file that does not say which framework wrote it.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(format), infos).map_err(file_error(path))?;
    let mut header = serde_json::to_vec(&header).map_err(file_error(path))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut out = File::create(path).map_err(file_error(path))?;
    for bytes in [&(header.len() as u64).to_le_bytes()[..], &header] {
        seen(bytes);
        out.write_all(bytes).map_err(file_error(path))?;
    }
    write_behind(&mut out, path, |hand_over| {
        let (mut bytes, mut used) = (vec![0; WRITE], 0);
        for (_, stored) in tensors {
            let kind = to.unwrap_or(stored.kind());
            for chunk in stored.parts.iter().flat_map(|part| part.split(CHUNK, 0)) {
                let chunk = chunk.f_to_kind(kind)?;
                let size = chunk.numel() * kind.elt_size_in_bytes();
                // Many small tensors go to the disk together.
                if used + size > bytes.len() {
                    seen(&bytes[..used]);
                    let Some(next) = hand_over(bytes, used) else { return Ok(()) };
                    (bytes, used) = (next, 0);
                }
                chunk.f_copy_data_u8(&mut bytes[used..used + size], chunk.numel())?;
                used += size;
            }
        }
        seen(&bytes[..used]);
        hand_over(bytes, used);
        Ok(())
    })?;
    out.sync_all().map_err(file_error(path))
}

/// Gives one buffer and how much of it to write for another to fill; None when the writer has failed.
type HandOver<'a> = dyn FnMut(Vec<u8>, usize) -> Option<Vec<u8>> + 'a;

/// Writes what `fill` hands over, in its order, on a thread of its own: filling the next buffer takes about as
/// long as copying this one to the system. The writer's error goes before that of `fill`.
fn write_behind(
    out: &mut (impl Write + Send),
    path: &Path,
    fill: impl FnOnce(&mut HandOver<'_>) -> Result<()>,
) -> Result<()> {
    thread::scope(|scope| {
        // The ends that a failed writer drops wake up whoever waits at the others.
        let (full, to_write) = mpsc::channel::<(Vec<u8>, usize)>();
        let (written, empty) = mpsc::channel();
        let mut spare = SPARE_BUFFERS;
        let writer = move || {
            for (bytes, used) in to_write {
                out.write_all(&bytes[..used])?;
                // The last ones are not asked for any more.
                drop(written.send(bytes));
            }
            Ok(())
        };
        let named = thread::Builder::new().name("sail-write".to_owned());
        let writer = named.spawn_scoped(scope, writer).map_err(file_error(path))?;
        let filled = fill(&mut |bytes, used| {
            full.send((bytes, used)).ok()?;
            if spare > 0 {
                spare -= 1;
                return Some(vec![0; WRITE]);
            }
            empty.recv().ok()
        });
        drop(full);
        let written: io::Result<()> = writer.join().unwrap_or_else(|panic| panic::resume_unwind(panic));
        written.map_err(file_error(path)).and(filled)
    })
}

fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(file_error(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(file_error(path))
}

fn dtype(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::Float => Some(Dtype::F32),
        Kind::Half => Some(Dtype::F16),
        Kind::BFloat16 => Some(Dtype::BF16),
        Kind::Double => Some(Dtype::F64),
        Kind::Int64 => Some(Dtype::I64),
        Kind::Int => Some(Dtype::I32),
        Kind::Uint8 => Some(Dtype::U8),
        _ => None,
    }
}

/// Whether something is at `dir` that may be replaced; only a model folder or an empty one may.
fn replaceable(dir: &Path) -> Result<bool> {
    if !dir.exists() {
        return Ok(false);
    }
    let empty = fs::read_dir(dir).map_err(file_error(dir))?.next().is_none();
    let weights = [SINGLE, INDEX].iter().any(|name| dir.join(name).is_file());
    if empty || (weights && dir.join(CONFIG).is_file()) {
        return Ok(true);
    }
    Err(file_error(dir)("exists and is not a model folder, so it is not replaced"))
}

/// `.NAME.ROLE-PID` beside `dir`, so that a rename stays on one file system.
fn sibling(dir: &Path, role: &str) -> Result<PathBuf> {
    let dir = std::path::absolute(dir).map_err(file_error(dir))?;
    let name = dir.file_name().ok_or_else(|| file_error(&dir)("has no name to write to"))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{role}-{}", std::process::id()));
    Ok(dir.with_file_name(hidden))
}

/// Makes the names in a directory last.
fn sync(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|file| file.sync_all()).map_err(file_error(dir))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::weights::Shards;

    fn tensors(value: f32) -> BTreeMap<String, Tensor> {
        let transposed =
            (Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).reshape([2, 2]) * f64::from(value)).transpose(0, 1);
        BTreeMap::from([("half".into(), transposed.to_kind(Kind::BFloat16)), ("whole".into(), transposed)])
    }

    fn folder(tensors: &BTreeMap<String, Tensor>) -> Folder {
        let stored = tensors.iter().map(|(name, tensor)| (name.clone(), Stored::from(tensor)));
        Folder::new(stored.collect()).json(CONFIG, &json!({ "a": 1 }))
    }

    fn entries(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_written_whole_and_replaced_whole() {
        let parent = TempDir::new().unwrap();
        let dir = parent.path().join("new/vit");
        for value in [1.0, 2.0] {
            folder(&tensors(value)).json("extra.json", &json!({ "n": value })).write(&dir).unwrap();
            assert_eq!(entries(&dir), ["config.json", "extra.json", "model.safetensors"]);
            assert_eq!(entries(dir.parent().unwrap()), ["vit"]);
            let read: BTreeMap<_, _> =
                Tensor::read_safetensors(dir.join(SINGLE)).unwrap().into_iter().collect();
            for (name, tensor) in tensors(value) {
                assert_eq!(read[&name].kind(), tensor.kind());
                assert!(read[&name].equal(&tensor), "{name}");
            }
        }
    }

    #[test]
    fn large_models_are_cut_into_shards_and_read_back() {
        let dir = TempDir::new().unwrap();
        folder(&tensors(1.0)).in_kind(Kind::BFloat16).sharded_at(8).write(dir.path()).unwrap();
        let [one, two] = [1, 2].map(|i| format!("model-0000{i}-of-00002.safetensors"));
        assert_eq!(entries(dir.path()), [CONFIG, &one, &two, INDEX]);
        let index = super::super::read_json(&dir.path().join(INDEX)).unwrap();
        assert_eq!(
            index,
            json!({ "metadata": { "total_size": 16 }, "weight_map": { "half": one, "whole": two } })
        );
        let read = Shards::open(dir.path()).unwrap();
        for (name, tensor) in tensors(1.0) {
            assert!(read.tensor(&name).unwrap().equal(&tensor.to_kind(Kind::Float)), "{name}");
        }
        // One file takes the place of two and an index.
        folder(&tensors(1.0)).write(dir.path()).unwrap();
        assert_eq!(entries(dir.path()), [CONFIG, SINGLE]);
    }

    #[test]
    fn a_folder_that_does_not_pass_its_check_is_not_there() {
        let parent = TempDir::new().unwrap();
        let dir = parent.path().join("vit");
        let refuse = |path: &Path| -> Result<()> {
            assert_eq!(entries(path), [CONFIG, SINGLE]);
            Err(file_error(path)("refused"))
        };
        assert!(folder(&tensors(1.0)).write_checked(&dir, refuse).is_err());
        assert!(entries(parent.path()).is_empty());
    }

    #[test]
    fn other_peoples_folders_are_left_alone() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("thesis.tex"), "text").unwrap();
        let error = folder(&tensors(1.0)).write(dir.path()).unwrap_err().to_string();
        assert!(error.contains("not a model folder"), "{error}");
        assert_eq!(entries(dir.path()), ["thesis.tex"]);
    }

    /// Larger than all buffers together, with a rest, and with a tensor that does not fit what is left of one.
    #[test]
    fn what_goes_through_many_buffers_is_whole_and_in_order() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join(SINGLE);
        let numel = 2 * (SPARE_BUFFERS + 2) as i64 * CHUNK + 5;
        let large = Tensor::arange(numel, (Kind::Float, tch::Device::Cpu));
        let small = Tensor::from_slice(&[1i64, 2, 3]);
        let tensors: BTreeMap<String, Tensor> =
            [("a", &small), ("b", &large), ("c", &small)].map(|(n, t)| (n.into(), t.shallow_clone())).into();
        let mut seen = Vec::new();
        write_safetensors_seen(&path, &tensors, &mut |bytes| seen.extend_from_slice(bytes)).unwrap();
        assert!(seen == fs::read(&path).unwrap(), "what was seen is not what was written");
        let read: BTreeMap<_, _> = Tensor::read_safetensors(&path).unwrap().into_iter().collect();
        assert_eq!(read.len(), 3);
        for (name, tensor) in &tensors {
            assert!(read[name].equal(tensor), "{name}");
        }
    }

    /// A disk that is full after the first buffers.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_writer_that_fails_ends_the_filling() {
        for writes in 0..SPARE_BUFFERS + 3 {
            let mut handed_over = 0;
            let filled = write_behind(&mut Full(writes), Path::new("weights"), |hand_over| {
                let mut bytes = vec![0; WRITE];
                while let Some(next) = hand_over(bytes, 1) {
                    bytes = next;
                    handed_over += 1;
                }
                Ok(())
            });
            let error = filled.unwrap_err().to_string();
            assert!(error.contains("weights") && error.contains("no storage space"), "{error}");
            assert!(handed_over <= writes + SPARE_BUFFERS + 1, "{handed_over} after {writes}");
        }
    }

    #[test]
    fn an_error_while_filling_is_told() {
        let filled = write_behind(&mut io::sink(), Path::new("weights"), |hand_over| {
            hand_over(vec![0; WRITE], 1);
            Err(file_error(Path::new("weights"))("no such tensor"))
        });
        assert!(filled.unwrap_err().to_string().contains("no such tensor"));
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let parent = TempDir::new().unwrap();
        let dir = parent.path().join("vit");
        let bools = BTreeMap::from([("mask".to_owned(), Tensor::from_slice(&[true]))]);
        let error = folder(&bools).write(&dir).unwrap_err().to_string();
        assert!(error.contains("`mask` is Bool"), "{error}");
        assert!(entries(parent.path()).is_empty());
    }
}
