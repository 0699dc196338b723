//! What config.json says about a vision transformer of any family.
//!
//! Not a description of weights or of images. Called by the trainer's configuration, by
//! [`super::Vision`] and by the export.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::family::{AnyFamily, Geometry, Positions, VisionModel, VitShape};
use super::{FAMILIES, VitLayout};
use crate::error::{Error, Result};
use crate::keys::{UnknownKeys, config_error, in_file};
use crate::params::Builder;
use crate::weights::{Layout, Naming, own_names, read_json};

/// A vision transformer's description, of the family that `model_type` names.
///
/// (De)serialises as config.json does; reading skips unknown keys, see [`VisionConfig::from_json`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct VisionConfig(Arc<dyn AnyFamily>);

impl VisionConfig {
    /// Reads `config.json` of a Hugging Face folder, of a vision transformer or of a larger model that has
    /// one as its `vision_config`.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be read or is not JSON, else as [`VisionConfig::from_json`].
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
        match config.get("vision_config") {
            Some(inner) if inner.is_object() => resolve(inner, UnknownKeys::Skip),
            _ => resolve(config, UnknownKeys::Skip),
        }
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
        let mut json = json!({
            "architectures": [self.0.architecture()], "model_type": self.model_type(), "dtype": "float32",
        });
        let map = json.as_object_mut().expect("invariant: written as an object above");
        map.extend(self.0.fields().as_object().cloned().unwrap_or_default());
        json
    }

    /// `model_type` of config.json.
    pub fn model_type(&self) -> &'static str {
        self.0.model_type()
    }

    /// Width of the features.
    pub fn hidden_size(&self) -> i64 {
        self.geometry().hidden_size
    }

    /// Side of a patch in pixels.
    pub fn patch_size(&self) -> i64 {
        self.geometry().patch_size
    }

    /// Side in pixels of the images that the position table was made for.
    pub fn image_size(&self) -> i64 {
        self.geometry().image_size
    }

    /// Transformer blocks.
    pub fn num_layers(&self) -> i64 {
        self.geometry().num_layers
    }

    /// What the model is made of.
    pub fn shape(&self) -> VitShape {
        self.0.shape()
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    /// Rows and columns of patches of an image. Of a side that is [`VisionConfig::image_size`], as 384 pixels
    /// in patches of 14, what is beyond the last whole patch is left out; any other must divide.
    ///
    /// # Errors
    /// [`Error::Config`] when a side is not a positive multiple of the patch.
    pub fn grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        let patch = self.patch_size();
        let divides = |px: i64| px == self.image_size() || (px >= patch && px % patch == 0);
        if divides(height) && divides(width) {
            return Ok((height / patch, width / patch));
        }
        let reason = format!("images of {height} x {width} pixels do not divide into patches of {patch}");
        Err(config_error(self.model_type(), "patch_size", reason))
    }

    /// How files name its tensors.
    pub fn naming(&self) -> Naming {
        self.0.naming()
    }

    /// Parameters, by the names inside the module, that no feature depends on. They get no gradient
    /// and are kept so that an export is complete.
    pub fn without_gradient(&self) -> &'static [&'static str] {
        self.0.without_gradient()
    }

    /// Where the position table is.
    pub(super) fn positions(&self) -> Positions {
        self.0.positions()
    }

    /// The same model with a position table for images of `px` x `px` pixels.
    pub(super) fn with_image_size(&self, px: i64) -> Self {
        Self(Arc::from(self.0.with_image_size(px)))
    }

    /// Whether this model can be written so.
    pub fn has_layout(&self, layout: VitLayout) -> bool {
        self.layout(layout).is_some()
    }

    /// Names and config.json in a layout; None where its code does not compute this model.
    pub(super) fn layout(&self, layout: VitLayout) -> Option<(Layout, Value)> {
        match layout {
            VitLayout::Transformers => Some((own_names, self.to_json())),
            VitLayout::Original => self.0.original_layout(),
            VitLayout::Sail => {
                self.0.original_layout().filter(|(_, config)| config["model_type"] == "sailvit")
            }
        }
    }

    pub(super) fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>> {
        self.0.build(builder)
    }

    /// Checks that the fields fit together and ask for nothing that is not built.
    ///
    /// # Errors
    /// [`Error::Config`] for the first field that does not pass.
    pub fn validate(&self) -> Result<()> {
        self.0.check().map_err(|(key, reason)| config_error(self.model_type(), key, reason))
    }
}

impl PartialEq for VisionConfig {
    fn eq(&self, other: &Self) -> bool {
        self.to_json() == other.to_json()
    }
}

impl fmt::Debug for VisionConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
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

