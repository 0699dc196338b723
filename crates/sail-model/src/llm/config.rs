//! What config.json says about a language model, by `model_type`.
//!
//! The fields of transformers 5.17 (`LlamaConfig`, `Qwen3Config`); refuses what the decoder does not
//! compute, and writes a whole config.json back. Defaults and older spellings are [`super::resolve`]'s.
//! Called by the trainer's configuration, by [`super::Llm`] and by the export.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::resolve::{UnknownKeys, config_error, resolve};
use crate::error::{Error, Result};
use crate::weights::{Naming, read_json};

/// A language model's description: one variant per family, named by config.json's `model_type`.
///
/// (De)serialises as config.json does; reading skips unknown keys, see [`LlmConfig::from_json`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum LlmConfig {
    /// `llama`: Llama and what shares its architecture, such as `SmolLM2`.
    Llama(LlamaConfig),
    /// `qwen3`: dense Qwen3, with normalised queries and keys.
    Qwen3(Qwen3Config),
}

/// Fields of `LlamaConfig`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// What the families share.
    #[serde(flatten)]
    pub decoder: DecoderConfig,
    /// Bias in the feed-forward layers; only false is built.
    pub mlp_bias: bool,
    /// Read and written, without effect.
    pub pretraining_tp: Option<i64>,
}

/// Fields of `Qwen3Config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Qwen3Config {
    /// What the families share.
    #[serde(flatten)]
    pub decoder: DecoderConfig,
    /// Only false is built.
    pub use_sliding_window: bool,
    /// Without effect while `use_sliding_window` is false.
    pub sliding_window: Option<i64>,
    /// Without effect while `use_sliding_window` is false.
    pub max_window_layers: i64,
    /// Kind of attention of each layer; only `full_attention` is built.
    pub layer_types: Option<Vec<String>>,
}

/// Fields that all families of the decoder have. Names are config.json's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecoderConfig {
    /// Rows of the embedding table.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Inner width of the `SwiGLU`.
    pub intermediate_size: i64,
    /// Decoder blocks.
    pub num_hidden_layers: i64,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key and value heads, each shared by equally many query heads.
    pub num_key_value_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Only `silu` is built.
    pub hidden_act: String,
    /// Longest sequence the model was made for; nothing here depends on it.
    pub max_position_embeddings: i64,
    /// Standard deviation of randomly initialised matrices.
    pub initializer_range: f64,
    /// Added to the mean square in every `RMSNorm`.
    pub rms_norm_eps: f64,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Rotary embedding.
    pub rope_parameters: RopeParameters,
    /// Bias in the attention's projections; only false is built.
    pub attention_bias: bool,
    /// Only 0 is built.
    pub attention_dropout: f64,
    /// Read and written, without effect.
    pub use_cache: bool,
    /// Begin-of-sequence token.
    pub bos_token_id: Option<i64>,
    /// End-of-sequence token or tokens.
    pub eos_token_id: Option<TokenIds>,
    /// Padding token.
    pub pad_token_id: Option<i64>,
}

/// Rotary embedding as transformers 5 describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeParameters {
    /// Base of the geometric series of frequencies.
    pub rope_theta: f64,
    /// Only `default` is built.
    pub rope_type: String,
}

/// One token or several, as config.json may have either.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// `2`
    One(i64),
    /// `[2, 7]`
    Many(Vec<i64>),
}

impl LlmConfig {
    /// Reads `config.json` of a Hugging Face folder.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read or is not JSON, else as [`LlmConfig::from_json`].
    pub fn read(folder: &Path) -> Result<Self> {
        Self::from_json(&read_json(&folder.join("config.json"))?)
    }

    /// Reads a whole config.json. Keys that the family does not have are skipped, as transformers
    /// does; missing ones take the family's published defaults.
    ///
    /// # Errors
    /// [`Error::Config`] names the key that is wrong or asks for what is not built.
    pub fn from_json(config: &Value) -> Result<Self> {
        resolve(config, UnknownKeys::Skip)
    }

    /// Reads the keys that a person wrote: as [`LlmConfig::from_json`], but refuses unknown keys.
    ///
    /// # Errors
    /// As [`LlmConfig::from_json`], and for a key that the family does not have.
    pub fn from_keys(keys: &Value) -> Result<Self> {
        resolve(keys, UnknownKeys::Refuse)
    }

