//! Where this process stands among those it trains with, as its environment says.
//!
//! `torchrun` and `sail-train launch` set [`TORCHRUN`]'s variables, `srun` Slurm's (`slurm.rs`); without
//! either a process trains alone. Nothing is connected here; the process group does that with what this gives
//! it.

use crate::error::{Error, Result};

use super::slurm;

/// What `torchrun` gives each process (`torch/distributed/elastic/agent/server/local_elastic_agent.py`).
const TORCHRUN: [&str; 6] =
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];

/// More are a slip of the pen; the main rank keeps a place for the word of each.
const MOST_RANKS: usize = 1 << 20;
const START_HINT: &str = "start with `torchrun --no-python` or `sail-train launch`, which set RANK, WORLD_SIZE, \
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset RANK and WORLD_SIZE for one process alone";

/// Where a process stands among those it trains with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of this process, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// Number of this process among those of its node, from 0: the number of its device.
    pub local_rank: usize,
    /// How many processes its node has.
    pub local_size: usize,
    /// How they find each other; nothing for a process that was started alone.
    pub rendezvous: Option<Rendezvous>,
    /// Who started it.
    pub started_by: Starter,
}

/// The TCP store over which processes find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// Name or address of the machine that hosts the store.
    pub host: String,
    /// Its port, never 0.
    pub port: u16,
    /// Who serves it.
    pub served_by: Server,
    /// Put before every key, so that an attempt never reads what an earlier one wrote into the same store.
    pub prefix: String,
}

/// Who serves the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// The process that trains as rank 0.
    Rank0,
    /// The agent that started the ranks: `torchrun`'s, or the launcher.
    Agent,
}

/// Who started a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    /// A shell: it trains alone.
    Single,
    /// `torchrun`, `sail-train launch`, or whatever else sets their variables.
    Torchrun,
    /// Slurm's `srun`.
    Slurm,
}

impl Place {
    /// A process that trains alone.
    pub const SINGLE: Self = Self {
        rank: 0,
        size: 1,
        local_rank: 0,
        local_size: 1,
        rendezvous: None,
        started_by: Starter::Single,
    };

    /// Whether this process is the one that writes what all share: files of the run, and the console.
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// Whether this process serves the store.
    pub fn serves_store(&self) -> bool {
        self.is_main() && self.rendezvous.as_ref().is_some_and(|meeting| meeting.served_by == Server::Rank0)
    }

    /// The place that this process's environment gives it.
    ///
    /// # Errors
    /// [`Error::Usage`] when variables are missing, malformed or contradict each other.
    pub fn from_env() -> Result<Self> {
        Self::read(|name| Some(std::env::var_os(name)?.to_string_lossy().into_owned()))
    }

    /// The place that these variables give; an empty one counts as not set, as torch has it.
    ///
    /// # Errors
    /// As [`Place::from_env`].
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let vars = Vars(&get);
        let place = match ["RANK", "WORLD_SIZE"].into_iter().find(|name| vars.get(name).is_some()) {
            Some(set) => Some(torchrun(&vars, set)?),
            None => slurm::place(&vars)?,
        };
        Ok(place.unwrap_or(Self::SINGLE))
    }
}

