//! The commands that use what was trained: `eval`, `replay`, `report`, `export`, `embed`, `generate`, `score`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Subcommand, ValueEnum};
use sail_data::printable;
use sail_model::generate::GenerateOptions;
use sail_model::vision::VitLayout;
use tch::Kind;

use super::print;
use crate::config::{DeviceChoice, Listen, Precision, load_tasks};
use crate::embed::{Input, embed};
use crate::error::{Error, Result};
use crate::events::Console;
use crate::export::{self, MllmLayout};
use crate::generate::{Question, answer};
use crate::output;
use crate::replay::replay;
use crate::report::report;
use crate::report::serve::Serving;
use crate::score::score;
use crate::session::Session;
use crate::tasks::{self, Subject};
use crate::trained::{Trained, open_any};
use crate::world::World;

const EVAL_HELP: &str = "\
Examples:
  sail-train eval --checkpoint runs/demo/stage3
  sail-train eval --tasks tasks.yaml --checkpoint runs/demo/stage3 --out measured
  sail-train eval --tasks tasks.yaml --vit runs/demo/stage3/export/vit --out measured
  sail-train eval --tasks tasks.yaml --checkpoint runs/demo/stage3 --out measured --follow";
const GENERATE_HELP: &str = "\
Examples:
  sail-train generate --checkpoint runs/demo/stage3 --image photo.jpg --prompt \"Describe the image.\"
  sail-train generate --checkpoint exported --image a.png b.png --prompt \"What differs?\" --temperature 0.7";
const EXPORT_HELP: &str = "\
Examples:
  sail-train export --checkpoint runs/demo/stage3 --out vit
  sail-train export --checkpoint runs/demo/stage3 --what mllm --layout sail --dtype bf16 --out mllm";
const EMBED_HELP: &str = "\
Example:
  sail-train embed --vit runs/demo/stage3/export/vit --image photo.jpg --out features.safetensors";
const REPORT_HELP: &str = "\
Examples:
  sail-train report runs/demo
  sail-train report runs/first runs/second --out compared.html
  sail-train report runs/demo --serve

`--serve` answers until Ctrl-C; an open page follows the run. Beyond this machine, as with `--serve=0.0.0.0:8265`, it asks for
the token in the address that it prints; it is plain HTTP, so better tunnel it: `ssh -L 8265:localhost:8265 HOST`.";
const SCORE_HELP: &str = "\
Example:
  sail-train score --model runs/demo/stage3 --data 'data/demo/vqa-heldout-*.tar' --out scores.jsonl";

