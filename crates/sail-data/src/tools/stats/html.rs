//! Distributions as a page: totals, then per source a table, histograms, licences and sources.

use std::fmt::Write;

use super::text::{count, percent};
use super::{Figures, Measure, Stats};
use crate::tools::page::{document, escape};
use crate::tools::sketch::{Bar, Names, Sketch};

const BARS: usize = 28;
const WIDTH: usize = 320;
const HEIGHT: usize = 110;
/// Room for the labels below and above the bars.
const BELOW: usize = 18;
const ABOVE: usize = 14;
/// Names shown of each kind; the others are summed up.
const NAMES: usize = 12;

/// The page of all sources.
pub(crate) fn page(stats: &Stats) -> String {
    let total = stats.total();
    let mut body = String::from("<h1>Data set statistics</h1>\n");
    let sources = stats.sources.len();
    let plural = if sources == 1 { "" } else { "s" };
    let _ = writeln!(
        body,
        "<p class=\"soft\">{sources} source{plural}, {} shards. Read from annotations and image headers.</p>",
        count(total.shards as u64)
    );
    totals(&mut body, stats, &total);
    if sources > 1 {
        body.push_str("<nav aria-label=\"Sources\">");
        for (index, figures) in stats.sources.iter().enumerate() {
            let _ = write!(body, "<a href=\"#s{index}\">{}</a>", escape(&figures.name));
        }
        body.push_str("</nav>\n");
        source(&mut body, stats, &total, "all");
    }
    for (index, figures) in stats.sources.iter().enumerate() {
        source(&mut body, stats, figures, &format!("s{index}"));
    }
    if !stats.broken.is_empty() {
        body.push_str("<h2>Broken shards</h2>\n<ul>\n");
        for (_, error) in &stats.broken {
            let _ = writeln!(body, "<li>{}</li>", escape(&error.to_string()));
        }
        body.push_str("</ul>\n");
    }
    document("Data set statistics", &body)
}

fn totals(body: &mut String, stats: &Stats, total: &Figures) {
    let sum = |measure| short(total.sketch(measure).sum());
    let images = total.sketch(Measure::ImageWidth).count();
    let mut cells = vec![("samples", count(total.samples)), ("images", count(images))];
    cells.push(("visual tokens", sum(Measure::VisualTokens)));
    if stats.counts_text {
        cells.push(("text tokens", sum(Measure::TextTokens)));
        cells.push(("answer tokens", sum(Measure::AnswerTokens)));
    }
    let too_long = stats.limit.map(|limit| format!("longer than {} tokens", count(limit as u64)));
    if let Some(label) = &too_long {
        cells.push((label, percent(total.too_long, total.samples)));
    }
    cells.push(("bad samples", count(total.bad.total())));
    body.push_str("<div class=\"totals\">\n");
    for (label, value) in cells {
        let _ = writeln!(body, "<div class=\"total\"><b>{value}</b><span>{label}</span></div>");
    }
    body.push_str("</div>\n");
}

/// A large number with three digits and a unit.
fn short(number: u128) -> String {
    let value = number as f64;
    match number {
        0..100_000 => count(number as u64),
        100_000..10_000_000 => format!("{:.0} k", value / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} M", value / 1e6),
        _ => format!("{:.1} G", value / 1e9),
    }
}

fn source(body: &mut String, stats: &Stats, figures: &Figures, id: &str) {
    let _ = writeln!(body, "<section>\n<h2 id=\"{id}\">{}</h2>", escape(&figures.name));
    let images = figures.sketch(Measure::ImageWidth).count();
    let _ = write!(
        body,
        "<p class=\"soft\">{} samples in {} shards, {} images",
        count(figures.samples),
        count(figures.shards as u64),
        count(images)
    );
    if let Some(limit) = stats.limit {
        let share = percent(figures.too_long, figures.samples);
        let _ = write!(body, "; {share} longer than a pack of {} tokens", count(limit as u64));
    }
    body.push_str("</p>\n");
    table(body, stats, figures);
    body.push_str("<div class=\"cards\">\n");
    for measure in stats.measures() {
        histogram(body, measure, figures.sketch(measure));
    }
    body.push_str("</div>\n<div class=\"names\">\n");
    for (title, names) in
        [("Licences", &figures.licenses), ("Sources", &figures.origins), ("Bad samples", &figures.bad)]
    {
        shares(body, title, names, figures.samples);
    }
    body.push_str("</div>\n</section>\n");
}