/// What torchrun's variables say, once one of them, `set`, is there.
fn torchrun(vars: &Vars<'_>, set: &str) -> Result<Place> {
    for name in TORCHRUN {
        if vars.get(name).is_none() {
            let hint = match name {
                "LOCAL_RANK" | "LOCAL_WORLD_SIZE" => {
                    "set LOCAL_RANK=0 and LOCAL_WORLD_SIZE=1 where each node runs one process, or start with \
                     `torchrun --no-python` or `sail-train launch`, which set both"
                }
                _ => START_HINT,
            };
            return Err(Error::usage(format!("`{set}` is set and `{name}` is not"), hint));
        }
    }
    let number = |name| vars.required(name, START_HINT);
    let (rank, size) = (number("RANK")?, number("WORLD_SIZE")?);
    if size > MOST_RANKS {
        return Err(Error::usage(format!("`WORLD_SIZE={size}` is more than {MOST_RANKS} ranks"), START_HINT));
    }
    let (local_rank, local_size) = (number("LOCAL_RANK")?, number("LOCAL_WORLD_SIZE")?);
    below(("RANK", rank), ("WORLD_SIZE", size))?;
    below(("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", local_size))?;
    if local_size > size {
        return Err(Error::usage(
            format!("`LOCAL_WORLD_SIZE={local_size}` is more than `WORLD_SIZE={size}`"),
            "WORLD_SIZE counts the processes of all nodes; `torchrun` and `sail-train launch` set both",
        ));
    }
    // The agent's store outlives a restart of its processes, and with it the keys that they wrote.
    let agent_serves = vars.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
    let run = vars.get("TORCHELASTIC_RUN_ID").unwrap_or_else(|| "none".to_owned());
    let attempt = vars.get("TORCHELASTIC_RESTART_COUNT").unwrap_or_else(|| "0".to_owned());
    let rendezvous = Rendezvous {
        host: vars.get("MASTER_ADDR").expect("invariant: it was checked above"),
        port: vars.port("MASTER_PORT")?.expect("invariant: it was checked above"),
        served_by: if agent_serves { Server::Agent } else { Server::Rank0 },
        prefix: format!("sail/{run}/{attempt}"),
    };
    let started_by = Starter::Torchrun;
    Ok(Place { rank, size, local_rank, local_size, rendezvous: Some(rendezvous), started_by })
}

/// A rank must be below its size.
pub(super) fn below((rank, at): (&str, usize), (size, count): (&str, usize)) -> Result<()> {
    if at < count {
        return Ok(());
    }
    Err(Error::usage(
        format!("`{rank}={at}` is not below `{size}={count}`"),
        "ranks count from 0; start all processes with the same launcher and the same numbers",
    ))
}

/// Variables of an environment; an empty one is not there.
pub(super) struct Vars<'a>(pub(super) &'a dyn Fn(&str) -> Option<String>);

