//! What config.json says about a vision transformer, by `model_type`.
//!
//! Not a description of weights or of images. Called by the trainer's configuration, by
//! [`super::build_vision`] and by the export.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

use super::{Aimv2Config, Dinov2Config};
use crate::error::{Error, Result};
use crate::weights::read_json;

/// A vision transformer's description: one variant per family, named by `model_type`.
///
/// (De)serialises as config.json does; reading skips unknown keys, see [`VisionConfig::from_json`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum VisionConfig {
    /// `aimv2_vision_model`.
    Aimv2(Aimv2Config),
    /// `dinov2`.
    Dinov2(Dinov2Config),
}

/// What to do with a key that the family does not have.
#[derive(Clone, Copy, PartialEq)]
enum UnknownKeys {
    Skip,
    Refuse,
}

impl VisionConfig {
    /// Reads `config.json` of a Hugging Face folder.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read or is not JSON, else as [`VisionConfig::from_json`].
    pub fn read(folder: &Path) -> Result<Self> {
        Self::from_json(&read_json(&folder.join("config.json"))?)
    }

    /// Reads a whole config.json. Keys that the family does not have are skipped, as transformers
    /// does; missing ones take the defaults of transformers 5.17.
    ///
    /// # Errors
    /// [`Error::Config`] names the key that is wrong or asks for what is not built.
    pub fn from_json(config: &Value) -> Result<Self> {
        resolve(config, UnknownKeys::Skip)
    }

    /// Reads the keys that a person wrote: as [`VisionConfig::from_json`], but refuses unknown keys,
    /// and `use_head` of `AIMv2` is false unless given.
    ///
    /// # Errors
    /// As [`VisionConfig::from_json`], and for a key that the family does not have.
    pub fn from_keys(keys: &Value) -> Result<Self> {
        resolve(keys, UnknownKeys::Refuse)
    }

    /// A whole config.json for fp32 weights, readable by transformers' `AutoModel.from_pretrained`.
    pub fn to_json(&self) -> Value {
        let (architecture, fields) = match self {
            Self::Aimv2(config) => ("Aimv2VisionModel", serde_json::to_value(config)),
            Self::Dinov2(config) => ("Dinov2Model", serde_json::to_value(config)),
        };
        let fields = fields.expect("invariant: the fields are numbers, strings and booleans");
        let mut json = json!({
            "architectures": [architecture], "model_type": self.model_type(), "dtype": "float32",
        });
        let map = json.as_object_mut().expect("invariant: written as an object above");
        map.extend(fields.as_object().cloned().unwrap_or_default());
        json
    }

    /// `aimv2_vision_model` or `dinov2`.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::Aimv2(_) => Aimv2Config::MODEL_TYPE,
            Self::Dinov2(_) => Dinov2Config::MODEL_TYPE,
        }
    }

    /// Width of the features.
    pub fn hidden_size(&self) -> i64 {
        match self {
            Self::Aimv2(config) => config.hidden_size,
            Self::Dinov2(config) => config.hidden_size,
        }
    }

    /// Side of a patch in pixels.
    pub fn patch_size(&self) -> i64 {
        match self {
            Self::Aimv2(config) => config.patch_size,
            Self::Dinov2(config) => config.patch_size,
        }
    }

    /// Side in pixels of the images that the position table was made for.
    pub fn image_size(&self) -> i64 {
        match self {
            Self::Aimv2(config) => config.image_size,
            Self::Dinov2(config) => config.image_size,
        }
    }

    /// Transformer blocks.
    pub fn num_layers(&self) -> i64 {
        match self {
            Self::Aimv2(config) => config.num_hidden_layers,
            Self::Dinov2(config) => config.num_hidden_layers,
        }
    }

    /// Patches along one side of a square image of `px` pixels.
    ///
    /// # Errors
    /// [`Error::Config`] when `px` is not a positive multiple of the patch.
    pub fn grid_side(&self, px: i64) -> Result<i64> {
        let patch = self.patch_size();
        if px >= patch && px % patch == 0 {
            return Ok(px / patch);
        }
        let reason = format!("images of {px} pixels do not divide into patches of {patch}");
        Err(config_error(self.model_type(), "patch_size", reason))
    }

    /// Parameters, by the names inside the module, that no feature depends on. They get no gradient
    /// and are kept so that an export is complete.
    pub fn without_gradient(&self) -> &'static [&'static str] {
        match self {
            Self::Dinov2(Dinov2Config { use_mask_token: true, .. }) => &["embeddings.mask_token"],
            _ => &[],
        }
    }

    /// Checks that the fields fit together and ask for nothing that is not built.
    ///
    /// # Errors
    /// [`Error::Config`] for the first field that does not pass.
    pub fn validate(&self) -> Result<()> {
        let checked = match self {
            Self::Aimv2(config) => config.check(),
            Self::Dinov2(config) => config.check(),
        };
        checked.map_err(|(key, reason)| config_error(self.model_type(), key, reason))
    }
}

