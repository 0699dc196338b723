//! Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671): transformers' `Qwen2ForCausalLM`. Queries, keys
//! and values have a bias, the attention's output has none.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::DecoderConfig;
use super::family::{DecoderShape, LlmFamily};
use super::window::Window;
use crate::keys::Refusal;

/// Fields of `Qwen2Config` that are its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Qwen2 {
    #[serde(flatten)]
    window: Window,
}

impl LlmFamily for Qwen2 {
    const MODEL_TYPE: &'static str = "qwen2";
    const ARCHITECTURE: &'static str = "Qwen2ForCausalLM";
    const WITHOUT: &'static [&'static str] = &["attention_bias"];

    fn defaults() -> Value {
        json!({
            "use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 28, "layer_types": null,
        })
    }

    fn shape(&self, _layer: i64) -> DecoderShape {
        DecoderShape { qkv_bias: true, ..DecoderShape::default() }
    }

    fn check(&self, decoder: &DecoderConfig) -> Result<(), Refusal> {
        self.window.check(decoder.num_hidden_layers)
    }
}
