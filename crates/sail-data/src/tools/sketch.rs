//! Distributions in fixed memory: counts by value, exact below 256 and within 0.8 % above.

use std::collections::BTreeMap;

use serde::Serialize;

/// Values below this have a bucket each.
const EXACT: u64 = 256;
/// Buckets of each power of two above.
const PER_OCTAVE: u64 = 128;
const BUCKETS: usize = (EXACT + (64 - 8) * PER_OCTAVE) as usize;

/// A distribution of counts. Its memory does not depend on how many values it is given.
#[derive(Clone, Debug)]
pub(crate) struct Sketch {
    buckets: Vec<u64>,
    count: u64,
    sum: u128,
    min: u64,
    max: u64,
}

/// The numbers that describe a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) min: u64,
    pub(crate) median: u64,
    pub(crate) p90: u64,
    pub(crate) p99: u64,
    pub(crate) max: u64,
    pub(crate) mean: f64,
}

/// One bar of a histogram: how many values lie in `low..=high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Bar {
    pub(crate) low: u64,
    pub(crate) high: u64,
    pub(crate) count: u64,
}

impl Default for Sketch {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], count: 0, sum: 0, min: u64::MAX, max: 0 }
    }
}

fn bucket(value: u64) -> usize {
    if value < EXACT {
        return value as usize;
    }
    // The eighth and later bits are the octave, the seven below the highest one the place in it.
    let octave = u64::from(value.ilog2()) - 8;
    let place = (value >> (octave + 1)) - PER_OCTAVE;
    (EXACT + octave * PER_OCTAVE + place) as usize
}

/// The middle of a bucket's values.
fn middle(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < EXACT {
        return bucket;
    }
    let (octave, place) = ((bucket - EXACT) / PER_OCTAVE, (bucket - EXACT) % PER_OCTAVE);
    ((PER_OCTAVE + place) << (octave + 1)) + (1 << octave)
}

impl Sketch {
    /// Counts a value.
    pub(crate) fn add(&mut self, value: u64) {
        self.buckets[bucket(value)] += 1;
        self.count += 1;
        self.sum += u128::from(value);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Counts all values of another one.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// How many values there are.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Their sum.
    pub(crate) fn sum(&self) -> u128 {
        self.sum
    }

    /// `None` without any value.
    pub(crate) fn summary(&self) -> Option<Summary> {
        (self.count > 0).then(|| Summary {
            min: self.min,
            median: self.quantile(0.5),
            p90: self.quantile(0.9),
            p99: self.quantile(0.99),
            max: self.max,
            mean: self.sum as f64 / self.count as f64,
        })
    }

    /// The smallest value that at least this share of the values does not exceed.
    fn quantile(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(index).clamp(self.min, self.max);
            }
        }
        self.max
    }

    /// At most `most` bars of equal width and round edges; what lies far above the 99th percentile shares the
    /// last one.
    pub(crate) fn bars(&self, most: usize) -> Vec<Bar> {
        let Some(summary) = self.summary() else { return Vec::new() };
        // A few values far out would squeeze all others into one bar.
        let tail = summary.max > summary.p99.saturating_mul(2).max(summary.min + most as u64);
        let top = if tail { summary.p99 } else { summary.max };
        let bars = if tail { most - 1 } else { most } as u64;
        let step = round_step(top - summary.min, bars);
        let first = summary.min / step * step;
        let count = ((top - first) / step + 1).min(bars);
        let mut list: Vec<Bar> = (0..count)
            .map(|n| Bar { low: first + n * step, high: first + (n + 1) * step - 1, count: 0 })
            .collect();
        if tail {
            list.push(Bar { low: first + count * step, high: summary.max, count: 0 });
        }
        for (index, &values) in self.buckets.iter().enumerate().filter(|&(_, &values)| values > 0) {
            let value = middle(index).clamp(self.min, self.max);
            let at = (((value - first) / step) as usize).min(list.len() - 1);
            list[at].count += values;
        }
        list
    }
}

/// The smallest of 1, 2, 5, 10, 20, ... of which `bars` cover a span that may begin inside a step.
fn round_step(span: u64, bars: u64) -> u64 {
    let mut decade = 1;
    loop {
        for factor in [1, 2, 5] {
            let step = decade * factor;
            if span / step + 2 <= bars || (step == 1 && span < bars) {
                return step;
            }
        }
        decade *= 10;
    }
}

