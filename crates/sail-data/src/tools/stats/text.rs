//! Distributions as text: a table and small bars.

use std::fmt::Write;

use super::{Figures, Measure, Stats};
use crate::tools::page::one_line;
use crate::tools::sketch::{Names, Sketch};

const BARS: usize = 24;
const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The report of all sources, and of all together when there are several.
pub(crate) fn report(stats: &Stats) -> String {
    let mut out = String::new();
    for figures in &stats.sources {
        source(&mut out, stats, figures);
    }
    if stats.sources.len() > 1 {
        source(&mut out, stats, &stats.total());
    }
    if !stats.counts_text {
        out.push_str("text was not tokenised; `--tokenizer FILE` counts its tokens\n");
    }
    out
}

fn source(out: &mut String, stats: &Stats, figures: &Figures) {
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "{}: {} samples in {} shard{}",
        figures.name,
        count(figures.samples),
        figures.shards,
        if figures.shards == 1 { "" } else { "s" }
    );
    let _ = writeln!(
        out,
        "  {:<25} {:>8} {:>8} {:>8} {:>8} {:>8} {:>10}",
        "", "min", "median", "p90", "p99", "max", "mean"
    );
    for measure in stats.measures() {
        row(out, measure, figures.sketch(measure));
    }
    if let Some(limit) = stats.limit {
        let share = percent(figures.too_long, figures.samples);
        let _ =
            writeln!(out, "  longer than a pack of {limit} tokens: {} ({share})", count(figures.too_long));
    }
    for (title, names) in
        [("bad", &figures.bad), ("licences", &figures.licenses), ("sources", &figures.origins)]
    {
        if names.total() > 0 {
            let _ = writeln!(out, "  {title}: {}", list(names, figures.samples));
        }
    }
    out.push('\n');
}

fn row(out: &mut String, measure: Measure, sketch: &Sketch) {
    let Some(summary) = sketch.summary() else { return };
    let _ = writeln!(
        out,
        "  {:<25} {:>8} {:>8} {:>8} {:>8} {:>8} {:>10.1}  {}",
        measure.label(),
        summary.min,
        summary.median,
        summary.p90,
        summary.p99,
        summary.max,
        summary.mean,
        sparks(sketch)
    );
}

/// A histogram of one line.
fn sparks(sketch: &Sketch) -> String {
    let bars = sketch.bars(BARS);
    let most = bars.iter().map(|bar| bar.count).max().unwrap_or(0).max(1);
    let level = |count: u64| match count {
        0 => ' ',
        _ => LEVELS[((count * 8).div_ceil(most) as usize).clamp(1, 8) - 1],
    };
    bars.iter().map(|bar| level(bar.count)).collect::<String>().trim_end().to_owned()
}

fn list(names: &Names, samples: u64) -> String {
    const SHOWN: usize = 8;
    let ranked = names.ranked();
    let shown = ranked.iter().take(SHOWN);
    let mut parts: Vec<String> =
        shown.map(|(name, times)| format!("{} {}", one_line(name), percent(*times, samples))).collect();
    if ranked.len() > SHOWN {
        parts.push(format!("{} more", ranked.len() - SHOWN));
    }
    parts.join(", ")
}

pub(super) fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "0 %".into(),
        _ => format!("{:.1} %", part as f64 * 100.0 / whole as f64),
    }
}

/// A number with its thousands set apart.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_bars_are_short() {
        let counts: Vec<String> = [0, 999, 1000, 1_234_567].map(count).into();
        assert_eq!(counts, ["0", "999", "1 000", "1 234 567"]);
        assert_eq!(percent(1, 8), "12.5 %");
        let mut sketch = Sketch::default();
        for value in [1, 1, 1, 1, 1, 1, 1, 1, 3] {
            sketch.add(value);
        }
        assert_eq!(sparks(&sketch), "█ ▁");
    }
}