/// A command that uses a trained model.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Measures a checkpoint on the held-out data of its plan, or a checkpoint or an encoder by a file of tasks
    #[command(after_help = EVAL_HELP)]
    Eval {
        /// A run or one of its `step-…` folders; with `--tasks` also an exported whole model
        #[arg(long, value_name = "DIR", required_unless_present = "vit")]
        checkpoint: Option<PathBuf>,
        /// Writes the report here as JSON
        #[arg(long, value_name = "FILE", conflicts_with = "tasks")]
        json: Option<PathBuf>,
        /// What is measured instead of the plan's held-out data, see docs/evaluate-tasks.md
        #[arg(long, value_name = "FILE.yaml", requires = "out")]
        tasks: Option<PathBuf>,
        /// Instead of a checkpoint: a vision encoder's folder, exported or as published
        #[arg(long, value_name = "DIR", requires = "tasks", conflicts_with = "checkpoint")]
        vit: Option<PathBuf>,
        /// The folder for results; the same command goes on with what is not measured yet, other tasks need another
        #[arg(long, value_name = "DIR", requires = "tasks")]
        out: Option<PathBuf>,
        /// Measures every checkpoint of the run as it is written, each into a folder of `--out`, until the run has ended
        #[arg(long, requires_all = ["tasks", "checkpoint"])]
        follow: bool,
    },
    /// Makes a step of a run again, pack by pack, from the newest checkpoint before it
    #[command(after_help = "Example:\n  sail-train replay --run runs/demo/stage2 --step 120")]
    Replay {
        /// The run's folder
        #[arg(long, value_name = "DIR")]
        run: PathBuf,
        /// The step, as `trips.jsonl` and messages number it
        #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u64).range(1..))]
        step: u64,
        /// The checkpoint to begin from
        #[arg(long, value_name = "DIR")]
        checkpoint: Option<PathBuf>,
    },
    /// Writes a page about runs, one HTML file: stages, curves, held-out losses, answers, configuration
    #[command(after_help = REPORT_HELP)]
    Report {
        /// A run, or a folder of runs such as the stages of a curriculum; several are compared
        #[arg(value_name = "RUN_DIR", required = true)]
        runs: Vec<PathBuf>,
        /// The file to write [default: report.html in the first folder]
        #[arg(long, value_name = "FILE", conflicts_with = "serve")]
        out: Option<PathBuf>,
        /// Serves the page instead of writing it: PORT of 127.0.0.1, or HOST:PORT [default: 8265]
        #[arg(long, value_name = "ADDRESS", num_args = 0..=1, require_equals = true, default_missing_value = "8265")]
        serve: Option<Listen>,
    },
    /// Writes a checkpoint's vision encoder, language model or the whole as a folder that others load
    #[command(after_help = EXPORT_HELP)]
    Export {
        /// A run or one of its `step-…` folders; for the whole model also an exported one
        #[arg(long, value_name = "DIR")]
        checkpoint: PathBuf,
        /// What is exported
        #[arg(long, default_value = "vit")]
        what: What,
        /// Names and files
        #[arg(long, default_value = "transformers")]
        layout: Layout,
        /// Type of the weights
        #[arg(long, default_value = "fp32")]
        dtype: Dtype,
        /// The folder to write
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Writes a vision encoder's features of images, and the pixels it saw
    #[command(after_help = EMBED_HELP)]
    Embed {
        /// The encoder's folder, exported or as published
        #[arg(long, value_name = "DIR")]
        vit: PathBuf,
        /// Images, prepared as the folder's `preprocessor_config.json` says
        #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "pixels")]
        image: Vec<PathBuf>,
        /// Instead of images: `pixel_values` `[n, 3, height, width]`, ready for the encoder
        #[arg(long, value_name = "FILE.safetensors", conflicts_with = "image")]
        pixels: Option<PathBuf>,
        /// Receives `pixel_values` and `last_hidden_state` `[n, tokens, width]`
        #[arg(long, value_name = "FILE.safetensors")]
        out: PathBuf,
    },
    /// Answers a question, with or without images
    #[command(after_help = GENERATE_HELP)]
    Generate {
        /// A run, one of its `step-…` folders, or an exported whole model
        #[arg(long, value_name = "DIR")]
        checkpoint: PathBuf,
        /// Images, in the order of the `<image>` marks; without marks they stand before the question
        #[arg(long, value_name = "FILE", num_args = 1..)]
        image: Vec<PathBuf>,
        /// The question
        #[arg(long, value_name = "TEXT")]
        prompt: String,
        /// Longest answer, tokens
        #[arg(long, default_value_t = 256, value_name = "N")]
        max_new_tokens: usize,
        /// Samples with this temperature, above 0; without it the likeliest token is taken
        #[arg(long, value_name = "T", allow_negative_numbers = true)]
        temperature: Option<f64>,
        /// Samples from the likeliest tokens that together have this probability
        #[arg(long, value_name = "P", requires = "temperature", allow_negative_numbers = true)]
        top_p: Option<f64>,
        /// Seed of the samples
        #[arg(long, default_value_t = 0, value_name = "N")]
        seed: u64,
        /// Ends the answer before this text; may be given several times
        #[arg(long, value_name = "TEXT")]
        stop: Vec<String>,
        /// Prints token ids and text as JSON once the answer is complete
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        machine: Machine,
    },
    /// Writes how likely a model finds the answers of a data set, a line of JSON per sample
    #[command(after_help = SCORE_HELP)]
    Score {
        /// A run, one of its `step-…` folders, or an exported whole model
        #[arg(long, value_name = "DIR")]
        model: PathBuf,
        /// Tar shards, with braces and globs
        #[arg(long, value_name = "SHARDS", required = true, num_args = 1..)]
        data: Vec<String>,
        /// Receives `{shard, key, tokens, logprobs, sum}` of each sample
        #[arg(long, value_name = "FILE.jsonl")]
        out: PathBuf,
        #[command(flatten)]
        machine: Machine,
    },
}

