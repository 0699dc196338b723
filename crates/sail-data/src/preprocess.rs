//! The preprocessing that a published vision folder describes: its `preprocessor_config.json`, applied.
//!
//! For pictures of users, one at a time, as transformers' image processors treat them. Training data does
//! not come through here: its tiles follow an `ImageSpec`. `config` reads the file; decoding and resizing are those
//! of training (`image`), which equal Pillow's to the last bit; this module crops, rescales and normalises.
//!
//! The reference is the Pillow backend of transformers 5.17 (`image_processing_backends.py`, `PilBackend`)
//! with Pillow 13. Its torchvision backend, the default where torchvision is installed, resizes a little
//! differently.
//! Pictures become RGB8 whatever `do_convert_rgb` says; alpha is dropped and EXIF orientation is not applied.

mod config;

use std::path::Path;

use crate::error::{BadSample, Error, Result};
use crate::image::{
    Filter, Header, Normaliser, Resized, Size, Treatment, decode, read_file, resize, size_of,
};
use crate::spec::Alpha;
#[cfg(test)]
use crate::spec::ImageSpec;

/// Pixels above which Pillow refuses to open a picture (twice its `MAX_IMAGE_PIXELS`).
const MAX_PIXELS: u64 = 178_956_970;

/// One picture as its encoder takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Pixels {
    /// In pixels.
    pub height: usize,
    /// In pixels.
    pub width: usize,
    /// `[3, height, width]`, row-major, rescaled and normalised.
    pub pixels: Vec<f32>,
}

/// What a `preprocessor_config.json` does to a picture.
///
/// Supported are the classes `BitImageProcessor`, `CLIPImageProcessor`, `SiglipImageProcessor`,
/// `ViTImageProcessor` and `GotOcr2ImageProcessor` (without its patches), also as `...Fast`, `...Pil` and
/// `...FeatureExtractor`. Keys that are missing or null have the class's defaults of transformers 5.17.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocessor {
    resize: Option<Resize>,
    crop: Option<Size>,
    /// `rescale_factor`.
    rescale: Option<f64>,
    normalise: Option<Statistics>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Resize {
    target: Target,
    filter: Filter,
}

/// The size after resizing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Exact(Size),
    /// The shorter edge, in pixels; the aspect ratio stays.
    ShortestEdge(usize),
}

/// Per channel (R, G, B), of rescaled values.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Statistics {
    mean: [f32; 3],
    std: [f32; 3],
}

impl Preprocessor {
    /// Reads a `preprocessor_config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read or is not JSON, [`Error::Preprocessor`] for a key that is
    /// malformed or asks for what is not supported.
    pub fn read(path: &Path) -> Result<Self> {
        config::read(path)
    }

    /// A bicubic resize to a square of `px` pixels without a crop, / 255, normalised: what a model that was trained with
    /// one tile of this size sees.
    pub fn square(px: usize, mean: [f32; 3], std: [f32; 3]) -> Self {
        let target = Target::Exact(Size { height: px, width: px });
        Self {
            resize: Some(Resize { target, filter: Filter::Bicubic }),
            crop: None,
            rescale: Some(1.0 / 255.0),
            normalise: Some(Statistics { mean, std }),
        }
    }

    /// The data specification that makes the very same pixels as one tile: a bicubic resize to a square without
    /// a crop, / 255, normalised, which is what `sail-train` exports. `None` for anything else.
    #[cfg(test)]
    pub(crate) fn image_spec(&self) -> Option<ImageSpec> {
        let Resize { target: Target::Exact(size), filter: Filter::Bicubic } = self.resize? else {
            return None;
        };
        let bytes_to_unit = self.rescale.is_some_and(|scale| scale.to_bits() == (1.0_f64 / 255.0).to_bits());
        let Statistics { mean, std } = self.normalise?;
        (size.height == size.width && self.crop.is_none() && bytes_to_unit).then_some(ImageSpec {
            mean,
            std,
            exif_orientation: false,
            max_pixels: MAX_PIXELS,
            ..ImageSpec::square(size.width, 1)
        })
    }

    /// Preprocesses the bytes of an image file; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Unusable`] when it is no usable picture, or would become one of too many pixels.
    pub fn apply(&self, name: &str, bytes: &[u8]) -> Result<Pixels> {
        self.process(name, bytes).map_err(|cause| Error::Unusable { what: name.to_owned(), cause })
    }

    /// [`apply`](Self::apply) for a file.
    ///
    /// # Errors
    /// As there, and [`Error::Io`] when the file cannot be read.
    pub fn apply_file(&self, path: &Path) -> Result<Pixels> {
        let bytes = read_file(path)?;
        self.apply(&path.display().to_string(), &bytes)
    }

