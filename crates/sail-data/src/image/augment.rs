//! JPEG compression as an augmentation: what the encoder will meet outside has been compressed more than once.

use image::RgbImage;
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress, decompress_to};

use crate::rng::Key;
use crate::spec::Reencode;

/// Compresses an image with the given probability, by `key`, at a uniform quality (4:2:0, as Pillow does by
/// default), and decodes it again. An image of more pixels a side than JPEG has stays as it is.
pub(super) fn reencode(image: RgbImage, reencode: Reencode, key: Key) -> RgbImage {
    let [low, high] = reencode.quality;
    if key.fraction(0) >= reencode.probability {
        return image;
    }
    let quality = low + key.below(1, usize::from(high.saturating_sub(low)) + 1) as u8;
    let (width, height) = image.dimensions();
    let again = compress(
        image.as_raw(),
        width as usize,
        height as usize,
        PixelFormat::Rgb,
        quality,
        Subsampling::S420,
    )
    .and_then(|bytes| decompress_to(&bytes, PixelFormat::Rgb));
    again.ok().and_then(|again| RgbImage::from_raw(width, height, again.data)).unwrap_or(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gradient;

    fn with(probability: f64, quality: [u8; 2], key: u64) -> RgbImage {
        reencode(gradient(50, 37), Reencode { probability, quality }, Key::new(key))
    }

    fn error(image: &RgbImage) -> u64 {
        let original = gradient(50, 37);
        image.as_raw().iter().zip(original.as_raw()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum()
    }

    #[test]
    fn its_probability_and_quality_are_kept_and_its_key_decides() {
        let compressed = (0..200).filter(|&key| error(&with(0.25, [50, 60], key)) > 0).count();
        assert!((30..=70).contains(&compressed), "{compressed} of 200");
        assert_eq!(error(&with(0.0, [1, 1], 0)), 0);
        assert!(error(&with(1.0, [10, 10], 0)) > error(&with(1.0, [90, 90], 0)));
        assert_eq!(with(1.0, [30, 90], 5), with(1.0, [30, 90], 5));
        assert_ne!(with(1.0, [30, 90], 5), with(1.0, [30, 90], 6));
    }
}
