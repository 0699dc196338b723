//! The form of a stage's file: every field there is, its meaning and its default. This is the reference manual.
//!
//! Fields that have no default are optional here, so that a file can be read to the end whatever is missing;
//! `resolve.rs` reports what is. Paths are relative to the working folder unless said otherwise.

use std::path::PathBuf;

use sail_model::projector::ProjectorKind;
use sail_model::vision::VitLayout;
use sail_model::weights::ModelRef;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::raw_data::{RawData, RawSource};
use super::raw_train::{RawOptimizer, RawSchedule, RawTrain};
use super::schema::{words, words_or_null};
use super::values::{DeviceChoice, GuardAction, Listen, Precision, Recompute, ReduceDtype, Strategy};

/// A stage. Besides these fields a file may say `extends: FILE` (relative to itself): that file's values come first,
/// mappings are merged key by key, everything else is replaced.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawRun {
    /// Name, folder, seed and machine.
    pub(super) run: RawRunSection,
    /// Shapes and first weights of the three modules.
    pub(super) model: RawModel,
    /// What to go on from, instead of the weights `model` names. Default: nothing.
    pub(super) init: Option<RawInit>,
    /// What each module does. Every module must be named, at least one must be trained.
    pub(super) train: RawTrain,
    /// `AdamW`, clipping, moving averages.
    pub(super) optimizer: RawOptimizer,
    /// Length, learning rate curve, search for a rate, early stop.
    pub(super) schedule: RawSchedule,
    /// Size of a step.
    pub(super) batch: RawBatch,
    /// The training stream.
    pub(super) data: RawData,
    /// How ranks work together, where there are several.
    pub(super) parallel: RawParallel,
    /// When checkpoints are written and kept. There is always one at the end.
    pub(super) checkpoint: RawCheckpoint,
    /// What happens to steps that would do harm. Each is written to `trips.jsonl` in the run's folder.
    pub(super) guard: RawGuard,
    /// When a step is reported.
    pub(super) log: RawLog,
    /// When a process says what it is in, and when it ends because nothing goes on.
    pub(super) watchdog: RawWatchdog,
    /// Held-out evaluation. Default: none.
    pub(super) eval: Option<RawEval>,
    /// What is exported at the end. Default: nothing.
    pub(super) export: Option<RawExport>,
}

/// `run`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawRunSection {
    /// Name in logs. Required.
    pub(super) name: Option<String>,
    /// The run's folder. Required.
    pub(super) dir: Option<PathBuf>,
    /// Put in front of `run.dir` and `init.from` where these are relative; one override moves a whole curriculum.
    /// Default: the working folder.
    pub(super) root: PathBuf,
    /// Seed of random weights and of the data order. Default: 42.
    pub(super) seed: u64,
    /// `auto` (the CUDA device of the rank's place on its host, or the CPU), `cpu`, and in a single process `cuda` or
    /// `cuda:N`. Default: `auto`.
    #[schemars(with = "String")]
    pub(super) device: DeviceChoice,
    /// Dtype of the forward pass: `auto` (bf16 on CUDA, fp32 on the CPU), `fp32`, `bf16`, or on CUDA `tf32` (fp32, with
    /// factors of matrix products rounded to 10 bits of mantissa). Default: `auto`.
    #[schemars(schema_with = "words::<Precision>")]
    pub(super) precision: Precision,
    /// How long the process may run, seconds: the run saves and stops with exit code 3 before. Default: until the end
    /// of a Slurm job (`SLURM_JOB_END_TIME`), elsewhere for ever.
    pub(super) time_limit_secs: Option<u64>,
    /// How long before that end, seconds; the longest evaluation, a step and a save must fit into it. Default: 300.
    pub(super) time_margin_secs: u64,
}

impl Default for RawRunSection {
    fn default() -> Self {
        Self {
            name: None,
            dir: None,
            root: PathBuf::new(),
            seed: 42,
            device: DeviceChoice::Auto,
            precision: Precision::Auto,
            time_limit_secs: None,
            time_margin_secs: 300,
        }
    }
}

/// `model`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawModel {
    /// The vision encoder.
    pub(super) vision: RawVision,
    /// The connector.
    pub(super) projector: RawProjector,
    /// The language model.
    pub(super) llm: RawLlm,
}

