//! A model's tensors out of the files of a Hugging Face folder, by the names that its family's files have.
//!
//! What does not fit is collected while the model is built and reported once, by
//! [`TensorSource::finish`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::Path;

use tch::Tensor;

use super::layout::{Naming, Piece};
use super::shards::Shards;
use crate::error::{Error, Misfits, Result};
use crate::params::{Init, TensorSource};

/// The tensors of a Hugging Face folder. Remembers which were asked for, and what did not fit.
#[derive(Debug)]
pub struct FileSource {
    shards: Shards,
    naming: Naming,
    /// Which of the naming's prefixes the file has; found with the first tensor.
    prefix: Cell<Option<&'static str>>,
    used: RefCell<BTreeSet<String>>,
    misfits: RefCell<Misfits>,
}

impl FileSource {
    /// Opens a folder or file, see [`Shards::open`], whose names are the model's own.
    ///
    /// # Errors
    /// As [`Shards::open`].
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            shards: Shards::open(path)?,
            naming: Naming::default(),
            prefix: Cell::new(None),
            used: RefCell::default(),
            misfits: RefCell::default(),
        })
    }

    /// Finds tensors by these names.
    #[must_use]
    pub fn with(self, naming: Naming) -> Self {
        Self { naming, ..self }
    }

    /// The pieces of a tensor: those of the first layout whose tensors are all in the file, else those of
    /// the first layout.
    fn pieces(&self, name: &str, shape: &[i64]) -> Vec<Piece> {
        let of = |prefix: &str, layout: &super::Layout| -> Vec<Piece> {
            let prefixed = |piece: Piece| Piece { name: format!("{prefix}{}", piece.name), ..piece };
            layout(name, shape).into_iter().map(prefixed).collect()
        };
        let is_here =
            |pieces: &Vec<Piece>| pieces.iter().all(|piece| self.shards.shape(&piece.name).is_some());
        let prefixes = self.prefix.get().map_or(self.naming.prefixes.clone(), |prefix| vec![prefix]);
        for prefix in &prefixes {
            let found = self.naming.layouts.iter().map(|layout| of(prefix, layout)).find(is_here);
            if let Some(pieces) = found {
                self.prefix.set(Some(prefix));
                return pieces;
            }
        }
        of(prefixes[0], &self.naming.layouts[0])
    }

    /// Names in the file, under the prefix in use, that no module has asked for.
    fn left_over(&self) -> Vec<String> {
        let (used, prefix) = (self.used.borrow(), self.prefix.get().unwrap_or_default());
        let under = |name: &&str| name.strip_prefix(prefix).is_some_and(|name| !self.naming.ignores(name));
        self.shards.names().filter(under).filter(|name| !used.contains(*name)).map(str::to_owned).collect()
    }
}

