//! A disk that is full, a folder that cannot be written to, a write that fails: training goes on while it may, the
//! older checkpoints stay usable, and the next save succeeds once the fault is gone.

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use Course::{Ends, GoesOn};

use super::{assert_nothing_lost, job};
use crate::processes::{Job, Process, all_end, assert_same, until};

const WITHIN: Duration = Duration::from_secs(60);
const STEPS: &str = "schedule.steps=32";

/// What a training is to do about a fault.
#[derive(Clone, Copy, PartialEq)]
enum Course {
    GoesOn,
    Ends,
}

/// How to make a fault while a training runs; it ends when what is returned is dropped.
type Begin = fn(&Job, &Process) -> Option<Box<dyn Any>>;

/// What is to be there before a training starts; gone when what is returned is dropped.
type Prepare = fn(&Job) -> Option<Box<dyn Any>>;

#[test]
fn a_full_disk() {
    full_disk(GoesOn);
}

#[test]
fn a_write_that_fails() {
    failing_write(Ends);
}

#[test]
#[ignore = "minutes; run by scripts/test.sh --extended"]
fn every_fault_of_a_disk() {
    for course in [GoesOn, Ends] {
        full_disk(course);
        read_only_folder(course);
        failing_write(course);
    }
}

/// A run goes on without what a full disk cannot keep for it.
#[test]
fn a_full_disk_of_features() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_disk) = Mount::tmpfs(folder.path(), "size=1m") else { return };
    let plain = Job::new(&["checkpoint.every=4"]);
    plain.run(plain.alone(), 0);
    let cache = format!("data.feature_cache={{dir: {}, max_bytes: 100000000}}", folder.path().display());
    let job = Job::new(&["checkpoint.every=4", &cache]);
    let said = job.run(job.alone(), 0);
    assert!(said.contains("No space left on device"), "{said}");
    assert!(said.contains("this process keeps no more features"), "{said}");
    assert_same("a full disk", &job, &plain);
}

fn full_disk(course: Course) {
    let prepare = |job: &Job| boxed(Mount::tmpfs(&job.run_dir(), "size=70m"));
    let fill = |job: &Job, _: &Process| boxed(Some(FullDisk::new(&job.run_dir())));
    survives("a full disk", course, 1, "No space left on device", prepare, fill);
}

fn read_only_folder(course: Course) {
    let begin = |job: &Job, _: &Process| boxed(Mount::read_only(&job.run_dir()));
    survives("a read-only folder", course, 1, "Read-only file system", |_| Some(Box::new(())), begin);
}

/// On one of two ranks.
fn failing_write(course: Course) {
    let begin = |_: &Job, launcher: &Process| boxed(FileLimit::new(launcher.pid_of_rank(1).unwrap()));
    survives("a write that fails", course, 2, "rank 1: ", |_| Some(Box::new(())), begin);
}

fn boxed<T: 'static>(value: Option<T>) -> Option<Box<dyn Any>> {
    value.map(|value| Box::new(value) as Box<dyn Any>)
}

