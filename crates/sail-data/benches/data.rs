//! Packing, images and shards, each alone on one thread: `cargo bench -p sail-data`.

use std::fs;
use std::hint::black_box;
use std::path::PathBuf;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sail_data::inside::{Load, choose, read_shard};
use sail_data::{AnyResolution, ImageSpec, Tiling, load_image};

/// A file of the repository.
fn file(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Candidates as a mixture of captions and documents gives them: 16 to 400 tokens of text, at most 6 tiles of 256
/// visual tokens.
fn drawn_loads(candidates: usize) -> Vec<Load> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut load = || {
        let visual = 256 * rng.random_range(0..=6);
        Load { tokens: visual + rng.random_range(16..=400), visual }
    };
    (0..candidates).map(|_| load()).collect()
}

/// One pack out of so many candidates, with and without a number of visual tokens to come near.
fn packing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("packing");
    for candidates in [64, 256] {
        let loads = drawn_loads(candidates);
        group.throughput(Throughput::Elements(candidates as u64));
        for (name, target) in [("tokens", None), ("tokens and visual tokens", Some(5_120))] {
            group.bench_function(BenchmarkId::new(name, candidates), |bencher| {
                bencher.iter(|| choose(black_box(&loads), 8_192, target));
            });
        }
    }
}

/// A JPEG file to normalised pixels: decoded, resized, cut.
fn images(criterion: &mut Criterion) {
    let path = file("tests/goldens/images/large.jpg");
    let tiling = Tiling { min: 1, max: 12, thumbnail: true };
    let any_resolution = Some(AnyResolution { unit_px: 28, min_tokens: 4, max_tokens: 1_024 });
    let mut group = criterion.benchmark_group("520x390 JPEG to pixels");
    for (name, spec) in [
        ("a tile of 112", ImageSpec::square(112, 16)),
        ("13 tiles of 448", ImageSpec { tiling, ..ImageSpec::square(448, 256) }),
        ("own resolution", ImageSpec { any_resolution, ..ImageSpec::square(448, 256) }),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| load_image(&path, &spec).expect("the golden can be read"));
        });
    }
}

/// The samples of a shard in the page cache, nothing decoded.
fn shards(criterion: &mut Criterion) {
    let path = file("data/demo/caption-train-000000.tar");
    let bytes = fs::metadata(&path).expect("the demo corpus is in the repository").len();
    let path = path.display().to_string();
    let mut group = criterion.benchmark_group("shard");
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("read", |bencher| {
        bencher.iter(|| assert_eq!(read_shard(&path).expect("the shard is whole"), 360));
    });
}

criterion_group!(benches, packing, images, shards);
criterion_main!(benches);
