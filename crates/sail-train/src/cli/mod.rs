//! The command line: arguments in, an exit code out.
//!
//! 0 done, 1 failed, 2 bad configuration or usage, 3 interrupted after saving, 130 ended at once by a second signal.

mod configuration;
mod doctor;
mod launch;
mod logging;
mod planning;
mod using;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, Args as _, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use sail_data::cli::shell::{completions, manual};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use self::logging::LogArgs;
use crate::config::{self, Config};
use crate::curriculum;
use crate::error::{Error, Result};
use crate::events::Console;
use crate::launch::end_with_launcher;
use crate::program;
use crate::resume::Resume;
use crate::stopping::Stopping;
use crate::threads::spawn;
use crate::train_loop::RunOptions;
use crate::world::{Place, World, tell_of_end};

/// Signals that come within this time are one request.
const ONE_REQUEST: Duration = Duration::from_secs(1);

const AFTER_HELP: &str = "\
Examples:
  sail-train --config configs/tiny/curriculum.yaml
  sail-train --config stage2.yaml --set train.projector.lr=1e-4 --set run.dir=runs/try
  sail-train launch --nproc 8 -- --config stage2.yaml
  sail-train --config stage2.yaml --dry-run --world 1024 --mfu 0.35
  sail-train config check stage2.yaml
  sail-train eval --checkpoint runs/demo/stage3
  sail-train generate --checkpoint runs/demo/stage3 --image photo.jpg --prompt What?
  sail-train doctor

Ctrl-C, SIGTERM, SIGUSR1, a file `stop` in the run's folder or the end of its time (`run.time_limit_secs`, or
Slurm's) save after the step and exit with 3; the same command resumes. A second Ctrl-C or SIGTERM, a second or
more later, ends it at once, with 130.
Exit codes: 0 done, 1 failed, 2 bad configuration or usage, 3 interrupted after saving, 130 ended at once.
NO_COLOR=1 keeps colours out of the log; SAIL_LOG=LEVEL, or TARGET=LEVEL,..., overrides `-v` and `-q`.";

