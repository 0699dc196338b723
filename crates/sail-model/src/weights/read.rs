//! Tensors out of `model.safetensors` or its shards, one at a time.
//!
//! Each tensor is read at its offset when a module asks for it, so that only one is in memory twice.
//! The file is not mapped: a map is `unsafe` in Rust, and a file cut short under it kills the process.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use tch::{Kind, Tensor};

use super::{file_error, read_json};
use crate::error::{Error, Result};
use crate::params::{Init, TensorSource};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes that say how long the header is.
const LENGTH_BYTES: u64 = 8;

/// The tensors of a Hugging Face folder, as fp32. Remembers which were asked for.
pub struct FileSource {
    path: PathBuf,
    prefix: String,
    shards: Vec<Shard>,
    /// Name in the file -> index into `shards`.
    owners: BTreeMap<String, usize>,
    used: RefCell<BTreeSet<String>>,
}

impl FileSource {
    /// Opens a folder with `model.safetensors`, or else `model.safetensors.index.json` and its
    /// shards; or one safetensors file. Reads the headers only.
    ///
    /// # Errors
    /// [`Error::File`] names the file that is absent, truncated or not what its name says;
    /// [`Error::MissingTensor`] when the index names a tensor that its shard lacks.
    pub fn open(path: &Path) -> Result<Self> {
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        let mut source = Self {
            path: path.to_owned(),
            prefix: String::new(),
            shards: Vec::new(),
            owners: BTreeMap::new(),
            used: RefCell::default(),
        };
        if path.is_file() {
            source.add(path)?;
        } else if single.is_file() {
            source.add(&single)?;
        } else if index.is_file() {
            source.add_index(&index)?;
        } else {
            let reason = format!("neither `{SINGLE}` nor `{INDEX}` is here");
            return Err(Error::File { path: path.to_owned(), reason });
        }
        Ok(source)
    }

    /// Looks for every name under `prefix`, e.g. `dinov2.` in a classifier's file. [`Self::unused`]
    /// then lists names under it only.
    #[must_use]
    pub fn under(self, prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..self }
    }

    /// Names in the file, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.owners.keys().map(String::as_str)
    }

    /// Names in the file that no module has asked for, sorted.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.borrow();
        let left = self.names().filter(|name| name.starts_with(&self.prefix) && !used.contains(*name));
        left.map(str::to_owned).collect()
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let shard = Shard::open(path)?;
        for name in shard.header.offset_keys() {
            if self.owners.insert(name.clone(), self.shards.len()).is_some() {
                let reason = format!("tensor `{name}` is in another shard already");
                return Err(Error::File { path: path.to_owned(), reason });
            }
        }
        self.shards.push(shard);
        Ok(())
    }

    fn add_index(&mut self, index: &Path) -> Result<()> {
        let json = read_json(index)?;
        let not_an_index = || file_error(index)("no `weight_map` from tensor names to file names");
        let map = json.get("weight_map").and_then(|map| map.as_object()).ok_or_else(not_an_index)?;
        let mut files = BTreeSet::new();
        for file in map.values() {
            files.insert(file.as_str().ok_or_else(not_an_index)?);
        }
        for file in &files {
            self.add(&self.path.join(file))?;
        }
        match map.iter().find(|(name, _)| !self.owners.contains_key(*name)) {
            None => Ok(()),
            Some((name, file)) => Err(Error::MissingTensor {
                path: self.path.join(file.as_str().unwrap_or_default()),
                name: name.clone(),
            }),
        }
    }
}

impl TensorSource for FileSource {
    /// `init` has no part in it: a tensor that the file lacks is an error.
    fn tensor(&self, name: &str, shape: &[i64], _init: Init) -> Result<Tensor> {
        let name = format!("{}{name}", self.prefix);
        let Some(&owner) = self.owners.get(&name) else {
            return Err(Error::MissingTensor { path: self.path.clone(), name });
        };
        let tensor = self.shards[owner].read(&name, shape)?;
        self.used.borrow_mut().insert(name);
        Ok(tensor)
    }
}

