//! Counts of many keys in fixed memory: a count-min sketch (Cormode and Muthukrishnan, "An improved data stream
//! summary", 2005), filled by all threads at once.
//!
//! It is updated plainly and not conservatively: sums do not depend on the order of the additions.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::rng::Key;

/// Counters that each key has; the least of them is its count. It is too high by more than e / width of all
/// additions with a probability of at most exp(-4) = 1.8 %.
const ROWS: usize = 4;

/// Counts that are exact or too high, never too low.
#[derive(Debug)]
pub(super) struct CountMin {
    /// Row after row.
    counters: Vec<AtomicU32>,
    width: usize,
}

impl CountMin {
    /// All counts 0, in this much memory.
    pub(super) fn new(bytes: u64) -> Self {
        let width = (bytes as usize / (ROWS * size_of::<AtomicU32>())).max(1);
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
}
