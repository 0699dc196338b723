//! A decoded image to normalised planes: resize, cut, table look-up.

use image::RgbImage;

use super::resize::{Filter, Resized, Size, resize};
use crate::sample::Images;
use crate::spec::ImageSpec;
use crate::tiling::Grid;

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

    /// Appends the part of an image that begins at (`left`, `top`), as planes.
    pub(crate) fn push(&self, pixels: &mut Vec<f32>, image: &Resized, corner: (usize, usize), part: Size) {
        let (left, top) = corner;
        pixels.reserve(3 * part.area());
        let mut line = vec![0; part.width];
        for (channel, table) in self.0.iter().enumerate() {
            for row in top..top + part.height {
                image.row(channel, row, left, &mut line);
                pixels.extend(line.iter().map(|&value| table[usize::from(value)]));
            }
        }
    }
}

/// Cuts an image into the tiles of `grid`, row by row, and appends them.
pub(crate) fn push_tiles(image: &RgbImage, grid: Grid, spec: &ImageSpec, images: &mut Images) {
    let px = spec.tile_px;
    let tile = Size { height: px, width: px };
    let normaliser = Normaliser::new(spec);
    images.pixels.reserve(grid.tiles() * 3 * tile.area());
    let whole = Size { height: grid.rows * px, width: grid.columns * px };
    let resized = bicubic(image, whole);
    for row in 0..grid.rows {
        for column in 0..grid.columns {
            normaliser.push(&mut images.pixels, &resized, (column * px, row * px), tile);
        }
    }
    if grid.thumbnail {
        normaliser.push(&mut images.pixels, &bicubic(image, tile), (0, 0), tile);
    }
    images.sizes.extend(std::iter::repeat_n((px, px), grid.tiles()));
}

/// Appends an image, resized as a whole.
pub(crate) fn push_whole(image: &RgbImage, size: Size, spec: &ImageSpec, images: &mut Images) {
    Normaliser::new(spec).push(&mut images.pixels, &bicubic(image, size), (0, 0), size);
    images.sizes.push((size.height, size.width));
}

fn bicubic(image: &RgbImage, size: Size) -> Resized {
    resize(image.as_raw(), size_of(image), size, Filter::Bicubic)
}

/// The size of a decoded image.
pub(crate) fn size_of(image: &RgbImage) -> Size {
    Size { height: image.height() as usize, width: image.width() as usize }
}
