//! What sampling weights change, as text.

use std::fmt::Write;

use super::{Change, Summary};
use crate::tools::page::one_line;
use crate::tools::stats::text_count;

/// Frequent n-grams that are shown.
const SHOWN: usize = 10;
/// Characters of each that are shown.
const SHOWN_CHARS: usize = 100;

/// How many samples are kept, and the most frequent n-grams before and after.
pub(crate) fn report(summary: &Summary) -> String {
    let mut out = format!("{} samples", text_count(summary.samples));
    let reasons: Vec<String> =
        summary.unreadable.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    if !reasons.is_empty() {
        // Writing to a string cannot fail.
        let unreadable = text_count(summary.unreadable.values().sum());
        let _ = write!(out, ", {unreadable} of them without a text ({})", reasons.join(", "));
    }
    let share = percent(summary.kept / summary.samples as f64);
    let (kept, least) = (text_count(summary.kept.round() as u64), summary.least_weight);
    let _ = writeln!(out, "\nan epoch keeps about {kept} ({share}); the lowest weight is {least:.3}\n");
    let (n, above) = (summary.n, percent(summary.listed_above));
    if summary.frequent.is_empty() {
        let _ = writeln!(out, "no {n}-gram is in more than {above} of the samples");
        return out;
    }
    let Change { before, after } = summary.frequent_share();
    let frequent = text_count(summary.frequent.len() as u64);
    let (before, after) = (percent(before), percent(after));
    let _ = writeln!(out, "{frequent} {n}-grams in more than {above} of the samples:");
    let _ = writeln!(out, "  {before} of all {n}-grams before, {after} after");
    let Change { before, after } = summary.frequent_entropy();
    let _ = writeln!(out, "  an entropy of {before:.2} bits before, {after:.2} bits after\n");
    let _ = writeln!(out, "   before     after  most frequent {n}-grams, in a share of the samples");
    for frequent in summary.frequent.iter().take(SHOWN) {
        let Change { before, after } = frequent.samples.of(summary.texts);
        let _ = writeln!(out, "{:>9} {:>9}  {}", percent(before), percent(after), shown(&frequent.ngram));
    }
    out
}

/// An n-gram of words without spaces between them may be as long as a sample.
fn shown(ngram: &str) -> String {
    let text = one_line(ngram);
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}
