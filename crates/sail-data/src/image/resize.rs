//! Pillow's antialiased resize of 8-bit images, to the last bit: `Resample.c` of Pillow 13.
//!
//! Plain integer loops over blocks of a fixed width, compiled for the widest vectors that the processor has
//! (`pulp` dispatches). Interleaved RGB goes in, planes come out: the vertical pass does not care, and the
//! horizontal pass turns blocks of rows on their side, so that both passes add up whole rows of values, and
//! turns them back into planes at no extra cost. Called by `render` for training and by `preprocess`.

#![expect(clippy::inline_always, reason = "only what is inlined is compiled for the vectors of `pulp`")]

use pulp::{Arch, NullaryFnOnce};

/// Bits after the point of a weight.
const PRECISION_BITS: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (PRECISION_BITS - 1);
/// Values that are added up side by side: few enough for the compiler to keep their sums in registers.
const LANES: usize = 16;
/// Rows that a horizontal pass takes at once.
const ROWS: usize = 16;
/// Values of those rows in one column of pixels.
const COLUMN: usize = 3 * ROWS;

/// In pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) height: usize,
    pub(crate) width: usize,
}

impl Size {
    pub(crate) fn area(self) -> usize {
        self.height * self.width
    }
}

/// An interpolation kernel, `resample` in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
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

/// A resized image, whose last pass may be done row by row as they are taken: what is never stored as bytes
/// costs no memory.
#[derive(Debug)]
pub(crate) struct Resized {
    size: Size,
    /// `[3, rows, width]`.
    planes: Vec<u8>,
    rows: usize,
    /// From the planes' rows to those of the image; `None`: they are.
    taps: Option<Vec<Taps>>,
}

/// Resizes interleaved RGB of size `source`.
pub(crate) fn resize(rgb: &[u8], source: Size, size: Size, filter: Filter) -> Resized {
    debug_assert_eq!(rgb.len(), source.area() * 3, "invariant: three bytes a pixel");
    let Size { height, width } = size;
    if vertical_first(source, size) {
        let taps = Taps::all(source.height, height, filter);
        let row_len = source.width * 3;
        let mut low = vec![0; height * row_len];
        for (row, taps) in low.chunks_exact_mut(row_len).zip(&taps) {
            vertically(&rgb[taps.first * row_len..], row_len, taps, row);
        }
        let rows = Size { height, width: source.width };
        return Resized::new(horizontally(&low, rows, width, filter), size);
    }
    let planes = horizontally(rgb, source, width, filter);
    let taps = (source.height != height).then(|| Taps::all(source.height, height, filter));
    Resized { size, planes, rows: source.height, taps }
}

impl Resized {
    /// From planes of this size.
    pub(crate) fn new(planes: Vec<u8>, size: Size) -> Self {
        Self { size, planes, rows: size.height, taps: None }
    }

    /// The part of a row that begins at `left` and fills `into`.
    pub(crate) fn row(&self, channel: usize, row: usize, left: usize, into: &mut [u8]) {
        let width = self.size.width;
        let plane = &self.planes[channel * self.rows * width..][..self.rows * width];
        match self.taps.as_ref().map(|taps| &taps[row]) {
            Some(taps) => vertically(&plane[taps.first * width + left..], width, taps, into),
            None => into.copy_from_slice(&plane[row * width + left..][..into.len()]),
        }
    }

    /// All pixels, `[3, height, width]`.
    pub(crate) fn into_planes(self) -> Vec<u8> {
        if self.taps.is_none() {
            return self.planes;
        }
        let Size { height, width } = self.size;
        let mut planes = vec![0; 3 * self.size.area()];
        for (index, line) in planes.chunks_exact_mut(width).enumerate() {
            self.row(index / height, index % height, 0, line);
        }
        planes
    }
}

/// Where the height shrinks by more than twice the pixels that the width does. Bytes are rounded and clipped
/// between the passes, so the order shows at sharp edges, by several grey levels.
///
/// It also bounds what is between the passes: never larger than the larger of source and target.
fn vertical_first(source: Size, target: Size) -> bool {
    let shrinks = |from: usize, to: usize| from as i64 - to as i64;
    let rows = shrinks(source.height, target.height);
    rows > 0 && rows > 2 * shrinks(source.width, target.width)
}

/// Source values that make one value of the target.
#[derive(Debug)]
struct Taps {
    first: usize,
    /// Fixed-point, with a sum of 1 before rounding.
    weights: Vec<i32>,
}

