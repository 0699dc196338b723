//! Times models without gradients, for a comparison with transformers: a vision transformer's forward pass, and
//! greedy generation with a cache of keys and values.
//!
//! `cargo run --release -p sail-train --example bench_forward -- vit --image-px 448`
//! `cargo run --release -p sail-train --example bench_forward -- generate --llm weights/smollm2-135m-instruct`
//!
//! `tests/reference/forward.py` does the same work with transformers; `scripts/bench.sh` runs both.

mod measure;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use clap::{Parser, Subcommand};
use sail_model::generate::{GenerateOptions, from_ids};
use sail_model::llm::{Llm, LlmConfig};
use sail_model::params::{Builder, Params, RandomSource, TensorSource};
use sail_model::vision::{Vision, VisionConfig};
use sail_model::weights::{FileSource, write_safetensors};
use sail_train::Error;
use serde::Serialize;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use measure::{Memory, MemoryUse, exit, io, processor_secs, write_json};

const FP32: (Kind, Device) = (Kind::Float, Device::Cpu);

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    work: Work,
    /// How often it is timed, after once that is not
    #[arg(long, default_value_t = 3, global = true)]
    repeats: usize,
    /// Writes the result for machines
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Work {
    /// The features of images by an AIMv2-L with random weights
    Vit {
        /// Side of the images and of the position table
        #[arg(long, default_value_t = 448)]
        image_px: i64,
        /// Images in a batch
        #[arg(long, default_value_t = 1)]
        images: i64,
        /// Writes config, weights, images and features into this folder
        #[arg(long, value_name = "DIR")]
        dump: Option<PathBuf>,
    },
    /// The likeliest continuation of a prompt
    Generate {
        /// Folder of the language model
        #[arg(long, value_name = "DIR")]
        llm: PathBuf,
        /// Token ids of the prompt
        #[arg(long, value_delimiter = ',', default_value = "1,9690,198,2683,359")]
        prompt: Vec<i64>,
        /// Length of the continuation
        #[arg(long, default_value_t = 64)]
        new_tokens: usize,
    },
}

/// Of each repetition.
#[derive(Serialize)]
struct Times {
    seconds: Vec<f64>,
    /// Processor time of all threads.
    processor_seconds: Vec<f64>,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    times: Times,
    /// Patches of a forward pass, or new tokens of a continuation.
    tokens: i64,
    /// The continuation; empty for images.
    ids: Vec<i64>,
    #[serde(flatten)]
    memory: MemoryUse,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit(run(&args))
}

fn run(args: &Args) -> Result<(), Error> {
    let report = match &args.work {
        Work::Vit { image_px, images, dump } => vit(*image_px, *images, dump.as_deref(), args.repeats)?,
        Work::Generate { llm, prompt, new_tokens } => generate(llm, prompt, *new_tokens, args.repeats)?,
    };
    for seconds in &report.times.seconds {
        println!("{seconds:.3} s, {:.1} tokens/s", report.tokens as f64 / seconds);
    }
    println!("peak resident memory {:.0} MB", report.memory.peak_bytes as f64 / 1e6);
    write_json(args.json.as_deref(), &report)
}

/// Builds a model and gives its parameters beside it.
fn built<T>(
    module: &str,
    source: &dyn TensorSource,
    build: impl FnOnce(&Builder) -> sail_model::Result<T>,
) -> Result<(T, Params), Error> {
    let params = Rc::new(RefCell::new(Params::new()));
    let model = build(&Builder::new(params.clone(), module, source, FP32))?;
    Ok((model, params.take()))
}

fn vit(px: i64, images: i64, dump: Option<&Path>, repeats: usize) -> Result<Report, Error> {
    // The published sizes of AIMv2-L/14.
    let config = VisionConfig::from_keys(&json!({
        "model_type": "aimv2_vision_model", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
        "num_attention_heads": 8, "patch_size": 14, "image_size": px,
    }))?;
    let source = RandomSource::new(0, "vision");
    let (model, params) = built("vision", &source, |builder| Vision::new(&config, builder))?;
    tch::manual_seed(0);
    let pixels_nchw = Tensor::randn([images, 3, px, px], FP32);
    let forward = || tch::no_grad(|| model.last_hidden_state(&pixels_nchw));
    if let Some(dir) = dump {
        fs::create_dir_all(dir).map_err(io(dir))?;
        let local = |name: &str| name.trim_start_matches("vision.").to_owned();
        let params = params.iter().map(|(name, tensor)| (local(name), tensor.shallow_clone())).collect();
        write_safetensors(&dir.join("weights.safetensors"), &params)?;
        let seen = [("pixels".to_owned(), pixels_nchw.shallow_clone()), ("features".to_owned(), forward()?)];
        write_safetensors(&dir.join("features.safetensors"), &BTreeMap::from(seen))?;
        write_json(Some(&dir.join("config.json")), &config)?;
    }
    drop(params);
    let (h, w) = config.grid(px, px)?;
    let (times, memory) = timed(repeats, || forward().map(drop))?;
    Ok(Report { times, tokens: images * h * w, ids: Vec::new(), memory })
}

fn generate(folder: &Path, prompt: &[i64], new_tokens: usize, repeats: usize) -> Result<Report, Error> {
    let config = LlmConfig::read(folder)?;
    let source = FileSource::open(folder)?.with(config.naming());
    let (llm, _) = built("llm", &source, |builder| Llm::new(&config, builder))?;
    // Nothing ends it early.
    let options = GenerateOptions::greedy(new_tokens, &[]);
    let mut ids = Vec::new();
    let (times, memory) = timed(repeats, || {
        ids = from_ids(&llm, &[prompt], &options, &mut |_, _| true)?.concat();
        Ok(())
    })?;
    Ok(Report { times, tokens: new_tokens as i64, ids, memory })
}

/// Times so many calls, after one that warms up.
fn timed(
    repeats: usize,
    mut work: impl FnMut() -> sail_model::Result<()>,
) -> Result<(Times, MemoryUse), Error> {
    let memory = Memory::begin()?;
    work()?;
    let mut times = Times { seconds: Vec::new(), processor_seconds: Vec::new() };
    for _ in 0..repeats {
        let (begun, processor) = (Instant::now(), processor_secs()?);
        work()?;
        times.seconds.push(begun.elapsed().as_secs_f64());
        times.processor_seconds.push(processor_secs()? - processor);
    }
    Ok((times, memory.end()?))
}
