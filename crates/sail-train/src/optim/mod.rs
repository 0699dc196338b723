//! AdamW over the parameters a stage trains, with fp32 masters, shared among ranks.
//!
//! The model's tensors are the *compute copies*. Those that train lie in flat buckets, whose views the
//! parameters become; gradients are summed in fp32 over micro-batches and ranks (`reducer`), and updated
//! parameters travel back while the next forward pass has begun (`gathers`). Under `zero1` and `zero2` a rank
//! keeps masters and moments of its part of each bucket alone (`layout`). In fp32 a compute copy is its own
//! master; in bf16 the master is a separate fp32 tensor, and the compute copy is cast anew after each update.
//! Built by [`crate::session`] from the freeze plan; knows nothing of files or schedules. What checkpoints and exports
//! take out of it and put back is in `state`.

mod bucket;
mod gathers;
pub mod layout;
mod reducer;
mod state;

use std::ops::Range;
use std::sync::Arc;

use sail_model::params::Params;
use sail_torch::{AdamWOptions, AdamWSlot, ProcessGroup, Work};
use tch::{Kind, Tensor, no_grad};

use self::bucket::{Bucket, Piece, copied, within};
use self::gathers::Gathers;
use self::layout::Layout;
use self::reducer::{Reducer, Reduction, narrow};
pub(crate) use self::reducer::{UNDER_WAY, UNDER_WAY_ELEMENTS};
pub use self::state::{HeldBytes, StateKind, StatePiece};
use crate::checkpoint::Updates;
use crate::config::{Module, OptimizerPlan, ParallelPlan};
use crate::error::Result;
use crate::freeze::RatesByName;
use crate::schedule::Factors;

/// Every trained parameter with its state.
pub struct Optimizer {
    /// In the order in which a forward pass needs them.
    buckets: Vec<Bucket>,
    reduction: Reduction,
    reducer: Reducer,
    gathers: Gathers,
    bucket_elements: i64,
    /// How the names of each block's parameters begin.
    blocks: Vec<String>,
    plan: OptimizerPlan,
    precision: Kind,
    updates: Updates,
    /// Which of all trained parameters this rank has a part of the gradient of, by their order in [`Optimizer::names`];
    /// on the device.
    own_params: Option<Tensor>,
}

impl Optimizer {
    /// Takes over the parameters of `trained`, one set after the other as unlock points would, and turns all of `params`
    /// into `precision`; they are fp32 when this is called. `blocks` says how the names of each block's parameters begin;
    /// `group` is all ranks, `None` for one alone. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of libtorch.
    pub fn new(
        params: &Params,
        blocks: Vec<String>,
        trained: &[&RatesByName],
        plan: OptimizerPlan,
        parallel: &ParallelPlan,
        precision: Kind,
        group: Option<Arc<ProcessGroup>>,
    ) -> Result<Self> {
        let reduction = Reduction { group, strategy: parallel.strategy, dtype: parallel.reduce };
        let mut optimizer = Self {
            buckets: Vec::new(),
            reducer: Reducer::new(reduction.clone()),
            reduction,
            gathers: Gathers::default(),
            bucket_elements: parallel.bucket_elements(),
            blocks,
            plan,
            precision,
            updates: Updates::default(),
            own_params: None,
        };
        for trained in trained {
            optimizer.take_over(params, &Params::new(), trained)?;
        }
        no_grad(|| {
            for param in params.values().filter(|param| param.kind() != precision) {
                param.shallow_clone().set_data(&param.to_kind(precision));
            }
        });
        Ok(optimizer)
    }

    /// Takes over the parameters of `trained`, none of which is trained yet, with fresh moments. `exact` has the fp32
    /// values of those that the model computes with in another type. Every rank makes the same call after the same
    /// step.
    ///
    /// # Errors
    /// Those of libtorch.
    pub fn take_over(&mut self, params: &Params, exact: &Params, trained: &RatesByName) -> Result<()> {
        let fresh: Vec<(&str, Vec<i64>)> =
            trained.keys().map(|name| (name.as_str(), params[name].size())).collect();
        if self.updates.all > 0 {
            let never = fresh.iter().map(|(name, _)| ((*name).to_owned(), 0));
            self.updates.later.extend(never);
        }
        let (_, world) = self.reduction.place();
        for layout in layout::cut(fresh, &self.blocks, self.bucket_elements, world)? {
            let bucket = self.bucket(Arc::new(layout), params, exact, trained)?;
            self.buckets.push(bucket);
        }
        self.buckets.sort_by(|a, b| a.layout.cmp_forward(&b.layout));
        self.reducer.set_order(self.buckets.iter().rev().map(|bucket| bucket.id).collect());
        self.own_params = self.find_own_params()?;
        Ok(())
    }

    /// None where nothing is trained.
    fn find_own_params(&self) -> Result<Option<Tensor>> {
        let Some(device) = self.buckets.first().map(|bucket| bucket.compute.device()) else {
            return Ok(None);
        };
        let (rank, world) = self.reduction.place();
        let mut own: Vec<i64> = Vec::new();
        let mut first = 0;
        for Bucket { layout, .. } in &self.buckets {
            own.extend(layout.pieces(&layout.shard(rank, world)).map(|(index, _)| first + index as i64));
            first += layout.entries.len() as i64;
        }
        Ok(Some(Tensor::f_from_slice(&own)?.f_to_device(device)?))
    }

