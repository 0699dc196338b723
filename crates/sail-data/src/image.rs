//! Image bytes to tiles: header check, decoding to RGB8, resize, cut, normalise.
//!
//! Everything becomes 8-bit RGB: palette colours are looked up, gray is repeated, 16-bit values are scaled by
//! 255/65535 and rounded, CMYK is converted without a colour profile, and alpha is dropped, not composited,
//! as the published SAIL-VL code does. EXIF orientation is not applied.

use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use fast_image_resize::images::{Image as ResizedImage, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{ImageFormat, ImageReader, Limits, RgbImage};

use crate::error::{BadSample, Error, Result};
use crate::jpeg;
use crate::sample::Tiles;
use crate::spec::ImageSpec;
use crate::tiling::{Grid, choose_grid};

/// Width and height from the header, without decoding any pixel.
///
/// # Errors
/// [`BadSample::BadImage`] for an unknown format or a broken header, [`BadSample::ImageTooLarge`].
pub(crate) fn read_size(
    name: &str,
    bytes: &[u8],
    max_pixels: u64,
) -> std::result::Result<(u32, u32), BadSample> {
    let bad = |detail: String| BadSample::BadImage { image: name.to_owned(), detail };
    let (width, height) = reader(name, bytes)?.into_dimensions().map_err(|e| bad(e.to_string()))?;
    if width == 0 || height == 0 {
        return Err(bad(format!("it is {width}x{height} pixels")));
    }
    if u64::from(width) * u64::from(height) > max_pixels {
        return Err(BadSample::ImageTooLarge { image: name.to_owned(), width, height, limit: max_pixels });
    }
    Ok((width, height))
}

/// The whole image as RGB8. Call [`read_size`] before, which bounds the memory that this takes.
///
/// # Errors
/// [`BadSample::BadImage`] when the data is truncated or broken.
pub(crate) fn decode(name: &str, bytes: &[u8], max_pixels: u64) -> std::result::Result<RgbImage, BadSample> {
    let bad = |detail: String| BadSample::BadImage { image: name.to_owned(), detail };
    let mut reader = reader(name, bytes)?;
    if reader.format() == Some(ImageFormat::Jpeg) && !jpeg::is_complete(bytes) {
        return Err(bad("the file is truncated: it has no end marker".into()));
    }
    let mut limits = Limits::default();
    // 16-bit RGBA has 8 bytes a pixel, and decoders hold a second buffer.
    limits.max_alloc = Some(max_pixels.saturating_mul(16).saturating_add(1 << 20));
    reader.limits(limits);
    Ok(reader.decode().map_err(|e| bad(e.to_string()))?.into_rgb8())
}

fn reader<'a>(name: &str, bytes: &'a [u8]) -> std::result::Result<ImageReader<Cursor<&'a [u8]>>, BadSample> {
    let bad = |detail: String| BadSample::BadImage { image: name.to_owned(), detail };
    // The name may lie; the first bytes decide.
    let reader = ImageReader::new(Cursor::new(bytes));
    let reader = reader.with_guessed_format().map_err(|e| bad(e.to_string()))?;
    match reader.format() {
        Some(ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP) => Ok(reader),
        Some(other) => Err(bad(format!("{other:?} is not supported; JPEG, PNG and WebP are"))),
        None => Err(bad("its format is not known; JPEG, PNG and WebP are supported".into())),
    }
}

/// Pillow's antialiased bicubic resize (a = -0.5).
///
/// One direction after the other, as Pillow does: the values between the two are rounded and clipped to
/// bytes, so another order gives other pixels at edges.
pub(crate) fn resize(image: &RgbImage, width: usize, height: usize) -> std::result::Result<Vec<u8>, String> {
    let source = ImageRef::new(image.width(), image.height(), image.as_raw(), PixelType::U8x3)
        .map_err(|e| e.to_string())?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    let mut resizer = Resizer::new();
    let mut wide = ResizedImage::new(width as u32, image.height(), PixelType::U8x3);
    resizer.resize(&source, &mut wide, &options).map_err(|e| e.to_string())?;
    let mut target = ResizedImage::new(width as u32, height as u32, PixelType::U8x3);
    resizer.resize(&wide, &mut target, &options).map_err(|e| e.to_string())?;
    Ok(target.into_vec())
}

/// Normalised value of each byte, per channel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Normaliser(pub(crate) [[f32; 256]; 3]);

impl Normaliser {
    /// (value / 255 - mean) / std, in fp32 in this order.
    fn new(spec: &ImageSpec) -> Self {
        Self(std::array::from_fn(|channel| {
            let (mean, std) = (spec.mean[channel], spec.std[channel]);
            std::array::from_fn(|value| (value as f32 / 255.0 - mean) / std)
        }))
    }

    /// A whole RGB image, as planes.
    pub(crate) fn planes(&self, rgb: &[u8]) -> Vec<f32> {
        let plane = |(channel, table): (usize, &[f32; 256])| {
            let bytes = rgb.iter().skip(channel).step_by(3);
            bytes.map(|&value| table[usize::from(value)]).collect::<Vec<f32>>()
        };
        self.0.iter().enumerate().flat_map(plane).collect()
    }

