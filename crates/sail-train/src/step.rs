//! The packs of one optimizer step: this rank's, and what all ranks' together are. Made by the session, read by
//! the train loop.

use std::collections::BTreeMap;

use sail_data::{Pack, Tally};
use serde::{Deserialize, Serialize};

use crate::checkpoint::Totals;
use crate::config::Module;

/// The packs of one optimizer step.
pub struct Step {
    /// This rank's; none where its streams have ended.
    pub packs: Vec<Pack>,
    /// Passes that every rank makes, one for each pack or without one.
    pub passes: usize,
    /// What the packs of all ranks are together.
    pub all: Share,
}

/// What some packs of a step are, and how the data stands after them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Packs.
    pub packs: u64,
    /// Sum of their loss weights: of all ranks, the one normaliser of the step.
    pub weight: f64,
    /// What they hold.
    pub size: Totals,
    /// Operations of their forward and backward passes by module, where they are counted.
    pub flops: BTreeMap<Module, u64>,
    /// Visual tokens in them.
    pub visual_tokens: u64,
    /// Visual tokens of the pack with most of them.
    pub most_visual_tokens: u64,
    /// Whether their streams have no more.
    pub ended: bool,
    /// Time spent waiting for them; of all ranks, the longest.
    pub data_wait_secs: f64,
    /// What was seen of each source since the start of the stage.
    pub coverage: BTreeMap<String, Tally>,
}

/// How well the packs of a step are packed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Packing {
    /// Share of the positions that hold a token.
    pub fill: f64,
    /// Visual tokens in all packs.
    pub visual_tokens: u64,
    /// How much more visual tokens the pack with most of them has than the mean; 0 without any.
    pub visual_imbalance: f64,
}

impl Share {
    /// Of these packs.
    pub fn of(packs: &[Pack]) -> Self {
        let mut share = Self { packs: packs.len() as u64, ..Self::default() };
        for pack in packs {
            let visual = pack.image_rows.len() as u64;
            share.weight += pack.weight_sum();
            share.size.samples += pack.samples.len() as u64;
            share.size.tokens += pack.ids.len() as u64;
            share.size.answer_tokens += pack.answer_tokens() as u64;
            share.visual_tokens += visual;
            share.most_visual_tokens = share.most_visual_tokens.max(visual);
        }
        share
    }

    /// Of all ranks, from those of each in their order: the same on every rank to the last bit.
    pub fn all(ranks: Vec<Self>) -> Self {
        let mut all = Self { ended: true, ..Self::default() };
        for share in ranks {
            all.packs += share.packs;
            all.weight += share.weight;
            all.size.samples += share.size.samples;
            all.size.tokens += share.size.tokens;
            all.size.answer_tokens += share.size.answer_tokens;
            all.visual_tokens += share.visual_tokens;
            all.most_visual_tokens = all.most_visual_tokens.max(share.most_visual_tokens);
            all.ended &= share.ended;
            all.data_wait_secs = all.data_wait_secs.max(share.data_wait_secs);
            for (module, flops) in &share.flops {
                *all.flops.entry(*module).or_default() += flops;
            }
            for (source, tally) in &share.coverage {
                all.coverage.entry(source.clone()).or_default().add(tally);
            }
        }
        all
    }

    /// How well the packs, of at most `tokens_per_pack`, are packed.
    pub fn packing(&self, tokens_per_pack: usize) -> Packing {
        let mean = self.visual_tokens as f64 / self.packs.max(1) as f64;
        Packing {
            fill: self.size.tokens as f64 / (self.packs.max(1) as usize * tokens_per_pack) as f64,
            visual_tokens: self.visual_tokens,
            visual_imbalance: if mean == 0.0 { 0.0 } else { self.most_visual_tokens as f64 / mean - 1.0 },
        }
    }
}

impl Step {
    /// These packs of a rank alone.
    pub fn alone(packs: Vec<Pack>) -> Self {
        let all = Share::of(&packs);
        Self { passes: packs.len(), packs, all }
    }

    /// This rank's samples as `source/shard/key`.
    pub fn samples(&self) -> Vec<String> {
        self.packs.iter().flat_map(|pack| &pack.samples).map(ToString::to_string).collect()
    }
}