/// `model.vision`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawVision {
    /// Folder with `config.json` and safetensors files, or `hf:org/name[@revision]` for a model that is fetched from a
    /// Hugging Face hub, see `model.llm`. Exactly one of `from` and `random` is required.
    #[schemars(with = "Option<String>")]
    pub(super) from: Option<ModelRef>,
    /// Random weights; the keys are those of the family's `config.json`, `model_type` among them.
    pub(super) random: Option<Value>,
    /// Side of the square tiles the encoder sees, pixels; a multiple of patch size x `model.projector.merge`. Required.
    pub(super) image_px: Option<usize>,
}

/// `model.projector`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawProjector {
    /// `pixel_shuffle` (merges patches, then layer norm, linear, GELU, linear), or without merging `mlp` (linear, GELU,
    /// linear) or `linear`. Default: `pixel_shuffle`.
    #[schemars(schema_with = "words::<ProjectorKind>")]
    pub(super) kind: ProjectorKind,
    /// `merge` x `merge` neighbouring patches become one visual token. Default: 2 for `pixel_shuffle`, else 1.
    pub(super) merge: Option<i64>,
}

impl Default for RawProjector {
    fn default() -> Self {
        Self { kind: ProjectorKind::PixelShuffle, merge: None }
    }
}

/// `model.llm`. `hf:org/name` is the branch `main`, `hf:org/name@revision` another branch, a tag or, best for a run
/// that is to be repeated, a commit. Only safetensors are taken. Files are kept in the cache that Hugging Face tools
/// share; `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HTTPS_PROXY` mean what they do
/// there. Before the first step of a run only `config.json` and `tokenizer.json` are fetched, weights when the stage
/// starts. A hub that refuses connections is an error after 3 s, one that does not answer within 95 s; where the
/// cache has the model, that is taken instead. A download that broke off goes on with the next run.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawLlm {
    /// Folder with `config.json`, `tokenizer.json` and safetensors files, or `hf:org/name[@revision]`. Exactly one of
    /// `from` and `random` is required.
    #[schemars(with = "Option<String>")]
    pub(super) from: Option<ModelRef>,
    /// Random weights; the keys are those of the family's `config.json`, `model_type` among them.
    pub(super) random: Option<Value>,
    /// The `tokenizer.json`. Default: the one in `from`; required with `random`.
    pub(super) tokenizer: Option<PathBuf>,
}

/// `init`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawInit {
    /// A finished run's folder or a checkpoint, perhaps made by an earlier stage. An exported encoder goes into
    /// `model.vision.from` instead. Required.
    pub(super) from: Option<PathBuf>,
}

/// `batch`. A pack is the micro-batch: whole samples, one after the other, attention kept within each.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawBatch {
    /// Most tokens in a pack, image tokens included. Required.
    pub(super) tokens_per_pack: Option<usize>,
    /// Packs whose gradients make up one optimizer step. Required.
    pub(super) packs_per_step: Option<usize>,
    /// Most images (tiles) that a vision encoder which is not trained encodes in one forward pass: those of one pack at
    /// least, and of the packs of a step that follow it while they have no more together. Losses are the same up to rounding, in fp32 on the CPU to the last bit; it helps
    /// where a pack has too few images to keep a device busy, and their features stay until their packs have had their
    /// turn. Default: 32.
    pub(super) vision_images: usize,
    /// What is computed twice to save memory.
    pub(super) recompute: RawRecompute,
}

impl Default for RawBatch {
    fn default() -> Self {
        let recompute = RawRecompute::default();
        Self { tokens_per_pack: None, packs_per_step: None, vision_images: 32, recompute }
    }
}

/// `batch.recompute`. For each module whether its transformer blocks keep what they compute for the backward pass
/// (`none`), compute it again there and keep only what comes in and goes out (`block`), or do so in the first one of
/// each N (`every N`). Losses and weights are the same; memory falls, and time grows by up to a forward pass.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawRecompute {
    /// `none`, `block` or `every N`. Default: `none`.
    #[schemars(with = "String")]
    pub(super) vision: Recompute,
    /// `none`, `block` or `every N`. Default: `none`.
    #[schemars(with = "String")]
    pub(super) llm: Recompute,
}

