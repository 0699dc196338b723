//! Colours of every kind to 8-bit RGB, with the arithmetic of Pillow.

use image::{DynamicImage, RgbImage};

use crate::spec::Alpha;

/// a * b / 255, rounded: Pillow's `MULDIV255`.
fn times(a: u8, b: u8) -> u8 {
    over_255(u32::from(a) * u32::from(b))
}

/// n / 255, rounded.
fn over_255(n: u32) -> u8 {
    let n = n + 128;
    (((n >> 8) + n) >> 8) as u8
}

/// Inks to light, without a colour profile: Pillow's `cmyk2rgb`.
pub(super) fn cmyk_to_rgb([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    let light = 255 - k;
    [c, m, y].map(|ink| light - times(ink, light))
}

/// RGB without its transparency.
pub(super) fn flatten(image: DynamicImage, alpha: Alpha) -> RgbImage {
    let Alpha::Over(below) = alpha else { return image.into_rgb8() };
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    let (width, height) = rgba.dimensions();
    let over = |pixel: &[u8]| {
        let opaque = u32::from(pixel[3]);
        std::array::from_fn::<u8, 3, _>(|channel| {
            over_255(u32::from(pixel[channel]) * opaque + u32::from(below[channel]) * (255 - opaque))
        })
    };
    let pixels = rgba.as_raw().chunks_exact(4).flat_map(over).collect();
    RgbImage::from_raw(width, height, pixels).expect("invariant: three bytes for each pixel of four")
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgba, RgbaImage};

    #[test]
    fn transparency_is_dropped_or_shows_what_is_below() {
        let pixel = |alpha| DynamicImage::from(RgbaImage::from_pixel(1, 1, Rgba([200, 100, 0, alpha])));
        let of = |alpha, how| flatten(pixel(alpha), how).into_raw();
        assert_eq!(of(0, Alpha::Drop), [200, 100, 0]);
        let white = Alpha::Over([255; 3]);
        assert_eq!(of(0, white), [255; 3]);
        assert_eq!(of(255, white), [200, 100, 0]);
        assert_eq!(of(128, white), [227, 177, 127]);
        assert_eq!(of(128, Alpha::Over([0, 10, 20])), [100, 55, 10]);
    }

    #[test]
    fn inks_take_light_away() {
        assert_eq!(cmyk_to_rgb([0; 4]), [255; 3]);
        assert_eq!(cmyk_to_rgb([0, 0, 0, 255]), [0; 3]);
        assert_eq!(cmyk_to_rgb([255, 0, 128, 0]), [0, 255, 127]);
        assert_eq!(cmyk_to_rgb([100, 0, 0, 100]), [94, 155, 155]);
    }
}
