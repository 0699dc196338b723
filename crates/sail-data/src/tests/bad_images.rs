//! Images of every kind of damage inside a sample: skipped with a reason, without much memory, and the sample
//! after it is read. Bombs are headers that claim what the file does not hold.

use std::path::Path;

use image::codecs::webp::WebPEncoder;
use image::{DynamicImage, ExtendedColorType, ImageFormat};

use crate::error::BadSample;
use crate::testing::{encode, gradient, jpeg, outcomes_of, png, tar, text_sample};

/// The reason for skipping a captionless sample with this image, none when it is good.
fn reason(name: &str, bytes: &[u8]) -> Option<&'static str> {
    let json = text_sample("q", "a");
    let after = text_sample("q", "b");
    let members = [
        ("a.json".to_owned(), json.as_bytes()),
        (format!("a.{name}"), bytes),
        ("b.json".to_owned(), after.as_bytes()),
    ];
    let found = outcomes_of("a.tar", &tar(&members)).unwrap();
    assert!(found[1].1.is_ok(), "{name}: the neighbour is bad, too");
    if let Ok(sample) = &found[0].1 {
        assert!(!sample.images.is_empty(), "{name}");
    }
    found[0].1.as_ref().err().map(BadSample::reason)
}

pub(super) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

fn webp() -> Vec<u8> {
    let picture = gradient(16, 16);
    let mut bytes = Vec::new();
    WebPEncoder::new_lossless(&mut bytes).encode(picture.as_raw(), 16, 16, ExtendedColorType::Rgb8).unwrap();
    bytes
}

