//! Whose turn it is: the mixture of sources as a pure function of what each has given.
//!
//! Every source has a clock that runs by what it has given over its weight, and the one that is furthest
//! behind is next (stride scheduling: Waldspurger and Weihl, 1995). So shares are kept not only on average but
//! over every short stretch, and the position in the mixture is the counts themselves.

/// One source's part in the mixture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Part {
    /// Its weight, above 0.
    pub(crate) weight: f64,
    /// What it has given: samples or tokens.
    pub(crate) given: f64,
    /// What one more sample is expected to give, at least 1.
    pub(crate) next: f64,
    /// In [0, 1): how far into its first sample its clock starts, so that streams do not begin alike.
    pub(crate) phase: f64,
    /// Whether it has any sample left.
    pub(crate) open: bool,
}

/// The source that is next, `None` when all have ended. The first of several equals.
pub(crate) fn next_source(parts: &[Part]) -> Option<usize> {
    let clock = |part: &Part| (part.given + part.phase * part.next) / part.weight;
    let open = parts.iter().enumerate().filter(|(_, part)| part.open);
    open.min_by(|(_, a), (_, b)| clock(a).total_cmp(&clock(b))).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(weights: &[f64]) -> Vec<Part> {
        weights.iter().map(|&weight| Part { weight, given: 0.0, next: 1.0, phase: 0.5, open: true }).collect()
    }

    #[test]
    fn shares_are_kept_over_every_stretch() {
        let mut parts = parts(&[1.0, 3.0, 0.5]);
        for taken in 1..=900 {
            let next = next_source(&parts).unwrap();
            parts[next].given += 1.0;
            for part in &parts {
                let due = f64::from(taken) * part.weight / 4.5;
                assert!((part.given - due).abs() <= 1.0, "{parts:?} after {taken}");
            }
        }
    }

    #[test]
    fn tokens_are_shared_when_samples_differ_in_length() {
        let mut parts = parts(&[1.0, 1.0]);
        let lengths = [100.0, 7.0];
        for (part, length) in parts.iter_mut().zip(lengths) {
            part.next = length;
        }
        for _ in 0..5_000 {
            let next = next_source(&parts).unwrap();
            parts[next].given += lengths[next];
        }
        assert!((parts[0].given - parts[1].given).abs() <= 100.0, "{parts:?}");
    }

    #[test]
    fn what_has_ended_is_left_out() {
        let mut parts = parts(&[1.0, 9.0]);
        parts[1].open = false;
        assert_eq!(next_source(&parts), Some(0));
        parts[0].open = false;
        assert_eq!(next_source(&parts), None);
        assert_eq!(next_source(&[]), None);
    }
}
