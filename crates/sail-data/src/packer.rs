//! Which candidates share a pack: a pure function of their lengths.
//!
//! The oldest candidate always goes first, so none waits for more packs than there are candidates. Which of
//! the others join it is a subset-sum problem in two dimensions, tokens and visual tokens, and at these
//! sizes it can be solved exactly: all sums that some subset reaches are kept as bits.

/// What a candidate adds to a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// All tokens, visual ones included.
    pub tokens: usize,
    /// Visual tokens.
    pub visual: usize,
}

/// Rows of visual tokens that are told apart; more are rounded together.
const MOST_ROWS: usize = 1024;
/// Token sums that are told apart, times rows; more are rounded together.
const MOST_CELLS: usize = 1 << 24;

/// Indices of the candidates that go into a pack of at most `budget` tokens, in ascending order.
///
/// `loads` are in order of arrival. Of all choices with the oldest candidate the one is taken that comes
/// nearest to a full pack and, where there is a `target`, to that many visual tokens: the fewest free tokens
/// plus twice the visual tokens too many or too few. Without a target nothing is left out that would still fit.
pub fn choose(loads: &[Load], budget: usize, target: Option<usize>) -> Vec<usize> {
    let Some(oldest) = loads.first().filter(|oldest| oldest.tokens <= budget) else {
        return first_that_fits(loads, budget);
    };
    if loads.iter().map(|load| load.tokens).fold(0, usize::saturating_add) <= budget && target.is_none() {
        return (0..loads.len()).collect();
    }
    let grid = Grid::new(loads, budget, target, *oldest);
    let mut sums = Sums::new(&grid);
    for index in 1..loads.len() {
        sums.add(&grid, index);
    }
    let mut chosen = sums.best(&grid);
    chosen.push(0);
    chosen.sort_unstable();
    chosen
}

/// Where a hole is filled after a bad image, the oldest may not fit any more.
fn first_that_fits(loads: &[Load], budget: usize) -> Vec<usize> {
    let mut left = budget;
    let mut by_length: Vec<usize> = (0..loads.len()).collect();
    by_length.sort_by_key(|&index| (std::cmp::Reverse(loads[index].tokens), index));
    let mut chosen: Vec<usize> = by_length
        .into_iter()
        .filter(|&index| {
            let fits = loads[index].tokens <= left;
            left -= if fits { loads[index].tokens } else { 0 };
            fits
        })
        .collect();
    chosen.sort_unstable();
    chosen
}

/// The units in which sums are kept. Lengths are rounded up, so that no pack passes its budget.
#[derive(Debug)]
struct Grid {
    /// Tokens per column.
    token_unit: usize,
    /// Visual tokens per row.
    visual_unit: usize,
    columns: usize,
    rows: usize,
    /// Columns and rows that each candidate adds.
    cells: Vec<(usize, usize)>,
    target: Option<usize>,
}

impl Grid {
    fn new(loads: &[Load], budget: usize, target: Option<usize>, oldest: Load) -> Self {
        let common = loads.iter().fold(0, |divisor, load| gcd(divisor, load.visual)).max(1);
        // Twice the target leaves room to make up for what a large sample brings.
        let most_visual = target.map_or(0, |target| budget.min(oldest.visual.saturating_add(2 * target)));
        let visual_unit = common * most_visual.div_ceil(common).div_ceil(MOST_ROWS).max(1);
        let most_rows = if target.is_some() { most_visual / visual_unit + 1 } else { 1 };
        let token_unit = budget.div_ceil(MOST_CELLS / most_rows).max(1);
        let cells = cells(loads, token_unit, visual_unit, target.is_some());
        // Rounding must not shut the oldest out.
        let rows = if target.is_some() { 1 + (most_visual / visual_unit).max(cells[0].1) } else { 1 };
        let columns = 1 + (budget / token_unit).max(cells[0].0);
        Self { token_unit, visual_unit, columns, rows, cells, target }
    }

    /// Free tokens, and visual tokens too many or too few, at a cell.
    fn cost(&self, (column, row): (usize, usize)) -> usize {
        let free = (self.columns - 1 - column) * self.token_unit;
        free + self.target.map_or(0, |target| 2 * target.abs_diff(row * self.visual_unit))
    }
}

