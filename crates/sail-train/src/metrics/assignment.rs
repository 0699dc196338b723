//! The cheapest pairing of as many things with as many others.
//!
//! Shortest augmenting paths with potentials (Jonker and Volgenant 1987, as in Crouse 2016, "On implementing 2D
//! rectangular assignment algorithms"), as `linear_sum_assignment` of `SciPy` does. It takes at most n³ steps.

/// For each row of the `n` x `n` costs, row-major, the column that it is paired with, so that the costs of all pairs
/// together are as small as possible.
///
/// # Panics
/// When the costs are not `n` x `n`, or one of them is not finite.
pub fn assign(costs: &[f64], n: usize) -> Vec<usize> {
    assert_eq!(costs.len(), n * n, "costs are not {n} x {n}");
    assert!(costs.iter().all(|cost| cost.is_finite()), "a cost is not finite");
    let (mut row_price, mut column_price) = (vec![0.0; n], vec![0.0; n]);
    let mut row_of: Vec<Option<usize>> = vec![None; n];
    let mut column_of: Vec<Option<usize>> = vec![None; n];
    for start in 0..n {
        let path = shortest_path(costs, start, (&row_price, &column_price), &row_of);
        row_price[start] += path.length;
        for column in (0..n).filter(|column| path.settled[*column]) {
            let less = path.length - path.distance[column];
            column_price[column] -= less;
            if let Some(row) = row_of[column] {
                row_price[row] += less;
            }
        }
        // Every row on the way takes the column that it was reached the next one by.
        let mut column = path.end;
        loop {
            let row = path.from[column];
            row_of[column] = Some(row);
            let before = column_of[row].replace(column);
            match before {
                Some(before) if row != start => column = before,
                _ => break,
            }
        }
    }
    column_of.into_iter().map(|column| column.expect("invariant: every row was a start")).collect()
}

/// The way from a row to a free column.
struct Path {
    /// The free column.
    end: usize,
    /// Reduced costs of the way.
    length: f64,
    /// Reduced costs of the way to each column, as far as it was looked at.
    distance: Vec<f64>,
    /// The row before each column.
    from: Vec<usize>,
    /// Columns to which the shortest way is known, without the end.
    settled: Vec<bool>,
}

fn shortest_path(
    costs: &[f64],
    start: usize,
    (row_price, column_price): (&[f64], &[f64]),
    row_of: &[Option<usize>],
) -> Path {
    let n = row_of.len();
    let mut distance = vec![f64::INFINITY; n];
    let mut from = vec![start; n];
    let mut settled = vec![false; n];
    let mut open: Vec<usize> = (0..n).collect();
    let (mut row, mut length) = (start, 0.0);
    loop {
        let (mut nearest, mut nearest_distance) = (0, f64::INFINITY);
        let of_row = &costs[row * n..(row + 1) * n];
        for (place, &column) in open.iter().enumerate() {
            let through = length + of_row[column] - row_price[row] - column_price[column];
            if through < distance[column] {
                distance[column] = through;
                from[column] = row;
            }
            // Of several as near a free one ends the search.
            let ends = distance[column] <= nearest_distance && row_of[column].is_none();
            if distance[column] < nearest_distance || ends {
                (nearest, nearest_distance) = (place, distance[column]);
            }
        }
        length = nearest_distance;
        let column = open.swap_remove(nearest);
        match row_of[column] {
            None => return Path { end: column, length, distance, from, settled },
            Some(next) => {
                settled[column] = true;
                row = next;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_of_all_pairings_is_found() {
        // Whole numbers, so that there are several of equal cost.
        for n in 1..=6 {
            for seed in 0..40_u64 {
                let cost = |i: usize| ((i as u64 + 7) * (seed + 3) * 2_654_435_761 % 97 % 10) as f64;
                let costs: Vec<f64> = (0..n * n).map(cost).collect();
                let columns = assign(&costs, n);
                let mut sorted = columns.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..n).collect::<Vec<_>>());
                let total: f64 =
                    columns.iter().enumerate().map(|(row, column)| costs[row * n + column]).sum();
                let best = cheapest(&costs, n, 0, &mut vec![false; n]);
                assert!((total - best).abs() < 1e-9, "{n} {seed}: {total} {best}");
            }
        }
    }

    fn cheapest(costs: &[f64], n: usize, row: usize, taken: &mut Vec<bool>) -> f64 {
        if row == n {
            return 0.0;
        }
        let mut best = f64::INFINITY;
        for column in 0..n {
            if !taken[column] {
                taken[column] = true;
                best = best.min(costs[row * n + column] + cheapest(costs, n, row + 1, taken));
                taken[column] = false;
            }
        }
        best
    }
}
