//! What config.json says about the rotary embedding: the rope types of transformers 5.17's
//! `modeling_rope_utils`, in the spellings of transformers 4 and 5.
//!
//! No arithmetic: the frequencies are `rotary`'s. Called by `resolve` and by [`super::LlmConfig`].

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::keys::{Refusal, UnknownKeys};

/// Rotary embedding as transformers 5 describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeParameters {
    /// Base of the geometric series of frequencies.
    pub rope_theta: f64,
    /// What is done to the frequencies for texts longer than those of the first training.
    #[serde(flatten)]
    pub scaling: RopeScaling,
}

/// `rope_type` and its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions are divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    Linear {
        /// How many times longer texts may be.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept (Llama 3.1).
    Llama3 {
        /// How many times longer texts may be.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings` over this are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings` over this are kept.
        high_freq_factor: f64,
        /// Longest text of the first training.
        original_max_position_embeddings: i64,
    },
    /// Low frequencies are divided by `factor`, high ones kept, and the scores sharpened (Peng et al.
    /// 2023, arXiv 2309.00071).
    Yarn(Yarn),
}

/// Parameters of the rope type `yarn`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Yarn {
    /// How many times longer texts may be.
    pub factor: f64,
    /// Longest text of the first training.
    pub original_max_position_embeddings: i64,
    /// What cosines and sines are multiplied by; computed from the others when it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_factor: Option<f64>,
    /// Coordinates that turn more often than this in the original length are kept; 32 when not given or 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta_fast: Option<f64>,
    /// Coordinates that turn less often than this are divided by the factor; 1 when not given or 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta_slow: Option<f64>,
    /// With `mscale_all_dim`, another way to compute the attention factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mscale: Option<f64>,
    /// See `mscale`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mscale_all_dim: Option<f64>,
    /// Round the bounds between kept and divided coordinates outwards; true when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub truncate: Option<bool>,
}

/// Keys of config.json that are read here.
pub(super) const KEYS: [&str; 4] = ["rope_theta", ORIGINAL, "rope_scaling", "rope_parameters"];

const ORIGINAL: &str = "original_max_position_embeddings";
const DEFAULT_THETA: f64 = 10000.0;

/// The parameters of each rope type: those that must be there, and the others.
const TYPES: [(&str, &[&str], &[&str]); 4] = [
    ("default", &[], &[]),
    ("linear", &["factor"], &[]),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL], &[]),
    (
        "yarn",
        &["factor", ORIGINAL],
        &["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"],
    ),
];

/// The keys of [`RopeParameters`] from `rope_parameters` of transformers 5, or `rope_theta` and
/// `rope_scaling` of transformers 4, which go before where there are both. `longest` is
/// `max_position_embeddings`.
pub(super) fn resolve(
    given: &Map<String, Value>,
    longest: i64,
    unknown: UnknownKeys,
) -> Result<Value, Refusal> {
    let (source, keys) = mapping(given)?;
    let present = |keys: &Map<String, Value>, key| keys.get(key).filter(|value| !value.is_null()).cloned();
    let kind = present(keys, "rope_type").or(present(keys, "type")).unwrap_or("default".into());
    let Some((kind, required, optional)) = TYPES.iter().find(|(name, ..)| kind == *name) else {
        let types = TYPES.map(|(kind, ..)| kind).join("`, `");
        return Err((source, format!("rope_type {kind} is not supported, only `{types}`")));
    };
    let theta = present(keys, "rope_theta").or(present(given, "rope_theta"));
    let mut rope = Map::new();
    rope.insert("rope_type".into(), (*kind).into());
    rope.insert("rope_theta".into(), theta.unwrap_or(DEFAULT_THETA.into()));
    for (key, value) in keys {
        match key.as_str() {
            "rope_theta" | "rope_type" | "type" => {}
            _ if value.is_null() => {}
            known if required.contains(&known) || optional.contains(&known) => {
                rope.insert(key.clone(), value.clone());
            }
            "partial_rotary_factor" if value.as_f64() == Some(1.0) => {}
            "partial_rotary_factor" | "mrope_section" => {
                return Err((source, format!("`{key}` is not supported")));
            }
            _ if value.is_object() || unknown == UnknownKeys::Refuse => {
                return Err((source, format!("rope_type `{kind}` has no parameter `{key}`")));
            }
            _ => {}
        }
    }
    if required.contains(&ORIGINAL) {
        // As transformers: beside the mapping it goes before.
        let original = present(given, ORIGINAL).or(present(keys, ORIGINAL)).unwrap_or(longest.into());
        if keys.get("factor").is_some_and(Value::is_null) {
            let factor = longest as f64 / original.as_f64().unwrap_or_default();
            rope.insert("factor".into(), factor.into());
        }
        rope.insert(ORIGINAL.into(), original);
    }
    if let Some(missing) = required.iter().find(|key| !rope.contains_key(**key)) {
        return Err((source, format!("rope_type `{kind}` needs `{missing}`")));
    }
    let rope = Value::Object(rope);
    match serde_json::from_value::<RopeParameters>(rope.clone()) {
        Ok(_) => Ok(rope),
        Err(error) => Err((source, error.to_string())),
    }
}

