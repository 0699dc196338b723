//! The command line of `sail-data`: arguments in, an exit code out. What the commands do is in `tools`.
//!
//! 0 done, 1 failed or something is wrong with the data, 2 bad usage.

mod check;
mod index;
mod inspect;
pub mod log;
mod options;
mod pack;
mod rebalance;
pub mod shell;
mod stats;
mod terminal;
pub mod version;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use tracing_subscriber::EnvFilter;

use self::terminal::print;
use crate::tools::error::{Result, ToolError, with_causes};

const AFTER_HELP: &str = "\
Examples:
  sail-data pack llava.json --images coco --out shards/llava
  sail-data index 'shards/llava/*.tar'
  sail-data check 'shards/llava/*.tar'
  sail-data stats 'shards/llava/*.tar' --tokenizer tokenizer.json --html stats.html
  sail-data inspect shards/llava/shard-000000.tar --tokenizer tokenizer.json --tiles
  sail-data rebalance 'shards/captions/*.tar' --layout captions --out captions.safetensors

SHARD is a path with braces ({000..099}) and globs (*); quote it, so that the shell leaves it alone.
Exit codes: 0 done, 1 failed or something is wrong with the data, 2 bad usage.
NO_COLOR=1 keeps colours out of the terminal.";

/// Makes, checks and shows shards of image-text samples.
#[derive(Debug, Parser)]
#[command(name = "sail-data", version, after_help = AFTER_HELP)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Pack(Box<pack::Args>),
    Index(index::Args),
    Check(Box<check::Args>),
    Stats(Box<stats::Args>),
    Inspect(Box<inspect::Args>),
    Rebalance(Box<rebalance::Args>),
    /// Prints a script with which a shell completes commands and options
    #[command(after_help = "Example:\n  source <(sail-data completions bash)")]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Writes manual pages, one for each command
    #[command(after_help = "Example:\n  sail-data man --out ~/.local/share/man/man1")]
    Man {
        /// The folder to write them into
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// Runs the command that the process was started with; `commit` is what the program is built from.
pub fn main(commit: &str) -> ExitCode {
    // clap wants text that is there for good.
    let program = Args::command().version(&*version::version(commit).leak());
    let matches = program.clone().get_matches();
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let filter = match log::filter_from_env() {
        Ok(wished) => wished.unwrap_or_else(|| EnvFilter::new("warn")),
        Err(error) => {
            terminal::warn(&format!("error: {error}"));
            return ExitCode::from(2);
        }
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).without_time();
    log.with_ansi(terminal::colour_on_stderr()).with_writer(std::io::stderr).init();
    match run(args.command, program) {
        Ok(code) => code,
        Err(error) => {
            terminal::warn(&format!("error: {}", with_causes(&error)));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command, program: clap::Command) -> Result<ExitCode> {
    match command {
        Command::Pack(args) => args.run(),
        Command::Index(args) => args.run(),
        Command::Check(args) => args.run(),
        Command::Stats(args) => args.run(),
        Command::Inspect(args) => args.run(),
        Command::Rebalance(args) => args.run(),
        Command::Completions { shell } => {
            print(&shell::completions(program, shell))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { out } => {
            shell::manual(program, &out).map_err(ToolError::io("write manual pages into", &out))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
