//! A trained vision transformer as transformers or the code it was published with reads it.
//!
//! Says what goes in the folder; `weights` writes it. Called by the trainer's export.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::VisionConfig;
use super::parts::resize_positions;
use crate::error::{Error, Result};
use crate::weights::{Stored, arrange};

/// The names and the config.json of an exported vision transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VitLayout {
    /// Those of transformers' own class.
    Transformers,
    /// Those of SAIL's code, for `AIMv2`; the code goes with them.
    Sail,
    /// Those of the family's own published code: SAIL's and Apple's for `AIMv2`, `OpenGVLab`'s for `InternViT`.
    Original,
}

/// What a folder of a vision transformer holds.
#[derive(Debug)]
pub struct VisionExport {
    /// The tensors of `model.safetensors`.
    pub tensors: BTreeMap<String, Stored>,
    /// `config.json`, of fp32 weights.
    pub config: Value,
}

/// The module's parameters `tensors`, by its own names, for images of `px` x `px` pixels, every name with
/// `prefix` in front.
///
/// A family whose position table transformers resamples keeps its table and `image_size`. Of another, and
/// inside a larger model, the table is written as it is used, resampled to `px`, and `image_size` is `px`.
///
/// # Errors
/// [`Error::Config`] when `px` does not divide into patches or the family has no such layout.
pub fn export(
    config: &VisionConfig,
    mut tensors: BTreeMap<String, Tensor>,
    px: i64,
    layout: VitLayout,
    prefix: &str,
) -> Result<VisionExport> {
    let grid = config.grid(px, px)?;
    let mut config = config.clone();
    let positions = config.positions();
    if !positions.resampled || !prefix.is_empty() {
        if let Some(table) = tensors.get_mut(positions.name) {
            *table = tch::no_grad(|| resize_table(table, positions.prefix, grid));
        }
        config = config.with_image_size(px);
    }
    let (names, json) = config.layout(layout).ok_or_else(|| {
        let reason = match layout {
            VitLayout::Sail => "`sail` is for AIMv2 with learned positions and one setting of biases",
            _ => "`original` is for AIMv2 and InternViT as their own code computes them",
        };
        let reason = format!("{reason}; use `transformers`");
        Error::Config { family: config.model_type().into(), key: "layout".into(), reason }
    })?;
    Ok(VisionExport { tensors: arrange(&tensors, names, prefix)?, config: json })
}

/// Gives the model in memory, whose parameters by its own names are `params`, the position table that
/// [`export`] writes, so that rounding both is the same. `whole` says that it is part of a larger model.
///
/// # Errors
/// [`Error::Config`] when `px` does not divide into patches.
pub fn fit_positions(
    config: &VisionConfig,
    params: &BTreeMap<String, Tensor>,
    px: i64,
    whole: bool,
) -> Result<()> {
    let grid = config.grid(px, px)?;
    let positions = config.positions();
    if let Some(table) = params.get(positions.name).filter(|_| whole || !positions.resampled) {
        let resized = tch::no_grad(|| resize_table(&table.detach(), positions.prefix, grid));
        table.shallow_clone().set_data(&resized);
    }
    Ok(())
}

