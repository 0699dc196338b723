//! Collectives among processes (c10d), with Gloo on the CPU or NCCL on CUDA.
//!
//! Every rank of a group makes the same calls in the same order with tensors of the same size and type.

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::call::{c_string, check, outcome};
use crate::error::{Error, Result};
use crate::ffi::{self, RawError, RawGroup, RawWork};
use crate::profiler::span;
use crate::store::{Store, millis};

/// Who moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// TCP between hosts; tensors are on the CPU.
    Gloo,
    /// NVIDIA's library; tensors are on this CUDA device.
    Nccl(usize),
}

impl Backend {
    /// The one for tensors on `device`.
    pub fn for_device(device: Device) -> Self {
        match device {
            Device::Cuda(index) => Self::Nccl(index),
            _ => Self::Gloo,
        }
    }

    fn device(self) -> Device {
        match self {
            Self::Gloo => Device::Cpu,
            Self::Nccl(index) => Device::Cuda(index),
        }
    }
}

/// How elements at the same place are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
}

impl ReduceOp {
    /// `c10d::ReduceOp::RedOpType`.
    fn code(self) -> u8 {
        match self {
            Self::Sum => 0,
            Self::Max => 4,
        }
    }
}

/// How a group is made.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// Tells its keys in the store from those of other groups.
    pub name: String,
    /// Who moves the bytes.
    pub backend: Backend,
    /// This process, from 0.
    pub rank: usize,
    /// Processes in the group.
    pub size: usize,
    /// How long a collective may take.
    pub timeout: Duration,
    /// Gloo: the local address that the other ranks reach this process at. `None` leaves the choice to
    /// `GLOO_SOCKET_IFNAME` or to what the host's name resolves to.
    pub address: Option<String>,
}

/// Processes that make collectives together.
///
/// One with [`Backend::Nccl`] that goes before [`ProcessGroup::shut_down`] is left as it is until the process ends:
/// c10d's destructor would wait for collectives that a rank which has failed never makes.
#[derive(Debug)]
pub struct ProcessGroup {
    raw: NonNull<RawGroup>,
    options: GroupOptions,
    is_shut_down: AtomicBool,
    sent_bytes: AtomicU64,
    started: Arc<AtomicU64>,
    waits: Arc<Waits>,
    link: Option<Link>,
}

/// Held while a Gloo collective is queued: c10d's flight recorder, which all groups of a process share, notes it
/// without a lock.
static QUEUEING: Mutex<()> = Mutex::new(());

// SAFETY: c10d's backends may be called from any thread.
unsafe impl Send for ProcessGroup {}
// SAFETY: the backends queue what they are given under locks of their own, but for what `QUEUEING` guards.
unsafe impl Sync for ProcessGroup {}

/// How long works were waited for, whatever the thread; time that two are waited for at once counts once.
#[derive(Debug, Default)]
struct Waits {
    waited: Mutex<Waited>,
    told: Mutex<Option<Told>>,
}

/// Who is told of waits.
#[derive(Clone)]
struct Told(Arc<dyn Fn(bool) + Send + Sync>);

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Told")
    }
}

#[derive(Debug, Default)]
struct Waited {
    /// Until no work was waited for.
    ended: Duration,
    /// Works that are waited for now, and since when there is one.
    under_way: usize,
    since: Option<Instant>,
}

/// A link that is slower than the real one, to study overlap on one machine: it carries one collective after
/// the other, and each ends when its bytes would have gone through.
#[derive(Debug)]
struct Link {
    bytes_per_sec: f64,
    free_at: Mutex<Instant>,
}

