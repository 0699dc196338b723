//! Image bytes to pixels for the encoder: plan from the header, decode, turn, resize, cut, normalise.
//!
//! JPEG, PNG, WebP, GIF, TIFF and BMP become 8-bit RGB: palette colours are looked up, gray is repeated,
//! 16-bit values are scaled by 255/65535 and rounded, CMYK is converted without a colour profile; alpha and
//! EXIF orientation are treated as the [`ImageSpec`] says. JPEG decoding and resizing equal Pillow 13's to
//! the last bit.
//!
//! | file | what it does |
//! |---|---|
//! | `header` | format, size, orientation and number of frames, without decoding |
//! | `decode` | a frame's pixels, by `jpeg`, `tiff` (with `fax`), `webp` or the `image` crate; `color` to RGB |
//! | `augment` | JPEG compression as an augmentation |
//! | `resize` | Pillow's resize |
//! | `render` | tiles and normalisation |
//! | `strip` | what an encoder sees, as a picture for people |

mod augment;
mod color;
mod decode;
mod fax;
mod gif;
mod header;
mod jpeg;
mod render;
mod resize;
mod strip;
mod tiff;
mod webp;

use std::path::Path;

use bytes::Bytes;
use image::RgbImage;

pub(crate) use decode::{Treatment, decode};
pub(crate) use header::{Header, frame_count};
pub(crate) use render::{Normaliser, size_of};
pub(crate) use resize::{Filter, Resized, Size, resize};
pub use strip::strip;

#[cfg(test)]
pub(crate) use render::push_tiles;

use crate::error::{BadSample, Error, Result};
use crate::rng::Key;
use crate::sample::Images;
use crate::spec::{Alpha, ImageSpec};
use crate::tiling::{Grid, choose_grid, choose_size};

/// How many of a sample's tiles an image may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// It shares them with the other images of the sample, so many in all.
    OneOf(usize),
    /// One: it is a frame of a video.
    Frame,
}

/// What becomes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Tiles(Grid),
    Whole(Size),
}

/// One image of a sample: its pixels are still encoded, its number of visual tokens is known.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    name: String,
    bytes: Bytes,
    frame: usize,
    header: Header,
    layout: Layout,
}

impl Picture {
    /// Plans a frame (page) of an image file from its header; `frame` counts from 0.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub(crate) fn plan(
        name: String,
        bytes: Bytes,
        frame: usize,
        share: Share,
        spec: &ImageSpec,
    ) -> std::result::Result<Self, BadSample> {
        let header = Header::read(&name, &bytes, frame, spec.max_pixels)?;
        let Size { height, width } = header.size(spec.exif_orientation);
        let layout = match (spec.any_resolution, share) {
            (Some(any), _) => {
                let (height, width) = choose_size(height, width, any);
                Layout::Whole(Size { height, width })
            }
            (None, Share::Frame) => Layout::Tiles(Grid::ONE),
            (None, Share::OneOf(images)) => {
                Layout::Tiles(choose_grid(width as u32, height as u32, images, spec.tiling, spec.tile_px))
            }
        };
        Ok(Self { name, bytes, frame, header, layout })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The file's contents.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its size in the file, upright where it is turned.
    pub(crate) fn size(&self, spec: &ImageSpec) -> Size {
        self.header.size(spec.exif_orientation)
    }

    /// How it is cut; an image that is not tiled is one tile.
    pub(crate) fn grid(&self) -> Grid {
        match self.layout {
            Layout::Tiles(grid) => grid,
            Layout::Whole(_) => Grid::ONE,
        }
    }

    /// Visual tokens that the model makes of it.
    pub(crate) fn visual_tokens(&self, spec: &ImageSpec) -> usize {
        match self.layout {
            Layout::Tiles(grid) => grid.tiles() * spec.tokens_per_tile,
            Layout::Whole(size) => spec.tokens_of(size.height, size.width),
        }
    }

    /// Its pixels, upright, without any transparency.
    ///
    /// # Errors
    /// As [`decode`].
    pub(crate) fn decode(&self) -> std::result::Result<RgbImage, BadSample> {
        let treatment = Treatment { alpha: Alpha::Drop, turn: true, max_pixels: u64::MAX };
        decode(&self.name, &self.bytes, self.frame, &self.header, treatment)
    }

    /// Decodes it and appends its tiles, or itself. `key` is the sample's, for augmentation.
    ///
    /// # Errors
    /// As [`decode`].
    pub(crate) fn render(
        &self,
        spec: &ImageSpec,
        key: Key,
        images: &mut Images,
    ) -> std::result::Result<(), BadSample> {
        let treatment =
            Treatment { alpha: spec.alpha, turn: spec.exif_orientation, max_pixels: spec.max_pixels };
        let mut image = decode(&self.name, &self.bytes, self.frame, &self.header, treatment)?;
        if let Some(reencode) = spec.reencode {
            let key = key.with_name(&self.name).with(self.frame as u64);
            image = augment::reencode(image, reencode, key);
        }
        match self.layout {
            Layout::Tiles(grid) => render::push_tiles(&image, grid, spec, images),
            Layout::Whole(size) => render::push_whole(&image, size, spec, images),
        }
        Ok(())
    }
}

impl ImageSpec {
    /// Visual tokens of one rendered tile or image.
    fn tokens_of(&self, height: usize, width: usize) -> usize {
        match self.any_resolution {
            Some(any) => (height / any.unit_px) * (width / any.unit_px),
            None => self.tokens_per_tile,
        }
    }

    /// Visual tokens that the model makes of these images.
    pub fn visual_tokens(&self, images: &Images) -> usize {
        images.sizes.iter().map(|&(height, width)| self.tokens_of(height, width)).sum()
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

/// The first frame of an image file, as the only image of a sample, never compressed again.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Unusable`] when it is no usable image,
/// [`Error::InvalidSpec`].
pub fn load_image(path: &Path, spec: &ImageSpec) -> Result<Images> {
    spec.validate()?;
    let spec = ImageSpec { reencode: None, ..spec.clone() };
    let bytes = read_file(path)?.into();
    let name = path.display().to_string();
    let load = || {
        let mut images = Images::default();
        Picture::plan(name.clone(), bytes, 0, Share::OneOf(1), &spec)?.render(
            &spec,
            Key::new(0),
            &mut images,
        )?;
        Ok(images)
    };
    load().map_err(|cause| Error::Unusable { what: name.clone(), cause })
}
