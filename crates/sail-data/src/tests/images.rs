//! Images of every kind and every kind of breakage; `image_goldens` compares pixels with Pillow's.

use std::path::{Path, PathBuf};

use image::{ImageFormat, RgbImage};
use proptest::prelude::*;

use crate::error::BadSample;
use crate::image::{Header, Picture, Share, Size, frame_count, push_tiles};
use crate::load_image;
use crate::rng::Key;
use crate::sample::Images;
use crate::spec::{AnyResolution, ImageSpec, Tiling};
use crate::testing::{decoded, decoded_frame, encode, gradient, jpeg, png, spec};
use crate::tiling::Grid;

const MAX_PIXELS: u64 = 1 << 22;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

fn pixels(name: &str) -> RgbImage {
    decoded(name, &std::fs::read(golden(name)).unwrap())
}

fn largest_difference(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

fn size_of(bytes: &[u8]) -> Result<(usize, usize), BadSample> {
    let Size { height, width } = Header::read("x", bytes, 0, MAX_PIXELS)?.size(true);
    Ok((width, height))
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
        "baseline.jpg",
        "progressive.jpg",
        "jpeg-gray.jpg",
        "cmyk.jpg",
    ];
    let nearly = ["webp-lossy.webp"];
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

fn rendered(bytes: &[u8], spec: &ImageSpec) -> Images {
    let picture = Picture::plan("x".into(), bytes.to_vec().into(), 0, Share::OneOf(1), spec).unwrap();
    let mut images = Images::default();
    picture.render(spec, Key::new(0), &mut images).unwrap();
    assert_eq!(picture.visual_tokens(spec), spec.visual_tokens(&images));
    images
}

#[test]
fn tiles_are_cut_row_by_row_and_the_thumbnail_follows() {
    // Tile (column, row) of a 2x3 grid has the value 10 * row + column, in green.
    let of = |x: u32, y: u32| (10 * (y / 8) + x / 8) as u8;
    let image = RgbImage::from_fn(16, 24, |x, y| image::Rgb([0, of(x, y), 255]));
    let mut images = Images::default();
    push_tiles(&image, Grid { columns: 2, rows: 3, thumbnail: true }, &raw_spec(8), &mut images);
    assert_eq!(images.sizes, [(8, 8); 7]);
    let (tiles, _) = images.pixels.as_chunks::<192>();
    for (tile, expected) in tiles.iter().zip([0.0, 1.0, 10.0, 11.0, 20.0, 21.0]) {
        assert!(tile[..64].iter().all(|value| *value == 0.0));
        assert!(tile[64..128].iter().all(|value| (value - expected).abs() < 1e-4), "{expected}");
        assert!(tile[128..].iter().all(|value| (value - 255.0).abs() < 1e-3));
    }
    assert!((tiles[6][64..128].iter().sum::<f32>() / 64.0 - 10.5).abs() < 0.5);
}

#[test]
fn values_are_normalised_per_channel() {
    let mut spec = raw_spec(2);
    spec.mean = [0.485, 0.456, 0.406];
    spec.std = [0.229, 0.224, 0.225];
    let image = RgbImage::from_pixel(2, 2, image::Rgb([0, 128, 255]));
    let mut images = Images::default();
    push_tiles(&image, Grid { columns: 1, rows: 1, thumbnail: false }, &spec, &mut images);
    let expected = [(0.0 - 0.485) / 0.229, (128.0 / 255.0 - 0.456) / 0.224, (1.0 - 0.406) / 0.225];
    for (plane, value) in images.pixels.chunks(4).zip(expected) {
        assert!(plane.iter().all(|pixel: &f32| (pixel - value).abs() < 1e-6), "{plane:?} {value}");
    }
}

#[test]
fn images_of_any_resolution_are_not_tiled() {
    let any = AnyResolution { unit_px: 4, min_tokens: 4, max_tokens: 64 };
    let spec = ImageSpec { any_resolution: Some(any), ..raw_spec(8) };
    let images = rendered(&png(&gradient(41, 23)), &spec);
    assert_eq!(images.sizes, [(24, 40)]);
    assert_eq!((images.pixels.len(), spec.visual_tokens(&images)), (3 * 24 * 40, 60));
    assert_eq!(rendered(&png(&gradient(1, 1)), &spec).sizes, [(8, 8)]);
}

#[test]
fn a_frame_of_a_video_is_one_tile() {
    let spec = ImageSpec { tiling: Tiling { min: 4, max: 12, thumbnail: true }, ..raw_spec(8) };
    let bytes: bytes::Bytes = png(&gradient(64, 32)).into();
    let tokens = |share| {
        let picture = Picture::plan("x.png".into(), bytes.clone(), 0, share, &spec).unwrap();
        picture.visual_tokens(&spec) / spec.tokens_per_tile
    };
    assert_eq!((tokens(Share::Frame), tokens(Share::OneOf(1)), tokens(Share::OneOf(12))), (1, 9, 1));
}

#[test]
fn extreme_sizes_are_rendered_or_refused() {
    let spec = ImageSpec { tiling: Tiling { min: 1, max: 3, thumbnail: true }, ..raw_spec(8) };
    for (width, height, tiles) in [(1, 1, 1), (1, 10_000, 4), (10_000, 1, 4), (17, 16, 1)] {
        let picture = RgbImage::from_pixel(width, height, image::Rgb([9, 99, 199]));
        let images = rendered(&png(&picture), &spec);
        assert_eq!(images.len(), tiles, "{width}x{height}");
        assert!(images.pixels[..64].iter().all(|value| (value - 9.0).abs() < 1e-4), "{width}x{height}");
    }
    let empty = [b"GIF89a".as_slice(), &[0; 7], &[0x3b]].concat();
    assert!(matches!(size_of(&empty), Err(BadSample::BadImage { .. })));
    // The frame header of a JPEG, made 65,500 pixels wide and high.
    let mut wide = jpeg(&gradient(16, 16));
    let frame = wide.windows(2).position(|two| two == [0xff, 0xc0]).unwrap();
    wide[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xdc, 0xff, 0xdc]);
    assert!(matches!(size_of(&wide), Err(BadSample::ImageTooLarge { width: 65_500, height: 65_500, .. })));
}

