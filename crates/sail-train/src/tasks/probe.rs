//! The probe of SAILViT's recognition (arXiv 2507.01643, Table 6): a perceptron of two layers on features that stay as
//! they are.
//!
//! The paper names no more than that and its 10 epochs. Here the hidden layer is rectified, and Adam (Kingma and Ba 2014,
//! in the form of its section 2, which scikit-learn has as well) follows a cosine from the peak rate to zero. Each feature
//! is shifted and scaled to mean 0 and variance 1 over the training images first, so that encoders with features of other
//! sizes are asked the same.
//!
//! Dimension letters: n images, d width of features, h of the hidden layer, c classes.

use std::f64::consts::PI;

use sail_model::params::{Init, RandomSource, TensorSource};
use tch::{Device, Kind, Tensor, no_grad};
use tracing::info;

use super::permutation;
use crate::config::MlpPlan;
use crate::error::{Error, Result};

const BETAS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

/// Shift and scale of features.
pub(super) struct Standard {
    mean_d: Tensor,
    std_d: Tensor,
}

impl Standard {
    /// Of training features `[n, d]`, or patches, which come in parts, so that they need not be in memory together. One that
    /// never changes is only shifted.
    pub(super) fn of(parts: impl Iterator<Item = Result<Tensor>>) -> Result<Self> {
        // Sums from the first row on, so that what never changes sums to zero.
        let mut sums: Option<[Tensor; 3]> = None;
        let mut count = 0;
        for part_nd in parts {
            let part_nd = part_nd?.f_to_kind(Kind::Double)?;
            let [first_d, sum_d, square_d] = sums.get_or_insert_with(|| {
                let first_d = part_nd.get(0).copy();
                let zeros_d = first_d.zeros_like();
                [first_d, zeros_d.copy(), zeros_d]
            });
            let moved_nd = part_nd.f_sub(first_d)?;
            *sum_d += moved_nd.f_sum_dim_intlist([0].as_slice(), false, Kind::Double)?;
            *square_d += moved_nd.f_square()?.f_sum_dim_intlist([0].as_slice(), false, Kind::Double)?;
            count += part_nd.size()[0];
        }
        let [first_d, sum_d, square_d] = sums.expect("invariant: there are training images");
        let mean_d = sum_d.f_div_scalar(count)?;
        let variance_d = square_d.f_div_scalar(count)?.f_sub(&mean_d.f_square()?)?.f_clamp_min(0.0)?;
        let std_d = variance_d.f_sqrt()?;
        let std_d = std_d.f_where_self(&std_d.f_gt(0.0)?, &std_d.ones_like())?;
        let mean_d = mean_d.f_add(&first_d)?;
        Ok(Self { mean_d: mean_d.f_to_kind(Kind::Float)?, std_d: std_d.f_to_kind(Kind::Float)? })
    }

    pub(super) fn apply(&self, x_nd: &Tensor) -> Result<Tensor> {
        Ok(x_nd.f_sub(&self.mean_d)?.f_div(&self.std_d)?)
    }
}

/// A perceptron of two layers.
pub(super) struct Mlp {
    /// `[d, h]`, `[h]`, `[h, c]`, `[c]`; each requires a gradient.
    params: [Tensor; 4],
}

impl Mlp {
    /// With random weights: normal, of variance 2 over the inputs before the rectifier and 1 over them after it; no bias.
    pub(super) fn random((d, h, c): (i64, i64, i64), seed: u64, device: Device) -> Result<Self> {
        let source = RandomSource::new(seed, "probe");
        let random = |name: &str, size: [i64; 2], gain: f64| {
            let weight = Tensor::f_zeros(size, (Kind::Float, Device::Cpu))?;
            source.fill(name, &weight, Init::Normal((gain / size[0] as f64).sqrt()))?;
            Ok::<_, Error>(weight.to_device(device))
        };
        let zeros = |size: i64| Tensor::f_zeros([size], (Kind::Float, device));
        Self::from_params([
            random("hidden", [d, h], 2.0)?,
            zeros(h)?,
            random("head", [h, c], 1.0)?,
            zeros(c)?,
        ])
    }