impl ProcessGroup {
    /// Joins the group; returns once every rank has.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rank outside the group; [`Error::Timeout`] and [`Error::Network`] when another
    /// rank does not come or cannot be reached; [`Error::Torch`] when the build has no such backend.
    pub fn join(store: &Store, options: GroupOptions) -> Result<Self> {
        const OP: &str = "ProcessGroup::join";
        let GroupOptions { name, backend, rank, size, timeout, address } = &options;
        check(OP, rank < size, || format!("rank {rank} of a group of {size}"))?;
        let (name, address) = (c_string(OP, name)?, c_string(OP, address.as_deref().unwrap_or_default())?);
        let (rank, group_size, timeout) = (*rank as i32, *size as i32, millis(*timeout));
        let mut raw = std::ptr::null_mut();
        let error = match *backend {
            // SAFETY: a live store, NUL-terminated strings, and a valid place for one pointer.
            Backend::Gloo => unsafe {
                ffi::sail_gloo_new(
                    store.raw(),
                    name.as_ptr(),
                    rank,
                    group_size,
                    timeout,
                    address.as_ptr(),
                    &raw mut raw,
                )
            },
            // SAFETY: as above.
            Backend::Nccl(device) => unsafe {
                ffi::sail_nccl_new(
                    store.raw(),
                    name.as_ptr(),
                    rank,
                    group_size,
                    timeout,
                    device as i32,
                    &raw mut raw,
                )
            },
        };
        outcome(OP, error)?;
        let raw = NonNull::new(raw).expect("invariant: given without an error");
        let (is_shut_down, sent_bytes) = (AtomicBool::new(false), AtomicU64::new(0));
        let (started, waits) = (Arc::default(), Arc::default());
        Ok(Self { raw, options, is_shut_down, sent_bytes, started, waits, link: None })
    }

    /// Makes collectives take as long as over a link of this many bytes a second, one after the other.
    #[must_use]
    pub fn with_simulated_link(mut self, bytes_per_sec: f64) -> Self {
        self.link = Some(Link { bytes_per_sec, free_at: Mutex::new(Instant::now()) });
        self
    }

    /// Counts the collectives that it starts.
    #[must_use]
    pub fn with_counter(mut self, started: Arc<AtomicU64>) -> Self {
        self.started = started;
        self
    }

    /// This process, from 0.
    pub fn rank(&self) -> usize {
        self.options.rank
    }

    /// Processes in the group.
    pub fn size(&self) -> usize {
        self.options.size
    }

    /// Where the tensors of its collectives are.
    pub fn device(&self) -> Device {
        self.options.backend.device()
    }

    /// Bytes that this rank's collectives have sent so far, by the algorithms' formulas: N ranks, b bytes,
    /// all-reduce 2 (N-1)/N b, reduce-scatter and all-gather (N-1)/N b of the whole.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// How long works were waited for so far, those included that are waited for now. On CUDA a wait lets the stream
    /// wait, not the host, and takes next to no time.
    pub fn waited(&self) -> Duration {
        self.waits.so_far()
    }

    /// Has `told` called, in place of an earlier one, with true before each wait for a work and with false after it, on
    /// the thread that waits; what on CUDA the stream waits for lies between what is queued there at these moments.
    pub fn on_wait(&self, told: impl Fn(bool) + Send + Sync + 'static) {
        *self.waits.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(Told(Arc::new(told)));
    }

    /// How long each further collective may take.
    pub fn set_timeout(&self, timeout: Duration) -> Result<()> {
        // SAFETY: a live group.
        let error = unsafe { ffi::sail_group_set_timeout(self.raw.as_ptr(), millis(timeout)) };
        outcome("set_timeout", error)
    }

    /// Leaves the group once every collective has ended; it is not to be used afterwards. Every rank makes the same
    /// call, a second one does nothing. Gloo has nothing to do here.
    ///
    /// # Errors
    /// Those of NCCL.
    pub fn shut_down(&self) -> Result<()> {
        if self.is_shut_down.load(Ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: a live group.
        outcome("shut_down", unsafe { ffi::sail_group_shut_down(self.raw.as_ptr()) })?;
        self.is_shut_down.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Starts to put the tensors of all ranks together, in place.
    ///
    /// # Errors
    /// [`Error::Argument`] when the tensor is not contiguous, elsewhere, or of a type that is not summed.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work> {
        const OP: &str = "all_reduce";
        self.check_tensor(OP, tensor)?;
        let bytes = 2 * self.share_of(tensor);
        self.start(OP, [tensor], bytes, |out| {
            // SAFETY: a live group, a live contiguous tensor on its device, and a valid place for one pointer.
            unsafe { ffi::sail_all_reduce(self.raw.as_ptr(), tensor.as_ptr(), op.code(), out) }
        })
    }

    /// Starts to give every rank `root`'s tensor, in place.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`], and for a `root` outside the group.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work> {
        const OP: &str = "broadcast";
        self.check_tensor(OP, tensor)?;
        check(OP, root < self.size(), || format!("root {root} of a group of {}", self.size()))?;
        let bytes = self.share_of(tensor);
        self.start(OP, [tensor], bytes, |out| {
            // SAFETY: as in `all_reduce`, and a root that is in the group.
            unsafe { ffi::sail_broadcast(self.raw.as_ptr(), tensor.as_ptr(), root as i64, out) }
        })
    }

