//! What every thread of this process is in, for one that hangs.
//!
//! Each thread is interrupted by a signal and unwinds itself (`csrc/stacks.cpp`). What that does to it: a system call
//! goes on where the system can restart it (`SA_RESTART`), and one that it never restarts (`poll`, `epoll_wait`,
//! `nanosleep` and what waits for a socket with a timeout) ends with `EINTR`, after which Rust's library, Gloo and c10d's
//! store call it again, as the tests here show, and Tokio by its source. NCCL and CUDA have not been tried.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::call::{check, outcome};
use crate::error::{Error, Result};
use crate::ffi;

const OP: &str = "thread_stacks";
/// How long a thread has to answer; one that runs, or waits for what can be interrupted, does at once.
const PATIENCE: Duration = Duration::from_millis(200);
/// Most frames of a thread, the innermost ones.
const MOST_FRAMES: usize = 128;
/// Most characters of a function's name; those with many type parameters are cut.
const MOST_CHARS: usize = 120;
/// What every thread of Rust's library and every main program begins with; nothing before it is of interest.
const BEGINNING: &str = "__rust_begin_short_backtrace";

/// What a thread is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadStack {
    /// Its number on this host.
    pub tid: i32,
    /// Its name, of which Linux keeps 15 bytes.
    pub name: String,
    /// The functions that it is in, innermost first, with file (from the folder of its package on) and line where these
    /// are known.
    pub frames: Vec<String>,
    /// Why it has no frames.
    pub silent: Option<String>,
}

/// The signal that asks a thread, once there is one. Held while threads are asked: one caller at a time.
static SIGNAL: Mutex<Option<i32>> = Mutex::new(None);

