//! Safetensors files and whole model folders, complete or not there at all.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::disk::{self, PIECE};
use super::layout::Stored;
use super::{CONFIG, INDEX, SINGLE, file_error};
use crate::error::{Error, Result};

/// Largest file of weights, bytes; what is more goes into several with an index, as transformers does.
const MAX_SHARD_BYTES: usize = 5_000_000_000;

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

/// Bytes of a safetensors file.
#[derive(Clone, Copy, Debug)]
pub enum Bytes<'a> {
    /// The header and its length.
    Header(&'a [u8]),
    /// Values of tensors, each whole.
    Values(&'a [u8]),
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
    seen: &mut impl FnMut(Bytes<'_>),
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
    seen: &mut impl FnMut(Bytes<'_>),
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

    disk::write_file(path, |blocks| {
        for header in (header.len() as u64).to_le_bytes().chunks(PIECE).chain(header.chunks(PIECE)) {
            let written = blocks.put(header.len(), |bytes| {
                bytes.copy_from_slice(header);
                Ok(())
            })?;
            seen(Bytes::Header(written));
        }
        for (_, stored) in tensors {
            let kind = to.unwrap_or(stored.kind());
            let size = kind.elt_size_in_bytes();
            for chunk in stored.parts.iter().flat_map(|part| part.split((PIECE / size) as i64, 0)) {
                let chunk = chunk.f_to_kind(kind)?;
                let copy = |bytes: &mut [u8]| Ok(chunk.f_copy_data_u8(bytes, chunk.numel())?);
                seen(Bytes::Values(blocks.put(chunk.numel() * size, copy)?));
            }
        }
        Ok(())
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
    Err(Error::Occupied { path: dir.to_owned() })
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
        assert!(error.contains("no model folder"), "{error}");
        assert_eq!(entries(dir.path()), ["thesis.tex"]);
    }

    #[test]
    fn what_is_seen_is_what_is_written() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join(SINGLE);
        let large = Tensor::arange(PIECE as i64 + 5, (Kind::Float, tch::Device::Cpu));
        let small = Tensor::from_slice(&[1i64, 2, 3]);
        let tensors: BTreeMap<String, Tensor> =
            [("a", &small), ("b", &large), ("c", &small)].map(|(n, t)| (n.into(), t.shallow_clone())).into();
        let (mut headers, mut values) = (Vec::new(), Vec::new());
        write_safetensors_seen(&path, &tensors, &mut |bytes| match bytes {
            Bytes::Header(bytes) => headers.extend_from_slice(bytes),
            Bytes::Values(bytes) => values.extend_from_slice(bytes),
        })
        .unwrap();
        assert_eq!(values.len(), 2 * 24 + 4 * large.numel());
        assert!(fs::read(&path).unwrap() == [headers, values].concat());
        let read: BTreeMap<_, _> = Tensor::read_safetensors(&path).unwrap().into_iter().collect();
        assert_eq!(read.len(), 3);
        for (name, tensor) in &tensors {
            assert!(read[name].equal(tensor), "{name}");
        }
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