    /// Starts to sum `whole` over all ranks; this one receives the part of it that is `part`'s size and at
    /// its rank's place.
    ///
    /// On Gloo, whose reduce-scatter moves as much as an all-reduce, the parts are exchanged and summed in
    /// the order of the ranks.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_reduce`], and when `whole` is not the group's size times `part`.
    pub fn reduce_scatter(&self, part: &Tensor, whole: &Tensor) -> Result<Work> {
        const OP: &str = "reduce_scatter";
        self.check_parts(OP, part, whole)?;
        let bytes = self.share_of(whole);
        if self.options.backend != Backend::Gloo {
            return self.start(OP, [part, whole], bytes, |out| {
                // SAFETY: a live group, two live contiguous tensors of one type on its device, one the group's
                // size times the other, and a valid place for one pointer.
                unsafe { ffi::sail_reduce_scatter(self.raw.as_ptr(), part.as_ptr(), whole.as_ptr(), out) }
            });
        }
        let parts = whole.f_empty_like().map_err(|error| torch(OP, &error))?;
        let mut work = self.start(OP, [&parts, whole], bytes, |out| {
            // SAFETY: as above, with two tensors of the same size, which the group's size divides.
            unsafe { ffi::sail_all_to_all(self.raw.as_ptr(), parts.as_ptr(), whole.as_ptr(), out) }
        })?;
        work.sum_into = Some((parts.view([self.size() as i64, -1]), part.view(-1)));
        Ok(work)
    }

    /// Starts to collect the parts of all ranks, in their order, in `whole`.
    ///
    /// # Errors
    /// As [`ProcessGroup::reduce_scatter`].
    pub fn all_gather(&self, whole: &Tensor, part: &Tensor) -> Result<Work> {
        const OP: &str = "all_gather";
        self.check_parts(OP, part, whole)?;
        let bytes = self.share_of(whole);
        self.start(OP, [whole, part], bytes, |out| {
            // SAFETY: a live group, two live contiguous tensors of one type on its device, one the group's size
            // times the other, and a valid place for one pointer.
            unsafe { ffi::sail_all_gather(self.raw.as_ptr(), whole.as_ptr(), part.as_ptr(), out) }
        })
    }

    /// Waits until every rank has come here.
    pub fn barrier(&self) -> Result<()> {
        let work = self.start("barrier", [], 0, |out| {
            // SAFETY: a live group and a valid place for one pointer.
            unsafe { ffi::sail_barrier(self.raw.as_ptr(), out) }
        })?;
        work.wait()
    }

    fn start<const N: usize>(
        &self,
        op: &'static str,
        tensors: [&Tensor; N],
        bytes: u64,
        call: impl FnOnce(*mut *mut RawWork) -> *mut RawError,
    ) -> Result<Work> {
        let mut raw = std::ptr::null_mut();
        let error = {
            let gloo = self.options.backend == Backend::Gloo;
            let _queueing = gloo.then(|| QUEUEING.lock().unwrap_or_else(PoisonError::into_inner));
            call(&raw mut raw)
        };
        outcome(op, error)?;
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.started.fetch_add(1, Ordering::Relaxed);
        Ok(Work {
            op,
            raw: NonNull::new(raw).expect("invariant: given without an error"),
            tensors: tensors.map(Tensor::shallow_clone).into(),
            sum_into: None,
            waits: Arc::clone(&self.waits),
            not_before: self.link.as_ref().map(|link| link.carry(bytes)),
        })
    }