/// The stacks of all threads but the calling one, that of the main thread first.
///
/// Takes up to 200 ms for a thread that does not answer, and at the first call, which reads symbols, about a second.
/// It waits for locks that a hanging thread may hold (of the allocator and of the dynamic linker), so a caller that must
/// go on calls it on a thread of its own.
///
/// # Errors
/// [`Error::Torch`] where no signal is free, or a thread does not come to the end of its stack; [`Error::System`]
/// where `/proc` cannot be read.
pub fn thread_stacks() -> Result<Vec<ThreadStack>> {
    let asked = ask_all()?;
    // In their order, so that the symbols of each library are read once.
    let addresses = asked.iter().filter_map(|(_, answer)| answer.as_ref().ok()).flatten();
    let mut names: BTreeMap<usize, Vec<String>> = addresses.map(|address| (*address, Vec::new())).collect();
    for (address, names) in &mut names {
        *names = names_of(*address);
    }
    backtrace::clear_symbol_cache();
    let stack = |(task, answer): (Task, Answer)| {
        let (addresses, silent) = match answer {
            Ok(addresses) => (addresses, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        let frames = addresses.iter().flat_map(|address| names[address].iter().cloned());
        let frames = frames.take_while(|frame| !frame.contains(BEGINNING)).collect();
        ThreadStack { tid: task.tid, name: task.name, frames, silent }
    };
    Ok(asked.into_iter().map(stack).collect())
}

/// The threads but the calling one, and what they answer.
fn ask_all() -> Result<Vec<(Task, Answer)>> {
    let mut signal = SIGNAL.lock().unwrap_or_else(PoisonError::into_inner);
    let signal = match *signal {
        Some(signal) => signal,
        None => *signal.insert(begin()?),
    };
    let own = number_of(&read(|| fs::read_link("/proc/thread-self"))?);
    let mut tids = Vec::new();
    for entry in read(|| fs::read_dir("/proc/self/task"))? {
        tids.extend(number_of(&read(|| entry)?.path()));
    }
    let main = std::process::id() as i32;
    tids.retain(|tid| Some(*tid) != own);
    tids.sort_by_key(|tid| (*tid != main, *tid));
    let tasks = tids.into_iter().filter_map(Task::read);
    // One that cannot be asked is no reason to tell nothing of the others.
    let asked = tasks.map(|task| {
        let answer = ask(signal, &task).unwrap_or_else(|error| Err(error.to_string()));
        (task, answer)
    });
    Ok(asked.collect())
}

/// Addresses that are one beyond an instruction of each function, innermost first, or why there are none.
type Answer = std::result::Result<Vec<usize>, String>;

/// What Linux tells of a thread.
struct Task {
    tid: i32,
    name: String,
    /// As `S (sleeping)`.
    state: String,
    /// Signals that it blocks, and those that wait for it, a bit each.
    blocked: u64,
    waiting: u64,
}

impl Task {
    /// Nothing where the thread is gone.
    fn read(tid: i32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/self/task/{tid}/status")).ok()?;
        let field = |name: &str| {
            let mut lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            lines.next().map(str::trim)
        };
        let signals = |name| u64::from_str_radix(field(name)?, 16).ok();
        Some(Self {
            tid,
            name: field("Name")?.to_owned(),
            state: field("State")?.to_owned(),
            blocked: signals("SigBlk")?,
            waiting: signals("SigPnd")?,
        })
    }
}

/// Installs the handler.
fn begin() -> Result<i32> {
    let mut signal = 0;
    // SAFETY: a valid place for one number.
    outcome(OP, unsafe { ffi::sail_stacks_begin(&raw mut signal) })?;
    Ok(signal)
}

/// Interrupts a thread. The caller holds `SIGNAL`, where `signal` is from.
fn ask(signal: i32, task: &Task) -> Result<Answer> {
    check(OP, (1..=64).contains(&signal), || format!("{signal} is no signal"))?;
    let bit = 1 << (signal - 1);
    // Signals of this kind queue up; one that is not taken would be joined by another at every call.
    if task.blocked & bit != 0 {
        return Ok(Err("it blocks signals".to_owned()));
    }
    if task.waiting & bit != 0 {
        return Ok(Err(format!("it has not answered the last time either; its state is {}", task.state)));
    }
    let mut addresses = [std::ptr::null_mut(); MOST_FRAMES];
    let mut count = 0;
    // SAFETY: the signal has the handler, `SIGNAL` keeps other callers out, and `addresses` has the room told.
    let error = unsafe {
        ffi::sail_stack_of(
            signal,
            task.tid,
            PATIENCE.as_millis() as i64,
            addresses.as_mut_ptr(),
            addresses.len(),
            &raw mut count,
        )
    };
    outcome(OP, error)?;
    if count == 0 {
        let state = Task::read(task.tid).map_or("gone".to_owned(), |task| task.state);
        return Ok(Err(format!("no answer within {} ms; its state is {state}", PATIENCE.as_millis())));
    }
    // The first one is of an instruction itself, the others are of those after a call.
    let beyond = |(number, address): (usize, &*mut c_void)| *address as usize + usize::from(number == 0);
    Ok(Ok(addresses[..count].iter().enumerate().map(beyond).collect()))
}

/// The functions that the instruction before `address` is in: more than one where calls were inlined.
fn names_of(address: usize) -> Vec<String> {
    let mut names = Vec::new();
    backtrace::resolve(address as *mut c_void, |symbol| {
        let Some(name) = symbol.name() else { return };
        let mut text = format!("{name:#}");
        if let Some(readable) = demangled(&text) {
            text = readable;
        }
        if let Some((at, _)) = text.char_indices().nth(MOST_CHARS) {
            text.truncate(at);
            text.push('…');
        }
        if let (Some(file), Some(line)) = (symbol.filename(), symbol.lineno()) {
            text = format!("{text} at {}:{line}", in_package(&file.to_string_lossy()));
        }
        names.push(text);
    });
    if names.is_empty() {
        names.push(match file_of(address) {
            Some(file) => format!("{address:#x} in {file}"),
            None => format!("{address:#x}"),
        });
    }
    names
}

/// A path from the folder of its package on, where it has one: `sail-train/src/session.rs`.
fn in_package(path: &str) -> &str {
    let Some(sources) = path.rfind("/src/").or_else(|| path.rfind("/csrc/")) else { return path };
    path[..sources].rfind('/').map_or(path, |slash| &path[slash + 1..])
}

/// A name of C++; Rust's own are readable already.
fn demangled(name: &str) -> Option<String> {
    let name = CString::new(name).ok().filter(|_| name.starts_with("_Z"))?;
    // SAFETY: a NUL-terminated string.
    let text = unsafe { ffi::sail_demangled(name.as_ptr()) };
    if text.is_null() {
        return None;
    }
    // SAFETY: a NUL-terminated string that lives until it is freed below.
    let readable = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: allocated for this one call, and nothing uses it any more.
    unsafe { ffi::sail_text_free(text) };
    Some(readable)
}

/// The name of the file that the code is from.
fn file_of(address: usize) -> Option<String> {
    // SAFETY: the address is looked up, not read.
    let path = unsafe { ffi::sail_file_of(address as *const c_void) };
    if path.is_null() {
        return None;
    }
    // SAFETY: a NUL-terminated string of the dynamic linker's; this process unloads no library.
    let path = unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned();
    Some(Path::new(&path).file_name()?.to_string_lossy().into_owned())
}

/// The number that a path ends with.
fn number_of(path: &Path) -> Option<i32> {
    path.file_name()?.to_str()?.parse().ok()
}

fn read<T>(call: impl FnOnce() -> std::io::Result<T>) -> Result<T> {
    call().map_err(|error| Error::System { op: OP, message: error.to_string() })
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::mpsc::{self, Receiver};
    use std::sync::{Arc, Condvar};
    use std::thread;
    use std::time::Instant;

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::{Backend, GroupOptions, ProcessGroup, ReduceOp, Store};

    /// How long a thread may take to come to where it is found; the machine may be busy.
    const FOUND: Duration = Duration::from_secs(30);

    #[inline(never)]
    fn blocked_here_for_good(never: &Receiver<()>) {
        black_box(never).recv().unwrap_err();
    }

    #[inline(never)]
    fn busy_here(over: &AtomicBool) -> u64 {
        let (mut sum, started) = (0u64, Instant::now());
        while !over.load(Ordering::Relaxed) && started.elapsed() < 2 * FOUND {
            sum = black_box(sum.wrapping_mul(31) + 1);
        }
        sum
    }

    /// Waits until a thread of this name is in a function of that one, and gives its frames.
    fn found(name: &str, function: &str) -> Vec<String> {
        let started = Instant::now();
        loop {
            let stacks = thread_stacks().unwrap();
            let is_there = |stack: &&ThreadStack| {
                stack.name == name && stack.frames.iter().any(|frame| frame.contains(function))
            };
            if let Some(stack) = stacks.iter().find(is_there) {
                return stack.frames.clone();
            }
            assert!(started.elapsed() < FOUND, "no thread `{name}` in `{function}`: {stacks:#?}");
        }
    }

    #[test]
    fn a_blocked_and_a_busy_thread_are_found_where_they_are() {
        let (sender, never) = mpsc::channel();
        thread::scope(|scope| {
            let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
            let over = Arc::new(AtomicBool::new(false));
            let until = Arc::clone(&over);
            spawn("blocked").spawn_scoped(scope, move || blocked_here_for_good(&never)).unwrap();
            spawn("busy").spawn_scoped(scope, move || busy_here(&until)).unwrap();
            let frames = found("blocked", "blocked_here_for_good");
            let with_line = frames.iter().find(|frame| frame.contains("blocked_here_for_good")).unwrap();
            assert!(with_line.contains("stacks.rs:"), "{frames:#?}");
            // Not what the question itself has put there.
            let asking = |frame: &String| frame.contains("stacks.cpp") || frame.contains("backtrace");
            assert!(!frames.iter().any(asking), "{frames:#?}");
            found("busy", "busy_here");
            drop(sender);
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn names_of_cpp_and_addresses_without_a_name_can_be_read() {
        assert_eq!(demangled("_ZNK2at6Tensor4sizeEl").as_deref(), Some("at::Tensor::size(long) const"));
        assert_eq!(demangled("main"), None);
        assert_eq!(demangled("_Z"), None);
        assert_eq!(names_of(0x10), ["0x10"]);
        for (path, short) in [
            ("/rustc/5980/library/std/src/sync/mpsc.rs", "std/src/sync/mpsc.rs"),
            ("/root/.cargo/registry/src/index-19/mio-1.2.5/src/poll.rs", "mio-1.2.5/src/poll.rs"),
            ("/build/crates/sail-torch/csrc/group.cpp", "sail-torch/csrc/group.cpp"),
            ("./nptl/pthread_create.c", "./nptl/pthread_create.c"),
            ("src/main.rs", "src/main.rs"),
        ] {
            assert_eq!(in_package(path), short);
        }
    }

    /// What waits or works in a process that trains, and comes to the right end while it is interrupted all the time.
    #[test]
    fn many_samples_do_no_harm() {
        const SAMPLES: usize = 500;
        let over = AtomicBool::new(false);
        let rounds = AtomicUsize::new(0);
        let working = || !over.load(Ordering::Relaxed);
        let server = Store::serve(0, Duration::from_secs(60)).unwrap();
        thread::scope(|scope| {
            for rank in 0..2 {
                let (port, over, rounds) = (server.port(), &over, &rounds);
                scope.spawn(move || collectives(rank, port, over, rounds));
            }
            scope.spawn(|| {
                while working() {
                    let started = Instant::now();
                    thread::sleep(Duration::from_millis(30));
                    assert!(started.elapsed() >= Duration::from_millis(30));
                }
            });
            scope.spawn(|| {
                let pair = (std::sync::Mutex::new(()), Condvar::new());
                while working() {
                    let started = Instant::now();
                    let guard = pair.0.lock().unwrap();
                    let patience = Duration::from_millis(30);
                    let (_guard, result) = pair.1.wait_timeout_while(guard, patience, |()| true).unwrap();
                    assert!(result.timed_out() && started.elapsed() >= patience);
                }
            });
            scope.spawn(|| {
                while working() {
                    pass_bytes(Some(Duration::from_secs(30)));
                    pass_bytes(None);
                }
            });
            scope.spawn(|| {
                let matrix = Tensor::ones([64, 64], (Kind::Float, Device::Cpu));
                while working() {
                    let texts: Vec<String> = (0..200).map(|number| number.to_string()).collect();
                    assert_eq!(texts.concat().len(), 490);
                    assert_eq!(matrix.matmul(&matrix).sum(Kind::Float).int64_value(&[]), 64 * 64 * 64);
                }
            });
            let mut answers = 0;
            for _ in 0..SAMPLES {
                answers += ask_all().unwrap().iter().filter(|(_, answer)| answer.is_ok()).count();
                thread::sleep(Duration::from_millis(2));
            }
            over.store(true, Ordering::Relaxed);
            assert!(answers > SAMPLES * 6, "{answers} answers in {SAMPLES} samples");
        });
        assert!(rounds.load(Ordering::Relaxed) > 20, "{rounds:?} rounds of collectives");
    }

    /// Until rank 0 sees that all is over, and tells rank 1.
    fn collectives(rank: usize, port: u16, over: &AtomicBool, rounds: &AtomicUsize) {
        let timeout = Duration::from_secs(60);
        let store = Store::connect("127.0.0.1", port, "stacks", timeout).unwrap();
        let address = Some("127.0.0.1".to_owned());
        let (name, backend) = ("stacks".to_owned(), Backend::Gloo);
        let group =
            ProcessGroup::join(&store, GroupOptions { name, backend, rank, size: 2, timeout, address })
                .unwrap();
        for round in 0.. {
            let last = rank == 0 && over.load(Ordering::Relaxed);
            let tensor = Tensor::full([50_000], rank as f64 + 1.0, (Kind::Float, Device::Cpu));
            let flag = Tensor::from_slice(&[f32::from(u8::from(last))]);
            group.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap();
            group.all_reduce(&flag, ReduceOp::Sum).unwrap().wait().unwrap();
            assert_eq!(tensor.sum(Kind::Double).int64_value(&[]), 150_000);
            store.set(&format!("{round}/{rank}"), b"done").unwrap();
            store.wait(&format!("{round}/{}", 1 - rank), timeout).unwrap();
            rounds.fetch_add(1, Ordering::Relaxed);
            if flag.double_value(&[0]) > 0.0 {
                return;
            }
        }
    }

    /// Waits 20 ms for bytes on a socket, with a timeout or without.
    fn pass_bytes(timeout: Option<Duration>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut reader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        reader.set_read_timeout(timeout).unwrap();
        let (mut writer, _) = listener.accept().unwrap();
        let sent = Arc::new(vec![7u8; 200_000]);
        let sending = Arc::clone(&sent);
        let sender = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            std::io::Write::write_all(&mut writer, &sending).unwrap();
        });
        let mut received = Vec::new();
        // Reads again where it was interrupted, as callers of `read` must.
        reader.read_to_end(&mut received).unwrap();
        sender.join().unwrap();
        assert!(received == *sent);
    }
}