/// The mapping with the rope type, and under which key it is.
fn mapping(given: &Map<String, Value>) -> Result<(&'static str, &Map<String, Value>), Refusal> {
    static NO_KEYS: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
    for source in ["rope_scaling", "rope_parameters"] {
        match given.get(source) {
            None | Some(Value::Null) => {}
            Some(Value::Object(keys)) if keys.is_empty() => {}
            Some(Value::Object(keys)) => return Ok((source, keys)),
            Some(other) => return Err((source, format!("must be a mapping, is {other}"))),
        }
    }
    Ok(("rope_parameters", &NO_KEYS))
}

impl RopeParameters {
    /// `rope_scaling` of transformers 4, for a model of these `max_position_embeddings`; None without
    /// scaling.
    pub(super) fn scaling_json(&self, longest: i64) -> Option<Value> {
        let mut json = serde_json::to_value(&self.scaling).expect("invariant: the fields are plain values");
        let keys = json.as_object_mut()?;
        match &self.scaling {
            RopeScaling::Default => return None,
            // Where it is given, transformers 4 computes the factor from it and ignores `factor`.
            RopeScaling::Yarn(yarn) if yarn.original_max_position_embeddings == longest => {
                keys.remove(ORIGINAL);
            }
            _ => {}
        }
        Some(json)
    }

