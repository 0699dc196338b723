//! Pillow's antialiased resize of 8-bit images, to the last bit: `Resample.c` of Pillow 13.
//!
//! Plain loops for single pictures. Training resizes with `fast_image_resize` (`image.rs`), which is many
//! times faster, has coarser weights (up to two grey levels away from Pillow after two passes) and always
//! starts horizontally, as Pillow before 13 did.

use super::Size;

/// Bits after the point of a weight.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// An interpolation kernel, `resample` in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// Lanczos with three lobes, 1 in files.
    Lanczos,
    /// 2 in files.
    Bilinear,
    /// With a = -0.5, 3 in files.
    Bicubic,
}

impl Filter {
    /// Half the width of the kernel, in pixels of the coarser of the two images.
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        let distance = x.abs();
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Bilinear if distance < 1.0 => 1.0 - distance,
            Self::Bicubic if distance < 1.0 => (1.5 * distance - 2.5) * distance * distance + 1.0,
            Self::Bicubic if distance < 2.0 => (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5,
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    let angle = x * std::f64::consts::PI;
    if angle == 0.0 { 1.0 } else { angle.sin() / angle }
}

/// Resizes `height * width * 3` bytes.
pub(super) fn resize(rgb: Vec<u8>, source: Size, target: Size, filter: Filter) -> Vec<u8> {
    let horizontally = |rgb: Vec<u8>, height: usize| {
        pass(rgb, Axis { outer: height, from: source.width, to: target.width, inner: 3 }, filter)
    };
    let vertically = |rgb: Vec<u8>, width: usize| {
        pass(rgb, Axis { outer: 1, from: source.height, to: target.height, inner: width * 3 }, filter)
    };
    if vertical_first(source, target) {
        horizontally(vertically(rgb, source.width), target.height)
    } else {
        vertically(horizontally(rgb, source.height), target.width)
    }
}

/// Where the height shrinks by more than twice the pixels that the width does. Bytes are rounded and clipped
/// between the passes, so the order shows at sharp edges, by several grey levels.
fn vertical_first(source: Size, target: Size) -> bool {
    let shrinks = |from: usize, to: usize| from as i64 - to as i64;
    let rows = shrinks(source.height, target.height);
    rows > 0 && rows > 2 * shrinks(source.width, target.width)
}

/// An array `[outer, from, inner]` that becomes `[outer, to, inner]`.
#[derive(Clone, Copy)]
struct Axis {
    outer: usize,
    from: usize,
    to: usize,
    inner: usize,
}

fn pass(source: Vec<u8>, axis: Axis, filter: Filter) -> Vec<u8> {
    if axis.from == axis.to {
        return source;
    }
    let taps: Vec<Taps> = (0..axis.to).map(|index| Taps::new(index, axis, filter)).collect();
    let mut target = Vec::with_capacity(axis.outer * axis.to * axis.inner);
    let mut sums = vec![0_i32; axis.inner];
    for block in source.chunks_exact(axis.from * axis.inner) {
        for tap in &taps {
            sums.fill(1 << (PRECISION_BITS - 1));
            let values = block[tap.first * axis.inner..].chunks_exact(axis.inner);
            for (values, weight) in values.zip(&tap.weights) {
                for (sum, &value) in sums.iter_mut().zip(values) {
                    *sum += i32::from(value) * weight;
                }
            }
            target.extend(sums.iter().map(|sum| (sum >> PRECISION_BITS).clamp(0, 255) as u8));
        }
    }
    target
}

/// The source values that make one value of the target.
struct Taps {
    first: usize,
    /// Fixed-point, with a sum of 1 before rounding.
    weights: Vec<i32>,
}

impl Taps {
    fn new(index: usize, axis: Axis, filter: Filter) -> Self {
        let scale = axis.from as f64 / axis.to as f64;
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let center = (index as f64 + 0.5) * scale;
        // Conversions cut off the fraction, and stop at 0.
        let first = (center - support + 0.5) as usize;
        let end = ((center + support + 0.5) as usize).min(axis.from);
        let inverse = 1.0 / filter_scale;
        let weights: Vec<f64> =
            (first..end).map(|at| filter.at((at as f64 - center + 0.5) * inverse)).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |weight: &f64| {
            let scaled = weight / sum * f64::from(1 << PRECISION_BITS);
            (scaled + 0.5_f64.copysign(scaled)) as i32
        };
        Self { first, weights: weights.iter().map(fixed).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_passes_is_that_of_pillow_13() {
        // Found by comparing `Image.resize` with its two passes done one by one.
        let cases = [
            ((33, 90), (28, 76), true),
            ((33, 90), (37, 100), false),
            ((61, 47), (37, 28), false),
            ((61, 47), (64, 30), true),
            ((20, 100), (10, 79), true),
            ((20, 100), (10, 80), false),
            ((33, 90), (34, 89), true),
        ];
        let size = |(width, height)| Size { height, width };
        for (source, target, expected) in cases {
            assert_eq!(vertical_first(size(source), size(target)), expected, "{source:?} to {target:?}");
        }
    }

    #[test]
    fn one_colour_stays_one_colour() {
        for filter in [Filter::Lanczos, Filter::Bilinear, Filter::Bicubic] {
            for (height, width) in [(1, 1), (3, 200), (50, 7)] {
                let source = Size { height: 20, width: 31 };
                let resized = resize(vec![200; 20 * 31 * 3], source, Size { height, width }, filter);
                assert_eq!(resized, vec![200; height * width * 3], "{filter:?} {height}x{width}");
            }
        }
    }
}
