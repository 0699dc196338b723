//! What an encoder sees, as a picture for people.

use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress};

use crate::sample::Images;
use crate::spec::ImageSpec;

/// Most pixels of a side of an image in a picture.
const SIDE: usize = 224;
/// Most images of a picture.
const MOST: usize = 16;
const QUALITY: u8 = 85;
/// Around images that are not as high as the highest.
const GRAY: u8 = 128;

/// The first 16 of `images`, tiles or whole ones, side by side as a JPEG file: what the encoder sees, of longer sides every
/// second pixel, or every third, so that none has more than 224. `None` where there is none.
pub fn strip(images: &Images, spec: &ImageSpec) -> Option<Vec<u8>> {
    let every = |(height, width): (usize, usize)| height.max(width).div_ceil(SIDE);
    let reduced = |size: (usize, usize)| (size.0.div_ceil(every(size)), size.1.div_ceil(every(size)));
    let sizes: Vec<(usize, usize)> = images.sizes.iter().take(MOST).map(|size| reduced(*size)).collect();
    let (height, width) =
        (sizes.iter().map(|size| size.0).max().unwrap_or(0), sizes.iter().map(|size| size.1).sum::<usize>());
    if height == 0 {
        return None;
    }
    let mut picture = vec![GRAY; 3 * height * width];
    let mut left = 0;
    for ((size, pixels), (rows, columns)) in images.iter().zip(sizes) {
        for y in 0..rows {
            for x in 0..columns {
                for channel in 0..3 {
                    let from = (channel * size.0 + y * every(size)) * size.1 + x * every(size);
                    let value = (pixels[from] * spec.std[channel] + spec.mean[channel]) * 255.0;
                    // Saturates at both ends.
                    picture[3 * (y * width + left + x) + channel] = value.round() as u8;
                }
            }
        }
        left += columns;
    }
    let jpeg = compress(&picture, width, height, PixelFormat::Rgb, QUALITY, Subsampling::S420);
    Some(jpeg.expect("invariant: far fewer pixels than JPEG has"))
}

#[cfg(test)]
mod tests {
    use libjpeg_turbo_rs::decompress_to;

    use super::*;

    #[test]
    fn a_picture_shows_all_images_as_they_are_and_large_ones_smaller() {
        let spec = ImageSpec { mean: [0.5; 3], std: [0.25, 0.25, 0.5], ..ImageSpec::square(16, 1) };
        // One of 0.25, 0.75 and 1.0, and one that is black.
        let bright = [-1.0, 1.0, 1.0].map(|value| vec![value; 20 * 30]).concat();
        let black = [-2.0, -2.0, -1.0].map(|value| vec![value; 450 * 300]).concat();
        let images = Images { sizes: vec![(20, 30), (450, 300)], pixels: [bright, black].concat() };
        let picture = strip(&images, &spec).unwrap();
        let found = decompress_to(&picture, PixelFormat::Rgb).unwrap();
        assert_eq!((found.width, found.height), (30 + 100, 150));
        let at = |x: usize, y: usize| &found.data[3 * (y * found.width + x)..][..3];
        let near = |x, y, colour: [u8; 3]| at(x, y).iter().zip(colour).all(|(a, b)| a.abs_diff(b) < 6);
        assert!(near(8, 8, [64, 191, 255]) && near(100, 100, [0; 3]) && near(8, 100, [GRAY; 3]));
        assert_eq!(strip(&Images::default(), &spec), None);
    }
}
