//! The forward pass of `sail_model`'s models over shapes.
//!
//! Each function here stands for one of the model's and is written in its order, so that what lives when is the
//! same: `vision` for `Vision::features`, `decoder_block` for `DecoderBlock::forward`, `pass` for `Vlm::loss` and
//! the backward pass from it. A change there needs one here; `tests/tests/planning.rs` compares the two.

use std::collections::BTreeMap;

use sail_model::llm::{DecoderConfig, DecoderShape, MoeShape};
use sail_model::projector::ProjectorKind;
use sail_model::vision::{NormKind, VitShape};
use sail_model::vlm::VlmConfig;

use super::flops::Flops;
use super::graph::{Backend, Graph, Live, Param, Region, Shaped};
use super::ops::{FLOAT, Heads, LONG, Sequences};
use crate::config::{Module, RecomputePlan, TrainPlan};

/// What a pack holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackShape {
    /// Tokens of each sample, visual ones included.
    pub samples: Vec<u64>,
    /// Images, all of one size.
    pub images: u64,
    /// Patches of an image.
    pub patches_per_image: u64,
    /// Tokens whose prediction is trained.
    pub targets: u64,
}

impl PackShape {
    /// Tokens of all samples.
    pub fn tokens(&self) -> u64 {
        self.samples.iter().sum()
    }
}

/// What the forward and backward pass of one pack take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Operations of each module.
    pub flops: BTreeMap<Module, Flops>,
    /// Operations that are made again in the backward pass, and are not among `flops`.
    pub recomputed_flops: u64,
    /// Memory at its peak, without parameters and without gradients that stay.
    pub peak: Live,
    /// Elements of the parameters that were used, but for biases.
    pub parameters: BTreeMap<Module, u64>,
}

impl Pass {
    /// Operations of all modules.
    pub fn total_flops(&self) -> Flops {
        let mut total = Flops::default();
        for flops in self.flops.values() {
            total += *flops;
        }
        total
    }

    /// The same where an encoder that is not trained gives the features of so many images, this pack's among them, before
    /// the pack has its turn.
    #[must_use]
    pub fn with_images_ahead(
        self,
        (config, train): (&VlmConfig, &TrainPlan),
        pack: &PackShape,
        images: u64,
        backend: Backend,
    ) -> Self {
        if images <= pack.images || train.ever_trains(Module::Vision) {
            return self;
        }
        let g = Graph::new(backend);
        let all = PackShape { images, ..pack.clone() };
        let model = Model { config, train, recompute: RecomputePlan::default(), pack: &all, g: &g };
        drop(model.features());
        let others = (images - pack.images) * pack.patches_per_image * config.vision.hidden_size() as u64;
        let passing = Live { trunk: self.peak.trunk + others * backend.compute_bytes, ..self.peak };
        let encoding = g.peak();
        Self { peak: if passing.total() < encoding.total() { encoding } else { passing }, ..self }
    }
}

/// The forward and backward pass of one pack.
pub fn pass(
    config: &VlmConfig,
    (train, recompute): (&TrainPlan, RecomputePlan),
    pack: &PackShape,
    backend: Backend,
) -> Pass {
    let g = Graph::new(backend);
    let model = Model { config, train, recompute, pack, g: &g };
    let encoded = model.features();
    // Ids and positions; the places of rows with a target, these and their weights.
    let (tokens, targets) = (pack.tokens(), pack.targets);
    let _batch = (g.input(2 * tokens + 2 * targets, LONG), g.input(targets, FLOAT));
    let loss = model.loss(encoded.as_ref().map(|(features, _)| features));
    g.backward(loss);
    drop(encoded);
    let (peak, recomputed_flops) = (g.peak(), g.recomputed_flops());
    let (flops, parameters) = g.totals();
    Pass { flops, recomputed_flops, peak, parameters }
}

struct Model<'a> {
    config: &'a VlmConfig,
    train: &'a TrainPlan,
    recompute: RecomputePlan,
    pack: &'a PackShape,
    g: &'a Graph,
}

