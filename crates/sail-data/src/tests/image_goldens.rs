//! The whole image path against Pillow and numpy (`tests/goldens/make_images.py`).

use std::path::{Path, PathBuf};

use image::RgbImage;
use serde::Deserialize;

use crate::image::{Header, Picture, Share, Treatment, decode};
use crate::rng::Key;
use crate::sample::Images;
use crate::spec::{Alpha, AnyResolution, ImageSpec, Tiling};
use crate::testing::decoded;

/// As in the script.
const PX: usize = 28;
const ANY: AnyResolution = AnyResolution { unit_px: 14, min_tokens: 4, max_tokens: 40 };

/// Largest and mean difference in levels that is allowed.
const LIMITS: (u8, f64) = (1, 0.1);

/// What the script made of an image.
#[derive(Debug, Deserialize)]
struct Golden {
    file: String,
    frame: usize,
    turn: bool,
    over: Option<[u8; 3]>,
    make: Make,
    expected: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Make {
    Tiles,
    Whole,
    Rgb,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/images")
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(folder().join(name)).unwrap()
}

fn goldens() -> Vec<Golden> {
    serde_json::from_slice(&read("index.json")).unwrap()
}

impl Golden {
    /// Values that are bytes again.
    fn spec(&self) -> ImageSpec {
        ImageSpec {
            tiling: Tiling { min: 1, max: 6, thumbnail: true },
            any_resolution: (self.make == Make::Whole).then_some(ANY),
            alpha: self.over.map_or(Alpha::Drop, Alpha::Over),
            exif_orientation: self.turn,
            std: [1.0 / 255.0; 3],
            ..ImageSpec::square(PX, 1)
        }
    }

    fn is_jpeg(&self) -> bool {
        Path::new(&self.file).extension().is_some_and(|extension| extension == "jpg")
    }

    /// Our pixels, all images one below the other.
    fn ours(&self) -> Vec<u8> {
        let (spec, bytes) = (self.spec(), read(&self.file));
        if self.make == Make::Rgb {
            return self.decoded(&bytes).into_raw();
        }
        let picture =
            Picture::plan(self.file.clone(), bytes.into(), self.frame, Share::OneOf(1), &spec).unwrap();
        let mut images = Images::default();
        picture.render(&spec, Key::new(0), &mut images).unwrap();
        let interleave = |(n, (height, width), pixels): (usize, (usize, usize), &[f32])| {
            let area = height * width;
            let at = move |index: usize| {
                let (pixel, channel) = (index / 3 % area, index % 3);
                index / (3 * area) * 3 * area + channel * area + pixel
            };
            (0..n * 3 * area).map(|index| pixels[at(index)].round() as u8).collect::<Vec<u8>>()
        };
        images.batches().flat_map(interleave).collect()
    }

    fn decoded(&self, bytes: &[u8]) -> RgbImage {
        let spec = self.spec();
        let treatment = Treatment { alpha: spec.alpha, turn: self.turn, max_pixels: spec.max_pixels };
        let header = Header::read(&self.file, bytes, self.frame, spec.max_pixels).unwrap();
        decode(&self.file, bytes, self.frame, &header, treatment).unwrap()
    }

    /// Largest and mean difference from Pillow, in levels.
    fn differences(&self) -> (u8, f64) {
        let ours = self.ours();
        let theirs = decoded(&self.expected, &read(&self.expected)).into_raw();
        assert_eq!(ours.len(), theirs.len(), "{self:?}");
        let differences = ours.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b));
        let sum: u64 = differences.clone().map(u64::from).sum();
        (differences.max().unwrap(), sum as f64 / ours.len() as f64)
    }
}

#[test]
fn every_pixel_is_that_of_pillow() {
    let mut worst = Vec::new();
    for golden in goldens() {
        let (largest, mean) = golden.differences();
        println!("{}: largest {largest}, mean {mean:.4} levels", golden.expected);
        if largest > LIMITS.0 || mean > LIMITS.1 {
            worst.push((golden.expected, largest, mean));
        }
    }
    assert!(worst.is_empty(), "{worst:?}");
}

#[test]
fn jpeg_files_are_decoded_and_resized_to_the_last_bit() {
    let jpegs: Vec<Golden> = goldens().into_iter().filter(Golden::is_jpeg).collect();
    assert!(jpegs.iter().filter(|golden| golden.make == Make::Rgb).count() >= 9);
    for golden in jpegs {
        assert_eq!(golden.differences(), (0, 0.0), "{}", golden.expected);
    }
}