    fn bucket(
        &self,
        layout: Arc<Layout>,
        params: &Params,
        exact: &Params,
        trained: &RatesByName,
    ) -> Result<Bucket> {
        let (rank, world) = self.reduction.place();
        let owned = if self.reduction.is_sharded() { layout.shard(rank, world) } else { 0..layout.numel };
        let of_bucket: Vec<Tensor> =
            layout.entries.iter().map(|entry| params[&entry.name].shallow_clone()).collect();
        let device = of_bucket[0].device();
        let fp32 = |numel| Tensor::f_zeros([numel], (Kind::Float, device));
        let compute = Tensor::f_zeros([layout.numel], (self.precision, device))?;
        let owned_numel = owned.end - owned.start;
        let master =
            if self.precision == Kind::Float { narrow(&compute, &owned)? } else { fp32(owned_numel)? };
        let (exp_avg, exp_avg_sq) = (fp32(owned_numel)?, fp32(owned_numel)?);
        let mut pieces = Vec::new();
        no_grad(|| {
            for (index, range) in layout.pieces(&owned) {
                let entry = &layout.entries[index];
                let elements = within(entry, &range);
                let value = exact.get(&entry.name).unwrap_or(&of_bucket[index]);
                let value = narrow(&value.f_reshape([-1])?, &elements)?;
                let inside = range.start - owned.start..range.end - owned.start;
                let mut master = narrow(&master, &inside)?;
                master.f_copy_(&value)?;
                pieces.push(Piece {
                    entry: index,
                    range,
                    master,
                    exp_avg: narrow(&exp_avg, &inside)?,
                    exp_avg_sq: narrow(&exp_avg_sq, &inside)?,
                    step: Tensor::f_zeros([], (Kind::Float, device))?,
                    rates: trained[&entry.name],
                });
            }
            for (entry, param) in layout.entries.iter().zip(&of_bucket) {
                let mut view = narrow(&compute, &entry.range)?.f_view(&entry.shape[..])?;
                view.f_copy_(param)?;
                param.shallow_clone().set_data(&view);
            }
            Ok::<_, crate::Error>(())
        })?;
        let leaves: Vec<Tensor> = of_bucket.iter().map(|param| param.set_requires_grad(true)).collect();
        let averages = self.plan.ema.as_ref().is_some_and(|ema| ema.modules.contains(&layout.module()));
        let average = averages.then(|| copied(&master)).transpose()?;
        let id = self.buckets.len();
        self.reducer.add(&layout, &leaves)?;
        Ok(Bucket { id, layout, compute, owned, master, exp_avg, exp_avg_sq, average, pieces })
    }

    /// To be called before each micro-batch. A step has `passes` on every rank, numbered from 0, also where a rank
    /// has no data for one: its gradients of that are zeros.
    pub fn begin_pass(&self, pass: usize, passes: usize) {
        // Gradients that are kept whole need to travel once.
        self.reducer.begin(self.reduction.keeps_parts() || pass + 1 == passes);
        self.gathers.before_forward(&self.blocks);
    }

