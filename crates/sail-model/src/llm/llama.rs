//! Llama (Touvron et al. 2023, arXiv 2302.13971): transformers' `LlamaForCausalLM`; also what shares its
//! architecture, such as `SmolLM2`.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::DecoderConfig;
use super::family::{DecoderShape, LlmFamily};
use crate::keys::Refusal;

/// Fields of `LlamaConfig` that are its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Llama {
    /// Bias in the feed-forward layers; only false is built.
    mlp_bias: bool,
    /// Read and written, without effect.
    pretraining_tp: Option<i64>,
}

impl LlmFamily for Llama {
    const MODEL_TYPE: &'static str = "llama";
    const ARCHITECTURE: &'static str = "LlamaForCausalLM";

    fn defaults() -> Value {
        json!({
            "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": null,
            "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
            "mlp_bias": false, "pretraining_tp": 1,
        })
    }

    fn shape(&self, _layer: i64) -> DecoderShape {
        DecoderShape::default()
    }

    fn check(&self, _decoder: &DecoderConfig) -> Result<(), Refusal> {
        if self.mlp_bias { Err(("mlp_bias", "only false is supported".into())) } else { Ok(()) }
    }
}
