//! Fax data of TIFF strips: CCITT group 3 (one-dimensional) and group 4, by the `fax` crate.

use std::convert::Infallible;

use fax::decoder::{DecodeStatus, Group3Decoder, Group4Decoder};
use image::RgbImage;

use super::resize::Size;

/// How rows are coded.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scheme {
    /// ITU-T T.4, each row by itself.
    Group3,
    /// ITU-T T.6, each row by the one above.
    Group4,
}

/// A strip of `size`. `reversed`: the first pixel is in the lowest bit; `white_is_zero`: as faxes are, else the
/// colours are exchanged.
pub(super) fn decode(
    data: &[u8],
    scheme: Scheme,
    reversed: bool,
    white_is_zero: bool,
    size: Size,
) -> Result<RgbImage, String> {
    let width = u16::try_from(size.width).map_err(|_| "fax of more than 65535 pixels a row")?;
    let bytes =
        data.iter().map(|&byte| Ok::<u8, Infallible>(if reversed { byte.reverse_bits() } else { byte }));
    let truncated = || "the file is truncated or broken: a row of fax data is missing".to_owned();
    let mut pixels = Vec::with_capacity(size.area() * 3);
    let mut push = |changes: &[u16]| push_row(&mut pixels, changes, width, white_is_zero);
    match scheme {
        Scheme::Group4 => {
            let mut decoder = Group4Decoder::new(bytes, width).map_err(|_| truncated())?;
            for _ in 0..size.height {
                match decoder.advance().map_err(|_| truncated())? {
                    DecodeStatus::Incomplete => push(decoder.transition()),
                    // Rows at the end that are white may be left out.
                    DecodeStatus::End => break,
                }
            }
        }
        Scheme::Group3 => {
            let mut decoder = Group3Decoder::new(bytes).map_err(|_| truncated())?;
            for row in 0..size.height {
                let status = decoder.advance();
                // The last row needs no end.
                let whole = row + 1 == size.height && decoder.transitions().last() >= Some(&width);
                if status.is_err() && !whole {
                    return Err(truncated());
                }
                push(decoder.transitions());
                if matches!(status, Ok(DecodeStatus::End)) {
                    break;
                }
            }
        }
    }
    let white = if white_is_zero { 255 } else { 0 };
    pixels.resize(size.area() * 3, white);
    RgbImage::from_raw(size.width as u32, size.height as u32, pixels)
        .ok_or_else(|| "fax of more pixels than there are".into())
}

/// One row, from the places where the colour changes; it begins white.
fn push_row(pixels: &mut Vec<u8>, changes: &[u16], width: u16, white_is_zero: bool) {
    let end = pixels.len() + usize::from(width) * 3;
    let start = pixels.len();
    let mut white = true;
    for &change in changes.iter().chain([&width]) {
        let value = if white == white_is_zero { 255 } else { 0 };
        let until = start + usize::from(change.min(width)) * 3;
        // Changes may go backwards in broken data.
        if until > pixels.len() {
            pixels.resize(until, value);
        }
        white = !white;
    }
    debug_assert_eq!(pixels.len(), end, "invariant: the last change is the width");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_begins_white_and_is_filled_to_its_end() {
        let row = |changes: &[u16], white_is_zero| {
            let mut pixels = Vec::new();
            push_row(&mut pixels, changes, 4, white_is_zero);
            pixels.chunks_exact(3).map(|pixel| pixel[0]).collect::<Vec<u8>>()
        };
        assert_eq!(row(&[], true), [255; 4]);
        assert_eq!(row(&[1, 3], true), [255, 0, 0, 255]);
        assert_eq!(row(&[0, 2], false), [255, 255, 0, 0]);
        assert_eq!(row(&[2, 1, 9], true), [255, 255, 255, 255]);
    }
}
