//! The mixture of experts of Qwen3: every row visits the few experts that its router scores highest.
//!
//! Rows are sorted by expert, so that each expert computes its own rows only. Called by the decoder's
//! blocks.
//!
//! Dimension letters: t rows of the pack, d model width, e experts, k experts that a row visits, s = t * k
//! visits, i inner width of an expert.

use tch::{Kind, Tensor};

use super::config::DecoderConfig;
use super::family::MoeShape;
use crate::error::Result;
use crate::nn::swiglu;
use crate::params::{Builder, Init};

/// A feed-forward layer of experts; parameters are `gate.weight`, `experts.gate_up_proj` and
/// `experts.down_proj`.
pub(super) struct SparseMlp {
    gate_ed: Tensor,
    /// Each expert's gate, then its up projection.
    gate_up_eid: Tensor,
    down_edi: Tensor,
    shape: MoeShape,
}

/// How the rows of a forward are spread over the experts, summed over blocks.
#[derive(Debug)]
pub struct Routing {
    /// Visits to each expert, fp32.
    visits_e: Tensor,
    /// Sum over rows of the probability of each expert, fp32, with a graph to the routers.
    probabilities_e: Tensor,
    /// Rows, each counted once per block.
    rows: i64,
    balance_coef: f64,
}

impl Routing {
    /// What it has of tensors: visits and probabilities.
    pub(super) fn into_tensors(self) -> [Tensor; 2] {
        [self.visits_e, self.probabilities_e]
    }

    /// Of one block of this shape that has seen `rows` rows, from its [`Routing::into_tensors`].
    pub(super) fn of_tensors(tensors: Vec<Tensor>, rows: i64, moe: MoeShape) -> Self {
        let [visits_e, probabilities_e] =
            <[Tensor; 2]>::try_from(tensors).expect("invariant: a block of experts gives both");
        Self { visits_e, probabilities_e, rows, balance_coef: moe.balance_coef }
    }

    /// Both together.
    pub(super) fn plus(self, other: &Self) -> Self {
        Self {
            visits_e: self.visits_e + &other.visits_e,
            probabilities_e: self.probabilities_e + &other.probabilities_e,
            rows: self.rows + other.rows,
            balance_coef: self.balance_coef,
        }
    }

    /// The loss for unevenly used experts, 0-dimensional fp32: the number of experts times the sum over
    /// experts of visits a row times mean probability. As transformers' `load_balancing_loss_func`, after
    /// Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6.
    pub fn balance_loss(&self) -> Tensor {
        let rows = self.rows as f64;
        let experts = self.visits_e.numel() as f64;
        (&self.visits_e / rows * (&self.probabilities_e / rows)).sum(Kind::Float) * experts
    }

    /// [`Routing::balance_loss`] times the configuration's `router_aux_loss_coef`.
    pub fn weighted_balance_loss(&self) -> Tensor {
        self.balance_loss() * self.balance_coef
    }

    /// Share of all visits that each expert had `[e]`; 1/e each is even.
    pub fn shares_e(&self) -> Tensor {
        &self.visits_e / self.visits_e.sum(Kind::Float)
    }
}

impl SparseMlp {
    pub(super) fn new(decoder: &DecoderConfig, shape: MoeShape, builder: &Builder) -> Result<Self> {
        let (width, MoeShape { experts, inner, .. }) = (decoder.hidden_size, shape);
        let init = Init::Normal(decoder.initializer_range);
        let of_experts = builder.sub("experts");
        Ok(Self {
            gate_ed: builder.sub("gate").param("weight", &[experts, width], init)?,
            gate_up_eid: of_experts.param("gate_up_proj", &[experts, 2 * inner, width], init)?,
            down_edi: of_experts.param("down_proj", &[experts, width, inner], init)?,
            shape,
        })
    }

