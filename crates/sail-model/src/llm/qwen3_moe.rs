//! Qwen3 with experts (Yang et al. 2025, arXiv 2505.09388): transformers' `Qwen3MoeForCausalLM`. Attention
//! as in Qwen3; the feed-forward layer of most blocks is a mixture of experts without a shared one.
//!
//! Published files hold each expert's matrices, newer ones all experts' in one tensor: both are read, the
//! former is written.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use super::config::DecoderConfig;
use super::family::{DecoderShape, LlmFamily, MoeShape, nested, nested_names};
use crate::keys::{Refusal, check_sizes};
use crate::weights::{Layout, Piece, own_names};

/// Fields of `Qwen3MoeConfig` that are its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Qwen3Moe {
    /// Only false is built.
    use_sliding_window: bool,
    /// Without effect while `use_sliding_window` is false.
    sliding_window: Option<i64>,
    /// Every so many blocks have experts, the others a layer of `intermediate_size`.
    decoder_sparse_step: i64,
    /// Inner width of an expert.
    moe_intermediate_size: i64,
    /// Experts that a row visits.
    num_experts_per_tok: i64,
    /// Experts of a block.
    num_experts: i64,
    /// The weights of the experts that a row visits are divided by their sum.
    norm_topk_prob: bool,
    /// Read and written, without effect: who trains asks for the loss.
    output_router_logits: bool,
    /// What the loss for unevenly used experts is multiplied by.
    router_aux_loss_coef: f64,
    /// Blocks without experts, whatever `decoder_sparse_step` says.
    #[serde(deserialize_with = "null_is_empty")]
    mlp_only_layers: Vec<i64>,
}

impl LlmFamily for Qwen3Moe {
    const MODEL_TYPE: &'static str = "qwen3_moe";
    const ARCHITECTURE: &'static str = "Qwen3MoeForCausalLM";
    const LAYOUTS: &'static [Layout] = &[each_expert, own_names, nested_each_expert, nested_names];
    const ALIASES: &'static [(&'static str, &'static str)] = &[("num_local_experts", "num_experts")];

    fn defaults() -> Value {
        json!({
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
            "use_sliding_window": false, "sliding_window": 4096, "decoder_sparse_step": 1,
            "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
            "norm_topk_prob": false, "output_router_logits": false, "router_aux_loss_coef": 0.001,
            "mlp_only_layers": [],
        })
    }

    fn shape(&self, layer: i64) -> DecoderShape {
        let has_experts =
            !self.mlp_only_layers.contains(&layer) && (layer + 1) % self.decoder_sparse_step == 0;
        let moe = MoeShape {
            experts: self.num_experts,
            top_k: self.num_experts_per_tok,
            inner: self.moe_intermediate_size,
            norm_topk_prob: self.norm_topk_prob,
            balance_coef: self.router_aux_loss_coef,
        };
        DecoderShape { qk_norm: true, moe: has_experts.then_some(moe), ..DecoderShape::default() }
    }

    fn check(&self, _decoder: &DecoderConfig) -> Result<(), Refusal> {
        if self.use_sliding_window && self.sliding_window.is_some() {
            return Err(("use_sliding_window", "only false is supported".into()));
        }
        let positive = [
            ("decoder_sparse_step", self.decoder_sparse_step),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("num_experts_per_tok", self.num_experts_per_tok),
            ("num_experts", self.num_experts),
        ];
        check_sizes(&positive)?;
        if self.num_experts_per_tok > self.num_experts {
            let reason = format!("{} is more than {} experts", self.num_experts_per_tok, self.num_experts);
            return Err(("num_experts_per_tok", reason));
        }
        if self.router_aux_loss_coef < 0.0 || self.router_aux_loss_coef.is_nan() {
            let reason = format!("must not be negative, is {}", self.router_aux_loss_coef);
            return Err(("router_aux_loss_coef", reason));
        }
        Ok(())
    }
}

/// As transformers, which writes null for no such layers.
fn null_is_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i64>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Names in published files: `experts.{e}.{gate,up,down}_proj.weight` are parts of the fused tensors
/// `experts.gate_up_proj` `[experts, 2 * inner, d]` and `experts.down_proj` `[experts, d, inner]`.
fn each_expert(name: &str, shape: &[i64]) -> Vec<Piece> {
    let (experts, projections): (&str, &[&str]) =
        match (name.strip_suffix("gate_up_proj"), name.strip_suffix("experts.down_proj")) {
            (Some(experts), _) => (experts, &["gate_proj", "up_proj"]),
            (None, Some(mlp)) => (&name[..mlp.len() + "experts.".len()], &["down_proj"]),
            (None, None) => return own_names(name, shape),
        };
    let of_one = [shape[1] / projections.len() as i64, shape[2]];
    (0..shape[0])
        .flat_map(|e| projections.iter().map(move |projection| (e, projection)))
        .map(|(e, projection)| Piece::whole(format!("{experts}{e}.{projection}.weight"), &of_one))
        .collect()
}

fn nested_each_expert(name: &str, shape: &[i64]) -> Vec<Piece> {
    nested(each_expert(name, shape))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::LlmConfig;

    #[test]
    fn some_blocks_have_no_experts() {
        let config = LlmConfig::from_keys(&json!({
            "model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        }));
        let config = config.unwrap();
        let sparse: Vec<bool> = (0..6).map(|layer| config.shape(layer).moe.is_some()).collect();
        assert_eq!(sparse, [false, true, false, false, false, true]);
        assert_eq!(config.decoder().head_dim, 64);
    }

    #[test]
    fn keys_have_two_spellings_and_are_checked() {
        let read = |keys: Value| {
            let mut keys = keys;
            keys["model_type"] = "qwen3_moe".into();
            LlmConfig::from_keys(&keys).map_err(|error| error.to_string())
        };
        let config = read(json!({ "num_local_experts": 12, "mlp_only_layers": null })).unwrap();
        assert_eq!(config.shape(0).moe.unwrap().experts, 12);
        assert_eq!(config.to_json()["num_experts"], 12);
        for (keys, expected) in [
            (json!({ "num_experts": 4 }), "8 is more than 4 experts"),
            (json!({ "num_experts_per_tok": 0 }), "`num_experts_per_tok`: must be at least 1"),
            (json!({ "use_sliding_window": true }), "`use_sliding_window`"),
            (json!({ "router_aux_loss_coef": -1.0 }), "must not be negative"),
        ] {
            let message = read(keys).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn each_expert_has_its_matrices() {
        let names = |name: &str, shape: &[i64]| {
            each_expert(name, shape).into_iter().map(|piece| (piece.name, piece.shape)).collect::<Vec<_>>()
        };
        let piece = |name: &str, shape: [i64; 2]| (format!("mlp.experts.{name}.weight"), shape.to_vec());
        assert_eq!(
            names("mlp.experts.gate_up_proj", &[2, 6, 4]),
            [
                piece("0.gate_proj", [3, 4]),
                piece("0.up_proj", [3, 4]),
                piece("1.gate_proj", [3, 4]),
                piece("1.up_proj", [3, 4]),
            ]
        );
        let down = [piece("0.down_proj", [4, 3]), piece("1.down_proj", [4, 3])];
        assert_eq!(names("mlp.experts.down_proj", &[2, 4, 3]), down);
        assert_eq!(names("mlp.down_proj.weight", &[4, 3]), [("mlp.down_proj.weight".into(), vec![4, 3])]);
    }
}