impl TryFrom<Value> for VisionConfig {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self> {
        Self::from_json(&value)
    }
}

impl From<VisionConfig> for Value {
    fn from(config: VisionConfig) -> Self {
        config.to_json()
    }
}

/// A key that does not pass, and why.
pub(super) type Refusal = (&'static str, String);

/// What every family asks of the fields they share.
pub(super) struct Common {
    pub(super) positive: Vec<(&'static str, i64)>,
    pub(super) heads: i64,
    pub(super) channels: i64,
    pub(super) hidden: i64,
    pub(super) image: i64,
    pub(super) patch: i64,
    pub(super) eps: (&'static str, f64),
    pub(super) initializer_range: f64,
    /// Dropout rates; only 0 is built.
    pub(super) dropouts: Vec<(&'static str, f64)>,
}

impl Common {
    pub(super) fn check(&self) -> std::result::Result<(), Refusal> {
        if let Some((key, value)) = self.positive.iter().find(|(_, value)| *value < 1) {
            return Err((key, format!("must be at least 1, is {value}")));
        }
        if let Some((key, value)) = self.dropouts.iter().find(|(_, rate)| *rate != 0.0) {
            return Err((key, format!("only 0 is supported, is {value}")));
        }
        let Self { hidden, heads, image, patch, eps: (eps_key, eps), .. } = self;
        let checks = [
            (self.channels == 3, "num_channels", format!("images have 3 channels, is {}", self.channels)),
            (
                hidden % heads == 0,
                "num_attention_heads",
                format!("{heads} does not divide the width {hidden}"),
            ),
            (image % patch == 0, "image_size", format!("{image} does not divide into patches of {patch}")),
            (*eps > 0.0, *eps_key, format!("must be positive, is {eps}")),
            (
                self.initializer_range > 0.0,
                "initializer_range",
                format!("must be positive, is {}", self.initializer_range),
            ),
        ];
        match checks.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, key, reason)) => Err((key, reason)),
        }
    }
}

/// A side in pixels: `448`, or `[448, 448]` as transformers also allows.
pub(super) fn side<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Side {
        One(i64),
        Two([i64; 2]),
    }
    match Side::deserialize(deserializer) {
        Ok(Side::One(side)) => Ok(side),
        Ok(Side::Two([height, width])) if height == width => Ok(height),
        Ok(Side::Two(sides)) => Err(serde::de::Error::custom(format!("{sides:?} is not square"))),
        Err(_) => Err(serde::de::Error::custom("must be a number of pixels or a pair of equal ones")),
    }
}

fn resolve(given: &Value, unknown: UnknownKeys) -> Result<VisionConfig> {
    let model_type = given.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let config = match (given.as_object(), model_type) {
        (Some(given), Aimv2Config::MODEL_TYPE) => {
            let mut given = given.clone();
            given.entry("use_head").or_insert((unknown == UnknownKeys::Skip).into());
            VisionConfig::Aimv2(parse(model_type, &given, unknown)?)
        }
        (Some(given), Dinov2Config::MODEL_TYPE) => VisionConfig::Dinov2(parse(model_type, given, unknown)?),
        _ => {
            let families = [Aimv2Config::MODEL_TYPE, Dinov2Config::MODEL_TYPE];
            let reason = format!("vision models are `{}`, found `{model_type}`", families.join("` and `"));
            return Err(config_error("vision model", "model_type", reason));
        }
    };
    config.validate()?;
    Ok(config)
}

fn parse<T>(family: &str, given: &Map<String, Value>, unknown: UnknownKeys) -> Result<T>
where
    T: Default + Serialize + DeserializeOwned,
{
    let whole = |error: serde_json::Error| config_error(family, "config.json", error.to_string());
    let known = serde_json::to_value(T::default()).map_err(whole)?;
    let mut fields = Map::new();
    for (key, value) in given.iter().filter(|(key, _)| *key != "model_type") {
        if known.get(key).is_none() {
            if unknown == UnknownKeys::Refuse {
                return Err(config_error(family, key, "this family has no such key".into()));
            }
            continue;
        }
        // Alone first, so that the error can name the key.
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        serde_json::from_value::<T>(alone).map_err(|error| config_error(family, key, error.to_string()))?;
        fields.insert(key.clone(), value.clone());
    }
    serde_json::from_value(Value::Object(fields)).map_err(whole)
}

