//! What `--dry-run --world` says about the memory of a pass, against what libtorch takes for it.
//!
//! Measured is the second pass: gradients of parameters exist then, as they do in the optimizer's buckets.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::path::Path;
use std::sync::Arc;

use sail_data::{Pack, TextEncoder, read_samples};
use sail_model::llm::LlmConfig;
use sail_model::params::{Init, TensorSource};
use sail_model::projector::{ProjectorConfig, ProjectorKind};
use sail_model::vision::VisionConfig;
use sail_model::vlm::{Batch, IGNORE, Visual, Vlm, VlmConfig, VlmSources};
use sail_torch::cpu_memory::measure;
use sail_train::batch::Feed;
use sail_train::config::{
    self, Config, ModelSource, Module, ModulePlan, Plan, Rates, Recompute, RecomputePlan, TrainPlan,
    VisualShape,
};
use sail_train::estimate::{Backend, Live, PackShape, pass};
use sail_train::session::Session;
use sail_train::stage::module_of;
use sail_train::world::World;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// Largest relative difference that is right. What is left are the scratch spaces of libtorch's CPU kernels, which
/// count where models are as small as here.
const TOLERANCE: f64 = 0.05;

/// Small values that are cheap to draw.
struct Noise;

impl TensorSource for Noise {
    fn fill(&self, _: &str, target: &Tensor, _: Init) -> sail_model::Result<()> {
        let _ = target.shallow_clone().uniform_(-0.02, 0.02);
        Ok(())
    }
}

fn model(config: &VlmConfig, train: &TrainPlan, kind: Kind) -> Vlm {
    let sources = VlmSources { vision: &Noise, projector: &Noise, llm: &Noise };
    let vlm = Vlm::new(config, sources, (kind, Device::Cpu)).unwrap();
    for (name, param) in vlm.params() {
        let _ = param.set_requires_grad(train.get(module_of(name).unwrap()).is_trained());
    }
    vlm
}

/// Measures a pass over the batch, prints it beside the estimate and compares the two.
fn check(
    what: &str,
    (config, train, kind): (&VlmConfig, &TrainPlan, Kind),
    shape: &PackShape,
    batch: impl Fn(&Vlm) -> Batch,
) {
    for recompute in [Recompute::None, Recompute::Block, Recompute::Every(2)] {
        let recompute = RecomputePlan { vision: recompute, llm: recompute };
        check_pass(what, (config, train, kind), recompute, shape, &batch);
    }
}

fn check_pass(
    what: &str,
    (config, train, kind): (&VlmConfig, &TrainPlan, Kind),
    recompute: RecomputePlan,
    shape: &PackShape,
    batch: impl Fn(&Vlm) -> Batch,
) {
    let vlm = model(config, train, kind);
    vlm.listener().set_recomputed(recompute.blocks(&vlm.listener().blocks()));
    // Hooks that tell which module computes keep nothing alive.
    vlm.listener().set_on_module(|_| ());
    let compute_bytes = if kind == Kind::Float { 4 } else { 2 };
    let peak = pass(config, (train, recompute), shape, Backend { cuda: false, compute_bytes }).peak;
    compare(&format!("{what}, recompute {}", recompute.llm), peak, || {
        vlm.loss(&batch(&vlm)).unwrap().sum.backward();
    });
}

/// Runs something twice, and compares what it takes the second time with what is estimated.
fn compare(what: &str, peak: Live, run: impl Fn()) {
    run();
    let ((), usage) = measure(run).unwrap();
    let (measured, estimated) = (usage.peak_bytes as f64, peak.total() as f64);
    let difference = estimated / measured - 1.0;
    let mib = f64::from(1u32 << 20);
    println!(
        "{what}: measured {:.2} MiB, estimated {:.2} MiB (head {:.2}), {:+.2} %",
        measured / mib,
        estimated / mib,
        peak.head as f64 / mib,
        100.0 * difference
    );
    assert!(difference.abs() <= TOLERANCE, "{what}: {measured} bytes measured, {estimated} estimated");
}

fn plans(file: &str) -> Vec<Plan> {
    std::env::set_current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
    let Config::Curriculum(curriculum) = config::load(file.as_ref(), &[]).unwrap() else {
        panic!("a curriculum")
    };
    curriculum.stages.into_iter().map(|(_, plan)| plan).collect()
}

fn config_of(plan: &Plan) -> VlmConfig {
    let vision = match &plan.model.vision.source {
        ModelSource::From(folder) => VisionConfig::read(folder.to_string().as_ref()),
        ModelSource::Random(keys) => VisionConfig::from_keys(keys),
    };
    let llm = match &plan.model.llm.source {
        ModelSource::From(folder) => LlmConfig::read(folder.to_string().as_ref()),
        ModelSource::Random(keys) => LlmConfig::from_keys(keys),
    };
    VlmConfig { vision: vision.unwrap(), projector: plan.model.projector, llm: llm.unwrap() }
}

