//! What an image is resized to, from its size alone.
//!
//! Dynamic tiling is the rule of InternVL and SAIL-VL: among all layouts of `min..=max` tiles take the one whose
//! aspect ratio is nearest to the image's. Any resolution is that of Qwen2-VL.

use crate::spec::{AnyResolution, Tiling};

/// A layout of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Tiles per row (i).
    pub(crate) columns: usize,
    /// Tiles per column (j).
    pub(crate) rows: usize,
    /// Whether a tile of the whole image follows.
    pub(crate) thumbnail: bool,
}

impl Grid {
    /// One tile.
    pub(crate) const ONE: Self = Self { columns: 1, rows: 1, thumbnail: false };

    /// Number of tiles, the thumbnail included.
    pub(crate) fn tiles(self) -> usize {
        self.columns * self.rows + usize::from(self.thumbnail)
    }
}

/// All layouts (columns, rows) with `min <= columns * rows <= max`, by area, then by columns.
pub(crate) fn candidates(min: usize, max: usize) -> Vec<(usize, usize)> {
    let mut layouts: Vec<(usize, usize)> = (1..=max)
        .flat_map(|columns| (1..=max / columns).map(move |rows| (columns, rows)))
        .filter(|&(columns, rows)| columns * rows >= min)
        .collect();
    layouts.sort_by_key(|&(columns, rows)| (columns * rows, columns));
    layouts
}

/// The layout for an image of `width` x `height` pixels that shares a sample with `images - 1` others.
///
/// The smallest |W/H - i/j| in f64 wins; of layouts exactly as near, a later (larger) one wins only if the
/// image has more than half of that layout's pixels. With several images each may have
/// `max(1, tiling.max / images)` tiles.
pub(crate) fn choose_grid(width: u32, height: u32, images: usize, tiling: Tiling, tile_px: usize) -> Grid {
    let max = (tiling.max / images.max(1)).max(1);
    let aspect = f64::from(width) / f64::from(height);
    let area = f64::from(width) * f64::from(height);
    let mut best = (1, 1);
    let mut best_distance = f64::INFINITY;
    for (columns, rows) in candidates(tiling.min.min(max), max) {
        let distance = (aspect - columns as f64 / rows as f64).abs();
        let half_layout = 0.5 * (tile_px * tile_px * columns * rows) as f64;
        // Layouts of the same ratio tie exactly, because the same division gives the same number.
        let tie = distance.to_bits() == best_distance.to_bits();
        if distance < best_distance || (tie && area > half_layout) {
            best = (columns, rows);
            best_distance = distance;
        }
    }
    let (columns, rows) = best;
    Grid { columns, rows, thumbnail: tiling.thumbnail && columns * rows > 1 }
}

/// Height and width in whole units for an image that is not tiled: `smart_resize` of Qwen2-VL
/// (`qwen_vl_utils/vision_process.py`).
///
/// Both sides are rounded to units (halves to even); if that makes too many or too few tokens, both are scaled
/// by the square root of the ratio, and rounded down or up. Where one side is a single unit the published rule can
/// exceed `max_tokens`, or refuses the image (sides of more than 200 to 1); here the other side is cut to the limit.
pub(crate) fn choose_size(height: usize, width: usize, any: AnyResolution) -> (usize, usize) {
    let AnyResolution { unit_px, min_tokens, max_tokens } = any;
    let unit = unit_px as f64;
    let units = |px: usize| ((px as f64 / unit).round_ties_even() as usize).max(1);
    let (mut rows, mut columns) = (units(height), units(width));
    let area = height as f64 * width as f64;
    if rows * columns > max_tokens {
        let shrink = (area / (max_tokens as f64 * unit * unit)).sqrt();
        let scaled = |px: usize| ((px as f64 / shrink / unit).floor() as usize).max(1);
        (rows, columns) = (scaled(height), scaled(width));
        columns = columns.min((max_tokens / rows).max(1));
        rows = rows.min(max_tokens / columns);
    } else if rows * columns < min_tokens {
        let grow = (min_tokens as f64 * unit * unit / area).sqrt();
        let scaled = |px: usize| ((px as f64 * grow / unit).ceil() as usize).max(1);
        (rows, columns) = (scaled(height), scaled(width));
    }
    (rows * unit_px, columns * unit_px)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(width: u32, height: u32, images: usize, max: usize) -> (usize, usize, usize) {
        let grid = choose_grid(width, height, images, Tiling { min: 1, max, thumbnail: true }, 448);
        (grid.columns, grid.rows, grid.tiles())
    }

    #[test]
    fn there_are_as_many_candidates_as_in_the_published_code() {
        let counts: Vec<usize> = [6, 10, 12, 24, 40].iter().map(|&max| candidates(1, max).len()).collect();
        assert_eq!(counts, [14, 27, 35, 84, 158]);
        assert_eq!(candidates(2, 3), [(1, 2), (2, 1), (1, 3), (3, 1)]);
    }

    #[test]
    fn the_nearest_aspect_ratio_wins() {
        assert_eq!(grid(800, 400, 1, 12), (2, 1, 3));
        assert_eq!(grid(1792, 1344, 1, 12), (4, 3, 13));
        assert_eq!(grid(100, 2470, 1, 12), (1, 12, 13));
    }

    #[test]
    fn ties_go_to_the_larger_layout_only_for_large_images() {
        assert_eq!(grid(448, 448, 1, 12), (1, 1, 1));
        assert_eq!(grid(634, 634, 1, 12), (2, 2, 5), "634^2 is just above 0.5 * 448^2 * 4");
        assert_eq!(grid(633, 633, 1, 12), (1, 1, 1));
        assert_eq!(grid(2000, 2000, 1, 12), (3, 3, 10));
    }

    #[test]
    fn several_images_share_the_tiles() {
        assert_eq!(grid(2000, 2000, 3, 12), (2, 2, 5));
        assert_eq!(grid(2000, 2000, 20, 12), (1, 1, 1));
    }

    #[test]
    fn a_tie_at_any_nonsense_size_still_gives_a_layout() {
        assert_eq!(grid(1, 60_000, 1, 12), (1, 12, 13));
        assert_eq!(grid(60_000, 1, 1, 1), (1, 1, 1));
    }

    #[test]
    fn any_resolution_follows_the_published_rule() {
        // By `smart_resize(height, width, factor, min_tokens * factor ** 2, max_tokens * factor ** 2)`.
        let any = |unit_px, min_tokens, max_tokens| AnyResolution { unit_px, min_tokens, max_tokens };
        let qwen = any(28, 4, 1280);
        for ((height, width), any, expected) in [
            ((480, 640), qwen, (476, 644)),
            ((1080, 1920), qwen, (728, 1316)),
            ((4000, 3000), qwen, (1148, 840)),
            ((20, 20), qwen, (56, 56)),
            ((42, 98), qwen, (56, 112)),
            ((70, 700), any(28, 4, 16), (28, 336)),
            ((10, 300), any(28, 64, 256), (56, 1232)),
        ] {
            assert_eq!(choose_size(height, width, any), expected, "{height}x{width}");
        }
    }

    #[test]
    fn any_resolution_never_exceeds_its_limit() {
        let any = AnyResolution { unit_px: 14, min_tokens: 1, max_tokens: 50 };
        for (height, width) in [(1, 1), (1, 100_000), (100_000, 1), (7, 7000), (60_000, 60_000), (21, 35)] {
            let (rows, columns) = choose_size(height, width, any);
            assert!((1..=50).contains(&(rows / 14 * (columns / 14))), "{height}x{width}: {rows}x{columns}");
        }
    }
}