/// A position table `[.., p, d]` with `prefix` rows before those of the patches, of another grid.
fn resize_table(table: &Tensor, prefix: i64, grid: (i64, i64)) -> Tensor {
    let mut shape = table.size();
    let d = shape[shape.len() - 1];
    let table_pd = table.reshape([-1, d]);
    let rows = table_pd.size()[0];
    let patches_pd = resize_positions(&table_pd.narrow(0, prefix, rows - prefix), grid);
    let resized_pd = Tensor::cat(&[table_pd.narrow(0, 0, prefix), patches_pd], 0);
    let dims = shape.len();
    shape[dims - 2] = resized_pd.size()[0];
    resized_pd.reshape(shape)
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

/// `dtype` of a config.json for weights of this type.
pub fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tch::Device;
    use tempfile::TempDir;

    use super::*;
    use crate::params::{Builder, Params, RandomSource, TensorSource};
    use crate::vision::Vision;
    use crate::weights::{FileSource, Folder};

    const AIMV2: &str = "aimv2_vision_model";
    const INTERNVIT: &str = "internvl_vision";
    const SIGLIP: &str = "siglip_vision_model";

    fn config(model_type: &str) -> VisionConfig {
        VisionConfig::from_keys(&json!({
            "model_type": model_type, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7,
        }))
        .unwrap()
    }

    /// The model, and its parameters by its own names.
    fn build(config: &VisionConfig, source: &dyn TensorSource) -> (Vision, Params) {
        let params = Rc::new(RefCell::new(Params::new()));
        let builder = Builder::new(params.clone(), "vision", source, (Kind::Float, Device::Cpu));
        let model = Vision::new(config, &builder).unwrap();
        let params = params.take().into_iter();
        (model, params.map(|(name, tensor)| (name["vision.".len()..].to_owned(), tensor)).collect())
    }

    fn copies(params: &Params) -> Params {
        params.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
    }

    #[test]
    fn an_export_gives_the_same_features_at_the_size_it_was_used() {
        let (ours, sail) = (VitLayout::Transformers, VitLayout::Sail);
        let cases = [
            (AIMV2, ours, 42),
            (AIMV2, sail, 42),
            ("dinov2", ours, 28),
            (INTERNVIT, ours, 28),
            (INTERNVIT, VitLayout::Original, 28),
            (SIGLIP, ours, 42),
        ];
        for (model_type, layout, image_size) in cases {
            let config = config(model_type);
            let (model, params) = build(&config, &RandomSource::new(3, "vision"));
            let dir = TempDir::new().unwrap();
            let VisionExport { tensors, config } = export(&config, copies(&params), 42, layout, "").unwrap();
            Folder::new(tensors).json("config.json", &config).write(dir.path()).unwrap();

            let read = VisionConfig::read(dir.path()).unwrap();
            assert_eq!(read.image_size(), image_size);
            let (again, _) = build(&read, &FileSource::open(dir.path()).unwrap().with(read.naming()));
            let pixels = [Tensor::randn([2, 3, 42, 42], (Kind::Float, Device::Cpu))];
            let features = |model: &Vision| model.features(&pixels).unwrap().x_td;
            assert!(features(&model).equal(&features(&again)), "{model_type}");
        }
    }

    #[test]
    fn features_follow_the_parameters_type() {
        for model_type in [AIMV2, "dinov2", INTERNVIT, SIGLIP] {
            let (model, params) = build(&config(model_type), &RandomSource::new(3, "vision"));
            let pixels = [Tensor::randn([2, 3, 42, 28], (Kind::Float, Device::Cpu))];
            let expected = model.features(&pixels).unwrap().x_td;
            assert_eq!(expected.size(), [48, 16]);
            for tensor in params.values() {
                tensor.shallow_clone().set_data(&tensor.to_kind(Kind::BFloat16));
            }
            let found = model.features(&pixels).unwrap().x_td;
            assert_eq!(found.kind(), Kind::BFloat16);
            assert!((found.to_kind(Kind::Float) - expected).abs().max().double_value(&[]) < 0.1);
        }
    }

    #[test]
    fn images_of_several_sizes_do_not_see_each_other() {
        for model_type in [AIMV2, "dinov2", INTERNVIT, SIGLIP] {
            let (model, _) = build(&config(model_type), &RandomSource::new(3, "vision"));
            let sizes = [[1, 3, 28, 14], [2, 3, 42, 28], [1, 3, 28, 14], [1, 3, 7, 70]];
            let images = sizes.map(|size| Tensor::randn(size, (Kind::Float, Device::Cpu)));
            let packed = model.features(&images).unwrap();
            assert_eq!(packed.grids, [(4, 2), (6, 4), (6, 4), (4, 2), (1, 10)]);
            let alone = images.map(|image| model.features(&[image]).unwrap().x_td);
            assert!(packed.x_td.allclose(&Tensor::cat(&alone, 0), 1e-5, 1e-6, false), "{model_type}");
        }
    }

    #[test]
    fn a_model_inside_a_larger_one_is_found() {
        let config = config(SIGLIP);
        let (model, params) = build(&config, &RandomSource::new(3, "vision"));
        let pixels = [Tensor::randn([1, 3, 28, 28], (Kind::Float, Device::Cpu))];
        let expected = model.features(&pixels).unwrap().x_td;
        for prefix in config.naming().prefixes {
            let mut tensors = arrange(&params, crate::weights::own_names, prefix).unwrap();
            for other in ["head.probe", "embeddings.position_ids"] {
                tensors.insert(format!("{prefix}{other}"), Stored::from(&Tensor::from_slice(&[1f32])));
            }
            if !prefix.is_empty() {
                for other in ["text_model.head.weight", "logit_scale", "language_model.lm_head.weight"] {
                    tensors.insert(other.into(), Stored::from(&Tensor::from_slice(&[1f32])));
                }
            }
            let dir = TempDir::new().unwrap();
            Folder::new(tensors).write(dir.path()).unwrap();
            let source = FileSource::open(dir.path()).unwrap().with(config.naming());
            let (again, _) = build(&config, &source);
            assert!(again.features(&pixels).unwrap().x_td.equal(&expected), "{prefix}");
        }
    }

    #[test]
    fn what_cannot_be_exported_is_refused() {
        let config = config("dinov2");
        let (_, params) = build(&config, &RandomSource::new(3, "vision"));
        let message = |px, layout| export(&config, copies(&params), px, layout, "").unwrap_err().to_string();
        assert!(message(30, VitLayout::Transformers).contains("patches of 7"));
        assert!(message(28, VitLayout::Sail).contains("`sail` is for AIMv2"));
    }

    #[test]
    fn numbers_print_as_they_were_written() {
        let json = preprocessor_json(448, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).to_string();
        assert!(json.contains("[0.485,0.456,0.406]"), "{json}");
    }
}