fn config_error(family: &str, key: &str, reason: String) -> Error {
    Error::Config { family: family.into(), key: key.into(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AIMV2: &str = "aimv2_vision_model";

    #[test]
    fn missing_keys_take_the_published_defaults() {
        let aimv2 = VisionConfig::from_keys(&json!({ "model_type": AIMV2, "image_size": 448 })).unwrap();
        assert_eq!((aimv2.hidden_size(), aimv2.num_layers(), aimv2.grid_side(448).unwrap()), (1024, 24, 32));
        let dinov2 = VisionConfig::from_keys(&json!({ "model_type": "dinov2" })).unwrap();
        assert_eq!((dinov2.hidden_size(), dinov2.image_size(), dinov2.patch_size()), (768, 224, 14));
        assert_eq!(dinov2.without_gradient(), ["embeddings.mask_token"]);
    }

    #[test]
    fn what_is_written_reads_back() {
        for model_type in [AIMV2, "dinov2"] {
            let keys = json!({ "model_type": model_type, "hidden_size": 96, "num_attention_heads": 3 });
            let config = VisionConfig::from_keys(&keys).unwrap();
            assert_eq!(VisionConfig::from_json(&config.to_json()).unwrap(), config);
            assert_eq!(config.to_json()["model_type"], model_type);
            assert_eq!(serde_json::from_value::<VisionConfig>(config.to_json()).unwrap(), config);
            assert_eq!(serde_json::to_value(&config).unwrap(), config.to_json());
        }
    }

    #[test]
    fn config_json_may_hold_other_keys_and_square_pairs() {
        let file = json!({ "model_type": "dinov2", "torch_dtype": "float32", "stage_names": [], "image_size": [518, 518] });
        assert_eq!(VisionConfig::from_json(&file).unwrap().image_size(), 518);
    }

    #[test]
    fn what_is_not_built_is_refused() {
        let cases = [
            (json!({ "model_type": "siglip" }), "found `siglip`"),
            (json!("dinov2"), "`model_type`"),
            (json!({ "model_type": "dinov2", "hiden_size": 4 }), "`hiden_size`: this family has no such key"),
            (json!({ "model_type": "dinov2", "hidden_size": "big" }), "`hidden_size`: invalid type: string"),
            (
                json!({ "model_type": "dinov2", "image_size": [28, 14] }),
                "`image_size`: [28, 14] is not square",
            ),
            (json!({ "model_type": "dinov2", "image_size": 225 }), "225 does not divide into patches of 14"),
            (
                json!({ "model_type": "dinov2", "num_hidden_layers": 0 }),
                "`num_hidden_layers`: must be at least 1",
            ),
            (json!({ "model_type": "dinov2", "num_attention_heads": 5 }), "5 does not divide the width 768"),
            (json!({ "model_type": "dinov2", "use_swiglu_ffn": true }), "`use_swiglu_ffn`"),
            (json!({ "model_type": "dinov2", "hidden_act": "silu" }), "only `gelu`"),
            (json!({ "model_type": "dinov2", "drop_path_rate": 0.1 }), "`drop_path_rate`: only 0"),
            (json!({ "model_type": AIMV2, "num_channels": 1 }), "`num_channels`"),
            (json!({ "model_type": AIMV2, "is_native": true }), "`is_native`"),
            (json!({ "model_type": AIMV2, "use_head": true }), "`use_head`"),
            (json!({ "model_type": AIMV2, "rms_norm_eps": 0 }), "`rms_norm_eps`"),
        ];
        for (keys, expected) in cases {
            let message = VisionConfig::from_keys(&keys).unwrap_err().to_string();
            assert!(message.contains(expected), "{message} does not say {expected}");
        }
        // transformers' own default is a head, so a file that leaves the key out has one.
        let error = VisionConfig::from_json(&json!({ "model_type": AIMV2 })).unwrap_err().to_string();
        assert!(error.contains("`use_head`"), "{error}");
    }

    #[test]
    fn images_divide_into_patches() {
        let config = VisionConfig::from_keys(&json!({ "model_type": "dinov2" })).unwrap();
        assert_eq!(config.grid_side(448).unwrap(), 32);
        for px in [450, 0, -14] {
            assert!(config.grid_side(px).unwrap_err().to_string().contains("patches of 14"));
        }
    }

    #[test]
    fn a_folder_without_config_json_is_named() {
        let dir = tempfile::TempDir::new().unwrap();
        let message = VisionConfig::read(dir.path()).unwrap_err().to_string();
        assert!(message.contains("config.json"), "{message}");
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(VisionConfig::read(dir.path()).unwrap_err().to_string().contains("config.json: EOF"));
    }
}