    /// Checks that frequencies can be computed.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        let theta = self.rope_theta;
        let (factor, original, least_theta) = match &self.scaling {
            RopeScaling::Default => (1.0, 1, 0.0),
            RopeScaling::Linear { factor } => (*factor, 1, 0.0),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            } => {
                if *low <= 0.0 || high <= low {
                    let reason = format!(
                        "`high_freq_factor` {high} must be above `low_freq_factor` {low}, and both above 0"
                    );
                    return Err(("rope_parameters", reason));
                }
                (*factor, *original_max_position_embeddings, 0.0)
            }
            RopeScaling::Yarn(yarn) => (yarn.factor, yarn.original_max_position_embeddings, 1.0),
        };
        if theta.is_nan() || theta <= least_theta {
            return Err(("rope_theta", format!("must be above {least_theta}, is {theta}")));
        }
        if !(factor > 0.0 && factor.is_finite()) {
            return Err(("rope_parameters", format!("`factor` must be positive, is {factor}")));
        }
        if original < 1 {
            return Err(("rope_parameters", format!("`{ORIGINAL}` must be at least 1, is {original}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::llm::LlmConfig;

    fn read(keys: &Value) -> RopeParameters {
        let mut keys = keys.clone();
        keys["model_type"] = "llama".into();
        LlmConfig::from_keys(&keys).unwrap().decoder().rope_parameters.clone()
    }

    #[test]
    fn old_and_new_spellings_mean_the_same() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let mut new = llama3.clone();
        new["rope_theta"] = 5e5.into();
        let pairs = [
            (
                json!({ "rope_theta": 5e5, "rope_scaling": null }),
                json!({ "rope_type": "default", "rope_theta": 500_000 }),
            ),
            (json!({ "rope_theta": 5e5, "rope_scaling": llama3 }), new),
            (
                json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 2 } }),
                json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5 }),
            ),
            (
                json!({ "rope_theta": 5e5, "rope_scaling": { "type": "yarn", "factor": 4.0 } }),
                json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 2048 }),
            ),
        ];
        for (old, new) in pairs {
            assert_eq!(read(&old), read(&json!({ "rope_parameters": new })), "{old}");
        }
        assert!((read(&json!({})).rope_theta - DEFAULT_THETA).abs() < 1e-9);
    }

    #[test]
    fn scaling_is_written_for_both_generations_of_transformers() {
        let write = |rope: Value| {
            let keys =
                json!({ "model_type": "llama", "max_position_embeddings": 64, "rope_parameters": rope });
            let config = LlmConfig::from_keys(&keys).unwrap();
            let json = config.to_json();
            assert_eq!(LlmConfig::from_json(&json).unwrap(), config);
            let old = json!({
                "model_type": "llama", "max_position_embeddings": 64, "rope_theta": json["rope_theta"],
                "rope_scaling": json["rope_scaling"],
            });
            assert_eq!(LlmConfig::from_keys(&old).unwrap(), config);
            json
        };
        assert!(write(json!({ "rope_type": "default" })).get("rope_scaling").is_none());
        let linear = write(json!({ "rope_type": "linear", "factor": 2.5, "rope_theta": 7.0 }));
        assert_eq!(linear["rope_scaling"], json!({ "rope_type": "linear", "factor": 2.5 }));
        assert_eq!(linear["rope_parameters"]["rope_theta"], 7.0);
        let yarn = write(json!({ "rope_type": "yarn", "factor": 2.0, "truncate": false }));
        assert_eq!(yarn["rope_scaling"], json!({ "rope_type": "yarn", "factor": 2.0, "truncate": false }));
        assert_eq!(yarn["rope_parameters"]["original_max_position_embeddings"], 64);
        let yarn =
            write(json!({ "rope_type": "yarn", "factor": null, "original_max_position_embeddings": 16 }));
        assert_eq!(yarn["rope_scaling"]["factor"], 4.0);
        assert_eq!(yarn["rope_scaling"]["original_max_position_embeddings"], 16);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let llama3 = |low: f64| json!({ "rope_type": "llama3", "factor": 2, "low_freq_factor": low, "high_freq_factor": 4 });
        for (rope, expected) in [
            (
                json!({ "rope_type": "longrope" }),
                "rope_type \"longrope\" is not supported, only `default`, `linear`",
            ),
            (json!({ "type": "dynamic", "factor": 2 }), "\"dynamic\""),
            (json!({ "type": "linear" }), "rope_type `linear` needs `factor`"),
            (json!({ "type": "linear", "factor": "two" }), "invalid type: string"),
            (json!({ "type": "linear", "factor": 0 }), "`factor` must be positive"),
            (
                json!({ "type": "linear", "factor": 2, "beta_fast": 1 }),
                "`linear` has no parameter `beta_fast`",
            ),
            (json!({ "partial_rotary_factor": 0.5 }), "`partial_rotary_factor` is not supported"),
            (json!({ "full_attention": {} }), "no parameter `full_attention`"),
            (llama3(4.0), "`high_freq_factor` 4 must be above `low_freq_factor` 4"),
            (json!({ "type": "yarn", "factor": 2, "rope_theta": 1 }), "`rope_theta`: must be above 1"),
            (json!("yarn"), "`rope_scaling`: must be a mapping"),
        ] {
            let keys = json!({ "model_type": "llama", "rope_scaling": rope });
            let message = LlmConfig::from_keys(&keys).unwrap_err().to_string();
            assert!(message.contains(expected), "{message} does not say {expected}");
        }
        let published = json!({
            "model_type": "llama", "rope_scaling": { "type": "yarn", "factor": 16, "finetuned": true },
        });
        assert!(LlmConfig::from_json(&published).is_ok() && LlmConfig::from_keys(&published).is_err());
    }
}
