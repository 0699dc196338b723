//! From the keys of a config.json, or those that a person wrote, to a whole [`LlmConfig`].
//!
//! Holds the published defaults and the spellings of older transformers. Called by [`LlmConfig`].

use serde_json::{Map, Value, json};

use super::config::LlmConfig;
use crate::error::{Error, Result};

/// What to do with a key that the family does not have.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum UnknownKeys {
    Skip,
    Refuse,
}

/// The published defaults: those of the configuration classes of transformers 5.17.
fn defaults(model_type: &str) -> Option<Value> {
    let mut keys = json!({
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
        "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
        "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" },
        "attention_bias": false, "attention_dropout": 0.0, "use_cache": true, "pad_token_id": null,
    });
    let own = match model_type {
        "llama" => json!({
            "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": null, "head_dim": null,
            "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
            "mlp_bias": false, "pretraining_tp": 1,
        }),
        "qwen3" => json!({
            "vocab_size": 151_936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
            "max_position_embeddings": 32768, "bos_token_id": null, "eos_token_id": null,
            "use_sliding_window": false, "sliding_window": null, "max_window_layers": 28, "layer_types": null,
        }),
        _ => return None,
    };
    keys.as_object_mut()?.extend(own.as_object()?.clone());
    Some(keys)
}

/// The configuration that `given` asks for, checked.
pub(super) fn resolve(given: &Value, unknown: UnknownKeys) -> Result<LlmConfig> {
    let model_type = given.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let wrong = |key: &str, reason: String| config_error(model_type, key, reason);
    let (Some(given), Some(Value::Object(mut fields))) = (given.as_object(), defaults(model_type)) else {
        let reason = format!("language models are `llama` and `qwen3`, found `{model_type}`");
        return Err(config_error("language model", "model_type", reason));
    };
    for (key, value) in given {
        let elsewhere = ["model_type", "rope_theta", "rope_scaling", "rope_parameters"];
        if fields.contains_key(key) && !elsewhere.contains(&key.as_str()) {
            fields.insert(key.clone(), value.clone());
        } else if unknown == UnknownKeys::Refuse && !elsewhere.contains(&key.as_str()) {
            return Err(wrong(key, "this family has no such key".into()));
        }
    }
    let rope = rope_parameters(given, &fields["rope_parameters"]).map_err(|(key, why)| wrong(key, why))?;
    fields.insert("rope_parameters".into(), rope);
    derive_heads(&mut fields).map_err(|(key, why)| wrong(key, why))?;
    let fields = Value::Object(fields);
    let parsed = match model_type {
        "llama" => serde_json::from_value(fields).map(LlmConfig::Llama),
        _ => serde_json::from_value(fields).map(LlmConfig::Qwen3),
    };
    let config = parsed.map_err(|error| wrong("config.json", error.to_string()))?;
    config.validate()?;
    Ok(config)
}

/// `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of transformers 4.
fn rope_parameters(
    given: &Map<String, Value>,
    default: &Value,
) -> std::result::Result<Value, (&'static str, String)> {
    let present = |key| given.get(key).filter(|value| !value.is_null());
    if let Some(scaling) = present("rope_scaling") {
        let kind = scaling.get("rope_type").or(scaling.get("type")).and_then(Value::as_str);
        if kind != Some("default") {
            return Err(("rope_scaling", format!("{scaling} is not supported, only the default rotation")));
        }
    }
    let mut rope = default.clone();
    rope["rope_theta"] = present("rope_theta").unwrap_or(&default["rope_theta"]).clone();
    match present("rope_parameters") {
        None => Ok(rope),
        Some(Value::Object(keys)) => {
            keys.iter().for_each(|(key, value)| rope[key.as_str()] = value.clone());
            match rope["rope_type"].as_str() {
                Some("default") => Ok(rope),
                _ => Err((
                    "rope_parameters",
                    format!("rope_type {} is not supported, only `default`", rope["rope_type"]),
                )),
            }
        }
        Some(other) => Err(("rope_parameters", format!("must be a mapping, is {other}"))),
    }
}

/// Fills the heads' numbers that the file leaves to others.
fn derive_heads(fields: &mut Map<String, Value>) -> std::result::Result<(), (&'static str, String)> {
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
            _ => {
                return Err(("head_dim", "not given, and hidden_size is not a multiple of the heads".into()));
            }
        }
    }
    Ok(())
}

