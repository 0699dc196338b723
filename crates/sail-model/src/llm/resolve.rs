//! From the keys of a config.json, or those that a person wrote, to a whole [`LlmConfig`].
//!
//! Fills in the published defaults and understands the spellings of older transformers. Called by
//! [`LlmConfig`].

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::FAMILIES;
use super::config::{DecoderConfig, LlmConfig};
use super::family::LlmFamily;
use super::rope;
use crate::error::Result;
use crate::keys::{Refusal, UnknownKeys, config_error};

/// What most configuration classes of transformers 5.17 have for the keys that all families share; a
/// family's own defaults go before.
fn shared_defaults() -> Value {
    json!({
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": null, "hidden_act": "silu",
        "max_position_embeddings": 32768, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false, "rope_parameters": null, "attention_bias": false,
        "attention_dropout": 0.0, "use_cache": true, "bos_token_id": null, "eos_token_id": null,
        "pad_token_id": null,
    })
}

/// The configuration that `given` asks for, checked.
pub(super) fn resolve(given: &Value, unknown: UnknownKeys) -> Result<LlmConfig> {
    let model_type = given.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let family = FAMILIES.iter().find(|family| family.model_type == model_type);
    let (Some(given), Some(family)) = (given.as_object(), family) else {
        let families: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        let reason = format!("language models are `{}`, found `{model_type}`", families.join("`, `"));
        return Err(config_error("language model", "model_type", reason));
    };
    let config = (family.parse)(given, unknown)?;
    config.validate()?;
    Ok(config)
}

/// Reads keys as those of the family `F`.
pub(super) fn parse<F: LlmFamily>(given: &Map<String, Value>, unknown: UnknownKeys) -> Result<LlmConfig> {
    let wrong = |(key, reason): Refusal| config_error(F::MODEL_TYPE, key, reason);
    let mut defaults = object(shared_defaults());
    defaults.extend(object(F::defaults()));
    let mut fields = defaults.clone();
    for (key, value) in given {
        let alias = F::ALIASES.iter().find(|(theirs, _)| theirs == key);
        let key = alias.map_or(key.as_str(), |(_, ours)| ours);
        // `attention_bias` and the like are understood, so that asking for it is refused by its name.
        if fields.contains_key(key) {
            fields.insert(key.to_owned(), value.clone());
        } else if unknown == UnknownKeys::Refuse && key != "model_type" && !rope::KEYS.contains(&key) {
            return Err(config_error(F::MODEL_TYPE, key, "this family has no such key".into()));
        }
    }
    let longest = fields["max_position_embeddings"].as_i64().unwrap_or_default();
    let rope = rope::resolve(given, longest, unknown).map_err(wrong)?;
    fields.insert("rope_parameters".into(), rope.clone());
    derive_heads(&mut fields).map_err(wrong)?;
    let fields = Value::Object(fields);
    read::<F>(&fields).map_err(|error| {
        // The first key that does not fit among the defaults either is the one to name.
        defaults.insert("rope_parameters".into(), rope);
        let culprit = given.iter().find(|(key, value)| {
            let mut alone = defaults.clone();
            let known = alone.insert((*key).clone(), (*value).clone()).is_some();
            known
                && key.as_str() != "rope_parameters"
                && derive_heads(&mut alone).is_ok()
                && read::<F>(&Value::Object(alone)).is_err()
        });
        let key = culprit.map_or("config.json", |(key, _)| key.as_str());
        config_error(F::MODEL_TYPE, key, error.to_string())
    })
}

