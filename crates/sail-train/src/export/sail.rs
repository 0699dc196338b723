//! The whole model in the layout of SAIL-VL: its config.json, names and the Python code that loads it.
//!
//! Read by transformers with `trust_remote_code=True`, by the class `SailVL` of `VLMEvalKit`, and by [`read`]. The
//! keys are those of the published SAIL-VL config.json; a few more say what other models fix in code.

use std::collections::BTreeMap;
use std::path::Path;

use sail_data::{ImageSpec, Tiling};
use sail_model::llm::LlmConfig;
use sail_model::projector::{ProjectorConfig, ProjectorKind};
use sail_model::vision::{self, VisionConfig, VisionExport, VitLayout};
use sail_model::vlm::VlmConfig;
use sail_model::weights::{Folder, Naming, Stored, arrange, own_names};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::text::{self, TextKeys};
use super::{Mllm, with_keys, with_lineage};
use crate::error::{Error, Result};
use crate::trained::Trained;

pub(super) const MODEL_TYPE: &str = "sailvl";
const VISION_PREFIX: &str = "vision_model.";
const PROJECTOR_PREFIX: &str = "mlp1.";
const LLM_PREFIX: &str = "language_model.";
const REMOTE_CODE: [(&str, &str); 5] = [
    ("configuration_sailvit.py", include_str!("../../remote_code/configuration_sailvit.py")),
    ("modeling_sailvit.py", include_str!("../../remote_code/modeling_sailvit.py")),
    ("configuration_sailvl.py", include_str!("../../remote_code/configuration_sailvl.py")),
    ("modeling_sailvl.py", include_str!("../../remote_code/modeling_sailvl.py")),
    ("chat_sailvl.py", include_str!("../../remote_code/chat_sailvl.py")),
];

/// The keys of config.json that are read.
#[derive(Deserialize)]
struct SailConfig {
    vision_config: VisionConfig,
    llm_config: LlmConfig,
    downsample_ratio: f64,
    #[serde(flatten)]
    text: TextKeys,
    force_image_size: usize,
    dynamic_image_size: bool,
    min_dynamic_patch: usize,
    max_dynamic_patch: usize,
    use_thumbnail: bool,
}

/// The Python files that go with a vision encoder, and the config.json keys that name them.
pub(super) fn with_vision_code(folder: Folder, mut config: Value) -> (Folder, Value) {
    config["auto_map"] = json!({
        "AutoConfig": "configuration_sailvit.SAILViTConfig",
        "AutoModel": "modeling_sailvit.SAILViTModel",
    });
    let folder = REMOTE_CODE[..2].iter().fold(folder, |folder, (name, text)| folder.file(*name, *text));
    (folder, config)
}

/// The folder of a whole model.
///
/// # Errors
/// [`Error::Usage`] for a projector that the layout has no place for.
pub(super) fn folder(mllm: &Mllm, kind: Kind) -> Result<Folder> {
    let config = mllm.config;
    if config.projector.kind != ProjectorKind::PixelShuffle {
        return Err(Error::usage(
            format!(
                "a whole model with a `{}` projector has no published layout",
                config.projector.kind.name()
            ),
            "only `model.projector.kind: pixel_shuffle` can be exported so; export the encoder with `--what vit`",
        ));
    }
    let px = mllm.image.tile_px as i64;
    // What SAIL's code computes is written as it does; any other encoder as transformers does.
    let layout =
        if config.vision.has_layout(VitLayout::Sail) { VitLayout::Sail } else { VitLayout::Transformers };
    let VisionExport { tensors, config: vision_config } =
        vision::export(&config.vision, mllm.params("vision"), px, layout, VISION_PREFIX)?;
    let mut stored: BTreeMap<String, Stored> = tensors;
    stored.extend(arrange(&mllm.params("projector"), own_names, PROJECTOR_PREFIX)?);
    let mut llm = mllm.params("llm");
    if let Some(table) = llm.get("model.embed_tokens.weight").map(Tensor::shallow_clone) {
        // The published layout stores the head of a tied model too.
        llm.entry("lm_head.weight".into()).or_insert(table);
    }
    stored.extend(arrange(&llm, config.llm.export_layout(), LLM_PREFIX)?);
    let folder = Folder::new(stored)
        .in_kind(kind)
        .json("config.json", &config_json(mllm, &vision_config, kind))
        .json("preprocessor_config.json", &vision::preprocessor_json(px, mllm.image.mean, mllm.image.std));
    let folder = REMOTE_CODE.iter().fold(folder, |folder, (name, text)| folder.file(*name, *text));
    text::add_files(folder, mllm, "<image>")
}

fn config_json(mllm: &Mllm, vision_config: &Value, kind: Kind) -> Value {
    let (config, tiling) = (mllm.config, mllm.image.tiling);
    let json = json!({
        "architectures": ["SAILVLModel"],
        "auto_map": {
            "AutoConfig": "configuration_sailvl.SAILVLConfig",
            "AutoModel": "modeling_sailvl.SAILVLModel",
            "AutoModelForCausalLM": "modeling_sailvl.SAILVLModel",
        },
        "model_type": MODEL_TYPE,
        "dtype": vision::dtype_name(kind),
        "downsample_ratio": 1.0 / config.projector.merge as f64,
        "ps_version": "v2",
        "select_layer": -1,
        "image_context_token_id": mllm.encoder.image_context_id(),
        "force_image_size": mllm.image.tile_px,
        "dynamic_image_size": tiling.max > 1,
        "min_dynamic_patch": tiling.min,
        "max_dynamic_patch": tiling.max,
        "use_thumbnail": tiling.thumbnail,
        "tie_word_embeddings": config.llm.decoder().tie_word_embeddings,
        "vision_config": vision_config,
        "llm_config": config.llm.to_json(),
    });
    with_lineage(with_keys(json, TextKeys::of(mllm.text).to_json()), mllm.lineage.cloned())
}

/// Reads a model in this layout, in fp32.
///
/// # Errors
/// When a file is missing or says what is not built.
pub(crate) fn read(path: &Path, device: Device) -> Result<Trained> {
    let file = path.join("config.json");
    let keys: SailConfig = super::read_as(&file)?;
    let merge = super::merge_of(&file, keys.downsample_ratio)?;
    let projector = ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge };
    let config = VlmConfig { vision: keys.vision_config, projector, llm: keys.llm_config };
    let parts = [
        (config.vision.naming(), VISION_PREFIX),
        (Naming::default(), PROJECTOR_PREFIX),
        (config.llm.naming(), LLM_PREFIX),
    ];
    let px = keys.force_image_size;
    let (mean, std) = super::mean_and_std(&path.join("preprocessor_config.json"))?;
    let dynamic = keys.dynamic_image_size;
    let image = ImageSpec {
        tiling: Tiling {
            min: if dynamic { keys.min_dynamic_patch } else { 1 },
            max: if dynamic { keys.max_dynamic_patch } else { 1 },
            thumbnail: keys.use_thumbnail,
        },
        mean,
        std,
        max_pixels: super::MAX_PIXELS,
        ..ImageSpec::square(px, config.visual_tokens(px as i64, px as i64)? as usize)
    };
    let text = keys.text.spec(&file)?;
    super::open_parts(path, &config, parts, image, text, device)
}
