//! The optimizer's state by name: what checkpoints hold, what is put back from them, and what is exported.

use std::ops::Range;

use sail_model::params::Params;
use sail_torch::Work;
use tch::{Kind, Tensor, no_grad};

use super::Optimizer;
use super::bucket::{Bucket, copied, within};
use super::reducer::narrow;
use crate::checkpoint::Updates;
use crate::error::Result;

/// One tensor of the optimizer's state, for checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StateKind {
    /// The fp32 parameter.
    Param,
    /// The first moment.
    ExpAvg,
    /// The second moment.
    ExpAvgSq,
    /// The moving average of the parameter.
    Ema,
}

impl StateKind {
    /// Every kind, in the order checkpoints hold them.
    pub const ALL: [Self; 4] = [Self::Param, Self::ExpAvg, Self::ExpAvgSq, Self::Ema];

    /// The name in checkpoint files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Param => "param",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
            Self::Ema => "ema",
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
                for (kind, tensor) in bucket.tensors() {
                    pieces.push(StatePiece {
                        name: &entry.name,
                        kind,
                        shape: &entry.shape,
                        elements: within(entry, &range),
                        tensor: narrow(tensor, &bucket.in_owned(&range))?,
                    });
                }
            }
        }
        Ok(pieces)
    }

    /// Puts other moments and averages in place of these. The parameters are as they should be already; `get` gives a
    /// range of elements of a flattened tensor by name and kind, and is not asked for what was never updated.
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
                    for (kind, tensor) in bucket.tensors().filter(|(kind, _)| *kind != StateKind::Param) {
                        let mut tensor = narrow(tensor, &bucket.in_owned(&piece.range))?;
                        if count > 0 {
                            tensor.f_copy_(&get(&entry.name, kind, within(entry, &piece.range))?)?;
                        } else if kind != StateKind::Ema {
                            let _ = tensor.f_zero_()?;
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

    /// Puts masters, moments and averages back to what they were: `get` gives this rank's part of them, as [`Optimizer::state`]
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
                    for (kind, tensor) in bucket.tensors() {
                        let value = get(&entry.name, kind, within(entry, &range))?;
                        narrow(tensor, &bucket.in_owned(&range))?.f_copy_(&value)?;
                    }
                }
                for piece in &bucket.pieces {
                    let count = updates.of(&bucket.layout.entries[piece.entry].name);
                    let _ = piece.step.shallow_clone().fill_(count as f64);
                }
                if let Some(group) = self.reduction.group.as_ref().filter(|_| !self.reduction.is_sharded()) {
                    for (_, whole) in bucket.tensors() {
                        group.all_gather(whole, &narrow(whole, &shard)?)?.wait()?;
                    }
                }
                bucket.refresh_compute()?;
                self.gather(bucket)?.map_or(Ok(()), Work::wait)?;
            }
            Ok::<_, crate::Error>(())
        })?;
        self.updates = updates;
        Ok(())
    }

    /// What is exported of the trained parameters whose names begin with `prefix`, fp32: moving averages where there are
    /// some, else masters, collected from all ranks. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of the collectives.
    pub fn final_params(&self, prefix: &str) -> Result<Params> {
        self.settle()?;
        let mut params = Params::new();
        for bucket in self.buckets.iter().filter(|bucket| bucket.layout.entries[0].name.starts_with(prefix)) {
            let part = bucket.average.as_ref().unwrap_or(&bucket.master);
            let whole = match &self.reduction.group {
                // The compute copy is whole, and the masters are a part of it.
                _ if self.precision == Kind::Float && bucket.average.is_none() => {
                    bucket.compute.shallow_clone()
                }
                Some(group) if self.reduction.is_sharded() => {
                    let whole = Tensor::f_empty([bucket.layout.numel], (Kind::Float, part.device()))?;
                    group.all_gather(&whole, part)?.wait()?;
                    whole
                }
                _ => part.shallow_clone(),
            };
            for entry in &bucket.layout.entries {
                let value = narrow(&whole, &entry.range)?.f_view(&entry.shape[..])?;
                params.insert(entry.name.clone(), value.detach());
            }
        }
        Ok(params)
    }

    /// Calls `compute` while the model has the moving averages in place of its parameters, where there are some. Every
    /// rank makes the same call.
    ///
    /// # Errors
    /// What `compute` reports, and those of the collectives.
    pub fn with_averages<T>(&self, compute: impl FnOnce() -> Result<T>) -> Result<T> {
        self.settle()?;
        let averages: Vec<(&Bucket, &Tensor)> =
            self.buckets.iter().filter_map(|bucket| Some((bucket, bucket.average.as_ref()?))).collect();
        // In fp32 the compute copy has the only masters.
        let is_master = self.precision == Kind::Float;
        let kept = averages.iter().filter(|_| is_master).map(|(bucket, _)| copied(&bucket.master));
        let kept: Vec<Tensor> = kept.collect::<Result<_>>()?;
        let put = |bucket: &Bucket, values: &Tensor| -> Result<()> {
            no_grad(|| narrow(&bucket.compute, &bucket.owned)?.f_copy_(values).map_err(crate::Error::from))?;
            self.gather(bucket)?.map_or(Ok(()), |work| Ok(work.wait()?))
        };
        averages.iter().try_for_each(|(bucket, average)| put(bucket, average))?;
        let computed = compute();
        for (index, (bucket, _)) in averages.iter().enumerate() {
            put(bucket, kept.get(index).unwrap_or(&bucket.master))?;
        }
        computed
    }

    /// Bytes that this rank holds beside what the model computes with, between micro-batches.
    pub fn held_bytes(&self) -> HeldBytes {
        let of = |numel: fn(&Bucket) -> usize| 4 * self.buckets.iter().map(numel).sum::<usize>();
        HeldBytes {
            masters: if self.precision == Kind::Float { 0 } else { of(|bucket| bucket.master.numel()) },
            moments: 2 * of(|bucket| bucket.exp_avg.numel()),
            averages: of(|bucket| bucket.average.as_ref().map_or(0, Tensor::numel)),
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
    /// Moving averages.
    pub averages: usize,
    /// Gradients between micro-batches.
    pub gradients: usize,
}