/// The first samples of the plan's data that fit into a pack.
fn first_pack(plan: &Plan) -> Pack {
    let spec = plan.data_spec(VisualShape { tokens_per_tile: 16, unit_px: 28 });
    let encoder = TextEncoder::new(plan.model.llm.tokenizer.as_ref().unwrap(), &spec.text).unwrap();
    let mut samples = read_samples(&spec, &encoder, Some(8)).unwrap();
    let mut tokens = 0;
    samples.retain(|sample| {
        let fits = tokens + sample.ids.len() <= plan.batch.tokens_per_pack;
        tokens += if fits { sample.ids.len() } else { 0 };
        fits
    });
    Pack::collate(&samples)
}

fn shape_of(pack: &Pack, config: &VlmConfig) -> PackShape {
    let (height, width) = pack.images.sizes[0];
    let (rows, columns) = config.vision.grid(height as i64, width as i64).unwrap();
    PackShape {
        samples: pack.cu_seqlens.windows(2).map(|ends| (ends[1] - ends[0]) as u64).collect(),
        images: pack.images.len() as u64,
        patches_per_image: (rows * columns) as u64,
        targets: pack.targets.iter().filter(|target| **target != IGNORE).count() as u64,
    }
}

fn check_stages(file: &str) {
    for plan in plans(file) {
        let (config, pack) = (config_of(&plan), first_pack(&plan));
        let shape = shape_of(&pack, &config);
        let what = (&config, &plan.train, Kind::Float);
        check(&plan.run.name, what, &shape, |vlm| {
            let feed = Feed { model: vlm, device: Device::Cpu, cache: None };
            feed.batches(std::slice::from_ref(&pack), 1).next_batch().unwrap().unwrap()
        });
    }
}

/// Of packs whose images are encoded together: more than a pass takes where there are many of them.
#[test]
fn images_ahead_take_what_is_estimated() {
    let plan = &plans("configs/tiny/curriculum.yaml")[0];
    let (config, pack) = (config_of(plan), first_pack(plan));
    let shape = shape_of(&pack, &config);
    let packs = vec![pack; 12];
    let vlm = model(&config, &plan.train, Kind::Float);
    vlm.listener().set_on_module(|_| ());
    let feed = Feed { model: &vlm, device: Device::Cpu, cache: None };
    let backend = Backend { cuda: false, compute_bytes: 4 };
    let alone = pass(&config, (&plan.train, RecomputePlan::default()), &shape, backend);
    for together in [1, 2, 4, 12] {
        let images = together * shape.images;
        let estimated = alone.clone().with_images_ahead((&config, &plan.train), &shape, images, backend).peak;
        assert!(together < 12 || estimated.total() > 2 * alone.peak.total(), "{estimated:?} {alone:?}");
        compare(&format!("{images} images together"), estimated, || {
            let mut batches = feed.batches(&packs, images as usize);
            while let Some(batch) = batches.next_batch().unwrap() {
                vlm.loss(&batch).unwrap().sum.backward();
            }
        });
    }
}

#[test]
fn packs_of_the_tiny_stages_take_what_is_estimated() {
    check_stages("configs/tiny/curriculum.yaml");
}

#[test]
#[ignore = "minutes on one core, and needs the demo weights' folders; run by ./scripts/test.sh --extended"]
fn packs_of_the_demo_stages_take_what_is_estimated() {
    check_stages("configs/demo/curriculum.yaml");
}

const PX: i64 = 56;

fn train(trained: [bool; 3]) -> TrainPlan {
    let rates =
        ModulePlan::Train(Rates { lr: 1e-3, weight_decay: 0.0, betas: [0.9, 0.95], layer_decay: 1.0 });
    let [vision, projector, llm] =
        trained.map(|is_trained| if is_trained { rates } else { ModulePlan::Frozen });
    TrainPlan::of(vision, projector, llm)
}