    fn check_tensor(&self, op: &'static str, tensor: &Tensor) -> Result<()> {
        check(op, tensor.is_contiguous(), || format!("needs a contiguous tensor, got {tensor:?}"))?;
        check(op, tensor.device() == self.device(), || {
            format!("the group is on {:?}, the tensor on {:?}", self.device(), tensor.device())
        })?;
        let kinds = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64, Kind::Uint8];
        check(op, kinds.contains(&tensor.kind()), || format!("cannot move {:?}", tensor.kind()))
    }

    fn check_parts(&self, op: &'static str, part: &Tensor, whole: &Tensor) -> Result<()> {
        self.check_tensor(op, part)?;
        self.check_tensor(op, whole)?;
        check(op, part.kind() == whole.kind(), || {
            format!("the part is {:?}, the whole {:?}", part.kind(), whole.kind())
        })?;
        check(op, part.numel() * self.size() == whole.numel(), || {
            format!("{} parts of {} do not make a whole of {}", self.size(), part.numel(), whole.numel())
        })
    }

    /// (N-1)/N of the tensor's bytes.
    fn share_of(&self, tensor: &Tensor) -> u64 {
        let (bytes, size) = ((tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64, self.size() as u64);
        bytes * (size - 1) / size
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if self.options.backend != Backend::Gloo && !*self.is_shut_down.get_mut() {
            return;
        }
        // SAFETY: the pointer is owned by this value alone.
        unsafe { ffi::sail_group_free(self.raw.as_ptr()) };
    }
}

impl Waits {
    fn during<T>(&self, wait: impl FnOnce() -> T) -> T {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let tell = |begins| {
            if let Some(Told(told)) = &told {
                told(begins);
            }
        };
        tell(true);
        {
            let mut waited = self.lock();
            waited.under_way += 1;
            waited.since.get_or_insert_with(Instant::now);
        }
        let result = wait();
        {
            let mut waited = self.lock();
            waited.under_way -= 1;
            if waited.under_way == 0 {
                waited.ended = waited.so_far();
                waited.since = None;
            }
        }
        tell(false);
        result
    }

    fn so_far(&self) -> Duration {
        self.lock().so_far()
    }

    fn lock(&self) -> MutexGuard<'_, Waited> {
        self.waited.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waited {
    fn so_far(&self) -> Duration {
        self.ended + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Link {
    /// When the bytes will have gone through.
    fn carry(&self, bytes: u64) -> Instant {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*free_at).max(Instant::now());
        *free_at = start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_sec);
        *free_at
    }
}

/// A collective under way. Its tensors must not be used before [`Work::wait`] has returned.
#[derive(Debug)]
#[must_use = "the result is there after `wait`"]
pub struct Work {
    op: &'static str,
    raw: NonNull<RawWork>,
    /// Kept alive until it has ended.
    tensors: Vec<Tensor>,
    /// The rows of the first are summed into the second at the end.
    sum_into: Option<(Tensor, Tensor)>,
    waits: Arc<Waits>,
    not_before: Option<Instant>,
}

// SAFETY: c10d's works may be waited for on any thread.
unsafe impl Send for Work {}

impl Work {
    /// Waits for the end: on the CPU for the bytes, on CUDA only the current stream waits, not the host.
    ///
    /// # Errors
    /// [`Error::Timeout`] or [`Error::Network`] when another rank did not do its part.
    pub fn wait(mut self) -> Result<()> {
        let _span = span("communication");
        let waits = Arc::clone(&self.waits);
        waits.during(|| self.finish())
    }

    fn finish(&mut self) -> Result<()> {
        // SAFETY: a live work.
        let error = unsafe { ffi::sail_work_wait(self.raw.as_ptr()) };
        outcome(self.op, error)?;
        if let Some((rows, mut sum)) = self.sum_into.take() {
            tch::no_grad(|| {
                // One row after the other: the order of the sum is that of the ranks.
                sum.f_copy_(&rows.get(0))?;
                (1..rows.size()[0]).try_for_each(|row| sum.f_add_(&rows.get(row)).map(drop))
            })
            .map_err(|error| torch(self.op, &error))?;
        }
        if let Some(end) = self.not_before {
            std::thread::sleep(end.saturating_duration_since(Instant::now()));
        }
        self.tensors.clear();
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: the pointer is owned by this value alone.
        unsafe { ffi::sail_work_free(self.raw.as_ptr()) };
    }
}

fn torch(op: &'static str, error: &tch::TchError) -> Error {
    Error::Torch { op, message: error.to_string() }
}

#[cfg(test)]
mod tests;
