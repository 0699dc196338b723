//! The processor, memory, the folder of runs, and limits of the system.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{StatVfs, statvfs};
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::error::{Error, Result};

const GB: f64 = 1e9;
/// Files of a rank: shards of all streams, connections to the others, checkpoints. What is seldom reached is enough.
const ENOUGH_FILES: u64 = 4096;
/// The memory that the demo's third stage takes, about.
const ENOUGH_MEMORY: f64 = 6.0 * GB;
/// Two checkpoints of a model with 500M parameters.
const ENOUGH_DISK: f64 = 12.0 * GB;
/// What is written to see how fast the folder is.
const SAMPLE_BYTES: usize = 128 << 20;
/// A checkpoint of a billion trained parameters would take two minutes.
const SLOW_BYTES_PER_SEC: f64 = 100e6;
/// What NCCL takes for each pair of ranks on a host, times those of a usual host.
const ENOUGH_SHARED: f64 = 1.0 * GB;

pub(super) fn processor() -> Finding {
    const NAME: &str = "processor";
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = tch::get_num_threads();
    let vectors = vectors();
    let found = format!("{cores} cores, {}; libtorch uses {threads} threads", vectors.unwrap_or("no AVX2"));
    let hint = if vectors.is_none() {
        Some("kernels are slow without AVX2; a newer processor, or a GPU, is many times faster".to_owned())
    } else if threads as usize > cores {
        Some(format!("OMP_NUM_THREADS={cores} uses each core once; more get in each other's way"))
    } else {
        None
    };
    Finding::unless(NAME, found, hint)
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> Option<&'static str> {
    if std::arch::is_x86_feature_detected!("avx512f") {
        Some("AVX-512")
    } else {
        std::arch::is_x86_feature_detected!("avx2").then_some("AVX2")
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors() -> Option<&'static str> {
    Some(std::env::consts::ARCH)
}

pub(super) fn memory() -> Finding {
    const NAME: &str = "memory";
    let Some([total, available]) = meminfo() else {
        return Finding::poor(NAME, "/proc/meminfo does not tell", "is /proc mounted?");
    };
    // A container may have less than its host, and has used some of it.
    let group = control_group().filter(|[limit, _]| *limit < total);
    let available = group.map_or(available, |[limit, used]| available.min(limit - used).max(0.0));
    let limit = group.map(|[limit, _]| limit);
    let limited = limit.map_or_else(String::new, |limit| {
        format!("; a control group limits this process to {:.1} GB", limit / GB)
    });
    let found = format!("{:.1} GB of {:.1} GB are free{limited}", available / GB, total / GB);
    let hint = (available < ENOUGH_MEMORY).then(|| {
        "end what takes it, or choose smaller models; `sail-train --config FILE --dry-run` says what a stage takes"
            .to_owned()
    });
    Finding::unless(NAME, found, hint)
}

/// Bytes in all, and available.
fn meminfo() -> Option<[f64; 2]> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
    };
    Some([of("MemTotal:")?, of("MemAvailable:")?])
}

/// Limit and use of this process's control group, or of the one around it that limits most; none where there is no limit.
fn control_group() -> Option<[f64; 2]> {
    limit_in(Path::new("/sys/fs/cgroup"), &fs::read_to_string("/proc/self/cgroup").ok()?)
}

/// The same below where control groups are mounted, of the groups that `/proc/PID/cgroup` names (cgroups(7)). Within a
/// container the mount may be of the group itself, which has then no such folder: its root is looked at as well.
fn limit_in(mount: &Path, groups: &str) -> Option<[f64; 2]> {
    let number = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<f64>().ok();
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, limit, used) = match controllers {
            "" => (mount.to_owned(), "memory.max", "memory.current"),
            "memory" => (mount.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
            _ => continue,
        };
        for folder in Path::new(group.trim_start_matches('/')).ancestors().map(|group| root.join(group)) {
            limits.extend(number(folder.join(limit)).zip(number(folder.join(used))));
        }
    }
    limits.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).map(|(limit, used)| [limit, used])
}

