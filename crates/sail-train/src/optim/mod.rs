//! AdamW over the parameters a stage trains, with fp32 masters, shared among ranks.
//!
//! The model's tensors are the *compute copies*. Those that train lie in flat buckets, whose views the
//! parameters become; gradients are summed in fp32 over micro-batches and ranks (`reducer`), and updated
//! parameters travel back while the next forward pass has begun (`gathers`). Under `zero1` and `zero2` a rank
//! keeps masters and moments of its part of each bucket alone (`layout`). In fp32 a compute copy is its own
//! master; in bf16 the master is a separate fp32 tensor, and the compute copy is cast anew after each update.
//! Built by [`crate::session`] from the freeze plan; knows nothing of files or schedules.

mod gathers;
pub mod layout;
mod reducer;

use std::ops::Range;
use std::sync::Arc;

use sail_model::params::Params;
use sail_torch::{AdamWOptions, AdamWSlot, ProcessGroup};
use tch::{Kind, Tensor, no_grad};

use self::gathers::Gathers;
use self::layout::{Entry, Layout};
use self::reducer::{Reducer, Reduction, narrow};
pub(crate) use self::reducer::{UNDER_WAY, UNDER_WAY_ELEMENTS};
use crate::checkpoint::Updates;
use crate::config::{OptimizerPlan, ParallelPlan};
use crate::error::Result;
use crate::freeze::{ParamRates, RatesByName};
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
}

/// Trained parameters that lie together.
struct Bucket {
    /// Its index with the reducer.
    id: usize,
    layout: Arc<Layout>,
    /// What the model computes with: its parameters are views of this.
    compute: Tensor,
    /// What of the bucket this rank updates; all of it under `ddp`.
    owned: Range<i64>,
    /// fp32, of `owned`; in fp32 a view of `compute`.
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    pieces: Vec<Piece>,
}

/// What this rank updates of one parameter.
struct Piece {
    entry: usize,
    /// In the bucket.
    range: Range<i64>,
    /// Views of the bucket's tensors of these names.
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// 0-dimensional, the number of updates; the kernel counts it up.
    step: Tensor,
    rates: ParamRates,
}

/// One tensor of the optimizer's state, for checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StateKind {
    /// The fp32 parameter.
    Param,
    /// The first moment.
    ExpAvg,
    /// The second moment.
    ExpAvgSq,
}

impl StateKind {
    /// Every kind, in the order checkpoints hold them.
    pub const ALL: [Self; 3] = [Self::Param, Self::ExpAvg, Self::ExpAvgSq];

    /// The name in checkpoint files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Param => "param",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        }
    }
}

