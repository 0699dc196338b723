//! The command line: arguments in, an exit code out.
//!
//! 0 done, 1 failed, 2 bad configuration or usage, 3 interrupted after saving.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Parser, Subcommand, ValueEnum};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing_subscriber::EnvFilter;

use crate::checkpoint::{self, Checkpoint};
use crate::config::{self, Config};
use crate::curriculum;
use crate::error::{Error, Result};
use crate::events::Console;
use crate::export;
use crate::session::Session;
use crate::train_loop::{Resume, RunOptions};

const AFTER_HELP: &str = "\
Examples:
  sail-train --config configs/tiny/curriculum.yaml
  sail-train --config stage2.yaml --set train.projector.lr=1e-4 --set run.dir=runs/try
  sail-train eval --checkpoint runs/demo/stage3

Ctrl-C or SIGTERM saves after the step and exits with 3; the same command resumes. A second one ends
it at once, with 130.
Exit codes: 0 done, 1 failed, 2 bad configuration or usage, 3 interrupted after saving.
SAIL_LOG=debug shows more of the log, SAIL_LOG=error less.";

/// Trains the vision encoder of a multimodal LLM stage by stage.
#[derive(Debug, Parser)]
#[command(
    name = "sail-train",
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    after_help = AFTER_HELP
)]
pub struct Args {
    #[command(flatten)]
    train: TrainArgs,
    #[command(subcommand)]
    command: Option<Command>,
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
    /// Saves and stops (exit code 3) once this step of the running stage is done
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
    stop_at: Option<u64>,
    /// Prints the resolved plan and trains nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measures a checkpoint on the held-out data of its plan
    Eval {
        /// A run or one of its `step-…` folders
        #[arg(long, value_name = "DIR")]
        checkpoint: PathBuf,
        /// Writes the report here as JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Writes a checkpoint's vision encoder or language model as a folder that `transformers` loads
    Export {
        /// A run or one of its `step-…` folders
        #[arg(long, value_name = "DIR")]
        checkpoint: PathBuf,
        /// What is exported
        #[arg(long, default_value = "vit")]
        what: What,
        /// Names and files
        #[arg(long, default_value = "transformers")]
        layout: Layout,
        /// The folder to write
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Writes an exported vision encoder's features of images, and the pixels it saw
    Embed {
        /// An exported folder
        #[arg(long, value_name = "DIR")]
        vit: PathBuf,
        /// Images
        #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
        image: Vec<PathBuf>,
        /// Receives `pixel_values` `[n, 3, px, px]` and `last_hidden_state` `[n, tokens, width]`
        #[arg(long, value_name = "FILE.safetensors")]
        out: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// The vision encoder
    Vit,
    /// The language model, with its tokenizer
    Llm,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Layout {
    Transformers,
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let console = Console::new();
    let filter = EnvFilter::try_from_env("SAIL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_ansi(colour);
    log.with_writer(console.clone()).init();
    exit_on_panic(console.clone());
    match run(args, &console) {
        Ok(code) => code,
        Err(error) => {
            // A configuration's errors print themselves, one `error:` each.
            let prefix = if matches!(error, Error::Config(_)) { "" } else { "error: " };
            console.line(format!("{prefix}{}", with_causes(&error)));
            ExitCode::from(error.exit_code())
        }
    }
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
    message
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
        console.line(format!("error: internal: {info}\n{backtrace}\n\nhint: the newest checkpoint is intact; please report this"));
        std::process::exit(1);
    }));
}

fn run(args: Args, console: &Console) -> Result<ExitCode> {
    match args.command {
        None => train(args.train, console),
        Some(Command::Eval { checkpoint, json }) => eval(&checkpoint, json.as_deref()),
        Some(Command::Export { checkpoint, what, layout: Layout::Transformers, out }) => {
            let checkpoint = open_any(&checkpoint)?;
            let session = Session::build(&checkpoint.state().plan, Some(&checkpoint))?;
            let written = match what {
                What::Vit => export::vit(&session, &out)?,
                What::Llm => export::llm(&session, &out)?,
            };
            print(format_args!("{}\n", written.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Embed { vit, image, out }) => {
            export::embed(&vit, &image, &out)?;
            print(format_args!("{}\n", out.display()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn train(args: TrainArgs, console: &Console) -> Result<ExitCode> {
    let file = args.config.expect("invariant: clap requires --config");
    let config = config::load(&file, &args.set)?;
    if args.dry_run {
        print(config.to_yaml())?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = RunOptions {
        resume: match args.resume.as_str() {
            "auto" => Resume::Auto,
            "never" => Resume::Never,
            dir => Resume::From(dir.into()),
        },
        stop_at: args.stop_at,
        stop: stop_on_signals()?,
        console: console.clone(),
    };
    if matches!((&options.resume, &config), (Resume::From(_), Config::Curriculum(_))) {
        return Err(Error::usage(
            "`--resume DIR` names the checkpoint of one stage, and this is a curriculum",
            "run the stage's own file, or use `--resume auto`",
        ));
    }
    match curriculum::run(config.plans(), &options)? {
        Some(summary) => {
            print(format_args!("\n{summary}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        None => Ok(ExitCode::from(3)),
    }
}

fn eval(checkpoint: &std::path::Path, json: Option<&std::path::Path>) -> Result<ExitCode> {
    let checkpoint = open_any(checkpoint)?;
    let session = Session::build(&checkpoint.state().plan, Some(&checkpoint))?;
    let Some(evaluator) = &session.evaluator else {
        return Err(Error::usage("the plan of this checkpoint has no `eval`", "train with `eval.sources`"));
    };
    let report = evaluator.run(&session.model, &session.encoder, session.device)?;
    print(&report)?;
    for generation in &report.generations {
        let (sample, truth) = (&generation.sample, &generation.truth);
        print(format_args!("{sample}\n  truth  {truth}\n  model  {}\n", generation.answer))?;
    }
    if let Some(path) = json {
        let text =
            serde_json::to_vec_pretty(&report).map_err(|error| Error::checkpoint(path, error.to_string()))?;
        std::fs::write(path, text).map_err(Error::io(path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A checkpoint by its own folder, or the newest of a run.
fn open_any(path: &std::path::Path) -> Result<Checkpoint> {
    checkpoint::open_or_newest(path)?
        .ok_or_else(|| Error::checkpoint(path, "is neither a complete checkpoint nor a run that holds one"))
}

/// The first SIGINT or SIGTERM asks for a save and a stop; a second one ends the process at once.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let failed = |source| Error::Io { path: "signal handler".into(), source };
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop)).map_err(failed)?;
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(failed)?;
    }
    Ok(stop)
}
