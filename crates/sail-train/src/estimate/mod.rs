//! What a stage takes on machines that are not here: memory, bytes between ranks, time.
//!
//! From shapes alone: no weights are read and no memory is taken for them. docs/planning.md has the formulas and
//! how they compare with what was measured. Called by `sail-train --dry-run`; [`pass`], its [`flops`] and [`PackFlops`]
//! serve whoever wants to know how much work a pack is.
//!
//! | to find | open |
//! |---|---|
//! | operations of linear maps and attention | [`flops`] |
//! | the models over shapes | `forward`, its operations `ops`, memory and gradients `graph` |
//! | what a rank holds | [`memory`] |
//! | how long collectives take | [`link`] |
//! | a step under each strategy | `step` |
//! | packs as they are made | `packs` |
//! | what a GPU computes at most | [`peak`] |
//! | a stage from its first step to its last | `course` |
//! | the printed tables | `table` |

mod course;
pub mod flops;
mod forward;
mod graph;
pub mod link;
pub mod memory;
mod ops;
mod packs;
pub mod peak;
mod step;
mod table;

use std::collections::BTreeMap;

use sail_model::vlm::{Vlm, VlmConfig};

pub use self::course::{Course, Phase, Work};
pub use self::forward::{PackShape, Pass, pass};
pub use self::graph::{Backend, Live};
use self::link::Cluster;
use self::memory::Memory;
pub use self::packs::PackFlops;
use self::step::Steps;
pub use self::step::StrategyEstimate;
pub use self::table::Tables;
use crate::config::{DeviceChoice, Module, Plan, Precision, Strategy};
use crate::error::{Error, Result};
use crate::origin::Folders;
use crate::session::{freeze_plan, model_config, visual_shape};
use crate::stage::module_of;

/// What the packs of a stage hold, where it is known better than from its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackGuess {
    /// Visual tokens of a pack.
    pub visual_tokens: Option<u64>,
    /// Tokens of a sample; else those of the plan's own numbers, and in a pack as many as fit.
    pub sample_tokens: Option<u64>,
    /// Tokens of a pack that are learnt.
    pub answer_tokens: Option<u64>,
}

/// What a stage takes.
#[derive(Clone, Debug, PartialEq)]
pub struct StageEstimate {
    /// `run.name`.
    pub name: String,
    /// The strategy of the plan.
    pub planned: Strategy,
    /// The machines.
    pub cluster: Cluster,
    /// What the model computes with.
    pub backend: Backend,
    /// Parameters of each module.
    pub modules: BTreeMap<Module, Counts>,
    /// What each pack was taken to hold.
    pub pack: PackShape,
    /// Visual tokens of an image.
    pub tokens_per_image: u64,
    /// Packs of each rank in a step.
    pub packs_per_rank: u64,
    /// Its steps and what they take together.
    pub course: Course,
    /// What its features take on disk, where they are kept.
    pub feature_cache: Option<FeatureSpace>,
    /// The passes over one pack.
    pub pass: Pass,
    /// Collectives of gradients a pass, that is buckets.
    pub buckets: usize,
    /// One for each strategy.
    pub strategies: Vec<StrategyEstimate>,
    /// What would keep a run from being so.
    pub warnings: Vec<String>,
}

/// Features of images on disk, bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FeatureSpace {
    /// Of an image, the largest there is.
    pub image_bytes: u64,
    /// Images of the stage, as if none came twice.
    pub images: f64,
    /// Most that is kept.
    pub max_bytes: u64,
}

/// Parameters of a module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Trained at the end of the stage, once all unlock points are passed.
    pub trained: u64,
    /// Never trained.
    pub frozen: u64,
}

impl StageEstimate {
    /// Of a plan. Of models on a hub only config.json is fetched.
    ///
    /// # Errors
    /// [`Error::Preflight`] when a model is not there or not one, or `guess` does not fit into a pack.
    pub fn of_plan(plan: &Plan, cluster: Cluster, guess: &PackGuess) -> Result<Self> {
        let estimate = || {
            let config = model_config(plan, &Folders::for_shapes(plan)?)?;
            Self::new(plan, &config, cluster, guess)
        };
        estimate().map_err(|source| Error::Preflight { run: plan.run.name.clone(), source: Box::new(source) })
    }