    fn process(&self, name: &str, bytes: &[u8]) -> std::result::Result<Pixels, BadSample> {
        let bad = |detail: String| BadSample::BadImage { image: name.to_owned(), detail };
        let header = Header::read(name, bytes, 0, MAX_PIXELS)?;
        let source = header.size(false);
        let resized = self.resize.map_or(source, |resize| resize.target.of(source));
        if resized.area() as u64 > MAX_PIXELS {
            let Size { height, width } = resized;
            return Err(bad(format!(
                "resizing it to {width}x{height} takes more than the limit of {MAX_PIXELS} pixels"
            )));
        }
        let treatment = Treatment { alpha: Alpha::Drop, turn: false, max_pixels: MAX_PIXELS };
        let image = decode(name, bytes, 0, &header, treatment)?;
        // Without a resize too, because it makes planes.
        let filter = self.resize.map_or(Filter::Bicubic, |resize| resize.filter);
        let mut image = resize(image.as_raw(), size_of(&image), resized, filter);
        let size = self.crop.unwrap_or(resized);
        if size != resized {
            image = Resized::new(center_crop(&image.into_planes(), resized, size), size);
        }
        let mut pixels = Vec::new();
        self.normaliser().push(&mut pixels, &image, (0, 0), size);
        Ok(Pixels { height: size.height, width: size.width, pixels })
    }

    /// Rescaling in f64 and rounding to fp32, then (value - mean) / std in fp32, as transformers does.
    fn normaliser(&self) -> Normaliser {
        let rescaled =
            |value: usize| self.rescale.map_or(value as f32, |scale| (value as f64 * scale) as f32);
        Normaliser(std::array::from_fn(|channel| {
            std::array::from_fn(|value| match self.normalise {
                Some(Statistics { mean, std }) => (rescaled(value) - mean[channel]) / std[channel],
                None => rescaled(value),
            })
        }))
    }
}

impl Target {
    /// The size that a picture of size `source` gets.
    ///
    /// Of the longer edge the fraction is cut off: `get_resize_output_image_size` of transformers'
    /// `image_transforms.py`, and torchvision's `Resize`.
    fn of(self, source: Size) -> Size {
        let Size { height, width } = source;
        match self {
            Self::Exact(size) => size,
            Self::ShortestEdge(edge) if width <= height => {
                Size { height: edge * height / width, width: edge }
            }
            Self::ShortestEdge(edge) => Size { height: edge, width: edge * width / height },
        }
    }
}

/// The middle `size` of planes of size `source`, with black around it where it is smaller.
///
/// Half a pixel too many is cut off at the bottom and right, half a pixel missing is added at the top and
/// left: `center_crop` of transformers' `image_transforms.py`.
fn center_crop(planes: &[u8], source: Size, size: Size) -> Vec<u8> {
    // (first in the source, first in the result, how many), along one axis.
    let overlap = |source: usize, size: usize| {
        (source.saturating_sub(size) / 2, size.saturating_sub(source).div_ceil(2), source.min(size))
    };
    let (from_row, to_row, rows) = overlap(source.height, size.height);
    let (from_column, to_column, columns) = overlap(source.width, size.width);
    let mut cropped = vec![0; 3 * size.area()];
    for (from, to) in planes.chunks_exact(source.area()).zip(cropped.chunks_exact_mut(size.area())) {
        for row in 0..rows {
            let from = &from[(from_row + row) * source.width + from_column..][..columns];
            to[(to_row + row) * size.width + to_column..][..columns].copy_from_slice(from);
        }
    }
    cropped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(height: usize, width: usize) -> Size {
        Size { height, width }
    }

    #[test]
    fn the_longer_edge_is_cut_to_whole_pixels() {
        let cases = [
            (256, size(480, 640), size(256, 341)),
            (256, size(640, 480), size(341, 256)),
            (224, size(7, 12), size(224, 384)),
            (224, size(500, 500), size(224, 224)),
            (3, size(1000, 1), size(3000, 3)),
        ];
        for (edge, source, expected) in cases {
            assert_eq!(Target::ShortestEdge(edge).of(source), expected, "{edge} {source:?}");
        }
        assert_eq!(Target::Exact(size(3, 4)).of(size(100, 1)), size(3, 4));
    }

    #[test]
    fn odd_rests_of_a_crop_fall_on_the_sides_where_transformers_has_them() {
        let row = |values: &[u8]| values.repeat(3);
        let source = row(&[1, 2, 3, 4]);
        for (width, expected) in
            [(3, &[1, 2, 3][..]), (1, &[2]), (5, &[0, 1, 2, 3, 4]), (7, &[0, 0, 1, 2, 3, 4, 0])]
        {
            assert_eq!(center_crop(&source, size(1, 4), size(1, width)), row(expected), "{width} wide");
            assert_eq!(center_crop(&source, size(4, 1), size(width, 1)), row(expected), "{width} high");
        }
    }

    #[test]
    fn a_size_that_no_machine_holds_is_refused_before_decoding() {
        let bytes = crate::testing::png(&crate::testing::gradient(1, 4000));
        let resize = Resize { target: Target::ShortestEdge(4000), filter: Filter::Bilinear };
        let preprocessor = Preprocessor { resize: Some(resize), crop: None, rescale: None, normalise: None };
        let message = match preprocessor.apply("x.png", &bytes).unwrap_err() {
            Error::Unusable { cause, .. } => cause.to_string(),
            other => panic!("{other}"),
        };
        assert!(message.contains("4000x16000000"), "{message}");
    }
}
