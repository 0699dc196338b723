//! How fast checkpoints are written and read, beside `dd` and `cat` on the same disk.
//!
//! `cargo run --release -p sail-train --example bench_checkpoint -- --dir FOLDER`
//!
//! The state of so many trained parameters (12 bytes each) is saved: waited for, behind other work, and as zeros by
//! `dd`, through the page cache and around it; then read after its pages were dropped from memory (needs root), as
//! `cat` reads it.

mod measure;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use sail_data::Position;
use sail_train::Error;
use sail_train::checkpoint::{Piece, RunState, Saver, Snapshot, Totals, Updates, newest};
use sail_train::guard::GuardState;
use sail_train::lineage::Lineage;
use sail_train::optim::{StateKind, StatePiece};
use sail_train::stage::Fingerprints;
use sail_train::world::World;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use measure::{stage, write_json};

#[derive(Parser)]
struct Args {
    /// Where to write
    #[arg(long)]
    dir: PathBuf,
    #[arg(long, default_value_t = 500_000_000)]
    parameters: i64,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Writes the result for machines
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Seconds of each round.
#[derive(Default, Serialize)]
struct Report {
    /// Training stands still while a save is taken that is written behind it.
    blocked: Vec<f64>,
    /// A save that is waited for.
    waited: Vec<f64>,
    dd: Vec<f64>,
    dd_direct: Vec<f64>,
    /// Verifying and reading.
    read: Vec<f64>,
    cat: Vec<f64>,
}

const TENSORS: i64 = 100;

/// Of a trained parameter without a moving average.
const KINDS: [StateKind; 3] = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq];

fn main() -> Result<(), Error> {
    let args = Args::parse();
    let mut plan = stage("configs/tiny/stage3.yaml".as_ref(), &[])?;
    plan.run.dir = args.dir.join("bench-checkpoint");
    plan.checkpoint.keep_last = 1;
    fs::create_dir_all(&plan.run.dir).expect("the folder can be made");
    let numel = args.parameters / TENSORS;
    let state: Vec<(String, Vec<Tensor>)> = (0..TENSORS)
        .map(|i| {
            let tensors = KINDS.map(|_| Tensor::randn([numel], (Kind::Float, Device::Cpu)));
            (format!("llm.layers.{i}.weight"), tensors.into())
        })
        .collect();
    let world = Arc::new(World::alone());
    let mut saver = Saver::new(plan.run.dir.clone(), plan.checkpoint.clone(), &world, None);
    let mut step = 0;
    let shape = [numel];
    let pieces = || pieces_of(&state, &shape);
    // As at the start of a stage that saves on the way: while its first steps are made.
    saver.reserve(&pieces())?;
    thread::sleep(Duration::from_secs(10));
    let take = |step: u64, old: Vec<Tensor>| -> Result<Snapshot, Error> {
        let nothing = sail_model::params::Params::new();
        Ok(Snapshot {
            state: RunState {
                step,
                totals: Totals::default(),
                data: Position { next_stream: 0, streams: Vec::new() },
                unlocked: BTreeMap::new(),
                updates: Updates::default(),
                ada_lrs: None,
                guard: GuardState::default(),
                held_out: BTreeMap::new(),
                lineage: Lineage::default(),
                plan: plan.clone(),
            },
            trained: Piece::copies(pieces(), old)?,
            frozen: Vec::new(),
            untouched: BTreeMap::new(),
            frozen_check: Arc::new(Fingerprints::new(&nothing)).frozen_check(&nothing, &BTreeSet::new()),
        })
    };
    println!(
        "{:>12} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "blocked s", "waited s", "of it", "dd s", "dd direct s", "read s", "cat s"
    );
    let mut report = Report::default();
    for _ in 0..args.rounds {
        step += 1;
        let begun = Instant::now();
        saver.begin(step, |old| take(step, old))?;
        let blocked = begun.elapsed().as_secs_f64();
        saver.finish()?;
        step += 1;
        let begun = Instant::now();
        saver.begin(step, |old| take(step, old))?;
        saver.finish()?;
        let waited = begun.elapsed().as_secs_f64();
        let [cached, direct] = ["", ",direct"].map(|flag| dd(&args.dir, 12 * numel * TENSORS, flag));

        drop_pages();
        let begun = Instant::now();
        let checkpoint = newest(&plan.run.dir)?.expect("invariant: just written");
        for (name, _) in &state {
            for kind in KINDS {
                assert_eq!(checkpoint.tensor(name, kind)?.numel() as i64, numel);
            }
        }
        let read = begun.elapsed().as_secs_f64();
        drop_pages();
        let cat = cat(checkpoint.dir());
        println!(
            "{blocked:>12.2} {waited:>12.2} {:>11.1}% {cached:>12.2} {direct:>12.2} {read:>12.2} {cat:>12.2}",
            100.0 * blocked / waited
        );
        report.blocked.push(blocked);
        report.waited.push(waited);
        report.dd.push(cached);
        report.dd_direct.push(direct);
        report.read.push(read);
        report.cat.push(cat);
    }
    fs::remove_dir_all(&plan.run.dir).expect("the folder is ours");
    write_json(args.json.as_deref(), &report)
}

/// The state as an optimizer gives it.
fn pieces_of<'a>(state: &'a [(String, Vec<Tensor>)], shape: &'a [i64]) -> Vec<StatePiece<'a>> {
    let mut pieces = Vec::new();
    for (name, tensors) in state {
        for (kind, tensor) in KINDS.into_iter().zip(tensors) {
            let (elements, tensor) = (0..shape[0], tensor.shallow_clone());
            pieces.push(StatePiece { name, kind, shape, elements, tensor });
        }
    }
    pieces
}

/// Seconds in which `dd` writes so many zeros, through the page cache or around it.
fn dd(dir: &Path, bytes: i64, flag: &str) -> f64 {
    let file = dir.join("bench-dd");
    let begun = Instant::now();
    let mut command = Command::new("dd");
    command.args([
        "if=/dev/zero",
        &format!("of={}", file.display()),
        "bs=4M",
        "iflag=count_bytes",
        &format!("oflag=append{flag}"),
        "conv=fsync,notrunc",
    ]);
    let status = command.arg(format!("count={bytes}")).stderr(Stdio::null()).status().expect("dd runs");
    assert!(status.success());
    let secs = begun.elapsed().as_secs_f64();
    fs::remove_file(file).expect("the file is ours");
    secs
}

fn cat(dir: &Path) -> f64 {
    let begun = Instant::now();
    let files = fs::read_dir(dir).expect("it exists").map(|entry| entry.expect("it can be read").path());
    let status = Command::new("cat").args(files).stdout(Stdio::null()).status().expect("cat runs");
    assert!(status.success());
    begun.elapsed().as_secs_f64()
}

/// What is read next comes from the disk; without root it comes from memory.
fn drop_pages() {
    let synced = Command::new("sync").status().is_ok_and(|status| status.success());
    if !synced || fs::write("/proc/sys/vm/drop_caches", "1").is_err() {
        println!("pages stay in memory: what is read does not come from the disk");
    }
}
