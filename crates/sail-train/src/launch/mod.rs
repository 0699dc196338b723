//! `sail-train launch`: the ranks of one machine as child processes, and the store over which all ranks meet.
//!
//! What `torchrun` does, for machines without Python, and with the same variables, so that a rank need not
//! know who started it. It restarts nothing: whoever starts the launcher again resumes the run. A rank is the
//! same executable as the launcher. `meeting.rs` is where machines meet, `ranks.rs` starts the ranks and ends
//! them, `output.rs` passes on what they print.

mod meeting;
mod output;
mod ranks;

use std::ffi::OsString;
use std::num::NonZero;
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use crate::error::{Error, Result};
use crate::events::Console;
use meeting::Meeting;
pub(crate) use meeting::resolve;
use output::Outputs;
use ranks::{Ranks, Supervisor};

/// Holds the launcher's process number in a rank's environment.
const LAUNCHER: &str = "SAIL_LAUNCHER";

/// How long the other ranks may take to notice that one has failed, before they are killed.
const GRACE: Duration = Duration::from_secs(5);

/// How long a machine waits at the end for the others, whose ranks may still read from the store.
const LINGER: Duration = Duration::from_secs(5);

/// More than a machine has devices, and few enough for any machine to start.
const MAX_NPROC: usize = 1024;
const MAX_NNODES: usize = 100_000;

/// What is started where.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Arguments of every rank.
    pub args: Vec<OsString>,
    /// Ranks on this machine.
    pub nproc: usize,
    /// Machines, each with that many ranks.
    pub nnodes: usize,
    /// Number of this machine, from 0.
    pub node_rank: usize,
    /// Where machine 0 hosts the store; without it, any free port of this machine.
    pub rdzv: Option<Endpoint>,
}

/// A machine and a port on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address.
    pub host: String,
    /// 0 for any that is free.
    pub port: u16,
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.rsplit_once(':').and_then(|(host, port)| {
            let host = match host.strip_prefix('[') {
                Some(address) => address.strip_suffix(']')?,
                None if host.contains(':') => return None,
                None => host,
            };
            (!host.is_empty()).then_some(Self { host: host.to_owned(), port: port.parse().ok()? })
        });
        parsed.ok_or_else(|| {
            Error::usage(
                format!("`--rdzv {text}` is not HOST:PORT"),
                "write for example `--rdzv node01:29500` or `--rdzv [fd00::1]:29500`",
            )
        })
    }
}

impl Launch {
    /// Starts the ranks, waits for them, and returns the exit code that stands for all: that of the rank that
    /// failed first (128 and the signal's number where one ended it), else 3 if one was interrupted, else 0.
    ///
    /// # Errors
    /// [`Error::Usage`] for numbers that make no sense, a name that is not known and a port that is not free;
    /// [`Error::Io`] when a rank cannot be started.
    pub fn run(&self, console: &Console) -> Result<u8> {
        self.check()?;
        let say = |text: &str| console.line(format_args!("[launch] {text}"));
        if let (Some(Endpoint { host, port }), true) = (&self.rdzv, self.node_rank > 0) {
            say(&format!("connecting to the store at {host}:{port}"));
        }
        let meeting = Meeting::open(self)?;
        let program = std::env::current_exe().map_err(Error::io("the running executable".as_ref()))?;
        let threads = self.threads(std::env::var_os("OMP_NUM_THREADS").is_some());
        say(&self.summary(&meeting.endpoint, threads));
        let (events, received) = mpsc::channel();
        // Before the ranks are there, so that no signal passes them by.
        let signals = ranks::watch_signals(events.clone())?;
        // By this thread, which lives as long as the launcher: the kernel ends ranks with the thread that
        // started them.
        let environments = self.environments(&meeting, threads);
        let ranks = Ranks::start(&program, &self.args, environments, &Outputs::standard(), &events)?;
        let code = Supervisor { ranks, grace: GRACE, say: &say }.wait(&received);
        signals.close();
        meeting.leave(LINGER);
        Ok(code)
    }

    fn check(&self) -> Result<()> {
        let Self { nproc, nnodes, node_rank, rdzv, .. } = self;
        if !(1..=MAX_NPROC).contains(nproc) {
            return Err(Error::usage(
                format!("`--nproc {nproc}` must be from 1 to {MAX_NPROC}"),
                "give the number of GPUs of this machine, or of processes on its CPU",
            ));
        }
        if !(1..=MAX_NNODES).contains(nnodes) {
            return Err(Error::usage(
                format!("`--nnodes {nnodes}` must be from 1 to {MAX_NNODES}"),
                "give the number of machines; leave it out for one",
            ));
        }
        if node_rank >= nnodes {
            return Err(Error::usage(
                format!("`--node-rank {node_rank}` is not below `--nnodes {nnodes}`"),
                "machines count from 0; the one named in `--rdzv` has 0",
            ));
        }
        match rdzv {
            None if *nnodes > 1 => Err(Error::usage(
                format!("`--nnodes {nnodes}` needs `--rdzv HOST:PORT`"),
                "name the machine with `--node-rank 0` and a free port of it, the same on every machine",
            )),
            Some(endpoint) if *nnodes > 1 && endpoint.port == 0 => Err(Error::usage(
                "`--rdzv` needs a port that every machine knows, and 0 means any",
                "choose a free port of the machine with `--node-rank 0`, for example 29500",
            )),
            Some(endpoint) => resolve(&endpoint.host, "`--rdzv`"),
            None => Ok(()),
        }
    }

    /// Threads of each rank; nothing where the user has said it, or where a rank has the machine for itself.
    fn threads(&self, set: bool) -> Option<usize> {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        (!set && self.nproc > 1).then(|| (cores / self.nproc).max(1))
    }

