//! Decoding and resizing against Pillow (`testdata/make_goldens.py`), tiles, and truncation.

use std::path::{Path, PathBuf};

use image::{ImageFormat, RgbImage};

use crate::error::BadSample;
use crate::image::{cut, decode, read_size};
use crate::load_image;
use crate::sample::Tiles;
use crate::spec::{ImageSpec, Tiling};
use crate::testing::{encode, gradient, jpeg, png, spec};
use crate::tiling::Grid;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn pixels(name: &str) -> RgbImage {
    decode(name, &std::fs::read(golden(name)).unwrap(), 1 << 20).unwrap()
}

fn largest_difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn every_pixel_format_becomes_the_rgb_that_pillow_sees() {
    let exact = [
        "gray.png",
        "gray-alpha.png",
        "rgba.png",
        "palette.png",
        "palette-alpha.png",
        "bilevel.png",
        "webp-lossless.webp",
        "rgb16.png",
        "gray16.png",
    ];
    let nearly = ["baseline.jpg", "progressive.jpg", "jpeg-gray.jpg", "cmyk.jpg", "webp-lossy.webp"];
    for (names, tolerance) in [(&exact[..], 0), (&nearly[..], 3)] {
        for name in names {
            let stem = name.split('.').next().unwrap();
            let (ours, theirs) = (pixels(name), pixels(&format!("{stem}.rgb.png")));
            assert_eq!(ours.dimensions(), theirs.dimensions(), "{name}");
            let difference = largest_difference(ours.as_raw(), theirs.as_raw());
            assert!(difference <= tolerance, "{name}: {difference}");
        }
    }
}

/// One tile of mean 0 and deviation 1/255, so that its values are the bytes again.
fn raw_spec(tile_px: usize) -> ImageSpec {
    ImageSpec {
        tile_px,
        tiling: Tiling { min: 1, max: 1, thumbnail: false },
        mean: [0.0; 3],
        std: [1.0 / 255.0; 3],
        ..spec(&["a"]).image
    }
}

/// The RGB image of a row of tiles.
fn assemble(tiles: &Tiles, columns: usize, rows: usize) -> RgbImage {
    let px = tiles.px;
    RgbImage::from_fn((columns * px) as u32, (rows * px) as u32, |x, y| {
        let (x, y) = (x as usize, y as usize);
        let tile = (y / px) * columns + x / px;
        let at = |channel: usize| tiles.pixels[((tile * 3 + channel) * px + y % px) * px + x % px];
        image::Rgb([at(0), at(1), at(2)].map(|value| value.round() as u8))
    })
}

#[test]
fn resizing_agrees_with_pillow_and_tiles_are_cut_row_by_row() {
    let source = pixels("resize.png");
    for (columns, rows, px) in [(1, 1, 16), (2, 1, 16)] {
        let grid = Grid { columns, rows, thumbnail: true };
        let mut tiles = Tiles::none(px);
        cut("x", &source, grid, &raw_spec(px), &mut tiles).unwrap();
        assert_eq!(tiles.n, columns * rows + 1);
        let expected = pixels(&format!("resize-{}x{}.png", columns * px, rows * px));
        let difference = largest_difference(assemble(&tiles, columns, rows).as_raw(), expected.as_raw());
        assert!(difference <= 1, "{columns}x{rows}: {difference}");
        let thumbnail = Tiles { n: 1, px, pixels: tiles.pixels[tiles.pixels.len() - 3 * px * px..].to_vec() };
        let expected = pixels("resize-16x16.png");
        assert!(largest_difference(assemble(&thumbnail, 1, 1).as_raw(), expected.as_raw()) <= 1);
    }
    for (width, height) in [(122, 94), (61, 20), (7, 3)] {
        let ours = crate::image::resize(&source, width, height).unwrap();
        let expected = pixels(&format!("resize-{width}x{height}.png"));
        let difference = largest_difference(&ours, expected.as_raw());
        assert!(difference <= 1, "{width}x{height}: {difference}");
    }
}

#[test]
fn values_are_normalised_per_channel() {
    let mut spec = raw_spec(2);
    spec.mean = [0.485, 0.456, 0.406];
    spec.std = [0.229, 0.224, 0.225];
    let image = RgbImage::from_pixel(2, 2, image::Rgb([0, 128, 255]));
    let mut tiles = Tiles::none(2);
    cut("x", &image, Grid { columns: 1, rows: 1, thumbnail: false }, &spec, &mut tiles).unwrap();
    let expected = [(0.0 - 0.485) / 0.229, (128.0 / 255.0 - 0.456) / 0.224, (1.0 - 0.406) / 0.225];
    for (plane, value) in tiles.pixels.chunks(4).zip(expected) {
        assert!(plane.iter().all(|pixel: &f32| (pixel - value).abs() < 1e-6), "{plane:?} {value}");
    }
}

#[test]
fn truncated_images_of_every_format_are_refused() {
    let picture = gradient(64, 48);
    let files = [
        ("x.jpg", jpeg(&picture)),
        ("x.png", png(&picture)),
        ("x.webp", encode(&picture.clone().into(), ImageFormat::WebP)),
    ];
    for (name, bytes) in files {
        assert!(decode(name, &bytes, 1 << 20).is_ok(), "{name}");
        for keep in [bytes.len() / 3, bytes.len() * 2 / 3, bytes.len() * 9 / 10] {
            let refused =
                read_size(name, &bytes[..keep], 1 << 20).and_then(|_| decode(name, &bytes[..keep], 1 << 20));
            assert!(matches!(refused, Err(BadSample::BadImage { .. })), "{name}: {keep} of {}", bytes.len());
        }
    }
    assert!(matches!(read_size("x", b"GIF89a\x01\x00\x01\x00", 100), Err(BadSample::BadImage { .. })));
    assert!(matches!(read_size("x", b"", 100), Err(BadSample::BadImage { .. })));
}

#[test]
fn the_header_decides_about_size_before_anything_is_decoded() {
    let mut bytes = png(&gradient(4, 4));
    // A header that claims 50,000 x 50,000 pixels, with its checksum made right.
    bytes[16..24].copy_from_slice(&[0, 0, 0xc3, 0x50, 0, 0, 0xc3, 0x50]);
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    let refused = read_size("bomb.png", &bytes, 89_000_000).unwrap_err();
    assert_eq!(
        refused,
        BadSample::ImageTooLarge {
            image: "bomb.png".into(),
            width: 50_000,
            height: 50_000,
            limit: 89_000_000
        }
    );
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn a_file_is_loaded_as_the_only_image_of_a_sample() {
    let spec = ImageSpec { tiling: Tiling { min: 1, max: 4, thumbnail: true }, ..raw_spec(8) };
    let tiles = load_image(&golden("baseline.jpg"), &spec).unwrap();
    assert_eq!((tiles.n, tiles.px, tiles.pixels.len()), (3, 8, 3 * 3 * 64), "40x24 is nearest to 2x1");
    assert!(load_image(&golden("missing.jpg"), &spec).unwrap_err().to_string().contains("missing.jpg"));
    let not_an_image = load_image(&golden("make_goldens.py"), &spec).unwrap_err();
    assert!(matches!(not_an_image, crate::Error::Unusable { .. }));
}