    /// Appends the `px` x `px` tile at (`left`, `top`) of an RGB image of `width` pixels a row, as planes.
    fn push_tile(&self, pixels: &mut Vec<f32>, rgb: &[u8], width: usize, corner: (usize, usize), px: usize) {
        let (left, top) = corner;
        for (channel, table) in self.0.iter().enumerate() {
            for row in top..top + px {
                let start = (row * width + left) * 3;
                let line = &rgb[start..start + px * 3];
                pixels.extend(line.iter().skip(channel).step_by(3).map(|&value| table[usize::from(value)]));
            }
        }
    }
}

/// Cuts an image into the tiles of `grid`, row by row, and appends them to `tiles`.
pub(crate) fn cut(
    name: &str,
    image: &RgbImage,
    grid: Grid,
    spec: &ImageSpec,
    tiles: &mut Tiles,
) -> std::result::Result<(), BadSample> {
    let bad = |detail: String| BadSample::BadImage { image: name.to_owned(), detail };
    let px = spec.tile_px;
    let normaliser = Normaliser::new(spec);
    tiles.pixels.reserve(grid.tiles() * 3 * px * px);
    let width = grid.columns * px;
    let resized = resize(image, width, grid.rows * px).map_err(bad)?;
    for row in 0..grid.rows {
        for column in 0..grid.columns {
            normaliser.push_tile(&mut tiles.pixels, &resized, width, (column * px, row * px), px);
        }
    }
    if grid.thumbnail {
        let thumbnail = resize(image, px, px).map_err(bad)?;
        normaliser.push_tile(&mut tiles.pixels, &thumbnail, px, (0, 0), px);
    }
    tiles.n += grid.tiles();
    Ok(())
}

/// How much of a sample's tiles an image may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// That of one of so many images.
    OneOf(usize),
    /// One tile, as a frame of a video.
    Frame,
}

/// Frames or pages of an image.
///
/// # Errors
/// [`BadSample::BadImage`] for an unknown format.
pub(crate) fn frame_count(name: &str, bytes: &[u8]) -> std::result::Result<usize, BadSample> {
    reader(name, bytes).map(|_| 1)
}

/// One image of a sample: its pixels are still encoded, its number of visual tokens is known.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    name: String,
    bytes: Arc<[u8]>,
    grid: Grid,
}

impl Picture {
    /// Plans an image of a sample from its header.
    ///
    /// # Errors
    /// As [`read_size`].
    pub(crate) fn plan(
        name: String,
        bytes: Arc<[u8]>,
        frame: usize,
        share: Share,
        spec: &ImageSpec,
    ) -> std::result::Result<Self, BadSample> {
        if frame > 0 {
            let detail = format!("frame {frame} is asked for; frames are not supported yet");
            return Err(BadSample::BadImage { image: name, detail });
        }
        let (width, height) = read_size(&name, &bytes, spec.max_pixels)?;
        let grid = match share {
            Share::OneOf(count) => choose_grid(width, height, count, spec.tiling, spec.tile_px),
            Share::Frame => Grid { columns: 1, rows: 1, thumbnail: false },
        };
        Ok(Self { name, bytes, grid })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The file's contents.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How it is cut.
    pub(crate) fn grid(&self) -> Grid {
        self.grid
    }

    /// Visual tokens that the model makes of it.
    pub(crate) fn visual_tokens(&self, spec: &ImageSpec) -> usize {
        self.grid.tiles() * spec.tokens_per_tile
    }

    /// Decodes it and appends its tiles.
    ///
    /// # Errors
    /// As [`decode`].
    pub(crate) fn render(&self, spec: &ImageSpec, tiles: &mut Tiles) -> std::result::Result<(), BadSample> {
        let image = decode(&self.name, &self.bytes, spec.max_pixels)?;
        cut(&self.name, &image, self.grid, spec, tiles)
    }
}

/// A regular file's contents: a pipe or a device may never end.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let failed = |cause| Error::Io { path: path.to_path_buf(), cause };
    if std::fs::metadata(path).map_err(failed)?.is_file() {
        return std::fs::read(path).map_err(failed);
    }
    Err(failed(std::io::Error::other("not a regular file")))
}

/// One image file as tiles `[n, 3, px, px]`, tiled as the only image of a sample.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Unusable`] when it is no usable image,
/// [`Error::InvalidSpec`].
pub fn load_image(path: &Path, spec: &ImageSpec) -> Result<Tiles> {
    spec.validate()?;
    let bytes = read_file(path)?;
    let name = path.display().to_string();
    let load = || {
        let mut tiles = Tiles::none(spec.tile_px);
        Picture::plan(name.clone(), bytes.into(), 0, Share::OneOf(1), spec)?.render(spec, &mut tiles)?;
        Ok(tiles)
    };
    load().map_err(|cause| Error::Unusable { what: name.clone(), cause })
}