/// A training goes on through the fault, or, if it may not fail, ends with its words and resumes after it.
fn survives(what: &str, course: Course, ranks: usize, words: &str, prepare: Prepare, begin: Begin) {
    let failures = format!("checkpoint.max_failures={}", if course == GoesOn { 100 } else { 1 });
    let sets = [STEPS, "parallel.strategy=zero1", &failures];
    let command = |job: &Job| without_signal(&if ranks == 1 { job.alone() } else { job.launch(ranks) });
    let (straight, faulty) = (job(&sets), job(&sets));
    let Some(place) = prepare(&faulty) else { return };
    straight.run(command(&straight), 0);

    let mut process = [faulty.start("run", command(&faulty))];
    faulty.wait_for_step(3, &mut process);
    let Some(fault) = begin(&faulty, &process[0]) else { return };
    if course == GoesOn {
        until("saves fail", || {
            let said = process[0].said();
            assert!(!process[0].has_ended(), "{what}: {said}");
            // So many that `metrics.jsonl` has to grow meanwhile.
            said.contains(words) && said.matches("could not be saved").count() >= 8
        });
    } else {
        all_end(&mut process, Instant::now(), WITHIN);
        let said = process[0].said();
        assert_eq!(process[0].code(), 1, "{what}: {said}");
        assert!(said.contains("older checkpoints are intact") && said.contains(words), "{what}: {said}");
    }
    let step = faulty.newest().state().step;
    println!("{what}: while it lasted, the checkpoint of step {step} was usable");
    drop(fault);
    if course == GoesOn {
        all_end(&mut process, Instant::now(), WITHIN);
        assert_eq!(process[0].code(), 0, "{what}: {}", process[0].said());
        let text = std::fs::read_to_string(faulty.run_dir().join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let saved =
            lines.filter(|line| line["kind"] == "checkpoint").filter_map(|line| line["step"].as_u64());
        assert!(saved.filter(|saved| (step + 1..32).contains(saved)).count() > 0, "{what}: saved again");
    } else {
        let said = faulty.run(command(&faulty), 0);
        assert!(said.contains(&format!("resumes after step {step}")), "{what}: {said}");
    }
    assert_nothing_lost(what, &faulty, &straight);
    drop(place);
}

/// The same command, which the signal of a file that grows too large does not end.
fn without_signal(command: &Command) -> Command {
    let mut bash = Command::new("bash");
    bash.args(["-c", r#"trap "" XFSZ; exec "$@""#, "bash"]);
    bash.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bash.env(name, value),
            None => bash.env_remove(name),
        };
    }
    bash.current_dir(command.get_current_dir().unwrap());
    bash
}

/// What lies over a folder until it is dropped.
struct Mount(PathBuf);

impl Mount {
    /// A disk of its own, of this size.
    fn tmpfs(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        Self::over(at, &[&["-t", "tmpfs", "-o", size, "tmpfs"]])
    }

    /// The folder itself, in which nothing can be changed; files that are open can be.
    fn read_only(at: &Path) -> Option<Self> {
        Self::over(at, &[&["--bind", at.to_str().unwrap()], &["-o", "remount,ro,bind"]])
    }

    /// Nothing, and a line that says why, where that is not permitted.
    fn over(at: &Path, commands: &[&[&str]]) -> Option<Self> {
        let mut mounted = None;
        for args in commands {
            let output = Command::new("mount").args(*args).arg(at).output().unwrap();
            if !output.status.success() {
                println!("skipped: cannot mount: {}", String::from_utf8_lossy(&output.stderr).trim());
                return None;
            }
            mounted.get_or_insert_with(|| Self(at.to_owned()));
        }
        mounted
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Also while files in it are open.
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

/// Takes whatever space a disk has.
struct FullDisk {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl FullDisk {
    fn new(dir: &Path) -> Self {
        let (path, over) = (dir.join("filler"), Arc::new(AtomicBool::new(false)));
        let (mut file, ends) = (File::create(&path).unwrap(), Arc::clone(&over));
        let thread = thread::spawn(move || {
            // The run gives space back by removing what it could not finish.
            while !ends.load(Ordering::Relaxed) {
                if file.write(&[0; 4096]).is_err() {
                    sleep(Duration::from_millis(1));
                }
            }
        });
        Self { over, thread: Some(thread), path }
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
        drop(std::fs::remove_file(&self.path));
    }
}

/// A process whose files cannot grow beyond what its other files need.
struct FileLimit(u32);

impl FileLimit {
    fn new(pid: u32) -> Option<Self> {
        let limited = Self::set(pid, "1000000:unlimited");
        if !limited {
            println!("skipped: `prlimit` does not work here");
        }
        limited.then_some(Self(pid))
    }

    fn set(pid: u32, limit: &str) -> bool {
        let mut command = Command::new("prlimit");
        command.args(["--pid", &pid.to_string(), &format!("--fsize={limit}")]);
        command.output().is_ok_and(|output| output.status.success())
    }
}

impl Drop for FileLimit {
    fn drop(&mut self) {
        // The process may have ended.
        Self::set(self.0, "unlimited:unlimited");
    }
}