#[test]
fn orientation_turns_the_plan_and_the_pixels() {
    // Orientation 6: the first row is on the right.
    let mut exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0".to_vec();
    let mut segment = vec![0xff, 0xe1, 0, exif.len() as u8 + 2];
    segment.append(&mut exif);
    let picture = RgbImage::from_fn(32, 16, |x, y| image::Rgb([if x < 16 { 250 } else { 5 }, y as u8, 0]));
    let plain = jpeg(&picture);
    let turned = [&plain[..2], &segment, &plain[2..]].concat();
    let spec = ImageSpec { tiling: Tiling { min: 2, max: 2, thumbnail: false }, ..raw_spec(16) };
    assert_eq!(size_of(&turned).unwrap(), (16, 32));
    assert_eq!(size_of(&plain).unwrap(), (32, 16));
    let top = |spec: &ImageSpec| rendered(&turned, spec).pixels[..256].iter().sum::<f32>() / 256.0;
    assert!(top(&spec) > 200.0, "upright, the first tile is above the second");
    let as_stored = ImageSpec { exif_orientation: false, ..spec };
    assert_eq!(rendered(&turned, &as_stored).pixels, rendered(&plain, &as_stored).pixels);
}

/// A small file of every format.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let read = |name: &str| std::fs::read(goldens().join(name)).unwrap();
    let picture = gradient(64, 48);
    vec![
        ("jpeg", jpeg(&picture)),
        ("progressive", std::fs::read(golden("progressive.jpg")).unwrap()),
        ("cmyk", std::fs::read(golden("cmyk.jpg")).unwrap()),
        ("png", png(&picture)),
        ("webp", encode(&picture.clone().into(), ImageFormat::WebP)),
        ("webp-lossy", std::fs::read(golden("webp-lossy.webp")).unwrap()),
        ("bmp", encode(&picture.into(), ImageFormat::Bmp)),
        ("gif", read("animated.gif")),
        ("webp-animated", read("animated.webp")),
        ("tiff-pages", read("pages.tif")),
        ("tiff-g3", read("fax-g3.tif")),
        ("tiff-jpeg", read("jpeg.tif")),
        ("tiff-lzw", read("lzw.tif")),
    ]
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/images")
}

#[test]
fn truncated_images_of_every_format_are_refused() {
    for (name, bytes) in files() {
        assert!(decoded_frame(name, &bytes, 0).is_ok(), "{name}");
        let frames = frame_count(name, &bytes).unwrap();
        for step in 0..40 {
            let keep = bytes.len() * step / 40;
            let refused = decoded_frame(name, &bytes[..keep], frames - 1);
            assert!(matches!(refused, Err(BadSample::BadImage { .. })), "{name}: {keep} of {}", bytes.len());
        }
    }
    assert!(matches!(size_of(b""), Err(BadSample::BadImage { .. })));
    let unknown = size_of(b"not an image").unwrap_err().to_string();
    assert!(unknown.contains("JPEG, PNG, WebP, GIF, TIFF and BMP are"), "{unknown}");
}

#[test]
fn a_frame_that_is_not_there_is_named() {
    for (name, bytes) in files() {
        let frames = frame_count(name, &bytes).unwrap();
        assert!(decoded_frame(name, &bytes, frames - 1).is_ok(), "{name}");
        let message = decoded_frame(name, &bytes, frames).unwrap_err().to_string();
        assert!(message.contains(&format!("{frames} (counted from 0)")), "{name}: {message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn flipped_bytes_are_never_a_panic(
        file in 0_usize..13,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
        keep in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (name, mut bytes) = files().swap_remove(file);
        for (at, value, in_header) in flips {
            let end = if in_header { bytes.len().min(700) } else { bytes.len() };
            bytes[at.index(end)] = value;
        }
        if let Some(keep) = keep {
            bytes.truncate(keep.index(bytes.len()).max(1));
        }
        let frames = frame_count(name, &bytes).unwrap_or(1);
        for frame in [0, frames - 1] {
            let _ = decoded_frame(name, &bytes, frame);
        }
    }
}

#[test]
fn the_header_decides_about_size_before_anything_is_decoded() {
    let mut bytes = png(&gradient(4, 4));
    // A header that claims 50,000 x 50,000 pixels, with its checksum made right.
    bytes[16..24].copy_from_slice(&[0, 0, 0xc3, 0x50, 0, 0, 0xc3, 0x50]);
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    let refused = Header::read("bomb.png", &bytes, 0, 89_000_000).unwrap_err();
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
    let images = load_image(&golden("baseline.jpg"), &spec).unwrap();
    assert_eq!(images.sizes, [(8, 8); 3], "40x24 is nearest to 2x1");
    assert!(load_image(&golden("missing.jpg"), &spec).unwrap_err().to_string().contains("missing.jpg"));
    let not_an_image = load_image(&golden("make_goldens.py"), &spec).unwrap_err();
    assert!(matches!(not_an_image, crate::Error::Unusable { .. }));
}