/// A PNG whose header claims this size, with its checksum made right.
fn png_of(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = png(&gradient(8, 8));
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn jpeg_of(width: u16, height: u16) -> Vec<u8> {
    let mut bytes = jpeg(&gradient(8, 8));
    let frame = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
    bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
    bytes
}

/// A lossless WebP of nearly the largest size, 16383x16383.
fn webp_bomb() -> Vec<u8> {
    let mut bytes = webp();
    let at = bytes.windows(4).position(|tag| tag == b"VP8L").unwrap() + 9;
    bytes[at..at + 4].copy_from_slice(&0x0fff_bffe_u32.to_le_bytes());
    bytes
}

fn gif_of(width: u16, height: u16) -> Vec<u8> {
    let mut bytes = b"GIF89a".to_vec();
    for side in [width, height] {
        bytes.extend(side.to_le_bytes());
    }
    // Two colours, then one image of the same size with a code stream of one pixel.
    bytes.extend([0x80, 0, 0, 0, 0, 0, 255, 255, 255, 0x2c, 0, 0, 0, 0]);
    for side in [width, height] {
        bytes.extend(side.to_le_bytes());
    }
    bytes.extend([0, 2, 2, 0x44, 1, 0, 0x3b]);
    bytes
}

fn tiff_of(width: u32, height: u32) -> Vec<u8> {
    let fields: [(u16, u32); 9] = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 4096),
        (277, 1),
        (278, height),
        (279, 1),
    ];
    let mut bytes = b"II*\0\x08\0\0\0".to_vec();
    bytes.extend((fields.len() as u16).to_le_bytes());
    for (tag, value) in fields {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(4_u16.to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([0; 4]);
    bytes
}

#[test]
fn bombs_are_refused_by_their_header() {
    let bombs = [("png", png_of(65_535, 65_535)), ("jpg", jpeg_of(65_535, 65_535)), ("webp", webp_bomb())];
    for (name, bytes) in bombs {
        assert_eq!(reason(name, &bytes), Some("image_too_large"), "{name}");
    }
    for (name, bytes) in [
        // Decoders have limits of their own, and may say so first.
        ("png", png_of(0x7fff_ffff, 0x7fff_ffff)),
        ("png", png_of(0x7fff_ffff, 1)),
        ("gif", gif_of(65_535, 65_535)),
        ("tif", tiff_of(65_535, 65_535)),
        ("tif", tiff_of(u32::MAX, u32::MAX)),
    ] {
        let refused = reason(name, &bytes).unwrap();
        assert!(["image_too_large", "bad_image"].contains(&refused), "{name}: {refused}");
    }
}

#[test]
fn damage_is_a_bad_image() {
    let picture = gradient(40, 40);
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    let flipped = |mut bytes: Vec<u8>, from_end: usize| {
        let at = bytes.len() - from_end;
        bytes[at] ^= 0x55;
        bytes
    };
    let mut header_crc = png(&picture);
    header_crc[30] ^= 1;
    let cases = [
        ("png", "nothing", vec![]),
        ("png", "a signature alone", png(&picture)[..8].to_vec()),
        ("png", "half of it", half(png(&picture))),
        ("png", "a wrong checksum of the header", header_crc),
        ("png", "a wrong checksum of the pixels", flipped(png(&picture), 14)),
        ("png", "no width", png_of(0, 8)),
        ("png", "no height", png_of(8, 0)),
        ("png", "more rows than there are", png_of(8, 800)),
        ("jpg", "nothing", vec![]),
        ("jpg", "a mark alone", b"\xff\xd8\xff".to_vec()),
        ("jpg", "half of it", half(jpeg(&picture))),
        ("jpg", "no width", jpeg_of(0, 8)),
        ("jpg", "text", b"<html>404 Not Found</html>".to_vec()),
        ("jpg", "zeros", vec![0; 4096]),
        ("webp", "half of it", half(webp())),
        ("webp", "a container alone", webp()[..12].to_vec()),
        ("webp", "an empty container", b"RIFF\x04\0\0\0WEBP".to_vec()),
        ("gif", "a header alone", b"GIF89a\x01\0\x01\0".to_vec()),
        ("gif", "no size", gif_of(0, 0)),
        ("tif", "a header alone", b"II*\0".to_vec()),
        ("tif", "a directory that is elsewhere", b"II*\0\xff\xff\xff\x7f".to_vec()),
        ("tif", "a directory that leads to itself", b"II*\0\x08\0\0\0\0\0\x08\0\0\0".to_vec()),
        ("tif", "no pixels", tiff_of(8, 8)),
        ("tif", "no size", tiff_of(0, 0)),
    ];
    for (name, what, bytes) in cases {
        assert_eq!(reason(name, &bytes), Some("bad_image"), "{name}: {what}");
    }
}

/// A WebP of two frames, made from one lossless image.
fn animation() -> Vec<u8> {
    let still = webp();
    let chunk = |tag: &[u8], data: &[u8]| -> Vec<u8> {
        let padding = vec![0; data.len() % 2];
        [tag, &(data.len() as u32).to_le_bytes(), data, &padding].concat()
    };
    let size = [15, 0, 0, 15, 0, 0];
    let canvas = chunk(b"VP8X", &[&[0x02, 0, 0, 0], &size[..]].concat());
    let settings = chunk(b"ANIM", &[0; 6]);
    let frame = chunk(b"ANMF", &[&[0; 6], &size[..], &[100, 0, 0, 0], &still[12..]].concat());
    let body = [b"WEBP".to_vec(), canvas, settings, frame.clone(), frame].concat();
    [b"RIFF".to_vec(), (body.len() as u32).to_le_bytes().to_vec(), body].concat()
}

#[test]
fn unusual_images_are_read() {
    let golden = |name: &str| {
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)).unwrap()
    };
    let picture = gradient(40, 40);
    let deep = DynamicImage::from(picture.clone()).into_rgba16();
    let cases = [
        ("jpg", "CMYK", golden("cmyk.jpg")),
        ("jpg", "a PNG under the name of a JPEG", png(&picture)),
        ("png", "a JPEG under the name of a PNG", jpeg(&picture)),
        ("png", "16 bits with transparency", encode(&deep.into(), ImageFormat::Png)),
        ("png", "gray of 16 bits", golden("gray16.png")),
        ("png", "two levels", golden("bilevel.png")),
        ("webp", "an animation", animation()),
        ("jpg", "bytes behind the end", [jpeg(&picture), vec![0xab; 100]].concat()),
        ("png", "bytes behind the end", [png(&picture), vec![0xab; 100]].concat()),
        ("png", "one pixel", png(&gradient(1, 1))),
        ("png", "one row", png(&gradient(3000, 1))),
    ];
    for (name, what, bytes) in cases {
        assert_eq!(reason(name, &bytes), None, "{name}: {what}");
    }
}
