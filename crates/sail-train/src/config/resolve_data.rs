//! The sections about data: `data` and `eval`.

use std::collections::BTreeSet;

use sail_data::{
    CacheSpec, ImageTokens, Layout, PageChoice, Reencode, SourceSpec, StoreSpec, Template, Tiling,
};

use super::check::Checker;
use super::plan::{BatchPlan, EvalPlan, TrainPlan};
use super::plan_data::{AnyResolutionPlan, DataPlan, FeatureCachePlan};
use super::raw::RawEval;
use super::raw_data::{
    RawData, RawFeatureCache, RawImageTokens, RawReencode, RawSource, RawStore, RawTiling,
};
use super::raw_values::RawList;
use super::resolve::{every, wanted};
use super::values::{Module, VisualBalance};

/// Resolves `data`; `batch` and `train` are `None` where they failed themselves.
pub(super) fn data(
    checker: &mut Checker<'_>,
    raw: RawData,
    batch: Option<&BatchPlan>,
    train: Option<&TrainPlan>,
) -> Option<DataPlan> {
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
    lengths(checker, &raw, batch);
    let image_tokens = image_tokens(checker, raw.image_tokens);
    let tiling = tiling(checker, &raw.tiling);
    checker.expect(raw.max_frames >= 1, "data.max_frames", "must be at least 1", raw.max_frames);
    if raw.template_file.is_some() && raw.template != Template::Jinja {
        checker.invalid_with_hint(
            "data.template_file",
            "needs `template: jinja`",
            "add it, or leave the file out",
        );
    }
    if raw.any_resolution.is_some() && raw.tiling.max > 1 {
        checker.invalid_with_hint(
            "data.tiling",
            "is given beside `data.any_resolution`",
            "leave one of them out",
        );
    }
    let any_resolution = raw.any_resolution.map(|any| {
        let path = "data.any_resolution.max_tokens";
        checker.expect(
            any.min_tokens >= 1,
            "data.any_resolution.min_tokens",
            "must be at least 1",
            any.min_tokens,
        );
        let must = format!("must be at least `data.any_resolution.min_tokens`, {}", any.min_tokens);
        checker.expect(any.max_tokens >= any.min_tokens, path, &must, any.max_tokens);
        AnyResolutionPlan { min_tokens: any.min_tokens, max_tokens: any.max_tokens }
    });
    let reencode = raw.reencode.map(|raw| reencode(checker, &raw));
    let store = store(checker, raw.store);
    let feature_cache = raw.feature_cache.map(|cache| feature_cache(checker, cache, train, reencode));
    let sources = sources(checker, "data.sources", raw.sources);
    Some(DataPlan {
        streams: raw.streams,
        threads: raw.threads,
        shuffle_buffer: raw.shuffle_buffer,
        pack_buffer: raw.pack_buffer,
        mix_by: raw.mix_by,
        epochs: raw.epochs,
        samples: raw.samples,
        too_long: raw.too_long,
        balance: raw.balance,
        visual_tokens_per_pack: raw.visual_tokens_per_pack,
        max_error_rate: rate,
        max_pixels: raw.max_pixels,
        template: raw.template,
        template_file: raw.template_file,
        system: raw.system,
        loss_weight: raw.loss_weight,
        image_tokens,
        tiling,
        any_resolution,
        max_frames: raw.max_frames,
        background: raw.background,
        exif_orientation: raw.exif_orientation,
        reencode,
        mean: raw.mean,
        std: raw.std,
        store: store?,
        feature_cache: wanted(feature_cache)?,
        sources: sources?,
    })
}

/// How often and how badly images are compressed again.
fn reencode(checker: &mut Checker<'_>, raw: &RawReencode) -> Reencode {
    let (share, [low, high]) = (raw.probability, raw.quality);
    checker.expect((0.0..=1.0).contains(&share), "data.reencode.probability", "must be from 0 to 1", share);
    let ordered = 1 <= low && low <= high && high <= 100;
    let must = "must be two numbers of 1 to 100, the lower first";
    checker.expect(ordered, "data.reencode.quality", must, format!("[{low}, {high}]"));
    Reencode { probability: share, quality: raw.quality }
}

