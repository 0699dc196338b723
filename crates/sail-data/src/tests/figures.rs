//! Figures for `docs/benchmarks.md`, printed and not judged:
//!
//! `cargo test --release -p sail-data --lib figures -- --ignored --nocapture --test-threads 1`

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::loading::{loader, open, take};
use crate::loader::LoaderOptions;
use crate::order::{Cursor, Order};
use crate::sample::Pack;
use crate::source::Source;
use crate::spec::{Balance, DataSpec, ImageSpec, Length, MixBy, SourceSpec, Tiling};
use crate::testing::{spec, tar, text_sample, write_shards};

/// Kilobytes that this process has in memory (`VmRSS`).
fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A shard of `samples` samples that has an index, and of whose bytes only both ends are there.
fn sparse_shard(dir: &Path, samples: u64) -> String {
    let path = dir.join(format!("{samples}.tar"));
    let first = tar(&[("a.json", "{}")]);
    let mut shard = std::fs::File::create(&path).unwrap();
    shard.write_all(&first[..1024]).unwrap();
    shard.set_len(samples * 1024 + 1024).unwrap();
    let mut index =
        std::io::BufWriter::new(std::fs::File::create(dir.join(format!("{samples}.tar.idx"))).unwrap());
    for entry in 0..=samples {
        index.write_all(&(entry * 1024).to_le_bytes()).unwrap();
    }
    path.display().to_string()
}

/// Kilobytes that reading an epoch of this many samples takes.
fn growth(samples: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(&[&sparse_shard(dir.path(), samples)]);
    (spec.streams, spec.shuffle_buffer, spec.length) = (4, 256, Length::Epochs(1));
    let before = resident_kb();
    let source = std::sync::Arc::new(Source::open_all(&spec).unwrap().remove(0));
    let orders = (0..4).map(|stream| Order::new(source.clone(), stream, 4, 256, Cursor::default()));
    let mut orders: Vec<Order> = orders.collect();
    let mut drawn = 0;
    let mut most = before;
    for order in &mut orders {
        while order.next_sample(&mut 0).unwrap().is_some() {
            drawn += 1;
            if drawn % 100_000 == 0 {
                most = most.max(resident_kb());
            }
        }
    }
    assert_eq!(drawn, samples);
    most.max(resident_kb()) - before
}

/// In a process of its own: other tests take memory too.
#[test]
fn memory_does_not_grow_with_the_samples() {
    let mut alone = Command::new(std::env::current_exe().unwrap());
    let output = alone.args(["--ignored", "--exact", "tests::figures::memory_alone"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
}

#[test]
#[ignore = "the process that `memory_does_not_grow_with_the_samples` starts"]
fn memory_alone() {
    growth(1_000);
    let (few, many) = (growth(1_000), growth(300_000));
    assert!(many < few + 4_096, "{few} kB for 1,000 samples, {many} kB for 300,000");
}

#[test]
#[ignore = "a figure"]
fn figures_memory() {
    growth(1_000);
    for samples in [1_000, 100_000, 10_000_000] {
        println!("reading {samples} samples takes {} kB", growth(samples));
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("0.tar"), "").unwrap();
    for n in 1..20_000 {
        std::fs::hard_link(dir.path().join("0.tar"), dir.path().join(format!("{n}.tar"))).unwrap();
    }
    let spec = spec(&[&dir.path().join("*.tar").display().to_string()]);
    let before = resident_kb();
    let sources = Source::open_all(&spec).unwrap();
    sources[0].order(0);
    println!("a shard takes {} bytes", (resident_kb() - before) * 1024 / 20_000);
}

#[test]
#[ignore = "a figure"]
fn figures_restore() {
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), &[10; 1_000]);
    let mut spec = spec(&[&dir.path().join("*.tar").display().to_string()]);
    (spec.streams, spec.shuffle_buffer, spec.pack_buffer, spec.tokens_per_pack) = (8, 64, 32, 1024);
    let mut start = loader(&spec, 2);
    while start.tallies()["demo"].seen < 25_000 {
        start.next_pack().unwrap();
    }
    let saved = serde_json::to_string(&start.position()).unwrap();
    let mut times: Vec<(f64, f64)> = (0..9)
        .map(|_| {
            let began = Instant::now();
            let position = serde_json::from_str(&saved).unwrap();
            let mut resumed = open(&spec, LoaderOptions::alone(2), Some(position));
            let restored = began.elapsed().as_secs_f64();
            resumed.next_pack().unwrap();
            (restored, began.elapsed().as_secs_f64())
        })
        .collect();
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (restored, first) = times[4];
    println!(
        "in the middle of epoch 3 of 1,000 shards: position of {} kB restored in {:.1} ms, first pack after {:.1} ms",
        saved.len() / 1024,
        1e3 * restored,
        1e3 * first
    );
}

