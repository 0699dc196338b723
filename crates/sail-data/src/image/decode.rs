//! One frame of an encoded image as 8-bit RGB, upright.

use std::io::Cursor;

use image::codecs::gif::GifDecoder;
use image::{
    AnimationDecoder, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage,
};

use super::color::flatten;
use super::header::Header;
use super::{jpeg, tiff, webp};
use crate::error::BadSample;
use crate::spec::Alpha;

/// How a decoded image is treated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Treatment {
    pub(crate) alpha: Alpha,
    /// Turn it as its EXIF orientation says.
    pub(crate) turn: bool,
    /// Images with more pixels have been refused; bounds the memory that decoding takes.
    pub(crate) max_pixels: u64,
}

/// The frame whose header was read.
///
/// # Errors
/// [`BadSample::BadImage`] when the data is truncated or broken.
pub(crate) fn decode(
    name: &str,
    bytes: &[u8],
    frame: usize,
    header: &Header,
    treatment: Treatment,
) -> Result<RgbImage, BadSample> {
    let max_pixels = treatment.max_pixels;
    // 16-bit RGBA has 8 bytes a pixel, and decoders hold a second buffer.
    let max_bytes = max_pixels.saturating_mul(16).saturating_add(1 << 20);
    let image = match header.format {
        ImageFormat::Jpeg => jpeg::decode(bytes, max_pixels, max_bytes).map(DynamicImage::from),
        ImageFormat::Tiff => tiff::decode(bytes, frame, max_pixels, max_bytes),
        _ => other(bytes, frame, header, max_bytes),
    };
    let turned = image.map(|mut image| {
        if treatment.turn {
            image.apply_orientation(header.orientation);
        }
        flatten(image, treatment.alpha)
    });
    turned.map_err(|detail| BadSample::BadImage { image: name.to_owned(), detail })
}

/// PNG, WebP, GIF or BMP.
fn other(bytes: &[u8], frame: usize, header: &Header, max_bytes: u64) -> Result<DynamicImage, String> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(max_bytes);
    if header.format == ImageFormat::Gif && frame > 0 {
        return later_gif_frame(bytes, frame, limits).map_err(|e| e.to_string());
    }
    if header.format == ImageFormat::WebP {
        let size = (header.size.width as u32, header.size.height as u32);
        if let Some(picture) = webp::decode(bytes, frame, size, &limits)? {
            return Ok(picture);
        }
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), header.format);
    reader.limits(limits);
    reader.decode().map_err(|e| e.to_string())
}

/// Later frames of an animation are changes to earlier ones, so these are decoded too.
fn later_gif_frame(bytes: &[u8], frame: usize, limits: Limits) -> Result<DynamicImage, ImageError> {
    let mut decoder = GifDecoder::new(Cursor::new(bytes))?;
    decoder.set_limits(limits)?;
    let mut frames = decoder.into_frames();
    for _ in 0..frame {
        frames.next().transpose()?;
    }
    let missing = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
    let frame = frames.next().transpose()?.ok_or(ImageError::IoError(missing))?;
    Ok(frame.into_buffer().into())
}