impl Model<'_> {
    fn enter(&self, module: Module) {
        self.g.enter(module, self.train.ever_trains(module));
    }

    /// `Vlm::loss`.
    fn loss(&self, features: Option<&Shaped>) -> Shaped {
        let g = self.g;
        let decoder = self.config.llm.decoder();
        let (rows, d, vocab) = (self.pack.targets, decoder.hidden_size as u64, decoder.vocab_size as u64);
        self.enter(Module::Llm);
        let table = g.param(vocab * d);
        let x = self.embed(table, features);
        let x = self.trunk(&x);
        let x = g.rms_norm(&g.gather(&x, rows * d), d);
        g.count_as(Region::Head);
        let head = if decoder.tie_word_embeddings { table } else { g.param(vocab * d) };
        let loss = g.linear_cross_entropy(&x, head, vocab);
        g.count_as(Region::Trunk);
        loss
    }

    /// `Vlm::embed`: the table is looked up after the images, so its gradient comes before theirs.
    fn embed(&self, table: Param, features: Option<&Shaped>) -> Shaped {
        let visual = features.map(|features| self.projector(features));
        self.enter(Module::Llm);
        let d = self.config.llm.decoder().hidden_size as u64;
        let x = self.g.embedding(table, self.pack.tokens(), d);
        visual.map_or_else(|| x.clone(), |visual| self.g.index_copy(&x, &visual))
    }

    /// Of the pack's images; with the pixels where they stay with the pack, since the encoder is trained with it.
    fn features(&self) -> Option<(Shaped, Option<Shaped>)> {
        if self.pack.images == 0 {
            return None;
        }
        let patch = self.config.vision.patch_size() as u64;
        let values = self.pack.images * self.pack.patches_per_image * 3 * patch * patch;
        let pixels = self.g.input(values, FLOAT);
        let features = self.vision(&pixels);
        Some((features, self.train.ever_trains(Module::Vision).then_some(pixels)))
    }

    /// `Vision::features`.
    fn vision(&self, pixels: &Shaped) -> Shaped {
        self.enter(Module::Vision);
        let (g, shape) = (self.g, self.config.vision.shape());
        let (d, patch) = (self.config.vision.hidden_size() as u64, self.config.vision.patch_size() as u64);
        let images = self.pack.images;
        let length = shape.prefix as u64 + self.pack.patches_per_image;
        // Its handle lasts as long as the blocks.
        let embedded = {
            let x = g.patches(pixels, g.param(d * 3 * patch * patch), d);
            let x = shape.patch_norm.map_or(x.clone(), |kind| norm(g, kind, &x, d));
            // A class token is put before every image's patches.
            let x = if shape.prefix > 0 { g.gather(&x, images * length * d) } else { x };
            let x = g.add_param(&x, g.param(length * d));
            // Patches come out of the convolution channel by channel.
            if shape.prefix == 0 && images > 1 { g.copy(&x) } else { x }
        };
        let sequences = Sequences { lengths: vec![length; images as usize], causal: false };
        let x = self.blocks(embedded.clone(), Module::Vision, self.config.vision.num_layers(), |g, x, _| {
            vit_block(g, x, &shape, d, &sequences)
        });
        let x = shape.final_norm.map_or(x.clone(), |kind| norm(g, kind, &x, d));
        drop(embedded);
        if shape.prefix > 0 { g.gather(&x, images * self.pack.patches_per_image * d) } else { x }
    }

    /// `Projector::forward`.
    fn projector(&self, features: &Shaped) -> Shaped {
        self.enter(Module::Projector);
        let g = self.g;
        let config = self.config.projector;
        let merged = (config.merge * config.merge * self.config.vision.hidden_size()) as u64;
        let d = self.config.llm.hidden_size() as u64;
        let x = if config.merge > 1 { g.gather(features, features.elements) } else { features.clone() };
        let is_shuffle = config.kind == ProjectorKind::PixelShuffle;
        let x = if is_shuffle { g.layer_norm(&x, merged) } else { x };
        let x = g.linear(&x, g.param(merged * d), d);
        if config.kind == ProjectorKind::Linear {
            return x;
        }
        g.linear(&g.activation(&x), g.param(d * d), d)
    }

    /// `Llm::trunk`.
    fn trunk(&self, x: &Shaped) -> Shaped {
        let (g, decoder) = (self.g, self.config.llm.decoder());
        let angles = g.input(self.pack.tokens() * decoder.head_dim as u64, g.backend.compute_bytes);
        let sequences = Sequences { lengths: self.pack.samples.clone(), causal: true };
        self.blocks(x.clone(), Module::Llm, decoder.num_hidden_layers, |g, x, layer| {
            decoder_block(g, x, decoder, self.config.llm.shape(layer), &angles, &sequences)
        })
    }

    /// `Blocks::forward`.
    fn blocks(
        &self,
        x: Shaped,
        module: Module,
        count: i64,
        block: impl Fn(&Graph, &Shaped, i64) -> Shaped,
    ) -> Shaped {
        (0..count).fold(x, |x, layer| {
            if self.recompute.of(module).includes(layer as usize) {
                self.g.recomputed(&x, |g, x| block(g, x, layer))
            } else {
                block(self.g, &x, layer)
            }
        })
    }
}

