//! The packs of one optimizer step, and how well they are packed. Made by the session, read by the train loop.

use sail_data::Pack;
use serde::Serialize;

use crate::checkpoint::Totals;

/// The packs of one optimizer step.
pub struct Step {
    /// At least one.
    pub packs: Vec<Pack>,
    /// Sum of the loss weights of all packs: the one normaliser of the step.
    pub weight: f64,
    /// What the packs hold.
    pub size: Totals,
    /// How well they are packed.
    pub packing: Packing,
    /// Time spent waiting for them.
    pub data_wait_secs: f64,
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

impl Packing {
    fn of(packs: &[Pack], tokens_per_pack: usize) -> Self {
        let tokens: usize = packs.iter().map(|pack| pack.ids.len()).sum();
        let visual = |pack: &Pack| pack.image_rows.len();
        let all: usize = packs.iter().map(visual).sum();
        let most = packs.iter().map(visual).max().unwrap_or(0);
        let mean = all as f64 / packs.len().max(1) as f64;
        Self {
            fill: tokens as f64 / (packs.len() * tokens_per_pack).max(1) as f64,
            visual_tokens: all as u64,
            visual_imbalance: if all == 0 { 0.0 } else { most as f64 / mean - 1.0 },
        }
    }
}

impl Step {
    /// These packs, of at most `tokens_per_pack`, as one step.
    pub fn new(packs: Vec<Pack>, tokens_per_pack: usize, data_wait_secs: f64) -> Self {
        let weight = packs.iter().map(Pack::weight_sum).sum();
        let mut size = Totals::default();
        let packing = Packing::of(&packs, tokens_per_pack);
        for pack in &packs {
            size.samples += pack.samples.len() as u64;
            size.tokens += pack.ids.len() as u64;
            size.answer_tokens += pack.answer_tokens() as u64;
        }
        Self { packs, weight, size, packing, data_wait_secs }
    }

    /// Its samples as `source/shard/key`, for messages.
    pub fn sample_names(&self) -> String {
        let ids = self.packs.iter().flat_map(|pack| &pack.samples);
        ids.map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }
}
