//! `sail-gpu-check`: shows on one machine that all that needs its GPUs works there, as a table of checks with
//! their figures. `scripts/gpu_check.sh` starts it, and says where libtorch is.
//!
//! `device.rs` looks at the operations of one device, `group.rs` at collectives, and `training.rs` has the real
//! `sail-train` train. With `--cpu` everything runs on the CPU and Gloo, so that the checks themselves are tested
//! where there is no GPU.

mod device;
mod group;
mod table;
mod training;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tch::{Cuda, Device};

use table::{Figure, Table};
use training::Training;

/// Checks that everything that needs this machine's GPUs works there
#[derive(Debug, Parser)]
#[command(name = "sail-gpu-check", args_conflicts_with_subcommands = true)]
struct Args {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, clap::Args)]
struct Options {
    /// The `sail-train` that is checked
    #[arg(long, value_name = "FILE", required = true)]
    train: Option<PathBuf>,
    /// Receives runs and logs
    #[arg(long, value_name = "DIR", required = true)]
    work: Option<PathBuf>,
    /// Checks what the CPU and Gloo can do
    #[arg(long)]
    cpu: bool,
    /// Leaves out what takes long
    #[arg(long)]
    short: bool,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// One rank of the check of collectives
    #[command(hide = true)]
    Rank(group::Options),
}

fn main() -> ExitCode {
    sail_train::launch::end_with_launcher();
    let args = Args::parse();
    if let Some(Part::Rank(options)) = args.part {
        return group::rank(&options);
    }
    let Options { train: Some(train), work: Some(work), cpu, short } = args.options else {
        unreachable!("clap requires both")
    };
    let mut table = Table::begin();
    check(&mut table, train, work, cpu, short);
    table.end()
}

fn check(table: &mut Table, train: PathBuf, work: PathBuf, cpu: bool, short: bool) {
    for library in ["libtorch_cpu.so", "libtorch_cuda.so", "libnccl.so"] {
        table.row(&format!("library {library}"), || loaded(library));
    }
    let found = Cuda::device_count();
    table.row("CUDA devices", || match found {
        0 if cpu => Ok("none used".to_owned()),
        0 => Err("libtorch sees none; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES".into()),
        count => Ok(format!("{count}, CUDA runtime {}", tch::utils::version_cudart())),
    });
    if found == 0 && !cpu {
        return;
    }
    let device = if cpu { Device::Cpu } else { Device::Cuda(0) };
    tch::manual_seed(1);
    device::check(table, device);
    let ranks = if cpu { 2 } else { found as usize };
    // A group of one makes the same collectives; it is all there is on a machine with one GPU.
    let mut sizes = if short { vec![ranks] } else { vec![1, ranks] };
    sizes.dedup();
    for size in &sizes {
        group::check(table, *size, &work, device);
    }
    Training { train, work, cpu, short, ranks }.check(table, &sizes);
}

/// Where a library of this process was loaded from.
fn loaded(library: &str) -> Figure {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let path = maps.lines().find_map(|line| {
        let path = &line[line.find('/')?..];
        path.rsplit('/').next()?.starts_with(library).then(|| path.to_owned())
    });
    path.ok_or_else(|| "not loaded".into())
}