impl Vars<'_> {
    pub(super) fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    pub(super) fn number(&self, name: &str, hint: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(Error::usage(format!("`{name}={value}` is not a number from 0 on"), hint)),
        }
    }

    pub(super) fn required(&self, name: &str, hint: &str) -> Result<usize> {
        self.number(name, hint)?.ok_or_else(|| Error::usage(format!("`{name}` is not set"), hint))
    }

    pub(super) fn port(&self, name: &str) -> Result<Option<u16>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse() {
            Ok(port) if port > 0 => Ok(Some(port)),
            _ => Err(Error::usage(
                format!("`{name}={value}` is not a port from 1 to 65535"),
                "set it to a free port of the machine that runs rank 0, the same for every process",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `NAME=value` pairs.
    fn read(vars: &str) -> Result<Place> {
        Place::read(|name| {
            let pair = vars.split_whitespace().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            pair.map(str::to_owned)
        })
    }

    const ONE_OF_TWO: &str =
        "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=node01 MASTER_PORT=29500";

    #[test]
    fn without_variables_a_process_is_alone() {
        assert_eq!(read("").unwrap(), Place::SINGLE);
        assert_eq!(read("RANK= WORLD_SIZE= SLURM_NTASKS=").unwrap(), Place::SINGLE);
        assert_eq!(
            read("LOCAL_RANK=3 MASTER_ADDR=node01 MASTER_PORT=29500").unwrap(),
            Place::SINGLE,
            "left over"
        );
    }

    #[test]
    fn torchruns_variables_give_the_place() {
        use Server::{Agent, Rank0};
        let place = |rank, size, local: (usize, usize), served_by, prefix: &str| Place {
            rank,
            size,
            local_rank: local.0,
            local_size: local.1,
            rendezvous: Some(Rendezvous {
                host: "node01".to_owned(),
                port: 29500,
                served_by,
                prefix: prefix.to_owned(),
            }),
            started_by: Starter::Torchrun,
        };
        let master = "MASTER_ADDR=node01 MASTER_PORT=29500";
        let cases = [
            (ONE_OF_TWO.to_owned(), place(1, 2, (1, 2), Rank0, "sail/none/0")),
            (ONE_OF_TWO.replace("RANK=1", "RANK=0"), place(0, 2, (0, 2), Rank0, "sail/none/0")),
            // A world of one has a rendezvous as well.
            (
                format!("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 {master}"),
                place(0, 1, (0, 1), Rank0, "sail/none/0"),
            ),
            // The agent hosts the store, and a restarted attempt reads no earlier keys.
            (
                format!(
                    "RANK=0 WORLD_SIZE=16 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 {master} \
                     TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RUN_ID=job7 TORCHELASTIC_RESTART_COUNT=2"
                ),
                place(0, 16, (0, 8), Agent, "sail/job7/2"),
            ),
            (
                format!(
                    "RANK=8 WORLD_SIZE=16 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 {master} \
                     TORCHELASTIC_USE_AGENT_STORE=False"
                ),
                place(8, 16, (0, 8), Rank0, "sail/none/0"),
            ),
            // They win over those of Slurm, whose `srun` started the agent.
            (
                format!("{ONE_OF_TWO} SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1 SLURM_STEP_ID=0"),
                place(1, 2, (1, 2), Rank0, "sail/none/0"),
            ),
        ];
        for (vars, expected) in cases {
            let found = read(&vars).unwrap();
            assert_eq!(found, expected, "{vars}");
            let serves = found.rank == 0 && !vars.contains("TORCHELASTIC_USE_AGENT_STORE=True");
            assert_eq!(found.serves_store(), serves, "{vars}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let without = |name: &str| {
            let kept = ONE_OF_TWO.split_whitespace().filter(|pair| !pair.starts_with(&format!("{name}=")));
            kept.collect::<Vec<_>>().join(" ")
        };
        let with = |pair: &str| format!("{} {pair}", without(pair.split('=').next().unwrap()));
        let cases = [
            ("RANK=0".to_owned(), "`RANK` is set and `WORLD_SIZE` is not"),
            ("WORLD_SIZE=2".to_owned(), "`WORLD_SIZE` is set and `RANK` is not"),
            (without("MASTER_ADDR"), "`RANK` is set and `MASTER_ADDR` is not"),
            (without("MASTER_PORT"), "`RANK` is set and `MASTER_PORT` is not"),
            // The operator of PyTorchJobs sets the other four on each pod.
            (without("LOCAL_RANK"), "`RANK` is set and `LOCAL_RANK` is not\n\nhint: set LOCAL_RANK=0"),
            (without("LOCAL_WORLD_SIZE"), "`RANK` is set and `LOCAL_WORLD_SIZE` is not"),
            (with("RANK=one"), "`RANK=one` is not a number"),
            (with("RANK=-1"), "`RANK=-1` is not a number"),
            (with("WORLD_SIZE=2.0"), "`WORLD_SIZE=2.0` is not a number"),
            (with("RANK=2"), "`RANK=2` is not below `WORLD_SIZE=2`"),
            (with("WORLD_SIZE=0"), "`RANK=1` is not below `WORLD_SIZE=0`"),
            (with("LOCAL_RANK=2"), "`LOCAL_RANK=2` is not below `LOCAL_WORLD_SIZE=2`"),
            (with("LOCAL_WORLD_SIZE=4"), "`LOCAL_WORLD_SIZE=4` is more than `WORLD_SIZE=2`"),
            (with("MASTER_PORT=0"), "`MASTER_PORT=0` is not a port"),
            (with("MASTER_PORT=65536"), "`MASTER_PORT=65536` is not a port"),
            (with("MASTER_PORT=tcp"), "`MASTER_PORT=tcp` is not a port"),
        ];
        for (vars, expected) in cases {
            let error = read(&vars).unwrap_err();
            assert!(error.to_string().contains(expected) && error.to_string().contains("hint:"), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
