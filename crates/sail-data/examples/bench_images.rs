//! Loads one image file many times on one thread: `bench_images SIDE MAX_TILES COUNT FILE`.
//!
//! Called by `scripts/bench_images.py`, which measures its processor time and compares with Pillow and torchvision.

use std::path::PathBuf;

use sail_data::{ImageSpec, Tiling, load_image};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |what: &str| -> usize {
        let text = arguments.next().unwrap_or_default();
        text.parse().unwrap_or_else(|_| panic!("`{text}` is no {what}"))
    };
    let (tile_px, max, count) = (number("tile side"), number("number of tiles"), number("count"));
    let file = PathBuf::from(arguments.next().unwrap_or_default());
    let spec = ImageSpec {
        tiling: Tiling { min: 1, max, thumbnail: true },
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        ..ImageSpec::square(tile_px, 256)
    };
    for _ in 0..count {
        let images = load_image(&file, &spec).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        std::hint::black_box(&images.pixels);
    }
}
