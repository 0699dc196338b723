//! The whole model on random weights: visual tokens in their places, packs against samples alone,
//! and what freezing a module does to gradients.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use sail_model::Error;
use sail_model::attention::Segments;
use sail_model::generate::GenerateOptions;
use sail_model::llm::LlmConfig;
use sail_model::params::{Init, Params, RandomSource, TensorSource};
use sail_model::projector::{ProjectorConfig, ProjectorKind};
use sail_model::vision::{Features, VisionConfig};
use sail_model::vlm::{Batch, IGNORE, Loss, Prompt, Visual, Vlm, VlmConfig, VlmSources};
use sail_train::config::{Recompute, RecomputePlan};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const TILE_PX: i64 = 28;
const TOKENS_PER_TILE: i64 = 4;
const VOCAB: i64 = 40;

/// Normal values of their own for each name; libtorch's generator is shared by the tests' threads.
fn random(name: &str, shape: &[i64], std: f64) -> Tensor {
    RandomSource::new(6, "test").tensor(name, shape, Init::Normal(std)).unwrap()
}

/// A model whose random weights are large enough for every part to matter. Parameters whose name
/// begins with one of `prefixes` require gradients, and no other.
fn model_training(prefixes: &[&str]) -> Vlm {
    let llm = json!({
        "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
        "tie_word_embeddings": false,
    });
    training(prefixes, &llm)
}

fn training(prefixes: &[&str], llm: &Value) -> Vlm {
    let vision = json!({
        "model_type": "aimv2_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": TILE_PX, "patch_size": 7,
    });
    let config = VlmConfig {
        vision: VisionConfig::from_keys(&vision).unwrap(),
        projector: ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge: 2 },
        llm: LlmConfig::from_keys(llm).unwrap(),
    };
    let sources = ["vision", "projector", "llm"].map(|module| RandomSource::new(5, module));
    let [vision, projector, llm] = &sources;
    let vlm = Vlm::new(&config, VlmSources { vision, projector, llm }, (Kind::Float, Device::Cpu)).unwrap();
    for (name, param) in vlm.params() {
        if name.starts_with("projector.") {
            param.shallow_clone().copy_(&random(name, &param.size(), 0.3));
        }
        let _ = param.set_requires_grad(prefixes.iter().any(|prefix| name.starts_with(prefix)));
    }
    vlm
}

/// A sample on the host: ids, targets, weights, rows of visual tokens, tiles.
struct Sample {
    ids: Vec<i64>,
    targets: Vec<i64>,
    weights: Vec<f32>,
    image_rows: Vec<i64>,
    tiles: Option<Tensor>,
}

/// `length` tokens, of which those from `image_at` stand for `tiles` tiles.
fn sample(seed: i64, length: i64, image_at: i64, tiles: i64) -> Sample {
    let id = |t: i64| (seed * 11 + t * 7 + t * t) % VOCAB;
    let has_target = |t: i64| t >= length - 4 && t < length - 1;
    Sample {
        ids: (0..length).map(id).collect(),
        targets: (0..length).map(|t| if has_target(t) { id(t + 1) } else { IGNORE }).collect(),
        weights: (0..length).map(|t| if has_target(t) { 0.5 + t as f32 / 8.0 } else { 0.0 }).collect(),
        image_rows: (image_at..image_at + tiles * TOKENS_PER_TILE).collect(),
        tiles: (tiles > 0).then(|| random(&format!("tiles of {seed}"), &[tiles, 3, TILE_PX, TILE_PX], 1.0)),
    }
}

fn samples() -> [Sample; 3] {
    [sample(1, 12, 2, 1), sample(2, 7, 0, 0), sample(3, 15, 3, 2)]
}