/// Where a model is run.
#[derive(Debug, clap::Args)]
pub(super) struct Machine {
    /// `auto` (the first CUDA device, or the CPU), `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// What the model computes in
    #[arg(long, default_value = "auto")]
    precision: PrecisionArg,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum PrecisionArg {
    /// bf16 on CUDA, fp32 on the CPU
    Auto,
    Fp32,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum What {
    /// The vision encoder
    Vit,
    /// The language model, with its tokenizer
    Llm,
    /// The whole model, with everything to use it
    Mllm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Layout {
    /// As transformers' own classes read it; the whole model only with an `InternViT`
    Transformers,
    /// As SAIL's code does, which goes with it: AIMv2 alone, or the whole model with any encoder
    Sail,
    /// As the encoder's own published code does: `AIMv2` or `InternViT` alone
    Original,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Dtype {
    Fp32,
    Bf16,
}

/// Runs a command.
pub(super) fn run(command: Command, console: &Console) -> Result<ExitCode> {
    match command {
        Command::Eval { checkpoint: Some(run), tasks: Some(tasks), out: Some(out), follow: true, .. } => {
            tasks::follow(&load_tasks(&tasks)?, &run, &out, |step, results| {
                print(format_args!("step {step}: {}\n", results.join("results.md").display()))
            })?;
        }
        Command::Eval { checkpoint, json, tasks, vit, out, .. } => {
            let subject = match (&checkpoint, &vit) {
                (Some(checkpoint), _) => Subject::Checkpoint(checkpoint),
                (None, vit) => Subject::Vit(vit.as_deref().expect("invariant: clap requires one of them")),
            };
            match (tasks, out, subject) {
                (Some(tasks), Some(out), subject) => measure(&tasks, subject, &out)?,
                (None, _, Subject::Checkpoint(checkpoint)) => eval(checkpoint, json.as_deref())?,
                _ => unreachable!("invariant: clap requires `--tasks` with `--vit`, and `--out` with it"),
            }
        }
        Command::Replay { run, step, checkpoint } => {
            print(replay(&run, step, checkpoint.as_deref(), console)?)?;
        }
        Command::Report { runs, serve: Some(address), .. } => {
            let serving = Serving::begin(&runs, address)?;
            print(format_args!("{}\n", serving.url()))?;
            // It answers as long as it is there.
            loop {
                std::thread::park();
            }
        }
        Command::Report { runs, out, serve: None } => {
            print(format_args!("{}\n", report(&runs, out.as_deref())?.display()))?;
        }
        Command::Export { checkpoint, what, layout, dtype, out } => {
            let kind = match dtype {
                Dtype::Fp32 => Kind::Float,
                Dtype::Bf16 => Kind::BFloat16,
            };
            let written = export(&checkpoint, (what, layout), kind, &out)?;
            print(format_args!("{}\n", written.display()))?;
        }
        Command::Embed { vit, image, pixels, out } => {
            let input = pixels.as_deref().map_or(Input::Images(&image), Input::Pixels);
            embed(&vit, &input, &out)?;
            print(format_args!("{}\n", out.display()))?;
        }
        Command::Generate {
            checkpoint,
            image,
            prompt,
            max_new_tokens,
            temperature,
            top_p,
            seed,
            stop,
            json,
            machine,
        } => {
            let options = GenerateOptions { max_new_tokens, temperature, top_p, seed, stop_ids: Vec::new() };
            options.validate()?;
            let question = Question { images: &image, prompt: &prompt, options, stop: &stop };
            generate(&machine.open(&checkpoint)?, &question, json)?;
        }
        Command::Score { model, data, out, machine } => {
            let scored = score(&machine.open(&model)?, &data, &out)?;
            print(format_args!("{scored} samples: {}\n", out.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Machine {
    fn open(&self, model: &Path) -> Result<Trained> {
        let precision = match self.precision {
            PrecisionArg::Auto => Precision::Auto,
            PrecisionArg::Fp32 => Precision::Fp32,
            PrecisionArg::Bf16 => Precision::Bf16,
        };
        Trained::open(model, self.device, precision)
    }
}

fn export(checkpoint: &Path, (what, layout): (What, Layout), kind: Kind, out: &Path) -> Result<PathBuf> {
    let trained = || Trained::open(checkpoint, DeviceChoice::Cpu, Precision::Fp32);
    match (what, layout) {
        (What::Vit, layout) => {
            let layout = match layout {
                Layout::Transformers => VitLayout::Transformers,
                Layout::Sail => VitLayout::Sail,
                Layout::Original => VitLayout::Original,
            };
            export::vit_of(&open_any(checkpoint)?, layout, kind, out)
        }
        (What::Llm, Layout::Transformers) => export::llm(trained()?, kind, out),
        (What::Llm, Layout::Sail | Layout::Original) => Err(Error::usage(
            "a language model alone has transformers' layout only",
            "leave `--layout` out, or export the whole model with `--what mllm --layout sail`",
        )),
        (What::Mllm, Layout::Original) => Err(Error::usage(
            "the whole model has no `original` layout",
            "choose `--layout sail` or `--layout transformers`",
        )),
        (What::Mllm, Layout::Transformers) => export::mllm(trained()?, MllmLayout::InternVl, kind, out),
        (What::Mllm, Layout::Sail) => export::mllm(trained()?, MllmLayout::Sail, kind, out),
    }
}

fn generate(trained: &Trained, question: &Question, json: bool) -> Result<()> {
    if json {
        let answer = answer(trained, question, &mut |_| ())?;
        let line = serde_json::to_string(&answer).expect("invariant: an answer has only numbers and text");
        return print(format_args!("{line}\n"));
    }
    let mut printed = Ok(());
    answer(trained, question, &mut |piece| {
        if printed.is_ok() {
            printed = print(piece);
        }
    })?;
    printed?;
    print("\n")
}

/// Prints the tables; they are in the folder `out` as well.
fn measure(tasks: &Path, subject: Subject, out: &Path) -> Result<()> {
    let results = tasks::run(&load_tasks(tasks)?, subject, out)?;
    print(format_args!("{results}{}\n", out.join("results.md").display()))
}

fn eval(checkpoint: &Path, json: Option<&Path>) -> Result<()> {
    if let Some(path) = json {
        output::check(path, &[])?;
    }
    let checkpoint = open_any(checkpoint)?;
    let world = Arc::new(World::alone());
    let mut session = Session::build(&checkpoint.state().plan, &world, Some(&checkpoint))?;
    let Some(report) = session.evaluate()? else {
        return Err(Error::usage("the plan of this checkpoint has no `eval`", "train with `eval.sources`"));
    };
    print(&report)?;
    for generation in &report.generations {
        let (truth, answer) = (printable(&generation.truth), printable(&generation.answer));
        print(format_args!("{}\n  truth  {truth}\n  model  {answer}\n", generation.sample))?;
    }
    if let Some(path) = json {
        let text =
            serde_json::to_vec_pretty(&report).map_err(|error| Error::checkpoint(path, error.to_string()))?;
        output::replace(path, |partial| std::fs::write(partial, text).map_err(Error::io(partial)))?;
    }
    Ok(())
}
