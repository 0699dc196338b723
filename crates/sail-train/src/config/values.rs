//! The words that may stand in a configuration file, as types.
//!
//! Shared by the file's form (`raw.rs`) and the resolved [`Plan`](super::Plan), so that both print and read alike.
//! Nothing here knows a default.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use sail_model::weights::ModelRef;
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use tch::{Device, Kind};

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

/// Where a server listens: `HOST:PORT`, or a port of this machine alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Listen(pub SocketAddr);

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let full = if text.contains(':') { text.to_owned() } else { format!("127.0.0.1:{text}") };
        let mut found = full
            .to_socket_addrs()
            .map_err(|error| format!("{error}; write PORT, or HOST:PORT as in `0.0.0.0:8265`"))?;
        found.next().map(Self).ok_or_else(|| format!("`{text}` has no address"))
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl Visitor<'_> for Words {
            type Value = Listen;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address and a port like `127.0.0.1:9464`, or a port like `9464`")
            }

            fn visit_u64<E: Error>(self, port: u64) -> Result<Listen, E> {
                self.visit_str(&port.to_string())
                    .map_err(|_: E| E::invalid_value(Unexpected::Unsigned(port), &Self))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Listen, E> {
                // A port that the system chooses is one that no scraper knows.
                let known = text.parse::<Listen>().ok().filter(|Listen(address)| address.port() > 0);
                known.ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_any(Words)
    }
}

/// Which blocks of a module are computed again in the backward pass: `none`, `block` (all) or `every N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub enum Recompute {
    /// None: all activations are kept.
    #[default]
    None,
    /// All.
    Block,
    /// The first one of each so many blocks, at least 2.
    Every(usize),
}

impl Recompute {
    /// Whether the block of this number, from 0, is one of them.
    pub fn includes(self, block: usize) -> bool {
        match self {
            Self::None => false,
            Self::Block => true,
            Self::Every(blocks) => block.is_multiple_of(blocks),
        }
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Block => f.write_str("block"),
            Self::Every(blocks) => write!(f, "every {blocks}"),
        }
    }
}

impl<'de> Deserialize<'de> for Recompute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl Visitor<'_> for Words {
            type Value = Recompute;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`none`, `block` or `every N` with N at least 2")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Recompute, E> {
                let every = || text.strip_prefix("every ")?.parse().ok().filter(|blocks| *blocks >= 2);
                match text {
                    "none" => Ok(Recompute::None),
                    "block" => Ok(Recompute::Block),
                    _ => every()
                        .map(Recompute::Every)
                        .ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(Words)
    }
}

impl From<Recompute> for String {
    fn from(recompute: Recompute) -> Self {
        recompute.to_string()
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
    /// 32-bit floats, whose products on CUDA round their factors to TF32 (10 bits of mantissa) for the tensor cores.
    Tf32,
    /// bfloat16.
    Bf16,
}

impl Precision {
    /// Itself, or what `auto` is on a device.
    #[must_use]
    pub fn on(self, device: Device) -> Self {
        match self {
            Self::Auto if device.is_cuda() => Self::Bf16,
            Self::Auto => Self::Fp32,
            chosen => chosen,
        }
    }

    /// The type of tensors.
    pub fn kind(self) -> Kind {
        if self == Self::Bf16 { Kind::BFloat16 } else { Kind::Float }
    }

    /// The word in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fp32 => "fp32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        }
    }
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
    /// A straight line from the peak down to `min_ratio` of it.
    Linear,
    /// Warm-up, stable, decay: the peak, and for the last part of the stage a line down to `min_ratio` of it.
    Wsd,
    /// The peak times the root of the warm-up over what is done, at least `min_ratio` of it.
    InverseSqrt,
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

/// Rates of what is trained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Peak learning rate, above 0.
    pub lr: f64,
    /// Decoupled weight decay of matrices, at least 0.
    pub weight_decay: f64,
    /// Decay of the first and second moment, each in `[0, 1)`.
    pub betas: [f64; 2],
    /// Factor on the rate from each block to the one below it, in `(0, 1]`.
    pub layer_decay: f64,
}

/// What happens to a part of the model: the word `frozen`, or its rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "WrittenModulePlan", into = "WrittenModulePlan")]
pub enum ModulePlan {
    /// No gradient, no optimizer state, bit-equal afterwards.
    Frozen,
    /// Updated by `AdamW`.
    Train(Rates),
}