fn batch(samples: &[&Sample]) -> Batch {
    let mut cu_seqlens = vec![0];
    let mut image_rows = Vec::new();
    for sample in samples {
        let start = cu_seqlens[cu_seqlens.len() - 1];
        image_rows.extend(sample.image_rows.iter().map(|row| start + row));
        cu_seqlens.push(start + sample.ids.len() as i64);
    }
    let images = samples.iter().filter_map(|sample| sample.tiles.as_ref().map(Tensor::shallow_clone));
    let count = |sample: &&Sample| sample.tiles.as_ref().map_or(0, |tiles| tiles.size()[0] as usize);
    let all = |field: fn(&Sample) -> &Vec<i64>| -> Vec<i64> {
        samples.iter().flat_map(|sample| field(sample).clone()).collect()
    };
    let positions: Vec<i64> = samples.iter().flat_map(|sample| 0..sample.ids.len() as i64).collect();
    Batch {
        ids_t: Tensor::from_slice(&all(|sample| &sample.ids)),
        positions_t: Tensor::from_slice(&positions),
        cu_seqlens,
        images: Visual::Pixels(images.collect()),
        images_per_sequence: samples.iter().map(count).collect(),
        image_rows,
        names: (0..samples.len()).map(|i| format!("sample {i}")).collect(),
        targets: all(|sample| &sample.targets),
        weights: samples.iter().flat_map(|sample| sample.weights.clone()).collect(),
    }
}

/// The gradients that the parameters have after a backward pass from `loss`.
fn gradients(vlm: &Vlm, loss: &Tensor) -> Params {
    loss.backward();
    let with_grad = vlm.params().iter().filter(|(_, param)| param.grad().defined());
    with_grad.map(|(name, param)| (name.clone(), param.grad().copy())).collect()
}

fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    let error = largest(&(found - expected)) / largest(expected).max(1e-12);
    assert!(error <= tolerance, "{what}: relative error {error:e} > {tolerance:e}");
}

fn assert_same_gradients(found: &Params, expected: &Params, tolerance: f64) {
    let names = |params: &Params| params.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (name, grad) in found {
        assert_close(name, grad, &expected[name], tolerance);
    }
}

/// Who is told which module computes, in the forward and then in the backward pass.
#[test]
fn modules_are_told_when_their_turn_comes() {
    let [with_images, text, _] = samples();
    let forward = ["vision", "projector", "llm"];
    for (trained, sample, told, backward) in [
        (&forward[..], &with_images, &forward[..], &["backward", "projector", "vision"][..]),
        // The gradient goes through what is frozen.
        (&["vision."], &with_images, &forward, &["backward", "projector", "vision"]),
        (&["projector."], &with_images, &forward, &["backward", "projector"]),
        (&["llm."], &with_images, &forward, &["backward"]),
        (&forward, &text, &["llm"], &["backward"]),
    ] {
        for recomputed in [Recompute::None, Recompute::Block] {
            let vlm = model_training(trained);
            let recompute = RecomputePlan { vision: recomputed, llm: recomputed };
            vlm.listener().set_recomputed(recompute.blocks(&vlm.listener().blocks()));
            let (tell, heard) = std::sync::mpsc::channel();
            let of_model = tell.clone();
            vlm.listener().set_on_module(move |module| of_model.send(module.to_owned()).unwrap());
            let loss = vlm.loss_sum(&batch(&[sample])).unwrap();
            tell.send("backward".to_owned()).unwrap();
            loss.backward();
            let heard: Vec<String> = heard.try_iter().collect();
            assert_eq!(heard, [told, backward].concat(), "{trained:?}, {recomputed:?}");
        }
    }
}

/// The loss written plainly: embeddings chosen row by row, every row through the head.
fn plain_loss(vlm: &Vlm, sample: &Sample) -> Tensor {
    let embedded = vlm.llm().embed(&Tensor::from_slice(&sample.ids));
    let visual = sample.tiles.as_ref().map(|tiles| vlm.image_features(&[tiles.shallow_clone()]).unwrap().0);
    let row = |t: i64| match (sample.image_rows.iter().position(|row| *row == t), &visual) {
        (Some(v), Some(visual)) => visual.get(v as i64),
        _ => embedded.get(t),
    };
    let rows = sample.ids.len() as i64;
    let x_td = Tensor::stack(&(0..rows).map(row).collect::<Vec<_>>(), 0);
    let positions_t = Tensor::arange(rows, (Kind::Int64, Device::Cpu));
    let hidden = vlm.llm().hidden(&x_td, &positions_t, &Segments::single(rows).unwrap(), None);
    let log_probs = vlm.llm().logits(&hidden).log_softmax(-1, Kind::Float);
    let mut loss = Tensor::zeros([] as [i64; 0], (Kind::Float, Device::Cpu));
    for (t, (target, weight)) in sample.targets.iter().zip(&sample.weights).enumerate() {
        if *target != IGNORE {
            loss -= log_probs.get(t as i64).get(*target) * f64::from(*weight);
        }
    }
    loss
}