/// Columns and rows that each candidate adds. Tokens are rounded up. Visual tokens are rounded so that the errors
/// of neighbours cancel, or a choice of many would drift from its target.
fn cells(loads: &[Load], token_unit: usize, visual_unit: usize, visual: bool) -> Vec<(usize, usize)> {
    let (mut sum, mut rows_before) = (0, 0);
    let cell = |load: &Load| {
        sum += if visual { load.visual } else { 0 };
        let rows = (sum + visual_unit / 2) / visual_unit;
        let added = rows - rows_before;
        rows_before = rows;
        (load.tokens.div_ceil(token_unit), added)
    };
    loads.iter().map(cell).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The sums that subsets of the candidates so far reach.
#[derive(Debug)]
struct Sums {
    words: usize,
    /// `[rows, words]`: one bit per column.
    reached: Vec<u64>,
    /// `[rows, columns]`: the candidate with which a cell was reached first. What it was reached from was
    /// reached before that candidate, so going back never takes one twice.
    by: Vec<u32>,
    shifted: Vec<u64>,
}

impl Sums {
    fn new(grid: &Grid) -> Self {
        let words = grid.columns.div_ceil(64);
        let mut sums = Self {
            words,
            reached: vec![0; words * grid.rows],
            by: vec![0; grid.columns * grid.rows],
            shifted: vec![0; words],
        };
        let (column, row) = grid.cells[0];
        sums.reached[row * words + column / 64] |= 1 << (column % 64);
        sums
    }

    fn add(&mut self, grid: &Grid, index: usize) {
        let (columns, rows) = grid.cells[index];
        if columns >= grid.columns || rows >= grid.rows {
            return;
        }
        for row in (rows..grid.rows).rev() {
            let from = (row - rows) * self.words;
            shift(&self.reached[from..from + self.words], columns, &mut self.shifted);
            for (word, &shifted) in self.shifted.iter().enumerate() {
                let reached = &mut self.reached[row * self.words + word];
                let mut new = shifted & !*reached;
                while new != 0 {
                    let column = word * 64 + new.trailing_zeros() as usize;
                    new &= new - 1;
                    if column < grid.columns {
                        *reached |= 1 << (column % 64);
                        self.by[row * grid.columns + column] = index as u32;
                    }
                }
            }
        }
    }

    /// The candidates, without the oldest, that reach the cell of the lowest cost.
    fn best(&self, grid: &Grid) -> Vec<usize> {
        let mut best = grid.cells[0];
        for row in 0..grid.rows {
            // The cost of a row falls with every column.
            let Some(column) = self.last(row) else { continue };
            if grid.cost((column, row)) < grid.cost(best) {
                best = (column, row);
            }
        }
        let mut chosen = Vec::new();
        let (mut column, mut row) = best;
        while (column, row) != grid.cells[0] {
            let index = self.by[row * grid.columns + column] as usize;
            let (columns, rows) = grid.cells[index];
            (column, row) = (column - columns, row - rows);
            chosen.push(index);
        }
        chosen
    }

    /// The last column that is reached in a row.
    fn last(&self, row: usize) -> Option<usize> {
        let bits = &self.reached[row * self.words..(row + 1) * self.words];
        let word = bits.iter().rposition(|&word| word != 0)?;
        Some(word * 64 + 63 - bits[word].leading_zeros() as usize)
    }
}

/// Moves bits up by `by` places.
fn shift(bits: &[u64], by: usize, out: &mut [u64]) {
    let (words, rest) = (by / 64, by % 64);
    out.fill(0);
    for index in words..bits.len() {
        let low = bits[index - words] << rest;
        let carried = if rest > 0 && index > words { bits[index - words - 1] >> (64 - rest) } else { 0 };
        out[index] = low | carried;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn texts(lengths: &[usize]) -> Vec<Load> {
        lengths.iter().map(|&tokens| Load { tokens, visual: 0 }).collect()
    }

    fn images(loads: &[(usize, usize)]) -> Vec<Load> {
        loads.iter().map(|&(tokens, visual)| Load { tokens, visual }).collect()
    }

    #[test]
    fn the_oldest_goes_first_and_the_fullest_pack_wins() {
        assert_eq!(choose(&texts(&[10, 70, 85, 20, 5]), 100, None), [0, 1, 3]);
        assert_eq!(choose(&texts(&[10, 30, 30, 30, 30]), 100, None), [0, 1, 2, 3]);
        assert_eq!(choose(&texts(&[50, 45, 30, 20]), 100, None), [0, 2, 3], "best fit would take 45");
        assert_eq!(choose(&texts(&[10, 20]), 5, None), [0_usize; 0]);
        assert_eq!(choose(&texts(&[10, 4, 1]), 5, None), [1, 2], "a hole that the oldest does not fit");
        assert_eq!(choose(&[], 5, None), [0_usize; 0]);
    }

    #[test]
    fn visual_tokens_come_near_their_target() {
        let loads = images(&[(20, 16), (40, 32), (40, 0), (40, 16), (40, 0)]);
        assert_eq!(choose(&loads, 100, Some(32)), [0, 2, 3]);
        assert_eq!(choose(&loads, 100, Some(48)), [0, 1, 2]);
        assert_eq!(choose(&loads, 100, Some(0)), [0, 2, 4]);
        let large = images(&[(90, 80), (10, 0), (10, 8)]);
        assert_eq!(choose(&large, 100, Some(8)), [0, 1], "the oldest may pass the target alone");
    }

    #[test]
    fn huge_packs_are_packed_in_coarser_units() {
        let loads: Vec<Load> =
            (0..200).map(|n| Load { tokens: 5_000 + n * 37, visual: 1_000 + n * 11 }).collect();
        let chosen = choose(&loads, 300_000, Some(70_001));
        let sum = |f: fn(&Load) -> usize| chosen.iter().map(|&index| f(&loads[index])).sum::<usize>();
        let tokens = sum(|load| load.tokens);
        assert!((299_000..=300_000).contains(&tokens), "{tokens}");
        assert!(sum(|load| load.visual).abs_diff(70_001) < 6_000);
    }

    proptest! {
        #[test]
        fn a_pack_keeps_its_budget_and_leaves_nothing_that_fits(
            lengths in prop::collection::vec(1_usize..100, 0..40),
            budget in 1_usize..300,
        ) {
            let loads = texts(&lengths);
            let chosen = choose(&loads, budget, None);
            let used: usize = chosen.iter().map(|&index| lengths[index]).sum();
            prop_assert!(used <= budget);
            prop_assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]), "no index twice");
            for index in (0..lengths.len()).filter(|index| !chosen.contains(index)) {
                prop_assert!(lengths[index] > budget - used);
            }
            if lengths.first().is_some_and(|&oldest| oldest <= budget) {
                prop_assert_eq!(chosen[0], 0);
            }
        }

        #[test]
        fn no_other_choice_is_nearer(
            loads in prop::collection::vec((1_usize..12, 0_usize..4), 1..9),
            budget in 1_usize..40,
            target in 0_usize..30,
        ) {
            let loads: Vec<Load> =
                loads.into_iter().map(|(text, tiles)| Load { tokens: text + tiles * 3, visual: tiles * 3 }).collect();
            prop_assume!(loads[0].tokens <= budget);
            let cost = |chosen: &[usize]| {
                let tokens: usize = chosen.iter().map(|&index| loads[index].tokens).sum();
                let visual: usize = chosen.iter().map(|&index| loads[index].visual).sum();
                let bounded = tokens <= budget && visual <= budget.min(loads[0].visual + 2 * target);
                bounded.then(|| budget - tokens + 2 * visual.abs_diff(target))
            };
            let chosen = choose(&loads, budget, Some(target));
            let best = (0..1_usize << (loads.len() - 1)).filter_map(|subset| {
                let others = (1..loads.len()).filter(|index| subset >> (index - 1) & 1 == 1);
                cost(&std::iter::once(0).chain(others).collect::<Vec<_>>())
            }).min();
            prop_assert_eq!(cost(&chosen), best);
        }

        #[test]
        fn every_candidate_is_packed_once(
            lengths in prop::collection::vec(1_usize..=64, 1..80),
            buffer in 1_usize..12,
        ) {
            let mut waiting: Vec<usize> = Vec::new();
            let mut arriving = 0..lengths.len();
            let mut packed = Vec::new();
            loop {
                waiting.extend(arriving.by_ref().take(buffer - waiting.len()));
                if waiting.is_empty() {
                    break;
                }
                let candidates: Vec<usize> = waiting.iter().map(|&sample| lengths[sample]).collect();
                let chosen = choose(&texts(&candidates), 64, None);
                prop_assert!(!chosen.is_empty());
                for index in chosen.into_iter().rev() {
                    packed.push(waiting.remove(index));
                }
            }
            packed.sort_unstable();
            prop_assert!(packed.into_iter().eq(0..lengths.len()));
        }
    }
}