/// Trains the vision encoder of a multimodal LLM stage by stage.
#[derive(Debug, Parser)]
#[command(
    name = "sail-train",
    version,
    override_usage = "sail-train [OPTIONS] --config <FILE>\n       sail-train [OPTIONS] <COMMAND>",
    subcommand_negates_reqs = true,
    arg_required_else_help = true,
    after_help = AFTER_HELP
)]
pub struct Args {
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Launch(launch::Options),
    Config(configuration::Options),
    Doctor(doctor::Options),
    #[command(flatten)]
    Using(using::Command),
    /// Prints a script with which a shell completes commands and options
    #[command(after_help = "Example:\n  source <(sail-train completions bash)")]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Writes manual pages, one for each command
    #[command(after_help = "Example:\n  sail-train man --out ~/.local/share/man/man1")]
    Man {
        /// The folder to write them into
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct TrainArgs {
    /// A stage, or a curriculum of stages
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Overrides a value of the configuration, for example `--set train.projector.lr=1e-3`
    #[arg(long, value_name = "PATH=VALUE")]
    set: Vec<String>,
    /// `auto`, `never`, or the checkpoint to continue from
    #[arg(long, value_name = "auto|never|DIR", default_value = "auto")]
    resume: String,
    /// Goes on from a checkpoint although the configuration differs from its own
    #[arg(long)]
    allow_config_change: bool,
    /// Saves and stops (exit code 3) once this step of the running stage is done
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
    stop_at: Option<u64>,
    /// Writes a trace of N steps of each stage, after its first 3, into `RUN_DIR/profile`: what every rank did when, for
    /// `chrome://tracing` or <https://ui.perfetto.dev>
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    profile: Option<u64>,
    /// Prints what each stage would do and take, and trains nothing; `config show` prints every value of the plan
    #[arg(long, conflicts_with_all = ["resume", "stop_at", "profile", "allow_config_change"])]
    dry_run: bool,
    #[command(flatten)]
    planning: planning::Options,
}

/// Runs the command that the process was started with; `commit` is what the program is built from.
pub fn main(commit: &'static str) -> ExitCode {
    end_with_launcher();
    program::built_from(commit);
    // clap wants text that is there for good.
    let (short, long) = (program::version().leak(), program::with_torch().leak());
    let command = Args::command().version(&*short).long_version(&*long);
    let args = parse(command.clone());
    let console = match args.log.start() {
        Ok(console) => console,
        Err(error) => {
            show(&error, &Console::new());
            return ExitCode::from(error.exit_code());
        }
    };
    exit_on_panic(console.clone());
    match run(args, command, &console) {
        Ok(code) => code,
        Err(error) => {
            show(&error, &console);
            if Place::from_env().is_ok_and(|place| place.rendezvous.is_some()) {
                end(error.exit_code());
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// The arguments of this process. What is for training goes with no command, while the log's options go with each.
fn parse(mut command: clap::Command) -> Args {
    let matches = command.clone().get_matches();
    if let Some(name) = matches.subcommand_name() {
        let training = TrainArgs::augment_args(clap::Command::new(""));
        let given = |arg: &&Arg| {
            // Defaults count as values, too.
            matches.try_contains_id(arg.get_id().as_str()).unwrap_or(false)
                && matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
        };
        if let Some(arg) = training.get_arguments().find(given) {
            let message = format!("the subcommand '{name}' cannot be used with '{arg}'");
            command.error(ErrorKind::ArgumentConflict, message).exit();
        }
    }
    Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

fn show(error: &Error, console: &Console) {
    let prefix = match error {
        // The ranks of a host read the same file.
        Error::Config(_) if Place::from_env().is_ok_and(|place| place.local_rank > 0) => {
            return console
                .alarm("error: the configuration has faults, which the first rank of this host lists");
        }
        // They print themselves, one `error:` each.
        Error::Config(_) => "",
        // Told by the rank itself.
        Error::Elsewhere { .. } => return console.alarm(format!("error: {}", first_line(error))),
        _ => "error: ",
    };
    console.alarm(format!("{prefix}{}", with_causes(error)));
}

fn first_line(error: &Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The error's message, with what lies behind it where the message does not say so itself.
fn with_causes(error: &Error) -> String {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = inner.source();
    }
    match error.hint().filter(|_| !message.contains("hint: ")) {
        Some(hint) => format!("{message}\n\nhint: {hint}"),
        None => message,
    }
}

/// Prints a result on standard output. A reader that has gone (`| head`) has seen what it wanted.
fn print(text: impl std::fmt::Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("standard output".as_ref())(error))
        }
        _ => Ok(()),
    }
}

/// A panic in any thread ends the process: a run whose loader died must not wait for it.
fn exit_on_panic(console: Console) {
    std::panic::set_hook(Box::new(move |info| {
        let backtrace = std::backtrace::Backtrace::capture();
        console.alarm(format!("error: internal: {info}\n{backtrace}\n\nhint: the newest checkpoint is intact; please report this"));
        tell_of_end(&info.to_string());
        end(1);
    }));
}

/// Ends the process at once, without what C++ libraries do at the end: they may wait for a rank that is stuck.
fn end(code: u8) -> ! {
    signal_hook::low_level::exit(code.into())
}

fn run(args: Args, program: clap::Command, console: &Console) -> Result<ExitCode> {
    match args.command {
        None => train(args.train, console),
        Some(Command::Launch(options)) => launch::run(options, console),
        Some(Command::Config(options)) => configuration::run(options),
        Some(Command::Doctor(options)) => doctor::run(&options),
        Some(Command::Using(command)) => using::run(command, console),
        Some(Command::Completions { shell }) => {
            print(completions(program, shell))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Man { out }) => {
            manual(program, &out).map_err(Error::io(&out))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn train(args: TrainArgs, console: &Console) -> Result<ExitCode> {
    let file = args.config.expect("invariant: clap requires --config");
    let place = Place::from_env()?;
    let cluster = args.planning.cluster(args.dry_run, place.size)?;
    let config = config::load(&file, &args.set)?;
    if let Some(cluster) = cluster {
        if !place.is_main() {
            return Ok(ExitCode::SUCCESS);
        }
        let page = args.planning.text(&config, cluster)?;
        print(format_args!(
            "{page}`sail-train config show {}`, with the same `--set`, prints every value.\n",
            file.display()
        ))?;
        return Ok(ExitCode::SUCCESS);
    }
    let console = &console.clone().talking(place.is_main());
    let resume = match args.resume.as_str() {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        dir => Resume::From(dir.into()),
    };
    if matches!((&resume, &config), (Resume::From(_), Config::Curriculum(_))) {
        return Err(Error::usage(
            "`--resume DIR` names the checkpoint of one stage, and this is a curriculum",
            "run the stage's own file, or use `--resume auto`",
        ));
    }
    let plans = config.plans();
    // What is wrong with this rank alone is told before the others count on it.
    let mut stopping = Stopping::new(args.stop_at)?;
    let world = Arc::new(World::join(place, plans[0], console)?);
    // Until the ranks have met there is nothing to save: a signal ends the process at once.
    stopping.flag = stop_on_signals()?;
    let allow_config_change = args.allow_config_change;
    let profile = args.profile;
    let options = RunOptions { resume, allow_config_change, stopping, profile, console: console.clone() };
    let summary = match curriculum::run(&plans, &world, &options) {
        Ok(summary) => summary,
        Err(error) if world.size() == 1 => return Err(error),
        Err(error) => {
            let error = world.explain(error);
            show(&error, console);
            // Without destructors: those of a group wait for collectives that will never end.
            signal_hook::low_level::exit(error.exit_code().into());
        }
    };
    world.leave();
    match summary {
        Some(summary) => {
            world.on_main(|| print(format_args!("\n{summary}\n")))?;
            Ok(ExitCode::SUCCESS)
        }
        None => Ok(ExitCode::from(3)),
    }
}

/// The first SIGINT or SIGTERM asks for a save and a stop, a later one ends the process at once; SIGUSR1 only asks.
///
/// A terminal, a service manager or a scheduler may send the same signal to a launcher, which hands it on, and to its
/// ranks: what comes right after the first one is no second request.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let failed = |source| Error::Io { path: "signal handler".into(), source };
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(failed)?;
    let asked = Arc::clone(&stop);
    let mut first: Option<Instant> = None;
    spawn("sail-signals", move || {
        for signal in &mut signals {
            asked.store(true, Ordering::Relaxed);
            // Sent by schedulers before the end of a job's time, perhaps more than once.
            if signal != SIGUSR1 && first.get_or_insert_with(Instant::now).elapsed() > ONE_REQUEST {
                end(130);
            }
        }
    })?;
    Ok(stop)
}
