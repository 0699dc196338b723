//! The words that may stand in a configuration file, as types.
//!
//! Shared by the file's form (`raw.rs`) and the resolved [`Plan`](super::Plan), so that both print and read alike.
//! Nothing here knows a default.

use std::fmt;
use std::str::FromStr;

use sail_model::weights::ModelRef;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A part of the model that is trained or frozen as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Module {
    /// The vision encoder.
    Vision,
    /// The connector between the vision encoder and the language model.
    Projector,
    /// The language model.
    Llm,
}

impl Module {
    /// Every module, in the order data flows through them.
    pub const ALL: [Self; 3] = [Self::Vision, Self::Projector, Self::Llm];

    /// The name in files, messages and parameter prefixes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Projector => "projector",
            Self::Llm => "llm",
        }
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How visual tokens are spread over the packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisualBalance {
    /// Each pack has the share that its stream had so far.
    Mean,
    /// As it comes.
    Off,
}

/// Where tensors live: `auto`, `cpu`, `cuda` (the first one) or `cuda:N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first CUDA device where there is one, otherwise the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its index.
    Cuda(usize),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(|index| index.parse().ok()).map(Self::Cuda),
        };
        parsed.ok_or_else(|| format!("unknown device `{text}`, expected `auto`, `cpu`, `cuda` or `cuda:N`"))
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(device: DeviceChoice) -> Self {
        device.to_string()
    }
}

/// The dtype the forward pass computes in; masters and moments are always fp32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// bf16 on CUDA, fp32 on the CPU.
    Auto,
    /// 32-bit floats.
    Fp32,
    /// bfloat16.
    Bf16,
}

/// What the ranks share of what training needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Every rank has everything; gradients are summed by all-reduce.
    Ddp,
    /// Each rank keeps and updates its part of the masters and moments.
    Zero1,
    /// As `zero1`, and each rank keeps only its part of the summed gradients.
    Zero2,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Self; 3] = [Self::Ddp, Self::Zero1, Self::Zero2];

    /// The word in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddp => "ddp",
            Self::Zero1 => "zero1",
            Self::Zero2 => "zero2",
        }
    }
}

/// The dtype in which gradients travel between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceDtype {
    /// 32-bit floats.
    Fp32,
    /// bfloat16: half the bytes, summed in bfloat16.
    Bf16,
}

/// What is done instead of a step that would do harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardAction {
    /// The step passes without an update; its samples are not trained on.
    Skip,
    /// The run saves as it is before the step, and ends.
    Stop,
    /// Weights and moments become those of the newest checkpoint, and training goes on with the data that follows.
    Rollback,
}

/// The curve of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Half a cosine from the peak down to `min_ratio` of it.
    Cosine,
    /// The peak until the end.
    Constant,
}

/// Where a model's shape and first weights come from; exactly one of the two keys is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// A folder with `config.json` and safetensors files, or a model on a hub.
    From(ModelRef),
    /// Random weights from `run.seed`. The mapping is the family's own `config.json`, with `model_type`; the model
    /// crate validates the rest of it.
    Random(Value),
}

/// What happens to a module in a stage: the word `frozen`, or its rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "WrittenModulePlan", into = "WrittenModulePlan")]
pub enum ModulePlan {
    /// No gradient, no optimizer state, bit-equal afterwards.
    Frozen,
    /// Updated by `AdamW`.
    Train {
        /// Peak learning rate, above 0.
        lr: f64,
        /// Decoupled weight decay, at least 0.
        weight_decay: f64,
    },
}

impl ModulePlan {
    /// Whether the module changes in this stage.
    pub fn is_trained(&self) -> bool {
        matches!(self, Self::Train { .. })
    }
}

/// [`ModulePlan`] as it is written: a word or a mapping, without a tag.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum WrittenModulePlan {
    Word(FrozenWord),
    Rates { lr: f64, weight_decay: f64 },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FrozenWord {
    Frozen,
}

impl From<WrittenModulePlan> for ModulePlan {
    fn from(written: WrittenModulePlan) -> Self {
        match written {
            WrittenModulePlan::Word(FrozenWord::Frozen) => Self::Frozen,
            WrittenModulePlan::Rates { lr, weight_decay } => Self::Train { lr, weight_decay },
        }
    }
}

impl From<ModulePlan> for WrittenModulePlan {
    fn from(plan: ModulePlan) -> Self {
        match plan {
            ModulePlan::Frozen => Self::Word(FrozenWord::Frozen),
            ModulePlan::Train { lr, weight_decay } => Self::Rates { lr, weight_decay },
        }
    }
}
