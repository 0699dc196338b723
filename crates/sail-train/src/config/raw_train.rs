//! The form of a stage's `train`, `optimizer` and `schedule`; as `raw.rs`, of which it is a part.

use schemars::JsonSchema;
use serde::Deserialize;

use super::raw_values::{RawAmount, RawList, RawModule};
use super::schema::words;
use super::select::Selector;
use super::values::{Module, ScheduleKind};

/// `train`: for each module the word `frozen` or `{ lr, weight_decay, layer_decay, betas }`. Parts of a module are
/// named as `llm` (all of it), `vision.blocks[12..24]`, `llm.blocks[20..]`, `llm.blocks[0]` (from 0, the end is not
/// part of it), or by a pattern for full parameter names, `vision.*.norm.*`, in which `*` stands for any characters.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawTrain {
    /// The vision encoder. Required.
    pub(super) vision: Option<RawModule>,
    /// The connector. Required.
    pub(super) projector: Option<RawModule>,
    /// The language model. Required.
    pub(super) llm: Option<RawModule>,
    /// Parts that do something else than their module says. The first that names a parameter decides. Default: none.
    pub(super) rules: Vec<RawRule>,
    /// Points of the stage from which on parts are trained that were frozen. Default: none.
    pub(super) unfreeze: Vec<RawUnlock>,
}

/// `train.vision` and its like, where the module is not frozen.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "`frozen` or a mapping")]
pub(super) struct RawRates {
    /// Peak learning rate, above 0. Required.
    pub(super) lr: Option<f64>,
    /// Decoupled weight decay; norms, biases, token and position tables have none. Default: 0.
    pub(super) weight_decay: f64,
    /// Factor on the rate from each block to the one below it, in `(0, 1]`: what is above the blocks has `lr`, the last
    /// block `lr` times this, embeddings the least. Default: 1.
    pub(super) layer_decay: f64,
    /// Decay of the first and second moment. Default: `optimizer.betas`.
    pub(super) betas: Option<[f64; 2]>,
}

impl Default for RawRates {
    fn default() -> Self {
        Self { lr: None, weight_decay: 0.0, layer_decay: 1.0, betas: None }
    }
}

/// `train.rules[]`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawRule {
    /// The part. Required.
    pub(super) r#match: Option<Selector>,
    /// `frozen` or rates. Required.
    pub(super) train: Option<RawModule>,
}

/// `train.unfreeze[]`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawUnlock {
    /// When: after so many steps (`1200`), tokens (`2e9 tokens`), or a share of the stage (`30%`). Required.
    pub(super) at: Option<RawAmount>,
    /// One part or a list of them. What of them is trained already stays as it is. Required.
    pub(super) r#match: Option<RawList<Selector>>,
    /// As `train.vision.lr`. Required.
    pub(super) lr: Option<f64>,
    /// As `train.vision.weight_decay`. Default: 0.
    pub(super) weight_decay: f64,
    /// As `train.vision.layer_decay`. Default: 1.
    pub(super) layer_decay: f64,
    /// As `train.vision.betas`. Default: `optimizer.betas`.
    pub(super) betas: Option<[f64; 2]>,
    /// For how long their rates rise from 0 then, on top of the schedule; as `at`. Default: `0`.
    pub(super) warmup: RawAmount,
}

impl Default for RawUnlock {
    fn default() -> Self {
        let RawRates { lr, weight_decay, layer_decay, betas } = RawRates::default();
        Self { at: None, r#match: None, lr, weight_decay, layer_decay, betas, warmup: RawAmount::Count(0) }
    }
}

/// `optimizer`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawOptimizer {
    /// Decay of the first and second moment, each in `[0, 1)`, of what says none itself. Default: `[0.9, 0.95]`.
    pub(super) betas: [f64; 2],
    /// Added to the denominator, above 0. Default: 1e-8.
    pub(super) eps: f64,
    /// Largest global gradient norm, above 0; `null`: no clipping. Default: 1.0.
    pub(super) clip_norm: Option<f64>,
    /// Moving averages of parameters. Default: none.
    pub(super) ema: Option<RawEma>,
}

