//! The device that a thread works on, its name, and what libtorch holds there.

use tch::kind::Element;
use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::call::outcome;
use crate::error::Result;
use crate::ffi;

/// Has the calling thread work on `device`. libtorch's operations find the device of their tensors themselves;
/// this is for what CUDA makes without a tensor, which would else go to device 0 in every process. The CPU needs
/// no call.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) when there is no such device.
pub fn set_device(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else { return Ok(()) };
    // SAFETY: any number may be given; one that no device has is an error.
    outcome("set_device", unsafe { ffi::sail_set_device(index as i32) })
}

/// Whether CUDA devices may round the factors of fp32 matrix products and convolutions to TF32, in this process from now on.
/// libtorch's defaults are no for products and yes for convolutions.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) when libtorch refuses.
pub fn set_tf32(allowed: bool) -> Result<()> {
    // SAFETY: any value may be given.
    outcome("set_tf32", unsafe { ffi::sail_set_tf32(allowed) })
}

/// Whether this process has a CUDA context on a device, which takes some hundred MB of its memory.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) when there is no such device.
pub fn has_context(cuda_index: usize) -> Result<bool> {
    let mut there = false;
    // SAFETY: any number may be given, and `there` is a valid place for the answer.
    let error = unsafe { ffi::sail_has_context(cuda_index as i32, &raw mut there) };
    outcome("has_context", error)?;
    Ok(there)
}

/// The most memory of a device that libtorch has held in this process so far, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPeak {
    /// In tensors.
    pub allocated: u64,
    /// Taken from the device to make tensors in.
    pub reserved: u64,
}

/// The peak of a device that tensors were made on; None for the CPU, which nobody counts.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) when no tensor was made there yet.
pub fn memory_peak(device: Device) -> Result<Option<MemoryPeak>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (mut allocated, mut reserved) = (0i64, 0i64);
    // SAFETY: any number may be given, and both are valid places for an answer.
    let error = unsafe { ffi::sail_memory_peak(index as i32, &raw mut allocated, &raw mut reserved) };
    outcome("memory_peak", error)?;
    Ok(Some(MemoryPeak { allocated: allocated as u64, reserved: reserved as u64 }))
}

/// What the CUDA driver calls a device, such as `NVIDIA H100 80GB HBM3`; None for the CPU, and where the headers of CUDA
/// were not found when this was compiled.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) when there is no such device.
pub fn device_name(device: Device) -> Result<Option<String>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let mut name = [0u8; 256];
    // SAFETY: any number may be given; `name` has so many bytes, and is an empty string.
    let error = unsafe { ffi::sail_device_name(index as i32, name.as_mut_ptr().cast(), name.len()) };
    outcome("device_name", error)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned()))
}

/// Values `[n]` on a device. To CUDA they travel beside what the device computes, and the host does not wait: a copy of
/// [`Tensor::to_device`] from memory that is not pinned waits until the device has done all that was queued.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) when there is no such device or no memory.
pub fn upload<T: Element>(data: &[T], device: Device) -> Result<Tensor> {
    let Device::Cuda(index) = device else { return Ok(Tensor::from_slice(data)) };
    // SAFETY: `data` are so many, lie one after the other and outlive this view of them.
    let view =
        unsafe { Tensor::from_blob(data.as_ptr().cast(), &[data.len() as i64], &[1], T::KIND, Device::Cpu) };
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: a live tensor, read before the call returns, and a valid place for one pointer.
    let error = unsafe { ffi::sail_upload(index as i32, view.as_ptr(), &raw mut out) };
    outcome("upload", error)?;
    // SAFETY: given without an error, and owned by nobody else.
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[cfg(test)]
mod tests {
    use tch::{Cuda, Kind, Tensor};

    use super::*;
    use crate::Error;

    #[test]
    fn the_cpu_needs_no_call_and_has_no_peak() {
        set_device(Device::Cpu).unwrap();
        assert_eq!(memory_peak(Device::Cpu).unwrap(), None);
        assert_eq!(device_name(Device::Cpu).unwrap(), None);
    }

    #[test]
    fn products_round_to_tf32_where_they_may() {
        for allowed in [true, false] {
            set_tf32(allowed).unwrap();
        }
        if !Cuda::is_available() {
            return;
        }
        let x = Tensor::randn([256, 256], (Kind::Float, Device::Cuda(0)));
        let exact = x.to_kind(Kind::Double).matmul(&x.to_kind(Kind::Double));
        let error = |allowed| {
            set_tf32(allowed).unwrap();
            (x.matmul(&x).to_kind(Kind::Double) - &exact).abs().max().double_value(&[])
        };
        let (rounded, whole) = (error(true), error(false));
        // Without tensor cores for it nothing is rounded.
        assert!(whole < 1e-3 && rounded >= whole, "{rounded} {whole}");
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        let beyond = Cuda::device_count() as usize;
        for error in [
            set_device(Device::Cuda(beyond)).unwrap_err(),
            has_context(beyond).unwrap_err(),
            memory_peak(Device::Cuda(beyond)).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Torch { .. }), "{error:?}");
        }
    }

    #[test]
    fn uploads_have_the_values_they_were_given() {
        for device in [Device::Cpu].into_iter().chain(Cuda::is_available().then_some(Device::Cuda(0))) {
            let x = upload(&[1i64, 2, 3, 4, 5, 6], device).unwrap();
            assert_eq!((x.device(), x.kind(), x.size()), (device, Kind::Int64, vec![6]));
            assert_eq!(Vec::<i64>::try_from(x).unwrap(), [1, 2, 3, 4, 5, 6]);
            assert_eq!(upload::<f32>(&[], device).unwrap().size(), [0]);
        }
        assert!(upload(&[1.0f32], Device::Cuda(Cuda::device_count() as usize)).is_err());
    }

    /// What is queued before is many times longer than the copies, of which the host makes the next while the device has not
    /// come to the last. That what is read is what was copied is checked by `sail-gpu-check`.
    #[test]
    fn the_host_does_not_wait_for_uploads() {
        if !Cuda::is_available() {
            return;
        }
        let device = Device::Cuda(0);
        let x = Tensor::ones([8192, 8192], (Kind::Float, device));
        // What is made once: kernels, pinned memory.
        let _first = upload(&vec![0f32; 1 << 20], device).unwrap().mean(Kind::Float);
        let _first = x.matmul(&x);
        Cuda::synchronize(0);
        let started = std::time::Instant::now();
        let _busy = (0..20).fold(x.shallow_clone(), |y, _| y.matmul(&x) / 8192.0);
        let sums: Vec<Tensor> = (0..20u8)
            .map(|i| upload(&vec![f32::from(i); 1 << 20], device).unwrap().mean(Kind::Float))
            .collect();
        let queued = started.elapsed();
        Cuda::synchronize(0);
        assert!(queued < started.elapsed() / 2, "{queued:?} of {:?}", started.elapsed());
        for (i, sum) in sums.iter().enumerate() {
            assert!((sum.double_value(&[]) - i as f64).abs() < 1e-6);
        }
    }

    #[test]
    fn tensors_on_a_device_are_counted() {
        if !Cuda::is_available() {
            return;
        }
        let device = Device::Cuda(0);
        set_device(device).unwrap();
        let _tensor = Tensor::zeros([1 << 20], (Kind::Float, device));
        assert!(has_context(0).unwrap());
        let peak = memory_peak(device).unwrap().unwrap();
        assert!(device_name(device).unwrap().is_some_and(|name| !name.is_empty()));
        assert!(peak.allocated >= 4 << 20 && peak.reserved >= peak.allocated, "{peak:?}");
    }
}
