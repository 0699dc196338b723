//! Times the steps of a stage, for a comparison with another trainer on the same work.
//!
//! `cargo run --release -p sail-train --example bench_train -- --config configs/demo/stage1.yaml --steps 10`
//!
//! The stage is built and its steps are made as the train loop does it, without evaluation, checkpoints and
//! reports. All data lies in memory before the first step, so that reading it is not part of the time. What
//! `--dump` writes is what `tests/reference/train.py` needs to do the same work; `scripts/bench.sh` runs both.

mod measure;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use sail_data::{IGNORE, Images, Pack, Sample, SampleId};
use sail_model::params::Params;
use sail_model::weights::write_safetensors;
use sail_train::Error;
use sail_train::batch::{to_batch, to_images};
use sail_train::config::{Module, Plan};
use sail_train::estimate::PackFlops;
use sail_train::schedule::Factors;
use sail_train::session::Session;
use sail_train::step::Step;
use sail_train::world::World;
use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use measure::{Memory, MemoryUse, StageArgs, exit, io, peak_flops, processor_secs, usage, write_json};

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    stage: StageArgs,
    /// Steps that are timed
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Steps before them
    #[arg(long, default_value_t = 2)]
    warmup: usize,
    /// Trains on drawn sequences of one length with an image each, which leave no room in a padded batch
    #[arg(long)]
    fixed: bool,
    /// Tokens of each of these sequences; must divide `batch.tokens_per_pack`
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    sequence: usize,
    /// Writes weights, shapes, rates and the data of all steps into this folder
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    /// Makes no step, for a dump alone
    #[arg(long, requires = "dump")]
    dump_only: bool,
    /// Writes the result for machines
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What the steps were, one entry each, those of the warm-up first.
#[derive(Default, Serialize)]
struct Report {
    /// Steps that are not to be counted.
    warmup: usize,
    /// Mean loss of the tokens with a target.
    losses: Vec<f64>,
    /// Global 2-norm of the gradients before clipping.
    grad_norms: Vec<f64>,
    /// Gradients and update, data in memory.
    seconds: Vec<f64>,
    /// Of the same, the update with norm and clipping.
    update_seconds: Vec<f64>,
    /// Processor time of all threads.
    processor_seconds: Vec<f64>,
    tokens: Vec<u64>,
    samples: Vec<u64>,
    /// Operations of the forward and backward passes, as model FLOPs utilisation counts them.
    flops: Vec<u64>,
    /// What the device computes at most, FLOP/s; None where that is not known.
    peak_flops: Option<f64>,
    #[serde(flatten)]
    memory: Option<MemoryUse>,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Error> {
    let plan = plain_stage(args)?;
    let mut session = Session::build(&plan, &Arc::new(World::alone()), None)?;
    let steps = steps(args, &mut session)?;
    if let Some(dir) = &args.dump {
        dump(dir, &session, &steps)?;
    }
    if args.dump_only {
        return Ok(());
    }
    let peak_flops = peak_flops(session.device, session.plan.run.precision.on(session.device))?;
    let flops = PackFlops::new(session.model.config(), &session.plan.train);
    let flops = steps.iter().map(|step| flops.of(&step.packs).values().sum()).collect();
    let mut report = Report { warmup: args.warmup, flops, peak_flops, ..Report::default() };
    let memory = Memory::begin(session.device)?;
    for step in &steps {
        make(step, &mut session, &mut report)?;
    }
    report.memory = Some(memory.end()?);
    summarise(&report);
    write_json(args.json.as_deref(), &report)
}

/// The plan of a stage that does nothing but steps.
fn plain_stage(args: &Args) -> Result<Plan, Error> {
    let plan = args.stage.plan()?;
    if !plan.train.unfreeze.is_empty() || plan.schedule.ada_lrs.is_some() || plan.optimizer.ema.is_some() {
        return Err(usage(
            format!(
                "`{}` has unlock points, a search for a learning rate or moving averages",
                args.stage.config.display()
            ),
            "leave them out with `--set PATH=null`: here are plain steps alone",
        ));
    }
    Ok(plan)
}

/// The data of all steps.
fn steps(args: &Args, session: &mut Session) -> Result<Vec<Step>, Error> {
    let count = args.warmup + args.steps;
    if args.fixed {
        tch::manual_seed(session.plan.run.seed as i64);
        return (0..count).map(|_| fixed(session, args.sequence)).collect();
    }
    let mut steps = Vec::with_capacity(count);
    while steps.len() < count {
        steps.push(session.next_step()?.ok_or_else(|| {
            usage(
                format!("the data ends after {} of {count} steps", steps.len()),
                "make fewer steps, or leave out `data.epochs` and `data.samples`",
            )
        })?);
    }
    Ok(steps)
}

/// A step of drawn sequences of `length` tokens: an image behind the first token, and the second half has targets.
fn fixed(session: &Session, length: usize) -> Result<Step, Error> {
    let Plan { batch, model, .. } = &session.plan;
    let (config, px) = (session.model.config(), model.vision.image_px);
    let visual = config.visual_tokens(px as i64, px as i64)? as usize;
    if visual + 1 > length / 2 || !batch.tokens_per_pack.is_multiple_of(length) {
        return Err(usage(
            format!("sequences of {length} tokens do not fit packs of {}", batch.tokens_per_pack),
            format!(
                "choose a divisor of `batch.tokens_per_pack`, at least {} for {visual} visual tokens",
                2 * visual + 2
            ),
        ));
    }
    let vocab = config.llm.vocab_size();
    let sample = |number: usize| -> Result<Sample, Error> {
        let ids: Vec<i64> =
            Vec::try_from(Tensor::randint(vocab, [length as i64], (Kind::Int64, Device::Cpu)))?;
        let learns = |t: usize| t >= length / 2 && t + 1 < length;
        let pixels = Tensor::randn([3 * (px * px) as i64], (Kind::Float, Device::Cpu));
        Ok(Sample {
            id: SampleId { source: "fixed".into(), shard: "memory".into(), key: number.to_string() },
            targets: (0..length).map(|t| if learns(t) { ids[t + 1] } else { IGNORE }).collect(),
            weights: (0..length).map(|t| f32::from(learns(t))).collect(),
            ids,
            images: Images { sizes: vec![(px, px)], pixels: Vec::try_from(pixels)? },
            image_rows: (1..=visual as i64).collect(),
            turns: Vec::new(),
        })
    };
    let pack = || -> Result<Pack, Error> {
        let samples = (0..batch.tokens_per_pack / length).map(sample).collect::<Result<Vec<_>, _>>()?;
        Ok(Pack::collate(&samples))
    };
    Ok(Step::alone((0..batch.packs_per_step).map(|_| pack()).collect::<Result<_, _>>()?))
}

/// Makes a step as the train loop does.
fn make(step: &Step, session: &mut Session, report: &mut Report) -> Result<(), Error> {
    let (begun, processor) = (Instant::now(), processor_secs()?);
    let loss = session.accumulate(step)?;
    let accumulated = Instant::now();
    let verdict = session.agree(&loss, false, true)?;
    if let Some(trip) = session.judge(&verdict) {
        let number = session.step + 1;
        return Err(usage(
            format!(
                "step {number}: loss {}, gradient norm {}: {}",
                verdict.loss, verdict.grad_norm, trip.reason
            ),
            "lower `train.*.lr`",
        ));
    }
    let factors = session.factors(step);
    session.update(step, &factors)?;
    session.advance(step)?;
    let (whole, update) = (begun.elapsed(), accumulated.elapsed());
    report.losses.push(verdict.loss);
    report.grad_norms.push(verdict.grad_norm);
    report.seconds.push(whole.as_secs_f64());
    report.update_seconds.push(update.as_secs_f64());
    report.processor_seconds.push(processor_secs()? - processor);
    report.tokens.push(step.all.size.tokens);
    report.samples.push(step.all.size.samples);
    let (number, secs) = (session.step, whole.as_secs_f64());
    println!("step {number}: loss {:.6}, gradient norm {:.4}, {secs:.3} s", verdict.loss, verdict.grad_norm);
    Ok(())
}

fn summarise(report: &Report) {
    let timed: f64 = report.seconds.iter().skip(report.warmup).sum();
    let tokens: u64 = report.tokens.iter().skip(report.warmup).sum();
    let peak = report.memory.map_or(0.0, |memory| memory.peak_bytes as f64 / 1e6);
    print!("{:.1} tokens/s, peak memory {peak:.0} MB", tokens as f64 / timed);
    match report.peak_flops {
        Some(peak) => {
            let flops: u64 = report.flops.iter().skip(report.warmup).sum();
            println!(", {:.1} % of the device's peak", 100.0 * flops as f64 / (timed * peak));
        }
        None => println!(),
    }
}

/// Writes what another trainer needs: `weights.safetensors` by full name in fp32, `shapes.json`, `train.json`, and
/// `step-NNNN.safetensors` with the packs of each step as `PACK.FIELD`.
fn dump(dir: &Path, session: &Session, steps: &[Step]) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(io(dir))?;
    let mut weights = Params::new();
    for module in Module::ALL {
        weights.append(&mut session.final_params(module)?);
    }
    write_safetensors(&dir.join("weights.safetensors"), &weights)?;
    write_json(Some(&dir.join("shapes.json")), session.model.config())?;
    write_json(Some(&dir.join("train.json")), &rates(session, steps))?;
    for (number, step) in steps.iter().enumerate() {
        let mut tensors = BTreeMap::new();
        for (index, pack) in step.packs.iter().enumerate() {
            tensors.extend(
                fields(pack)?.into_iter().map(|(field, tensor)| (format!("{index}.{field}"), tensor)),
            );
        }
        write_safetensors(&dir.join(format!("step-{number:04}.safetensors")), &tensors)?;
    }
    Ok(())
}

