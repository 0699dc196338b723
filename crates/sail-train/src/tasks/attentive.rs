//! The attentive probe (El-Nouby et al. 2024, arXiv 2401.08541): one learned query looks at all patches of a frozen encoder,
//! and a linear map names what it has seen. Where a mean hides what is small, this can find it.
//!
//! `softmax(q (x K)^T / sqrt(e)) x V` is computed as `x (K q)` and `(softmax^T x) V`, so that keys and values of single patches
//! are never made: as many operations as the patches have numbers, times heads. Patches are shifted and scaled as the
//! features of the other probes are. Called by the recognition task.
//!
//! Dimension letters: t patches of an image, d their width, h heads, e width of one, c classes, b images.

use sail_model::params::{Init, RandomSource, TensorSource};
use tch::{Device, Kind, Tensor};

use super::probe::{cosine, fit, shuffled};
use crate::config::AttentivePlan;
use crate::error::{Error, Result};

/// One query and a linear map.
pub(super) struct Attentive {
    /// Query `[h, e]`, keys and values `[d, h, e]`, head `[h e, c]` and its bias `[c]`; each requires a gradient.
    params: [Tensor; 5],
}

impl Attentive {
    /// Whether so many heads are possible.
    ///
    /// # Errors
    /// [`Error::Usage`] when they do not divide the width `d`.
    pub(super) fn check(d: i64, heads: i64) -> Result<()> {
        if d % heads == 0 {
            return Ok(());
        }
        Err(Error::usage(
            format!("`attentive` has {heads} heads, which do not divide the width of the features, {d}"),
            "choose a divisor as `heads`",
        ))
    }

    /// With random weights: the query so small that all patches are seen alike at first.
    pub(super) fn random(d: i64, classes: i64, heads: i64, seed: u64, device: Device) -> Result<Self> {
        let source = RandomSource::new(seed, "attentive");
        let random = |name: &str, size: &[i64], std: f64| {
            let weight = Tensor::f_zeros(size, (Kind::Float, Device::Cpu))?;
            source.fill(name, &weight, Init::Normal(std))?;
            Ok::<_, Error>(weight.to_device(device))
        };
        let (e, std) = (d / heads, (d as f64).powf(-0.5));
        Self::from_params([
            random("query", &[heads, e], 0.02)?,
            random("key", &[d, heads, e], std)?,
            random("value", &[d, heads, e], std)?,
            random("head", &[d, classes], std)?,
            Tensor::f_zeros([classes], (Kind::Float, device))?,
        ])
    }

    fn from_params(params: [Tensor; 5]) -> Result<Self> {
        for param in &params {
            let _ = param.f_set_requires_grad(true)?;
        }
        Ok(Self { params })
    }

    /// Scores `[b, c]` of the classes of images with patches `[t, d]` each.
    pub(super) fn scores(&self, images: &[Tensor]) -> Result<Tensor> {
        let [query_he, key_dhe, value_dhe, head_dc, bias_c] = &self.params;
        let scale = (query_he.size()[1] as f64).powf(-0.5);
        let asked_dh =
            (key_dhe * query_he * scale).f_sum_dim_intlist([-1].as_slice(), false, query_he.kind())?;
        let seen = |x_td: &Tensor| {
            let weights_th = x_td.f_matmul(&asked_dh)?.f_softmax(0, query_he.kind())?;
            Ok(weights_th.f_transpose(0, 1)?.f_matmul(x_td)?)
        };
        let seen_bhd = Tensor::f_stack(&images.iter().map(seen).collect::<Result<Vec<_>>>()?, 0)?;
        let values_bhe = Tensor::f_einsum("bhd,dhe->bhe", &[&seen_bhd, value_dhe], None::<&[i64]>)?;
        Ok(values_bhe.f_flatten(1, 2)?.f_matmul(head_dc)?.f_add(bias_c)?)
    }

    /// Trains on images by their numbers, whose patches `patches` gives, shuffled anew in each epoch; the mean loss of the
    /// last one.
    pub(super) fn train(
        &self,
        classes_n: &Tensor,
        plan: AttentivePlan,
        seed: u64,
        patches: impl FnMut(&[i64]) -> Result<Vec<Tensor>>,
    ) -> Result<f64> {
        let order = shuffled(seed, classes_n.size()[0]);
        self.train_in_order(classes_n, (plan.epochs, plan.batch), order, cosine(plan.lr), patches)
    }

