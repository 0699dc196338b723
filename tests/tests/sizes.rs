//! Names, shapes and numbers of parameters of published models, without their weights: modules are built
//! with tensors that nothing fills, so that their memory is never touched.
//!
//! transformers' names are those that `goldens/make_vision.py` wrote.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::rc::Rc;

use sail_model::Result;
use sail_model::llm::{Llm, LlmConfig};
use sail_model::params::{Builder, Init, Params, TensorSource};
use sail_model::projector::{Projector, ProjectorConfig, ProjectorKind};
use sail_model::vision::{Vision, VisionConfig, VitLayout, export};
use sail_model::vlm::{Vlm, VlmConfig};
use sail_torch::cpu_memory::measure;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const AIMV2: &str = "aimv2_vision_model";

/// Leaves every tensor as it is.
struct Unfilled;

impl TensorSource for Unfilled {
    fn fill(&self, _: &str, _: &Tensor, _: Init) -> Result<()> {
        Ok(())
    }
}

/// The parameters of what `build` builds, by the module's own names.
fn params<M>(build: impl FnOnce(&Builder) -> Result<M>) -> Params {
    let params = Rc::new(RefCell::new(Params::new()));
    let _ = build(&Builder::new(params.clone(), "m", &Unfilled, (Kind::BFloat16, Device::Cpu))).unwrap();
    params.take().into_iter().map(|(name, tensor)| (name["m.".len()..].to_owned(), tensor)).collect()
}

fn count(params: &Params) -> usize {
    params.values().map(Tensor::numel).sum()
}

fn aimv2(hidden: i64, inner: i64) -> VisionConfig {
    let keys = json!({
        "model_type": AIMV2, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": hidden / 128, "image_size": 448,
    });
    VisionConfig::from_keys(&keys).unwrap()
}

/// `COUNT NAME SHAPE` for each name, `*` in the place of a block's number.
fn lines(shapes: impl IntoIterator<Item = (String, Vec<i64>)>) -> Vec<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (name, shape) in shapes {
        let parts: Vec<&str> =
            name.split('.').map(|part| if part.parse::<u32>().is_ok() { "*" } else { part }).collect();
        *counts.entry(format!("{} {shape:?}", parts.join("."))).or_default() += 1;
    }
    counts.into_iter().map(|(name, count)| format!("{count} {name}")).collect()
}

/// The models of `vision_keys.txt`, each with its lines.
fn published() -> Vec<(VisionConfig, Vec<String>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/vision_keys.txt");
    let mut models: Vec<(VisionConfig, Vec<String>)> = Vec::new();
    for line in fs::read_to_string(path).unwrap().lines() {
        if line.starts_with('{') {
            let json: Value = serde_json::from_str(line).unwrap();
            models.push((VisionConfig::from_json(&json).unwrap(), Vec::new()));
        } else {
            models.last_mut().unwrap().1.push(line.to_owned());
        }
    }
    models
}

#[test]
fn names_and_shapes_are_those_of_transformers() {
    let models = published();
    let families: Vec<&str> = models.iter().map(|(config, _)| config.model_type()).collect();
    assert_eq!(families, [AIMV2, "dinov2", "internvl_vision", "siglip_vision_model"]);
    for (config, expected) in models {
        let params = params(|builder| Vision::new(&config, builder));
        let found = lines(params.iter().map(|(name, tensor)| (name.clone(), tensor.size())));
        assert_eq!(found, expected, "{}", config.model_type());
    }
}