    /// Of a plan whose models have this configuration.
    ///
    /// # Errors
    /// As [`StageEstimate::of_plan`].
    pub fn new(plan: &Plan, config: &VlmConfig, cluster: Cluster, guess: &PackGuess) -> Result<Self> {
        let backend = backend(plan);
        let (pack, tokens_per_image) = pack_shape(plan, config, guess)?;
        let model = Vlm::shapes_only(config)?;
        let freeze = freeze_plan(&model, plan)?;
        let mut modules: BTreeMap<Module, Counts> = BTreeMap::new();
        for (name, tensor) in model.params() {
            let counts = modules.entry(module_of(name)?).or_default();
            let is_trained = freeze.rates(name).is_some();
            *(if is_trained { &mut counts.trained } else { &mut counts.frozen }) += tensor.numel() as u64;
        }
        let (model, freeze) = (&model, &freeze);
        let steps = Steps { plan, config, model, freeze, pack: &pack, backend, cluster };
        let (course, mut models) = Course::of(&steps, guess)?;
        let strategies = Strategy::ALL.map(|strategy| {
            // An encoder that runs ahead until it is trained may take more before that.
            let memory = models.iter().map(|model| model.estimate(strategy).memory);
            let memory = memory.max_by_key(Memory::total).unwrap_or_default();
            StrategyEstimate { memory, ..models[models.len() - 1].estimate(strategy) }
        });
        let last = models.pop().expect("invariant: a stage has a phase");
        let mut warnings = refused(plan, cluster.world);
        let built = 4 * modules.values().map(|counts| counts.trained + counts.frozen).sum::<u64>();
        if strategies.iter().any(|row| row.strategy == plan.parallel.strategy && row.memory.total() < built) {
            let gib = built as f64 / f64::from(1u32 << 30);
            warnings
                .push(format!("fp32 weights take {gib:.3} GiB while the model is built, more than training"));
        }
        let feature_cache = plan.data.feature_cache.as_ref().map(|cache| FeatureSpace {
            image_bytes: pack.patches_per_image * config.vision.hidden_size() as u64 * backend.compute_bytes,
            images: course.stage.packs * pack.images as f64,
            max_bytes: cache.max_bytes,
        });
        Ok(Self {
            name: plan.run.name.clone(),
            planned: plan.parallel.strategy,
            cluster,
            backend,
            modules,
            pack,
            tokens_per_image,
            packs_per_rank: (plan.batch.packs_per_step as u64).div_ceil(cluster.world),
            course,
            feature_cache,
            buckets: last.buckets(),
            strategies: strategies.into(),
            warnings,
            pass: last.pass,
        })
    }
}

/// What a plan says about kernels and types; a machine that is not here has GPUs unless the plan says `cpu`.
fn backend(plan: &Plan) -> Backend {
    let cuda = plan.run.device != DeviceChoice::Cpu;
    let compute_bytes = match plan.run.precision {
        Precision::Bf16 => 2,
        Precision::Auto if cuda => 2,
        Precision::Auto | Precision::Fp32 | Precision::Tf32 => 4,
    };
    Backend { cuda, compute_bytes }
}

/// The largest pack that the plan allows, and the visual tokens of an image.
fn pack_shape(plan: &Plan, config: &VlmConfig, guess: &PackGuess) -> Result<(PackShape, u64)> {
    let tokens = plan.batch.tokens_per_pack as u64;
    let merged = (config.projector.merge * config.projector.merge) as u64;
    let per_tile = visual_shape(plan, config)?.tokens_per_tile as u64;
    let per_image = plan.data.any_resolution.map_or(per_tile, |any| any.max_tokens as u64);
    let fits = |name: &str, value: Option<u64>, least: u64| match value {
        Some(value) if !(least..=tokens).contains(&value) => Err(Error::usage(
            format!("`--{name}` is {value}, a pack has {tokens} tokens"),
            format!("give a number from {least} to {tokens}, or raise `batch.tokens_per_pack`"),
        )),
        _ => Ok(value),
    };
    let planned = plan.data.visual_tokens_per_pack.map(|tokens| tokens as u64);
    let visual = fits("visual-tokens", guess.visual_tokens, 0)?.or(planned).unwrap_or(tokens);
    let sample = fits("sample-tokens", guess.sample_tokens, 1)?.unwrap_or(tokens);
    let targets = fits("answer-tokens", guess.answer_tokens, 0)?.unwrap_or(tokens);
    let mut samples = vec![sample; (tokens / sample) as usize];
    samples.extend(Some(tokens % sample).filter(|rest| *rest > 0));
    let images = (visual / per_image).max(u64::from(visual > 0 && per_image > visual));
    Ok((PackShape { samples, images, patches_per_image: per_image * merged, targets }, per_image))
}

/// What a run with this number of ranks would refuse.
fn refused(plan: &Plan, world: u64) -> Vec<String> {
    let refused =
        plan.shared_in_parts().into_iter().filter(|(_, value)| !(*value as u64).is_multiple_of(world));
    refused
        .map(|(path, value)| format!("{world} ranks do not divide `{path}`, {value}: a run would refuse"))
        .collect()
}