pub(super) fn folder(folder: &Path) -> Finding {
    const NAME: &str = "folder";
    let place = folder.display();
    match measured(folder) {
        Ok((speed, stat)) => {
            let free = (stat.f_bavail * stat.f_frsize) as f64;
            let found = format!(
                "`{place}` takes {:.0} MB/s, safely written; {:.1} GB are free",
                speed / 1e6,
                free / GB
            );
            let hint = if free < ENOUGH_DISK {
                Some(
                    "checkpoints need room: `run.root` can be another disk, `checkpoint.keep_last` keeps fewer"
                        .to_owned(),
                )
            } else if speed < SLOW_BYTES_PER_SEC {
                Some("checkpoints will take long; `run.root` can be on a faster disk".to_owned())
            } else {
                None
            };
            Finding::unless(NAME, found, hint)
        }
        Err(error) => Finding::bad(
            NAME,
            error.to_string(),
            "name a folder that is there and can be written to with `--folder`, and as `run.root`",
        ),
    }
}

/// Bytes a second, and what the file system says of itself.
fn measured(folder: &Path) -> Result<(f64, StatVfs)> {
    let path = folder.join(format!(".sail-doctor-{}", std::process::id()));
    let bytes: Vec<u8> = (0..SAMPLE_BYTES).map(|i| ((i * 31) >> 3) as u8).collect();
    let started = Instant::now();
    let written =
        File::create(&path).and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()));
    let speed = bytes.len() as f64 / started.elapsed().as_secs_f64();
    // Where nothing was made there is nothing to remove; what went wrong first is told.
    drop(fs::remove_file(&path));
    written.map_err(Error::io(&path))?;
    let stat = statvfs(folder).map_err(|error| Error::io(folder)(error.into()))?;
    Ok((speed, stat))
}

pub(super) fn open_files() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    let [now, most] = [limit.current, limit.maximum]
        .map(|limit| limit.map_or("without limit".to_owned(), |limit| limit.to_string()));
    let hint = limit.current.filter(|limit| *limit < ENOUGH_FILES).map(|_| {
        format!(
            "`ulimit -n {ENOUGH_FILES}` before training raises it; a system's own limit is in limits.conf"
        )
    });
    Finding::unless("open files", format!("{now} at once, {most} at most"), hint)
}

pub(super) fn shared_memory() -> Finding {
    const NAME: &str = "shared memory";
    let Ok(stat) = statvfs("/dev/shm") else {
        return Finding::poor(NAME, "/dev/shm is not there", "NCCL needs it between GPUs of one host");
    };
    let size = (stat.f_blocks * stat.f_frsize) as f64;
    let hint = (size < ENOUGH_SHARED).then(|| {
        "NCCL needs more between GPUs of one host: start the container with `--shm-size=8g`".to_owned()
    });
    Finding::unless(NAME, format!("{:.1} GB in /dev/shm", size / GB), hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A job of Slurm or systemd is a group within groups, of which an outer one may limit it.
    #[test]
    fn the_group_around_this_one_may_limit_it() {
        let dir = tempfile::tempdir().unwrap();
        let group = |path: &str, limit: &str| {
            let folder = dir.path().join(path);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("memory.max"), format!("{limit}\n")).unwrap();
            fs::write(folder.join("memory.current"), "10\n").unwrap();
        };
        group("system.slice/job_7", "500");
        group("system.slice/job_7/step_0", "max");
        let limit = |groups| limit_in(dir.path(), groups);
        assert_eq!(limit("0::/system.slice/job_7/step_0\n"), Some([500.0, 10.0]));
        assert_eq!(limit("0::/system.slice\n"), None);
        // A container whose root is its group.
        group("", "300");
        assert_eq!(limit("0::/of/its/host\n"), Some([300.0, 10.0]));
        // The first version has a mount for each controller.
        let old = dir.path().join("memory/job");
        fs::create_dir_all(&old).unwrap();
        fs::write(old.join("memory.limit_in_bytes"), "200\n").unwrap();
        fs::write(old.join("memory.usage_in_bytes"), "20\n").unwrap();
        assert_eq!(limit("5:cpu:/job\n4:memory:/job\n"), Some([200.0, 20.0]));
    }
}