fn resolve(given: &Value, unknown: UnknownKeys) -> Result<VisionConfig> {
    let model_type = given.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let keys = given.as_object();
    let read = keys.and_then(|keys| FAMILIES.iter().find_map(|f| (f.parse)(model_type, keys, unknown)));
    let Some(config) = read else {
        let families: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
        let reason = format!("vision models are `{}`, found `{model_type}`", families.join("`, `"));
        return Err(config_error("vision model", "model_type", reason));
    };
    let config = VisionConfig(Arc::from(config?));
    config.validate()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AIMV2: &str = "aimv2_vision_model";
    const INTERNVIT: &str = "internvl_vision";
    const SIGLIP: &str = "siglip_vision_model";

    #[test]
    fn missing_keys_take_the_published_defaults() {
        let aimv2 = VisionConfig::from_keys(&json!({ "model_type": AIMV2, "image_size": 448 })).unwrap();
        assert_eq!(
            (aimv2.hidden_size(), aimv2.num_layers(), aimv2.grid(448, 224).unwrap()),
            (1024, 24, (32, 16))
        );
        let dinov2 = VisionConfig::from_keys(&json!({ "model_type": "dinov2" })).unwrap();
        assert_eq!((dinov2.hidden_size(), dinov2.image_size(), dinov2.patch_size()), (768, 224, 14));
        assert_eq!(dinov2.without_gradient(), ["embeddings.mask_token"]);
    }

    #[test]
    fn what_is_written_reads_back() {
        for model_type in FAMILIES.iter().map(|family| family.model_type) {
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
            (json!({ "model_type": "resnet" }), "found `resnet`"),
            (json!("dinov2"), "`model_type`"),
            (json!({ "model_type": "dinov2", "hiden_size": 4 }), "`hiden_size`: this family has no such key"),
            (json!({ "model_type": "dinov2", "hidden_size": "big" }), "`hidden_size`: invalid type: string"),
            (
                json!({ "model_type": "dinov2", "image_size": [28, 14] }),
                "`image_size`: [28, 14] is not square",
            ),
            (json!({ "model_type": "dinov2", "image_size": 13 }), "13 is smaller than a patch of 14"),
            (
                json!({ "model_type": "dinov2", "num_hidden_layers": 0 }),
                "`num_hidden_layers`: must be at least 1",
            ),
            (json!({ "model_type": "dinov2", "num_attention_heads": 5 }), "5 does not divide the width 768"),
            (json!({ "model_type": "dinov2", "use_swiglu_ffn": true }), "`use_swiglu_ffn`"),
            (json!({ "model_type": "dinov2", "hidden_act": "silu" }), "only `gelu` and `gelu_pytorch_tanh`"),
            (json!({ "model_type": SIGLIP, "vision_use_head": true }), "`vision_use_head`"),
            (json!({ "model_type": SIGLIP, "layer_norm_eps": 0 }), "`layer_norm_eps`: must be positive"),
            (json!({ "model_type": INTERNVIT, "norm_type": "batch_norm" }), "`norm_type`: only"),
            (json!({ "model_type": "intern_vit_6b", "drop_path_rate": 0.1 }), "no such key"),
            (json!({ "model_type": "dinov2", "drop_path_rate": 0.1 }), "`drop_path_rate`: only 0"),
            (json!({ "model_type": AIMV2, "num_channels": 1 }), "`num_channels`"),
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
        assert_eq!(config.grid(448, 14).unwrap(), (32, 1));
        let siglip = json!({ "model_type": SIGLIP, "image_size": 384, "patch_size": 14 });
        let siglip = VisionConfig::from_keys(&siglip).unwrap();
        assert_eq!(siglip.grid(384, 378).unwrap(), (27, 27));
        assert!(siglip.grid(385, 378).is_err());
        for px in [450, 0, -14] {
            assert!(config.grid(px, 448).unwrap_err().to_string().contains("patches of 14"));
            assert!(config.grid(448, px).is_err());
        }
    }

    #[test]
    fn the_vision_part_of_a_larger_model_is_found() {
        let inner = json!({ "model_type": "dinov2", "hidden_size": 24 });
        let whole = json!({ "model_type": "internvl", "vision_config": inner });
        assert_eq!(VisionConfig::from_json(&whole).unwrap().hidden_size(), 24);
    }

    #[test]
    fn files_of_the_families_own_code_are_read() {
        // What `SigLIP`'s dual encoders and `InternVL`'s own code write.
        let dual = json!({ "model_type": "siglip", "text_config": {}, "vision_config": {
            "model_type": SIGLIP, "hidden_size": 24, "num_attention_heads": 3, "vision_use_head": true,
        } });
        let siglip = VisionConfig::from_json(&dual).unwrap();
        assert_eq!((siglip.hidden_size(), siglip.patch_size()), (24, 16));
        assert_eq!(siglip.to_json()["vision_use_head"], false);

        let large = VisionConfig::from_json(&json!({ "model_type": "intern_vit_6b" })).unwrap();
        assert_eq!((large.model_type(), large.hidden_size(), large.num_layers()), (INTERNVIT, 3200, 48));
        let expected = json!({ "norm_type": "rms_norm", "use_qk_norm": true, "attention_bias": false });
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&large.to_json()[key], value, "{key}");
        }
        let small = json!({
            "model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], "drop_path_rate": 0.1,
            "dropout": 0.0, "hidden_size": 1024, "image_size": 448, "initializer_factor": 0.1,
            "initializer_range": 1e-10, "intermediate_size": 4096, "norm_type": "layer_norm",
            "num_attention_heads": 16, "num_hidden_layers": 24, "qk_normalization": false, "qkv_bias": true,
            "use_flash_attn": true,
        });
        let small = VisionConfig::from_json(&small).unwrap();
        let keys = json!({ "model_type": INTERNVIT, "attention_bias": true, "initializer_range": 1e-10 });
        assert_eq!(small, VisionConfig::from_keys(&keys).unwrap());
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