#[test]
fn visual_tokens_take_their_places() {
    for sample in &samples() {
        let (vlm, plain_vlm) = (model_training(&[""]), model_training(&[""]));
        let loss = vlm.loss_sum(&batch(&[sample])).unwrap();
        assert_eq!((loss.kind(), loss.size()), (Kind::Float, vec![]));
        let plain = plain_loss(&plain_vlm, sample);
        assert_close("loss", &loss, &plain, 1e-5);
        let found = gradients(&vlm, &loss);
        assert_same_gradients(&found, &gradients(&plain_vlm, &plain), 1e-4);
        assert_eq!(found.keys().any(|name| name.starts_with("vision.")), sample.tiles.is_some());
    }
}

/// Given in place of the pixels, some of whose features were computed alone.
#[test]
fn features_stand_for_pixels() {
    let samples = samples();
    let (vlm, given) = (model_training(&["projector.", "llm."]), model_training(&["projector.", "llm."]));
    let loss = vlm.loss_sum(&batch(&samples.each_ref())).unwrap();
    let features = || {
        let images: Vec<Tensor> = samples
            .iter()
            .filter_map(|sample| sample.tiles.as_ref())
            .flat_map(|tiles| tiles.split(1, 0))
            .collect();
        let alone = images.into_iter().map(|image| given.vision().features(&[image]).unwrap());
        let (mut parts, mut grids) = (Vec::new(), Vec::new());
        for features in alone {
            parts.push(features.x_td);
            grids.extend(features.grids);
        }
        Features { x_td: Tensor::cat(&parts, 0), grids }
    };
    let mut of_features = batch(&samples.each_ref());
    of_features.images = Visual::Features(features());
    let found = given.loss_sum(&of_features).unwrap();
    assert_close("loss", &found, &loss, 1e-6);
    assert_same_gradients(&gradients(&given, &found), &gradients(&vlm, &loss), 1e-5);

    let asked = |images| Prompt { images, ..prompt(&samples[0], &samples[0].ids) };
    let of = |tiles: &Tensor| given.vision().features(&[tiles.shallow_clone()]).unwrap();
    let tiles = samples[0].tiles.as_ref().unwrap();
    let greedy = GenerateOptions::greedy(4, &[]);
    let answers = [Visual::Features(of(tiles)), Visual::Pixels(vec![tiles.shallow_clone()])];
    let answers = answers.map(|images| generate(&given, &[asked(images)], &greedy));
    assert_eq!(answers[0], answers[1]);

    let Features { x_td, grids } = features();
    for (x_td, grids) in [(x_td.narrow(0, 1, 3), grids.clone()), (x_td.narrow(1, 1, 3), grids)] {
        of_features.images = Visual::Features(Features { x_td, grids });
        let error = given.loss_sum(&of_features).unwrap_err();
        assert!(matches!(error, Error::BatchShape { field: "images", .. }), "{error}");
    }
}

#[test]
fn replaced_embeddings_get_no_gradient() {
    let vlm = model_training(&[""]);
    let mut sample = sample(1, 12, 2, 1);
    sample.ids = vec![1, 2, 30, 31, 32, 33, 3, 4, 5, 6, 7, 8];
    // An untied head, so that the table's gradient comes from the embeddings alone.
    let grads = gradients(&vlm, &vlm.loss_sum(&batch(&[&sample])).unwrap());
    let largest = |id: i64| grads["llm.model.embed_tokens.weight"].get(id).abs().max().double_value(&[]);
    assert!([30, 31, 32, 33].into_iter().all(|id| largest(id) == 0.0));
    assert!([1, 2, 3, 4].into_iter().all(|id| largest(id) > 0.0));
}

