//! How many samples of a source were seen and skipped, and when that is too much.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Fewer samples than this say nothing about a source.
const ENOUGH_SEEN: u64 = 20;

/// Counts of one source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Samples looked at; some of them wait for a pack.
    pub seen: u64,
    /// Of those, how many in a second or later epoch.
    pub repeated: u64,
    /// Samples that their sampling weight left out; not among those seen.
    #[serde(default)]
    pub left_out: u64,
    /// Tokens of the samples that were not skipped, visual ones included.
    pub tokens: u64,
    /// Of those, how many are visual.
    pub visual_tokens: u64,
    /// Samples skipped, by [`BadSample::reason`](crate::BadSample::reason).
    pub skipped: BTreeMap<String, u64>,
}

impl fmt::Display for Tally {
    /// `120 samples read (20 of them again), 30 left out, 3 skipped (bad_json 2, no_answer 1)`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} samples read", self.seen)?;
        if self.repeated > 0 {
            write!(f, " ({} of them again)", self.repeated)?;
        }
        if self.left_out > 0 {
            write!(f, ", {} left out", self.left_out)?;
        }
        write!(f, ", {} skipped", self.total_skipped())?;
        for (index, (reason, count)) in self.skipped.iter().enumerate() {
            write!(f, "{}{reason} {count}", if index == 0 { " (" } else { ", " })?;
        }
        f.write_str(if self.skipped.is_empty() { "" } else { ")" })
    }
}

impl Tally {
    /// Samples skipped, for any reason.
    pub fn total_skipped(&self) -> u64 {
        self.skipped.values().sum()
    }

    /// The commonest reason and its count; the first by name among equals.
    pub fn commonest(&self) -> Option<(&str, u64)> {
        let most = *self.skipped.values().max()?;
        self.skipped.iter().find(|(_, count)| **count == most).map(|(reason, _)| (reason.as_str(), most))
    }

    pub(crate) fn skip(&mut self, reason: &str) {
        *self.skipped.entry(reason.to_owned()).or_default() += 1;
    }

    /// Counts what `other` counted as well.
    pub fn add(&mut self, other: &Self) {
        self.seen += other.seen;
        self.repeated += other.repeated;
        self.left_out += other.left_out;
        self.tokens += other.tokens;
        self.visual_tokens += other.visual_tokens;
        for (reason, count) in &other.skipped {
            *self.skipped.entry(reason.clone()).or_default() += count;
        }
    }

    /// Refuses a share of bad samples above `limit`, once enough samples were seen and chance does not explain it:
    /// a rank or a stream alone must not stop where all of them together would not.
    ///
    /// # Errors
    /// [`Error::TooManyBad`] naming the source.
    pub(crate) fn check(&self, name: &str, limit: f64) -> Result<()> {
        let skipped = self.total_skipped();
        match self.commonest() {
            Some((reason, count))
                if self.seen >= ENOUGH_SEEN && skipped as f64 > most_expected(self.seen, limit) =>
            {
                let (name, reason) = (name.to_owned(), reason.to_owned());
                Err(Error::TooManyBad { name, seen: self.seen, skipped, limit, reason, count })
            }
            _ => Ok(()),
        }
    }
}

/// The most bad samples of `seen` that are likely at a rate of `limit`: three standard deviations above the mean.
fn most_expected(seen: u64, limit: f64) -> f64 {
    let mean = limit * seen as f64;
    mean + 3.0 * (mean * (1.0 - limit)).sqrt()
}

/// Samples of each source that were bad in a row, while one pack is sought.
///
/// The rate of a source is judged over all streams by the loader; a stream alone sees too few samples for
/// that. But a stream that finds no good sample would search for ever, so a row that is next to impossible
/// below the limit stops it.
#[derive(Debug)]
pub(crate) struct Rows {
    by_source: Vec<Tally>,
    longest: u64,
    limit: f64,
}

impl Rows {
    pub(crate) fn new(sources: usize, limit: f64) -> Self {
        let longest = (ENOUGH_SEEN as f64 / (1.0 - limit)).ceil() as u64;
        Self { by_source: vec![Tally::default(); sources], longest, limit }
    }

    pub(crate) fn good(&mut self, source: usize) {
        self.by_source[source] = Tally::default();
    }

    /// # Errors
    /// [`Error::TooManyBad`] naming the source.
    pub(crate) fn bad(&mut self, source: usize, name: &str, reason: &str) -> Result<()> {
        let row = &mut self.by_source[source];
        row.seen += 1;
        row.skip(reason);
        if row.seen >= self.longest { row.check(name, self.limit) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(seen: u64, skipped: &[(&str, u64)]) -> Tally {
        let skipped = skipped.iter().map(|&(reason, n)| (reason.to_owned(), n)).collect();
        Tally { seen, skipped, ..Tally::default() }
    }

    #[test]
    fn the_rate_is_judged_after_twenty_samples() {
        assert!(tally(19, &[("bad_json", 19)]).check("s", 0.5).is_ok());
        assert!(tally(20, &[("bad_json", 16)]).check("s", 0.5).is_ok(), "chance explains that");
        assert!(tally(2_000, &[("bad_json", 1_100)]).check("s", 0.5).is_err(), "and not that");
        let error = tally(20, &[("bad_json", 5), ("no_answer", 12)]).check("s", 0.5).unwrap_err();
        let message = error.to_string();
        for part in ["`s`", "17 of 20", "0.5", "`no_answer`", "12 times"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(tally(20, &[]).check("s", 0.0).is_ok());
        assert!(tally(20, &[("x", 1)]).check("s", 0.0).is_err());
    }

    #[test]
    fn a_row_of_bad_samples_stops_a_stream() {
        let mut rows = Rows::new(2, 0.5);
        for _ in 0..39 {
            rows.bad(1, "s", "x").unwrap();
        }
        rows.bad(0, "t", "x").unwrap();
        assert!(rows.bad(1, "s", "x").is_err());
        rows.good(1);
        assert!(rows.bad(1, "s", "x").is_ok());
    }

    #[test]
    fn tallies_add_up() {
        let mut sum = tally(5, &[("a", 1)]);
        sum.add(&tally(7, &[("a", 1), ("b", 4)]));
        assert_eq!(sum, tally(12, &[("a", 2), ("b", 4)]));
        assert_eq!(sum.commonest(), Some(("b", 4)));
        assert_eq!(sum.total_skipped(), 6);
    }
}
