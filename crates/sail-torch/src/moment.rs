//! Moments in the time of a device, between which what it computes can be measured.

use std::ptr::NonNull;
use std::time::Instant;

use tch::Device;

use crate::call::{check, outcome};
use crate::error::Result;
use crate::ffi::{self, RawEvent};

/// A moment in the time of a device: on the CPU when it was asked for, on CUDA when the device comes to it in the work
/// that the calling thread has queued before.
#[derive(Debug)]
pub struct Moment(Inner);

#[derive(Debug)]
enum Inner {
    Host(Instant),
    Event(Event),
}

/// An event with its time, recorded once.
#[derive(Debug)]
struct Event(NonNull<RawEvent>);

// SAFETY: an event may be read and freed on any thread.
unsafe impl Send for Event {}

impl Moment {
    /// What the device has come to when it has done all that this thread has queued. Does not wait for it.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) when there is no such device.
    pub fn now(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { return Ok(Self(Inner::Host(Instant::now()))) };
        let mut raw: *mut RawEvent = std::ptr::null_mut();
        // SAFETY: any number may be given, and `raw` is a valid place for one pointer.
        let error = unsafe { ffi::sail_event_record(index as i32, &raw mut raw) };
        outcome("Moment::now", error)?;
        Ok(Self(Inner::Event(Event(NonNull::new(raw).expect("invariant: given without an error")))))
    }

    /// Seconds from this moment to a later one of the same device; it must have come to both.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) for moments of a CPU and of a CUDA device,
    /// [`Error::Torch`](crate::Error::Torch) when the device has not come to one of them.
    pub fn secs_until(&self, later: &Self) -> Result<f64> {
        const OP: &str = "secs_until";
        match (&self.0, &later.0) {
            (Inner::Host(from), Inner::Host(to)) => Ok(to.duration_since(*from).as_secs_f64()),
            (Inner::Event(from), Inner::Event(to)) => {
                let mut millis = 0.0;
                // SAFETY: two live events, and a valid place for the answer.
                let error =
                    unsafe { ffi::sail_event_elapsed(from.0.as_ptr(), to.0.as_ptr(), &raw mut millis) };
                outcome(OP, error)?;
                Ok(1e-3 * millis)
            }
            _ => check(OP, false, || "one moment is of a CPU, the other of a CUDA device".to_owned())
                .map(|()| 0.0),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the pointer is owned by this value alone.
        unsafe { ffi::sail_event_free(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tch::{Cuda, Kind, Tensor};

    use super::*;
    use crate::Error;

    #[test]
    fn on_the_cpu_it_is_now() {
        let [from, to] = [0, 20].map(|millis| {
            std::thread::sleep(Duration::from_millis(millis));
            Moment::now(Device::Cpu).unwrap()
        });
        let secs = from.secs_until(&to).unwrap();
        assert!((0.02..1.0).contains(&secs), "{secs}");
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        let error = Moment::now(Device::Cuda(Cuda::device_count() as usize)).unwrap_err();
        assert!(matches!(error, Error::Torch { .. }), "{error:?}");
    }

    #[test]
    fn on_cuda_it_is_when_the_work_before_is_done() {
        if !Cuda::is_available() {
            return;
        }
        let device = Device::Cuda(0);
        let x = Tensor::ones([4096, 4096], (Kind::Float, device));
        let from = Moment::now(device).unwrap();
        let asked = Instant::now();
        let y = (0..50).fold(x.shallow_clone(), |y, _| y.matmul(&x) / 4096.0);
        let queueing = asked.elapsed();
        let to = Moment::now(device).unwrap();
        assert!((y.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 1e-3);
        let secs = from.secs_until(&to).unwrap();
        assert!(secs > queueing.as_secs_f64() && secs <= asked.elapsed().as_secs_f64(), "{secs}");
        assert!(from.secs_until(&Moment::now(Device::Cpu).unwrap()).is_err());
    }
}