#[test]
fn a_pack_is_the_sum_of_its_samples() {
    let (vlm, vlm_alone) = (model_training(&[""]), model_training(&[""]));
    let samples = samples();
    let packed = vlm.loss_sum(&batch(&samples.each_ref())).unwrap();
    let losses = samples.each_ref().map(|sample| vlm_alone.loss_sum(&batch(&[sample])).unwrap());
    let alone = Tensor::stack(&losses, 0).sum(Kind::Float);
    assert_close("loss", &packed, &alone, 1e-6);
    assert_same_gradients(&gradients(&vlm, &packed), &gradients(&vlm_alone, &alone), 1e-4);
    let rows = vlm.loss(&batch(&samples.each_ref())).unwrap().losses_r;
    let weights = samples.iter().flat_map(|sample| sample.weights.clone()).filter(|weight| *weight > 0.0);
    let weighted = rows * Tensor::from_slice(&weights.collect::<Vec<_>>());
    assert_close("rows", &weighted.sum(Kind::Float), &alone, 1e-6);
}

#[test]
fn gradients_flow_through_frozen_modules() {
    let samples = samples();
    let step = |prefixes: &[&str]| {
        let vlm = model_training(prefixes);
        gradients(&vlm, &vlm.loss_sum(&batch(&samples.each_ref())).unwrap())
    };
    let all = step(&[""]);
    assert_eq!(all.len(), model_training(&[]).params().len());
    for prefixes in [&["projector."][..], &["vision.", "projector."], &["vision."], &["llm.model.layers.0."]]
    {
        let some = step(prefixes);
        let mut expected: Params = all.iter().map(|(name, grad)| (name.clone(), grad.copy())).collect();
        expected.retain(|name, _| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        assert_same_gradients(&some, &expected, 1e-5);
    }
}

/// Whatever is trained, also where nothing before a recomputed block is, and where the router of a mixture of experts
/// gives more than rows.
#[test]
fn blocks_computed_twice_give_the_same_gradients() {
    let experts = json!({
        "model_type": "qwen3_moe", "vocab_size": VOCAB, "hidden_size": 24, "head_dim": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "router_aux_loss_coef": 0.1,
    });
    let samples = samples();
    let step = |make: &dyn Fn() -> Vlm, recompute: Recompute| {
        let vlm = make();
        let blocks = vlm.listener().blocks();
        vlm.listener().set_recomputed(RecomputePlan { vision: recompute, llm: recompute }.blocks(&blocks));
        let Loss { sum, balance, .. } = vlm.loss(&batch(&samples.each_ref())).unwrap();
        let loss = balance.map_or_else(|| sum.shallow_clone(), |balance| &sum + balance);
        (loss.double_value(&[]), gradients(&vlm, &loss))
    };
    for prefixes in [&[""][..], &["projector."], &["vision."], &["llm."], &["llm.model.layers.1."]] {
        let makes: [&dyn Fn() -> Vlm; 2] = [&|| model_training(prefixes), &|| training(prefixes, &experts)];
        for make in makes {
            let (expected, plain) = step(make, Recompute::None);
            for recompute in [Recompute::Block, Recompute::Every(2)] {
                let (loss, found) = step(make, recompute);
                assert_eq!(loss.to_bits(), expected.to_bits(), "{prefixes:?}");
                assert_same_gradients(&found, &plain, 1e-5);
            }
        }
    }
}

#[test]
fn text_alone_leaves_the_projector_out() {
    let text = sample(2, 7, 0, 0);
    let vlm = model_training(&["projector."]);
    assert!(!vlm.loss_sum(&batch(&[&text])).unwrap().requires_grad());
    let vlm = model_training(&["projector.", "llm."]);
    let grads = gradients(&vlm, &vlm.loss_sum(&batch(&[&text])).unwrap());
    assert!(!grads.is_empty() && grads.keys().all(|name| name.starts_with("llm.")));
}

#[test]
fn a_batch_without_targets_weighs_nothing() {
    let vlm = model_training(&[""]);
    let mut silent = batch(&[&sample(1, 12, 2, 1)]);
    silent.targets.fill(IGNORE);
    let loss = vlm.loss_sum(&silent).unwrap();
    assert_eq!(loss.double_value(&[]).to_bits(), 0);
    for (name, grad) in gradients(&vlm, &loss) {
        assert!(grad.abs().max().double_value(&[]) == 0.0, "{name}");
    }
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let vlm = model_training(&[]);
    let mut wrong = batch(&[&sample(1, 12, 2, 1)]);
    wrong.image_rows.pop();
    let error = vlm.loss_sum(&wrong).unwrap_err();
    assert!(matches!(error, Error::ImageRows { rows: 3, features: 4, .. }), "{error}");
    wrong.images = Visual::Pixels(vec![]);
    wrong.images_per_sequence = vec![0];
    let error = vlm.loss_sum(&wrong).unwrap_err();
    assert!(matches!(error, Error::ImageRows { rows: 3, features: 0, .. }), "{error}");
    assert!(error.to_string().starts_with("sample 0: "), "{error}");
    wrong.weights.truncate(5);
    let error = vlm.loss_sum(&wrong).unwrap_err();
    assert!(matches!(error, Error::BatchShape { field: "weights", .. }), "{error}");
    let mut wrong = batch(&[&sample(1, 12, 2, 1)]);
    wrong.cu_seqlens = vec![0, 11];
    let error = vlm.loss_sum(&wrong).unwrap_err();
    assert!(matches!(error, Error::Segments { rows: 12, .. }), "{error}");
    for shape in [[1, 3, 30, 30], [1, 1, 28, 28], [1, 3, 21, 21], [0, 3, 28, 28]] {
        let pixels = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        assert!(vlm.image_features(&[pixels]).is_err(), "{shape:?}");
    }
    assert!(matches!(vlm.module_params("visoin"), Err(Error::UnknownModule { .. })));
}

/// Continuations of prompts, greedily.
fn generate(vlm: &Vlm, prompts: &[Prompt], options: &GenerateOptions) -> Vec<Vec<i64>> {
    let mut told = vec![Vec::new(); prompts.len()];
    let mut on_token = |sequence: usize, id: i64| {
        told[sequence].push(id);
        true
    };
    let answers = vlm.generate(prompts, options, &mut on_token).unwrap();
    assert_eq!(answers, told);
    answers
}

fn prompt(sample: &Sample, ids: &[i64]) -> Prompt {
    Prompt {
        ids: ids.to_vec(),
        images: Visual::Pixels(sample.tiles.iter().map(Tensor::shallow_clone).collect()),
        image_rows: sample.image_rows.clone(),
    }
}

#[test]
fn answers_are_the_likeliest_tokens() {
    let vlm = model_training(&[]);
    for sample in &samples() {
        let greedy = |ids: &[i64], max_new_tokens, stop_ids: &[i64]| {
            let options = GenerateOptions::greedy(max_new_tokens, stop_ids);
            generate(&vlm, &[prompt(sample, ids)], &options).pop().unwrap()
        };
        let answer = greedy(&sample.ids, 6, &[]);
        // Each token again, by a whole forward without a cache: the answer is its own target.
        let mut ids = sample.ids.clone();
        for expected in &answer {
            assert_eq!(greedy(&ids, 1, &[]), [*expected]);
            ids.push(*expected);
        }
        let stop = answer[2];
        let end = answer.iter().position(|id| *id == stop).unwrap();
        assert_eq!(greedy(&sample.ids, 6, &[stop]), answer[..=end]);
        assert_eq!(greedy(&sample.ids, 0, &[]), [0i64; 0]);
    }
    let without = Prompt { ids: vec![1, 2, 3], images: Visual::Pixels(vec![]), image_rows: vec![1] };
    let error = vlm.generate(&[without], &GenerateOptions::greedy(1, &[]), &mut |_, _| true).unwrap_err();
    assert!(matches!(error, Error::ImageRows { rows: 1, features: 0, .. }), "{error}");
}

#[test]
fn prompts_of_different_lengths_are_answered_together_as_alone() {
    let vlm = model_training(&[]);
    let samples = samples();
    let prompts = || samples.iter().map(|sample| prompt(sample, &sample.ids)).collect::<Vec<_>>();
    let greedy = GenerateOptions::greedy(6, &[]);
    let together = generate(&vlm, &prompts(), &greedy);
    for (prompt, answer) in prompts().into_iter().zip(&together) {
        assert_eq!(&generate(&vlm, &[prompt], &greedy)[0], answer);
    }
    // A sequence that ends early leaves the others as they are.
    let stop = GenerateOptions::greedy(6, &[together[1][1]]);
    let stopped = generate(&vlm, &prompts(), &stop);
    for (all, some) in together.iter().zip(&stopped) {
        assert!(all.starts_with(some) && (some.len() == 6 || stop.stop_ids.contains(some.last().unwrap())));
    }
    assert!(stopped[1].len() <= 2);
    let mut tokens = 0;
    let answers = vlm.generate(&prompts(), &greedy, &mut |sequence, _| {
        tokens += 1;
        sequence != 0
    });
    let lengths: Vec<usize> = answers.unwrap().iter().map(Vec::len).collect();
    assert_eq!((lengths.as_slice(), tokens), (&[1, 6, 6][..], 13));
    // What is drawn depends on the place of a prompt, not on the other prompts.
    let sample = GenerateOptions { temperature: Some(1.5), top_p: Some(0.9), seed: 3, ..greedy };
    let drawn = generate(&vlm, &prompts(), &sample);
    assert_ne!(drawn, together);
    assert_eq!(generate(&vlm, &prompts()[..1], &sample)[0], drawn[0]);
    assert_eq!(generate(&vlm, &prompts(), &sample), drawn);
    assert!(vlm.generate(&[], &sample, &mut |_, _| true).unwrap().is_empty());
}

#[test]
fn bf16_parameters_give_nearly_the_same_loss() {
    let vlm = model_training(&[]);
    let samples = samples();
    let fp32 = vlm.loss_sum(&batch(&samples.each_ref())).unwrap();
    for param in vlm.params().values() {
        param.shallow_clone().set_data(&param.to_kind(Kind::BFloat16));
    }
    let bf16 = vlm.loss_sum(&batch(&samples.each_ref())).unwrap();
    assert_eq!(bf16.kind(), Kind::Float);
    assert_close("bf16", &bf16, &fp32, 0.05);
    let prompt = Prompt { ids: vec![1, 2], images: Visual::Pixels(vec![]), image_rows: vec![] };
    assert_eq!(generate(&vlm, &[prompt], &GenerateOptions::greedy(3, &[]))[0].len(), 3);
}

#[test]
fn modules_and_configuration_are_whole() {
    let vlm = model_training(&[]);
    let modules = ["vision", "projector", "llm"].map(|module| vlm.module_params(module).unwrap());
    assert_eq!(modules.iter().map(Params::len).sum::<usize>(), vlm.params().len());
    assert!(modules[0].contains_key("embeddings.patch_embed.weight"));
    assert!(modules[1].keys().eq(["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight"]));
    assert!(modules[2].contains_key("model.layers.1.self_attn.q_norm.weight"));
    assert!(modules[2].contains_key("lm_head.weight"));
    let json = serde_json::to_value(vlm.config()).unwrap();
    assert_eq!(&serde_json::from_value::<VlmConfig>(json).unwrap(), vlm.config());
    assert_eq!(vlm.config().visual_tokens(TILE_PX, TILE_PX).unwrap(), TOKENS_PER_TILE);
    let shapes = Vlm::shapes_only(vlm.config()).unwrap();
    let sizes =
        |vlm: &Vlm| vlm.params().iter().map(|(name, param)| (name.clone(), param.size())).collect::<Vec<_>>();
    assert_eq!(sizes(&shapes), sizes(&vlm));
}