fn norm(g: &Graph, kind: NormKind, x: &Shaped, width: u64) -> Shaped {
    match kind {
        NormKind::Rms => g.rms_norm(x, width),
        NormKind::Layer => g.layer_norm(x, width),
    }
}

/// The `Block::forward` of every vision family.
fn vit_block(g: &Graph, x: &Shaped, shape: &VitShape, d: u64, images: &Sequences) -> Shaped {
    let scaled = |x: Shaped| if shape.layer_scale { g.mul_param(&x, g.param(d)) } else { x };
    let normed = norm(g, shape.norm, x, d);
    let [q, k, v] = g.linears(&normed, [(); 3].map(|()| (g.param(d * d), d)));
    let qk_norm = |x: &Shaped| if shape.qk_norm { g.rms_norm(x, d) } else { x.clone() };
    let (q, k) = (qk_norm(&q), qk_norm(&k));
    let heads =
        Heads { queries: shape.heads as u64, keys: shape.heads as u64, width: d / shape.heads as u64 };
    let attended = g.attention([&q, &k, &v], heads, images);
    let x = g.add(x, &scaled(g.linear(&attended, g.param(d * d), d)));
    let normed = norm(g, shape.norm, &x, d);
    let inner = shape.inner as u64;
    let hidden = if shape.gated {
        gated(g, &normed, d, inner)
    } else {
        g.activation(&g.linear(&normed, g.param(d * inner), inner))
    };
    let out = g.linear(&hidden, g.param(inner * d), d);
    g.add(&x, &scaled(out))
}

/// `silu(gate(x)) * up(x)`
fn gated(g: &Graph, x: &Shaped, d: u64, inner: u64) -> Shaped {
    let [gate, up] = g.linears(x, [(); 2].map(|()| (g.param(d * inner), inner)));
    g.swiglu(&gate, &up)
}

/// `DecoderBlock::forward`.
fn decoder_block(
    g: &Graph,
    x: &Shaped,
    decoder: &DecoderConfig,
    shape: DecoderShape,
    angles: &Shaped,
    sequences: &Sequences,
) -> Shaped {
    let d = decoder.hidden_size as u64;
    let normed = g.rms_norm(x, d);
    let x = g.add(x, &self_attention(g, &normed, decoder, shape, angles, sequences));
    let normed = g.rms_norm(&x, d);
    let y = if let Some(moe) = shape.moe {
        sparse_mlp(g, &normed, d, moe)
    } else {
        let inner = decoder.intermediate_size as u64;
        let [y] = g.linears(&gated(g, &normed, d, inner), [(g.param(inner * d), d)]);
        y
    };
    g.add(&x, &y)
}

/// `Attention::forward` of the decoder.
fn self_attention(
    g: &Graph,
    x: &Shaped,
    decoder: &DecoderConfig,
    shape: DecoderShape,
    angles: &Shaped,
    sequences: &Sequences,
) -> Shaped {
    let (d, width) = (decoder.hidden_size as u64, decoder.head_dim as u64);
    let heads = Heads {
        queries: decoder.num_attention_heads as u64,
        keys: decoder.num_key_value_heads as u64,
        width,
    };
    let projections = [heads.queries, heads.keys, heads.keys].map(|heads| heads * width);
    let [q, k, v] = g.linears(x, projections.map(|outputs| (g.param(d * outputs), outputs)));
    let qk_norm = |x: Shaped| if shape.qk_norm { g.rms_norm(&x, width) } else { x };
    let (q, k) = (qk_norm(q), qk_norm(k));
    let (q_turned, k_turned) = (g.rotate(&q, angles), g.rotate(&k, angles));
    let out = g.attention([&q_turned, &k_turned, &v], heads, sequences);
    let [y] = g.linears(&out, [(g.param(heads.queries * width * d), d)]);
    y
}

/// `SparseMlp::forward`, rows spread evenly.
fn sparse_mlp(g: &Graph, x: &Shaped, d: u64, moe: MoeShape) -> Shaped {
    let (experts, visits, inner) = (moe.experts as u64, moe.top_k as u64, moe.inner as u64);
    let rows = x.elements / d;
    let probabilities = g.softmax(&g.linear(x, g.param(experts * d), experts));
    let weights = g.gather(&probabilities, rows * visits);
    let outputs = {
        let repeated = g.gather(x, rows * visits * d);
        let sorted = g.gather(&repeated, rows * visits * d);
        let both = g.experts(&sorted, g.param(experts * 2 * inner * d), (d, 2 * inner));
        let [gate, up] = g.halves(&both);
        drop(both);
        let hidden = g.swiglu(&gate, &up);
        drop((gate, up));
        let out = g.experts(&hidden, g.param(experts * inner * d), (inner, d));
        drop(hidden);
        let joined = g.copy(&out);
        g.gather(&joined, rows * visits * d)
    };
    let weighted = g.mul(&outputs, &g.cast(&weights, x.element_bytes));
    g.sum(&weighted, x.elements)
}