/// A batch of this shape, with all images in the first sample; of an encoder that does not train, their features.
fn batch(vlm: &Vlm, shape: &PackShape) -> Batch {
    let config = vlm.config();
    let lengths: Vec<i64> = shape.samples.iter().map(|length| *length as i64).collect();
    let tokens: i64 = lengths.iter().sum();
    let visual = config.visual_tokens(PX, PX).unwrap() * shape.images as i64;
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    let longs = |values: Vec<i64>| Tensor::from_slice(&values);
    let target = |row| if row < shape.targets as i64 { 1 } else { IGNORE };
    let pixels = || Tensor::zeros([shape.images as i64, 3, PX, PX], (Kind::Float, Device::Cpu));
    let pixels: Vec<Tensor> = (shape.images > 0).then(pixels).into_iter().collect();
    let images = if pixels.is_empty() || vlm.trains("vision") {
        Visual::Pixels(pixels)
    } else {
        Visual::Features(vlm.encode(&pixels).unwrap())
    };
    Batch {
        ids_t: longs((0..tokens).map(|row| row % 7).collect()),
        positions_t: longs(lengths.iter().flat_map(|length| 0..*length).collect()),
        cu_seqlens: [0].into_iter().chain(ends).collect(),
        images,
        images_per_sequence: (0..lengths.len())
            .map(|i| if i == 0 { shape.images as usize } else { 0 })
            .collect(),
        image_rows: (0..visual).collect(),
        names: lengths.iter().map(ToString::to_string).collect(),
        targets: (0..tokens).map(target).collect(),
        weights: vec![1.0; tokens as usize],
    }
}

/// All families of vision encoders and language models, all projectors, frozen and trained, both types.
#[test]
fn every_family_takes_what_is_estimated() {
    let vit = |keys: Value| {
        let mut all = json!({
            "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": PX,
            "patch_size": 14,
        });
        all.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        VisionConfig::from_keys(&all).unwrap()
    };
    let llm = |keys: Value| {
        let mut all = json!({
            "vocab_size": 500, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        all.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        LlmConfig::from_keys(&all).unwrap()
    };
    let vits = [
        vit(json!({ "model_type": "aimv2_vision_model", "intermediate_size": 256 })),
        vit(json!({ "model_type": "dinov2" })),
        vit(json!({ "model_type": "siglip_vision_model", "intermediate_size": 256 })),
        vit(json!({ "model_type": "internvl_vision", "intermediate_size": 256 })),
        vit(json!({
            "model_type": "internvl_vision", "intermediate_size": 256, "norm_type": "rms_norm",
            "use_qk_norm": true, "use_mean_pooling": false,
        })),
    ];
    let llms = [
        llm(json!({ "model_type": "llama" })),
        llm(json!({ "model_type": "qwen2", "tie_word_embeddings": true })),
        llm(json!({ "model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": true })),
        llm(
            json!({ "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96 }),
        ),
    ];
    let projectors = [(ProjectorKind::PixelShuffle, 2), (ProjectorKind::Mlp, 1), (ProjectorKind::Linear, 1)];
    let shapes = [
        PackShape { samples: vec![300, 200, 12], images: 8, patches_per_image: 16, targets: 100 },
        PackShape { samples: vec![512], images: 16, patches_per_image: 16, targets: 512 },
        PackShape { samples: vec![256, 256], images: 1, patches_per_image: 16, targets: 40 },
    ];
    let trains = [[false, true, false], [true, true, false], [true, true, true], [false, true, true]];
    for i in 0..20 {
        let (kind, merge) = projectors[i % 3];
        let config = VlmConfig {
            vision: vits[i % 5].clone(),
            projector: ProjectorConfig { kind, merge },
            llm: llms[i % 4].clone(),
        };
        let (shape, train) = (&shapes[(i / 2) % 3], train(trains[(i + i / 4) % 4]));
        let kind = if i % 5 == i / 4 { Kind::BFloat16 } else { Kind::Float };
        let modules = Module::ALL.into_iter().filter(|module| train.get(*module).is_trained());
        let what = format!(
            "{i}: {}, {:?}, {}, {kind:?}, trained {:?}",
            config.vision.model_type(),
            config.projector.kind,
            config.llm.model_type(),
            modules.collect::<Vec<_>>()
        );
        check(&what, (&config, &train, kind), shape, |vlm| batch(vlm, shape));
    }
}

/// The most memory of a step's forward and backward passes in a session of this plan.
fn step_bytes(recompute: &str) -> f64 {
    std::env::set_current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        format!("run.root={}", dir.path().display()),
        "train={vision: {lr: 1e-3}, projector: {lr: 1e-3}, llm: {lr: 1e-3}}".to_owned(),
        format!("batch.recompute={{vision: {recompute}, llm: {recompute}}}"),
    ];
    let Config::Stage(plan) = config::load("configs/tiny/stage1.yaml".as_ref(), &sets).unwrap() else {
        panic!("a stage");
    };
    let mut session = Session::build(&plan, &Arc::new(World::alone()), None).unwrap();
    let step = session.next_step().unwrap().unwrap();
    let (_, usage) = measure(|| session.accumulate(&step).unwrap()).unwrap();
    usage.peak_bytes as f64
}

/// What a training keeps is what its plan says: equal losses would not show it.
#[test]
fn a_session_computes_blocks_twice() {
    let [none, half, all] = ["none", "every 2", "block"].map(step_bytes);
    assert!(half < 0.8 * none && all < 0.8 * half, "{none} {half} {all}");
}
