//! What a stage takes on machines that are not here: memory, bytes between ranks, time.
//!
//! From shapes alone: no weights are read and no memory is taken for them. docs/planning.md has the formulas and
//! how they compare with what was measured. Called by `sail-train --dry-run --world`; [`pass`] and its
//! [`flops`] serve whoever wants to know how much work a pack is.
//!
//! | to find | open |
//! |---|---|
//! | operations of linear maps and attention | [`flops`] |
//! | the models over shapes | `forward`, its operations `ops`, memory and gradients `graph` |
//! | what a rank holds | [`memory`] |
//! | how long collectives take | [`link`] |
//! | the printed tables | `table` |

pub mod flops;
mod forward;
mod graph;
pub mod link;
pub mod memory;
mod ops;
mod table;

use std::collections::BTreeMap;

use sail_model::vlm::{Vlm, VlmConfig};

pub use self::forward::{PackShape, Pass, pass};
pub use self::graph::{Backend, Live};
use self::link::{Cluster, Collective, Time};
use self::memory::{Memory, Sizes};
pub use self::table::Tables;
use crate::config::{DeviceChoice, Module, Plan, Precision, ReduceDtype, Strategy};
use crate::error::{Error, Result};
use crate::optim::layout::{self, Layout};
use crate::origin::Folders;
use crate::session::{freeze_plan, model_config, visual_shape};
use crate::stage::module_of;

/// What the packs of a stage hold, where it is known better than from its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackGuess {
    /// Visual tokens of a pack.
    pub visual_tokens: Option<u64>,
    /// Tokens of a sample.
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
    /// The passes over one pack.
    pub pass: Pass,
    /// Collectives of gradients a pass, that is buckets.
    pub buckets: usize,
    /// One for each strategy.
    pub strategies: Vec<StrategyEstimate>,
    /// What would keep a run from being so.
    pub warnings: Vec<String>,
}

/// What a stage takes under one strategy, for each rank.
#[derive(Clone, Debug, PartialEq)]
pub struct StrategyEstimate {
    /// The strategy.
    pub strategy: Strategy,
    /// What a rank holds at most.
    pub memory: Memory,
    /// Bytes that a rank sends in a step.
    pub sent_bytes: f64,
    /// A step's passes.
    pub compute_secs: f64,
    /// A step's collectives, one after the other.
    pub communication: Time,
    /// A step when nothing overlaps.
    pub serial_secs: f64,
    /// A step when gradients travel during backward passes and parameters during the next forward pass.
    pub step_secs: f64,
    /// Tokens of all ranks in a second, with overlap.
    pub tokens_per_sec: f64,
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
        let mut trained = Vec::new();
        for (name, tensor) in model.params() {
            let counts = modules.entry(module_of(name)?).or_default();
            if freeze.rates(name).is_some() {
                counts.trained += tensor.numel() as u64;
                trained.push((name.as_str(), tensor.size()));
            } else {
                counts.frozen += tensor.numel() as u64;
            }
        }
        let (blocks, limit) = (model.listener().blocks(), plan.parallel.bucket_elements());
        let buckets = layout::cut(trained, &blocks, limit, cluster.world as usize)?;
        let packs = plan.batch.packs_per_step as u64;
        let step = StepModel {
            cluster,
            backend,
            reduce: plan.parallel.reduce,
            sizes: Sizes {
                frozen: modules.values().map(|counts| counts.frozen).sum(),
                buckets: buckets.iter().map(|bucket| bucket.numel as u64).collect(),
                averaged: averaged(plan, &buckets),
            },
            in_blocks: buckets.iter().map(Layout::is_in_blocks).collect(),
            packs_per_rank: packs.div_ceil(cluster.world),
            pass: pass(config, &plan.train, &pack, backend),
            tokens_per_pack: pack.tokens(),
        };
        let strategies = Strategy::ALL.map(|strategy| step.estimate(strategy));
        let mut warnings = refused(plan, cluster.world);
        let built = 4 * modules.values().map(|counts| counts.trained + counts.frozen).sum::<u64>();
        if strategies.iter().any(|row| row.strategy == plan.parallel.strategy && row.memory.total() < built) {
            let gib = built as f64 / f64::from(1u32 << 30);
            warnings
                .push(format!("fp32 weights take {gib:.3} GiB while the model is built, more than training"));
        }
        Ok(Self {
            name: plan.run.name.clone(),
            planned: plan.parallel.strategy,
            cluster,
            backend,
            modules,
            pack,
            tokens_per_image,
            packs_per_rank: step.packs_per_rank,
            buckets: buckets.len(),
            strategies: strategies.into(),
            warnings,
            pass: step.pass,
        })
    }
}