#[cfg(test)]
mod tests {
    use sail_model::llm::LlmConfig;
    use sail_model::projector::ProjectorConfig;
    use sail_model::vision::VisionConfig;
    use sail_model::vlm::Vlm;
    use serde_json::{Value, json};

    use super::*;
    use crate::config::{ModulePlan, Rates, Recompute};
    use crate::estimate::flops::Wanted;
    use crate::stage::module_of;

    const CPU: Backend = Backend { cuda: false, compute_bytes: 4 };

    fn train(trained: &[Module]) -> TrainPlan {
        let rates =
            ModulePlan::Train(Rates { lr: 1.0, weight_decay: 0.0, betas: [0.9, 0.95], layer_decay: 1.0 });
        let plan = |module| if trained.contains(&module) { rates } else { ModulePlan::Frozen };
        TrainPlan::of(plan(Module::Vision), plan(Module::Projector), plan(Module::Llm))
    }

    fn config(vision: &Value, llm: &Value) -> VlmConfig {
        VlmConfig {
            vision: VisionConfig::from_keys(vision).unwrap(),
            projector: ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge: 2 },
            llm: LlmConfig::from_keys(llm).unwrap(),
        }
    }

    /// One block each: a vision transformer of width 4 over 2 x 2 patches, a decoder of width 4.
    fn smallest() -> VlmConfig {
        let vision = json!({
            "model_type": "aimv2_vision_model", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 4, "patch_size": 2,
        });
        let llm = json!({
            "model_type": "qwen3", "vocab_size": 10, "hidden_size": 4, "intermediate_size": 6,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
            "tie_word_embeddings": true,
        });
        config(&vision, &llm)
    }

    /// Two images of 4 patches, which become one visual token each, in samples of 3 and 2 tokens.
    const PACK: fn() -> PackShape =
        || PackShape { samples: vec![3, 2], images: 2, patches_per_image: 4, targets: 2 };

    fn flops_of(module: Module, trained: &[Module]) -> [u64; 3] {
        let flops =
            pass(&smallest(), (&train(trained), RecomputePlan::default()), &PACK(), CPU).flops[&module];
        [flops.forward, flops.backward_inputs, flops.backward_weights]
    }

    #[test]
    fn operations_are_those_counted_by_hand() {
        // The decoder, 5 rows: q and o 4x4, k and v 4x2, three 4x6 of the SwiGLU, for two rows the 10x4 head; 6 + 3
        // pairs of rows and width 4.
        let linear = 2 * 5 * (2 * 16 + 2 * 8 + 3 * 24) + 2 * 2 * 40;
        let attention = 4 * 9 * 4;
        assert_eq!(linear + attention, 1504);
        let all = Module::ALL;
        assert_eq!(flops_of(Module::Llm, &all), [1504, linear + 2 * attention, linear]);
        // Frozen behind something that trains: gradients pass through.
        assert_eq!(flops_of(Module::Llm, &[Module::Projector]), [1504, linear + 2 * attention, 0]);

        // The ViT, 8 rows: four 4x4, three 4x6; 2 * 16 pairs; patches of 12 values that need no gradient.
        let (patches, linear, attention) = (2 * 8 * 48, 2 * 8 * (4 * 16 + 3 * 24), 4 * 32 * 4);
        let forward = patches + linear + attention;
        assert_eq!(flops_of(Module::Vision, &all), [forward, linear + 2 * attention, patches + linear]);
        assert_eq!(flops_of(Module::Vision, &[Module::Projector, Module::Llm]), [forward, 0, 0]);

        // The projector, 2 rows: 4x16 behind a norm whose weight needs a gradient, and 4x4.
        assert_eq!(flops_of(Module::Projector, &[Module::Projector]), [2 * 2 * (64 + 16); 3]);
    }

    #[test]
    fn experts_count_where_rows_go() {
        let mut llm = smallest().llm.to_json();
        let keys = json!({
            "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 3,
        });
        llm.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let config = VlmConfig { llm: LlmConfig::from_json(&llm).unwrap(), ..smallest() };
        let flops =
            pass(&config, (&train(&Module::ALL), RecomputePlan::default()), &PACK(), CPU).flops[&Module::Llm];
        // As above, with a 5x4 router and for 10 visits three 4x3 in place of the SwiGLU.
        let linear = 2 * 5 * (2 * 16 + 2 * 8 + 20) + 2 * 10 * 3 * 12 + 2 * 2 * 40;
        assert_eq!((flops.forward, flops.backward_weights), (linear + 144, linear));
    }

    #[test]
    fn nothing_is_kept_upstream_of_what_trains() {
        let peak = |trained: &[Module]| {
            pass(&smallest(), (&train(trained), RecomputePlan::default()), &PACK(), CPU).peak.total()
        };
        let stages = [&[Module::Projector][..], &[Module::Vision, Module::Projector], &Module::ALL].map(peak);
        assert!(stages.is_sorted() && stages[0] < stages[1], "{stages:?}");
    }

    /// The work of a pass is the same; what is made again is the forward pass of blocks that the backward pass comes to.
    #[test]
    fn what_is_made_again_is_counted_apart() {
        let made = |trained: &[Module], vision, llm| {
            pass(&smallest(), (&train(trained), RecomputePlan { vision, llm }), &PACK(), CPU)
        };
        let plain = made(&Module::ALL, Recompute::None, Recompute::None);
        assert_eq!(plain.recomputed_flops, 0);
        let again = made(&Module::ALL, Recompute::None, Recompute::Block);
        assert_eq!((&again.flops, &again.parameters), (&plain.flops, &plain.parameters));
        let (config, wanted) = (smallest(), Wanted { inputs: true, weights: true });
        let decoder = config.llm.decoder();
        let (d, vocab) = (decoder.hidden_size as u64, decoder.vocab_size as u64);
        let head = Flops::linear(PACK().targets, d, vocab, wanted).forward;
        assert_eq!(again.recomputed_flops, plain.flops[&Module::Llm].forward - head);
        // Upstream of what is trained nothing is kept, and nothing made again.
        assert_eq!(made(&[Module::Projector], Recompute::Block, Recompute::None).recomputed_flops, 0);
    }

    /// The figures are those of `tests/reference/cuda_block.py`, where attention keeps 24 bytes of a generator's
    /// state beside what is counted here.
    #[test]
    fn cuda_keeps_what_libtorch_keeps() {
        let keys = json!({
            "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 128,
        });
        let llm = LlmConfig::from_keys(&keys).unwrap();
        for (trained, expected) in [(true, 138_772_504), (false, 96_829_464)] {
            let g = Graph::new(Backend { cuda: true, compute_bytes: 2 });
            g.enter(Module::Llm, true);
            let x = g.embedding(g.param(1024), 4096, 1024);
            let angles = g.input(4096 * 128, 2);
            let sequences = Sequences { lengths: vec![1024; 4], causal: true };
            g.enter(Module::Llm, trained);
            let before = g.live().total();
            drop(decoder_block(&g, &x, llm.decoder(), llm.shape(0), &angles, &sequences));
            assert_eq!(g.live().total() - before + 24, expected, "trained: {trained}");
        }
    }

    /// Every parameter of every family is used here: a part that is left out would be missed.
    #[test]
    fn the_passes_use_all_parameters() {
        let vits = [
            json!({ "model_type": "aimv2_vision_model" }),
            json!({ "model_type": "dinov2" }),
            json!({ "model_type": "siglip_vision_model", "patch_size": 14 }),
            json!({ "model_type": "internvl_vision", "image_size": 224 }),
            json!({
                "model_type": "internvl_vision", "image_size": 224, "norm_type": "rms_norm", "use_qk_norm": true,
                "use_mean_pooling": false,
            }),
        ];
        let llms = [
            json!({ "model_type": "llama" }),
            json!({ "model_type": "qwen2", "tie_word_embeddings": true }),
            json!({ "model_type": "qwen3" }),
            json!({ "model_type": "qwen3_moe", "decoder_sparse_step": 2 }),
        ];
        for (vit, llm) in vits.iter().zip(llms.iter().cycle()) {
            let config = config(vit, llm);
            let mut expected = BTreeMap::new();
            for (name, param) in Vlm::shapes_only(&config).unwrap().params() {
                let left_out = [".bias", "cls_token", "mask_token"].iter().any(|end| name.ends_with(end));
                let counted = if left_out { 0 } else { param.numel() as u64 };
                *expected.entry(module_of(name).unwrap()).or_default() += counted;
            }
            let pack = PackShape { samples: vec![300], images: 1, patches_per_image: 256, targets: 3 };
            assert_eq!(
                pass(&config, (&train(&[]), RecomputePlan::default()), &pack, CPU).parameters,
                expected,
                "{vit} {llm}"
            );
        }
    }
}
