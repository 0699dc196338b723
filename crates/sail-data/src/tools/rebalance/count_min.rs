//! Counts of many keys in fixed memory: a count-min sketch (Cormode and Muthukrishnan, "An improved data stream
//! summary", 2005), filled by all threads at once.
//!
//! It is updated plainly and not conservatively: sums do not depend on the order of the additions.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::rng::Key;

/// Counters that each key has; the least of them is its count. It is too high by more than e / width of all
/// additions with a probability of at most exp(-4) = 1.8 %.
const ROWS: usize = 4;

/// One counter of each row.
pub(super) const LEAST_BYTES: u64 = (ROWS * size_of::<AtomicU32>()) as u64;

/// exp(-4): with which probability a count may be too high.
pub(super) const TOLERATED: f64 = 0.018_315_638_888_734_18;

/// Counts that are exact or too high, never too low.
#[derive(Debug)]
pub(super) struct CountMin {
    /// Row after row.
    counters: Vec<AtomicU32>,
    width: usize,
}

impl CountMin {
    /// All counts 0, in this much memory, which is at least [`LEAST_BYTES`].
    pub(super) fn new(bytes: u64) -> Self {
        let width = (bytes / LEAST_BYTES).max(1) as usize;
        Self { counters: std::iter::repeat_with(AtomicU32::default).take(ROWS * width).collect(), width }
    }

    /// Counts `key` once more.
    pub(super) fn add(&self, key: u64) {
        for counter in self.counters(key) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often `key` was added, or more.
    pub(super) fn count(&self, key: u64) -> u32 {
        self.counters(key).map(|counter| counter.load(Ordering::Relaxed)).min().unwrap_or(0)
    }

    /// All additions.
    pub(super) fn total(&self) -> u64 {
        self.row(0).iter().map(|counter| u64::from(counter.load(Ordering::Relaxed))).sum()
    }

    /// The probability with which a count is too high by more than this: that all counters of a key have more from
    /// others.
    pub(super) fn probability_above(&self, count: f64) -> f64 {
        let above = |counter: &&AtomicU32| f64::from(counter.load(Ordering::Relaxed)) > count;
        let share = |row| self.row(row).iter().filter(above).count() as f64 / self.width as f64;
        (0..ROWS).map(share).product()
    }

    /// The memory in which `total` additions make a count too high by more than `count` with a probability of at most
    /// [`TOLERATED`]: in each row at most 1 / e of the counters are above e times their mean (Markov's inequality).
    pub(super) fn bytes_for(total: u64, count: f64) -> u64 {
        (std::f64::consts::E * total as f64 / count).ceil() as u64 * LEAST_BYTES
    }

    fn row(&self, row: usize) -> &[AtomicU32] {
        &self.counters[row * self.width..(row + 1) * self.width]
    }

    fn counters(&self, key: u64) -> impl Iterator<Item = &AtomicU32> {
        let places = Key::new(key);
        (0..ROWS).map(move |row| &self.counters[row * self.width + places.below(row as u64, self.width)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_never_too_low_and_seldom_too_high() {
        let sketch = CountMin::new(64 << 10);
        let times = |key: u64| 1 + (key % 7) as u32;
        for key in 0..1000 {
            (0..times(key)).for_each(|_| sketch.add(key));
        }
        let wrong = (0..1000).filter(|&key| {
            let (found, true_count) = (sketch.count(key), times(key));
            assert!(found >= true_count);
            found > true_count
        });
        // Three keys of four share a counter in any one row, as there are four counters for each: all four rows
        // are shared with a probability of (1 - exp(-1/4))^4.
        assert!(wrong.count() < 10);
        assert_eq!(CountMin::new(1).count(5), 0);
    }

    #[test]
    fn how_far_counts_are_off_is_known() {
        // Each key once, in a width of 4 Ki to 16 Ki: counts of keys that were never added are all noise.
        for bytes in [64 << 10, 128 << 10, 256 << 10] {
            let sketch = CountMin::new(bytes);
            (0..20_000).for_each(|key| sketch.add(key));
            assert_eq!(sketch.total(), 20_000);
            for count in [0, 1, 2, 4] {
                let off = (20_000..60_000).filter(|&key| sketch.count(key) > count).count() as f64 / 40_000.0;
                let expected = sketch.probability_above(f64::from(count));
                assert!(
                    (off - expected).abs() < 0.01,
                    "above {count} in {bytes}: {off}, expected {expected}"
                );
            }
            let enough = CountMin::new(CountMin::bytes_for(20_000, 3.0));
            (0..20_000).for_each(|key| enough.add(key));
            assert!(enough.probability_above(3.0) <= TOLERATED);
        }
    }
}
