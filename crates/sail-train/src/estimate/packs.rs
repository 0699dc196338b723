//! Operations of packs as they are made, without a pass over shapes for each.
//!
//! What [`super::flops`] counts of a pack is a sum over its samples and its images, and of each of these a polynomial
//! of the second degree in its tokens: linear maps grow with them, attention with their square. So the passes over one
//! sample of 1, 2 and 3 tokens, and over one image of as many, say what every pack takes, to the operation. Used by
//! the session for each pack that it trains on.

use std::collections::BTreeMap;

use sail_data::Pack;
use sail_model::vlm::VlmConfig;

use super::forward::{PackShape, pass};
use super::graph::Backend;
use crate::config::{Module, RecomputePlan, TrainPlan};

/// Operations of any pack of one model, while the same modules are trained. What is computed again does not count.
#[derive(Clone, Debug)]
pub struct PackFlops {
    /// Sides of the square of pixels that a visual token stands for.
    unit_px: usize,
    /// The language model without images and with some: then gradients may have to pass through it.
    llm: [Decoder; 2],
    /// Of the other modules, for each image, by its visual tokens.
    images: BTreeMap<Module, Quadratic>,
}

#[derive(Clone, Copy, Debug)]
struct Decoder {
    /// For each sample, by its tokens.
    sample: Quadratic,
    /// For each token whose prediction is trained.
    target: u64,
}

/// A polynomial of the second degree over the numbers from 1 on, as its first value and its differences there (Newton's
/// form, in which all are whole numbers).
#[derive(Clone, Copy, Debug)]
struct Quadratic {
    first: u64,
    step: u64,
    growth: u64,
}

impl Quadratic {
    /// Through its values at 1, 2 and 3, which grow ever faster.
    fn through([a, b, c]: [u64; 3]) -> Self {
        Self { first: a, step: b - a, growth: (c - b) - (b - a) }
    }

    /// At a number from 1 on.
    fn at(&self, n: u64) -> u64 {
        self.first + (n - 1) * self.step + (n - 1) * (n.max(2) - 2) / 2 * self.growth
    }
}

impl PackFlops {
    /// Of a model of which this is trained; a module counts as trained once something of it is.
    pub fn new(config: &VlmConfig, train: &TrainPlan) -> Self {
        let merge = config.projector.merge as u64;
        let of = |tokens: u64, visual: u64, targets: u64| {
            let shape = PackShape {
                samples: vec![tokens],
                images: u64::from(visual > 0),
                patches_per_image: visual * merge * merge,
                targets,
            };
            // Kernels and types make no difference.
            let backend = Backend { cuda: false, compute_bytes: 4 };
            let flops = pass(config, (train, RecomputePlan::default()), &shape, backend).flops;
            move |module: Module| flops.get(&module).map_or(0, super::flops::Flops::total)
        };
        let decoder = |visual: u64| {
            let [one, two] = [1, 2].map(|targets| of(1, visual, targets)(Module::Llm));
            let target = two - one;
            let sample = [1, 2, 3].map(|tokens| of(tokens, visual, 1)(Module::Llm) - target);
            Decoder { sample: Quadratic::through(sample), target }
        };
        let images = [Module::Vision, Module::Projector]
            .map(|module| (module, Quadratic::through([1, 2, 3].map(|visual| of(1, visual, 1)(module)))));
        Self {
            unit_px: (config.vision.patch_size() * config.projector.merge) as usize,
            llm: [0, 1].map(decoder),
            images: images.into(),
        }
    }

    /// Operations of each module in the forward and backward passes of these packs.
    pub fn of(&self, packs: &[Pack]) -> BTreeMap<Module, u64> {
        let mut sums = BTreeMap::from(Module::ALL.map(|module| (module, 0)));
        for (module, flops) in packs.iter().flat_map(|pack| self.of_pack(pack)) {
            *sums.entry(module).or_default() += flops;
        }
        sums
    }

    fn of_pack(&self, pack: &Pack) -> impl Iterator<Item = (Module, u64)> {
        let samples = pack.cu_seqlens.windows(2).map(|ends| (ends[1] - ends[0]) as u64);
        let llm = &self.llm[usize::from(!pack.images.is_empty())];
        let of_llm = samples.map(|tokens| llm.sample.at(tokens)).sum::<u64>()
            + llm.target * pack.answer_tokens() as u64;
        let of_images = self.images.iter().map(|(module, image)| {
            let sizes = pack.images.sizes.iter();
            (*module, sizes.map(|(h, w)| image.at((h / self.unit_px * (w / self.unit_px)) as u64)).sum())
        });
        of_images.chain([(Module::Llm, of_llm)])
    }
}