#[test]
fn names_and_shapes_are_those_of_the_published_code() {
    let sailvit_huge = [
        "1 preprocessor.patchifier.norm.weight [1536]",
        "1 preprocessor.patchifier.proj.bias [1536]",
        "1 preprocessor.patchifier.proj.weight [1536, 3, 14, 14]",
        "1 preprocessor.pos_embed [1, 1024, 1536]",
        "24 trunk.blocks.*.attn.proj.weight [1536, 1536]",
        "24 trunk.blocks.*.attn.qkv.weight [4608, 1536]",
        "24 trunk.blocks.*.mlp.fc1.weight [4096, 1536]",
        "24 trunk.blocks.*.mlp.fc2.weight [1536, 4096]",
        "24 trunk.blocks.*.mlp.fc3.weight [4096, 1536]",
        "24 trunk.blocks.*.norm_1.weight [1536]",
        "24 trunk.blocks.*.norm_2.weight [1536]",
        "1 trunk.post_trunk_norm.weight [1536]",
    ];
    let internvit_300m = [
        "1 embeddings.class_embedding [1, 1, 1024]",
        "1 embeddings.patch_embedding.bias [1024]",
        "1 embeddings.patch_embedding.weight [1024, 3, 14, 14]",
        "1 embeddings.position_embedding [1, 1025, 1024]",
        "24 encoder.layers.*.attn.proj.bias [1024]",
        "24 encoder.layers.*.attn.proj.weight [1024, 1024]",
        "24 encoder.layers.*.attn.qkv.bias [3072]",
        "24 encoder.layers.*.attn.qkv.weight [3072, 1024]",
        "24 encoder.layers.*.ls1 [1024]",
        "24 encoder.layers.*.ls2 [1024]",
        "24 encoder.layers.*.mlp.fc1.bias [4096]",
        "24 encoder.layers.*.mlp.fc1.weight [4096, 1024]",
        "24 encoder.layers.*.mlp.fc2.bias [1024]",
        "24 encoder.layers.*.mlp.fc2.weight [1024, 4096]",
        "24 encoder.layers.*.norm1.bias [1024]",
        "24 encoder.layers.*.norm1.weight [1024]",
        "24 encoder.layers.*.norm2.bias [1024]",
        "24 encoder.layers.*.norm2.weight [1024]",
    ];
    let internvit =
        VisionConfig::from_keys(&json!({ "model_type": "internvl_vision", "attention_bias": true }));
    let cases = [(aimv2(1536, 4096), &sailvit_huge[..]), (internvit.unwrap(), &internvit_300m)];
    for (config, expected) in cases {
        let params = params(|builder| Vision::new(&config, builder));
        let exported = export(&config, params, 448, VitLayout::Original, "").unwrap();
        let found = lines(exported.tensors.into_iter().map(|(name, stored)| (name, stored.shape)));
        assert_eq!(found, expected);
    }
}

#[test]
fn vision_models_have_the_published_numbers_of_parameters() {
    // 310.0M, 682.0M, 1236.5M and 2723.0M; the totals are those of transformers on its meta device.
    for (hidden, inner, expected) in [
        (1024, 2816, 309_984_256),
        (1536, 4096, 682_031_616),
        (2048, 5632, 1_236_531_200),
        (3072, 8192, 2_723_017_728),
    ] {
        let config = aimv2(hidden, inner);
        assert_eq!(count(&params(|builder| Vision::new(&config, builder))), expected, "{hidden}");
    }
    let totals: Vec<usize> = published()
        .iter()
        .map(|(config, _)| count(&params(|builder| Vision::new(config, builder))))
        .collect();
    assert_eq!(totals, [682_031_616, 85_725_696, 304_012_288, 412_987_248]);
}

/// Bytes in bf16 of a model in SAIL-VL's layout: SAILViT-Huge, the projector, and a language model whose
/// head is stored even when it is the embedding table.
fn sail_vl_bytes(llm: &Value) -> usize {
    let vision = aimv2(1536, 4096);
    let llm = LlmConfig::from_keys(llm).unwrap();
    let projector = ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge: 2 };
    let hidden = llm.hidden_size();
    let of_projector = params(|builder| Projector::new(projector, 1536, hidden, builder));
    let of_llm = params(|builder| Llm::new(&llm, builder));
    let head = if of_llm.contains_key("lm_head.weight") { 0 } else { llm.vocab_size() * hidden };
    let of_vision = count(&params(|builder| Vision::new(&vision, builder)));
    2 * (of_vision + count(&of_projector) + count(&of_llm) + head as usize)
}

/// 30.5B parameters, for which this machine need not have memory.
#[test]
fn a_model_has_shapes_without_memory() {
    let qwen3_30b_a3b = json!({
        "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": false,
    });
    let config = VlmConfig {
        vision: aimv2(1536, 4096),
        projector: ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge: 2 },
        llm: LlmConfig::from_keys(&qwen3_30b_a3b).unwrap(),
    };
    let (model, usage) = measure(|| Vlm::shapes_only(&config).unwrap()).unwrap();
    let [vision, llm] = ["vision", "llm"].map(|module| count(&model.module_params(module).unwrap()));
    assert_eq!((vision, llm), (682_031_616, 30_532_122_624));
    assert!(usage.peak_bytes < 1 << 20, "{usage:?}");
}

#[test]
fn sail_vl2_2b_has_its_published_size() {
    let qwen3 = json!({
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": true,
    });
    assert_eq!(sail_vl_bytes(&qwen3), 5_461_130_240);
}

#[test]
fn sail_vl_1_6_8b_has_its_published_size() {
    let qwen2 = json!({
        "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": false,
    });
    assert_eq!(sail_vl_bytes(&qwen2), 16_665_065_472);
}
