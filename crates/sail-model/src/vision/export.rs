//! A trained vision transformer as transformers reads it.
//!
//! Says what goes in the folder; `weights` writes it. Called by the trainer's export.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::{VisionConfig, resize_positions};
use crate::error::{Error, Result};
use crate::params::Params;
use crate::weights::write_folder;

/// Where `AIMv2`'s position table lies inside the module.
const AIMV2_POSITIONS: &str = "embeddings.position_embedding.weight";

/// The contents of a folder that `AutoModel` and `AutoImageProcessor` of transformers read.
pub struct VisionExport {
    /// `model.safetensors`, by transformers' names, in the types that the parameters have.
    pub tensors: BTreeMap<String, Tensor>,
    /// `config.json`.
    pub config: Value,
    /// `preprocessor_config.json`.
    pub preprocessor: Value,
}

impl VisionExport {
    /// Writes the folder, see [`write_folder`].
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_folder(dir, &self.tensors, &self.config, &[("preprocessor_config.json", &self.preprocessor)])
    }
}

/// Takes the `vision.` parameters out of `params`, for images of `px` x `px` pixels.
///
/// `DINOv2` keeps its position table and `image_size`, since transformers resamples it. For `AIMv2`
/// transformers does not, so that the table is written as it is used, resampled to `px`, and
/// `image_size` is `px`.
///
/// # Errors
/// [`Error::Config`] when `px` does not divide into patches, or when the parameters have several
/// types; [`Error::MissingParameters`] when `params` has no vision parameter.
pub fn export(
    config: &VisionConfig,
    params: &Params,
    px: i64,
    mean: [f32; 3],
    std: [f32; 3],
) -> Result<VisionExport> {
    let side = config.grid_side(px)?;
    let local = |(name, tensor): (&String, &Tensor)| {
        name.strip_prefix("vision.").map(|name| (name.to_owned(), tensor.detach()))
    };
    let mut tensors: BTreeMap<String, Tensor> = params.iter().filter_map(local).collect();
    let mut config_json = config.to_json();
    config_json["dtype"] = dtype_name(config, &tensors)?.into();
    if let VisionConfig::Aimv2(_) = config {
        let table_pd =
            tensors.get_mut(AIMV2_POSITIONS).ok_or(Error::MissingParameters { module: "vision" })?;
        *table_pd = resize_positions(table_pd, side, side);
        config_json["image_size"] = px.into();
    }
    Ok(VisionExport { tensors, config: config_json, preprocessor: preprocessor_json(px, mean, std) })
}

/// `preprocessor_config.json`: RGB, bicubic to exactly `px` x `px` without a crop, / 255, then
/// `(x - mean) / std` per channel.
pub fn preprocessor_json(px: i64, mean: [f32; 3], std: [f32; 3]) -> Value {
    json!({
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true,
        "size": { "height": px, "width": px },
        "resample": 3,
        "do_center_crop": false,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": mean.map(shortest),
        "image_std": std.map(shortest),
    })
}

/// The double that prints as the fp32 number does: 0.485, not 0.48500001430511475.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn dtype_name(config: &VisionConfig, tensors: &BTreeMap<String, Tensor>) -> Result<&'static str> {
    let kind = tensors.values().next().ok_or(Error::MissingParameters { module: "vision" })?.kind();
    let refuse = |reason: String| {
        Err(Error::Config { family: config.model_type().into(), key: "dtype".into(), reason })
    };
    if let Some((name, other)) = tensors.iter().find(|(_, tensor)| tensor.kind() != kind) {
        return refuse(format!("parameters are {kind:?}, but `{name}` is {:?}", other.kind()));
    }
    match kind {
        Kind::Float => Ok("float32"),
        Kind::BFloat16 => Ok("bfloat16"),
        Kind::Half => Ok("float16"),
        other => refuse(format!("parameters are {other:?}, which is not exported")),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tch::Device;
    use tempfile::TempDir;

    use super::*;
    use crate::params::{Builder, RandomSource, TensorSource};
    use crate::vision::{VisionModel, build_vision};
    use crate::weights::FileSource;

    const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
    const STD: [f32; 3] = [0.229, 0.224, 0.225];

    fn config(model_type: &str) -> VisionConfig {
        VisionConfig::from_keys(&json!({
            "model_type": model_type, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7,
        }))
        .unwrap()
    }

    fn build(config: &VisionConfig, source: &dyn TensorSource) -> (Box<dyn VisionModel + Send>, Params) {
        let params = Rc::new(RefCell::new(Params::new()));
        let model =
            build_vision(config, &Builder::new(params.clone(), "vision", source, Device::Cpu)).unwrap();
        let params = params.take();
        (model, params)
    }

    #[test]
    fn an_export_gives_the_same_features_at_the_size_it_was_used() {
        for (model_type, image_size) in [("aimv2_vision_model", 42), ("dinov2", 28)] {
            let config = config(model_type);
            let (model, params) = build(&config, &RandomSource::new(3, "vision"));
            let dir = TempDir::new().unwrap();
            export(&config, &params, 42, MEAN, STD).unwrap().write(dir.path()).unwrap();

            let read = VisionConfig::read(dir.path()).unwrap();
            assert_eq!(read.image_size(), image_size);
            let source = FileSource::open(dir.path()).unwrap();
            let (again, _) = build(&read, &source);
            assert!(source.unused().is_empty());
            let pixels = Tensor::randn([2, 3, 42, 42], (Kind::Float, Device::Cpu));
            assert!(model.forward(&pixels).equal(&again.forward(&pixels)), "{model_type}");
        }
    }

    #[test]
    fn features_follow_the_parameters_type() {
        for model_type in ["aimv2_vision_model", "dinov2"] {
            let config = config(model_type);
            let (model, mut params) = build(&config, &RandomSource::new(3, "vision"));
            let pixels = Tensor::randn([2, 3, 42, 28], (Kind::Float, Device::Cpu));
            let expected = model.forward(&pixels);
            assert_eq!(expected.size(), [2, 24, 16]);
            for tensor in params.values_mut() {
                let half = tensor.to_kind(Kind::BFloat16);
                tensor.set_data(&half);
            }
            let found = model.forward(&pixels);
            assert_eq!(found.kind(), Kind::BFloat16);
            assert!((found.to_kind(Kind::Float) - expected).abs().max().double_value(&[]) < 0.1);
            assert_eq!(export(&config, &params, 28, MEAN, STD).unwrap().config["dtype"], "bfloat16");
        }
    }

    #[test]
    fn what_cannot_be_exported_is_refused() {
        let config = config("dinov2");
        let (_, mut params) = build(&config, &RandomSource::new(3, "vision"));
        let message = |params: &Params, px| export(&config, params, px, MEAN, STD).err().unwrap().to_string();
        assert!(message(&params, 30).contains("patches of 7"));
        assert!(message(&Params::new(), 28).contains("no `vision` parameter"));
        let half = params["vision.layernorm.bias"].to_kind(Kind::BFloat16);
        params.insert("vision.layernorm.bias".into(), half);
        assert!(message(&params, 28).contains("`layernorm.bias` is BFloat16"));
    }

    #[test]
    fn numbers_print_as_they_were_written() {
        let json = preprocessor_json(448, MEAN, STD).to_string();
        assert!(json.contains("[0.485,0.456,0.406]"), "{json}");
    }
}