#[cfg(test)]
mod tests {
    use sail_data::{IGNORE, Images};
    use sail_model::llm::LlmConfig;
    use sail_model::projector::{ProjectorConfig, ProjectorKind};
    use sail_model::vision::VisionConfig;
    use serde_json::json;

    use super::*;
    use crate::config::{ModulePlan, Rates};

    const PATCH: usize = 14;

    /// Samples of these lengths, `targets` of their tokens learnt, and images of this many patches by patches.
    fn pack(samples: &[i64], images: &[(usize, usize)], targets: usize) -> Pack {
        let mut pack = Pack::collate::<sail_data::Sample>(&[]);
        pack.cu_seqlens.extend(samples.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        pack.targets = (0..samples.iter().sum::<i64>() as usize)
            .map(|row| if row < targets { 1 } else { IGNORE })
            .collect();
        let sizes = images.iter().map(|(rows, columns)| (rows * PATCH, columns * PATCH)).collect();
        pack.images = Images { sizes, pixels: Vec::new() };
        pack
    }

    fn of_pass(
        config: &VlmConfig,
        train: &TrainPlan,
        samples: &[i64],
        images: (u64, u64),
        targets: u64,
    ) -> BTreeMap<Module, u64> {
        let (images, patches_per_image) = images;
        let samples = samples.iter().map(|length| *length as u64).collect();
        let shape = PackShape { samples, images, patches_per_image, targets };
        let backend = Backend { cuda: true, compute_bytes: 2 };
        let flops = pass(config, (train, RecomputePlan::default()), &shape, backend).flops;
        Module::ALL
            .map(|module| (module, flops.get(&module).map_or(0, super::super::flops::Flops::total)))
            .into()
    }

    /// All families, whatever is trained, with and without images.
    #[test]
    fn a_pack_takes_what_its_pass_counts() {
        let vits = [
            json!({ "model_type": "aimv2_vision_model", "hidden_size": 96, "intermediate_size": 256 }),
            json!({ "model_type": "dinov2", "hidden_size": 64 }),
            json!({ "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 96 }),
            json!({ "model_type": "internvl_vision", "hidden_size": 64, "intermediate_size": 96 }),
        ];
        let llms = [
            json!({ "model_type": "llama", "vocab_size": 500 }),
            json!({ "model_type": "qwen2", "vocab_size": 500, "tie_word_embeddings": true }),
            json!({ "model_type": "qwen3", "head_dim": 64, "vocab_size": 300, "tie_word_embeddings": true }),
            json!({ "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96 }),
        ];
        let rates =
            ModulePlan::Train(Rates { lr: 1.0, weight_decay: 0.0, betas: [0.9, 0.95], layer_decay: 1.0 });
        for case in 0..32 {
            let with = |keys: &serde_json::Value, more: serde_json::Value| {
                let mut all = keys.clone();
                all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                all
            };
            let vit = with(
                &vits[case % 4],
                json!({
                    "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": PATCH,
                }),
            );
            let llm = with(
                &llms[case / 4 % 4],
                json!({
                    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                }),
            );
            let kind = if case % 3 == 0 { ProjectorKind::Mlp } else { ProjectorKind::PixelShuffle };
            let config = VlmConfig {
                vision: VisionConfig::from_keys(&vit).unwrap(),
                projector: ProjectorConfig { kind, merge: if kind == ProjectorKind::Mlp { 1 } else { 2 } },
                llm: LlmConfig::from_keys(&llm).unwrap(),
            };
            let [vision, projector, llm] =
                [1, 2, 4].map(|bit| if (case * 7) & bit == 0 { ModulePlan::Frozen } else { rates });
            let train = TrainPlan::of(vision, projector, llm);
            let flops = PackFlops::new(&config, &train);
            let samples: &[i64] = [&[300, 1, 12, 2][..], &[64]][case % 2];
            for images in [0, 1, 3] {
                let found = flops.of(&[pack(samples, &vec![(4, 6); images], 10)]);
                let expected = of_pass(&config, &train, samples, (images as u64, 24), 10);
                assert_eq!(found, expected, "{case}: {images} images, trained {train:?}");
            }
            // Images of two sizes, and two packs.
            let packs = [pack(samples, &[(4, 6), (2, 2)], 10), pack(&[50], &[], 7)];
            let [large, small] = [24, 4].map(|patches| of_pass(&config, &train, samples, (1, patches), 10));
            let text = of_pass(&config, &train, &[50], (0, 0), 7);
            for (module, found) in flops.of(&packs) {
                let of_images = large[&module] + if module == Module::Llm { 0 } else { small[&module] };
                assert_eq!(found, of_images + text[&module], "{case}: {module}");
            }
        }
    }
}
