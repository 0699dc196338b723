//! The resolved configuration of one stage: every default filled in, every derived number computed.
//!
//! Nothing here is "unset": an `Option` means that something is not wanted. A plan serialises to the form a
//! configuration file has, so what is written to the run folder can be given to `--config` again.
//! Made by [`load`](super::load) only; hashing and comparing live in `identity.rs`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use sail_data::SourceSpec;
use serde::{Deserialize, Serialize};

use sail_model::projector::ProjectorConfig;
use sail_model::vision::VitLayout;

use super::plan_data::DataPlan;
use super::select::Selector;
use super::values::{
    Amount, DeviceChoice, GuardAction, Listen, ModelSource, Module, ModulePlan, Precision, Rates, Recompute,
    ReduceDtype, ScheduleKind, Strategy, amount_as_text,
};

/// Everything one stage needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Name, folder, seed and machine.
    pub run: RunPlan,
    /// Shapes and first weights of the three modules.
    pub model: ModelPlan,
    /// What the run starts from instead of `model.*.from`, where it continues an earlier one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitPlan>,
    /// What each module does in this stage.
    pub train: TrainPlan,
    /// `AdamW` and clipping.
    pub optimizer: OptimizerPlan,
    /// Length and learning rate curve.
    pub schedule: SchedulePlan,
    /// Size of a step.
    pub batch: BatchPlan,
    /// The training stream.
    pub data: DataPlan,
    /// How ranks work together.
    pub parallel: ParallelPlan,
    /// When checkpoints are written and kept.
    pub checkpoint: CheckpointPlan,
    /// What happens to steps that would do harm.
    pub guard: GuardPlan,
    /// When a step is reported.
    pub log: LogPlan,
    /// When a process says what it is in, and when it ends because nothing goes on.
    pub watchdog: WatchdogPlan,
    /// Held-out evaluation, where wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalPlan>,
    /// What is exported at the end, where wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<ExportPlan>,
}

impl Plan {
    /// What the ranks share in equal parts: their number must divide each of these.
    pub fn shared_in_parts(&self) -> [(&'static str, usize); 2] {
        [("data.streams", self.data.streams), ("batch.packs_per_step", self.batch.packs_per_step)]
    }
}

/// Name, folder, seed and machine of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunPlan {
    /// Shown in logs.
    pub name: String,
    /// The run's folder, with `run.root` already in front.
    pub dir: PathBuf,
    /// Seed of the random weights and of the data order.
    pub seed: u64,
    /// Where tensors live.
    pub device: DeviceChoice,
    /// The dtype of the forward pass.
    pub precision: Precision,
    /// How long the process may run, seconds; `None`: as the scheduler says, or for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit_secs: Option<u64>,
    /// How long before the end of that time, or of the scheduler's, the run saves and stops, seconds.
    pub time_margin_secs: u64,
}

/// Shapes and first weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelPlan {
    /// The vision encoder.
    pub vision: VisionPlan,
    /// The connector.
    pub projector: ProjectorConfig,
    /// The language model.
    pub llm: LlmPlan,
}

/// The vision encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VisionPlan {
    /// Shape and first weights.
    #[serde(flatten)]
    pub source: ModelSource,
    /// Side of the square tiles it sees, pixels.
    pub image_px: usize,
}

/// The language model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlmPlan {
    /// Shape and first weights.
    #[serde(flatten)]
    pub source: ModelSource,
    /// The `tokenizer.json`; `None`: the one that the hub has beside the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
}

/// What a run starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InitPlan {
    /// A finished run's folder or a checkpoint; it need not exist before the run starts.
    pub from: PathBuf,
}

/// What each part of the model does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainPlan {
    /// The vision encoder.
    pub vision: ModulePlan,
    /// The connector.
    pub projector: ModulePlan,
    /// The language model.
    pub llm: ModulePlan,
    /// Parts that do something else than their module; the first that names a parameter decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RulePlan>,
    /// Parts that are trained from a point of the stage on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unfreeze: Vec<UnlockPlan>,
}

impl TrainPlan {
    /// Of these modules, without parts that differ from theirs.
    pub fn of(vision: ModulePlan, projector: ModulePlan, llm: ModulePlan) -> Self {
        Self { vision, projector, llm, rules: Vec::new(), unfreeze: Vec::new() }
    }

    /// The plan of one module.
    pub fn get(&self, module: Module) -> &ModulePlan {
        match module {
            Module::Vision => &self.vision,
            Module::Projector => &self.projector,
            Module::Llm => &self.llm,
        }
    }

    /// Every module with its plan, in [`Module::ALL`]'s order.
    pub fn iter(&self) -> impl Iterator<Item = (Module, &ModulePlan)> {
        Module::ALL.into_iter().map(|module| (module, self.get(module)))
    }