fn read<F: LlmFamily>(fields: &Value) -> std::result::Result<LlmConfig, serde_json::Error> {
    let decoder: DecoderConfig = serde_json::from_value(fields.clone())?;
    let family: F = serde_json::from_value(fields.clone())?;
    Ok(LlmConfig::new(decoder, Arc::new(family)))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Fills the heads' numbers that the file leaves to others.
fn derive_heads(fields: &mut Map<String, Value>) -> std::result::Result<(), Refusal> {
    let heads = fields["num_attention_heads"].clone();
    if fields["num_key_value_heads"].is_null() {
        fields["num_key_value_heads"] = heads.clone();
    }
    if fields["head_dim"].is_null() {
        let (hidden, heads) = (fields["hidden_size"].as_i64(), heads.as_i64());
        match (hidden, heads) {
            (Some(hidden), Some(heads)) if heads > 0 && hidden % heads == 0 => {
                fields["head_dim"] = (hidden / heads).into();
            }
            // Of another type: the reading that follows says so.
            (None, _) | (_, None) => fields["head_dim"] = 1.into(),
            _ => {
                return Err(("head_dim", "not given, and hidden_size is not a multiple of the heads".into()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(keys: &Value) -> String {
        LlmConfig::from_keys(keys).unwrap_err().to_string()
    }

    #[test]
    fn missing_keys_take_the_published_defaults() {
        let read = |keys: Value| LlmConfig::from_keys(&keys).unwrap();
        let llama = read(json!({ "model_type": "llama", "hidden_size": 64 }));
        let decoder = llama.decoder();
        assert_eq!((decoder.num_key_value_heads, decoder.head_dim), (32, 2));
        assert_eq!((decoder.vocab_size, decoder.intermediate_size), (32000, 11008));
        let qwen2 = read(json!({ "model_type": "qwen2", "num_key_value_heads": null }));
        assert_eq!((qwen2.decoder().head_dim, qwen2.decoder().num_key_value_heads), (128, 32));
        let qwen3 = read(json!({ "model_type": "qwen3" }));
        assert_eq!((qwen3.decoder().head_dim, qwen3.vocab_size()), (128, 151_936));
        let shapes = [&llama, &qwen2, &qwen3].map(|config| config.shape(0));
        assert_eq!(
            shapes.map(|shape| (shape.qkv_bias, shape.qk_norm)),
            [(false, false), (true, false), (false, true)]
        );
    }

    #[test]
    fn what_is_written_reads_back() {
        for family in FAMILIES {
            let config = LlmConfig::from_keys(&json!({
                "model_type": family.model_type, "rope_theta": 1e6, "eos_token_id": [1, 2],
                "num_key_value_heads": 8,
            }));
            let config = config.unwrap();
            assert_eq!(LlmConfig::from_json(&config.to_json()).unwrap(), config);
            assert_eq!(config.to_json()["rope_theta"], 1e6);
            assert_eq!(
                serde_json::from_value::<LlmConfig>(serde_json::to_value(&config).unwrap()).unwrap(),
                config
            );
            assert_eq!(LlmConfig::from_json(&json!({ "llm_config": config.to_json() })).unwrap(), config);
        }
    }

    #[test]
    fn what_is_not_built_is_refused() {
        let cases = [
            (json!({ "model_type": "gpt2" }), "found `gpt2`"),
            (json!([1]), "`model_type`"),
            (json!({ "model_type": "llama", "hiden_size": 4 }), "`hiden_size`: this family has no such key"),
            (json!({ "model_type": "llama", "use_sliding_window": false }), "no such key"),
            (json!({ "model_type": "llama", "hidden_size": "big" }), "`hidden_size`: invalid type: string"),
            (json!({ "model_type": "llama", "mlp_bias": 1 }), "`mlp_bias`: invalid type"),
            (json!({ "model_type": "llama", "hidden_size": 33 }), "`head_dim`"),
            (json!({ "model_type": "llama", "head_dim": 5 }), "must be even"),
            (json!({ "model_type": "llama", "num_hidden_layers": 0 }), "at least 1"),
            (json!({ "model_type": "llama", "num_key_value_heads": 5 }), "does not divide 32"),
            (json!({ "model_type": "llama", "hidden_act": "gelu" }), "only `silu`"),
            (json!({ "model_type": "llama", "mlp_bias": true }), "`mlp_bias`"),
            (json!({ "model_type": "qwen3", "attention_bias": true }), "`attention_bias`"),
            (json!({ "model_type": "qwen3", "attention_dropout": 0.1 }), "`attention_dropout`"),
            (json!({ "model_type": "qwen3", "use_sliding_window": true }), "layers 28 to 31"),
            (json!({ "model_type": "qwen2", "layer_types": ["sliding_attention"] }), "`layer_types`"),
        ];
        for (keys, expected) in cases {
            let message = error(&keys);
            assert!(message.contains(expected), "{message} does not say {expected}");
        }
    }

    #[test]
    fn a_window_that_no_layer_has_is_no_window() {
        for keys in [
            json!({ "model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 32 }),
            json!({ "model_type": "qwen2", "use_sliding_window": true, "sliding_window": null }),
            json!({ "model_type": "qwen3", "use_sliding_window": true, "num_hidden_layers": 28 }),
        ] {
            LlmConfig::from_keys(&keys).unwrap();
        }
    }

    #[test]
    fn config_json_may_hold_other_keys_and_a_language_model() {
        let file = json!({ "model_type": "llama", "torch_dtype": "bfloat16", "architectures": ["X"] });
        assert!(LlmConfig::from_json(&file).is_ok());
        let whole = json!({ "model_type": "internvl", "text_config": file, "tie_word_embeddings": true });
        let config = LlmConfig::from_json(&whole).unwrap();
        assert!(config.model_type() == "llama" && config.decoder().tie_word_embeddings);
    }
}
