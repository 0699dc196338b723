//! Trainings of several processes: started by `launch` or one by one, watched, signalled, and none left behind.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use sail_train::checkpoint::{self, Checkpoint};
use sail_train::optim::StateKind;
use serde_json::Value;
use tempfile::TempDir;

use crate::{sail_train, under};

/// How long something may take that should take seconds; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        sleep(Duration::from_millis(20));
    }
}

/// The parent of a process; nothing once it is gone or waits to be reaped.
pub(crate) fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (state != "Z" && state != "X").then_some(())?;
    fields.next()?.parse().ok()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").unwrap();
    entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
}

pub(crate) fn children_of(parent: u32) -> Vec<u32> {
    processes().filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

pub(crate) fn signal(name: &str, pid: u32) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

/// A port that nobody has, and that no connection is given before it is used: below those that Linux gives out by itself
/// (32768 to 60999, `ip_local_port_range`). Tests of one process get different ones.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const PORTS: u16 = 12_000;
    // Another process of tests begins elsewhere.
    let start = (std::process::id() % u32::from(PORTS)) as u16;
    (0..PORTS)
        .map(|_| 20_000 + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS)
        .find(|port| TcpListener::bind(("0.0.0.0", *port)).is_ok())
        .expect("one of 12,000 ports is free")
}