    fn train_in_order(
        &self,
        classes_n: &Tensor,
        plan: (u64, i64),
        order: impl Fn(u64) -> Result<Tensor>,
        rate: impl Fn(f64) -> f64,
        mut patches: impl FnMut(&[i64]) -> Result<Vec<Tensor>>,
    ) -> Result<f64> {
        let mut params = self.params.each_ref().map(Tensor::shallow_clone);
        let device = params[0].device();
        fit(&mut params, classes_n.size()[0], plan, order, rate, |numbers_b| {
            let scores_bc = self.scores(&patches(&Vec::try_from(numbers_b)?)?)?;
            let classes_b = classes_n.f_index_select(0, numbers_b)?.to_device(device);
            Ok(scores_bc.cross_entropy_for_logits(&classes_b))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use tch::no_grad;

    use super::*;
    use crate::metrics::goldens::{golden, matrix};

    #[derive(Deserialize)]
    struct Golden {
        heads: i64,
        images: Vec<Vec<Vec<f64>>>,
        classes: Vec<i64>,
        weights: Weights,
        epochs: u64,
        batch: i64,
        lr: f64,
        scores: Vec<Vec<f64>>,
        loss: f64,
    }

    /// As PyTorch's layers have them: outputs first.
    #[derive(Deserialize)]
    struct Weights {
        query: Vec<Vec<Vec<f64>>>,
        #[serde(rename = "key.weight")]
        key: Vec<Vec<f64>>,
        #[serde(rename = "value.weight")]
        value: Vec<Vec<f64>>,
        #[serde(rename = "head.weight")]
        head: Vec<Vec<f64>>,
        #[serde(rename = "head.bias")]
        bias: Vec<f64>,
    }

    /// The same weights, images and rate as the probe of PyTorch's own attention and layers, for some epochs.
    #[test]
    fn it_learns_what_that_of_pytorch_learns() {
        let golden: Golden = golden("attentive.json");
        let Weights { query, key, value, head, bias } = &golden.weights;
        let by_head =
            |rows: &[Vec<f64>]| matrix(rows).transpose(0, 1).reshape([rows.len() as i64, golden.heads, -1]);
        let probe = Attentive::from_params([
            matrix(&query[0]).reshape([golden.heads, -1]),
            by_head(key),
            by_head(value),
            matrix(head).transpose(0, 1).contiguous(),
            Tensor::from_slice(bias),
        ])
        .unwrap();
        let images: Vec<Tensor> = golden.images.iter().map(|rows| matrix(rows)).collect();
        let classes_n = Tensor::from_slice(&golden.classes);
        let before_nc = no_grad(|| probe.scores(&images).unwrap());
        let in_order = |_| Ok(Tensor::arange(classes_n.size()[0], (Kind::Int64, Device::Cpu)));
        let chosen =
            |numbers: &[i64]| Ok(numbers.iter().map(|n| images[*n as usize].shallow_clone()).collect());
        let plan = (golden.epochs, golden.batch);
        let loss = probe.train_in_order(&classes_n, plan, in_order, |_| golden.lr, chosen).unwrap();
        let after_nc = no_grad(|| probe.scores(&images).unwrap());
        let difference = (&after_nc - matrix(&golden.scores)).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "scores differ by {difference:e}");
        assert!((loss - golden.loss).abs() < 1e-6, "loss {loss} instead of {}", golden.loss);
        let moved = (after_nc - before_nc).abs().max().double_value(&[]);
        assert!(moved > 0.1, "training moved scores by {moved} only");
    }

    /// Which of two patterns one patch in 16 has, where another has its opposite: in the mean of all they cancel.
    #[test]
    fn it_finds_what_a_mean_hides() {
        let n = 128;
        let classes_n = Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(2);
        let source = RandomSource::new(5, "test");
        let images: Vec<Tensor> = (0..n)
            .map(|number| {
                let x_td = source.tensor(&format!("image {number}"), &[16, 8], Init::Normal(1.0)).unwrap();
                for (place, shown) in [(number, 6.0f32), (number + 7, -6.0)] {
                    x_td.get(place % 16).get(number % 2).copy_(&Tensor::from(shown));
                }
                x_td
            })
            .collect();
        let chosen =
            |numbers: &[i64]| Ok(numbers.iter().map(|n| images[*n as usize].shallow_clone()).collect());
        let plan = AttentivePlan { heads: 2, epochs: 40, lr: 0.02, batch: 32 };
        let probe = Attentive::random(8, 2, plan.heads, 1, Device::Cpu).unwrap();
        probe.train(&classes_n, plan, 1, chosen).unwrap();
        let said_n = no_grad(|| probe.scores(&images).unwrap()).argmax(-1, false);
        let right = said_n.eq_tensor(&classes_n).sum(Kind::Int64).int64_value(&[]);
        assert!(right >= 120, "{right} of {n}");
        assert!(Attentive::check(8, 3).unwrap_err().to_string().contains("do not divide"));
    }
}