impl TensorSource for FileSource {
    /// `init` has no part in it. Where the file does not give the tensor, `target` is left as it is and
    /// [`TensorSource::finish`] will fail.
    fn fill(&self, name: &str, target: &Tensor, _init: Init) -> Result<()> {
        let flat = target.f_view(-1)?;
        let mut start = 0;
        for Piece { name, shape, elements } in self.pieces(name, &target.size()) {
            let length = elements.end - elements.start;
            let part = flat.f_narrow(0, start, length)?;
            start += length;
            let first_use = self.used.borrow_mut().insert(name.clone());
            match self.shards.shape(&name) {
                Some(found) if found == shape => self.shards.read_into(&name, elements, &part)?,
                Some(found) if first_use => self.misfits.borrow_mut().shapes.push((name, found, shape)),
                None if first_use => self.misfits.borrow_mut().missing.push(name),
                Some(_) | None => {}
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let mut misfits = self.misfits.take();
        misfits.unexpected = self.left_over();
        if misfits == Misfits::default() {
            return Ok(());
        }
        Err(Error::Weights { path: self.shards.path().to_owned(), misfits })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use serde_json::json;
    use tch::{Device, Kind};
    use tempfile::TempDir;

    use super::*;
    use crate::weights::{INDEX, SINGLE, own_names, write_safetensors};

    fn tensors(names: &[&str], kind: Kind) -> BTreeMap<String, Tensor> {
        let tensor = || Tensor::arange(6, (Kind::Float, Device::Cpu)).reshape([2, 3]).to_kind(kind);
        names.iter().map(|name| ((*name).to_owned(), tensor())).collect()
    }

    fn folder_with(names: &[&str]) -> TempDir {
        let dir = TempDir::new().unwrap();
        write_safetensors(&dir.path().join(SINGLE), &tensors(names, Kind::Float)).unwrap();
        dir
    }

    fn opening_error(path: &Path) -> String {
        FileSource::open(path).err().unwrap().to_string()
    }

    #[test]
    fn every_type_converts_to_the_targets() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            let dir = TempDir::new().unwrap();
            write_safetensors(&dir.path().join(SINGLE), &tensors(&["a"], kind)).unwrap();
            let source = FileSource::open(dir.path()).unwrap();
            for to in [Kind::Float, Kind::BFloat16] {
                let target = Tensor::empty([2, 3], (to, Device::Cpu));
                source.fill("a", &target, Init::Zeros).unwrap();
                assert!(target.equal(&tensors(&["a"], to)["a"]), "{kind:?} to {to:?}");
            }
            source.finish().unwrap();
        }
    }

    #[test]
    fn everything_that_does_not_fit_is_in_one_error() {
        let dir = folder_with(&["a", "b", "head.weight"]);
        let naming = Naming { ignored: vec!["head."], ..Naming::default() };
        let source = FileSource::open(dir.path()).unwrap().with(naming);
        for (name, shape) in [("a", [3, 2]), ("y", [2, 3]), ("z", [2, 3]), ("z", [2, 3])] {
            let _ = source.tensor(name, &shape, Init::Zeros).unwrap();
        }
        let message = source.finish().unwrap_err().to_string();
        let expected = "the weights do not fit the model
  missing (2): y z
  of another shape (1):
    a has shape [2, 3], the model needs [3, 2]
  the model has no place for (1): b";
        assert!(message.ends_with(expected), "{message}");
    }

    #[test]
    fn the_first_prefix_that_is_there_is_taken() {
        let dir = folder_with(&["x.c", "other.d"]);
        let naming = Naming { prefixes: vec!["", "y.", "x."], ..Naming::default() };
        let source = FileSource::open(dir.path()).unwrap().with(naming.clone());
        let _ = source.tensor("c", &[2, 3], Init::Zeros).unwrap();
        source.finish().unwrap();
        let source = FileSource::open(dir.path()).unwrap().with(naming);
        let _ = source.tensor("c", &[2, 3], Init::Zeros).unwrap();
        let _ = source.tensor("d", &[2, 3], Init::Zeros).unwrap();
        let message = source.finish().unwrap_err().to_string();
        assert!(message.contains("missing (1): x.d"), "{message}");
    }

    #[test]
    fn a_tensor_may_lie_in_pieces() {
        fn rows(name: &str, _: &[i64]) -> Vec<Piece> {
            let index = i64::from(name == "second");
            vec![Piece::part("a", &[1, 3], index, 2)]
        }
        let dir = folder_with(&["a"]);
        let naming = Naming { layouts: vec![own_names, rows], ..Naming::default() };
        let source = FileSource::open(dir.path()).unwrap().with(naming);
        let [first, second] =
            ["first", "second"].map(|name| source.tensor(name, &[1, 3], Init::Zeros).unwrap());
        assert!(first.equal(&Tensor::from_slice(&[0f32, 1.0, 2.0]).view([1, 3])));
        assert!(second.equal(&Tensor::from_slice(&[3f32, 4.0, 5.0]).view([1, 3])));
        source.finish().unwrap();
    }

    #[test]
    fn shards_are_one_source() {
        let dir = TempDir::new().unwrap();
        write_safetensors(&dir.path().join("1.safetensors"), &tensors(&["a"], Kind::Float)).unwrap();
        write_safetensors(&dir.path().join("2.safetensors"), &tensors(&["b"], Kind::Float)).unwrap();
        let index = |map: serde_json::Value| fs::write(dir.path().join(INDEX), map.to_string()).unwrap();
        index(json!({ "weight_map": { "a": "1.safetensors", "b": "2.safetensors" } }));
        let source = FileSource::open(dir.path()).unwrap();
        for name in ["b", "a"] {
            let _ = source.tensor(name, &[2, 3], Init::Zeros).unwrap();
        }
        source.finish().unwrap();

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
    fn types_that_are_not_weights_are_refused() {
        let dir = TempDir::new().unwrap();
        let ids = BTreeMap::from([("ids".to_owned(), Tensor::from_slice(&[1i64, 2]))]);
        write_safetensors(&dir.path().join(SINGLE), &ids).unwrap();
        let source = FileSource::open(dir.path()).unwrap();
        let message = source.tensor("ids", &[2], Init::Zeros).unwrap_err().to_string();
        assert!(message.contains("tensor `ids` is I64"), "{message}");
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
