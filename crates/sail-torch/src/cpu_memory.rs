//! How much memory libtorch takes on the CPU while something runs. Not the process's: only what its allocator
//! gives to tensors and to their operations' scratch space, to the byte and without what was there before.

use crate::call::outcome;
use crate::error::Result;
use crate::ffi::{self, RawCpuMemory};

/// What the CPU allocator gave out during a call of [`measure`], bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The most that was in use at once.
    pub peak_bytes: i64,
    /// What is still in use.
    pub left_bytes: i64,
}

/// Runs `body` and measures what the CPU allocator gives out on this thread meanwhile, the backward passes that
/// it starts included. What was allocated before does not count, nor does it when it is freed.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) inside another measurement of this thread.
pub fn measure<T>(body: impl FnOnce() -> T) -> Result<(T, Usage)> {
    let watch = Watch::begin()?;
    let result = body();
    Ok((result, watch.end()))
}

/// An unfinished measurement, which belongs to the thread that began it; a panic of the body ends it too.
struct Watch(*mut RawCpuMemory);

impl Watch {
    fn begin() -> Result<Self> {
        let mut raw: *mut RawCpuMemory = std::ptr::null_mut();
        // SAFETY: `raw` is a valid place for one pointer.
        let error = unsafe { ffi::sail_cpu_memory_begin(&raw mut raw) };
        outcome("cpu_memory::measure", error)?;
        Ok(Self(raw))
    }

    fn end(mut self) -> Usage {
        self.stop()
    }

    fn stop(&mut self) -> Usage {
        let mut usage = Usage::default();
        let raw = std::mem::replace(&mut self.0, std::ptr::null_mut());
        if !raw.is_null() {
            let Usage { peak_bytes, left_bytes } = &mut usage;
            // SAFETY: `raw` is what `sail_cpu_memory_begin` gave on this thread, and was not ended before.
            unsafe { ffi::sail_cpu_memory_end(raw, left_bytes, peak_bytes) };
        }
        usage
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn the_peak_is_above_what_is_left() {
        let before = Tensor::zeros([1000], CPU);
        let (kept, usage) = measure(|| {
            let kept = Tensor::zeros([500], CPU);
            drop(Tensor::zeros([3000], CPU));
            drop(before);
            kept
        })
        .unwrap();
        assert_eq!(usage, Usage { peak_bytes: 14_000, left_bytes: 2000 });
        drop(kept);
        assert_eq!(measure(|| ()).unwrap().1, Usage::default());
    }

    #[test]
    fn a_backward_pass_is_measured() {
        let x = Tensor::ones([1000], CPU).set_requires_grad(true);
        let ((), usage) = measure(|| x.square().sum(Kind::Float).backward()).unwrap();
        assert!(usage.left_bytes >= 4000, "the gradient: {usage:?}");
        assert!(usage.peak_bytes >= 8000, "{usage:?}");
    }

    #[test]
    fn measurements_do_not_nest_and_end_with_a_panic() {
        let inner = measure(|| measure(|| ()).map(drop).unwrap_err().to_string()).unwrap().0;
        assert!(inner.contains("already"), "{inner}");
        assert!(std::panic::catch_unwind(|| measure(|| panic!("in the body"))).is_err());
        measure(|| ()).unwrap();
    }
}