/// Runs cases side by side, which mostly wait, and names those that fail.
pub(crate) fn together(cases: &[(&'static str, fn())]) {
    let failed: Vec<&str> = std::thread::scope(|scope| {
        let spawn = |&(name, case): &(&'static str, fn())| {
            (name, std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, case).unwrap())
        };
        let running: Vec<_> = cases.iter().map(spawn).collect();
        running.into_iter().filter_map(|(name, case)| case.join().is_err().then_some(name)).collect()
    });
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// A training with the tiny model, in a folder of its own.
pub(crate) struct Job {
    pub(crate) dir: TempDir,
    port: u16,
    args: Vec<String>,
}

impl Job {
    /// Stage 1 with these settings, fewer layers and no evaluation.
    pub(crate) fn new(sets: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let small = ["vision", "llm"].map(|part| format!("model.{part}.random.num_hidden_layers=2"));
        let usual = [&under(dir.path()), &small[0], &small[1], "eval=null", "schedule.warmup=1"];
        let config = crate::root().join("configs/tiny/stage1.yaml").display().to_string();
        let mut job = Self { dir, port: free_port(), args: vec!["--config".to_owned(), config] };
        job.set(&usual);
        job.set(sets);
        job
    }

    pub(crate) fn set(&mut self, sets: &[&str]) {
        self.args.extend(sets.iter().flat_map(|set| ["--set".to_owned(), (*set).to_owned()]));
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("runs/tiny/stage1")
    }

    /// What it has trained.
    pub(crate) fn newest(&self) -> Checkpoint {
        checkpoint::newest(&self.run_dir()).unwrap().expect("it has saved")
    }

    /// Where its ranks meet without a launcher.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// This many ranks under the launcher.
    pub(crate) fn launch(&self, nproc: usize) -> Command {
        self.launch_with(nproc, &[])
    }

    /// The same with more options of the launcher.
    pub(crate) fn launch_with(&self, nproc: usize, options: &[&str]) -> Command {
        let nproc = nproc.to_string();
        let mut args = vec!["launch", "--nproc", &nproc];
        args.extend(options);
        args.push("--");
        args.extend(self.args.iter().map(String::as_str));
        sail_train(&args)
    }

    /// One process alone.
    pub(crate) fn alone(&self) -> Command {
        let mut command = sail_train(&self.args.iter().map(String::as_str).collect::<Vec<_>>());
        // Servers of tests are on this machine.
        for proxy in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(proxy);
        }
        command
    }

    /// A rank without a launcher: rank 0 hosts the store.
    pub(crate) fn rank(&self, rank: usize, size: usize) -> Command {
        let mut command = self.alone();
        let numbers =
            [("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size)];
        command.envs(numbers.map(|(name, number)| (name, number.to_string())));
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", self.port.to_string());
        command
    }

    /// Starts a process whose output goes to a file.
    pub(crate) fn start(&self, name: &str, mut command: Command) -> Process {
        let log = self.dir.path().join(format!("{name}.log"));
        let file = File::create(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        Process { name: name.to_owned(), child: command.spawn().unwrap(), log, ended: None }
    }

    /// Starts all ranks without a launcher.
    pub(crate) fn start_ranks(&self, size: usize) -> Vec<Process> {
        (0..size).map(|rank| self.start(&format!("rank-{rank}"), self.rank(rank, size))).collect()
    }

    /// Runs a command to its end, which must have this exit code; what it has printed.
    pub(crate) fn run(&self, command: Command, code: i32) -> String {
        let mut process = [self.start("run", command)];
        all_end(&mut process, Instant::now(), 3 * PATIENCE);
        let said = process[0].said();
        assert_eq!(process[0].code(), code, "{said}");
        said
    }

    /// Waits until this step is done.
    pub(crate) fn wait_for_step(&self, step: u64, processes: &mut [Process]) {
        until(&format!("step {step}"), || {
            for process in &mut *processes {
                assert!(!process.has_ended(), "{} ended by itself:\n{}", process.name, process.said());
            }
            steps(&self.run_dir()).last().is_some_and(|line| line["step"].as_u64() >= Some(step))
        });
    }

    /// Processes of this job that are there; their arguments have its folder in them.
    pub(crate) fn left(&self) -> Vec<u32> {
        let mark = self.dir.path().display().to_string();
        let of_job = |pid: &u32| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&mark))
        };
        processes().filter(|pid| of_job(pid) && parent_of(*pid).is_some()).collect()
    }
}

/// Names of a run's folders that are checkpoints.
pub(crate) fn complete(run_dir: &Path) -> Vec<String> {
    let folders = fs::read_dir(run_dir).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<String> = folders
        .filter(|path| path.join("COMPLETE").exists())
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The lines of a run's `metrics.jsonl` that are of training steps; one that is being written is left out.
pub(crate) fn steps(run_dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["kind"] == "train").collect()
}

/// A process of a test; killed when the test is over.
pub(crate) struct Process {
    pub(crate) name: String,
    child: Child,
    log: PathBuf,
    ended: Option<(i32, Instant)>,
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap()).into_owned()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        if self.ended.is_none()
            && let Some(status) = self.child.try_wait().unwrap()
        {
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
            self.ended = Some((code, Instant::now()));
        }
        self.ended.is_some()
    }

    /// The number of the process that has a rank under this launcher, while it runs.
    pub(crate) fn pid_of_rank(&self, rank: usize) -> Option<u32> {
        let mark = format!("RANK={rank}");
        let has_rank = |pid: &u32| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|vars| vars.split(|&byte| byte == 0).any(|var| var == mark.as_bytes()))
        };
        children_of(self.pid()).into_iter().find(has_rank)
    }

    /// Whether one of its threads has this name.
    pub(crate) fn has_thread(&self, name: &str) -> bool {
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid())) else { return false };
        threads.flatten().any(|thread| {
            fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        })
    }

    /// The exit code, of a process that has ended.
    pub(crate) fn code(&self) -> i32 {
        self.ended.expect("it has ended").0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.has_ended() {
            // It may end at this moment.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// Waits for processes to end by themselves, and says how long after `since` the last one did.
pub(crate) fn all_end(processes: &mut [Process], since: Instant, within: Duration) -> Duration {
    loop {
        let running: Vec<String> = processes
            .iter_mut()
            .filter_map(|process| (!process.has_ended()).then(|| process.name.clone()))
            .collect();
        if running.is_empty() {
            let last = processes.iter().filter_map(|process| process.ended).map(|(_, at)| at).max();
            return last.map_or(Duration::ZERO, |at| at.saturating_duration_since(since));
        }
        if since.elapsed() > within {
            let said: Vec<String> =
                processes.iter().map(|process| format!("--- {}\n{}", process.name, process.said())).collect();
            panic!("after {within:?} still there: {}\n{}", running.join(", "), said.join("\n"));
        }
        sleep(Duration::from_millis(20));
    }
}

/// Losses, weights and moments are the same to the last bit.
pub(crate) fn assert_same(what: &str, a: &Job, b: &Job) {
    let losses = [a, b]
        .map(|job| steps(&job.run_dir()).iter().map(|line| line["loss"].to_string()).collect::<Vec<_>>());
    assert_eq!(losses[0], losses[1], "{what}");
    let [a, b] = [a, b].map(Job::newest);
    assert!(a.names().eq(b.names()), "{what}");
    for name in a.names() {
        for kind in StateKind::ALL {
            match [&a, &b].map(|checkpoint| checkpoint.tensor(name, kind)) {
                [Ok(a), Ok(b)] => assert!(a == b, "{what}: {kind:?} of `{name}` differs"),
                [Err(_), Err(_)] => {}
                _ => panic!("{what}: one has {kind:?} of `{name}`, the other one has not"),
            }
        }
    }
}
