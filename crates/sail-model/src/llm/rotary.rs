//! Rotary position embedding (Su et al. 2021, section 3.4) in the layout of Hugging Face's Llama and
//! Qwen: coordinate i of a head turns together with coordinate i + h/2, not with its neighbour.
//!
//! Dimension letters: t rows, n heads, h head width, f h/2.

use tch::{Device, Kind, Tensor};

/// The frequencies of one model.
pub(super) struct Rotary {
    inv_freq_f: Tensor,
}

/// Cosine and sine of every row's angles, shared by all blocks of a forward.
pub(super) struct Rotation {
    cos_t1f: Tensor,
    sin_t1f: Tensor,
}

impl Rotary {
    /// Frequencies `theta^(-2i/h)` in fp32.
    pub(super) fn new(head_dim: i64, theta: f64, device: Device) -> Self {
        let exponents = Tensor::arange_start_step(0, head_dim, 2, (Kind::Float, device)) / head_dim as f64;
        Self { inv_freq_f: Tensor::pow_scalar(theta, &exponents).reciprocal() }
    }

    /// The rotation of rows at `positions_t` `[t]` int64. Angles are fp32, the result is of `kind`.
    pub(super) fn at(&self, positions_t: &Tensor, kind: Kind) -> Rotation {
        let angles_tf = positions_t.to_kind(Kind::Float).unsqueeze(1) * self.inv_freq_f.unsqueeze(0);
        let expand = |x: &Tensor| x.to_kind(kind).unsqueeze(1);
        Rotation { cos_t1f: expand(&angles_tf.cos()), sin_t1f: expand(&angles_tf.sin()) }
    }
}

impl Rotation {
    /// Turns every head of `x_tnh` `[t, n, h]`.
    pub(super) fn apply(&self, x_tnh: &Tensor) -> Tensor {
        let halves = x_tnh.chunk(2, -1);
        let (low, high) = (&halves[0], &halves[1]);
        let turned_low = low * &self.cos_t1f - high * &self.sin_t1f;
        let turned_high = high * &self.cos_t1f + low * &self.sin_t1f;
        Tensor::cat(&[turned_low, turned_high], -1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Init, RandomSource, TensorSource};

    #[test]
    fn scores_depend_on_the_distance_alone() {
        let rotary = Rotary::new(16, 100.0, Device::Cpu);
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
        let rotary = Rotary::new(4, 100.0, Device::Cpu);
        let x = Tensor::from_slice(&[1f32, 0.0, 0.0, 0.0]).reshape([1, 1, 4]);
        let turned = rotary.at(&Tensor::from_slice(&[2i64]), Kind::Float).apply(&x);
        let expected = Tensor::from_slice(&[2f32.cos(), 0.0, 2f32.sin(), 0.0]).reshape([1, 1, 4]);
        assert!(turned.allclose(&expected, 1e-6, 1e-6, false));
    }
}