impl Default for RawOptimizer {
    fn default() -> Self {
        Self { betas: [0.9, 0.95], eps: 1e-8, clip_norm: Some(1.0), ema: None }
    }
}

/// `optimizer.ema`. After each update the average is `d` times itself and `1 - d` times the parameter, `d` the smaller
/// of `decay` and `(1 + n) / (10 + n)` after `n` updates. Evaluation and exports have the averages in place of the
/// parameters; training, also of a later stage, goes on from the parameters. They take 4 bytes a parameter, shared
/// among ranks as moments are.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawEma {
    /// How much of the average stays, above 0 and below 1. Default: 0.999.
    pub(super) decay: f64,
    /// One trained module or a list of them. Required.
    pub(super) modules: Option<RawList<Module>>,
}

impl Default for RawEma {
    fn default() -> Self {
        Self { decay: 0.999, modules: None }
    }
}

/// `schedule`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawSchedule {
    /// Curve after the warm-up: `cosine`, `constant`, `linear`, `wsd` (constant, then a line down over `decay`) or
    /// `inverse_sqrt` (the root of the warm-up over what is done). Default: `cosine`.
    #[schemars(schema_with = "words::<ScheduleKind>")]
    pub(super) kind: ScheduleKind,
    /// Optimizer steps of the stage. Exactly one of `steps` and `tokens` is required.
    pub(super) steps: Option<u64>,
    /// Tokens of the stage, image tokens included; it ends with the step that reaches them.
    pub(super) tokens: Option<u64>,
    /// Linear warm-up, in steps or tokens, as the length is given (`5`), or as a share of it, rounded (`10%`).
    /// Default: `3%`.
    pub(super) warmup: RawAmount,
    /// How long `wsd` decays at the end, as `warmup`. Default: `20%` with `wsd`.
    pub(super) decay: Option<RawAmount>,
    /// Share of the peak rate that `cosine`, `linear` and `wsd` end at, and below which `inverse_sqrt` does not fall, in
    /// `[0, 1]`. Default: 0.1.
    pub(super) min_ratio: f64,
    /// A search that multiplies all rates by what it finds. Default: none.
    pub(super) ada_lrs: Option<RawAdaLrs>,
    /// Ends the stage before its length where the held-out loss falls no more. Default: none.
    pub(super) early_stop: Option<RawEarlyStop>,
}

impl Default for RawSchedule {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Cosine,
            steps: None,
            tokens: None,
            warmup: RawAmount::Percent(3.0),
            decay: None,
            min_ratio: 0.1,
            ada_lrs: None,
            early_stop: None,
        }
    }
}

/// `schedule.early_stop`. The weights of the last step are handed over and exported; with `checkpoint.keep_best` those of
/// the best one are kept, and `init.from` takes such a checkpoint.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawEarlyStop {
    /// So many evaluations one after the other in which the held-out loss over all sources is not below the lowest one
    /// before them, at least 1. Required.
    pub(super) patience: Option<usize>,
    /// How far below it must be, not negative. Default: 0.
    pub(super) min_delta: f64,
}

/// `schedule.ada_lrs`. After the warm-up a window of steps is made, and once more from the same weights on the same data
/// with all rates times `max(lambda^t alpha, 1)`, t trials after the first. Where the loss falls faster by more than twice
/// the error of that, the steps of the trial stay, and its rate. Slower by as much: neither stay, nor do windows before them
/// that were left at the old rate, and all is made anew at that rate over `max(lambda^t beta, 1)`. Else those before it
/// stay, at the old rate. It ends when the first factor is 1.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawAdaLrs {
    /// Steps of a window, at least 3. Default: 50.
    pub(super) window: usize,
    /// How far up, a whole number above 1. Default: 2.
    pub(super) alpha: u32,
    /// How far down, a whole number above 1 that has no divisor in common with `alpha`. Default: 3.
    pub(super) beta: u32,
    /// How fast both shrink, between 0 and 1. Default: 0.9.
    pub(super) lambda: f64,
}

impl Default for RawAdaLrs {
    fn default() -> Self {
        Self { window: 50, alpha: 2, beta: 3, lambda: 0.9 }
    }
}
