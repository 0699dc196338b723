//! From patch features to the language model's visual tokens.
//!
//! Pixel shuffle, version 2 of the `InternVL` and SAIL-VL code (`ps_version: v2`), then their `mlp1`:
//! layer norm, linear, exact GELU, linear. Knows neither of the models it connects.
//! Called by `vlm`.
//!
//! Dimension letters: n tiles, h and w the grid of patches, c features of a patch.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear};
use crate::params::{Builder, Init};

/// `torch.nn.LayerNorm`'s default, which `mlp1` has.
const EPS: f64 = 1e-5;
/// Standard deviation of new matrices, the `initializer_range` of the published configurations.
const INIT_STD: f64 = 0.02;

/// Merges `merge` x `merge` neighbouring patches into one token of the language model's width.
///
/// Parameters are `0.{weight,bias}` (norm), `1.{weight,bias}` and `3.{weight,bias}` (linear maps; 2 is
/// the GELU). New ones are normal with deviation 0.02 and zero bias, ones and zeros for the norm.
pub struct Projector {
    merge: i64,
    norm: LayerNorm,
    linear_1: Linear,
    linear_3: Linear,
}

impl Projector {
    /// From features of width `vision_hidden` to tokens of width `llm_hidden`.
    ///
    /// # Errors
    /// [`Error::Config`] when `merge` is below 1, and what the builder's source reports.
    pub fn new(vision_hidden: i64, llm_hidden: i64, merge: i64, builder: &Builder) -> Result<Self> {
        if merge < 1 {
            return Err(refuse(format!("must be at least 1, is {merge}")));
        }
        let merged = merge * merge * vision_hidden;
        let init = Init::Normal(INIT_STD);
        Ok(Self {
            merge,
            norm: LayerNorm::new(&builder.sub(0), merged, EPS)?,
            linear_1: Linear::new(&builder.sub(1), merged, llm_hidden, true, init)?,
            linear_3: Linear::new(&builder.sub(3), llm_hidden, llm_hidden, true, init)?,
        })
    }

    /// Features of square grids `[n, h * h, c]` -> `[n, (h / merge)^2, llm_hidden]`, rows first.
    ///
    /// # Panics
    /// When the grid is not square or its side not a multiple of `merge`; see [`visual_tokens`].
    pub fn forward(&self, features_npc: &Tensor) -> Tensor {
        let x = self.norm.forward(&pixel_shuffle(features_npc, self.merge));
        self.linear_3.forward(&self.linear_1.forward(&x).gelu("none"))
    }
}

/// Visual tokens of one tile whose grid has `grid_side` patches along each side.
///
/// # Errors
/// [`Error::Config`] when `merge` does not divide the side.
pub fn visual_tokens(grid_side: i64, merge: i64) -> Result<i64> {
    if merge < 1 || grid_side % merge != 0 {
        return Err(refuse(format!("{merge} does not divide a grid of {grid_side} x {grid_side} patches")));
    }
    Ok((grid_side / merge).pow(2))
}

/// `[n, h * h, c]` -> `[n, (h / merge)^2, merge^2 * c]`. A token holds, in order of their rows and
/// then columns, the features of the patches that it merges.
fn pixel_shuffle(x_npc: &Tensor, merge: i64) -> Tensor {
    let (n, patches, c) = x_npc.size3().expect("invariant: features are [n, patches, c]");
    let side = patches.isqrt();
    assert!(
        side * side == patches && side % merge == 0,
        "{patches} patches are not a square grid that {merge} divides"
    );
    let half = side / merge;
    x_npc.reshape([n, half, merge, half, merge, c]).permute([0, 1, 3, 2, 4, 5]).reshape([
        n,
        half * half,
        merge * merge * c,
    ])
}

fn refuse(reason: String) -> Error {
    Error::Config { family: "projector".into(), key: "merge".into(), reason }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tch::{Device, Kind};

    use super::*;
    use crate::params::{Params, RandomSource};

    #[test]
    fn neighbours_are_merged_row_by_row() {
        let x = Tensor::arange(16, (Kind::Int64, Device::Cpu)).reshape([1, 16, 1]);
        let merged = pixel_shuffle(&x, 2);
        assert_eq!(
            Vec::<i64>::try_from(merged.flatten(0, -1)).unwrap(),
            [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
        );
        assert!(pixel_shuffle(&x, 1).equal(&x));
    }

    #[test]
    fn grids_that_do_not_merge_are_refused() {
        assert_eq!(visual_tokens(32, 2).unwrap(), 256);
        let message = visual_tokens(37, 2).unwrap_err().to_string();
        assert!(message.contains("2 does not divide a grid of 37 x 37"), "{message}");
        let source = RandomSource::new(0, "projector");
        let builder = Builder::new(Rc::new(RefCell::new(Params::new())), "projector", &source, Device::Cpu);
        assert!(Projector::new(8, 8, 0, &builder).is_err());
    }
}