/// `parallel`. What counts as a rank is said in docs/clusters.md; their number must divide `data.streams` and
/// `batch.packs_per_step`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawParallel {
    /// `ddp` (every rank has everything), `zero1` (each keeps its part of masters and moments) or `zero2` (of the
    /// summed gradients too, which then leave after every micro-batch). Default: `zero1`.
    #[schemars(schema_with = "words::<Strategy>")]
    pub(super) strategy: Strategy,
    /// Dtype in which gradients travel, `fp32` or `bf16`. Default: `fp32`.
    #[schemars(schema_with = "words::<ReduceDtype>")]
    pub(super) reduce: ReduceDtype,
    /// Most gradients that travel together, MiB in fp32; a larger parameter travels alone. Default: 32.
    pub(super) bucket_mb: usize,
    /// A rank that is behind the others for this long ends the run, seconds. Default: 600.
    pub(super) timeout_secs: u64,
    /// The same until the first step of a stage is done, when weights are read and the device warms up, seconds.
    /// Default: 1800.
    pub(super) first_step_timeout_secs: u64,
}

impl Default for RawParallel {
    fn default() -> Self {
        Self {
            strategy: Strategy::Zero1,
            reduce: ReduceDtype::Fp32,
            bucket_mb: 32,
            timeout_secs: 600,
            first_step_timeout_secs: 1800,
        }
    }
}

/// `checkpoint`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawCheckpoint {
    /// Steps between checkpoints. Default: only at the end.
    pub(super) every: Option<u64>,
    /// How many of the newest are kept, at least 1. Default: 2.
    pub(super) keep_last: usize,
    /// Those of every multiple of this step are kept as well; a multiple of `every`. Default: none.
    pub(super) keep_every: Option<u64>,
    /// This many with the lowest held-out loss are kept as well, of those whose step was evaluated. Default: none.
    pub(super) keep_best: Option<usize>,
    /// So many saves may fail one after the other, each with a warning; one more ends the run. The last save of a run
    /// must not fail. Default: 2.
    pub(super) max_failures: u32,
    /// How long a save may take where it is waited for, that is before the next one begins and at the end,
    /// seconds. Default: 3600.
    pub(super) timeout_secs: u64,
}

impl Default for RawCheckpoint {
    fn default() -> Self {
        Self {
            every: None,
            keep_last: 2,
            keep_every: None,
            keep_best: None,
            max_failures: 2,
            timeout_secs: 3600,
        }
    }
}

/// `guard`. What may be done instead of a step: `skip` (the step passes without an update), `rollback` (weights and
/// moments become those of the newest checkpoint, or of the start of the process, and the data that follows is trained
/// on) or `stop` (the run saves as it is before the step, and ends with exit code 1).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawGuard {
    /// Where the loss or the gradient is not a number. Default: `stop`.
    #[schemars(schema_with = "words::<GuardAction>")]
    pub(super) not_finite: GuardAction,
    /// Where the loss is far above those before. Default: none, such steps are made.
    #[schemars(schema_with = "words_or_null::<GuardAction>")]
    pub(super) spike: Option<GuardAction>,
    /// How far: robust standard deviations (1.4826 times the median absolute deviation) above the median. Default: 8.
    pub(super) spike_z: f64,
    /// Of how many steps before, at least 2; there is no spike before half of them are made. Default: 100.
    pub(super) window: usize,
    /// So many steps may be skipped or rolled back in a window; one more ends the run as `stop` does. A step counts
    /// until the run is a window beyond it, so that no run goes back for ever. Default: 3.
    pub(super) max_trips: usize,
    /// After the first step of a stage, ends the run with a table where a trained parameter has no gradient or did not
    /// change, or a frozen one did. Default: true.
    pub(super) self_check: bool,
}

impl Default for RawGuard {
    fn default() -> Self {
        Self {
            not_finite: GuardAction::Stop,
            spike: None,
            spike_z: 8.0,
            window: 100,
            max_trips: 3,
            self_check: true,
        }
    }
}

