//! Times the data of a stage alone: shards to the packs of each step, without any training.
//!
//! `cargo run --release -p sail-train --example bench_data -- --config configs/demo/stage1.yaml --set data.epochs=1`
//!
//! The stage is built and its packs are taken as the train loop does it, as fast as they come.
//! `tests/reference/data.py` does the same work with webdataset and a `DataLoader`; `scripts/bench.sh` runs both.

mod measure;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use sail_data::Tally;
use sail_train::Error;
use sail_train::session::Session;
use sail_train::world::World;
use serde::Serialize;

use measure::{StageArgs, exit, processor_secs, write_json};

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    stage: StageArgs,
    /// Ends once so many samples were taken, and not only with the data
    #[arg(long)]
    samples: Option<u64>,
    /// Writes the result for machines
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was taken, one entry for each step.
#[derive(Default, Serialize)]
struct Report {
    /// From asking for the packs until they are there.
    seconds: Vec<f64>,
    /// Processor time of all threads; in hundredths of a second.
    processor_seconds: Vec<f64>,
    samples: Vec<u64>,
    tokens: Vec<u64>,
    /// Samples that were skipped, of all steps.
    skipped: u64,
    /// What was read, as `sail-data --spec` takes it: YAML.
    spec: String,
}

fn main() -> ExitCode {
    exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Error> {
    let plan = args.stage.plan()?;
    let mut session = Session::build(&plan, &Arc::new(World::alone()), None)?;
    let mut report = Report { spec: session.data_spec(), ..Report::default() };
    let mut taken = 0;
    while args.samples.is_none_or(|samples| taken < samples) {
        let (begun, processor) = (Instant::now(), processor_secs()?);
        let Some(step) = session.next_step()? else { break };
        report.seconds.push(begun.elapsed().as_secs_f64());
        report.processor_seconds.push(processor_secs()? - processor);
        report.samples.push(step.all.size.samples);
        report.tokens.push(step.all.size.tokens);
        report.skipped = step.all.coverage.values().map(Tally::total_skipped).sum();
        taken += step.all.size.samples;
    }
    let seconds: f64 = report.seconds.iter().sum();
    println!("{taken} samples in {seconds:.3} s, {:.1} samples/s", taken as f64 / seconds);
    write_json(args.json.as_deref(), &report)
}