    fn summary(&self, store: &Endpoint, threads: Option<usize>) -> String {
        let Self { nproc, nnodes, node_rank, .. } = self;
        let first = node_rank * nproc;
        let ranks = match nproc {
            1 => format!("rank {first}"),
            _ => format!("ranks {first} to {}", first + nproc - 1),
        };
        let threads = threads.map_or_else(String::new, |n| format!(", OMP_NUM_THREADS={n} for each"));
        format!("{ranks} of {}, store at {}:{}{threads}", nnodes * nproc, store.host, store.port)
    }

    /// What each rank's environment has besides the launcher's own.
    fn environments(
        &self,
        meeting: &Meeting,
        threads: Option<usize>,
    ) -> Vec<(usize, Vec<(&'static str, String)>)> {
        let Self { nproc, nnodes, node_rank, .. } = self;
        let environment = |local_rank: usize| {
            let rank = node_rank * nproc + local_rank;
            let mut vars = vec![
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", (nnodes * nproc).to_string()),
                ("LOCAL_RANK", local_rank.to_string()),
                ("LOCAL_WORLD_SIZE", nproc.to_string()),
                ("GROUP_RANK", node_rank.to_string()),
                ("GROUP_WORLD_SIZE", nnodes.to_string()),
                ("MASTER_ADDR", meeting.endpoint.host.clone()),
                ("MASTER_PORT", meeting.endpoint.port.to_string()),
                ("TORCHELASTIC_USE_AGENT_STORE", "True".to_owned()),
                ("TORCHELASTIC_RUN_ID", meeting.run.clone()),
                ("TORCHELASTIC_RESTART_COUNT", "0".to_owned()),
                (LAUNCHER, std::process::id().to_string()),
            ];
            vars.extend(threads.map(|n| ("OMP_NUM_THREADS", n.to_string())));
            (rank, vars)
        };
        (0..*nproc).map(environment).collect()
    }
}

/// In a rank: has the kernel end this process when its launcher ends, however that happens. Elsewhere:
/// nothing.
pub fn end_with_launcher() {
    let Some(launcher) = std::env::var_os(LAUNCHER) else { return };
    // It fails for no signal that exists.
    let asked = set_parent_process_death_signal(Some(Signal::KILL));
    let parent = getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if asked.is_err() || launcher != *parent.to_string() {
        // The launcher ended before it was asked for.
        std::process::exit(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(nproc: usize, nnodes: usize, node_rank: usize, rdzv: Option<&str>) -> Launch {
        Launch { args: Vec::new(), nproc, nnodes, node_rank, rdzv: rdzv.map(|text| text.parse().unwrap()) }
    }

    #[test]
    fn endpoints() {
        let endpoint = |host: &str, port| Endpoint { host: host.to_owned(), port };
        for (text, expected) in [
            ("node01:29500", endpoint("node01", 29500)),
            ("10.0.0.1:1", endpoint("10.0.0.1", 1)),
            ("[fd00::1]:29500", endpoint("fd00::1", 29500)),
            ("localhost:0", endpoint("localhost", 0)),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap(), expected, "{text}");
        }
        for text in
            ["node01", "node01:", ":29500", "node01:65536", "node01:x", "fd00::1:29500", "[fd00::1:2", ""]
        {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.to_string().contains("is not HOST:PORT"), "{text}: {error}");
        }
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        let cases = [
            (launch(0, 1, 0, None), "`--nproc 0` must be from 1"),
            (launch(100_000, 1, 0, None), "`--nproc 100000` must be from 1"),
            (launch(1, 0, 0, None), "`--nnodes 0` must be from 1"),
            (launch(1, 1, 1, None), "`--node-rank 1` is not below `--nnodes 1`"),
            (launch(1, 2, 2, Some("localhost:29500")), "`--node-rank 2` is not below `--nnodes 2`"),
            (launch(1, 2, 0, None), "`--nnodes 2` needs `--rdzv HOST:PORT`"),
            (launch(1, 2, 0, Some("localhost:0")), "needs a port that every machine knows"),
        ];
        for (launch, expected) in cases {
            let error = launch.check().unwrap_err();
            assert!(error.to_string().contains(expected) && error.to_string().contains("hint:"), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
        launch(8, 2, 1, Some("localhost:29500")).check().unwrap();
    }

    /// What a rank is given is what a rank reads.
    #[test]
    fn ranks_find_their_place() {
        use crate::world::{Place, Rendezvous, Server, Starter};
        let launch = launch(4, 1, 0, None);
        let meeting = Meeting::open(&launch).unwrap();
        for (rank, vars) in launch.environments(&meeting, Some(2)) {
            let get = |name: &str| Some(vars.iter().find(|(known, _)| *known == name)?.1.clone());
            let expected = Place {
                rank,
                size: 4,
                local_rank: rank,
                local_size: 4,
                rendezvous: Some(Rendezvous {
                    host: "127.0.0.1".to_owned(),
                    port: meeting.endpoint.port,
                    served_by: Server::Agent,
                    prefix: format!("sail/{}/0", meeting.run),
                }),
                started_by: Starter::Torchrun,
            };
            assert_eq!(Place::read(get).unwrap(), expected);
            assert_eq!(get("OMP_NUM_THREADS").as_deref(), Some("2"));
        }
    }

    #[test]
    fn threads_are_shared_unless_the_user_has_said_how_many() {
        assert_eq!(launch(1024, 1, 0, None).threads(false), Some(1));
        assert_eq!(launch(1024, 1, 0, None).threads(true), None);
        assert_eq!(launch(1, 1, 0, None).threads(false), None);
    }
}
