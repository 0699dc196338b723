//! What the benches share: the plan of a stage, memory and processor time, results for machines, exit codes.
#![allow(dead_code, reason = "each bench takes what it needs")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use sail_train::Error;
use sail_train::config::{Config, Plan, Precision, load};
use sail_train::estimate::peak::peak_tflops;
use serde::Serialize;
use tch::Device;

const STATUS: &str = "/proc/self/status";
const STAT: &str = "/proc/self/stat";
/// `USER_HZ`, the same on every architecture that libtorch is built for.
const TICKS_PER_SEC: f64 = 100.0;
const CLEAR_REFS: &str = "/proc/self/clear_refs";

/// Memory of this process from some moment on, bytes: of a GPU what libtorch has in tensors there, since the process began;
/// else what is resident, as Linux alone tells it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    device: Device,
    /// Taken at that moment.
    before_bytes: u64,
}

/// What [`Memory`] saw.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct MemoryUse {
    /// Taken when it began: weights, and where it is resident memory data and libraries.
    pub(crate) before_bytes: u64,
    /// Most that was taken at once, with what was there before.
    pub(crate) peak_bytes: u64,
}

impl Memory {
    /// Forgets the peak so far, that of loading (`clear_refs` in proc(5)).
    pub(crate) fn begin(device: Device) -> Result<Self, Error> {
        let before_bytes = if let Some(peak) = sail_torch::memory_peak(device)? {
            peak.allocated
        } else {
            fs::write(CLEAR_REFS, "5").map_err(io(CLEAR_REFS.as_ref()))?;
            status_bytes("VmRSS")?
        };
        Ok(Self { device, before_bytes })
    }

    /// The peak since [`Memory::begin`].
    pub(crate) fn end(self) -> Result<MemoryUse, Error> {
        let peak_bytes = match sail_torch::memory_peak(self.device)? {
            Some(peak) => peak.allocated,
            None => status_bytes("VmHWM")?,
        };
        Ok(MemoryUse { before_bytes: self.before_bytes, peak_bytes })
    }
}

/// What a device computes at most, FLOP/s; None where that is not known.
pub(crate) fn peak_flops(device: Device, precision: Precision) -> Result<Option<f64>, Error> {
    let name = sail_torch::device_name(device)?;
    Ok(name.and_then(|name| peak_tflops(&name, precision)).map(|tflops| 1e12 * tflops))
}

/// A line of `/proc/self/status`, which says kB and means KiB.
fn status_bytes(field: &str) -> Result<u64, Error> {
    let text = fs::read_to_string(STATUS).map_err(io(STATUS.as_ref()))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| {
        usage(
            format!("`{STATUS}` has no line `{field}: N kB`"),
            "this bench measures memory as Linux tells it",
        )
    })
}

/// Processor seconds of all threads of this process so far, from `/proc/self/stat` (fields 14 and 15 of proc(5)).
pub(crate) fn processor_secs() -> Result<f64, Error> {
    let text = fs::read_to_string(STAT).map_err(io(STAT.as_ref()))?;
    // The second field is a name in parentheses, which may have anything in it.
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: Vec<u64> =
        after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse().ok()).collect();
    match ticks[..] {
        [user, system] => Ok((user + system) as f64 / TICKS_PER_SEC),
        _ => Err(usage(
            format!("`{STAT}` has no processor times"),
            "this bench measures time as Linux tells it",
        )),
    }
}

/// Which stage a bench is of.
#[derive(Args)]
pub(crate) struct StageArgs {
    /// The configuration of a stage
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Overrides a value, as `sail-train --set` does
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
}

impl StageArgs {
    /// Its plan.
    pub(crate) fn plan(&self) -> Result<Plan, Error> {
        stage(&self.config, &self.set)
    }
}

/// The plan of a stage.
pub(crate) fn stage(config: &Path, sets: &[String]) -> Result<Plan, Error> {
    match load(config, sets)? {
        Config::Stage(plan) => Ok(*plan),
        Config::Curriculum(_) => Err(usage(
            format!("`{}` is a curriculum", config.display()),
            "give the file of one of its stages",
        )),
    }
}

/// A mistake in how a bench was called.
pub(crate) fn usage(message: String, hint: impl Into<String>) -> Error {
    Error::Usage { message, hint: hint.into() }
}

/// Writes a result for machines, where a file is asked for.
pub(crate) fn write_json(path: Option<&Path>, result: &impl Serialize) -> Result<(), Error> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(result).expect("invariant: text keys and finite numbers");
    fs::write(path, text + "\n").map_err(io(path))
}

/// For `map_err` on an IO call.
pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, source }
}

/// Says what went wrong, with the exit code of `sail-train`.
pub(crate) fn exit(result: Result<(), Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
