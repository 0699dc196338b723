//! Safetensors files opened for reading: `model.safetensors`, its shards, or any one file.
//!
//! Knows headers, offsets and types, no model. Files are read at offsets in small chunks, so that a
//! tensor is in memory once; they are not mapped: a map is `unsafe` in Rust, and a file cut short under
//! it kills the process. Called by [`super::FileSource`] and by readers of checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use tch::{Device, Kind, Tensor, no_grad};

use super::{INDEX, SINGLE, file_error, read_json};
use crate::error::{Error, Result};
use crate::params::CHUNK;

/// Bytes that say how long the header is.
const LENGTH_BYTES: u64 = 8;

/// Elements that are read at once: their bytes are still in the core's cache when they are copied, and so few
/// that libtorch does not share out the copy.
const READ: i64 = 1 << 15;

/// The tensors of a folder or file.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    files: Vec<Shard>,
    /// Name -> index into `files`.
    owners: BTreeMap<String, usize>,
}

impl Shards {
    /// Opens a folder with `model.safetensors`, or else `model.safetensors.index.json` and its
    /// shards; or one safetensors file. Reads the headers only.
    ///
    /// # Errors
    /// [`Error::File`] names the file that is absent, truncated or not what its name says;
    /// [`Error::MissingTensor`] when the index names a tensor that its shard lacks.
    pub fn open(path: &Path) -> Result<Self> {
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        let mut shards = Self { path: path.to_owned(), files: Vec::new(), owners: BTreeMap::new() };
        if path.is_file() {
            shards.add(path)?;
        } else if single.is_file() {
            shards.add(&single)?;
        } else if index.is_file() {
            shards.add_index(&index)?;
        } else {
            let reason = format!("neither `{SINGLE}` nor `{INDEX}` is here");
            return Err(Error::File { path: path.to_owned(), reason });
        }
        Ok(shards)
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.owners.keys().map(String::as_str)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let info = self.files[*self.owners.get(name)?].header.info(name)?;
        Some(info.shape.iter().map(|&size| size as i64).collect())
    }

    /// A whole tensor as fp32 on the CPU.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], and [`Error::File`] for a type that is not read or an IO error.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let missing = || Error::MissingTensor { path: self.path.clone(), name: name.to_owned() };
        let shape = self.shape(name).ok_or_else(missing)?;
        let target = Tensor::f_empty(&shape, (Kind::Float, Device::Cpu))?;
        self.read_into(name, 0..shape.iter().product(), &target.f_view(-1)?)?;
        Ok(target)
    }

    /// Copies a run of a tensor's elements, in row-major order, into the flat tensor `target` of as many,
    /// converting them to its type. Large ones are read on several threads; at most 2^15 elements on each are in
    /// memory besides it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], and [`Error::File`] for elements that are not there, a type that is not
    /// read, or an IO error.
    pub fn read_into(&self, name: &str, elements: Range<i64>, target: &Tensor) -> Result<()> {
        let missing = || Error::MissingTensor { path: self.path.clone(), name: name.to_owned() };
        self.files[*self.owners.get(name).ok_or_else(missing)?].read_into(name, elements, target)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let shard = Shard::open(path)?;
        for name in shard.header.offset_keys() {
            if self.owners.insert(name.clone(), self.files.len()).is_some() {
                let reason = format!("tensor `{name}` is in another shard already");
                return Err(Error::File { path: path.to_owned(), reason });
            }
        }
        self.files.push(shard);
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

/// One safetensors file.
#[derive(Debug)]
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

    fn read_into(&self, name: &str, elements: Range<i64>, target: &Tensor) -> Result<()> {
        let fail = |reason: String| Error::File { path: self.path.clone(), reason };
        let missing = || Error::MissingTensor { path: self.path.clone(), name: name.into() };
        let info = self.header.info(name).ok_or_else(missing)?;
        let TensorInfo { dtype, shape, data_offsets: (start, _) } = info;
        let numel: usize = shape.iter().product();
        if elements.start < 0 || elements.end as usize > numel || elements.end < elements.start {
            return Err(fail(format!("tensor `{name}` has {numel} elements, {elements:?} were asked for")));
        }
        let (kind, size) = match dtype {
            Dtype::F32 => (Kind::Float, 4),
            Dtype::F16 => (Kind::Half, 2),
            Dtype::BF16 => (Kind::BFloat16, 2),
            other => {
                return Err(fail(format!("tensor `{name}` is {other}; F32, F16 and BF16 can be read")));
            }
        };
        let start = self.data_start + *start as u64 + elements.start as u64 * size;
        let read = |(i, part): (usize, Tensor)| -> Result<()> {
            let mut offset = start + i as u64 * CHUNK as u64 * size;
            let mut bytes = vec![0; size as usize * part.numel().min(READ as usize)];
            for mut chunk in part.f_split(READ, 0)? {
                let bytes = &mut bytes[..chunk.numel() * size as usize];
                self.file
                    .read_exact_at(bytes, offset)
                    .map_err(|error| fail(format!("tensor `{name}`: {error}")))?;
                offset += bytes.len() as u64;
                let read = Tensor::f_from_data_size(bytes, &chunk.size(), kind)?;
                // Gradients are off by thread.
                no_grad(|| chunk.f_copy_(&read))?;
            }
            Ok(())
        };
        target.f_split(CHUNK, 0)?.into_par_iter().enumerate().try_for_each(read)
    }
}
