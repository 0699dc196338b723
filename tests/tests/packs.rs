//! A pack's loss and gradients are those of its samples alone, whatever the samples hold: text, one image,
//! several, images of several sizes.
//!
//! The error of a tensor is |found - expected| / |expected| in the Euclidean norm over its elements. Sums over a
//! pack have another order than sums over its samples, so fp32 agrees to a few roundings.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use sail_model::llm::LlmConfig;
use sail_model::params::{Init, Params, RandomSource, TensorSource};
use sail_model::projector::{ProjectorConfig, ProjectorKind};
use sail_model::vision::VisionConfig;
use sail_model::vlm::{Batch, IGNORE, Visual, Vlm, VlmConfig, VlmSources};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const TOLERANCE: f64 = 1e-6;
const PATCH: i64 = 7;
const MERGE: i64 = 2;
const VOCAB: i64 = 40;

fn random(name: &str, shape: &[i64], std: f64) -> Tensor {
    RandomSource::new(6, "test").tensor(name, shape, Init::Normal(std)).unwrap()
}

fn model(vision: &Value, llm: &Value) -> Vlm {
    let config = VlmConfig {
        vision: VisionConfig::from_keys(vision).unwrap(),
        projector: ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge: MERGE },
        llm: LlmConfig::from_keys(llm).unwrap(),
    };
    let sources = ["vision", "projector", "llm"].map(|module| RandomSource::new(5, module));
    let [vision, projector, llm] = &sources;
    let sources = VlmSources { vision, projector, llm };
    let vlm = Vlm::new(&config, sources, (Kind::Float, Device::Cpu)).unwrap();
    for param in vlm.params().values() {
        let _ = param.set_requires_grad(true);
    }
    vlm
}

/// A sample with images of these heights and widths, in patches.
struct Sample {
    name: String,
    grids: Vec<(i64, i64)>,
    images: Vec<Tensor>,
}

impl Sample {
    fn new(seed: usize, grids: &[(i64, i64)]) -> Self {
        let image = |(i, (h, w)): (usize, &(i64, i64))| {
            random(&format!("image {i} of {seed}"), &[1, 3, h * PATCH, w * PATCH], 1.0)
        };
        let images = grids.iter().enumerate().map(image).collect();
        Self { name: format!("sample {seed}"), grids: grids.to_vec(), images }
    }

    fn visual_tokens(&self) -> i64 {
        self.grids.iter().map(|(h, w)| h * w / (MERGE * MERGE)).sum()
    }

    /// Three tokens, the visual ones, and six tokens of which the last five are the answer.
    fn length(&self) -> i64 {
        self.visual_tokens() + 9
    }
}

fn batch(samples: &[&Sample]) -> Batch {
    let (mut ids, mut targets, mut weights, mut positions) = (vec![], vec![], vec![], vec![]);
    let (mut cu_seqlens, mut image_rows) = (vec![0], vec![]);
    for sample in samples {
        let (start, length) = (ids.len() as i64, sample.length());
        let id = |t: i64| (sample.name.len() as i64 * 3 + length * 11 + t * 7 + t * t) % VOCAB;
        for t in 0..length {
            let answer = t >= length - 5 && t < length - 1;
            ids.push(id(t));
            targets.push(if answer { id(t + 1) } else { IGNORE });
            weights.push(if answer { 0.5 + t as f32 / 8.0 } else { 0.0 });
            positions.push(t);
        }
        image_rows.extend(start + 3..start + 3 + sample.visual_tokens());
        cu_seqlens.push(start + length);
    }
    Batch {
        ids_t: Tensor::from_slice(&ids),
        positions_t: Tensor::from_slice(&positions),
        cu_seqlens,
        images: Visual::Pixels(
            samples.iter().flat_map(|s| s.images.iter().map(Tensor::shallow_clone)).collect(),
        ),
        images_per_sequence: samples.iter().map(|sample| sample.images.len()).collect(),
        image_rows,
        names: samples.iter().map(|sample| sample.name.clone()).collect(),
        targets,
        weights,
    }
}