fn table(body: &mut String, stats: &Stats, figures: &Figures) {
    body.push_str("<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Table of distributions\"><table><thead><tr><th scope=\"col\"></th>");
    for column in ["min", "median", "p90", "p99", "max", "mean"] {
        let _ = write!(body, "<th scope=\"col\">{column}</th>");
    }
    body.push_str("</tr></thead>\n<tbody>\n");
    for measure in stats.measures() {
        let Some(summary) = figures.sketch(measure).summary() else { continue };
        let _ = write!(body, "<tr><th scope=\"row\">{}</th>", measure.label());
        for value in [summary.min, summary.median, summary.p90, summary.p99, summary.max] {
            let _ = write!(body, "<td>{}</td>", count(value));
        }
        let _ = writeln!(body, "<td>{:.1}</td></tr>", summary.mean);
    }
    body.push_str("</tbody></table></div>\n");
}

fn histogram(body: &mut String, measure: Measure, sketch: &Sketch) {
    let (Some(summary), bars) = (sketch.summary(), sketch.bars(BARS)) else { return };
    let label = measure.label();
    let _ = write!(
        body,
        "<div class=\"card\"><h3>{label}</h3><svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" \
         aria-label=\"Histogram of {label}: median {}, from {} to {}\">",
        ABOVE + HEIGHT + BELOW,
        summary.median,
        summary.min,
        summary.max
    );
    let most = bars.iter().map(|bar| bar.count).max().unwrap_or(1).max(1);
    let (slot, floor) = (WIDTH as f64 / bars.len().max(8) as f64, (ABOVE + HEIGHT) as f64);
    // The last bar is wider than the others when it holds a tail.
    let width = |bar: &Bar| bar.high - bar.low;
    let tail = bars.len() > 1 && width(&bars[bars.len() - 1]) != width(&bars[0]);
    for (index, bar) in bars.iter().enumerate().filter(|(_, bar)| bar.count > 0) {
        let height = (bar.count as f64 / most as f64 * HEIGHT as f64).max(1.0);
        let class = if tail && index + 1 == bars.len() { "tail" } else { "bar" };
        let _ = write!(
            body,
            "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"1.5\">\
             <title>{}: {} ({})</title></rect>",
            index as f64 * slot + 0.5,
            floor - height,
            slot - 1.0,
            range(bar),
            count(bar.count),
            percent(bar.count, sketch.count())
        );
    }
    let _ = write!(body, "<line class=\"base\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{floor}\" y2=\"{floor}\"/>");
    axis(body, &bars, slot, tail);
    let _ = write!(body, "<text x=\"{WIDTH}\" y=\"10\" text-anchor=\"end\">tallest {}</text>", count(most));
    body.push_str("</svg></div>\n");
}

/// Labels below the first bar, about every sixth, and the last.
fn axis(body: &mut String, bars: &[Bar], slot: f64, tail: bool) {
    let y = ABOVE + HEIGHT + 13;
    let every = bars.len().div_ceil(4).max(1);
    let last = bars.len().saturating_sub(1);
    for (index, bar) in bars.iter().enumerate() {
        let at_end = index == last;
        if !at_end && (!index.is_multiple_of(every) || last - index < every.div_ceil(2)) {
            continue;
        }
        let middle = index as f64 * slot + slot / 2.0;
        let (x, anchor) = match index {
            0 if slot < 30.0 => (0.0, "start"),
            _ if at_end && slot < 30.0 && middle > WIDTH as f64 - 40.0 => (WIDTH as f64, "end"),
            _ => (middle, "middle"),
        };
        let more = if at_end && tail { "≥ " } else { "" };
        let _ = write!(
            body,
            "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"{anchor}\">{more}{}</text>",
            count(bar.low)
        );
    }
}

fn range(bar: &Bar) -> String {
    if bar.low == bar.high { count(bar.low) } else { format!("{} to {}", count(bar.low), count(bar.high)) }
}

fn shares(body: &mut String, title: &str, names: &Names, samples: u64) {
    if names.total() == 0 {
        return;
    }
    let _ = write!(body, "<div class=\"card\"><h3>{title}</h3>");
    let ranked = names.ranked();
    let rest: u64 = ranked.iter().skip(NAMES).map(|(_, times)| times).sum();
    let others = format!("{} others", ranked.len().saturating_sub(NAMES));
    let shown = ranked.iter().copied().take(NAMES).chain((rest > 0).then_some((others.as_str(), rest)));
    for (name, times) in shown {
        let share = times as f64 * 100.0 / samples.max(1) as f64;
        let _ = write!(
            body,
            "<div class=\"share\"><span>{}</span><span>{} · {}</span><i style=\"--w:{share:.2}%\"></i></div>",
            escape(name),
            count(times),
            percent(times, samples)
        );
    }
    body.push_str("</div>\n");
}
