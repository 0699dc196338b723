//! Qwen3 without experts (Yang et al. 2025, arXiv 2505.09388): transformers' `Qwen3ForCausalLM`. No bias;
//! queries and keys are normalised per head before the rotation.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::DecoderConfig;
use super::family::{DecoderShape, LlmFamily};
use super::window::Window;
use crate::keys::Refusal;

/// Fields of `Qwen3Config` that are its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Qwen3 {
    #[serde(flatten)]
    window: Window,
}

impl LlmFamily for Qwen3 {
    const MODEL_TYPE: &'static str = "qwen3";
    const ARCHITECTURE: &'static str = "Qwen3ForCausalLM";

    fn defaults() -> Value {
        json!({
            "head_dim": 128, "use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 28,
            "layer_types": null,
        })
    }

    fn shape(&self, _layer: i64) -> DecoderShape {
        DecoderShape { qk_norm: true, ..DecoderShape::default() }
    }

    fn check(&self, decoder: &DecoderConfig) -> Result<(), Refusal> {
        self.window.check(decoder.num_hidden_layers)
    }
}