impl Taps {
    fn all(from: usize, to: usize, filter: Filter) -> Vec<Self> {
        (0..to).map(|index| Self::new(index, from, to, filter)).collect()
    }

    fn new(index: usize, from: usize, to: usize, filter: Filter) -> Self {
        let scale = from as f64 / to as f64;
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let center = (index as f64 + 0.5) * scale;
        // Conversions cut off the fraction, and stop at 0.
        let first = (center - support + 0.5) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
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

/// Adds up `N` values from each of the weights' rows, which begin `stride` apart, into one.
#[inline(always)]
fn weigh<const N: usize>(rows: &[u8], stride: usize, weights: &[i32], target: &mut [u8; N]) {
    let mut sums = [HALF; N];
    // By index, because the length of `chunks` costs a division.
    let mut at = 0;
    for &weight in weights {
        let values: &[u8; N] = rows[at..].first_chunk().expect("invariant: a row has N values");
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += i32::from(value) * weight;
        }
        at += stride;
    }
    for (value, sum) in target.iter_mut().zip(sums) {
        *value = (sum >> PRECISION_BITS).clamp(0, 255) as u8;
    }
}

/// One row from those that begin `stride` apart in `rows`, the first of the taps first.
fn vertically(rows: &[u8], stride: usize, taps: &Taps, target: &mut [u8]) {
    Arch::new().dispatch(Vertical { rows, stride, weights: &taps.weights, target });
}

struct Vertical<'a> {
    rows: &'a [u8],
    stride: usize,
    weights: &'a [i32],
    target: &'a mut [u8],
}

impl NullaryFnOnce for Vertical<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { rows, stride, weights, target } = self;
        let length = target.len();
        let mut at = 0;
        while at + LANES <= length {
            weigh::<LANES>(&rows[at..], stride, weights, lanes(target, at));
            at += LANES;
        }
        if at < length && length >= LANES {
            // The last values once more rather than one by one.
            weigh::<LANES>(&rows[length - LANES..], stride, weights, lanes(target, length - LANES));
            at = length;
        }
        for at in at..length {
            weigh::<1>(&rows[at..], stride, weights, lanes(target, at));
        }
    }
}

#[inline(always)]
fn lanes<const N: usize>(row: &mut [u8], at: usize) -> &mut [u8; N] {
    row[at..].first_chunk_mut().expect("invariant: N values are left")
}

/// Interleaved RGB becomes planes of `width` pixels a row.
fn horizontally(rgb: &[u8], source: Size, width: usize, filter: Filter) -> Vec<u8> {
    let taps = (source.width != width).then(|| Taps::all(source.width, width, filter));
    let mut target = vec![0; 3 * source.height * width];
    let taps = taps.as_deref();
    Arch::new().dispatch(Horizontal { rgb, source, width, taps, target: &mut target });
    target
}

struct Horizontal<'a> {
    rgb: &'a [u8],
    source: Size,
    width: usize,
    /// `None`: the width stays.
    taps: Option<&'a [Taps]>,
    target: &'a mut [u8],
}

impl NullaryFnOnce for Horizontal<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { rgb, source, width, taps, target } = self;
        let mut columns = vec![0; source.width * COLUMN];
        let mut weighed = vec![0; width * COLUMN];
        for top in (0..source.height).step_by(ROWS) {
            to_columns(rgb, source, top, &mut columns);
            if let Some(taps) = taps {
                for (column, taps) in weighed.chunks_exact_mut(COLUMN).zip(taps) {
                    let columns = &columns[taps.first * COLUMN..];
                    for at in (0..COLUMN).step_by(LANES) {
                        weigh::<LANES>(&columns[at..], COLUMN, &taps.weights, lanes(column, at));
                    }
                }
                to_planes(&weighed, Size { height: source.height, width }, top, target);
            } else {
                to_planes(&columns, source, top, target);
            }
        }
    }
}

