//! Gradients on their way: from autograd into flat buckets, and bucket by bucket to the other ranks while the
//! backward pass goes on.
//!
//! Each gradient is put into its bucket as soon as there is one, those of matrices by the product that makes them.
//! Buckets leave in one fixed order, the reverse of the forward pass's, each once it and those before it are complete;
//! what a pass did not reach leaves as zeros at its end. So every rank makes the same collectives, whatever its batch holds.
//! Owned by the optimizer, which knows what the sums are for.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use sail_torch::{GradSink, ProcessGroup, ReduceOp, SinkResult, Work};
use tch::{Device, Kind, Tensor, no_grad};

use super::layout::Layout;
use crate::config::{ReduceDtype, Strategy};
use crate::error::{Error, Result};
use crate::threads::lock;

/// Where buckets under way take memory of their own: these many may be at the same time, and more up to so many
/// elements.
pub(crate) const UNDER_WAY: usize = 2;
pub(crate) const UNDER_WAY_ELEMENTS: i64 = 32 << 20;

/// How gradients are summed over ranks.
#[derive(Clone, Debug)]
pub(super) struct Reduction {
    /// The ranks; `None` for one alone.
    pub(super) group: Option<Arc<ProcessGroup>>,
    /// What each rank keeps.
    pub(super) strategy: Strategy,
    /// The type in which gradients travel.
    pub(super) dtype: ReduceDtype,
}

impl Reduction {
    /// This rank and the number of ranks.
    pub(super) fn place(&self) -> (usize, usize) {
        self.group.as_ref().map_or((0, 1), |group| (group.rank(), group.size()))
    }

    /// Whether each rank keeps only its part of masters and moments; also in a group of one, so that its steps are
    /// made as those of any other.
    pub(super) fn is_sharded(&self) -> bool {
        self.group.is_some() && self.strategy != Strategy::Ddp
    }

    /// Whether each rank keeps only its part of the gradients.
    pub(super) fn keeps_parts(&self) -> bool {
        self.group.is_some() && self.strategy == Strategy::Zero2
    }

    /// Whether a bucket under way takes memory that is free once it has arrived: its whole gradients, or a copy of
    /// them in another type.
    fn takes_memory(&self) -> bool {
        self.keeps_parts() || self.dtype == ReduceDtype::Bf16
    }
}

/// The gradients of one optimizer step. Clones share them.
#[derive(Clone)]
pub(super) struct Reducer(Arc<Mutex<Inner>>);

/// The place of a parameter's gradient in its bucket.
struct Slot {
    reducer: Reducer,
    bucket: usize,
    entry: usize,
    /// Whether the parameter has the type of the sums.
    is_fp32: bool,
}

impl Slot {
    /// Errors go through autograd as text, and are kept beside it.
    fn with<T>(&self, body: impl FnOnce(&mut Inner) -> Result<T>) -> SinkResult<T> {
        let mut inner = self.reducer.lock();
        no_grad(|| body(&mut inner)).map_err(|error| {
            let text = error.to_string();
            inner.failed.get_or_insert(error);
            text
        })
    }
}

impl GradSink for Slot {
    fn place(&self) -> SinkResult<Option<(Tensor, bool)>> {
        if !self.is_fp32 {
            return Ok(None);
        }
        self.with(|inner| inner.place(self.bucket, self.entry).map(Some))
    }

    fn placed(&self) -> SinkResult<()> {
        self.with(|inner| inner.arrived(self.bucket, self.entry))
    }

    fn accumulated(&self, param: Tensor) -> SinkResult<()> {
        self.with(|inner| inner.arrive(self.bucket, self.entry, &param))
    }
}

struct Inner {
    reduction: Reduction,
    buckets: Vec<Inbox>,
    /// Buckets in the order in which they leave.
    order: Vec<usize>,
    /// How many of `order` have left in this pass.
    left: usize,
    /// Whether gradients of this pass leave.
    sending: bool,
    under_way: VecDeque<(usize, Outgoing)>,
    /// What went wrong in a hook.
    failed: Option<Error>,
}

/// A bucket's gradients.
struct Inbox {
    layout: Arc<Layout>,
    device: Device,
    /// fp32 sums of all elements; under `zero2` only from the first arrival until they have left.
    whole: Option<Tensor>,
    /// Under `zero2`: fp32 sums of this rank's part over all ranks and passes so far.
    part: Option<Tensor>,
    /// Which entries of `whole` hold something of this step.
    filled: Vec<bool>,
    /// Which entries have arrived in this pass.
    arrived: Vec<bool>,
    has_left: bool,
}

/// A bucket under way.
struct Outgoing {
    work: Work,
    /// What arrives: the sums of the whole bucket or of this rank's part.
    sums: Tensor,
}

