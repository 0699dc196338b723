//! The ranks as processes: started, signalled, waited for, and never left behind.
//!
//! Each rank is the first of a process group of its own, so that a terminal's Ctrl-C reaches the launcher
//! alone, which hands it on once. A thread per rank waits for its end without reaping it; the thread that
//! supervises reaps it later, so that no signal can reach a process that has got a rank's number after it.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use signal_hook::consts::{SIGINT, SIGKILL, SIGTERM, SIGUSR1};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::signal_name;

use super::output::{Outputs, pass_on};
use crate::error::{Error, Result};

/// Exit code of a rank that saved and stopped because it was asked to.
const INTERRUPTED: u8 = 3;

/// What the supervisor waits for.
#[derive(Debug)]
pub(super) enum Event {
    /// The rank at this place of the list has ended and is not reaped yet.
    Ended(usize),
    /// All that it printed is passed on.
    Drained(usize),
    /// The launcher got this signal.
    Signal(i32),
}

/// Turns the signals that ranks understand into events, until the handle is closed.
pub(super) fn watch_signals(events: Sender<Event>) -> Result<Handle> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(Error::io("signal handler".as_ref()))?;
    let handle = signals.handle();
    thread::spawn(move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
    Ok(handle)
}

/// The ranks of this machine. Those that still run when it is dropped are killed.
pub(super) struct Ranks(Vec<Rank>);

struct Rank {
    number: usize,
    child: Child,
    /// Once it has ended.
    status: Option<ExitStatus>,
    /// Whether it was killed from here.
    killed: bool,
    drained: bool,
}