    /// The same of a stage that has passed the unlock points of these indices and comes to no other.
    #[must_use]
    pub fn after<'a>(&self, passed: impl IntoIterator<Item = &'a usize>) -> Self {
        let unfreeze = passed.into_iter().map(|&index| self.unfreeze[index].clone()).collect();
        Self { unfreeze, ..self.clone() }
    }

    /// Whether something of a module may be trained at some point of the stage.
    pub fn ever_trains(&self, module: Module) -> bool {
        let by_rule = self.rules.iter().any(|rule| rule.part.module == module && rule.train.is_trained());
        let later = self.unfreeze.iter().flat_map(|unlock| &unlock.parts).any(|part| part.module == module);
        self.get(module).is_trained() || by_rule || later
    }
}

/// A part of a module that does something else than the rest of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RulePlan {
    /// The part.
    #[serde(rename = "match")]
    pub part: Selector,
    /// What it does.
    pub train: ModulePlan,
}

/// A point of a stage from which on something is trained that was frozen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnlockPlan {
    /// How far the stage has come then, more than nothing.
    #[serde(with = "amount_as_text")]
    pub at: Amount,
    /// Parts of the model; what of them is trained already stays as it is.
    #[serde(rename = "match")]
    pub parts: Vec<Selector>,
    /// Their rates.
    #[serde(flatten)]
    pub rates: Rates,
    /// Steps or tokens from then on in which their rates rise from 0, on top of the schedule.
    #[serde(with = "amount_as_text")]
    pub warmup: Amount,
}

/// `AdamW` and clipping; rates, weight decay and betas are per module, in [`TrainPlan`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerPlan {
    /// Added to the denominator, above 0.
    pub eps: f64,
    /// Largest global gradient norm; `None`: gradients are not clipped.
    pub clip_norm: Option<f64>,
    /// Moving averages of parameters, where there are some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaPlan>,
}

/// Moving averages of parameters, which evaluation and exports use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmaPlan {
    /// How much of the average stays after many updates, above 0 and below 1.
    pub decay: f64,
    /// Of all that is trained of these.
    pub modules: BTreeSet<Module>,
}

impl EmaPlan {
    /// How much of the average stays after `updates` of them: little at first, so that it does not hold on to where
    /// training began (as `ExponentialMovingAverage` of TensorFlow with `num_updates`).
    pub fn decay_of(&self, updates: u64) -> f64 {
        let updates = updates as f64;
        self.decay.min((1.0 + updates) / (10.0 + updates))
    }
}

/// Length and learning rate curve. All amounts are in what the length is given in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SchedulePlan {
    /// The curve after the warm-up.
    pub kind: ScheduleKind,
    /// The stage ends with the first step that reaches this, at least 1.
    #[serde(flatten)]
    pub length: Amount,
    /// Linear warm-up, at most the length.
    pub warmup: u64,
    /// How long `wsd` decays at the end; `None` for other curves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<u64>,
    /// Share of the peak rate below which no curve falls, in `[0, 1]`.
    pub min_ratio: f64,
    /// A search for the rate, where wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ada_lrs: Option<AdaLrsPlan>,
    /// What ends the stage before its length, where there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stop: Option<EarlyStopPlan>,
}

/// When the held-out loss falls no more.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopPlan {
    /// Evaluations one after the other without a new lowest loss, at least 1.
    pub patience: usize,
    /// How far below the lowest one a new one must be, not negative.
    pub min_delta: f64,
}

impl EarlyStopPlan {
    /// Whether a stage with these held-out losses, in the order of their steps, is to end.
    pub fn is_reached(&self, losses: impl IntoIterator<Item = f64>) -> bool {
        let (mut lowest, mut since) = (f64::INFINITY, 0);
        for loss in losses {
            if loss < lowest - self.min_delta || lowest.is_infinite() {
                (lowest, since) = (loss, 0);
            } else {
                since += 1;
            }
        }
        since >= self.patience
    }
}

/// A line search on the slope of the loss, see [`crate::ada_lrs`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdaLrsPlan {
    /// Steps of a window, at least 3.
    pub window: usize,
    /// How far up, above 1.
    pub alpha: u32,
    /// How far down, above 1, co-prime with `alpha`.
    pub beta: u32,
    /// How fast both shrink, in `(0, 1)`.
    pub lambda: f64,
}

/// Size of a step. A pack is the micro-batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchPlan {
    /// Most tokens in a pack, image tokens included.
    pub tokens_per_pack: usize,
    /// Packs whose gradients are summed for one optimizer step.
    pub packs_per_step: usize,
    /// Most images that a frozen vision encoder sees in one forward pass, if one pack has not more.
    #[serde(default = "BatchPlan::one_pack")]
    pub vision_images: usize,
    /// What is computed twice to save memory.
    #[serde(default)]
    pub recompute: RecomputePlan,
}

impl BatchPlan {
    /// `vision_images` where a plan is older than that.
    fn one_pack() -> usize {
        1
    }
}

/// Which transformer blocks of a module are computed again in the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecomputePlan {
    /// Of the vision encoder.
    pub vision: Recompute,
    /// Of the language model.
    pub llm: Recompute,
}