    /// What the model is to call before each of its blocks computes.
    pub fn on_block(&self) -> impl Fn(&str) + Send + 'static {
        let gathers = self.gathers.clone();
        move |block| gathers.before_block(block)
    }

    /// The backward pass of a micro-batch.
    ///
    /// # Errors
    /// Those of libtorch, and of the collectives that it has started.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        // Through autograd an error of a hook comes out as text.
        loss.f_backward().map_err(|error| self.reducer.take_failure().unwrap_or(error.into()))
    }

    /// To be called after each micro-batch; after the last one the gradients of all ranks are summed.
    ///
    /// # Errors
    /// Those of the collectives.
    pub fn end_pass(&self) -> Result<()> {
        self.gathers.settle()?;
        self.reducer.end()
    }

    /// Squared 2-norms of the summed gradients of each trained parameter, of this rank's part of them: their sums over
    /// all ranks are those of the whole. A 1-dimensional fp64 tensor in the order of [`Optimizer::names`], of the same
    /// length on every rank.
    ///
    /// # Errors
    /// Those of libtorch.
    pub fn squared_norms(&self) -> Result<Tensor> {
        let own = self.own_params.as_ref().expect("invariant: something is trained");
        let all = Tensor::f_zeros([self.names().count() as i64], (Kind::Double, own.device()))?;
        let parts: Vec<Tensor> = self.gradients()?.into_iter().map(|(_, _, values)| values).collect();
        // A rank of many may have nothing of a few small parameters.
        if parts.is_empty() {
            return Ok(all);
        }
        Ok(all.f_index_copy(0, own, &sail_torch::squared_norms(&parts)?)?)
    }

    /// Scales the summed gradients so that their norm, which is `norm` now, is at most `clip_norm`, where the
    /// plan has one; without a host read.
    pub fn clip(&self, norm: &Tensor) -> Result<()> {
        let Some(limit) = self.plan.clip_norm else { return Ok(()) };
        // A norm below the limit gives a factor of 1.
        let factor = (limit / (norm + 1e-6)).clamp_max(1.0).to_kind(Kind::Float);
        let gradients = self.buckets.iter().map(|bucket| self.reducer.gradients(bucket.id));
        Ok(sail_torch::foreach_mul(&gradients.collect::<Result<Vec<_>>>()?, &factor)?)
    }

    /// One AdamW update at each parameter's peak rate times its factor; clears the gradients. Updated parameters
    /// travel on after it returns.
    ///
    /// # Errors
    /// Those of libtorch and of the collectives.
    pub fn step(&mut self, factors: &Factors) -> Result<()> {
        // What is needed first goes first.
        let (in_blocks, outside): (Vec<_>, Vec<_>) =
            self.buckets.iter().partition(|bucket| bucket.layout.is_in_blocks());
        for bucket in outside.into_iter().chain(in_blocks) {
            self.update(bucket, factors)?;
            if let Some(work) = self.gather(bucket)? {
                self.gathers.push(Arc::clone(&bucket.layout), work);
            }
        }
        self.reducer.clear();
        self.updates.all += 1;
        self.updates.later.values_mut().for_each(|count| *count += 1);
        Ok(())
    }

    fn update(&self, bucket: &Bucket, factors: &Factors) -> Result<()> {
        let gradients = self.reducer.gradients(bucket.id)?;
        let mut groups: Vec<(AdamWOptions, Vec<AdamWSlot>)> = Vec::new();
        for piece in &bucket.pieces {
            let slot = AdamWSlot {
                param: piece.master.shallow_clone(),
                grad: narrow(&gradients, &bucket.in_owned(&piece.range))?,
                exp_avg: piece.exp_avg.shallow_clone(),
                exp_avg_sq: piece.exp_avg_sq.shallow_clone(),
                step: piece.step.shallow_clone(),
            };
            let options = AdamWOptions {
                lr: piece.rates.lr_at(factors),
                betas: piece.rates.betas.into(),
                eps: self.plan.eps,
                weight_decay: piece.rates.weight_decay,
            };
            // A bucket has a few: of matrices and of the rest, of a block or two.
            match groups.iter_mut().find(|(known, _)| *known == options) {
                Some((_, slots)) => slots.push(slot),
                None => groups.push((options, vec![slot])),
            }
        }
        for (options, slots) in groups {
            sail_torch::fused_adamw(&slots, options)?;
        }
        if let Some(ema) = &self.plan.ema {
            bucket.average_in(ema.decay_of(self.updates.all + 1))?;
        }
        bucket.refresh_compute()
    }

    /// Begins to bring all parts of a bucket's compute copy together, where ranks have one each.
    fn gather(&self, bucket: &Bucket) -> Result<Option<Work>> {
        match &self.reduction.group {
            Some(group) if self.reduction.is_sharded() => {
                Ok(Some(group.all_gather(&bucket.compute, &narrow(&bucket.compute, &bucket.owned)?)?))
            }
            _ => Ok(None),
        }
    }

    /// Forgets the gradients of a step that is not made.
    pub fn discard(&self) {
        self.reducer.discard();
    }

    /// This rank's part of the gradients of the step, as [`Optimizer::state`] cuts them: full name, elements of the
    /// flattened parameter, values.
    ///
    /// # Errors
    /// Those of libtorch.
    pub fn gradients(&self) -> Result<Vec<(&str, Range<i64>, Tensor)>> {
        let (rank, world) = self.reduction.place();
        let mut parts = Vec::new();
        for bucket in &self.buckets {
            let gradients = self.reducer.gradients(bucket.id)?;
            // What is kept of them begins where this rank's part does, or where the bucket does.
            let first = if self.reduction.is_sharded() { bucket.owned.start } else { 0 };
            for (index, range) in bucket.layout.pieces(&bucket.layout.shard(rank, world)) {
                let entry = &bucket.layout.entries[index];
                let values = narrow(&gradients, &(range.start - first..range.end - first))?;
                parts.push((entry.name.as_str(), within(entry, &range), values));
            }
        }
        Ok(parts)
    }

    /// Waits for updated parameters that are still under way.
    ///
    /// # Errors
    /// Those of the collectives.
    pub fn settle(&self) -> Result<()> {
        self.gathers.settle()
    }

    /// How often parameters were updated so far.
    pub fn updates(&self) -> &Updates {
        &self.updates
    }

    /// The modules of the trained parameters, in the order of their names.
    pub fn modules(&self) -> impl Iterator<Item = Module> {
        self.buckets.iter().flat_map(|bucket| bucket.layout.entries.iter().map(|_| bucket.layout.module()))
    }

    /// Names of the trained parameters, in the order of the buckets.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.buckets.iter().flat_map(|bucket| bucket.layout.entries.iter().map(|entry| entry.name.as_str()))
    }
}

#[cfg(test)]
mod tests;
