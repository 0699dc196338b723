//! JPEG: the header, whether a file is complete, and pixels equal to libjpeg-turbo's to the last bit.
//!
//! Decoders fill what is missing of a truncated JPEG with gray and say nothing, so the end marker has to be
//! looked for. The segments are walked, because a thumbnail inside the metadata has an end marker of its own.
//! Called by `header` and `decode`, and by `tiff` for strips of JPEG data.

use image::RgbImage;
use image::metadata::Orientation;
use libjpeg_turbo_rs::{ColorSpace, DecodeLimits, Decoder, PixelFormat};

use super::color::cmyk_to_rgb;
use super::resize::Size;

const START_OF_SCAN: u8 = 0xda;
const END_OF_IMAGE: u8 = 0xd9;
const APP1: u8 = 0xe1;

/// Scans of a progressive file; encoders make about ten.
const MAX_SCANS: usize = 200;

/// What the segments before the first scan say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) size: Size,
    pub(super) orientation: Orientation,
}

/// Reads the segments up to the first scan; `Err` says what is missing.
pub(super) fn header(bytes: &[u8]) -> Result<Header, String> {
    let (mut size, mut orientation) = (None, None);
    let mut at = 2;
    while let Some(marker) = next_marker(bytes, &mut at) {
        if matches!(marker, START_OF_SCAN | END_OF_IMAGE) {
            break;
        }
        if has_no_length(marker) {
            continue;
        }
        let Some(payload) = payload(bytes, at) else { break };
        match marker {
            APP1 if orientation.is_none() => {
                orientation = payload.strip_prefix(b"Exif\0\0").and_then(Orientation::from_exif_chunk);
            }
            _ if is_frame(marker) => size = Some(frame_size(payload)?),
            _ => {}
        }
        at += payload.len() + 2;
    }
    let size = size.ok_or("the file is truncated: it has no frame header")?;
    Ok(Header { size, orientation: orientation.unwrap_or(Orientation::NoTransforms) })
}

/// Whether the marker begins a frame header: SOF0 to SOF15.
fn is_frame(marker: u8) -> bool {
    matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc)
}

/// The size in a frame header: precision, height, width, number of components, then three bytes for each.
fn frame_size(payload: &[u8]) -> Result<Size, String> {
    let [_, h1, h0, w1, w0, components, rest @ ..] = payload else {
        return Err("its frame header is too short".into());
    };
    let factors: Vec<u8> = rest.chunks_exact(3).take(usize::from(*components)).map(|c| c[1]).collect();
    check_sampling(&factors)?;
    let number = |high: u8, low: u8| usize::from(u16::from_be_bytes([high, low]));
    Ok(Size { height: number(*h1, *h0), width: number(*w1, *w0) })
}

/// Refuses layouts of four components that no encoder writes and that `libjpeg-turbo-rs` panics at: colours
/// finer than the first component, or a black of other factors than it.
fn check_sampling(factors: &[u8]) -> Result<(), String> {
    let split = |factor: u8| (factor >> 4, factor & 15);
    if let &[first, .., black] = factors
        && factors.len() == 4
    {
        let (most_h, most_v) = split(first);
        let finer = factors.iter().any(|&factor| split(factor).0 > most_h || split(factor).1 > most_v);
        if finer || black != first {
            return Err(format!("its four components have the sampling factors {factors:x?}"));
        }
    }
    Ok(())
}

/// Whether the end marker is reached from the beginning of `bytes`, which are those of a JPEG file.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(marker) = next_marker(bytes, &mut at) {
        match marker {
            END_OF_IMAGE => return true,
            _ if has_no_length(marker) => {}
            _ => {
                let Some(length) = bytes.get(at..at + 2) else { return false };
                at += usize::from(u16::from_be_bytes([length[0], length[1]]));
                if marker == START_OF_SCAN && at >= bytes.len() {
                    return false;
                }
            }
        }
    }
    false
}

/// Restart markers and other markers without a length.
fn has_no_length(marker: u8) -> bool {
    matches!(marker, 0x01 | 0xd0..=0xd8)
}

/// The bytes of a segment whose length is at `at`.
fn payload(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let length = bytes.get(at..at + 2)?;
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    bytes.get(at + 2..at + length.max(2))
}

/// The next marker's code, with `at` moved behind it. Data between markers is passed over: in coded data an
/// 0xff is always followed by 0x00.
fn next_marker(bytes: &[u8], at: &mut usize) -> Option<u8> {
    loop {
        *at += bytes.get(*at..)?.iter().position(|&byte| byte == 0xff)? + 1;
        let code = *bytes.get(*at)?;
        // Any number of 0xff may stand before a marker.
        if code != 0x00 && code != 0xff {
            *at += 1;
            return Some(code);
        }
    }
}

/// All pixels. CMYK and YCCK are taken as inverted, which Adobe's are and Pillow assumes of all.
pub(super) fn decode(bytes: &[u8], max_pixels: u64, max_bytes: u64) -> Result<RgbImage, String> {
    header(bytes)?;
    if !is_complete(bytes) {
        return Err("the file is truncated: it has no end marker".into());
    }
    let mut limits = DecodeLimits::default();
    (limits.max_pixels, limits.max_scans, limits.max_memory) = (max_pixels, MAX_SCANS, Some(max_bytes));
    let decoder = Decoder::new_with_limits(bytes, limits).map_err(|e| e.to_string())?;
    let four = matches!(decoder.jpeg_color_space(), ColorSpace::Cmyk | ColorSpace::Ycck);
    let format = if four { PixelFormat::Cmyk } else { PixelFormat::Rgb };
    let image = decoder.with_output_format(format).decode_image().map_err(|e| e.to_string())?;
    let (width, height) = (image.width as u32, image.height as u32);
    let pixels = if four {
        let ink = |pixel: &[u8]| cmyk_to_rgb(std::array::from_fn(|channel| 255 - pixel[channel]));
        image.data.chunks_exact(4).flat_map(ink).collect()
    } else {
        image.data
    };
    RgbImage::from_raw(width, height, pixels).ok_or_else(|| "it has fewer pixels than its header says".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gradient, jpeg};

    #[test]
    fn every_truncation_is_noticed() {
        let bytes = jpeg(&gradient(40, 30));
        assert!(is_complete(&bytes));
        for length in 2..bytes.len() - 1 {
            assert!(!is_complete(&bytes[..length]), "{length} of {}", bytes.len());
        }
        assert!(is_complete(&[&bytes[..], b"trailing"].concat()));
    }

    #[test]
    fn the_end_marker_of_a_thumbnail_does_not_count() {
        let bytes = jpeg(&gradient(40, 30));
        let thumbnail = [0xff, 0xe1, 0x00, 0x06, 0xff, 0xd8, 0xff, 0xd9];
        let with_thumbnail = [&bytes[..2], &thumbnail, &bytes[2..]].concat();
        assert!(is_complete(&with_thumbnail));
        assert!(!is_complete(&with_thumbnail[..with_thumbnail.len() - 2]));
    }

    #[test]
    fn four_components_that_no_encoder_writes_are_refused() {
        for good in [&[0x11][..], &[0x22, 0x11, 0x11], &[0x21; 3], &[0x11; 4], &[0x22, 0x11, 0x11, 0x22]] {
            assert_eq!(check_sampling(good), Ok(()), "{good:x?}");
        }
        for bad in [[0x41, 0x11, 0x11, 0x11], [0x11, 0x34, 0x11, 0x11], [0x11, 0x11, 0x11, 0x22]] {
            assert!(check_sampling(&bad).is_err(), "{bad:x?}");
        }
    }
}
