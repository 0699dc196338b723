//! A step under each strategy: what its ranks hold and send, and how long it takes.
//!
//! [`StepModel`] is of one set of trained parameters; a stage with unlock points has several of them, see `course.rs`.

use sail_model::vlm::{Vlm, VlmConfig};

use super::forward::{PackShape, Pass, pass};
use super::graph::Backend;
use super::link::{Cluster, Collective, Time};
use super::memory::{Memory, Sizes};
use crate::config::{Plan, ReduceDtype, Strategy};
use crate::error::Result;
use crate::freeze::FreezePlan;
use crate::optim::layout::{self, Layout};

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

/// What every step of a stage has in common.
pub(super) struct Steps<'a> {
    pub(super) plan: &'a Plan,
    pub(super) config: &'a VlmConfig,
    /// Without weights.
    pub(super) model: &'a Vlm,
    pub(super) freeze: &'a FreezePlan,
    pub(super) pack: &'a PackShape,
    pub(super) backend: Backend,
    pub(super) cluster: Cluster,
}

/// What the time of a step depends on, while the same parameters are trained.
pub(super) struct StepModel {
    cluster: Cluster,
    backend: Backend,
    reduce: ReduceDtype,
    sizes: Sizes,
    /// Which buckets the next forward pass does not need from its beginning.
    in_blocks: Vec<bool>,
    packs_per_rank: u64,
    tokens_per_pack: u64,
    /// The passes over one pack.
    pub(super) pass: Pass,
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

impl Steps<'_> {
    /// A step once the unlock points of these indices are passed, in this order.
    pub(super) fn after(&self, passed: &[usize]) -> Result<StepModel> {
        let Self { plan, cluster, .. } = self;
        let (params, blocks) = (self.model.params(), self.model.listener().blocks());
        let trained = [self.freeze.first()]
            .into_iter()
            .chain(passed.iter().map(|&index| self.freeze.unlocked_by(index)));
        let mut buckets: Vec<Layout> = Vec::new();
        for trained in trained {
            let shapes = trained.keys().map(|name| (name.as_str(), params[name].size()));
            buckets.extend(layout::cut(
                shapes,
                &blocks,
                plan.parallel.bucket_elements(),
                cluster.world as usize,
            )?);
        }
        buckets.sort_by(Layout::cmp_forward);
        let all: u64 = params.values().map(|param| param.numel() as u64).sum();
        let trained = buckets.iter().flat_map(|bucket| &bucket.entries);
        let trained: i64 = trained.map(|entry| entry.range.end - entry.range.start).sum();
        let train = plan.train.after(passed);
        let packs_per_rank = (plan.batch.packs_per_step as u64).div_ceil(cluster.world);
        let ahead = match &plan.data.feature_cache {
            Some(_) => 0,
            None => (plan.batch.vision_images as u64).min(packs_per_rank * self.pack.images),
        };
        Ok(StepModel {
            cluster: *cluster,
            backend: self.backend,
            reduce: plan.parallel.reduce,
            sizes: Sizes {
                frozen: all - trained as u64,
                buckets: buckets.iter().map(|bucket| bucket.numel as u64).collect(),
                averaged: averaged(plan, &buckets),
            },
            in_blocks: buckets.iter().map(Layout::is_in_blocks).collect(),
            packs_per_rank,
            tokens_per_pack: self.pack.tokens(),
            pass: pass(self.config, (&train, plan.batch.recompute), self.pack, self.backend)
                .with_images_ahead((self.config, &train), self.pack, ahead, self.backend),
        })
    }
}

impl StepModel {
    /// Collectives of gradients a pass.
    pub(super) fn buckets(&self) -> usize {
        self.sizes.buckets.len()
    }

    /// A step under this strategy.
    pub(super) fn estimate(&self, strategy: Strategy) -> StrategyEstimate {
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
        let [forward_secs, backward_secs] =
            [flops.forward, flops.backward() + self.pass.recomputed_flops].map(secs_of);
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