impl ModulePlan {
    /// Whether it changes.
    pub fn is_trained(&self) -> bool {
        matches!(self, Self::Train(_))
    }
}

/// [`ModulePlan`] as it is written: a word or a mapping, without a tag.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum WrittenModulePlan {
    Word(FrozenWord),
    Rates(Rates),
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
            WrittenModulePlan::Rates(rates) => Self::Train(rates),
        }
    }
}

impl From<ModulePlan> for WrittenModulePlan {
    fn from(plan: ModulePlan) -> Self {
        match plan {
            ModulePlan::Frozen => Self::Word(FrozenWord::Frozen),
            ModulePlan::Train(rates) => Self::Rates(rates),
        }
    }
}

/// How far a stage has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done.
    pub steps: u64,
    /// Tokens trained on, image tokens included.
    pub tokens: u64,
}

/// A number of steps or of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Amount {
    /// Optimizer steps.
    Steps(u64),
    /// Tokens, image tokens included.
    Tokens(u64),
}

impl Amount {
    /// Its number, whatever it counts.
    pub fn count(self) -> u64 {
        let (Self::Steps(count) | Self::Tokens(count)) = self;
        count
    }

    /// What of `progress` it counts.
    pub fn of(self, progress: Progress) -> u64 {
        match self {
            Self::Steps(_) => progress.steps,
            Self::Tokens(_) => progress.tokens,
        }
    }

    /// Whether a stage has come so far.
    pub fn is_reached(self, progress: Progress) -> bool {
        self.of(progress) >= self.count()
    }

    /// Whether both count the same thing.
    pub fn has_unit_of(self, other: Self) -> bool {
        matches!((self, other), (Self::Steps(_), Self::Steps(_)) | (Self::Tokens(_), Self::Tokens(_)))
    }

    /// As many of the same.
    #[must_use]
    pub fn with_count(self, count: u64) -> Self {
        match self {
            Self::Steps(_) => Self::Steps(count),
            Self::Tokens(_) => Self::Tokens(count),
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Steps(1) => f.write_str("1 step"),
            Self::Steps(count) => write!(f, "{count} steps"),
            Self::Tokens(count) => write!(f, "{count} tokens"),
        }
    }
}

/// An [`Amount`] as it is written in one value: `1200` or `2000000 tokens`.
pub(super) mod amount_as_text {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Amount, tokens};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Written {
        Steps(u64),
        Tokens(String),
    }

    pub(in crate::config) fn serialize<S: Serializer>(amount: &Amount, to: S) -> Result<S::Ok, S::Error> {
        match *amount {
            Amount::Steps(count) => Written::Steps(count),
            Amount::Tokens(count) => Written::Tokens(format!("{count} tokens")),
        }
        .serialize(to)
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Amount, D::Error> {
        match Written::deserialize(from)? {
            Written::Steps(count) => Ok(Amount::Steps(count)),
            Written::Tokens(text) => {
                tokens(&text).map(Amount::Tokens).ok_or_else(|| D::Error::custom("no number of tokens"))
            }
        }
    }
}

/// `2000000 tokens`, `2_000_000 tokens` or `2e6 tokens`.
pub(super) fn tokens(text: &str) -> Option<u64> {
    let number = text.strip_suffix("tokens")?.trim();
    let digits = number.replace('_', "").parse::<u64>().ok();
    digits.or_else(|| whole(number.parse().ok()?))
}

/// A float that is a whole number from 0, and every one below it as well.
pub(super) fn whole(value: f64) -> Option<u64> {
    const EXACT: f64 = (1u64 << 53) as f64;
    (value.fract() == 0.0 && (0.0..EXACT).contains(&value)).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_ports_or_hosts_with_ports() {
        let parsed = |text: &str| text.parse::<Listen>().map(|Listen(address)| address.to_string());
        assert_eq!(parsed("8265").unwrap(), "127.0.0.1:8265");
        assert_eq!(parsed("0.0.0.0:80").unwrap(), "0.0.0.0:80");
        assert_eq!(parsed("[::1]:80").unwrap(), "[::1]:80");
        for wrong in ["", "host", "127.0.0.1:", "70000", "127.0.0.1:port"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
