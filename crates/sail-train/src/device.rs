//! Where tensors live and what the model computes in: a configuration's words as libtorch's values.
//!
//! Called by the session, the ranks' meeting, and the commands that use a trained model.

use tch::{Cuda, Device, Kind};

use crate::config::{DeviceChoice, Precision};
use crate::error::{Error, Result};
use crate::world::Place;

/// Has the calling thread work on the device of a rank: `auto` is the one of its place on its host.
pub(crate) fn take_device(choice: DeviceChoice, place: &Place) -> Result<Device> {
    let device = rank_device(choice, place)?;
    sail_torch::set_device(device)?;
    Ok(device)
}

fn rank_device(choice: DeviceChoice, place: &Place) -> Result<Device> {
    match choice {
        DeviceChoice::Auto if Cuda::is_available() => choose_device(DeviceChoice::Cuda(place.local_rank)),
        DeviceChoice::Cuda(_) if place.local_size > 1 => Err(Error::usage(
            format!(
                "`run.device` is `{choice}`, and {} ranks on this host cannot share it",
                place.local_size
            ),
            "write `auto`, which gives each rank a device of its own",
        )),
        _ => choose_device(choice),
    }
}

/// A device that is there.
pub(crate) fn choose_device(choice: DeviceChoice) -> Result<Device> {
    let index = match choice {
        DeviceChoice::Cpu => return Ok(Device::Cpu),
        DeviceChoice::Auto if !Cuda::is_available() => return Ok(Device::Cpu),
        DeviceChoice::Auto => 0,
        DeviceChoice::Cuda(index) => index,
    };
    let found = Cuda::device_count();
    if (index as i64) < found {
        return Ok(Device::Cuda(index));
    }
    Err(Error::usage(
        format!("the device is `{choice}`, but libtorch sees {found} CUDA devices"),
        "choose `cpu` (`run.device` or `--device`), or check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    ))
}

/// The type of the forward pass.
pub(crate) fn choose_precision(choice: Precision, device: Device) -> Kind {
    match choice {
        Precision::Bf16 => Kind::BFloat16,
        Precision::Auto if device.is_cuda() => Kind::BFloat16,
        Precision::Auto | Precision::Fp32 => Kind::Float,
    }
}
