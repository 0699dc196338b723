//! What is known of an image before any pixel is decoded: format, frames, size, orientation.
//!
//! A frame is a page of a TIFF file or a picture of an animated GIF or WebP file; other files have one.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{ImageDecoder, ImageFormat, ImageReader};

use super::resize::Size;
use super::{gif, jpeg, tiff, webp};
use crate::error::BadSample;

const SUPPORTED: &str = "JPEG, PNG, WebP, GIF, TIFF and BMP are";

/// The header of one frame.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Header {
    pub(super) format: ImageFormat,
    /// As stored.
    pub(super) size: Size,
    /// How to turn it to have it upright.
    pub(super) orientation: Orientation,
}

impl Header {
    /// Reads the header of a frame.
    ///
    /// # Errors
    /// [`BadSample::BadImage`] for an unknown format, a broken header or a frame that is not there,
    /// [`BadSample::ImageTooLarge`].
    pub(crate) fn read(name: &str, bytes: &[u8], frame: usize, max_pixels: u64) -> Result<Self, BadSample> {
        let bad = |detail: String| BadSample::BadImage { image: name.to_owned(), detail };
        let header = read(bytes, frame).map_err(bad)?;
        let Size { height, width } = header.size;
        if width == 0 || height == 0 {
            return Err(bad(format!("it is {width}x{height} pixels")));
        }
        if width as u64 * height as u64 > max_pixels {
            let (width, height) = (width as u32, height as u32);
            return Err(BadSample::ImageTooLarge {
                image: name.to_owned(),
                width,
                height,
                limit: max_pixels,
            });
        }
        Ok(header)
    }

    /// The size, after turning it upright if `turned`.
    pub(crate) fn size(&self, turned: bool) -> Size {
        let Size { height, width } = self.size;
        match self.orientation {
            Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
                if turned =>
            {
                Size { height: width, width: height }
            }
            _ => self.size,
        }
    }
}

/// Number of frames, from the file's structure alone.
///
/// # Errors
/// [`BadSample::BadImage`] for an unknown format or a broken structure.
pub(crate) fn frame_count(name: &str, bytes: &[u8]) -> Result<usize, BadSample> {
    let bad = |detail: String| BadSample::BadImage { image: name.to_owned(), detail };
    match format(bytes).map_err(bad)? {
        ImageFormat::Gif => gif::frame_count(bytes).map_err(bad),
        ImageFormat::WebP => Ok(webp::frame_count(bytes)),
        ImageFormat::Tiff => tiff::pages(bytes).map_err(bad),
        _ => Ok(1),
    }
}

/// The name may lie; the first bytes decide.
fn format(bytes: &[u8]) -> Result<ImageFormat, String> {
    let format = image::guess_format(bytes).map_err(|_| format!("its format is not known; {SUPPORTED}"))?;
    match format {
        ImageFormat::Jpeg
        | ImageFormat::Png
        | ImageFormat::WebP
        | ImageFormat::Gif
        | ImageFormat::Tiff
        | ImageFormat::Bmp => Ok(format),
        other => Err(format!("{other:?} is not supported; {SUPPORTED}")),
    }
}

fn read(bytes: &[u8], frame: usize) -> Result<Header, String> {
    let format = format(bytes)?;
    let (size, orientation) = match format {
        ImageFormat::Jpeg => {
            let header = jpeg::header(bytes)?;
            (header.size, header.orientation)
        }
        ImageFormat::Tiff => tiff::header(bytes, frame)?,
        _ => other(bytes, format)?,
    };
    let frames = match format {
        // Reading the page has shown that it is there.
        ImageFormat::Tiff => usize::MAX,
        ImageFormat::Gif if frame > 0 => gif::frame_count(bytes)?,
        ImageFormat::WebP if frame > 0 => webp::frame_count(bytes),
        _ => 1,
    };
    if frame >= frames {
        return Err(format!("it has {frames} frames, and frame {frame} (counted from 0) is asked for"));
    }
    Ok(Header { format, size, orientation })
}

fn other(bytes: &[u8], format: ImageFormat) -> Result<(Size, Orientation), String> {
    let reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut decoder = reader.into_decoder().map_err(|e| e.to_string())?;
    let (width, height) = decoder.dimensions();
    // Broken metadata is no reason to lose a picture.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    Ok((Size { height: height as usize, width: width as usize }, orientation))
}