    fn from_params(params: [Tensor; 4]) -> Result<Self> {
        for param in &params {
            let _ = param.f_set_requires_grad(true)?;
        }
        Ok(Self { params })
    }

    /// Scores `[n, c]` of the classes.
    pub(super) fn scores(&self, x_nd: &Tensor) -> Result<Tensor> {
        let [w1_dh, b1_h, w2_hc, b2_c] = &self.params;
        let hidden_nh = x_nd.f_matmul(w1_dh)?.f_add(b1_h)?.f_relu()?;
        Ok(hidden_nh.f_matmul(w2_hc)?.f_add(b2_c)?)
    }

    /// Trains on `(x_nd, classes_n)`, shuffled anew in each epoch, and gives the mean loss of the last one.
    pub(super) fn train(&mut self, data: (&Tensor, &Tensor), plan: MlpPlan, seed: u64) -> Result<f64> {
        let order = shuffled(seed, data.0.size()[0]);
        self.train_in_order(data, (plan.epochs, plan.batch), order, cosine(plan.lr))
    }

    fn train_in_order(
        &mut self,
        (x_nd, classes_n): (&Tensor, &Tensor),
        plan: (u64, i64),
        order: impl Fn(u64) -> Result<Tensor>,
        rate: impl Fn(f64) -> f64,
    ) -> Result<f64> {
        let mut params = self.params.each_ref().map(Tensor::shallow_clone);
        fit(&mut params, x_nd.size()[0], plan, order, rate, |places_b| {
            let places_b = places_b.to_device(x_nd.device());
            let scores_bc = self.scores(&x_nd.f_index_select(0, &places_b)?)?;
            Ok(scores_bc.cross_entropy_for_logits(&classes_n.f_index_select(0, &places_b)?))
        })
    }
}

/// The order of `n` samples in each epoch.
pub(super) fn shuffled(seed: u64, n: i64) -> impl Fn(u64) -> Result<Tensor> {
    move |epoch| permutation(seed, &format!("epoch {epoch}"), n)
}

/// A rate that follows a cosine from `lr` to zero, by what part of all steps is done.
pub(super) fn cosine(lr: f64) -> impl Fn(f64) -> f64 {
    move |done| lr * 0.5 * (1.0 + (PI * done).cos())
}

