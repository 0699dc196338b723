//! Dynamic tiling: into how many tiles of which layout an image is cut, from its size alone.
//!
//! The rule of InternVL and SAIL-VL: among all layouts of `min..=max` tiles take the one whose aspect ratio
//! is nearest to the image's.

use crate::spec::Tiling;

/// A layout of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Tiles per row (i).
    pub columns: usize,
    /// Tiles per column (j).
    pub rows: usize,
    /// Whether a tile of the whole image follows.
    pub thumbnail: bool,
}

impl Grid {
    /// Number of tiles, the thumbnail included.
    pub fn tiles(self) -> usize {
        self.columns * self.rows + usize::from(self.thumbnail)
    }
}

/// All layouts (columns, rows) with `min <= columns * rows <= max`, by area, then by columns.
pub fn candidates(min: usize, max: usize) -> Vec<(usize, usize)> {
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
pub fn choose_grid(width: u32, height: u32, images: usize, tiling: Tiling, tile_px: usize) -> Grid {
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
}
