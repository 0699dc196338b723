//! What a family's file provides, and how the families are listed.
//!
//! Not a family itself, and no arithmetic: what a family asks for is built by `decoder`. Called by
//! [`super::LlmConfig`], which holds the description of any family.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::config::{DecoderConfig, LlmConfig};
use super::resolve;
use crate::error::Result;
use crate::keys::{Refusal, UnknownKeys};
use crate::weights::{Layout, Piece, own_names};

/// What a family asks of the decoder that all share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecoderShape {
    /// The projections to queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Queries and keys of each head pass through an `RMSNorm` before the rotation.
    pub qk_norm: bool,
    /// The feed-forward layer is a mixture of experts.
    pub moe: Option<MoeShape>,
}

/// A feed-forward layer of experts, of which each row visits a few.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeShape {
    /// Experts.
    pub experts: i64,
    /// Experts that a row visits.
    pub top_k: i64,
    /// Inner width of an expert.
    pub inner: i64,
    /// The weights of the experts that a row visits are divided by their sum.
    pub norm_topk_prob: bool,
    /// What the loss for unevenly used experts is multiplied by.
    pub balance_coef: f64,
}

/// A family: the fields of its config.json that are its own, under transformers' names, and the decoder
/// that they describe.
pub trait LlmFamily:
    Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// `model_type` of config.json.
    const MODEL_TYPE: &'static str;
    /// The class of transformers that the weights are for.
    const ARCHITECTURE: &'static str;
    /// How files name the tensors. An export has the first.
    const LAYOUTS: &'static [Layout] = &[own_names, nested_names];
    /// Keys of [`DecoderConfig`] that the family's config.json does not have.
    const WITHOUT: &'static [&'static str] = &[];
    /// Other spellings of keys: theirs, ours.
    const ALIASES: &'static [(&'static str, &'static str)] = &[];

    /// A JSON object: the defaults of transformers' configuration class, of all its own keys and of those
    /// of [`DecoderConfig`] that differ from what most families have.
    fn defaults() -> Value;

    /// What block number `layer`, from 0, is made of.
    fn shape(&self, layer: i64) -> DecoderShape;

    /// Checks that its own fields ask for nothing that is not built.
    ///
    /// # Errors
    /// The first key that does not pass.
    fn check(&self, decoder: &DecoderConfig) -> std::result::Result<(), Refusal>;
}

/// A family in the list of [`super::FAMILIES`].
pub(super) struct Family {
    /// `model_type` of its config.json.
    pub(super) model_type: &'static str,
    /// Reads the keys of a config.json.
    pub(super) parse: fn(&Map<String, Value>, UnknownKeys) -> Result<LlmConfig>,
}

impl Family {
    /// The entry of `F`.
    pub(super) const fn of<F: LlmFamily>() -> Self {
        Self { model_type: F::MODEL_TYPE, parse: resolve::parse::<F> }
    }
}

/// [`LlmFamily`] as an object.
pub(super) trait AnyFamily: Debug + Send + Sync {
    fn model_type(&self) -> &'static str;
    fn architecture(&self) -> &'static str;
    fn layouts(&self) -> &'static [Layout];
    fn without(&self) -> &'static [&'static str];
    fn shape(&self, layer: i64) -> DecoderShape;
    fn check(&self, decoder: &DecoderConfig) -> std::result::Result<(), Refusal>;
    fn fields(&self) -> Value;
}

impl<F: LlmFamily> AnyFamily for F {
    fn model_type(&self) -> &'static str {
        F::MODEL_TYPE
    }

    fn architecture(&self) -> &'static str {
        F::ARCHITECTURE
    }

    fn layouts(&self) -> &'static [Layout] {
        F::LAYOUTS
    }

    fn without(&self) -> &'static [&'static str] {
        F::WITHOUT
    }

    fn shape(&self, layer: i64) -> DecoderShape {
        F::shape(self, layer)
    }

    fn check(&self, decoder: &DecoderConfig) -> std::result::Result<(), Refusal> {
        F::check(self, decoder)
    }

    fn fields(&self) -> Value {
        serde_json::to_value(self).expect("invariant: the fields are numbers, strings, booleans and lists")
    }
}

/// Names in files of transformers 5's vision-language models, where the decoder without its head is
/// `model.language_model`.
pub(super) fn nested_names(name: &str, shape: &[i64]) -> Vec<Piece> {
    nested(own_names(name, shape))
}

/// The pieces of a decoder on its own, named as in a larger model.
pub(super) fn nested(pieces: Vec<Piece>) -> Vec<Piece> {
    let rename = |piece: Piece| match piece.name.strip_prefix("model.") {
        Some(rest) => Piece { name: format!("model.language_model.{rest}"), ..piece },
        None => piece,
    };
    pieces.into_iter().map(rename).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::rc::Rc;

    use serde_json::json;
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::llm::Llm;
    use crate::params::{Builder, Params, RandomSource, TensorSource};
    use crate::weights::{FileSource, Folder, arrange};

    fn build(config: &LlmConfig, source: &dyn TensorSource) -> Result<BTreeMap<String, Tensor>> {
        let params = Rc::new(RefCell::new(Params::new()));
        Llm::new(config, &Builder::new(params.clone(), "llm", source, (Kind::Float, Device::Cpu)))?;
        let local = |(name, param): (String, Tensor)| (name["llm.".len()..].to_owned(), param);
        Ok(params.take().into_iter().map(local).collect())
    }

    #[test]
    fn every_layout_is_read_alone_and_in_larger_models() {
        let config = LlmConfig::from_keys(&json!({
            "model_type": "qwen3_moe", "vocab_size": 7, "hidden_size": 8, "intermediate_size": 6, "head_dim": 4,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3,
            "num_experts_per_tok": 2, "moe_intermediate_size": 4, "mlp_only_layers": [0],
        }));
        let config = config.unwrap();
        let params = build(&config, &RandomSource::new(1, "llm")).unwrap();
        let naming = config.naming();
        for (layout, prefix, other) in [
            (0, "", None),
            (1, "", None),
            (0, "language_model.", Some("vision_model.x")),
            (1, "language_model.", Some("mlp1.0.weight")),
            (2, "", Some("model.vision_tower.x")),
            (3, "", Some("model.visual.x")),
        ] {
            let dir = tempfile::TempDir::new().unwrap();
            let mut tensors = arrange(&params, naming.layouts[layout], prefix).unwrap();
            let nested = tensors.contains_key("model.language_model.layers.1.mlp.gate.weight");
            assert!(nested == (layout > 1) && tensors.contains_key(&format!("{prefix}lm_head.weight")));
            tensors.extend(other.map(|name| (name.to_owned(), (&params["model.norm.weight"]).into())));
            Folder::new(tensors).json("config.json", &config.to_json()).write(dir.path()).unwrap();
            let source = FileSource::open(dir.path()).unwrap().with(naming.clone());
            let read = build(&config, &source).unwrap();
            assert!(read.keys().eq(params.keys()));
            assert!(read.iter().all(|(name, tensor)| tensor.equal(&params[name])), "{layout} {prefix}");
        }
    }
}
