//! What config.json says about a language model of any family.
//!
//! Refuses what the decoder does not compute, and writes a whole config.json back. Defaults and older
//! spellings are `resolve`'s, a family's own keys those of its file. Called by the trainer's
//! configuration, by [`super::Llm`] and by the export.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::family::{AnyFamily, DecoderShape};
use super::resolve::resolve;
use super::rope::RopeParameters;
use crate::error::{Error, Result};
use crate::keys::{Refusal, UnknownKeys, check_sizes, config_error, in_file};
use crate::weights::{Layout, Naming, read_json};

/// A language model's description, of the family that `model_type` names.
///
/// (De)serialises as config.json does; reading skips unknown keys, see [`LlmConfig::from_json`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct LlmConfig {
    decoder: DecoderConfig,
    family: Arc<dyn AnyFamily>,
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
    /// Longest sequence the model was made for; only some rotary embeddings depend on it.
    pub max_position_embeddings: i64,
    /// Standard deviation of randomly initialised matrices.
    pub initializer_range: f64,
    /// Added to the mean square in every `RMSNorm`.
    pub rms_norm_eps: f64,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Rotary embedding.
    pub rope_parameters: RopeParameters,
    /// Bias in all four of the attention's projections; only false is built.
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

/// One token or several, as config.json may have either.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// `2`
    One(i64),
    /// `[2, 7]`
    Many(Vec<i64>),
}

/// What other modules' tensors begin with in files of transformers' vision-language models.
const OTHER_MODULES: [&str; 8] = [
    "model.vision_tower.",
    "model.vision_model.",
    "model.vision_encoder.",
    "model.visual.",
    "model.multi_modal_projector.",
    "model.projector.",
    "model.connector.",
    "model.image_newline",
];

impl LlmConfig {
    pub(super) fn new(decoder: DecoderConfig, family: Arc<dyn AnyFamily>) -> Self {
        Self { decoder, family }
    }

    /// Reads `config.json` of a Hugging Face folder, of a language model or of a larger model that has one
    /// as its `llm_config` or `text_config`.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read or is not JSON, else as [`LlmConfig::from_json`].
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        Self::from_json(&read_json(&path)?).map_err(in_file(&path))
    }

    /// Reads a whole config.json. Keys that the family does not have are skipped, as transformers
    /// does; missing ones take the defaults of transformers 5.17.
    ///
    /// # Errors
    /// [`Error::Config`] names the key that is wrong or asks for what is not built.
    pub fn from_json(config: &Value) -> Result<Self> {
        let part = |key| config.get(key).filter(|part: &&Value| part.is_object());
        let Some(inner) = part("llm_config").or(part("text_config")) else {
            return resolve(config, UnknownKeys::Skip);
        };
        let mut inner = inner.clone();
        // The larger model holds the head, so that it may say alone what the head is.
        let tied = "tie_word_embeddings";
        if let (None, Some(value)) = (inner.get(tied), config.get(tied)) {
            inner[tied] = value.clone();
        }
        resolve(&inner, UnknownKeys::Skip)
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
        let mut json =
            json!({ "architectures": [self.family.architecture()], "model_type": self.model_type() });
        let shared = serde_json::to_value(&self.decoder).expect("invariant: the fields are plain values");
        let map = json.as_object_mut().expect("invariant: written as an object above");
        for fields in [shared, self.family.fields()] {
            map.extend(fields.as_object().cloned().unwrap_or_default());
        }
        map.retain(|key, _| !self.family.without().contains(&key.as_str()));
        // transformers 4 does not know `rope_parameters`; transformers 5 makes the same of either.
        let rope = &self.decoder.rope_parameters;
        map.insert("rope_theta".into(), rope.rope_theta.into());
        if let Some(scaling) = rope.scaling_json(self.decoder.max_position_embeddings) {
            map.insert("rope_scaling".into(), scaling);
        }
        json
    }

    /// `model_type` of config.json.
    pub fn model_type(&self) -> &'static str {
        self.family.model_type()
    }

    /// What the families share.
    pub fn decoder(&self) -> &DecoderConfig {
        &self.decoder
    }

    /// What block number `layer`, from 0, is made of.
    pub fn shape(&self, layer: i64) -> DecoderShape {
        self.family.shape(layer)
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> i64 {
        self.decoder.hidden_size
    }

    /// Rows of the embedding table.
    pub fn vocab_size(&self) -> i64 {
        self.decoder.vocab_size
    }

    /// How files name its tensors, those of larger models included. They may hold the head of a tied
    /// model, and the rotary frequencies that early Llama files store.
    pub fn naming(&self) -> Naming {
        let mut ignored = vec![".rotary_emb.inv_freq"];
        ignored.extend(OTHER_MODULES);
        if self.decoder.tie_word_embeddings {
            ignored.push("lm_head.weight");
        }
        Naming { prefixes: vec!["", "language_model."], layouts: self.family.layouts().to_vec(), ignored }
    }

    /// The layout that published files of the family have, which is the one to write.
    pub fn export_layout(&self) -> Layout {
        self.family.layouts()[0]
    }

    /// Checks that the fields fit together and ask for nothing that is not built.
    ///
    /// # Errors
    /// [`Error::Config`] for the first field that does not pass.
    pub fn validate(&self) -> Result<()> {
        let checked = self.decoder.check().and_then(|()| self.family.check(&self.decoder));
        checked.map_err(|(key, reason)| config_error(self.model_type(), key, reason))
    }
}

impl PartialEq for LlmConfig {
    fn eq(&self, other: &Self) -> bool {
        self.to_json() == other.to_json()
    }
}

impl fmt::Debug for LlmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple(self.model_type()).field(&self.decoder).field(&self.family).finish()
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
    fn check(&self) -> std::result::Result<(), Refusal> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ];
        check_sizes(&positive)?;
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        let no_divisor = format!("{kv_heads} does not divide {heads} heads");
        let positive = |value: f64| (value > 0.0, format!("must be positive, is {value}"));
        let (eps, std) = (positive(self.rms_norm_eps), positive(self.initializer_range));
        let activation = format!("only `silu` is supported, is `{}`", self.hidden_act);
        let dropout = format!("only 0 is supported, is {}", self.attention_dropout);
        let checks = [
            ("num_key_value_heads", heads % kv_heads == 0, no_divisor),
            ("head_dim", self.head_dim % 2 == 0, format!("must be even, is {}", self.head_dim)),
            ("hidden_act", self.hidden_act == "silu", activation),
            ("rms_norm_eps", eps.0, eps.1),
            ("initializer_range", std.0, std.1),
            ("attention_bias", !self.attention_bias, "only false is supported".to_owned()),
            ("attention_dropout", self.attention_dropout == 0.0, dropout),
        ];
        match checks.into_iter().find(|(_, holds, _)| !holds) {
            None => self.rope_parameters.check(),
            Some((key, _, reason)) => Err((key, reason)),
        }
    }
}
