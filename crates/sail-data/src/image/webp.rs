//! Animated WebP: how many frames there are, and one of them, composed as libwebp's `WebPAnimDecoder` does.
//!
//! The container is walked here, each frame's data is decoded by the `image` crate as a still picture, so that
//! frames before the last one that covers the whole picture are not decoded, and blending leaves what it should.

use std::io::Cursor;

use image::codecs::webp::WebPDecoder;
use image::{DynamicImage, Limits, Rgba, RgbaImage};

/// Flags of a frame.
const DISPOSE: u8 = 1;
const NO_BLENDING: u8 = 2;
/// Flag of the header: there is transparency.
const ALPHA: u8 = 0x10;

/// One `ANMF` chunk.
#[derive(Clone, Copy, Debug)]
struct Frame<'a> {
    left: u32,
    top: u32,
    width: u32,
    height: u32,
    flags: u8,
    /// The chunks of a still picture.
    data: &'a [u8],
}

/// Number of frames; 1 without an animation.
pub(super) fn frame_count(bytes: &[u8]) -> usize {
    chunks(bytes.get(12..).unwrap_or_default()).filter(|(name, _)| *name == b"ANMF").count().max(1)
}

/// A frame of an animation, or `None` for a still picture. `size` is that of the header.
pub(super) fn decode(
    bytes: &[u8],
    frame: usize,
    (width, height): (u32, u32),
    limits: &Limits,
) -> Result<Option<DynamicImage>, String> {
    let chunks = chunks(bytes.get(12..).unwrap_or_default()).filter(|(name, _)| *name == b"ANMF");
    let frames: Vec<Frame> = chunks.take(frame + 1).filter_map(|(_, data)| Frame::parse(data)).collect();
    if frames.is_empty() {
        return Ok(None);
    }
    if frames.len() <= frame {
        return Err(format!("the file is truncated or broken in frame {} (counted from 0)", frames.len()));
    }
    let whole = |frame: &Frame| {
        (frame.left, frame.top, frame.width, frame.height, frame.flags & NO_BLENDING)
            == (0, 0, width, height, NO_BLENDING)
    };
    let first = frames.iter().rposition(whole).unwrap_or(0);
    let mut canvas = RgbaImage::new(width, height);
    let mut before: Option<&Frame> = None;
    for frame in &frames[first..] {
        if let Some(before) = before.filter(|before| before.flags & DISPOSE != 0) {
            before.for_each(|x, y| canvas.put_pixel(x, y, Rgba([0; 4])));
        }
        frame.check_inside(width, height)?;
        let picture = frame.decode(limits)?;
        frame.for_each(|x, y| {
            let above = *picture.get_pixel(x - frame.left, y - frame.top);
            let below = canvas.get_pixel_mut(x, y);
            *below = if frame.flags & NO_BLENDING == 0 { blend(above, *below) } else { above };
        });
        before = Some(frame);
    }
    Ok(Some(canvas.into()))
}

impl<'a> Frame<'a> {
    /// Place and size in 24 bits each (places halved, sizes less 1), the duration, flags.
    fn parse(chunk: &'a [u8]) -> Option<Self> {
        let number = |at: usize| {
            let bytes = chunk.get(at..at + 3)?;
            Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]))
        };
        Some(Self {
            left: number(0)? * 2,
            top: number(3)? * 2,
            width: number(6)? + 1,
            height: number(9)? + 1,
            flags: *chunk.get(15)?,
            data: &chunk[16..],
        })
    }

    fn check_inside(&self, width: u32, height: u32) -> Result<(), String> {
        if self.left + self.width > width || self.top + self.height > height {
            return Err("a frame reaches beyond the picture".into());
        }
        Ok(())
    }

    fn for_each(&self, mut pixel: impl FnMut(u32, u32)) {
        for y in self.top..self.top + self.height {
            for x in self.left..self.left + self.width {
                pixel(x, y);
            }
        }
    }

    /// The frame as a file of its own.
    fn decode(&self, limits: &Limits) -> Result<RgbaImage, String> {
        let mut chunks = Vec::with_capacity(self.data.len() + 18);
        if self.data.starts_with(b"ALPH") {
            chunks.extend(b"VP8X\x0a\0\0\0");
            chunks.extend([ALPHA, 0, 0, 0]);
            for side in [self.width, self.height] {
                chunks.extend(&(side - 1).to_le_bytes()[..3]);
            }
        }
        chunks.extend(self.data);
        let length = (chunks.len() as u32 + 4).to_le_bytes();
        let file = [&b"RIFF"[..], &length, b"WEBP", &chunks].concat();
        let mut decoder = WebPDecoder::new(Cursor::new(file)).map_err(|e| e.to_string())?;
        image::ImageDecoder::set_limits(&mut decoder, limits.clone()).map_err(|e| e.to_string())?;
        let picture = DynamicImage::from_decoder(decoder).map_err(|e| e.to_string())?.into_rgba8();
        if picture.dimensions() != (self.width, self.height) {
            return Err("a frame has another size than its header says".into());
        }
        Ok(picture)
    }
}

/// Colours that are not multiplied by their opacity, as libwebp blends them.
fn blend(above: Rgba<u8>, below: Rgba<u8>) -> Rgba<u8> {
    let [opaque, under] = [above, below].map(|pixel| u32::from(pixel.0[3]));
    match (opaque, under) {
        (0, _) => below,
        (255, _) | (_, 0) => above,
        _ => {
            let under = (under * (256 - opaque)) >> 8;
            let both = opaque + under;
            let scale = (1 << 24) / both;
            let colour = |channel: usize| {
                let sum = u32::from(above.0[channel]) * opaque + u32::from(below.0[channel]) * under;
                ((u64::from(sum) * u64::from(scale)) >> 24) as u8
            };
            Rgba([colour(0), colour(1), colour(2), both as u8])
        }
    }
}

/// The specification of the container: chunks of a name, a length and data padded to an even number of bytes.
fn chunks(mut rest: &[u8]) -> impl Iterator<Item = (&[u8; 4], &[u8])> {
    std::iter::from_fn(move || {
        let (name, after) = rest.split_first_chunk::<4>()?;
        let (length, after) = after.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let data = &after[..length.min(after.len())];
        rest = after.get(length.saturating_add(length % 2)..).unwrap_or_default();
        Some((name, data))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_longer_than_the_file_ends_the_walk() {
        let chunk = |name: &[u8; 4], length: u32| [&name[..], &length.to_le_bytes()].concat();
        let file =
            [b"RIFF....WEBP".to_vec(), chunk(b"ANMF", 1), vec![0; 2], chunk(b"ANMF", u32::MAX)].concat();
        assert_eq!(frame_count(&file), 2);
        assert_eq!(frame_count(b"RIFF"), 1);
    }

    #[test]
    fn what_is_clear_changes_nothing_and_what_is_not_hides_all() {
        let (red, gray) = (Rgba([200, 1, 3, 255]), Rgba([7, 7, 7, 255]));
        assert_eq!(blend(Rgba([200, 1, 3, 0]), gray), gray);
        assert_eq!(blend(red, gray), red);
        assert_eq!(blend(Rgba([9, 9, 9, 90]), Rgba([0; 4])), Rgba([9, 9, 9, 90]));
        let half = blend(Rgba([200, 0, 100, 128]), Rgba([0, 200, 100, 255]));
        assert!(half.0.iter().zip([100, 99, 99, 255]).all(|(a, b)| a.abs_diff(b) <= 1), "{half:?}");
    }
}
