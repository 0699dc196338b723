//! libtorch, its devices, and collectives between processes.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use sail_torch::{Backend, GroupOptions, ProcessGroup, ReduceOp, Store};
use tch::{Cuda, Device, Kind, Tensor};

use super::Finding;
use crate::config::Precision;
use crate::error::{Error, Result};
use crate::estimate::peak::peak_tflops;

const NAME: &str = "GPUs";
/// What ranks on one host take to meet, and far more.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn all() -> Vec<Finding> {
    let mut findings = vec![libtorch()];
    let count = Cuda::device_count() as usize;
    findings.extend(if count == 0 { vec![without_gpus()] } else { (0..count).map(gpu).collect() });
    findings.push(collectives(
        "collectives, Gloo",
        &[Backend::Gloo; 2],
        "is a loopback interface up, and does this host's name resolve?",
    ));
    if count > 0 {
        let ranks: Vec<Backend> = (0..count).map(Backend::Nccl).collect();
        let hint = "NCCL_DEBUG=INFO says more; without NCCL a process trains on one GPU alone";
        findings.push(collectives("collectives, NCCL", &ranks, hint));
    }
    findings
}

fn libtorch() -> Finding {
    let version = tch::utils::version_cudart();
    let cuda = if version > 0 {
        format!("for CUDA {}.{}", version / 1000, version % 1000 / 10)
    } else {
        "for CPUs alone".to_owned()
    };
    let place = loaded_from().map_or_else(String::new, |path| format!(", {path}"));
    Finding::good("libtorch", format!("{}, {cuda}{place}", sail_torch::version()))
}

/// The file that libtorch was loaded from.
fn loaded_from() -> Option<String> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    line.find('/').map(|at| line[at..].to_owned())
}

fn without_gpus() -> Finding {
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    if !driver && !Path::new("/dev/nvidia0").exists() {
        let hint = "training works on the CPU, for small models; with a GPU in this machine, install NVIDIA's driver";
        return Finding::poor(NAME, "none, and no driver of NVIDIA's", hint);
    }
    if tch::utils::version_cudart() <= 0 {
        return Finding::bad(
            NAME,
            "NVIDIA's driver is there, but this libtorch is for CPUs alone",
            "set LIBTORCH, or activate a Python, with a torch built for CUDA",
        );
    }
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(visible) => Finding::bad(
            NAME,
            format!("NVIDIA's driver is there, but libtorch sees none; CUDA_VISIBLE_DEVICES is `{visible}`"),
            "unset CUDA_VISIBLE_DEVICES, or name devices that `nvidia-smi` lists",
        ),
        Err(_) => Finding::bad(
            NAME,
            "NVIDIA's driver is there, but libtorch sees none",
            "`nvidia-smi` must list them; a driver older than libtorch's CUDA must be replaced; a container needs `--gpus all`",
        ),
    }
}

fn gpu(index: usize) -> Finding {
    let name = format!("GPU {index}");
    let broken = "is another process on it, or is it broken? look at `nvidia-smi` and `dmesg`";
    match computed(index) {
        // Eight bits of mantissa; written so that what is not a number fails.
        Ok((model, error)) if error <= 0.02 => {
            let hint = peak_tflops(&model, Precision::Bf16).is_none().then(|| {
                "what it computes at most is not known here: `log.peak_tflops` makes `mfu` known".to_owned()
            });
            Finding::unless(&name, format!("{model}; computes in bf16 as the CPU does"), hint)
        }
        Ok((model, error)) => {
            Finding::bad(&name, format!("{model}; a product of matrices is {error:.1e} off"), broken)
        }
        Err(error) => Finding::bad(&name, first_line(&error), broken),
    }
}

fn first_line(error: &Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Has a device multiply matrices in bf16: its model, and how far the product is from the CPU's, as a share of the largest
/// element.
fn computed(index: usize) -> Result<(String, f64)> {
    let device = Device::Cuda(index);
    sail_torch::set_device(device)?;
    let x = Tensor::f_randn([256, 256], (Kind::Float, Device::Cpu))?;
    let there = x.f_to_device(device)?.f_to_kind(Kind::BFloat16)?;
    let product = there.f_matmul(&there)?.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?;
    let expected = x.f_matmul(&x)?;
    let error = ((product - &expected).abs().max() / expected.abs().max()).double_value(&[]);
    Ok((sail_torch::device_name(device)?.unwrap_or_else(|| "a device without a name".to_owned()), error))
}

/// Has ranks in threads of this process add numbers.
fn collectives(name: &str, ranks: &[Backend], hint: &str) -> Finding {
    match added(ranks) {
        Ok(true) => Finding::good(name, format!("{} ranks added numbers", ranks.len())),
        Ok(false) => Finding::bad(name, format!("{} ranks added numbers wrongly", ranks.len()), hint),
        Err(error) => Finding::bad(name, first_line(&error), hint),
    }
}

/// Whether every rank has the right sum.
fn added(ranks: &[Backend]) -> Result<bool> {
    let server = Store::serve(0, PATIENCE)?;
    let port = server.port();
    let size = ranks.len();
    let add = |rank: usize, backend: Backend| -> Result<bool> {
        let store = Store::connect("localhost", port, "doctor", PATIENCE)?;
        let device = match backend {
            Backend::Gloo => Device::Cpu,
            Backend::Nccl(index) => Device::Cuda(index),
        };
        sail_torch::set_device(device)?;
        let address = (backend == Backend::Gloo).then(|| "127.0.0.1".to_owned());
        let options =
            GroupOptions { name: "doctor".to_owned(), backend, rank, size, timeout: PATIENCE, address };
        let group = ProcessGroup::join(&store, options)?;
        let ones = Tensor::f_ones([1024], (Kind::Float, device))?;
        group.all_reduce(&ones, ReduceOp::Sum)?.wait()?;
        let is_right = ones.f_eq(size as f64)?.all().int64_value(&[]) != 0;
        group.shut_down()?;
        Ok(is_right)
    };
    thread::scope(|scope| {
        let started: Vec<_> = ranks
            .iter()
            .enumerate()
            .map(|(rank, backend)| scope.spawn(move || add(rank, *backend)))
            .collect();
        // All are waited for, also after one has failed.
        let ended: Vec<Result<bool>> = started
            .into_iter()
            .map(|thread| thread.join().expect("invariant: a panic ends the process"))
            .collect();
        ended.into_iter().try_fold(true, |all, one| Ok(all && one?))
    })
}