    /// `[t, d]` -> `[t, d]`, and which experts the rows went to.
    pub(super) fn forward(&self, x_td: &Tensor) -> (Tensor, Routing) {
        let MoeShape { experts, top_k, norm_topk_prob, balance_coef, .. } = self.shape;
        let probabilities_te = x_td.linear(&self.gate_ed, None::<&Tensor>).softmax(-1, Kind::Float);
        let (weights_tk, experts_tk) = probabilities_te.topk(top_k, -1, true, true);
        let weights_tk = if norm_topk_prob {
            &weights_tk / weights_tk.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)
        } else {
            weights_tk
        };
        let experts_s = experts_tk.flatten(0, 1);
        let visits_e = experts_s.bincount(None::<&Tensor>, experts);
        let outputs_sd = self.visit(x_td, &experts_s, &visits_e);
        let outputs_tkd =
            outputs_sd.unflatten(0, [-1, top_k]) * weights_tk.to_kind(x_td.kind()).unsqueeze(-1);
        let y_td = outputs_tkd.sum_dim_intlist([1i64].as_slice(), false, x_td.kind());
        let routing = Routing {
            visits_e: visits_e.to_kind(Kind::Float),
            probabilities_e: probabilities_te.sum_dim_intlist([0i64].as_slice(), false, Kind::Float),
            rows: x_td.size()[0],
            balance_coef,
        };
        (y_td, routing)
    }

    /// What each row's experts make of it `[s, d]`, a row's visits one after the other.
    fn visit(&self, x_td: &Tensor, experts_s: &Tensor, visits_e: &Tensor) -> Tensor {
        let order_s = experts_s.argsort_stable(true, 0, false);
        // Repeated before they are sorted: the gradient of a row is then a sum in a fixed order.
        let repeated_sd = x_td.repeat_interleave_self_int(self.shape.top_k, 0, None);
        let sorted_sd = repeated_sd.index_select(0, &order_s);
        let counts = Vec::<i64>::try_from(visits_e).expect("invariant: counts are a vector of int64");
        // Taken apart in one operation, whose backward puts zeros where no row went.
        let experts = self.gate_up_eid.unbind(0).into_iter().zip(self.down_edi.unbind(0));
        let outputs: Vec<Tensor> = (sorted_sd.split_with_sizes(&counts[..], 0).iter().zip(experts))
            .zip(&counts)
            .filter(|(_, count)| **count > 0)
            .map(|((rows_td, (gate_up_id, down_di)), _)| {
                let both = rows_td.linear(&gate_up_id, None::<&Tensor>).chunk(2, -1);
                swiglu(&both[0], &both[1]).linear(&down_di, None::<&Tensor>)
            })
            .collect();
        let inverse_s = order_s.argsort(0, false);
        Tensor::cat(&outputs, 0).index_select(0, &inverse_s)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tch::Device;

    use super::*;
    use crate::llm::LlmConfig;
    use crate::params::{Params, RandomSource, TensorSource};

    const EXPERTS: i64 = 5;

    fn layer(norm_topk_prob: bool) -> (SparseMlp, Params) {
        let config = LlmConfig::from_keys(&serde_json::json!({
            "model_type": "qwen3_moe", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
            "norm_topk_prob": norm_topk_prob, "initializer_range": 0.5, "router_aux_loss_coef": 0.5,
        }));
        let config = config.unwrap();
        let params = Rc::new(RefCell::new(Params::new()));
        let source = RandomSource::new(3, "llm");
        let builder = Builder::new(params.clone(), "llm", &source, (Kind::Float, Device::Cpu));
        let moe = SparseMlp::new(config.decoder(), config.shape(0).moe.unwrap(), &builder).unwrap();
        (moe, params.take())
    }

    fn rows(t: i64) -> Tensor {
        RandomSource::new(4, "x").tensor("x", &[t, 8], Init::Normal(1.0)).unwrap()
    }

    /// Every expert on every row, weighted by zero where the row does not visit it.
    fn plain(moe: &SparseMlp, x_td: &Tensor) -> Tensor {
        let probabilities = x_td.matmul(&moe.gate_ed.tr()).softmax(-1, Kind::Float);
        let (weights, chosen) = probabilities.topk(2, -1, true, true);
        let weights = if moe.shape.norm_topk_prob {
            &weights / weights.sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)
        } else {
            weights
        };
        let weights_te = probabilities.zeros_like().scatter(1, &chosen, &weights);
        let mut y_td = x_td.zeros_like();
        for e in 0..EXPERTS {
            let both = x_td.matmul(&moe.gate_up_eid.get(e).tr()).chunk(2, -1);
            let out_td = (both[0].silu() * &both[1]).matmul(&moe.down_edi.get(e).tr());
            y_td += out_td * weights_te.select(1, e).unsqueeze(1);
        }
        y_td
    }

    #[test]
    fn sorted_rows_give_what_every_expert_on_every_row_gives() {
        for norm_topk_prob in [false, true] {
            let (moe, params) = layer(norm_topk_prob);
            let x_td = rows(23).set_requires_grad(true);
            let mut inputs = vec![x_td.shallow_clone()];
            inputs.extend(params.values().map(|param| param.shallow_clone().set_requires_grad(true)));
            let (y_td, routing) = moe.forward(&x_td);
            let expected = plain(&moe, &x_td);
            assert!(y_td.allclose(&expected, 1e-5, 1e-6, false));
            let probe = rows(23);
            let grads =
                |y: &Tensor| Tensor::run_backward(&[(y * &probe).sum(Kind::Float)], &inputs, true, false);
            for (grad, expected) in grads(&y_td).iter().zip(grads(&expected)) {
                assert!(grad.allclose(&expected, 1e-4, 1e-5, false));
            }
            let shares = routing.shares_e();
            assert!((shares.sum(Kind::Float).double_value(&[]) - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn experts_without_rows_have_a_gradient_of_zero() {
        let (moe, params) = layer(true);
        for param in params.values() {
            let _ = param.shallow_clone().set_requires_grad(true);
        }
        // One row visits two of the five experts.
        moe.forward(&rows(1)).0.sum(Kind::Float).backward();
        for name in ["llm.experts.gate_up_proj", "llm.experts.down_proj"] {
            let per_expert = params[name].grad().abs().amax([1i64, 2].as_slice(), false);
            assert_eq!(per_expert.count_nonzero(0).int64_value(&[]), 2, "{name}");
        }
    }

    #[test]
    fn even_use_costs_the_number_of_experts_that_a_row_visits() {
        let even = |visits: &[f32], probabilities: &[f32]| Routing {
            visits_e: Tensor::from_slice(visits),
            probabilities_e: Tensor::from_slice(probabilities),
            rows: 4,
            balance_coef: 0.5,
        };
        let routing = even(&[2.0; 4], &[1.0; 4]);
        assert!((routing.balance_loss().double_value(&[]) - 2.0).abs() < 1e-6);
        assert!((routing.weighted_balance_loss().double_value(&[]) - 1.0).abs() < 1e-6);
        let twice = routing.plus(&even(&[4.0, 4.0, 0.0, 0.0], &[2.0, 2.0, 0.0, 0.0]));
        assert!((twice.balance_loss().double_value(&[]) - 2.5).abs() < 1e-6);
    }
}