impl Ranks {
    /// Starts a process for each rank, with these variables besides the launcher's own.
    pub(super) fn start(
        program: &Path,
        args: &[OsString],
        environments: Vec<(usize, Vec<(&'static str, String)>)>,
        outputs: &Outputs,
        events: &Sender<Event>,
    ) -> Result<Self> {
        let mut ranks = Self(Vec::new());
        for (index, (rank, vars)) in environments.into_iter().enumerate() {
            let mut command = Command::new(program);
            command.args(args).envs(vars).process_group(0);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().map_err(Error::io(program))?;
            let out = child.stdout.take().expect("invariant: it is piped");
            let err = child.stderr.take().expect("invariant: it is piped");
            let pid = Pid::from_child(&child);
            ranks.0.push(Rank { number: rank, child, status: None, killed: false, drained: false });
            let (to_out, to_err) = (Arc::clone(&outputs.out), Arc::clone(&outputs.err));
            let [of_out, of_err] = [(); 2].map(|()| Arc::clone(&outputs.warnings));
            let pumps = [
                thread::spawn(move || pass_on(out, rank, &of_out, &to_out)),
                thread::spawn(move || pass_on(err, rank, &of_err, &to_err)),
            ];
            let events = events.clone();
            thread::spawn(move || {
                wait_for_end(pid);
                let ended = events.send(Event::Ended(index));
                for pump in pumps {
                    // A panic has ended the launcher already.
                    drop(pump.join());
                }
                // Nobody listens any more where the launch was given up.
                drop(ended.and_then(|()| events.send(Event::Drained(index))));
            });
        }
        Ok(ranks)
    }

    fn running(&self) -> impl Iterator<Item = &Rank> {
        self.0.iter().filter(|rank| rank.status.is_none())
    }

    fn signal(&self, signal: Signal) {
        for rank in self.running() {
            signal_group(Pid::from_child(&rank.child), signal);
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Waits until a rank has ended, leaves it to be reaped, and ends what it has started itself.
fn wait_for_end(pid: Pid) {
    let ended = loop {
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Err(Errno::INTR) => {}
            ended => break ended.is_ok(),
        }
    };
    if ended {
        signal_group(pid, Signal::KILL);
    }
}

/// Signals a rank and what it has started.
fn signal_group(leader: Pid, signal: Signal) {
    // It fails only when nobody is left to be signalled.
    let _ = kill_process_group(leader, signal);
}

/// Waits for all ranks; when one fails, makes the others end too.
pub(super) struct Supervisor<'a> {
    pub(super) ranks: Ranks,
    /// How long ranks may run on after the first failure.
    pub(super) grace: Duration,
    /// Prints a line.
    pub(super) say: &'a dyn Fn(&str),
}

impl Supervisor<'_> {
    /// Returns the exit code that stands for all, once every rank has ended and its output is passed on.
    pub(super) fn wait(mut self, events: &Receiver<Event>) -> u8 {
        let (mut first, mut deadline) = (None, None);
        while self.ranks.0.iter().any(|rank| !rank.drained) {
            match next(events, deadline) {
                Some(Event::Ended(index)) => {
                    if self.reap(index) && first.is_none() {
                        first = Some(index);
                        deadline = Some(Instant::now() + self.grace);
                    }
                }
                Some(Event::Drained(index)) => {
                    self.ranks.0[index].drained = true;
                    if first == Some(index) {
                        self.report_first(index);
                    }
                }
                Some(Event::Signal(signal)) => self.forward(signal),
                None => {
                    deadline = None;
                    self.kill();
                }
            }
        }
        first.map_or_else(|| self.without_failure(), |first| self.report_rest(first))
    }

    /// Takes note of how a rank ended, and says whether that is a failure.
    fn reap(&mut self, index: usize) -> bool {
        let rank = &mut self.ranks.0[index];
        let status = rank.child.wait().expect("invariant: it has ended, and nobody else reaps it");
        rank.status = Some(status);
        is_failure(status)
    }

    fn report_first(&self, index: usize) {
        let rank = &self.ranks.0[index];
        let how = rank.status.map_or_else(String::new, how_it_ended);
        let others = match self.ranks.running().count() {
            0 => String::new(),
            _ => format!("; the others have {} s to end by themselves", self.grace.as_secs()),
        };
        (self.say)(&format!("rank {} failed first: {how}{others}", rank.number));
    }

    /// Hands a signal on to every rank that runs.
    fn forward(&self, signal: i32) {
        let Some(known) = Signal::from_named_raw(signal) else { return };
        self.ranks.signal(known);
        let name = signal_name(signal).unwrap_or("a signal");
        (self.say)(&format!("{name} handed on to {}", list(self.ranks.running())));
    }

    fn kill(&mut self) {
        self.ranks.signal(Signal::KILL);
        for rank in self.ranks.0.iter_mut().filter(|rank| rank.status.is_none()) {
            rank.killed = true;
        }
        if self.ranks.running().next().is_some() {
            (self.say)(&format!("{} did not end: killed", list(self.ranks.running())));
        }
    }

    fn without_failure(&self) -> u8 {
        let interrupted = self.ranks.0.iter().any(|rank| rank.status.map(exit_code) == Some(INTERRUPTED));
        if interrupted { INTERRUPTED } else { 0 }
    }

    fn report_rest(&self, first: usize) -> u8 {
        let after = (self.ranks.0.iter().enumerate())
            .filter(|(index, rank)| *index != first && !rank.killed)
            .filter_map(|(_, rank)| Some((rank.number, rank.status.filter(|status| is_failure(*status))?)))
            .map(|(rank, status)| format!("rank {rank}: {}", how_it_ended(status)))
            .collect::<Vec<_>>();
        if !after.is_empty() {
            (self.say)(&format!("failed after it: {}", after.join(", ")));
        }
        self.ranks.0[first].status.map_or(1, exit_code)
    }
}

/// The next event, or nothing once the deadline is over.
fn next(events: &Receiver<Event>, deadline: Option<Instant>) -> Option<Event> {
    const OPEN: &str = "invariant: the launcher keeps a sender";
    let Some(deadline) = deadline else { return Some(events.recv().expect(OPEN)) };
    match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(event) => Some(event),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => unreachable!("{OPEN}"),
    }
}

fn is_failure(status: ExitStatus) -> bool {
    !matches!(exit_code(status), 0 | INTERRUPTED)
}

/// The code of a process that ended by itself; 128 and the number of the signal that ended it, as shells have
/// it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    code.try_into().unwrap_or(u8::MAX)
}

fn how_it_ended(status: ExitStatus) -> String {
    let Some(signal) = status.signal() else { return format!("exit code {}", exit_code(status)) };
    let name = signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned);
    let hint = if signal == SIGKILL { ", perhaps for want of memory" } else { "" };
    format!("ended by {name}{hint}")
}

