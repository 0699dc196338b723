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

use clap::{Parser, Subcommand, ValueEnum};
use sail_model::generate::{GenerateOptions, from_ids};
use sail_model::llm::{Llm, LlmConfig};
use sail_model::params::{Builder, Params, RandomSource, TensorSource};
use sail_model::vision::{Vision, VisionConfig};
use sail_model::weights::{FileSource, write_safetensors};
use sail_train::Error;
use sail_train::config::Precision;
use serde::Serialize;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use measure::{Memory, MemoryUse, exit, io, peak_flops, processor_secs, write_json};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    work: Work,
    /// How often it is timed, after once that is not
    #[arg(long, default_value_t = 3, global = true)]
    repeats: usize,
    /// `cpu` computes in fp32, `cuda` in bf16
    #[arg(long, value_enum, default_value_t, global = true)]
    device: On,
    /// Writes the result for machines
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum On {
    #[default]
    Cpu,
    Cuda,
}

impl On {
    fn kind_and_device(self) -> (Kind, Device) {
        let device = match self {
            Self::Cpu => Device::Cpu,
            Self::Cuda => Device::Cuda(0),
        };
        (Precision::Auto.on(device).kind(), device)
    }
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Size {
    #[default]
    Large,
    Huge,
}

#[derive(Subcommand)]
enum Work {
    /// The features of images by an AIMv2 with random weights
    Vit {
        /// AIMv2-L/14 or AIMv2-H/14
        #[arg(long, value_enum, default_value_t)]
        size: Size,
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
    /// Operations of a forward pass; of a continuation they are not counted.
    flops: Option<u64>,
    /// What the device computes at most, FLOP/s; None where that is not known.
    peak_flops: Option<f64>,
    #[serde(flatten)]
    memory: MemoryUse,
}

fn main() -> ExitCode {
    let args = Args::parse();
    exit(run(&args))
}

fn run(args: &Args) -> Result<(), Error> {
    let (on, repeats) = (args.device.kind_and_device(), args.repeats);
    sail_torch::set_device(on.1)?;
    let report = match &args.work {
        Work::Vit { size, image_px, images, dump } => {
            vit(*size, (*image_px, *images), dump.as_deref(), on, repeats)?
        }
        Work::Generate { llm, prompt, new_tokens } => generate(llm, prompt, *new_tokens, on, repeats)?,
    };
    for seconds in &report.times.seconds {
        println!("{seconds:.3} s, {:.1} tokens/s", report.tokens as f64 / seconds);
    }
    println!("peak memory {:.0} MB", report.memory.peak_bytes as f64 / 1e6);
    write_json(args.json.as_deref(), &report)
}

/// Builds a model and gives its parameters beside it.
fn built<T>(
    module: &str,
    source: &dyn TensorSource,
    on: (Kind, Device),
    build: impl FnOnce(&Builder) -> sail_model::Result<T>,
) -> Result<(T, Params), Error> {
    let params = Rc::new(RefCell::new(Params::new()));
    let model = build(&Builder::new(params.clone(), module, source, on))?;
    Ok((model, params.take()))
}

fn vit(
    size: Size,
    (px, images): (i64, i64),
    dump: Option<&Path>,
    on: (Kind, Device),
    repeats: usize,
) -> Result<Report, Error> {
    const BLOCKS: u64 = 24;
    const PATCH: i64 = 14;
    // The published sizes.
    let (d, intermediate, heads) = match size {
        Size::Large => (1024, 2816, 8),
        Size::Huge => (1536, 4096, 12),
    };
    let config = VisionConfig::from_keys(&json!({
        "model_type": "aimv2_vision_model", "hidden_size": d, "intermediate_size": intermediate,
        "num_hidden_layers": BLOCKS, "num_attention_heads": heads, "patch_size": PATCH, "image_size": px,
    }))?;
    let source = RandomSource::new(0, "vision");
    let (model, params) = built("vision", &source, on, |builder| Vision::new(&config, builder))?;
    tch::manual_seed(0);
    let pixels_nchw = Tensor::randn([images, 3, px, px], (Kind::Float, Device::Cpu)).to_device(on.1);
    let forward = || tch::no_grad(|| model.last_hidden_state(&pixels_nchw));
    if let Some(dir) = dump {
        fs::create_dir_all(dir).map_err(io(dir))?;
        let local = |name: &str| name.trim_start_matches("vision.").to_owned();
        let params = params.iter().map(|(name, tensor)| (local(name), tensor.shallow_clone())).collect();
        write_safetensors(&dir.join("weights.safetensors"), &params)?;
        let seen = [("pixels", pixels_nchw.shallow_clone()), ("features", forward()?)];
        let seen = seen.map(|(name, x)| (name.to_owned(), x.to_kind(Kind::Float).to_device(Device::Cpu)));
        write_safetensors(&dir.join("features.safetensors"), &BTreeMap::from(seen))?;
        write_json(Some(&dir.join("config.json")), &config)?;
    }
    drop(params);
    let (h, w) = config.grid(px, px)?;
    let (times, memory) = timed(repeats, on.1, || forward().map(drop))?;
    // Linear maps of a block, scores and their sums of values, and patches.
    let (rows, d) = ((h * w) as u64, d as u64);
    let block = 2 * rows * d * (4 * d + 3 * intermediate as u64) + 4 * rows * rows * d;
    let patches = 2 * rows * d * (3 * PATCH * PATCH) as u64;
    let flops = Some(images as u64 * (BLOCKS * block + patches));
    let peak_flops = peak_flops(on.1, Precision::Auto.on(on.1))?;
    Ok(Report { times, tokens: images * h * w, ids: Vec::new(), flops, peak_flops, memory })
}

fn generate(
    folder: &Path,
    prompt: &[i64],
    new_tokens: usize,
    on: (Kind, Device),
    repeats: usize,
) -> Result<Report, Error> {
    let config = LlmConfig::read(folder)?;
    let source = FileSource::open(folder)?.with(config.naming());
    let (llm, _) = built("llm", &source, on, |builder| Llm::new(&config, builder))?;
    // Nothing ends it early.
    let options = GenerateOptions::greedy(new_tokens, &[]);
    let mut ids = Vec::new();
    let (times, memory) = timed(repeats, on.1, || {
        ids = from_ids(&llm, &[prompt], &options, &mut |_, _| true)?.concat();
        Ok(())
    })?;
    let peak_flops = peak_flops(on.1, Precision::Auto.on(on.1))?;
    Ok(Report { times, tokens: new_tokens as i64, ids, flops: None, peak_flops, memory })
}

/// Times so many calls, after one that warms up.
fn timed(
    repeats: usize,
    device: Device,
    mut work: impl FnMut() -> sail_model::Result<()>,
) -> Result<(Times, MemoryUse), Error> {
    let settled = || {
        if let Device::Cuda(index) = device {
            tch::Cuda::synchronize(index as i64);
        }
    };
    let memory = Memory::begin(device)?;
    work()?;
    settled();
    let mut times = Times { seconds: Vec::new(), processor_seconds: Vec::new() };
    for _ in 0..repeats {
        let (begun, processor) = (Instant::now(), processor_secs()?);
        work()?;
        settled();
        times.seconds.push(begun.elapsed().as_secs_f64());
        times.processor_seconds.push(processor_secs()? - processor);
    }
    Ok((times, memory.end()?))
}
