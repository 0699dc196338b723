//! Where all ranks meet: the store, and what the launchers of several machines settle over it before any rank
//! starts.
//!
//! Machine 0 serves the store and gives the run a name that no earlier run has; the others learn it there, so
//! that a rank left over from an earlier run can join no later one.

use std::net::ToSocketAddrs;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use sail_torch::Store;

use super::{Endpoint, Launch};
use crate::error::{Error, Result};
use crate::world::within;

/// How long a machine waits for machine 0 to start.
const MEET: Duration = Duration::from_secs(600);

/// How much longer it waits for an answer to its own patience.
const GRACE: Duration = Duration::from_secs(1);

/// How long a machine's name may take to become known, as that of a pod that is just starting.
const RESOLVE: Duration = Duration::from_secs(10);

const RUN: &str = "launch/run";
const LEFT: &str = "launch/left";
const ALL_LEFT: &str = "launch/all-left";

/// The store, for as long as this lives where it is served here.
#[derive(Debug)]
pub(super) struct Meeting {
    store: Store,
    /// Where ranks find it.
    pub(super) endpoint: Endpoint,
    /// The run's name.
    pub(super) run: String,
    /// Other machines than this one.
    others: usize,
    serves: bool,
}

impl Meeting {
    /// Serves the store on machine 0, and connects to it on the others.
    pub(super) fn open(launch: &Launch) -> Result<Self> {
        let Launch { nproc, nnodes, node_rank, rdzv, .. } = launch;
        let mut endpoint = rdzv.clone().unwrap_or(Endpoint { host: "127.0.0.1".to_owned(), port: 0 });
        let (others, serves) = (nnodes - 1, *node_rank == 0);
        // What every machine must have been told alike.
        let shape = format!("--nproc {nproc} --nnodes {nnodes}");
        if serves {
            let store = serve(endpoint.port)?;
            endpoint.port = store.port();
            let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let run = format!("launch-{}-{}", std::process::id(), since_epoch.as_millis());
            store.set(RUN, format!("{run} {shape}").as_bytes())?;
            return Ok(Self { store, endpoint, run, others, serves });
        }
        let store = connect(&endpoint, MEET)?;
        let told = String::from_utf8_lossy(&store.get(RUN)?).into_owned();
        let (run, its_shape) = told.split_once(' ').unwrap_or((&told, ""));
        if its_shape != shape {
            return Err(Error::usage(
                format!("machine 0 was started with `{its_shape}`, this one with `{shape}`"),
                "start every machine with the same numbers, and its own `--node-rank`",
            ));
        }
        if store.add(&format!("launch/node/{node_rank}"), 1)? > 1 {
            return Err(Error::usage(
                format!("another machine has `--node-rank {node_rank}` too"),
                "give every machine its own number, from 0",
            ));
        }
        Ok(Self { store, endpoint, run: run.to_owned(), others, serves })
    }

    /// Where this machine serves the store, waits a while for the others, whose ranks may still read from it.
    pub(super) fn leave(self, patience: Duration) {
        if self.others == 0 {
            return;
        }
        // Nothing is left to be done for a machine that cannot be reached any more.
        let _ = within(patience, move || {
            if self.serves {
                drop(self.store.wait(ALL_LEFT, patience));
            } else if self.store.add(LEFT, 1).is_ok_and(|left| left == self.others as i64) {
                drop(self.store.set(ALL_LEFT, b""));
            }
        });
    }
}

fn serve(port: u16) -> Result<Store> {
    Store::serve(port, MEET).map_err(|error| match error {
        sail_torch::Error::Network { message, .. } => Error::usage(
            format!("the store cannot be served at port {port}: {message}"),
            "another process may have the port, perhaps an earlier launch; choose another one in `--rdzv`, the \
             same on every machine",
        ),
        error => error.into(),
    })
}

fn connect(endpoint: &Endpoint, patience: Duration) -> Result<Store> {
    let Endpoint { host, port } = endpoint.clone();
    let silent = |reason: String| {
        Error::usage(
            format!("no store answers at {}:{port}: {reason}", endpoint.host),
            "start the same command with `--node-rank 0` there, and see that nothing else has the port or blocks it",
        )
    };
    match within(patience + GRACE, move || Store::connect(&host, port, "", patience)) {
        None => Err(silent(format!("not a word within {} s", patience.as_secs()))),
        Some(Err(error)) if error.is_distributed() => Err(silent(error.to_string())),
        Some(connected) => Ok(connected?),
    }
}

/// Waits a little for a name, which `source` gave, to become known.
pub(crate) fn resolve(host: &str, source: &str) -> Result<()> {
    let deadline = Instant::now() + RESOLVE;
    loop {
        let Err(error) = (host, 0).to_socket_addrs() else { return Ok(()) };
        if Instant::now() > deadline {
            return Err(Error::usage(
                format!("the machine `{host}` of {source} is not known: {error}"),
                "check its spelling, or write its address instead of its name",
            ));
        }
        thread::sleep(Duration::from_millis(500));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(nproc: usize, node_rank: usize, port: u16) -> Launch {
        let rdzv = Some(Endpoint { host: "localhost".to_owned(), port });
        Launch { args: Vec::new(), nproc, nnodes: 3, node_rank, rdzv }
    }

    #[test]
    fn machines_agree_on_the_run_and_leave_together() {
        let first = Meeting::open(&launch(2, 0, 0)).unwrap();
        let port = first.endpoint.port;
        let [second, third] = [1, 2].map(|node_rank| Meeting::open(&launch(2, node_rank, port)).unwrap());
        assert_eq!((&second.run, &third.run), (&first.run, &first.run));

        let fault = |launch| Meeting::open(&launch).unwrap_err().to_string();
        let port_taken = fault(launch(2, 0, port));
        assert!(port_taken.contains("EADDRINUSE") && port_taken.contains("hint:"), "{port_taken}");
        let other_shape = fault(launch(4, 1, port));
        assert!(other_shape.contains("`--nproc 2 --nnodes 3`, this one with `--nproc 4"), "{other_shape}");
        let twice = fault(launch(2, 2, port));
        assert!(twice.contains("another machine has `--node-rank 2` too"), "{twice}");

        let started = Instant::now();
        let leaving = thread::spawn(move || first.leave(Duration::from_secs(60)));
        second.leave(Duration::ZERO);
        third.leave(Duration::ZERO);
        leaving.join().unwrap();
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_port_where_something_else_listens_is_not_a_store() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = Endpoint { host: "127.0.0.1".to_owned(), port: other.local_addr().unwrap().port() };
        let error = connect(&endpoint, Duration::from_millis(100)).unwrap_err().to_string();
        assert!(error.contains("no store answers") && error.contains("hint:"), "{error}");
    }

    #[test]
    fn a_machine_that_does_not_come_back_is_not_awaited_for_ever() {
        let first = Meeting::open(&launch(2, 0, 0)).unwrap();
        first.leave(Duration::from_millis(100));
    }
}
