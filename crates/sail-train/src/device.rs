//! Where tensors live, what the model computes in, and how fast that may be: a configuration's words as libtorch's
//! values.
//!
//! Called by the session, the ranks' meeting, and the commands that use a trained model.

use tch::{Cuda, Device};

use crate::config::{DeviceChoice, LogPlan, Precision};
use crate::error::{Error, Result};
use crate::estimate::peak::peak_tflops;
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

/// What the forward pass computes in from now on; never `auto`.
pub(crate) fn take_precision(choice: Precision, device: Device) -> Result<Precision> {
    let precision = choice.on(device);
    if device.is_cuda() {
        // Left alone, libtorch rounds the factors of convolutions.
        sail_torch::set_tf32(precision == Precision::Tf32)?;
    } else if precision == Precision::Tf32 {
        return Err(Error::usage(
            "`run.precision` is `tf32`, which only CUDA devices have, and this runs on the CPU",
            "write `fp32` or `auto`",
        ));
    }
    Ok(precision)
}

/// What a device computes at most.
pub(crate) struct Peak {
    /// FLOP/s; None where nobody knows.
    flops: Option<f64>,
    /// What of, in messages.
    of: String,
}

impl Peak {
    /// As the plan says it, else as the data sheet of the device does.
    pub(crate) fn of(log: &LogPlan, device: Device, precision: Precision) -> Result<Self> {
        let name = sail_torch::device_name(device)?;
        let listed = name.as_deref().and_then(|name| peak_tflops(name, precision));
        let type_name = precision.name();
        let of = match (device, name) {
            (_, Some(name)) => format!("`{name}` in {type_name}"),
            (Device::Cuda(index), None) => format!("CUDA device {index} in {type_name}"),
            _ => format!("this CPU in {type_name}"),
        };
        Ok(Self { flops: log.peak_tflops.or(listed).map(|tflops| 1e12 * tflops), of })
    }

    /// The share of what so many such devices could compute in this time that these operations are.
    pub(crate) fn utilisation(&self, flops: u64, secs: f64, devices: usize) -> Option<f64> {
        self.flops.map(|peak| flops as f64 / (secs * devices as f64 * peak))
    }

    /// What to do to have a utilisation, where there is none.
    pub(crate) fn missing(&self) -> Option<String> {
        self.flops.is_none().then(|| {
            format!(
                "no `mfu`: what {} computes at most is not known here; `log.peak_tflops` can say it",
                self.of
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn tf32_is_for_cuda_alone() {
        let on = |choice: Precision, device| (choice.on(device), choice.on(device).kind());
        assert_eq!(on(Precision::Auto, Device::Cuda(0)), (Precision::Bf16, Kind::BFloat16));
        assert_eq!(on(Precision::Tf32, Device::Cuda(0)), (Precision::Tf32, Kind::Float));
        assert_eq!(take_precision(Precision::Auto, Device::Cpu).unwrap(), Precision::Fp32);
        assert_eq!(take_precision(Precision::Bf16, Device::Cpu).unwrap(), Precision::Bf16);
        let error = take_precision(Precision::Tf32, Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("`run.precision` is `tf32`"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