/// One safetensors file.
struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    data_start: u64,
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let fail = |reason: String| Error::File { path: path.to_owned(), reason };
        let io = |error: std::io::Error| fail(error.to_string());
        let file = File::open(path).map_err(io)?;
        let file_len = file.metadata().map_err(io)?.len();
        let mut length = [0; LENGTH_BYTES as usize];
        if file_len < LENGTH_BYTES {
            return Err(fail(format!("not a safetensors file: {file_len} bytes long")));
        }
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let header_len = u64::from_le_bytes(length);
        if header_len > file_len - LENGTH_BYTES {
            let reason = "not a safetensors file, or cut short";
            return Err(fail(format!("{reason}: a header of {header_len} bytes in a file of {file_len}")));
        }
        let mut bytes = vec![0; header_len as usize];
        file.read_exact_at(&mut bytes, LENGTH_BYTES).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&bytes)
            .map_err(|error| fail(format!("not a safetensors file, its header says: {error}")))?;
        let data_start = LENGTH_BYTES + header_len;
        let expected_len = data_start + header.data_len() as u64;
        if file_len != expected_len {
            return Err(fail(format!("{file_len} bytes long, its header asks for {expected_len}")));
        }
        Ok(Self { path: path.to_owned(), file, header, data_start })
    }

    fn read(&self, name: &str, expected: &[i64]) -> Result<Tensor> {
        let path = || self.path.clone();
        let info =
            self.header.info(name).ok_or_else(|| Error::MissingTensor { path: path(), name: name.into() })?;
        let TensorInfo { dtype, shape, data_offsets: (start, end) } = info;
        let found: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        if found != expected {
            return Err(Error::Shape { path: path(), name: name.into(), found, expected: expected.into() });
        }
        let kind = match dtype {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => {
                let reason = format!("tensor `{name}` is {other}; F32, F16 and BF16 can be read");
                return Err(Error::File { path: path(), reason });
            }
        };
        let mut bytes = vec![0; end - start];
        self.file
            .read_exact_at(&mut bytes, self.data_start + *start as u64)
            .map_err(|error| Error::File { path: path(), reason: format!("tensor `{name}`: {error}") })?;
        // The header was checked to give each tensor as many bytes as its shape and type ask for.
        Ok(Tensor::f_from_data_size(&bytes, &found, kind)?.f_to_kind(Kind::Float)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;
    use tch::Device;
    use tempfile::TempDir;

    use super::*;
    use crate::weights::write_safetensors;

    fn tensors(names: &[&str], kind: Kind) -> BTreeMap<String, Tensor> {
        let tensor = || Tensor::arange(6, (Kind::Float, Device::Cpu)).reshape([2, 3]).to_kind(kind);
        names.iter().map(|name| ((*name).to_owned(), tensor())).collect()
    }

    fn opening_error(path: &Path) -> String {
        FileSource::open(path).err().unwrap().to_string()
    }

    #[test]
    fn every_type_becomes_fp32_and_leftovers_are_listed() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            let dir = TempDir::new().unwrap();
            write_safetensors(&dir.path().join(SINGLE), &tensors(&["a", "b", "x.c"], kind)).unwrap();
            let source = FileSource::open(dir.path()).unwrap();
            let a = source.tensor("a", &[2, 3], Init::Zeros).unwrap();
            assert_eq!(a.kind(), Kind::Float);
            assert!(a.equal(&tensors(&["a"], Kind::Float)["a"]));
            assert_eq!(source.unused(), ["b", "x.c"]);
            let under = source.under("x.");
            assert_eq!(under.unused(), ["x.c"]);
            let _ = under.tensor("c", &[2, 3], Init::Zeros).unwrap();
            assert!(under.unused().is_empty());
        }
    }

    #[test]
    fn shards_are_one_source() {
        let dir = TempDir::new().unwrap();
        write_safetensors(&dir.path().join("1.safetensors"), &tensors(&["a"], Kind::Float)).unwrap();
        write_safetensors(&dir.path().join("2.safetensors"), &tensors(&["b"], Kind::Float)).unwrap();
        let index = |map: serde_json::Value| fs::write(dir.path().join(INDEX), map.to_string()).unwrap();
        index(json!({ "weight_map": { "a": "1.safetensors", "b": "2.safetensors" } }));
        let source = FileSource::open(dir.path()).unwrap();
        let _ = source.tensor("b", &[2, 3], Init::Zeros).unwrap();
        assert_eq!(source.unused(), ["a"]);

        index(json!({ "weight_map": { "a": "1.safetensors", "c": "2.safetensors" } }));
        let message = opening_error(dir.path());
        assert!(message.contains("2.safetensors: no tensor `c`"), "{message}");
        index(json!({ "weight_map": { "a": "3.safetensors" } }));
        assert!(opening_error(dir.path()).contains("3.safetensors"));
        index(json!({ "weight_map": [1] }));
        assert!(opening_error(dir.path()).contains("no `weight_map`"));
        write_safetensors(&dir.path().join("2.safetensors"), &tensors(&["a"], Kind::Float)).unwrap();
        index(json!({ "weight_map": { "a": "1.safetensors", "b": "2.safetensors" } }));
        assert!(opening_error(dir.path()).contains("tensor `a` is in another shard"));
    }

    #[test]
    fn wrong_tensors_are_named_with_their_file() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join(SINGLE);
        let mut stored = tensors(&["a"], Kind::Float);
        stored.insert("ids".into(), Tensor::from_slice(&[1i64, 2]));
        write_safetensors(&file, &stored).unwrap();
        let source = FileSource::open(dir.path()).unwrap();
        let message =
            |name: &str, shape: &[i64]| source.tensor(name, shape, Init::Zeros).unwrap_err().to_string();
        assert!(message("z", &[2]).contains("no tensor `z`"));
        let shape = message("a", &[3, 2]);
        assert!(shape.contains(SINGLE) && shape.contains("[2, 3]") && shape.contains("[3, 2]"), "{shape}");
        assert!(message("ids", &[2]).contains("tensor `ids` is I64"));
        assert_eq!(source.unused(), ["a", "ids"]);
    }

    #[test]
    fn files_that_are_not_safetensors_are_refused() {
        let dir = TempDir::new().unwrap();
        assert!(opening_error(dir.path()).contains("neither `model.safetensors`"));
        let file = dir.path().join(SINGLE);
        write_safetensors(&file, &tensors(&["a"], Kind::Float)).unwrap();
        let whole = fs::read(&file).unwrap();
        let cases: [(&[u8], &str); 6] = [
            (b"", "0 bytes long"),
            (b"PK\x03\x04 a zip of pickles", "not a safetensors file"),
            (b"\x04\x00\x00\x00\x00\x00\x00\x00nope", "its header says"),
            (&whole[..40], "cut short"),
            (&whole[..whole.len() - 1], "its header asks for"),
            (&[&whole[..], b"+"].concat(), "its header asks for"),
        ];
        for (bytes, expected) in cases {
            fs::write(&file, bytes).unwrap();
            let message = opening_error(dir.path());
            assert!(message.contains(expected) && message.contains(SINGLE), "{message} / {expected}");
        }
    }
}