/// How long the stream is, and what its packs hold.
fn lengths(checker: &mut Checker<'_>, raw: &RawData, batch: Option<&BatchPlan>) {
    for (path, count) in [("data.epochs", raw.epochs), ("data.samples", raw.samples)] {
        checker.expect(count != Some(0), path, "must be at least 1", 0);
    }
    if raw.epochs.is_some() && raw.samples.is_some() {
        checker.invalid_with_hint("data.samples", "is given beside `data.epochs`", "leave one of them out");
    }
    let Some(visual) = raw.visual_tokens_per_pack else { return };
    let path = "data.visual_tokens_per_pack";
    if let Some(most) = batch.map(|batch| batch.tokens_per_pack).filter(|&most| visual > most) {
        checker.invalid(path, format!("{visual} is more than `batch.tokens_per_pack`, {most}"));
    }
    if raw.balance == VisualBalance::Off {
        checker.invalid_with_hint(path, "is given with `balance: off`", "leave one of them out");
    }
}

fn store(checker: &mut Checker<'_>, raw: RawStore) -> Option<StoreSpec> {
    let RawStore { retries, timeout_secs, read_ahead_bytes, cache } = raw;
    checker.expect(timeout_secs > 0.0, "data.store.timeout_secs", "must be above 0", timeout_secs);
    let cache = match cache {
        None => None,
        Some(cache) => {
            let dir = checker.required("data.store.cache.dir", cache.dir);
            let max_bytes = checker.required("data.store.cache.max_bytes", cache.max_bytes);
            Some(CacheSpec { dir: dir?, max_bytes: max_bytes? })
        }
    };
    Some(StoreSpec { retries, timeout_secs, read_ahead_bytes, cache })
}

/// Features that may be kept: those that the same pixels give all through the stage, of pixels that come again.
fn feature_cache(
    checker: &mut Checker<'_>,
    raw: RawFeatureCache,
    train: Option<&TrainPlan>,
    reencode: Option<Reencode>,
) -> Option<FeatureCachePlan> {
    let path = "data.feature_cache";
    if train.is_some_and(|train| train.ever_trains(Module::Vision)) {
        checker.invalid_with_hint(
            path,
            "the vision encoder trains in this stage, and its features change with it",
            "leave it out, or freeze `train.vision` and all of it in `train.rules` and `train.unfreeze`",
        );
    }
    if reencode.is_some_and(|reencode| reencode.probability > 0.0) {
        checker.invalid_with_hint(
            path,
            "`data.reencode` gives an image other pixels in each epoch",
            "leave one of them out",
        );
    }
    let dir = checker.required("data.feature_cache.dir", raw.dir);
    let max_bytes = checker.required("data.feature_cache.max_bytes", raw.max_bytes);
    if dir.as_ref().is_some_and(|dir| dir.as_os_str().is_empty()) {
        checker.invalid("data.feature_cache.dir", "must not be empty");
    }
    checker.expect(max_bytes != Some(0), "data.feature_cache.max_bytes", "must be at least 1", 0);
    Some(FeatureCachePlan { dir: dir?, max_bytes: max_bytes? })
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
    for (index, _) in sources.iter().enumerate().filter(|(_, source)| source.sampling_weights.is_some()) {
        let path = format!("eval.sources[{index}].sampling_weights");
        checker.invalid(&path, "is for `data.sources` alone: held-out samples are all measured");
    }
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

fn source(checker: &mut Checker<'_>, path: &str, mut raw: RawSource) -> Option<SourceSpec> {
    let name = checker.required(&format!("{path}.name"), raw.name.take());
    let shards = checker.required(&format!("{path}.shards"), raw.shards.take());
    if raw.weight <= 0.0 {
        checker.invalid_with_hint(
            &format!("{path}.weight"),
            format!("must be above 0, found {}", raw.weight),
            "leave the source out instead",
        );
    }
    let (name, RawList(shards)) = (name?, shards?);
    if name.trim().is_empty() {
        checker.invalid(&format!("{path}.name"), "must not be empty");
    }
    if shards.is_empty() || shards.iter().any(String::is_empty) {
        checker.invalid(&format!("{path}.shards"), "must name at least one path, none of them empty");
    }
    if raw.page != PageChoice::First && raw.layout != Layout::Pages {
        checker.invalid(&format!("{path}.page"), "is for `layout: pages` alone");
    }
    if !raw.questions.is_empty() && !matches!(raw.layout, Layout::Captions | Layout::Pages) {
        checker.invalid(&format!("{path}.questions"), "are for `layout: captions` and `layout: pages` alone");
    }
    let RawSource { images, layout, questions, page, weight, sampling_weights, .. } = raw;
    Some(SourceSpec { name, shards, images, layout, questions, page, weight, sampling_weights })
}
