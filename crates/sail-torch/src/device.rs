//! The device that a thread works on, its name, and what libtorch holds there.

use tch::Device;

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
