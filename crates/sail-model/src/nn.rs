//! The layers that every module here is made of: linear maps and normalisations.
//!
//! Not a copy of `tch::nn`: parameters come from a [`Builder`], bear Hugging Face names and may be
//! fp32 or bf16; a layer computes in the type its parameters have, normalisations in fp32 inside.
//! Called by `vision`, `projector` and `llm`.
//!
//! Dimension letters: o outputs, i inputs, d width.

use tch::Tensor;

use crate::error::Result;
use crate::params::{Builder, Init};

/// `y = x W^T + b`.
pub struct Linear {
    weight_oi: Tensor,
    bias_o: Option<Tensor>,
}

impl Linear {
    /// Takes `weight` `[outputs, inputs]`, started by `init`, and with `bias` a `bias` `[outputs]`
    /// that starts at zero.
    pub fn new(builder: &Builder, inputs: i64, outputs: i64, bias: bool, init: Init) -> Result<Self> {
        let weight_oi = builder.param("weight", &[outputs, inputs], init)?;
        let bias_o = if bias { Some(builder.param("bias", &[outputs], Init::Zeros)?) } else { None };
        Ok(Self { weight_oi, bias_o })
    }

    /// `[.., inputs]` -> `[.., outputs]`; `x` has the parameters' type.
    ///
    /// # Panics
    /// As tch's operators, when libtorch reports an error.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let [y] = Self::forward_together([self], x, None);
        y
    }

    /// What several maps, all with a bias or all without, make of the same rows, of which those in `grad_rows_r`, or
    /// all, need a gradient; see [`sail_torch::linears`].
    ///
    /// # Panics
    /// As tch's operators, when libtorch reports an error.
    pub fn forward_together<const N: usize>(
        maps: [&Self; N],
        x: &Tensor,
        grad_rows_r: Option<&Tensor>,
    ) -> [Tensor; N] {
        let maps = maps.map(|map| (&map.weight_oi, map.bias_o.as_ref()));
        sail_torch::linears(x, maps, grad_rows_r).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// `y = w * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich 2019, eq. 4), the mean and the
/// division in fp32; see [`sail_torch::rms_norm`].
pub struct RmsNorm {
    weight_d: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Takes `weight` `[width]`, started at one.
    pub fn new(builder: &Builder, width: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight_d: builder.param("weight", &[width], Init::Ones)?, eps })
    }

    /// `[.., width]` -> `[.., width]`.
    ///
    /// # Panics
    /// As tch's operators, when libtorch reports an error.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        sail_torch::rms_norm(x, &self.weight_d, self.eps).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// `silu(gate) * up`, see [`sail_torch::swiglu`].
///
/// # Panics
/// As tch's operators, when libtorch reports an error.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    sail_torch::swiglu(gate, up).unwrap_or_else(|error| panic!("{error}"))
}

/// Layer normalisation over the last dimension with weight and bias (Ba et al. 2016).
pub struct LayerNorm {
    weight_d: Tensor,
    bias_d: Tensor,
    width: i64,
    eps: f64,
}

impl LayerNorm {
    /// Takes `weight` `[width]`, started at one, and `bias` `[width]`, started at zero.
    pub fn new(builder: &Builder, width: i64, eps: f64) -> Result<Self> {
        let weight_d = builder.param("weight", &[width], Init::Ones)?;
        let bias_d = builder.param("bias", &[width], Init::Zeros)?;
        Ok(Self { weight_d, bias_d, width, eps })
    }

    /// `[.., width]` -> `[.., width]`; libtorch accumulates in fp32 for bf16 input.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm([self.width], Some(&self.weight_d), Some(&self.bias_d), self.eps, true)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tch::{Device, Kind};

    use super::*;
    use crate::params::{Params, RandomSource};

    fn builder(source: &RandomSource) -> Builder<'_> {
        Builder::new(Rc::new(RefCell::new(Params::new())), "llm", source, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn rms_norm_is_its_formula_in_both_types() {
        let source = RandomSource::new(1, "llm");
        let norm = RmsNorm::new(&builder(&source), 8, 1e-5).unwrap();
        let x = Tensor::randn([3, 8], (Kind::Float, Device::Cpu));
        let expected = &x / (x.square().mean_dim([-1i64].as_slice(), true, Kind::Float) + 1e-5).sqrt();
        assert!(norm.forward(&x).allclose(&expected, 1e-5, 1e-6, false));

        let mut weight = norm.weight_d.shallow_clone();
        weight.set_data(&weight.to_kind(Kind::BFloat16));
        let y = norm.forward(&x.to_kind(Kind::BFloat16));
        assert_eq!(y.kind(), Kind::BFloat16);
        assert!(y.to_kind(Kind::Float).allclose(&expected, 2e-2, 2e-2, false));
    }

    #[test]
    fn linear_follows_its_parameters_type() {
        let source = RandomSource::new(1, "llm");
        let linear = Linear::new(&builder(&source), 4, 6, true, Init::Normal(0.1)).unwrap();
        let x = Tensor::ones([2, 4], (Kind::Float, Device::Cpu));
        assert_eq!(linear.forward(&x).size(), [2, 6]);
        for tensor in [&linear.weight_oi, linear.bias_o.as_ref().unwrap()] {
            tensor.shallow_clone().set_data(&tensor.to_kind(Kind::BFloat16));
        }
        assert_eq!(linear.forward(&x.to_kind(Kind::BFloat16)).kind(), Kind::BFloat16);
    }
}