impl RecomputePlan {
    /// Those of a module; the projector has no blocks.
    pub fn of(self, module: Module) -> Recompute {
        match module {
            Module::Vision => self.vision,
            Module::Projector => Recompute::None,
            Module::Llm => self.llm,
        }
    }

    /// Those among `blocks`, named as the parameters in them begin and each module's in their order.
    pub fn blocks(self, blocks: &[String]) -> BTreeSet<String> {
        let of = |module: Module| {
            let prefix = format!("{module}.");
            let of_module = blocks.iter().filter(move |block| block.starts_with(&prefix));
            of_module
                .enumerate()
                .filter(move |(i, _)| self.of(module).includes(*i))
                .map(|(_, block)| block.clone())
        };
        Module::ALL.into_iter().flat_map(of).collect()
    }
}

/// How ranks work together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParallelPlan {
    /// What they share.
    pub strategy: Strategy,
    /// The dtype in which gradients travel.
    pub reduce: ReduceDtype,
    /// Most gradients that travel together, MiB in fp32, at least 1.
    pub bucket_mb: usize,
    /// How long a rank may be behind the others, seconds, at least 1.
    pub timeout_secs: u64,
    /// The same until the first step of a stage is done.
    pub first_step_timeout_secs: u64,
}

impl ParallelPlan {
    /// Most gradients that travel together, fp32 elements.
    pub fn bucket_elements(&self) -> i64 {
        (self.bucket_mb << 20) as i64 / 4
    }
}

/// When checkpoints are written and kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointPlan {
    /// Steps between checkpoints; `None`: only at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Newest checkpoints that are kept, at least 1.
    pub keep_last: usize,
    /// Checkpoints of every multiple of this step are kept; `None`: only for being new or good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<u64>,
    /// Checkpoints with the lowest held-out loss that are kept; `None`: none for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_best: Option<usize>,
    /// Saves that may fail one after the other without ending the run.
    pub max_failures: u32,
    /// How long a save may take where it is waited for, seconds.
    pub timeout_secs: u64,
}

/// What happens to steps that would do harm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuardPlan {
    /// Where the loss or the gradient is not a number.
    pub not_finite: GuardAction,
    /// Where the loss is far above those before; `None`: such steps are made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spike: Option<GuardAction>,
    /// How far, in robust standard deviations.
    pub spike_z: f64,
    /// Steps before, at least 2.
    pub window: usize,
    /// Steps in a window that may be skipped or rolled back.
    pub max_trips: usize,
    /// Whether the first step of a stage is looked at parameter by parameter.
    pub self_check: bool,
}

impl GuardPlan {
    /// Whether there is something that puts a run back.
    pub fn rolls_back(&self) -> bool {
        self.not_finite == GuardAction::Rollback || self.spike == Some(GuardAction::Rollback)
    }
}

/// When a step is reported, and where to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogPlan {
    /// Steps between reports, at least 1.
    pub every: u64,
    /// The longest time between two plain lines, at least 1.
    #[serde(default = "LogPlan::usual_line_secs")]
    pub line_secs: u64,
    /// What a device computes at most, TFLOP/s, where that is said and not looked up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_tflops: Option<f64>,
    /// Whether there is an event file of TensorBoard.
    #[serde(default = "LogPlan::by_default")]
    pub tensorboard: bool,
    /// Where Prometheus finds the figures, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<Listen>,
    /// The MLflow server, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mlflow: Option<MlflowPlan>,
}

impl LogPlan {
    /// `line_secs` where a plan is older than that.
    fn usual_line_secs() -> u64 {
        60
    }

    /// `tensorboard` where a plan is older than that.
    fn by_default() -> bool {
        true
    }
}

/// An MLflow server that keeps the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MlflowPlan {
    /// Without a slash at its end.
    pub url: String,
    /// Name of the experiment, not empty.
    pub experiment: String,
    /// How long the run may wait for the server at its end, seconds.
    pub flush_secs: u64,
    /// Whether the exported encoder goes there.
    pub model: bool,
}

/// When a process says what it is in, and when it ends because nothing goes on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WatchdogPlan {
    /// How many times the usual time of a step is far too long, at least 1.
    pub factor: f64,
    /// What is not too long whatever is usual, seconds, at least 1.
    pub least_secs: u64,
    /// How long nothing may go on, seconds, more than `least_secs`.
    pub limit_secs: u64,
}

/// Held-out evaluation. It always runs before the first and after the last step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalPlan {
    /// Steps between evaluations in between; `None`: none in between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Samples per source the loss is measured on, at least 1.
    pub samples: usize,
    /// Samples per source whose answer is generated and printed.
    pub generate: usize,
    /// Longest generated answer, tokens.
    pub max_new_tokens: usize,
    /// Held-out shards, at least one source.
    pub sources: Vec<SourceSpec>,
}

/// What is exported at the end of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportPlan {
    /// Layout of the vision encoder.
    pub vit: VitLayout,
}
