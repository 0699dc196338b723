//! Rotary position embedding (Su et al. 2021, section 3.4) in the layout of Hugging Face's Llama and
//! Qwen: coordinate i of a head turns together with coordinate i + h/2, not with its neighbour.
//!
//! Called by [`super::Llm`]. Dimension letters: t rows, n heads, h head width, f h/2.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use super::rope::{RopeParameters, RopeScaling, Yarn};

/// The frequencies of one model.
pub(super) struct Rotary {
    inv_freq_f: Tensor,
    /// Cosines and sines are multiplied by it.
    attention_factor: f64,
}

/// Cosine and sine of every row's angles, shared by all blocks of a forward.
pub(super) struct Rotation {
    cos_t1f: Tensor,
    sin_t1f: Tensor,
}

impl Rotary {
    /// Frequencies `theta^(-2i/h)` in fp32, scaled as the parameters say: in the order of operations of
    /// transformers' `modeling_rope_utils`, so that they are equal bit by bit.
    pub(super) fn new(head_dim: i64, rope: &RopeParameters, device: Device) -> Self {
        let exponents_f =
            Tensor::arange_start_step(0, head_dim, 2, (Kind::Float, Device::Cpu)) / head_dim as f64;
        let powers_f = Tensor::pow_scalar(rope.rope_theta, &exponents_f);
        let inv_freq_f = powers_f.reciprocal();
        let (inv_freq_f, attention_factor) = match &rope.scaling {
            RopeScaling::Default => (inv_freq_f, 1.0),
            RopeScaling::Linear { factor } => (inv_freq_f / *factor, 1.0),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = *original_max_position_embeddings as f64;
                (llama3(&inv_freq_f, *factor, *low_freq_factor, *high_freq_factor, original), 1.0)
            }
            RopeScaling::Yarn(yarn) => {
                let interpolated_f = (powers_f * yarn.factor).reciprocal();
                let kept_f = 1.0 - ramp(head_dim, rope.rope_theta, yarn);
                let divided_f = 1.0 - &kept_f;
                (interpolated_f * divided_f + inv_freq_f * kept_f, attention_factor(yarn))
            }
        };
        Self { inv_freq_f: inv_freq_f.to_device(device), attention_factor }
    }

    /// The rotation of rows at `positions_t` `[t]` int64. Angles are fp32, the result is of `kind`.
    pub(super) fn at(&self, positions_t: &Tensor, kind: Kind) -> Rotation {
        let angles_tf = positions_t.to_kind(Kind::Float).unsqueeze(1) * self.inv_freq_f.unsqueeze(0);
        let expand = |x: Tensor| (x * self.attention_factor).to_kind(kind).unsqueeze(1);
        Rotation { cos_t1f: expand(angles_tf.cos()), sin_t1f: expand(angles_tf.sin()) }
    }
}

impl Rotation {
    /// Turns every head of `x_tnh` `[t, n, h]`.
    ///
    /// # Panics
    /// As tch's operators, when libtorch reports an error.
    pub(super) fn apply(&self, x_tnh: &Tensor) -> Tensor {
        sail_torch::rotate(x_tnh, &self.cos_t1f, &self.sin_t1f).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Frequencies of Llama 3.1: those with long waves are divided by `factor`, those with short ones kept, and
/// those between are blended.
fn llama3(inv_freq_f: &Tensor, factor: f64, low: f64, high: f64, original: f64) -> Tensor {
    let wavelength_f = inv_freq_f.reciprocal() * (2.0 * PI);
    let is_long_f = wavelength_f.gt(original / low);
    let is_short_f = wavelength_f.lt(original / high);
    let scaled_f = (inv_freq_f / factor).where_self(&is_long_f, inv_freq_f);
    let smooth_f = (wavelength_f.reciprocal() * original - low) / (high - low);
    let blended_f: Tensor = (1.0 - &smooth_f) * &scaled_f / factor + smooth_f * &scaled_f;
    blended_f.where_self(&is_long_f.logical_or(&is_short_f).logical_not(), &scaled_f)
}

/// How much of each frequency of `YaRN` is divided by the factor, from 0 for fast coordinates to 1 for slow
/// ones.
fn ramp(head_dim: i64, theta: f64, yarn: &Yarn) -> Tensor {
    let or = |value: Option<f64>, default: f64| value.filter(|value| *value != 0.0).unwrap_or(default);
    // The coordinate that turns this often in the original length (arXiv 2309.00071, appendix B.1).
    let coordinate = |turns: f64| {
        let original = yarn.original_max_position_embeddings as f64;
        head_dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
    };
    let (low, high) = (coordinate(or(yarn.beta_fast, 32.0)), coordinate(or(yarn.beta_slow, 1.0)));
    let (low, high) = if yarn.truncate.unwrap_or(true) { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, high) = (low.max(0.0), high.min((head_dim - 1) as f64));
    let width = if (high - low).abs() > 0.0 { high - low } else { high + 0.001 - low };
    let coordinates_f = Tensor::arange(head_dim / 2, (Kind::Float, Device::Cpu));
    ((coordinates_f - low) / width).clamp(0.0, 1.0)
}

/// The factor of `YaRN` for cosines and sines: what is given, else 0.1 ln(factor) + 1, or the quotient of two such
/// terms.
fn attention_factor(yarn: &Yarn) -> f64 {
    let term = |scale: f64| if yarn.factor <= 1.0 { 1.0 } else { 0.1 * scale * yarn.factor.ln() + 1.0 };
    let given = |value: Option<f64>| value.filter(|value| *value != 0.0);
    match (yarn.attention_factor, given(yarn.mscale), given(yarn.mscale_all_dim)) {
        (Some(factor), ..) => factor,
        (None, Some(mscale), Some(all)) => term(mscale) / term(all),
        _ => term(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Init, RandomSource, TensorSource};

    fn rotary(head_dim: i64) -> Rotary {
        let rope = RopeParameters { rope_theta: 100.0, scaling: RopeScaling::Default };
        Rotary::new(head_dim, &rope, Device::Cpu)
    }

    #[test]
    fn scores_depend_on_the_distance_alone() {
        let rotary = rotary(16);
        let source = RandomSource::new(3, "test");
        let [q, k] = ["q", "k"].map(|name| source.tensor(name, &[1, 2, 16], Init::Normal(1.0)).unwrap());
        let score = |i: i64, j: i64| {
            let turn = |x: &Tensor, p: i64| rotary.at(&Tensor::from_slice(&[p]), Kind::Float).apply(x);
            (turn(&q, i) * turn(&k, j)).sum(Kind::Float).double_value(&[])
        };
        assert!((score(7, 3) - score(24, 20)).abs() < 1e-4);
        assert!((score(7, 3) - score(7, 4)).abs() > 1e-3);
        assert!((score(0, 0) - (&q * &k).sum(Kind::Float).double_value(&[])).abs() < 1e-5);
    }

    #[test]
    fn halves_turn_together() {
        let rotary = rotary(4);
        let x = Tensor::from_slice(&[1f32, 0.0, 0.0, 0.0]).reshape([1, 1, 4]);
        let turned = rotary.at(&Tensor::from_slice(&[2i64]), Kind::Float).apply(&x);
        let expected = Tensor::from_slice(&[2f32.cos(), 0.0, 2f32.sin(), 0.0]).reshape([1, 1, 4]);
        assert!(turned.allclose(&expected, 1e-6, 1e-6, false));
    }
}