fn gradients(vlm: &Vlm, batches: &[Batch]) -> (Tensor, Params) {
    let losses: Vec<Tensor> = batches.iter().map(|batch| vlm.loss_sum(batch).unwrap()).collect();
    let loss = Tensor::stack(&losses, 0).sum(Kind::Float);
    loss.backward();
    let with_grad = vlm.params().iter().filter(|(_, param)| param.grad().defined());
    (loss.detach(), with_grad.map(|(name, param)| (name.clone(), param.grad())).collect())
}

fn norm(x: &Tensor) -> f64 {
    x.to_kind(Kind::Double).norm().double_value(&[])
}

fn check(vision: &Value, llm: &Value) {
    let samples = [
        Sample::new(0, &[(4, 4)]),
        Sample::new(1, &[]),
        Sample::new(2, &[(4, 4), (4, 4), (4, 4)]),
        Sample::new(3, &[(2, 6), (8, 4)]),
        Sample::new(4, &[(10, 2)]),
        Sample::new(5, &[]),
        Sample::new(6, &[(6, 6), (4, 4)]),
    ];
    let all: Vec<&Sample> = samples.iter().collect();
    let packed = gradients(&model(vision, llm), &[batch(&all)]);
    let alone: Vec<Batch> = samples.iter().map(|sample| batch(&[sample])).collect();
    let alone = gradients(&model(vision, llm), &alone);
    let difference = norm(&(&packed.0 - &alone.0)) / norm(&alone.0);
    assert!(difference <= TOLERANCE, "loss: {difference:e}");
    assert_eq!(packed.1.keys().collect::<Vec<_>>(), alone.1.keys().collect::<Vec<_>>());
    let scale = |name: &str| {
        // The bias of the keys shifts all scores of a query alike: its gradient is rounding alone, and is
        // measured by that of their weight.
        let keys =
            name.strip_suffix("bias").filter(|name| name.ends_with("key.") || name.ends_with("k_proj."));
        let name = keys.map_or(name.to_owned(), |keys| format!("{keys}weight"));
        norm(&alone.1[&name])
    };
    for (name, grad) in &packed.1 {
        let difference = norm(&(grad - &alone.1[name])) / scale(name);
        assert!(difference <= TOLERANCE, "{name}: {difference:e}");
    }
}

fn llm() -> Value {
    json!({
        "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
        "tie_word_embeddings": false,
    })
}

fn vision(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 4 * PATCH, "patch_size": PATCH,
    })
}

#[test]
fn packs_of_aimv2_are_their_samples() {
    check(&vision("aimv2_vision_model"), &llm());
}

#[test]
fn packs_of_dinov2_are_their_samples() {
    check(&vision("dinov2"), &llm());
}

#[test]
fn packs_of_siglip_are_their_samples() {
    check(&vision("siglip_vision_model"), &llm());
}

#[test]
fn packs_of_internvit_are_their_samples() {
    check(&vision("internvl_vision"), &llm());
}

/// The largest image of SAIL-ViT-AnyRes, 1792 x 1792 at a patch of 14, beside a small one.
#[test]
fn an_image_of_16384_patches_shares_a_pack() {
    let vlm = model(&vision("aimv2_vision_model"), &llm());
    let images = [(128, 128), (4, 4)].map(|(h, w)| random("image", &[1, 3, h * PATCH, w * PATCH], 1.0));
    tch::no_grad(|| {
        let (packed, tokens) = vlm.image_features(&images).unwrap();
        assert_eq!(tokens, [4096, 4]);
        let alone: Vec<Tensor> =
            images.iter().map(|image| vlm.image_features(&[image.shallow_clone()]).unwrap().0).collect();
        let alone = Tensor::cat(&alone, 0);
        assert!(norm(&(&packed - &alone)) / norm(&alone) <= TOLERANCE);
    });
}