pub(super) fn config_error(family: &str, key: &str, reason: String) -> Error {
    Error::Config { family: family.into(), key: key.into(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(keys: &Value) -> String {
        LlmConfig::from_keys(keys).unwrap_err().to_string()
    }

    #[test]
    fn missing_keys_take_the_published_defaults() {
        let llama = LlmConfig::from_keys(&json!({ "model_type": "llama", "hidden_size": 64 })).unwrap();
        let decoder = llama.decoder();
        assert_eq!((decoder.num_key_value_heads, decoder.head_dim), (32, 2));
        assert_eq!((decoder.vocab_size, decoder.intermediate_size), (32000, 11008));
        let qwen3 = LlmConfig::from_keys(&json!({ "model_type": "qwen3" })).unwrap();
        assert_eq!((qwen3.decoder().head_dim, qwen3.vocab_size()), (128, 151_936));
        assert!(qwen3.normalises_queries() && !llama.normalises_queries());
    }

    #[test]
    fn old_and_new_rotary_fields_mean_the_same() {
        let old = json!({ "model_type": "llama", "rope_theta": 5e5, "rope_scaling": null });
        let new = json!({ "model_type": "llama", "rope_parameters": { "rope_theta": 500_000, "rope_type": "default" } });
        assert_eq!(LlmConfig::from_keys(&old).unwrap(), LlmConfig::from_keys(&new).unwrap());
    }

    #[test]
    fn what_is_written_reads_back() {
        for model_type in ["llama", "qwen3"] {
            let config = LlmConfig::from_keys(&json!({
                "model_type": model_type, "rope_theta": 1e6, "eos_token_id": [1, 2], "num_key_value_heads": 8,
            }));
            let config = config.unwrap();
            assert_eq!(LlmConfig::from_json(&config.to_json()).unwrap(), config);
            assert_eq!(config.to_json()["rope_theta"], 1e6);
            assert_eq!(
                serde_json::from_value::<LlmConfig>(serde_json::to_value(&config).unwrap()).unwrap(),
                config
            );
        }
    }

    #[test]
    fn what_is_not_built_is_refused() {
        let cases = [
            (json!({ "model_type": "gpt2" }), "found `gpt2`"),
            (json!([1]), "`model_type`"),
            (json!({ "model_type": "llama", "hiden_size": 4 }), "`hiden_size`: this family has no such key"),
            (json!({ "model_type": "llama", "use_sliding_window": false }), "no such key"),
            (json!({ "model_type": "llama", "hidden_size": "big", "head_dim": 4 }), "string \"big\""),
            (json!({ "model_type": "llama", "hidden_size": 33 }), "`head_dim`"),
            (json!({ "model_type": "llama", "head_dim": 5 }), "must be even"),
            (json!({ "model_type": "llama", "num_hidden_layers": 0 }), "at least 1"),
            (json!({ "model_type": "llama", "num_key_value_heads": 5 }), "does not divide 32"),
            (json!({ "model_type": "llama", "hidden_act": "gelu" }), "only `silu`"),
            (json!({ "model_type": "llama", "mlp_bias": true }), "`mlp_bias`"),
            (
                json!({ "model_type": "llama", "rope_scaling": { "type": "linear", "factor": 2 } }),
                "`rope_scaling`",
            ),
            (
                json!({ "model_type": "qwen3", "rope_parameters": { "rope_type": "yarn", "factor": 2 } }),
                "\"yarn\"",
            ),
            (json!({ "model_type": "qwen3", "attention_bias": true }), "`attention_bias`"),
            (json!({ "model_type": "qwen3", "attention_dropout": 0.1 }), "`attention_dropout`"),
            (json!({ "model_type": "qwen3", "use_sliding_window": true }), "`use_sliding_window`"),
            (json!({ "model_type": "qwen3", "layer_types": ["sliding_attention"] }), "`layer_types`"),
        ];
        for (keys, expected) in cases {
            let message = error(&keys);
            assert!(message.contains(expected), "{message} does not say {expected}");
        }
    }

    #[test]
    fn config_json_may_hold_other_keys() {
        let mut file = json!({ "model_type": "llama", "torch_dtype": "bfloat16", "architectures": ["X"] });
        assert!(LlmConfig::from_json(&file).is_ok());
        file["rope_scaling"] = json!({ "rope_type": "llama3" });
        assert!(LlmConfig::from_json(&file).is_err());
    }
}