/// [`ROWS`] rows from `top` on, as `[width, 3, ROWS]`. Rows beyond the last are copies of it.
#[inline(always)]
fn to_columns(rgb: &[u8], source: Size, top: usize, columns: &mut [u8]) {
    let row_len = source.width * 3;
    let row = |index: usize| {
        let index = (top + index).min(source.height - 1);
        &rgb[index * row_len..][..row_len]
    };
    for half in [0, 8] {
        let rows: [&[u8]; 8] = std::array::from_fn(|index| row(half + index));
        for at in (0..row_len).step_by(8) {
            let mut words = [0; 8];
            for (word_of, row) in words.iter_mut().zip(rows) {
                *word_of = word(&row[at..]);
            }
            let into = columns[at * ROWS..].chunks_exact_mut(ROWS);
            for (into, word) in into.zip(transpose(words)) {
                into[half..half + 8].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// The reverse, into three planes of size `size`.
#[inline(always)]
fn to_planes(columns: &[u8], size: Size, top: usize, planes: &mut [u8]) {
    let rows = ROWS.min(size.height - top);
    for (channel, plane) in planes.chunks_exact_mut(size.area()).enumerate() {
        let lines = &mut plane[top * size.width..];
        for half in (0..rows).step_by(8) {
            for left in (0..size.width).step_by(8) {
                let pixels = (size.width - left).min(8);
                let mut words = [0; 8];
                for (index, word_of) in words.iter_mut().enumerate().take(pixels) {
                    *word_of = word(&columns[(left + index) * COLUMN + channel * ROWS + half..]);
                }
                let words = transpose(words);
                for (word, line) in
                    words.iter().zip(lines.chunks_mut(size.width).skip(half)).take(rows - half)
                {
                    let bytes = word.to_le_bytes();
                    if pixels == 8 {
                        line[left..left + 8].copy_from_slice(&bytes);
                    } else {
                        line[left..].copy_from_slice(&bytes[..pixels]);
                    }
                }
            }
        }
    }
}

/// The first eight bytes, with zeros for those that are missing.
#[inline(always)]
fn word(bytes: &[u8]) -> u64 {
    if let Some(eight) = bytes.first_chunk() {
        return u64::from_le_bytes(*eight);
    }
    let mut eight = [0; 8];
    eight[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(eight)
}

/// Byte j of word i becomes byte i of word j: halves are exchanged, then quarters, then bytes.
#[inline(always)]
fn transpose(mut words: [u64; 8]) -> [u64; 8] {
    for index in 0..4 {
        exchange::<32>(&mut words, index, index + 4, 0x0000_0000_ffff_ffff);
    }
    for index in [0, 1, 4, 5] {
        exchange::<16>(&mut words, index, index + 2, 0x0000_ffff_0000_ffff);
    }
    for index in [0, 2, 4, 6] {
        exchange::<8>(&mut words, index, index + 1, 0x00ff_00ff_00ff_00ff);
    }
    words
}

/// What the mask covers in the word at `high`, and what is `SHIFT` above it in the word at `low`.
#[inline(always)]
fn exchange<const SHIFT: u32>(words: &mut [u64; 8], low: usize, high: usize, mask: u64) {
    let both = ((words[low] >> SHIFT) ^ words[high]) & mask;
    words[high] ^= both;
    words[low] ^= both << SHIFT;
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
            for (height, width) in [(1, 1), (3, 200), (50, 7), (20, 31), (20, 64), (17, 31)] {
                let source = Size { height: 20, width: 31 };
                let rgb: Vec<u8> = [200, 7, 255].repeat(20 * 31);
                let resized = resize(&rgb, source, Size { height, width }, filter).into_planes();
                let expected = [200, 7, 255].map(|value| vec![value; height * width]).concat();
                assert_eq!(resized, expected, "{filter:?} {height}x{width}");
            }
        }
    }

    #[test]
    fn parts_of_rows_are_those_of_the_whole() {
        let source = Size { height: 20, width: 31 };
        let rgb: Vec<u8> = (0..source.area() * 3).map(|at| (at * at % 251) as u8).collect();
        for (height, width) in [(45, 150), (9, 200), (3, 140)] {
            let size = Size { height, width };
            let planes = resize(&rgb, source, size, Filter::Bicubic).into_planes();
            let resized = resize(&rgb, source, size, Filter::Bicubic);
            for (left, length) in [(0, width), (7, 64), (width - 65, 65), (5, 3)] {
                let mut part = vec![0; length];
                resized.row(2, height - 1, left, &mut part);
                assert_eq!(part, planes[(3 * height - 1) * width + left..][..length], "{size:?} {left}");
            }
        }
    }

    #[test]
    fn every_byte_finds_its_place_when_nothing_is_resized() {
        for (height, width) in [(1, 1), (1, 9), (9, 1), (8, 8), (17, 23), (33, 40)] {
            let size = Size { height, width };
            let rgb: Vec<u8> = (0..size.area() * 3).map(|at| (at * 7 % 251) as u8).collect();
            let planes = resize(&rgb, size, size, Filter::Bicubic).into_planes();
            for (at, &value) in planes.iter().enumerate() {
                assert_eq!(value, rgb[at % size.area() * 3 + at / size.area()], "{at} of {height}x{width}");
            }
        }
    }
}
