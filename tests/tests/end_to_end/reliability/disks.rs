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

use super::{assert_nothing_lost, job};
use crate::processes::{Job, Process, all_end, until};

const WITHIN: Duration = Duration::from_secs(60);
const STEPS: &str = "schedule.steps=40";

/// How to make a fault while a training runs; it ends when what is returned is dropped.
type Begin = fn(&Job, &Process) -> Option<Box<dyn Any>>;

/// What is to be there before a training starts; gone when what is returned is dropped.
type Prepare = fn(&Job) -> Option<Box<dyn Any>>;

#[test]
fn a_full_disk() {
    let prepare = |job: &Job| boxed(Mount::tmpfs(&job.run_dir(), "size=70m"));
    let fill = |job: &Job, _: &Process| boxed(Some(FullDisk::new(&job.run_dir())));
    survives("a full disk", 1, "No space left on device", prepare, fill);
}

#[test]
fn a_read_only_folder() {
    let begin = |job: &Job, _: &Process| boxed(Mount::read_only(&job.run_dir()));
    survives("a read-only folder", 1, "Read-only file system", |_| Some(Box::new(())), begin);
}

/// On one of two ranks.
#[test]
fn a_write_that_fails() {
    let begin = |_: &Job, launcher: &Process| boxed(FileLimit::new(launcher.pid_of_rank(1).unwrap()));
    survives("a write that fails", 2, "rank 1: ", |_| Some(Box::new(())), begin);
}

fn boxed<T: 'static>(value: Option<T>) -> Option<Box<dyn Any>> {
    value.map(|value| Box::new(value) as Box<dyn Any>)
}

/// A training goes on through the fault; one that may not fail ends with its words, and resumes after it.
fn survives(what: &str, ranks: usize, words: &str, prepare: Prepare, begin: Begin) {
    let sets = [STEPS, "parallel.strategy=zero1"];
    let command = |job: &Job| without_signal(&if ranks == 1 { job.alone() } else { job.launch(ranks) });
    let straight = job(&sets);
    straight.run(command(&straight), 0);

    let goes_on = job(&[&sets[..], &["checkpoint.max_failures=100"]].concat());
    let Some(place) = prepare(&goes_on) else { return };
    let mut process = [goes_on.start("run", command(&goes_on))];
    goes_on.wait_for_step(3, &mut process);
    let Some(fault) = begin(&goes_on, &process[0]) else { return };
    until("a save fails", || {
        let said = process[0].said();
        assert!(!process[0].has_ended(), "{what}: {said}");
        // So many that `metrics.jsonl` has to grow meanwhile.
        said.contains(words) && said.matches("could not be saved").count() >= 8
    });
    let step = goes_on.newest().state().step;
    drop(fault);
    all_end(&mut process, Instant::now(), WITHIN);
    assert_eq!(process[0].code(), 0, "{what}: {}", process[0].said());
    println!("{what}: while it lasted, step {step} was usable");
    assert_nothing_lost(what, &goes_on, &straight);
    drop(place);

    let ends = job(&[&sets[..], &["checkpoint.max_failures=1"]].concat());
    let Some(place) = prepare(&ends) else { return };
    let mut process = [ends.start("run", command(&ends))];
    ends.wait_for_step(3, &mut process);
    let fault = begin(&ends, &process[0]);
    all_end(&mut process, Instant::now(), WITHIN);
    let said = process[0].said();
    assert_eq!(process[0].code(), 1, "{what}: {said}");
    assert!(said.contains("older checkpoints are intact") && said.contains(words), "{what}: {said}");
    let step = ends.newest().state().step;
    drop(fault);
    let said = ends.run(command(&ends), 0);
    assert!(said.contains(&format!("resumes after step {step}")), "{what}: {said}");
    assert_nothing_lost(what, &ends, &straight);
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
        Self::mount(at, &[&["-t", "tmpfs", "-o", size, "tmpfs"]])
    }

    /// The folder itself, in which nothing can be changed; files that are open can be.
    fn read_only(at: &Path) -> Option<Self> {
        Self::mount(at, &[&["--bind", at.to_str().unwrap()], &["-o", "remount,ro,bind"]])
    }

    /// Nothing, and a line that says why, where that is not permitted.
    fn mount(at: &Path, commands: &[&[&str]]) -> Option<Self> {
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