impl Reducer {
    pub(super) fn new(reduction: Reduction) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            reduction,
            buckets: Vec::new(),
            order: Vec::new(),
            left: 0,
            sending: false,
            under_way: VecDeque::new(),
            failed: None,
        })))
    }

    /// Takes care of a bucket of these parameters, which require gradients; its index is the number of buckets
    /// before it.
    pub(super) fn add(&self, layout: &Arc<Layout>, params: &[Tensor]) -> Result<()> {
        let mut inner = self.lock();
        let bucket = inner.buckets.len();
        let entries = layout.entries.len();
        inner.buckets.push(Inbox {
            layout: Arc::clone(layout),
            device: params[0].device(),
            whole: None,
            part: None,
            filled: vec![false; entries],
            arrived: vec![false; entries],
            has_left: false,
        });
        drop(inner);
        for (entry, param) in params.iter().enumerate() {
            let is_fp32 = param.kind() == Kind::Float;
            sail_torch::set_grad_sink(param, Slot { reducer: self.clone(), bucket, entry, is_fp32 })?;
        }
        Ok(())
    }

    /// Sets the order in which buckets leave, by their indices.
    pub(super) fn set_order(&self, order: Vec<usize>) {
        self.lock().order = order;
    }

    /// Begins a pass, whose gradients leave when `sending`.
    pub(super) fn begin(&self, sending: bool) {
        let mut inner = self.lock();
        inner.sending = sending;
        inner.left = 0;
        for inbox in &mut inner.buckets {
            inbox.arrived.fill(false);
            inbox.has_left = false;
        }
    }

    /// Ends a pass: what has not left leaves, and everything has arrived when this returns.
    ///
    /// # Errors
    /// Those of the collectives.
    pub(super) fn end(&self) -> Result<()> {
        let mut inner = self.lock();
        if !inner.sending {
            return Ok(());
        }
        no_grad(|| {
            while inner.left < inner.order.len() {
                inner.send_next()?;
            }
            while inner.settle_oldest()? {}
            Ok(())
        })
    }

    /// What went wrong in a hook since the last call.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.lock().failed.take()
    }

    /// The summed gradients of a bucket that this rank works with: its part, or under `ddp` the whole.
    pub(super) fn gradients(&self, bucket: usize) -> Result<Tensor> {
        let mut inner = self.lock();
        let part = inner.part_of(bucket);
        let Inner { reduction, buckets, .. } = &mut *inner;
        let inbox = &mut buckets[bucket];
        if reduction.keeps_parts() {
            let zeros = || Tensor::zeros([part.end - part.start], (Kind::Float, inbox.device));
            return Ok(inbox.part.get_or_insert_with(zeros).shallow_clone());
        }
        let whole = inbox.whole()?;
        Ok(if reduction.is_sharded() { narrow(&whole, &part)? } else { whole })
    }

    /// Bytes of gradients that are kept between passes.
    pub(super) fn kept_bytes(&self) -> usize {
        let inner = self.lock();
        let tensors = inner.buckets.iter().flat_map(|inbox| [&inbox.whole, &inbox.part]).flatten();
        tensors.map(|tensor| 4 * tensor.numel()).sum()
    }

    /// Forgets the gradients of the step.
    pub(super) fn clear(&self) {
        for inbox in &mut self.lock().buckets {
            inbox.filled.fill(false);
            inbox.part = None;
        }
    }

    /// Forgets the gradients of a step that is not made, and their memory with what is between parameters: a factor
    /// that is not a number has made that no number either, and no gradient ever comes over it.
    pub(super) fn discard(&self) {
        self.clear();
        for inbox in &mut self.lock().buckets {
            inbox.whole = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

impl Inner {
    /// What this rank owns of a bucket.
    fn part_of(&self, bucket: usize) -> Range<i64> {
        let (rank, world) = self.reduction.place();
        self.buckets[bucket].layout.shard(rank, world)
    }

    /// Where the gradient of an entry is summed, and whether something is there.
    fn place(&mut self, bucket: usize, entry: usize) -> Result<(Tensor, bool)> {
        let inbox = &mut self.buckets[bucket];
        if inbox.arrived[entry] || inbox.has_left {
            let name = &inbox.layout.entries[entry].name;
            let reason =
                format!("a second gradient of `{name}` in a pass, after the first was taken as the whole");
            return Err(sail_torch::Error::Argument { op: "backward", reason }.into());
        }
        Ok((inbox.view(entry)?, inbox.filled[entry]))
    }

    /// Takes the gradient that autograd has added up.
    fn arrive(&mut self, bucket: usize, entry: usize, param: &Tensor) -> Result<()> {
        let Some(grad) = sail_torch::take_grad(param)? else { return Ok(()) };
        let (mut sum, holds) = self.place(bucket, entry)?;
        if holds {
            let _ = sum.f_add_(&grad)?;
        } else {
            sum.f_copy_(&grad)?;
        }
        self.arrived(bucket, entry)
    }

    /// The gradient of an entry is in its place; what is complete leaves.
    fn arrived(&mut self, bucket: usize, entry: usize) -> Result<()> {
        let inbox = &mut self.buckets[bucket];
        inbox.filled[entry] = true;
        inbox.arrived[entry] = true;
        if self.sending {
            while self.order.get(self.left).is_some_and(|&next| self.buckets[next].is_complete()) {
                self.send_next()?;
            }
        }
        Ok(())
    }

    /// Sends the next bucket, with zeros where nothing has come.
    fn send_next(&mut self) -> Result<()> {
        let bucket = self.order[self.left];
        if self.reduction.takes_memory() {
            let numel = |bucket: usize| self.buckets[bucket].layout.numel;
            let mut elements =
                numel(bucket) + self.under_way.iter().map(|(sent, _)| numel(*sent)).sum::<i64>();
            while self.under_way.len() >= UNDER_WAY && elements > UNDER_WAY_ELEMENTS {
                elements -= self.buckets[self.under_way[0].0].layout.numel;
                self.settle_oldest()?;
            }
        }
        self.left += 1;
        let part = self.part_of(bucket);
        let inbox = &mut self.buckets[bucket];
        inbox.has_left = true;
        let whole = inbox.whole()?;
        let Some(group) = &self.reduction.group else { return Ok(()) };
        let outgoing = match self.reduction.dtype {
            ReduceDtype::Fp32 => whole,
            ReduceDtype::Bf16 => whole.f_to_kind(Kind::BFloat16)?,
        };
        let sent = match self.reduction.strategy {
            Strategy::Ddp => Outgoing { work: group.all_reduce(&outgoing, ReduceOp::Sum)?, sums: outgoing },
            Strategy::Zero1 | Strategy::Zero2 => {
                // In place: the part that arrives lies where it was.
                let sums = narrow(&outgoing, &part)?;
                Outgoing { work: group.reduce_scatter(&sums, &outgoing)?, sums }
            }
        };
        self.under_way.push_back((bucket, sent));
        Ok(())
    }

    /// Waits for the bucket that is under way for longest; false without any.
    fn settle_oldest(&mut self) -> Result<bool> {
        let Some((bucket, Outgoing { work, sums })) = self.under_way.pop_front() else { return Ok(false) };
        work.wait()?;
        let part = self.part_of(bucket);
        let inbox = &mut self.buckets[bucket];
        match self.reduction.strategy {
            Strategy::Zero2 => {
                match &mut inbox.part {
                    Some(so_far) => drop(so_far.f_add_(&sums)?),
                    None => inbox.part = Some(sums.f_to_dtype(Kind::Float, false, true)?),
                }
                inbox.whole = None;
                inbox.filled.fill(false);
            }
            Strategy::Ddp if self.reduction.dtype == ReduceDtype::Bf16 => inbox.whole()?.f_copy_(&sums)?,
            Strategy::Zero1 if self.reduction.dtype == ReduceDtype::Bf16 => {
                narrow(&inbox.whole()?, &part)?.f_copy_(&sums)?;
            }
            Strategy::Ddp | Strategy::Zero1 => {}
        }
        Ok(true)
    }
}

impl Inbox {
    fn is_complete(&self) -> bool {
        self.arrived.iter().all(|arrived| *arrived)
    }

    /// Where the gradient of an entry is summed.
    fn view(&mut self, entry: usize) -> Result<Tensor> {
        let whole = self.buffer()?;
        let Layout { entries, .. } = &*self.layout;
        Ok(narrow(&whole, &entries[entry].range)?.f_view(&entries[entry].shape[..])?)
    }

    /// The sums, zero where nothing has come in this step.
    fn whole(&mut self) -> Result<Tensor> {
        let whole = self.buffer()?;
        for (entry, _) in self.filled.iter().enumerate().filter(|(_, filled)| !**filled) {
            let _ = narrow(&whole, &self.layout.entries[entry].range)?.f_zero_()?;
        }
        self.filled.fill(true);
        Ok(whole)
    }

    fn buffer(&mut self) -> Result<Tensor> {
        if self.whole.is_none() {
            self.whole = Some(Tensor::f_zeros([self.layout.numel], (Kind::Float, self.device))?);
        }
        let whole = self.whole.as_ref().expect("invariant: made above");
        Ok(whole.shallow_clone())
    }
}

/// A range of a flat tensor, sharing its memory.
pub(super) fn narrow(flat: &Tensor, range: &Range<i64>) -> Result<Tensor> {
    Ok(flat.f_narrow(0, range.start, range.end - range.start)?)
}