/// How often each name occurs, for at most [`Names::MOST`] of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Names(BTreeMap<String, u64>);

impl Names {
    /// More names than this share one entry.
    pub(crate) const MOST: usize = 200;
    const OTHERS: &str = "(others)";

    /// Counts a name, in `times` samples.
    pub(crate) fn add(&mut self, name: &str, times: u64) {
        let known = self.0.contains_key(name) || self.0.len() < Self::MOST;
        *self.0.entry(if known { name } else { Self::OTHERS }.to_owned()).or_default() += times;
    }

    /// Counts all names of another one.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (name, &times) in &other.0 {
            self.add(name, times);
        }
    }

    /// Commonest first.
    pub(crate) fn ranked(&self) -> Vec<(&str, u64)> {
        let mut list: Vec<(&str, u64)> = self.0.iter().map(|(name, &times)| (name.as_str(), times)).collect();
        list.sort_by_key(|&(name, times)| (std::cmp::Reverse(times), name));
        list
    }

    /// All of them together.
    pub(crate) fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sketch(values: impl IntoIterator<Item = u64>) -> Sketch {
        let mut sketch = Sketch::default();
        values.into_iter().for_each(|value| sketch.add(value));
        sketch
    }

    #[test]
    fn small_values_are_exact() {
        let summary = sketch(1..=100).summary().unwrap();
        assert_eq!(
            (summary.min, summary.median, summary.p90, summary.p99, summary.max),
            (1, 50, 90, 99, 100)
        );
        assert!((summary.mean - 50.5).abs() < 1e-9);
        assert_eq!(sketch([]).summary(), None);
        assert_eq!(sketch([]).bars(10), []);
    }

    #[test]
    fn bars_have_round_edges_and_lose_nothing() {
        let bar = |low, high, count| Bar { low, high, count };
        assert_eq!(sketch([1, 1, 2, 4]).bars(10), [bar(1, 1, 2), bar(2, 2, 1), bar(3, 3, 0), bar(4, 4, 1)]);
        assert_eq!(sketch([7; 3]).bars(10), [bar(7, 7, 3)]);
        let bars = sketch((0..1000).map(|n| n % 100 + 13)).bars(12);
        assert_eq!((bars[0].low, bars[0].high), (10, 19));
        assert_eq!(bars.iter().map(|bar| bar.count).sum::<u64>(), 1000);
    }

    #[test]
    fn a_long_tail_shares_the_last_bar() {
        let bars = sketch((0..1000).map(|n| n % 50).chain([1_000_000])).bars(12);
        let last = bars.last().unwrap();
        assert_eq!((last.count, last.high), (1, 1_000_000));
        assert!(bars.len() > 5 && bars.len() <= 12, "{bars:?}");
    }

    #[test]
    fn too_many_names_share_an_entry() {
        let mut names = Names::default();
        (0..Names::MOST + 5).for_each(|n| names.add(&format!("{n:05}"), 1));
        assert_eq!(names.ranked()[0], ("(others)", 5));
        assert_eq!(names.total(), Names::MOST as u64 + 5);
    }

    proptest! {
        #[test]
        fn a_bucket_is_near_its_values(value in any::<u64>(), shift in 0_u32..64) {
            let value = value >> shift;
            let error = middle(bucket(value)).abs_diff(value);
            prop_assert!(error as f64 <= value as f64 * 0.008, "{value} {error}");
        }

        #[test]
        fn bars_cover_everything(values in prop::collection::vec(0_u64..100_000, 1..200), most in 2_usize..40) {
            let sketch = sketch(values.iter().copied());
            let bars = sketch.bars(most);
            prop_assert!(bars.len() <= most, "{} > {most}", bars.len());
            prop_assert_eq!(bars.iter().map(|bar| bar.count).sum::<u64>(), values.len() as u64);
            prop_assert!(bars[0].low <= sketch.min && bars[bars.len() - 1].high >= sketch.max, "{bars:?}");
        }

        #[test]
        fn merging_is_counting_both(a in prop::collection::vec(any::<u64>(), 0..50), b in prop::collection::vec(any::<u64>(), 1..50)) {
            let mut merged = sketch(a.iter().copied());
            merged.merge(&sketch(b.iter().copied()));
            prop_assert_eq!(merged.summary(), sketch(a.into_iter().chain(b)).summary());
        }
    }
}
