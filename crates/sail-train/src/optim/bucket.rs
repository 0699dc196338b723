//! Trained parameters that lie together, with their part of the optimizer's state.

use std::ops::Range;
use std::sync::Arc;

use tch::{Kind, Tensor, no_grad};

use super::layout::{Entry, Layout};
use super::reducer::narrow;
use super::state::StateKind;
use crate::error::Result;
use crate::freeze::ParamRates;

/// Trained parameters that lie together.
pub(super) struct Bucket {
    /// Its index with the reducer.
    pub(super) id: usize,
    pub(super) layout: Arc<Layout>,
    /// What the model computes with: its parameters are views of this.
    pub(super) compute: Tensor,
    /// What of the bucket this rank updates; all of it under `ddp`.
    pub(super) owned: Range<i64>,
    /// fp32, of `owned`; in fp32 a view of `compute`.
    pub(super) master: Tensor,
    pub(super) exp_avg: Tensor,
    pub(super) exp_avg_sq: Tensor,
    /// The moving average of `master`, where the plan has one of the module.
    pub(super) average: Option<Tensor>,
    pub(super) pieces: Vec<Piece>,
}

/// What this rank updates of one parameter.
pub(super) struct Piece {
    pub(super) entry: usize,
    /// In the bucket.
    pub(super) range: Range<i64>,
    /// Views of the bucket's tensors of these names.
    pub(super) master: Tensor,
    pub(super) exp_avg: Tensor,
    pub(super) exp_avg_sq: Tensor,
    /// 0-dimensional, the number of updates; the kernel counts it up.
    pub(super) step: Tensor,
    pub(super) rates: ParamRates,
}

impl Bucket {
    pub(super) fn in_owned(&self, range: &Range<i64>) -> Range<i64> {
        range.start - self.owned.start..range.end - self.owned.start
    }

    /// Its tensors of `owned`, in the order in which checkpoints hold them.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (StateKind, &Tensor)> {
        let always = [
            (StateKind::Param, &self.master),
            (StateKind::ExpAvg, &self.exp_avg),
            (StateKind::ExpAvgSq, &self.exp_avg_sq),
        ];
        always.into_iter().chain(self.average.iter().map(|average| (StateKind::Ema, average)))
    }

    /// After the master changed: moves its average towards it.
    pub(super) fn average_in(&self, decay: f64) -> Result<()> {
        let Some(average) = &self.average else { return Ok(()) };
        let _ = no_grad(|| average.shallow_clone().f_lerp_(&self.master, 1.0 - decay))?;
        Ok(())
    }

    /// After the master changed; in fp32 they are one tensor.
    pub(super) fn refresh_compute(&self) -> Result<()> {
        if self.compute.kind() != Kind::Float {
            no_grad(|| {
                narrow(&self.compute, &self.owned)?.f_copy_(&self.master).map_err(crate::Error::from)
            })?;
        }
        Ok(())
    }
}

/// A range of a bucket as elements of one of its parameters.
pub(super) fn within(entry: &Entry, range: &Range<i64>) -> Range<i64> {
    range.start - entry.range.start..range.end - entry.range.start
}

/// The same values in memory of their own.
pub(super) fn copied(tensor: &Tensor) -> Result<Tensor> {
    no_grad(|| {
        let mut copy = tensor.f_empty_like()?;
        copy.f_copy_(tensor)?;
        Ok(copy)
    })
}