/// Trains `params` on `n` samples, those of an epoch in the `order` given for it, with the `rate` given for what part of all
/// steps is done. `loss` is the mean one of samples by their numbers `[b]`. Gives the mean of the last epoch.
pub(super) fn fit(
    params: &mut [Tensor],
    n: i64,
    (epochs, batch): (u64, i64),
    order: impl Fn(u64) -> Result<Tensor>,
    rate: impl Fn(f64) -> f64,
    mut loss: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<f64> {
    let steps_per_epoch = (n as u64).div_ceil(batch as u64);
    let mut adam = Adam::new(params);
    let mut mean_loss = f64::NAN;
    for epoch in 0..epochs {
        let mut losses = Vec::new();
        for (step, places_b) in (0..).zip(order(epoch)?.f_split(batch, 0)?) {
            let loss = loss(&places_b)?;
            loss.f_backward()?;
            let done = (epoch * steps_per_epoch + step) as f64 / (epochs * steps_per_epoch) as f64;
            adam.step(params, rate(done))?;
            losses.push(loss.detach().to_kind(Kind::Double) * places_b.size()[0] as f64);
        }
        mean_loss = Tensor::f_stack(&losses, 0)?.f_sum(Kind::Double)?.f_double_value(&[])? / n as f64;
        info!("a probe's epoch {} of {epochs}: loss {mean_loss:.4}", epoch + 1);
    }
    Ok(mean_loss)
}

/// Adam, without decay.
struct Adam {
    moments: Vec<[Tensor; 2]>,
    steps: i32,
}

impl Adam {
    fn new(params: &[Tensor]) -> Self {
        let zeros = |param: &Tensor| [param.zeros_like(), param.zeros_like()].map(|zeros| zeros.detach());
        Self { moments: params.iter().map(zeros).collect(), steps: 0 }
    }

    /// Moves the parameters along their gradients, which are empty afterwards.
    fn step(&mut self, params: &mut [Tensor], lr: f64) -> Result<()> {
        self.steps += 1;
        let [correct_1, correct_2] = BETAS.map(|beta| 1.0 - beta.powi(self.steps));
        let lr = lr * correct_2.sqrt() / correct_1;
        no_grad(|| {
            for (param, [first, second]) in params.iter_mut().zip(&mut self.moments) {
                let mut gradient = param.f_grad()?;
                *first = first.f_mul_scalar(BETAS[0])?.f_add(&gradient.f_mul_scalar(1.0 - BETAS[0])?)?;
                let square = gradient.f_square()?;
                *second = second.f_mul_scalar(BETAS[1])?.f_add(&square.f_mul_scalar(1.0 - BETAS[1])?)?;
                let step = first.f_mul_scalar(lr)?.f_div(&second.f_sqrt()?.f_add_scalar(EPSILON)?)?;
                let _ = param.f_sub_(&step)?;
                let _ = gradient.f_zero_()?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::metrics::goldens::{golden, matrix};

    #[derive(Deserialize)]
    struct Golden {
        features: Vec<Vec<f64>>,
        classes: Vec<i64>,
        hidden: Vec<Vec<f64>>,
        hidden_bias: Vec<f64>,
        head: Vec<Vec<f64>>,
        head_bias: Vec<f64>,
        epochs: u64,
        batch: i64,
        lr: f64,
        probabilities: Vec<Vec<f64>>,
        loss: f64,
    }

    /// The same weights, samples and rate as scikit-learn's `MLPClassifier`, for some epochs.
    #[test]
    fn it_learns_what_that_of_scikit_learn_learns() {
        let golden: Golden = golden("probe.json");
        let bias = |values: &[f64]| Tensor::from_slice(values);
        let params = [
            matrix(&golden.hidden),
            bias(&golden.hidden_bias),
            matrix(&golden.head),
            bias(&golden.head_bias),
        ];
        let mut mlp = Mlp::from_params(params).unwrap();
        let (x_nd, classes_n) = (matrix(&golden.features), Tensor::from_slice(&golden.classes));
        let before = no_grad(|| mlp.scores(&x_nd).unwrap());
        let in_order = |_| Ok(Tensor::arange(x_nd.size()[0], (Kind::Int64, Device::Cpu)));
        let data = (&x_nd, &classes_n);
        let loss = mlp.train_in_order(data, (golden.epochs, golden.batch), in_order, |_| golden.lr).unwrap();
        let after = no_grad(|| mlp.scores(&x_nd).unwrap()).softmax(-1, Kind::Double);
        let difference = (&after - matrix(&golden.probabilities)).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "probabilities differ by {difference:e}");
        assert!((loss - golden.loss).abs() < 1e-6, "loss {loss} instead of {}", golden.loss);
        let moved = (after - before.softmax(-1, Kind::Double)).abs().max().double_value(&[]);
        assert!(moved > 0.1, "training moved probabilities by {moved} only");
    }

    #[test]
    fn features_of_any_size_are_asked_the_same() {
        let x_nd = Tensor::from_slice(&[1.0f32, 5.0, 3.0, 5.0, 5.0, 5.0]).reshape([3, 2]);
        let scaled = |x_nd: &Tensor, parts: &[i64]| {
            let parts = x_nd.split_with_sizes(parts, 0).into_iter().map(Ok);
            Standard::of(parts).unwrap().apply(x_nd).unwrap()
        };
        let found = scaled(&x_nd, &[3]);
        let other = scaled(&(&x_nd * 8.0 + 2.0), &[3]);
        let in_parts = scaled(&x_nd, &[1, 2]);
        assert!((&found - in_parts).abs().max().double_value(&[]) < 1e-6);
        assert_eq!(Vec::<f32>::try_from(found.select(1, 1)).unwrap(), [0.0; 3]);
        assert!((found.select(1, 0).std(false).double_value(&[]) - 1.0).abs() < 1e-6);
        assert!((found - other).abs().max().double_value(&[]) < 1e-6);
    }
}
