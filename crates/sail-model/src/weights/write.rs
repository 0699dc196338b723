//! Safetensors files and whole model folders, complete or not there at all.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;
use tch::{Kind, Tensor};

use super::file_error;
use crate::error::Result;

const WEIGHTS: &str = "model.safetensors";
const CONFIG: &str = "config.json";

/// Writes a model folder: `model.safetensors`, `config.json` and the named JSON files of `extra`.
///
/// Everything is written and synced in a directory beside `dir`, which is then renamed, so that
/// `dir` is whole whenever it exists. A model folder already there is replaced.
///
/// # Errors
/// [`crate::Error::File`] when `dir` exists and is neither empty nor a model folder, or on an IO error.
pub fn write_folder(
    dir: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &Value,
    extra: &[(&str, &Value)],
) -> Result<()> {
    let replaces = replaceable(dir)?;
    let (partial, old) = (sibling(dir, "partial")?, sibling(dir, "old")?);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(file_error(&partial))?;
    }
    fs::create_dir_all(&partial).map_err(file_error(&partial))?;
    let written = fill(&partial, tensors, config, extra).and_then(|()| {
        if replaces {
            fs::rename(dir, &old).map_err(file_error(dir))?;
        }
        fs::rename(&partial, dir).map_err(file_error(dir))
    });
    if let Err(error) = written {
        // The first error is the one to report; what is left bears `.partial-` in its name.
        drop(fs::remove_dir_all(&partial));
        return Err(error);
    }
    sync(partial.parent().unwrap_or(Path::new("/")))?;
    if replaces { fs::remove_dir_all(&old).map_err(file_error(&old)) } else { Ok(()) }
}

/// Writes one safetensors file and syncs it. Tensors keep their type, go to the CPU one by one and
/// lie in the order of their names.
///
/// # Errors
/// [`crate::Error::File`] on an IO error, or for a type that safetensors or this crate does not have.
pub fn write_safetensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let mut infos = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (name, tensor) in tensors {
        let kind = tensor.kind();
        let no_type = || file_error(path)(format!("tensor `{name}` is {kind:?}, which is not written"));
        let dtype = dtype(kind).ok_or_else(no_type)?;
        let start = end;
        end += tensor.numel() * kind.elt_size_in_bytes();
        let shape = tensor.size().iter().map(|&size| size as usize).collect();
        infos.push((name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
    }
    // transformers refuses a file that does not say which framework wrote it.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let header = Metadata::new(Some(format), infos).map_err(file_error(path))?;
    let mut header = serde_json::to_vec(&header).map_err(file_error(path))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut out = BufWriter::new(File::create(path).map_err(file_error(path))?);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(file_error(path));
    put(&(header.len() as u64).to_le_bytes())?;
    put(&header)?;
    for tensor in tensors.values() {
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        put(&bytes)?;
    }
    let file = out.into_inner().map_err(file_error(path))?;
    file.sync_all().map_err(file_error(path))
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

fn fill(
    dir: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &Value,
    extra: &[(&str, &Value)],
) -> Result<()> {
    write_safetensors(&dir.join(WEIGHTS), tensors)?;
    for (name, json) in [(CONFIG, config)].iter().chain(extra) {
        let path = dir.join(name);
        let mut file = File::create(&path).map_err(file_error(&path))?;
        file.write_all(format!("{json:#}\n").as_bytes()).map_err(file_error(&path))?;
        file.sync_all().map_err(file_error(&path))?;
    }
    sync(dir)
}

/// Whether something is at `dir` that may be replaced; only a model folder or an empty one may.
fn replaceable(dir: &Path) -> Result<bool> {
    if !dir.exists() {
        return Ok(false);
    }
    let empty = fs::read_dir(dir).map_err(file_error(dir))?.next().is_none();
    if empty || (dir.join(WEIGHTS).is_file() && dir.join(CONFIG).is_file()) {
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

    fn tensors(value: f32) -> BTreeMap<String, Tensor> {
        let transposed =
            (Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).reshape([2, 2]) * f64::from(value)).transpose(0, 1);
        BTreeMap::from([("half".into(), transposed.to_kind(Kind::BFloat16)), ("whole".into(), transposed)])
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
            let extra = json!({ "n": value });
            write_folder(&dir, &tensors(value), &json!({ "a": 1 }), &[("extra.json", &extra)]).unwrap();
            assert_eq!(entries(&dir), ["config.json", "extra.json", "model.safetensors"]);
            assert_eq!(entries(dir.parent().unwrap()), ["vit"]);
            let read: BTreeMap<_, _> =
                Tensor::read_safetensors(dir.join(WEIGHTS)).unwrap().into_iter().collect();
            for (name, tensor) in tensors(value) {
                assert_eq!(read[&name].kind(), tensor.kind());
                assert!(read[&name].equal(&tensor), "{name}");
            }
        }
    }

    #[test]
    fn other_peoples_folders_are_left_alone() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("thesis.tex"), "text").unwrap();
        let error = write_folder(dir.path(), &tensors(1.0), &json!({}), &[]).unwrap_err().to_string();
        assert!(error.contains("not a model folder"), "{error}");
        assert_eq!(entries(dir.path()), ["thesis.tex"]);
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let parent = TempDir::new().unwrap();
        let dir = parent.path().join("vit");
        let bools = BTreeMap::from([("mask".to_owned(), Tensor::from_slice(&[true]))]);
        let error = write_folder(&dir, &bools, &json!({}), &[]).unwrap_err().to_string();
        assert!(error.contains("`mask` is Bool"), "{error}");
        assert!(entries(parent.path()).is_empty());
    }
}
