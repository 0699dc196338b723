//! The whole model as transformers' own `InternVLForConditionalGeneration`: an `InternViT` encoder, the
//! pixel-shuffle projector and a language model, under the names of the published `InternVL3-*-hf` files.

use std::collections::BTreeMap;
use std::path::Path;

use sail_data::{ImageSpec, Tiling};
use sail_model::llm::LlmConfig;
use sail_model::projector::{ProjectorConfig, ProjectorKind};
use sail_model::vision::{self, VisionConfig, VisionExport, VitLayout};
use sail_model::vlm::VlmConfig;
use sail_model::weights::{Folder, Naming, Piece, Stored, arrange};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::text::{self, TextKeys};
use super::{Mllm, with_keys, with_lineage};
use crate::error::{Error, Result};
use crate::trained::Trained;

pub(super) const MODEL_TYPE: &str = "internvl";
const VISION_PREFIX: &str = "vision_tower.";
const PROJECTOR_PREFIX: &str = "multi_modal_projector.";
const LLM_PREFIX: &str = "language_model.";

/// The projector's names in the published files.
fn projector_names(name: &str, shape: &[i64]) -> Vec<Piece> {
    const NAMES: [(&str, &str); 3] = [("0.", "layer_norm."), ("1.", "linear_1."), ("3.", "linear_2.")];
    let renamed =
        NAMES.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)));
    vec![Piece::whole(renamed.unwrap_or(name.to_owned()), shape)]
}

/// The folder of a whole model.
///
/// # Errors
/// [`Error::Usage`] for an encoder, a projector or tiles that the class does not have.
pub(super) fn folder(mllm: &Mllm, kind: Kind) -> Result<Folder> {
    let config = mllm.config;
    let refuse = |what: String| {
        Err(Error::usage(
            format!("`InternVLForConditionalGeneration` of transformers has no {what}"),
            "export with `--layout sail`, which takes any encoder",
        ))
    };
    if config.vision.model_type() != "internvl_vision" {
        return refuse(format!("`{}` encoder", config.vision.model_type()));
    }
    if config.projector.kind != ProjectorKind::PixelShuffle {
        return refuse(format!("`{}` projector", config.projector.kind.name()));
    }
    let tiling = mllm.image.tiling;
    if tiling.max > 1 && !tiling.thumbnail {
        return refuse("tiling without a thumbnail".into());
    }
    let px = mllm.image.tile_px as i64;
    let VisionExport { tensors, config: vision_config } =
        vision::export(&config.vision, mllm.params("vision"), px, VitLayout::Transformers, VISION_PREFIX)?;
    let mut stored: BTreeMap<String, Stored> = tensors;
    stored.extend(arrange(&mllm.params("projector"), projector_names, PROJECTOR_PREFIX)?);
    stored.extend(arrange(&mllm.params("llm"), config.llm.export_layout(), LLM_PREFIX)?);
    let tokens = mllm.image.tokens_per_tile;
    let folder = Folder::new(stored)
        .in_kind(kind)
        .json("config.json", &config_json(mllm, &vision_config, kind))
        .json("preprocessor_config.json", &preprocessor_json(mllm))
        .json(
            "processor_config.json",
            &json!({ "processor_class": "InternVLProcessor", "image_seq_length": tokens }),
        );
    // The processor puts the tokens of an image in place of one.
    let mark = format!("{}\n", mllm.text.image_tokens.context);
    text::add_files(folder, mllm, &mark)
}

fn config_json(mllm: &Mllm, vision_config: &Value, kind: Kind) -> Value {
    let config = mllm.config;
    let json = json!({
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "dtype": vision::dtype_name(kind),
        "downsample_ratio": 1.0 / config.projector.merge as f64,
        "image_seq_length": mllm.image.tokens_per_tile,
        "image_token_id": mllm.encoder.image_context_id(),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.llm.decoder().tie_word_embeddings,
        "vision_config": vision_config,
        "text_config": config.llm.to_json(),
    });
    with_lineage(with_keys(json, TextKeys::of(mllm.text).to_json()), mllm.lineage.cloned())
}

fn preprocessor_json(mllm: &Mllm) -> Value {
    let ImageSpec { tile_px, tiling, mean, std, .. } = mllm.image;
    let mut json = vision::preprocessor_json(*tile_px as i64, *mean, *std);
    json["image_processor_type"] = "GotOcr2ImageProcessor".into();
    json["processor_class"] = "InternVLProcessor".into();
    json["crop_to_patches"] = (tiling.max > 1).into();
    json["min_patches"] = tiling.min.into();
    json["max_patches"] = tiling.max.into();
    json
}

/// The keys of config.json that are read.
#[derive(Deserialize)]
struct InternVlConfig {
    vision_config: VisionConfig,
    text_config: LlmConfig,
    downsample_ratio: f64,
    #[serde(flatten)]
    text: TextKeys,
}

/// Reads a model in this layout, in fp32; where it does not say how turns are written, as the published ones.
///
/// # Errors
/// When a file is missing or says what is not built.
pub(crate) fn read(path: &Path, device: Device) -> Result<Trained> {
    #[derive(Deserialize)]
    struct Preprocessor {
        #[serde(default, rename = "crop_to_patches")]
        tiled: bool,
        #[serde(default = "one", rename = "min_patches")]
        min: usize,
        #[serde(default = "one", rename = "max_patches")]
        max: usize,
    }
    fn one() -> usize {
        1
    }
    let file = path.join("config.json");
    let keys: InternVlConfig = super::read_as(&file)?;
    let preprocessor = path.join("preprocessor_config.json");
    let tiles: Preprocessor = super::read_as(&preprocessor)?;
    let (mean, std) = super::mean_and_std(&preprocessor)?;
    let merge = super::merge_of(&file, keys.downsample_ratio)?;
    let projector = ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge };
    let config = VlmConfig { vision: keys.vision_config, projector, llm: keys.text_config };
    let projector_naming = Naming { layouts: vec![projector_names], ..Naming::default() };
    let parts = [
        (config.vision.naming(), VISION_PREFIX),
        (projector_naming, PROJECTOR_PREFIX),
        (config.llm.naming(), LLM_PREFIX),
    ];
    let px = config.vision.image_size() as usize;
    let max = if tiles.tiled { tiles.max } else { 1 };
    let image = ImageSpec {
        tiling: Tiling { min: tiles.min.min(max), max, thumbnail: true },
        mean,
        std,
        max_pixels: super::MAX_PIXELS,
        ..ImageSpec::square(px, config.visual_tokens(px as i64, px as i64)? as usize)
    };
    let text = keys.text.spec(&file)?;
    super::open_parts(path, &config, parts, image, text, device)
}