/// Elements of the buckets of which the plan keeps moving averages.
fn averaged(plan: &Plan, buckets: &[Layout]) -> u64 {
    let Some(ema) = &plan.optimizer.ema else { return 0 };
    buckets
        .iter()
        .filter(|bucket| ema.modules.contains(&bucket.module()))
        .map(|bucket| bucket.numel as u64)
        .sum()
}

/// What a plan says about kernels and types; a machine that is not here has GPUs unless the plan says `cpu`.
fn backend(plan: &Plan) -> Backend {
    let cuda = plan.run.device != DeviceChoice::Cpu;
    let compute_bytes = match plan.run.precision {
        Precision::Bf16 => 2,
        Precision::Auto if cuda => 2,
        Precision::Auto | Precision::Fp32 => 4,
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

/// What the time of a step depends on.
struct StepModel {
    cluster: Cluster,
    backend: Backend,
    reduce: ReduceDtype,
    sizes: Sizes,
    /// Which buckets the next forward pass does not need from its beginning.
    in_blocks: Vec<bool>,
    packs_per_rank: u64,
    pass: Pass,
    tokens_per_pack: u64,
}

impl StepModel {
    fn estimate(&self, strategy: Strategy) -> StrategyEstimate {
        let Self { cluster, sizes, packs_per_rank, .. } = self;
        let is_sharded = strategy != Strategy::Ddp;
        let summing = if is_sharded { Collective::ReduceScatter } else { Collective::AllReduce };
        let sums_per_step = if strategy == Strategy::Zero2 { *packs_per_rank } else { 1 };
        let reduce_bytes = if self.reduce == ReduceDtype::Bf16 { 2 } else { 4 };
        let trained = sizes.trained();
        let mut sent_bytes = summing.sent_bytes(reduce_bytes * trained, cluster.world) * sums_per_step as f64;
        let times = |collective, bytes: u64| -> Vec<Time> {
            sizes.buckets.iter().map(|numel| cluster.time(collective, bytes * numel)).collect()
        };
        let sums = times(summing, reduce_bytes);
        let gathers =
            if is_sharded { times(Collective::AllGather, self.backend.compute_bytes) } else { vec![] };
        if is_sharded {
            sent_bytes +=
                Collective::AllGather.sent_bytes(self.backend.compute_bytes * trained, cluster.world);
        }
        let flops = self.pass.total_flops();
        let secs_of = |flops: u64| flops as f64 / (cluster.peak_flops * cluster.mfu);
        let [forward_secs, backward_secs] = [flops.forward, flops.backward()].map(secs_of);
        let compute_secs = (forward_secs + backward_secs) * *packs_per_rank as f64;

        let total = |times: &[Time]| times.iter().copied().sum::<Time>();
        // Gradients leave in the order of the backward pass: the first bucket's leave last, when it is over.
        let hidden_sums =
            (total(&sums).secs - sums.first().map_or(0.0, |first| first.secs)).min(backward_secs);
        let in_blocks = gathers.iter().zip(&self.in_blocks).filter(|(_, in_blocks)| **in_blocks);
        let hidden_gathers = in_blocks.map(|(time, _)| time.secs).sum::<f64>().min(forward_secs);
        let communication = total(&sums) * sums_per_step as f64 + total(&gathers);
        let serial_secs = compute_secs + communication.secs;
        let step_secs = serial_secs - hidden_sums * sums_per_step as f64 - hidden_gathers;
        let tokens = self.tokens_per_pack * packs_per_rank * cluster.world;
        StrategyEstimate {
            strategy,
            memory: sizes.memory(
                (strategy, self.reduce),
                cluster.world,
                self.backend.compute_bytes,
                self.pass.peak,
            ),
            sent_bytes,
            compute_secs,
            communication,
            serial_secs,
            step_secs,
            tokens_per_sec: tokens as f64 / step_secs,
        }
    }
}