    /// A whole config.json, readable by transformers 4 and 5.
    pub fn to_json(&self) -> Value {
        let (architecture, fields) = match self {
            Self::Llama(config) => ("LlamaForCausalLM", serde_json::to_value(config)),
            Self::Qwen3(config) => ("Qwen3ForCausalLM", serde_json::to_value(config)),
        };
        let mut json = json!({ "architectures": [architecture], "model_type": self.model_type() });
        let fields = fields.expect("invariant: the fields are numbers, strings and lists");
        let map = json.as_object_mut().expect("invariant: written as an object above");
        map.extend(fields.as_object().cloned().unwrap_or_default());
        // transformers 4 knows `rope_theta` only, transformers 5 prefers `rope_parameters`.
        map.insert("rope_theta".into(), self.decoder().rope_parameters.rope_theta.into());
        json
    }

    /// `llama` or `qwen3`.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::Llama(_) => "llama",
            Self::Qwen3(_) => "qwen3",
        }
    }

    /// What the families share.
    pub fn decoder(&self) -> &DecoderConfig {
        match self {
            Self::Llama(config) => &config.decoder,
            Self::Qwen3(config) => &config.decoder,
        }
    }

    /// Queries and keys of each head pass through an `RMSNorm` before the rotation.
    pub fn normalises_queries(&self) -> bool {
        matches!(self, Self::Qwen3(_))
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> i64 {
        self.decoder().hidden_size
    }

    /// Rows of the embedding table.
    pub fn vocab_size(&self) -> i64 {
        self.decoder().vocab_size
    }

    /// How files name its tensors. They may hold the head of a tied model, and the rotary frequencies that
    /// early Llama files store.
    pub fn naming(&self) -> Naming {
        let mut ignored = vec![".rotary_emb.inv_freq"];
        if self.decoder().tie_word_embeddings {
            ignored.push("lm_head.weight");
        }
        Naming { prefixes: vec!["", "language_model."], ignored, ..Naming::default() }
    }

    /// Checks that the fields fit together and ask for nothing that is not built.
    ///
    /// # Errors
    /// [`Error::Config`] for the first field that does not pass.
    pub fn validate(&self) -> Result<()> {
        let refuse = |(key, reason)| Err(config_error(self.model_type(), key, reason));
        self.decoder().check().or_else(refuse)?;
        match self {
            Self::Llama(LlamaConfig { mlp_bias: true, .. }) => {
                refuse(("mlp_bias", "only false is supported".into()))
            }
            Self::Qwen3(Qwen3Config { use_sliding_window: true, .. }) => {
                refuse(("use_sliding_window", "only false is supported".into()))
            }
            Self::Qwen3(Qwen3Config { layer_types: Some(types), .. })
                if types.iter().any(|kind| kind != "full_attention") =>
            {
                refuse(("layer_types", "only `full_attention` is supported".into()))
            }
            _ => Ok(()),
        }
    }
}

impl TryFrom<Value> for LlmConfig {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        Self::from_json(&value)
    }
}

impl From<LlmConfig> for Value {
    fn from(config: LlmConfig) -> Self {
        config.to_json()
    }
}

impl DecoderConfig {
    /// The first key that does not pass, and why.
    fn check(&self) -> std::result::Result<(), (&'static str, String)> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ];
        if let Some((key, value)) = positive.into_iter().find(|(_, value)| *value < 1) {
            return Err((key, format!("must be at least 1, is {value}")));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        let RopeParameters { rope_theta, rope_type } = &self.rope_parameters;
        let checks = [
            (
                heads % kv_heads == 0,
                "num_key_value_heads",
                format!("{kv_heads} does not divide {heads} heads"),
            ),
            (self.head_dim % 2 == 0, "head_dim", format!("must be even, is {}", self.head_dim)),
            (
                self.hidden_act == "silu",
                "hidden_act",
                format!("only `silu` is supported, is `{}`", self.hidden_act),
            ),
            (self.rms_norm_eps > 0.0, "rms_norm_eps", format!("must be positive, is {}", self.rms_norm_eps)),
            (
                self.initializer_range > 0.0,
                "initializer_range",
                format!("must be positive, is {}", self.initializer_range),
            ),
            (*rope_theta > 0.0, "rope_theta", format!("must be positive, is {rope_theta}")),
            (
                rope_type == "default",
                "rope_parameters",
                format!("rope_type `{rope_type}` is not supported, only `default`"),
            ),
            (!self.attention_bias, "attention_bias", "only false is supported".to_owned()),
            (
                self.attention_dropout == 0.0,
                "attention_dropout",
                format!("only 0 is supported, is {}", self.attention_dropout),
            ),
        ];
        match checks.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, key, reason)) => Err((key, reason)),
        }
    }
}