fn list<'a>(ranks: impl Iterator<Item = &'a Rank>) -> String {
    let ranks: Vec<_> = ranks.map(|rank| rank.number.to_string()).collect();
    let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
    format!("{noun} {}", ranks.join(", "))
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use super::*;

    /// What ranks that run a shell script did.
    struct Outcome {
        code: u8,
        out: String,
        said: Vec<String>,
        took: Duration,
    }

    /// Runs a script in `n` ranks; a signal may come once rank 0 has printed `ready`.
    fn run(n: usize, script: &str, signals: &[i32]) -> Outcome {
        let started = Instant::now();
        let (events, received) = mpsc::channel();
        let out = Arc::new(Mutex::new(Vec::new()));
        let outputs = Outputs::to(out.clone(), Arc::new(Mutex::new(std::io::sink())));
        let environments = (0..n).map(|rank| (rank, vec![("RANK", rank.to_string())])).collect();
        let args = ["-c".into(), script.into()];
        let ranks = Ranks::start(Path::new("/bin/sh"), &args, environments, &outputs, &events).unwrap();
        let signalled = (!signals.is_empty()).then(|| {
            let (out, events, signals) = (out.clone(), events.clone(), signals.to_vec());
            thread::spawn(move || {
                for (times, signal) in (1..).zip(signals) {
                    let ready = || String::from_utf8_lossy(&out.lock().unwrap()).matches("ready").count();
                    while ready() < times * n {
                        thread::sleep(Duration::from_millis(5));
                    }
                    events.send(Event::Signal(signal)).unwrap();
                }
            })
        });
        let said = Mutex::new(Vec::new());
        let say = |text: &str| said.lock().unwrap().push(text.to_owned());
        let code = Supervisor { ranks, grace: Duration::from_millis(300), say: &say }.wait(&received);
        if let Some(thread) = signalled {
            thread.join().unwrap();
        }
        let out = String::from_utf8(out.lock().unwrap().clone()).unwrap();
        Outcome { code, out, said: said.into_inner().unwrap(), took: started.elapsed() }
    }

    #[test]
    fn all_output_is_passed_on_before_the_end() {
        let outcome = run(3, "seq 1 5000; printf last", &[]);
        assert_eq!(outcome.code, 0);
        assert!(outcome.said.is_empty(), "{:?}", outcome.said);
        for rank in 0..3 {
            let prefix = format!("[rank {rank}] ");
            let lines: Vec<_> = outcome.out.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
            let expected: Vec<_> = (1..=5000).map(|n| n.to_string()).chain(["last".to_owned()]).collect();
            assert!(lines == expected, "rank {rank} has {} lines", lines.len());
        }
    }

    #[test]
    fn the_first_failure_counts_and_the_others_are_ended() {
        // Rank 1 fails, rank 0 notices by itself, rank 2 does not, nor does what rank 2 has started.
        let script = "case $RANK in 1) exit 7;; 0) sleep 0.1; exit 1;; *) sleep 600 & sleep 600;; esac";
        let outcome = run(3, script, &[]);
        assert_eq!(outcome.code, 7);
        assert_eq!(
            outcome.said,
            [
                "rank 1 failed first: exit code 7; the others have 0 s to end by themselves",
                "rank 2 did not end: killed",
                "failed after it: rank 0: exit code 1"
            ]
        );
        assert!(outcome.took < Duration::from_secs(60));
    }

    #[test]
    fn the_code_stands_for_all_ranks() {
        let cases = [
            ("exit 0", 0),
            ("exit 3", 3),
            ("test $RANK = 0 && exit 3; exit 0", 3),
            ("test $RANK = 0 && exit 3; sleep 0.1; exit 2", 2),
            ("test $RANK = 0 && exit 3; kill -KILL $$", 137),
            ("kill -SEGV $$", 139),
        ];
        for (script, code) in cases {
            assert_eq!(run(2, script, &[]).code, code, "{script}");
        }
    }

    /// A rank that was interrupted after saving is no reason to hurry the others.
    #[test]
    fn an_interrupted_rank_ends_nobody() {
        let outcome = run(2, "test $RANK = 0 && exit 3; sleep 0.6; echo saved; exit 3", &[]);
        assert_eq!((outcome.code, outcome.out.as_str()), (3, "[rank 1] saved\n"));
    }

    #[test]
    fn signals_are_handed_on_each_time() {
        let script = "n=0; trap 'n=$((n + 1)); echo ready; test $n = 2 && exit 3' INT; echo ready; \
                      while :; do sleep 0.02; done";
        let outcome = run(2, script, &[SIGINT, SIGINT]);
        assert_eq!(outcome.code, 3);
        assert_eq!(outcome.said, vec!["SIGINT handed on to ranks 0, 1"; 2]);

        let outcome = run(2, "echo ready; exec sleep 600", &[SIGTERM]);
        assert_eq!(outcome.code, 143);
        assert_eq!(outcome.said[0], "SIGTERM handed on to ranks 0, 1");
        assert!(outcome.said[1].contains("failed first: ended by SIGTERM"), "{:?}", outcome.said);
    }

    /// What a rank has started and left behind holds its pipes open, and must not hold up the launcher.
    #[test]
    fn what_a_rank_leaves_behind_ends_with_it() {
        let outcome = run(1, "sleep 600 & echo done", &[]);
        assert_eq!((outcome.code, outcome.out.as_str()), (0, "[rank 0] done\n"));
        assert!(outcome.took < Duration::from_secs(60));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let (events, _received) = mpsc::channel();
        let environments = vec![(0, Vec::new())];
        let started =
            Ranks::start(Path::new("/nonexistent"), &[], environments, &Outputs::standard(), &events);
        assert!(started.err().unwrap().to_string().contains("/nonexistent"));
    }
}