/// `log`. Where the figures of a run go besides `metrics.jsonl`: docs/metrics.md.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawLog {
    /// Steps between reports. Default: 10.
    pub(super) every: u64,
    /// Where standard error is no terminal: a step is also reported when none was for so many seconds, and what is no step,
    /// such as an evaluation, when it takes longer. Default: 60.
    pub(super) line_secs: u64,
    /// What a device computes at most in the run's type, without sparsity, TFLOP/s: what model FLOPs utilisation (`mfu`,
    /// docs/profiling.md) is measured against. Default: that of its maker, for GPUs that are known; else there is no `mfu`.
    pub(super) peak_tflops: Option<f64>,
    /// Whether an event file of TensorBoard is kept in `tensorboard/` of the run's folder. Default: true.
    pub(super) tensorboard: bool,
    /// Where Prometheus finds the figures while the run goes on: `ADDRESS:PORT`, or a port of this machine alone
    /// (127.0.0.1). Rank 0 answers. Default: nowhere.
    #[schemars(with = "Option<String>")]
    pub(super) prometheus: Option<Listen>,
    /// An MLflow server that keeps the run as well. Default: none.
    pub(super) mlflow: Option<RawMlflow>,
}

impl Default for RawLog {
    fn default() -> Self {
        Self {
            every: 10,
            line_secs: 60,
            peak_tflops: None,
            tensorboard: true,
            prometheus: None,
            mlflow: None,
        }
    }
}

/// `log.mlflow`. Credentials are read from the environment: `MLFLOW_TRACKING_TOKEN`, or `MLFLOW_TRACKING_USERNAME` and
/// `MLFLOW_TRACKING_PASSWORD`. A server that is slow or gone delays no step.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawMlflow {
    /// The server: `http://HOST:PORT` or `https://HOST`, with its path where it has one. Required.
    pub(super) url: Option<String>,
    /// The experiment, which is made where there is none of this name. Default: `sail`.
    pub(super) experiment: String,
    /// How long the run may wait for the server at its end, seconds; what is not sent by then is told. Default: 60.
    pub(super) flush_secs: u64,
    /// Whether the exported encoder goes to the server as well. Default: true.
    pub(super) model: bool,
}

impl Default for RawMlflow {
    fn default() -> Self {
        Self { url: None, experiment: "sail".to_owned(), flush_secs: 60, model: true }
    }
}

/// `watchdog`. A step that takes far longer than usual is logged with its times and the stacks of all threads, again
/// each time that it has taken twice as long; a process in which nothing goes on ends with exit code 1.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawWatchdog {
    /// A step is far longer than usual from this many times the median of the 50 before it, at least 1. Default: 10.
    pub(super) factor: f64,
    /// And from this many seconds; until 5 steps are made, from `factor` times as many. Default: 60.
    pub(super) least_secs: u64,
    /// After this long within one micro-batch, one pack of an evaluation, one save, one export or the start, the process
    /// ends, seconds; more than `least_secs`. Default: 3600.
    pub(super) limit_secs: u64,
}

impl Default for RawWatchdog {
    fn default() -> Self {
        Self { factor: 10.0, least_secs: 60, limit_secs: 3600 }
    }
}

/// `eval`. It runs before the first step and after the last one, and in between as `every` says.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawEval {
    /// Steps between evaluations. Default: none in between.
    pub(super) every: Option<u64>,
    /// Samples per source whose loss is measured. Default: 64.
    pub(super) samples: usize,
    /// Samples per source whose answer is generated and shown. Default: 4.
    pub(super) generate: usize,
    /// Longest generated answer, tokens. Default: 32.
    pub(super) max_new_tokens: usize,
    /// Held-out shards. At least one source is required.
    pub(super) sources: Option<Vec<RawSource>>,
}

impl Default for RawEval {
    fn default() -> Self {
        Self { every: None, samples: 64, generate: 4, max_new_tokens: 32, sources: None }
    }
}

/// `export`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawExport {
    /// Layout of the vision encoder's files: `transformers`, `sail` (AIMv2 alone) or `original` (that of
    /// the family's own code). Required.
    #[schemars(schema_with = "words_or_null::<VitLayout>")]
    pub(super) vit: Option<VitLayout>,
}

/// A curriculum: stages that run one after the other.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawCurriculum {
    /// Name in logs. Required.
    pub(super) name: Option<String>,
    /// Stage files, relative to this file. At least one.
    pub(super) stages: Vec<PathBuf>,
}
