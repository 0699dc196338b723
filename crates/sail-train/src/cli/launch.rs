//! The command `launch`: its arguments; what it does is in [`crate::launch`].

use std::ffi::OsString;
use std::process::ExitCode;

use crate::error::{Error, Result};
use crate::events::Console;
use crate::launch::Launch;

const HELP: &str = "\
Examples:
  sail-train launch --nproc 8 -- --config stage2.yaml
  # Two machines, node01 and node02
  sail-train launch --nproc 8 --nnodes 2 --node-rank 0 --rdzv node01:29500 -- --config stage2.yaml
  sail-train launch --nproc 8 --nnodes 2 --node-rank 1 --rdzv node01:29500 -- --config stage2.yaml

Every line of a rank has `[rank N]` in front. Ctrl-C, SIGTERM and SIGUSR1 are handed on to all ranks.
Exit codes: that of the rank that failed first (128 + N where signal N ended it), 3 when ranks were
interrupted after saving, else 0. When a rank fails, the others have 5 s to end, then they are killed.";

/// Trains in several processes, on this machine or on several
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Options {
    /// Processes on this machine: one for each GPU
    #[arg(long, value_name = "N")]
    nproc: usize,
    /// Machines, each of which runs this command with the same N
    #[arg(long, value_name = "M", default_value_t = 1)]
    nnodes: usize,
    /// Number of this machine, from 0; needed where there are several
    #[arg(long, value_name = "R")]
    node_rank: Option<usize>,
    /// The machine with number 0, as all of them reach it, and a free port there. Default: this machine,
    /// any port
    #[arg(long, value_name = "HOST:PORT")]
    rdzv: Option<String>,
    /// Arguments of `sail-train` itself, the same for every process
    #[arg(value_name = "ARGS", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

/// Starts the processes and waits for them.
pub(super) fn run(options: Options, console: &Console) -> Result<ExitCode> {
    let Options { nproc, nnodes, node_rank, rdzv, args } = options;
    if let Some(word) = args.first().filter(|arg| !arg.to_string_lossy().starts_with('-')) {
        return Err(Error::usage(
            format!(
                "`launch` starts ranks that train, and `{}` is another command or a file",
                word.display()
            ),
            "give the options of training alone, as in `launch --nproc 2 -- --config FILE`",
        ));
    }
    let node_rank = match node_rank {
        None if nnodes > 1 => {
            return Err(Error::usage(
                format!("`--nnodes {nnodes}` needs `--node-rank R`"),
                "number the machines from 0; the one named in `--rdzv` has 0",
            ));
        }
        node_rank => node_rank.unwrap_or(0),
    };
    let rdzv = rdzv.map(|endpoint| endpoint.parse()).transpose()?;
    Launch { args, nproc, nnodes, node_rank, rdzv }.run(console).map(ExitCode::from)
}