/// A pack's fields: as [`sail_model::vlm::Batch`] has them, `images` `[n, 3, height, width]`, left out without any.
fn fields(pack: &Pack) -> Result<Vec<(&'static str, Tensor)>, Error> {
    let batch = to_batch(pack, Device::Cpu)?;
    let per_sequence: Vec<i64> = batch.images_per_sequence.iter().map(|images| *images as i64).collect();
    let mut fields = vec![
        ("ids", batch.ids_t),
        ("positions", batch.positions_t),
        ("cu_seqlens", Tensor::from_slice(&batch.cu_seqlens)),
        ("images_per_sequence", Tensor::from_slice(&per_sequence)),
        ("targets", Tensor::from_slice(&batch.targets)),
        ("weights", Tensor::from_slice(&batch.weights)),
    ];
    match &to_images([&pack.images], Device::Cpu)?[..] {
        [] => {}
        [images] => {
            fields.push(("images", images.shallow_clone()));
            fields.push(("image_rows", Tensor::from_slice(&batch.image_rows)));
        }
        _ => {
            return Err(usage(
                "a pack has images of several sizes".into(),
                "the other side takes one size: leave out `data.any_resolution`",
            ));
        }
    }
    Ok(fields)
}

/// What is trained at which rates, and what each step multiplies them with.
fn rates(session: &Session, steps: &[Step]) -> Value {
    let Plan { optimizer, schedule, train, .. } = &session.plan;
    let parameters: BTreeMap<&str, Value> = (session.freeze.first().iter())
        .map(|(name, rates)| {
            let (lr, weight_decay, betas) = (rates.lr, rates.weight_decay, rates.betas);
            (name.as_str(), json!({ "lr": lr, "weight_decay": weight_decay, "betas": betas }))
        })
        .collect();
    let mut progress = session.progress();
    let mut factors = Vec::with_capacity(steps.len());
    for step in steps {
        let tokens = step.all.size.tokens;
        factors.push(Factors::new(schedule, train, &BTreeMap::new(), progress, tokens).all);
        progress.steps += 1;
        progress.tokens += tokens;
    }
    json!({
        "parameters": parameters, "eps": optimizer.eps, "clip_norm": optimizer.clip_norm, "factors": factors,
    })
}