#[test]
#[ignore = "a figure"]
fn figures_reading() {
    let dir = tempfile::tempdir().unwrap();
    let payload: Vec<u8> = (0..120_000_u32).map(|n| ((n * n) >> 7) as u8).collect();
    let json = text_sample("<image>", "x");
    let members: Vec<(String, &[u8])> = (0..4_000)
        .flat_map(|n| {
            [(format!("{n:05}.json"), json.as_bytes()), (format!("{n:05}.jpg"), payload.as_slice())]
        })
        .collect();
    let path = dir.path().join("a.tar");
    std::fs::write(&path, tar(&members)).unwrap();
    let bytes = std::fs::metadata(&path).unwrap().len() as f64;
    let source = Source::open_all(&spec(&[&path.display().to_string()])).unwrap().remove(0);
    let ours = || {
        let began = Instant::now();
        let shard = source.open(0).unwrap();
        let mut scanner = source.scan(0, 0, 0).unwrap();
        let mut read = 0;
        while let Some(extent) = scanner.next_sample().unwrap() {
            read += shard.read(extent).unwrap().members.len();
        }
        assert_eq!(read, 8_000);
        bytes / began.elapsed().as_secs_f64() / 1e6
    };
    let cat = || {
        let began = Instant::now();
        let status = Command::new("sh").args(["-c", "cat \"$0\" > /dev/null"]).arg(&path).status().unwrap();
        assert!(status.success());
        bytes / began.elapsed().as_secs_f64() / 1e6
    };
    let mut runs: Vec<(f64, f64)> = (0..9).map(|_| (ours(), cat())).collect();
    let mut median = |pick: fn(&(f64, f64)) -> f64| {
        runs.sort_by(|a, b| pick(a).total_cmp(&pick(b)));
        pick(&runs[4])
    };
    let (ours, cat) = (median(|run| run.0), median(|run| run.1));
    println!("samples of a shard: {ours:.0} MB/s, cat: {cat:.0} MB/s, ratio {:.2}", ours / cat);
}

const STEPS: usize = 60;

/// Tokens and visual tokens of packs.
type Loads = Vec<(usize, usize)>;

/// Prints the mean fill, and the mean over steps of how much more visual tokens the fullest of 8 packs has than
/// the mean.
fn print_packing(name: &str, tokens_per_pack: usize, packs: &Loads) {
    let tokens: usize = packs.iter().map(|(tokens, _)| tokens).sum();
    let fill = tokens as f64 / (packs.len() * tokens_per_pack) as f64;
    let steps = packs.chunks(8).map(|ranks| {
        let most = ranks.iter().map(|&(_, visual)| visual).max().unwrap() as f64;
        most * 8.0 / ranks.iter().map(|&(_, visual)| visual).sum::<usize>() as f64 - 1.0
    });
    let imbalance = steps.sum::<f64>() / STEPS as f64;
    let (fill, imbalance) = (100.0 * fill, 100.0 * imbalance);
    println!("{tokens_per_pack} tokens, {name}: {fill:.2} % filled, imbalance {imbalance:.2} %");
}

fn packed(spec: &DataSpec) -> Loads {
    let packs = take(&mut loader(spec, 2), 8 * STEPS).into_iter().filter_map(|turn| turn.pack);
    packs.map(|pack| (pack.ids.len(), pack.image_rows.len())).collect()
}

/// What a packer without candidates makes of the same samples: a pack is closed by the first that does not fit.
fn first_come(spec: &DataSpec) -> Loads {
    let mut samples = loader(&DataSpec { tokens_per_pack: 1_000, pack_buffer: 1, ..spec.clone() }, 2);
    let mut open = [(0, 0); 8];
    let mut closed = vec![Loads::new(); 8];
    while closed.iter().any(|packs| packs.len() < STEPS) {
        let turn = samples.next_pack().unwrap();
        let pack: Pack = turn.pack.unwrap();
        for bounds in pack.cu_seqlens.windows(2) {
            let length = (bounds[1] - bounds[0]) as usize;
            let visual = pack.image_rows.iter().filter(|&&row| bounds[0] <= row && row < bounds[1]).count();
            let (tokens, images) = &mut open[turn.stream];
            if *tokens + length > spec.tokens_per_pack {
                closed[turn.stream].push((*tokens, *images));
                (*tokens, *images) = (0, 0);
            }
            *tokens += length;
            *images += visual;
        }
    }
    (0..STEPS).flat_map(|step| closed.iter().map(move |packs| packs[step])).collect()
}

#[test]
#[ignore = "a figure"]
fn figures_packing() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/demo");
    let source = |name: &str, weight| {
        let shards = vec![folder.join(format!("{name}-train-*.tar")).display().to_string()];
        SourceSpec { weight, ..SourceSpec::new(name, shards) }
    };
    let sources = vec![source("caption", 2.0), source("ocr", 1.0), source("vqa", 1.0), source("text", 1.0)];
    let tiling = Tiling { min: 1, max: 4, thumbnail: true };
    let base = spec(&["x"]);
    let image = ImageSpec { tiling, ..ImageSpec::square(56, 16) };
    let base = DataSpec { sources, streams: 8, shuffle_buffer: 64, mix_by: MixBy::Tokens, image, ..base };
    for tokens_per_pack in [1_024, 2_048, 8_192] {
        print_packing(
            "first come",
            tokens_per_pack,
            &first_come(&DataSpec { tokens_per_pack, ..base.clone() }),
        );
        for (name, pack_buffer, balance) in [
            ("64 candidates", 64, Balance::Off),
            ("64 candidates, balanced", 64, Balance::Mean),
            ("256 candidates, balanced", 256, Balance::Mean),
        ] {
            let spec = DataSpec { tokens_per_pack, balance, pack_buffer, ..base.clone() };
            print_packing(name, tokens_per_pack, &packed(&spec));
        }
    }
}
