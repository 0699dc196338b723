//! The sections about data: `data` and `eval`.

use std::collections::BTreeSet;

use sail_data::{ImageTokens, SourceSpec, Tiling};

use super::check::Checker;
use super::plan::{BatchPlan, DataPlan, EvalPlan};
use super::raw::{RawData, RawEval, RawImageTokens, RawSource, RawTiling};
use super::raw_values::RawShards;
use super::resolve::every;

/// Resolves `data`; `batch` is `None` where it failed itself.
pub(super) fn data(checker: &mut Checker<'_>, raw: RawData, batch: Option<&BatchPlan>) -> Option<DataPlan> {
    // The upper ends are far above any use; beyond them a slip of the pen takes the machine down.
    for (path, count, most) in [
        ("data.streams", raw.streams, 65_536),
        ("data.threads", raw.threads, 512),
        ("data.shuffle_buffer", raw.shuffle_buffer, 10_000_000),
        ("data.pack_buffer", raw.pack_buffer, 100_000),
    ] {
        checker.expect(count >= 1, path, "must be at least 1", count);
        checker.expect(count <= most, path, &format!("must be at most {most}"), count);
    }
    if let Some(batch) = batch {
        streams_fit(checker, raw.streams, batch.packs_per_step);
    }
    let rate = raw.max_error_rate;
    checker.expect((0.0..1.0).contains(&rate), "data.max_error_rate", "must be from 0 to below 1", rate);
    checker.expect(raw.max_pixels >= 1, "data.max_pixels", "must be at least 1", raw.max_pixels);
    for (index, std) in raw.std.iter().enumerate() {
        checker.expect(*std > 0.0, &format!("data.std[{index}]"), "must be above 0", std);
    }
    let image_tokens = image_tokens(checker, raw.image_tokens);
    let tiling = tiling(checker, &raw.tiling);
    let sources = sources(checker, "data.sources", raw.sources);
    Some(DataPlan {
        streams: raw.streams,
        threads: raw.threads,
        shuffle_buffer: raw.shuffle_buffer,
        pack_buffer: raw.pack_buffer,
        max_error_rate: rate,
        max_pixels: raw.max_pixels,
        template: raw.template,
        system: raw.system,
        loss_weight: raw.loss_weight,
        image_tokens,
        tiling,
        mean: raw.mean,
        std: raw.std,
        sources: sources?,
    })
}

/// Pack g comes from stream g mod `streams`: only when one number divides the other does every step draw from the
/// same streams, so that streams can be dealt to devices.
fn streams_fit(checker: &mut Checker<'_>, streams: usize, packs: usize) {
    if streams >= 1 && packs >= 1 && !packs.is_multiple_of(streams) && !streams.is_multiple_of(packs) {
        checker.invalid_with_hint(
            "data.streams",
            format!("{streams} does not fit `batch.packs_per_step`, {packs}"),
            "packs are taken from the streams in turn: one of the two numbers must divide the other",
        );
    }
}

fn image_tokens(checker: &mut Checker<'_>, raw: RawImageTokens) -> ImageTokens {
    let RawImageTokens { start, context, end } = raw;
    for (name, token) in [("start", &start), ("context", &context), ("end", &end)] {
        if token.is_empty() {
            checker.invalid(&format!("data.image_tokens.{name}"), "must not be empty");
        }
    }
    if start == context || context == end || start == end {
        checker.invalid("data.image_tokens", "`start`, `context` and `end` must be three different tokens");
    }
    ImageTokens { start, context, end }
}

fn tiling(checker: &mut Checker<'_>, raw: &RawTiling) -> Tiling {
    checker.expect(raw.min >= 1, "data.tiling.min", "must be at least 1", raw.min);
    let must = format!("must be at least `data.tiling.min`, {}", raw.min);
    checker.expect(raw.max >= raw.min, "data.tiling.max", &must, raw.max);
    checker.expect(raw.max <= 1_024, "data.tiling.max", "must be at most 1024", raw.max);
    Tiling { min: raw.min, max: raw.max, thumbnail: raw.thumbnail }
}

/// Resolves `eval`.
pub(super) fn eval(checker: &mut Checker<'_>, raw: RawEval) -> Option<EvalPlan> {
    every(checker, "eval.every", raw.every, "leave it out to evaluate only at the start and the end");
    checker.expect(raw.samples >= 1, "eval.samples", "must be at least 1", raw.samples);
    checker.expect(raw.max_new_tokens >= 1, "eval.max_new_tokens", "must be at least 1", raw.max_new_tokens);
    let sources = sources(checker, "eval.sources", raw.sources)?;
    Some(EvalPlan {
        every: raw.every,
        samples: raw.samples,
        generate: raw.generate,
        max_new_tokens: raw.max_new_tokens,
        sources,
    })
}

/// A list of sources; `path` is where it is.
fn sources(checker: &mut Checker<'_>, path: &str, raw: Option<Vec<RawSource>>) -> Option<Vec<SourceSpec>> {
    let raw = checker.required(path, raw)?;
    if raw.is_empty() {
        checker.invalid_with_hint(
            path,
            "is empty",
            "add a source: `- { name: NAME, shards: \"PATH-*.tar\" }`",
        );
    }
    let mut names = BTreeSet::new();
    let resolved: Vec<Option<SourceSpec>> = raw
        .into_iter()
        .enumerate()
        .map(|(index, raw)| {
            let spec = source(checker, &format!("{path}[{index}]"), raw)?;
            if !names.insert(spec.name.clone()) {
                let message = format!("another source is named `{}`", spec.name);
                checker.invalid(&format!("{path}[{index}].name"), message);
            }
            Some(spec)
        })
        .collect();
    resolved.into_iter().collect()
}

fn source(checker: &mut Checker<'_>, path: &str, raw: RawSource) -> Option<SourceSpec> {
    let name = checker.required(&format!("{path}.name"), raw.name);
    let shards = checker.required(&format!("{path}.shards"), raw.shards);
    if raw.weight <= 0.0 {
        checker.invalid_with_hint(
            &format!("{path}.weight"),
            format!("must be above 0, found {}", raw.weight),
            "leave the source out instead",
        );
    }
    let (name, RawShards(shards)) = (name?, shards?);
    if name.trim().is_empty() {
        checker.invalid(&format!("{path}.name"), "must not be empty");
    }
    if shards.is_empty() || shards.iter().any(String::is_empty) {
        checker.invalid(&format!("{path}.shards"), "must name at least one path, none of them empty");
    }
    Some(SourceSpec { weight: raw.weight, ..SourceSpec::new(&name, shards) })
}
