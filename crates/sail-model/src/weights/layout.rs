//! How the model's tensors lie in files that name or cut them differently.
//!
//! A [`Layout`] is one table used both ways: reading takes a tensor's pieces out of the file's
//! tensors, writing puts the pieces of several tensors together again. Families give their layouts in
//! their own files; the bytes are moved by `read` and `write`.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// A run of elements of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Name in the file.
    pub name: String,
    /// Shape in the file.
    pub shape: Vec<i64>,
    /// Which of its elements, in row-major order.
    pub elements: Range<i64>,
}

impl Piece {
    /// A whole tensor of the file.
    pub fn whole(name: impl Into<String>, shape: &[i64]) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), elements: 0..shape.iter().product() }
    }

    /// Part `index` of a tensor of the file that holds `of` tensors of shape `part` one after the other
    /// in its first dimension: as the queries in a matrix of queries, keys and values.
    pub fn part(name: impl Into<String>, part: &[i64], index: i64, of: i64) -> Self {
        let numel: i64 = part.iter().product();
        let mut shape = part.to_vec();
        shape[0] *= of;
        Self { name: name.into(), shape, elements: index * numel..(index + 1) * numel }
    }
}

/// For the name and shape of a tensor of the model: the pieces whose elements, one after the other,
/// are its own in row-major order.
pub type Layout = fn(&str, &[i64]) -> Vec<Piece>;

/// Files that name and cut tensors as the model does.
pub fn own_names(name: &str, shape: &[i64]) -> Vec<Piece> {
    vec![Piece::whole(name, shape)]
}

/// What names a family's files may have.
#[derive(Clone, Debug)]
pub struct Naming {
    /// Put in front of every name; the first one that the file has is taken for all of them. Names
    /// outside a prefix that is not empty belong to other modules.
    pub prefixes: Vec<&'static str>,
    /// Tried in this order for each tensor.
    pub layouts: Vec<Layout>,
    /// Tensors that a file may hold although the model has no place for them: `head.` is all that begin
    /// so, `.inv_freq` all that end so, anything else one name.
    pub ignored: Vec<&'static str>,
}

impl Default for Naming {
    fn default() -> Self {
        Self { prefixes: vec![""], layouts: vec![own_names], ignored: Vec::new() }
    }
}

impl Naming {
    /// Whether a tensor of this name, without its prefix, is to be passed over.
    pub(super) fn ignores(&self, name: &str) -> bool {
        self.ignored.iter().any(|pattern| match pattern.as_bytes() {
            [.., b'.'] => name.starts_with(pattern),
            [b'.', ..] => name.ends_with(pattern),
            _ => name == *pattern,
        })
    }
}

/// A tensor of a file, put together from tensors of the model.
#[derive(Debug)]
pub struct Stored {
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its elements in row-major order: flat tensors of one kind, one after the other.
    pub parts: Vec<Tensor>,
}

impl Stored {
    /// The type of its elements.
    pub fn kind(&self) -> Kind {
        self.parts.first().map_or(Kind::Float, Tensor::kind)
    }

    /// Number of elements.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
}

impl From<&Tensor> for Stored {
    fn from(tensor: &Tensor) -> Self {
        Self { shape: tensor.size(), parts: vec![tensor.detach().reshape([-1])] }
    }
}

/// The tensors of a file in `layout`, each name with `prefix` in front. Shares the memory of `tensors`
/// where they are contiguous.
///
/// # Errors
/// [`Error::Layout`] when the pieces of a tensor of the file leave a gap or overlap.
pub fn arrange<'a>(
    tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>,
    layout: Layout,
    prefix: &str,
) -> Result<BTreeMap<String, Stored>> {
    let mut pieces: BTreeMap<String, Vec<(Piece, Tensor)>> = BTreeMap::new();
    for (name, tensor) in tensors {
        let flat = tensor.detach().reshape([-1]);
        let mut start = 0;
        for piece in layout(name, &tensor.size()) {
            let length = piece.elements.end - piece.elements.start;
            let part = flat.f_narrow(0, start, length)?;
            start += length;
            pieces.entry(format!("{prefix}{}", piece.name)).or_default().push((piece, part));
        }
    }
    pieces
        .into_iter()
        .map(|(name, mut pieces)| {
            pieces.sort_by_key(|(piece, _)| piece.elements.start);
            let shape = pieces[0].0.shape.clone();
            let mut end = 0;
            for (piece, _) in &pieces {
                if piece.elements.start != end || piece.shape != shape {
                    return Err(Error::Layout { name });
                }
                end = piece.elements.end;
            }
            if end != shape.iter().product::<i64>() {
                return Err(Error::Layout { name });
            }
            let parts = pieces.into_iter().map(|(_, part)| part).collect();
            Ok((name, Stored { shape, parts }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// `a` and `b` are halves of `ab`; everything else keeps its name.
    fn halves(name: &str, shape: &[i64]) -> Vec<Piece> {
        match name {
            "a" => vec![Piece::part("ab", shape, 0, 2)],
            "b" => vec![Piece::part("ab", shape, 1, 2)],
            _ => own_names(name, shape),
        }
    }

    fn tensors(names: &[&str]) -> BTreeMap<String, Tensor> {
        let tensor =
            |i: usize| Tensor::arange(6, (Kind::Float, Device::Cpu)).reshape([2, 3]) + i as f64 * 6.0;
        names.iter().enumerate().map(|(i, name)| ((*name).to_owned(), tensor(i))).collect()
    }

    #[test]
    fn pieces_are_put_together_in_order() {
        let stored = arrange(&tensors(&["a", "b", "c"]), halves, "x.").unwrap();
        assert_eq!(stored.keys().collect::<Vec<_>>(), ["x.ab", "x.c"]);
        assert_eq!(stored["x.ab"].shape, [4, 3]);
        let whole = Tensor::cat(&stored["x.ab"].parts, 0);
        assert!(whole.equal(&Tensor::arange(12, (Kind::Float, Device::Cpu))));
    }

    #[test]
    fn a_missing_piece_is_an_error() {
        let error = arrange(&tensors(&["b"]), halves, "").unwrap_err().to_string();
        assert!(error.contains("`ab`"), "{error}");
    }

    #[test]
    fn patterns_ignore_by_start_end_or_name() {
        let naming = Naming { ignored: vec!["head.", ".inv_freq", "lm_head.weight"], ..Naming::default() };
        for ignored in ["head.bias", "model.layers.0.inv_freq", "lm_head.weight"] {
            assert!(naming.ignores(ignored), "{ignored}");
        }
        for kept in ["lm_head.bias", "overhead.bias", "inv_freq", "a.head.b"] {
            assert!(!naming.ignores(kept), "{kept}");
        }
    }
}
