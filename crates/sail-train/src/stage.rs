//! The modules of a model, and the check that what is frozen stays as it is.
//!
//! What is frozen is [`crate::freeze`]'s matter; the freezing itself is done where the optimizer takes its parameters
//! over ([`crate::optim`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sail_model::params::Params;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor, no_grad};

use crate::config::{Module, hex};
use crate::error::{Error, Result};

/// The module a full parameter name belongs to: what stands before the first dot.
pub fn module_of(name: &str) -> Result<Module> {
    let prefix = name.split('.').next().unwrap_or_default();
    Module::ALL.into_iter().find(|module| module.name() == prefix).ok_or_else(|| Error::FreezePlan {
        name: name.to_owned(),
        problem: "belongs to no module of the freeze plan",
    })
}

/// 1234567 as `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Remembers the weights at the start of a run, so that every checkpoint can tell that what is frozen
/// stayed as it was.
///
/// Keeps a 64-bit sum per parameter instead of a copy: the bit patterns, each multiplied by an odd
/// number that depends on its position, so that a changed or moved value changes the sum.
pub struct Fingerprints(BTreeMap<String, i64>);

impl Fingerprints {
    /// Of all parameters as they are now.
    pub fn new(params: &Params) -> Self {
        Self(params.iter().map(|(name, tensor)| (name.clone(), fingerprint(tensor))).collect())
    }

    /// One number for all parameters of a module.
    pub fn of_module(&self, module: Module) -> String {
        let mut hash = crc32fast::Hasher::new();
        for (name, print) in self.of(module) {
            hash.update(name.as_bytes());
            hash.update(&print.to_le_bytes());
        }
        format!("{:08x}", hash.finalize())
    }

    /// A hash of the names and numbers of a module's parameters, in lower-case hexadecimal: for keys among many others,
    /// where that of [`Fingerprints::of_module`] is too short.
    pub fn digest_of(&self, module: Module) -> String {
        let mut hash = Sha256::new();
        for (name, print) in self.of(module) {
            hash.update(name);
            hash.update([0]);
            hash.update(print.to_le_bytes());
        }
        hex(&hash.finalize())
    }

    fn of(&self, module: Module) -> impl Iterator<Item = (&String, &i64)> {
        let prefix = format!("{module}.");
        self.0.iter().filter(move |(name, _)| name.starts_with(&prefix))
    }

    /// Checks, wherever and whenever wanted, that what is not in `trained` is as these say.
    pub fn frozen_check(self: &Arc<Self>, params: &Params, trained: &BTreeSet<&str>) -> FrozenCheck {
        let frozen = params.iter().filter(|(name, _)| !trained.contains(name.as_str()));
        // Handles of their own, for another thread.
        let frozen = frozen.map(|(name, tensor)| (name.clone(), tensor.detach())).collect();
        FrozenCheck { started_from: Arc::clone(self), frozen }
    }
}

/// Frozen parameters, and how they were.
pub struct FrozenCheck {
    started_from: Arc<Fingerprints>,
    frozen: Vec<(String, Tensor)>,
}

impl Clone for FrozenCheck {
    fn clone(&self) -> Self {
        let handles = self.frozen.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        Self { started_from: Arc::clone(&self.started_from), frozen: handles.collect() }
    }
}

impl FrozenCheck {
    /// Compares.
    ///
    /// # Errors
    /// [`Error::FreezePlan`] naming the first parameter that is frozen and changed.
    pub fn check(&self) -> Result<()> {
        for (name, tensor) in &self.frozen {
            if self.started_from.0.get(name) != Some(&fingerprint(tensor)) {
                let problem = "is frozen in this stage and changed; the checkpoint is not to be used";
                return Err(Error::FreezePlan { name: name.clone(), problem });
            }
        }
        Ok(())
    }
}

/// A sum over the bit patterns, see [`Fingerprints`].
pub(crate) fn fingerprint(tensor: &Tensor) -> i64 {
    // In pieces, so that the 64-bit copies of a large embedding table stay small.
    const PIECE: i64 = 1 << 22;
    no_grad(|| {
        let kind = if tensor.kind() == Kind::Float { Kind::Int } else { Kind::Int16 };
        let bits = tensor.detach().contiguous().view_dtype(kind).reshape([-1]);
        let weights = Tensor::arange(PIECE.min(bits.numel() as i64), (Kind::Int64, bits.device())) * 2 + 1;
        bits.split(PIECE, 0).iter().fold(0i64, |sum, piece| {
            let weights = weights.narrow(0, 0, piece.numel() as i64);
            let piece_sum = (piece.to_kind(Kind::Int64) * weights).sum(Kind::Int64).int64_value(&[]);
            sum.wrapping_mul(31).wrapping_add(piece_sum)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> Params {
        ["vision.a", "projector.1.weight", "llm.b"]
            .map(|name| (name.to_owned(), Tensor::from_slice(&[1f32, 2.0, 3.0])))
            .into_iter()
            .collect()
    }

    #[test]
    fn long_numbers_are_grouped() {
        assert_eq!([1, 999, 1000, 1_234_567].map(grouped), ["1", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn a_changed_frozen_parameter_is_named() {
        let mut params = params();
        let prints = Arc::new(Fingerprints::new(&params));
        params.insert("projector.1.weight".into(), Tensor::from_slice(&[9f32, 9.0, 9.0]));
        let check = |params: &Params| prints.frozen_check(params, &["projector.1.weight"].into()).check();
        check(&params).unwrap();
        for changed in [[1f32, 2.0, 3.000_001], [2.0, 1.0, 3.0]] {
            params.insert("llm.b".into(), Tensor::from_slice(&changed));
            let error = check(&params).unwrap_err().to_string();
            assert!(error.contains("`llm.b` is frozen"), "{error}");
        }
    }

    #[test]
    fn a_name_outside_the_modules_is_refused() {
        assert!(module_of("head.weight").is_err());
    }
}