/// A part of one tensor of the state: what this rank writes into a checkpoint.
#[derive(Debug)]
pub struct StatePiece<'a> {
    /// Full parameter name.
    pub name: &'a str,
    /// Which of its tensors.
    pub kind: StateKind,
    /// Of the whole tensor.
    pub shape: &'a [i64],
    /// Elements of the flattened tensor that this is.
    pub elements: Range<i64>,
    /// These, flat and fp32; shared, not copied.
    pub tensor: Tensor,
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
        Ok(())
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
        let id = self.buckets.len();
        self.reducer.add(&layout, &leaves)?;
        Ok(Bucket { id, layout, compute, owned, master, exp_avg, exp_avg_sq, pieces })
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

    /// Squared 2-norm of the summed gradients, of this rank's part of them: its sum over all ranks is that of
    /// the whole. A 0-dimensional fp32 tensor.
    pub fn squared_norm(&self) -> Result<Tensor> {
        let mut parts = Vec::new();
        let (rank, world) = self.reduction.place();
        for bucket in &self.buckets {
            let gradients = self.reducer.gradients(bucket.id)?;
            let shard = bucket.layout.shard(rank, world);
            parts.push(if self.reduction.is_sharded() { gradients } else { narrow(&gradients, &shard)? });
        }
        Ok(sail_torch::global_norm(&parts)?.square())
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
            if self.reduction.is_sharded()
                && let Some(group) = &self.reduction.group
            {
                let work = group.all_gather(&bucket.compute, &narrow(&bucket.compute, &bucket.owned)?)?;
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
        bucket.refresh_compute()
    }

    /// Forgets the gradients of a step that is not made.
    pub fn discard(&self) {
        self.reducer.discard();
    }

    /// Puts masters and moments back to what they were: `get` gives this rank's part of them, as [`Optimizer::state`]
    /// gave it. Every rank makes the same call.
    ///
    /// # Errors
    /// What `get` reports, and those of the collectives.
    pub fn put_back(
        &mut self,
        updates: Updates,
        get: impl Fn(&str, StateKind, Range<i64>) -> Result<Tensor>,
    ) -> Result<()> {
        self.settle()?;
        self.discard();
        let (rank, world) = self.reduction.place();
        no_grad(|| {
            for bucket in &self.buckets {
                let shard = bucket.layout.shard(rank, world);
                for (index, range) in bucket.layout.pieces(&shard) {
                    let entry = &bucket.layout.entries[index];
                    for kind in StateKind::ALL {
                        let value = get(&entry.name, kind, within(entry, &range))?;
                        narrow(bucket.tensor(kind), &bucket.in_owned(&range))?.f_copy_(&value)?;
                    }
                }
                for piece in &bucket.pieces {
                    let count = updates.of(&bucket.layout.entries[piece.entry].name);
                    let _ = piece.step.shallow_clone().fill_(count as f64);
                }
                if let Some(group) = self.reduction.group.as_ref().filter(|_| !self.reduction.is_sharded()) {
                    for kind in StateKind::ALL {
                        let whole = bucket.tensor(kind);
                        group.all_gather(whole, &narrow(whole, &shard)?)?.wait()?;
                    }
                }
                bucket.refresh_compute()?;
                if let Some(group) = self.reduction.group.as_ref().filter(|_| self.reduction.is_sharded()) {
                    group.all_gather(&bucket.compute, &narrow(&bucket.compute, &bucket.owned)?)?.wait()?;
                }
            }
            Ok::<_, crate::Error>(())
        })?;
        self.updates = updates;
        Ok(())
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

    /// Names of the trained parameters, in the order of the buckets.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.buckets.iter().flat_map(|bucket| bucket.layout.entries.iter().map(|entry| entry.name.as_str()))
    }

    /// The fp32 tensors of the trained parameters whose names begin with `prefix`, collected from all ranks.
    /// Every rank makes the same call.
    ///
    /// # Errors
    /// Those of the collectives.
    pub fn masters(&self, prefix: &str) -> Result<Params> {
        self.settle()?;
        let mut masters = Params::new();
        for bucket in self.buckets.iter().filter(|bucket| bucket.layout.entries[0].name.starts_with(prefix)) {
            let whole = match &self.reduction.group {
                _ if self.precision == Kind::Float => bucket.compute.shallow_clone(),
                Some(group) if self.reduction.is_sharded() => {
                    let whole =
                        Tensor::f_empty([bucket.layout.numel], (Kind::Float, bucket.master.device()))?;
                    group.all_gather(&whole, &bucket.master)?.wait()?;
                    whole
                }
                _ => bucket.master.shallow_clone(),
            };
            for entry in &bucket.layout.entries {
                let value = narrow(&whole, &entry.range)?.f_view(&entry.shape[..])?;
                masters.insert(entry.name.clone(), value.detach());
            }
        }
        Ok(masters)
    }

    /// This rank's part of the state: all ranks' together are everything, each element once.
    ///
    /// # Errors
    /// Those of libtorch.
    pub fn state(&self) -> Result<Vec<StatePiece<'_>>> {
        let (rank, world) = self.reduction.place();
        let mut pieces = Vec::new();
        for bucket in &self.buckets {
            for (index, range) in bucket.layout.pieces(&bucket.layout.shard(rank, world)) {
                let entry = &bucket.layout.entries[index];
                for kind in StateKind::ALL {
                    pieces.push(StatePiece {
                        name: &entry.name,
                        kind,
                        shape: &entry.shape,
                        elements: within(entry, &range),
                        tensor: narrow(bucket.tensor(kind), &bucket.in_owned(&range))?,
                    });
                }
            }
        }
        Ok(pieces)
    }

    /// Puts other moments in place of these. The parameters are as they should be already; `get` gives a range of
    /// elements of a flattened tensor by name and kind, and is not asked for what was never updated.
    ///
    /// # Errors
    /// What `get` reports.
    pub fn restore(
        &mut self,
        updates: Updates,
        get: impl Fn(&str, StateKind, Range<i64>) -> Result<Tensor>,
    ) -> Result<()> {
        no_grad(|| {
            for bucket in &mut self.buckets {
                for piece in &bucket.pieces {
                    let entry = &bucket.layout.entries[piece.entry];
                    let count = updates.of(&entry.name);
                    let moments =
                        [(StateKind::ExpAvg, &piece.exp_avg), (StateKind::ExpAvgSq, &piece.exp_avg_sq)];
                    for (kind, moment) in moments {
                        let mut moment = moment.shallow_clone();
                        if count == 0 {
                            let _ = moment.f_zero_()?;
                        } else {
                            moment.f_copy_(&get(&entry.name, kind, within(entry, &piece.range))?)?;
                        }
                    }
                    let _ = piece.step.shallow_clone().fill_(count as f64);
                }
            }
            Ok::<_, crate::Error>(())
        })?;
        self.updates = updates;
        Ok(())
    }

    /// Bytes of masters and moments that this rank holds beside what the model computes with, and of gradients
    /// that it keeps between micro-batches.
    pub fn held_bytes(&self) -> HeldBytes {
        let numel: usize = self.buckets.iter().map(|bucket| bucket.exp_avg.numel()).sum();
        HeldBytes {
            masters: if self.precision == Kind::Float { 0 } else { 4 * numel },
            moments: 8 * numel,
            gradients: self.reducer.kept_bytes(),
        }
    }
}

/// What a rank holds for training, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct HeldBytes {
    /// fp32 masters beside the compute copies.
    pub masters: usize,
    /// Both moments.
    pub moments: usize,
    /// Gradients between micro-batches.
    pub gradients: usize,
}

impl Bucket {
    fn in_owned(&self, range: &Range<i64>) -> Range<i64> {
        range.start - self.owned.start..range.end - self.owned.start
    }

    fn tensor(&self, kind: StateKind) -> &Tensor {
        match kind {
            StateKind::Param => &self.master,
            StateKind::ExpAvg => &self.exp_avg,
            StateKind::ExpAvgSq => &self.exp_avg_sq,
        }
    }

    /// After the master changed; in fp32 they are one tensor.
    fn refresh_compute(&self) -> Result<()> {
        if self.compute.kind() != Kind::Float {
            no_grad(|| {
                narrow(&self.compute, &self.owned)?.f_copy_(&self.master).map_err(crate::Error::from)
            })?;
        }
        Ok(())
    }
}

/// A range of a bucket as elements of one of its parameters.
fn within(entry: &Entry, range: &Range<i64>) -> Range<i64> {
    range.start - entry.range.start..range.end - entry.range.start
}

#[cfg(test)]
mod tests;
