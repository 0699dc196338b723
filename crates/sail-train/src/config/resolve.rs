//! The file's form to a [`Plan`]: defaults and derived values filled in, everything checked that can be checked
//! without opening a model or a shard. The data sections are in `resolve_data.rs`,
//! `train`, `optimizer` and `schedule` in `resolve_train.rs`.

use std::path::{Component, Path, PathBuf};

use sail_model::llm::LlmConfig;
use sail_model::projector::{ProjectorConfig, ProjectorKind};
use sail_model::vision::VisionConfig;
use sail_model::weights::ModelRef;
use serde_json::Value;

use super::check::Checker;
use super::de;
use super::error::{ConfigError, Problem};
use super::path::FieldPath;
use super::plan::{
    BatchPlan, CheckpointPlan, EarlyStopPlan, ExportPlan, GuardPlan, InitPlan, LlmPlan, LogPlan, MlflowPlan,
    ModelPlan, ParallelPlan, Plan, RecomputePlan, RunPlan, VisionPlan, WatchdogPlan,
};
use super::raw::{
    RawBatch, RawCheckpoint, RawExport, RawGuard, RawInit, RawLlm, RawLog, RawMlflow, RawModel, RawParallel,
    RawProjector, RawRecompute, RawRun, RawRunSection, RawVision, RawWatchdog,
};
use super::tree::Node;
use super::values::{Amount, ModelSource};
use super::{resolve_data, resolve_train};

/// Makes the plan of one stage's tree. `errors` are those of reading its text.
///
/// # Errors
/// Every fault, sorted by file and line.
pub(super) fn stage(tree: &Node, errors: Vec<ConfigError>) -> Result<Plan, Vec<ConfigError>> {
    let mut checker = Checker::new(tree, errors);
    let raw: RawRun = de::read(&mut checker);
    let plan = sections(&mut checker, raw);
    let errors = checker.into_errors();
    match plan {
        Some(plan) if errors.is_empty() => Ok(plan),
        _ => Err(errors),
    }
}

/// Resolves every section before looking whether one failed, so that each can report its faults.
fn sections(checker: &mut Checker<'_>, raw: RawRun) -> Option<Plan> {
    let root = raw.run.root.clone();
    let run = run(checker, raw.run);
    let model = model(checker, raw.model);
    let init = raw.init.map(|init| self::init(checker, init, &root));
    let schedule = resolve_train::schedule(checker, &raw.schedule);
    let train = resolve_train::train(checker, raw.train, &raw.optimizer, schedule.as_ref());
    let optimizer = resolve_train::optimizer(checker, raw.optimizer, train.as_ref());
    let batch = batch(checker, &raw.batch);
    let data = resolve_data::data(checker, raw.data, batch.as_ref(), train.as_ref());
    let parallel = parallel(checker, &raw.parallel);
    let checkpoint = checkpoint(checker, &raw.checkpoint);
    let guard = guard(checker, &raw.guard);
    let log = log(checker, raw.log);
    let watchdog = watchdog(checker, &raw.watchdog);
    let eval = raw.eval.map(|eval| resolve_data::eval(checker, eval));
    let export = raw.export.map(|export| self::export(checker, &export));

    let plan = Plan {
        run: run?,
        model: model?,
        init: wanted(init)?,
        train: train?,
        optimizer: optimizer?,
        schedule: schedule?,
        batch: batch?,
        data: data?,
        parallel,
        checkpoint,
        guard,
        log: log?,
        watchdog,
        eval: wanted(eval)?,
        export: wanted(export)?,
    };
    keep_rules(checker, &plan);
    early_stop(checker, &plan);
    if plan.init.as_ref().is_some_and(|init| init.from == plan.run.dir) {
        checker.invalid("init.from", "is this run's own folder, `run.dir`");
    }
    Some(plan)
}

/// Rules for keeping checkpoints that would find none to keep.
fn keep_rules(checker: &mut Checker<'_>, plan: &Plan) {
    let CheckpointPlan { every, keep_every, keep_best, .. } = plan.checkpoint;
    let divides = |a: u64, b: u64| a > 0 && b.is_multiple_of(a);
    // 0 is a fault of its own.
    if let Some(keep_every) = keep_every.filter(|steps| *steps > 0)
        && !every.is_some_and(|every| divides(every, keep_every))
    {
        checker.invalid_with_hint(
            "checkpoint.keep_every",
            format!("is not a multiple of `checkpoint.every`, found {keep_every}"),
            "only steps that are saved can be kept",
        );
    }
    let evaluates = plan.eval.as_ref().and_then(|eval| eval.every);
    let meets =
        every.zip(evaluates).is_some_and(|(every, eval)| divides(every, eval) || divides(eval, every));
    if keep_best.is_some_and(|count| count > 0) && !meets {
        checker.invalid_with_hint(
            "checkpoint.keep_best",
            "needs held-out losses of steps that are saved",
            "give `checkpoint.every` and `eval.every`, one a multiple of the other",
        );
    }
}

/// A stage that could never end early.
fn early_stop(checker: &mut Checker<'_>, plan: &Plan) {
    let Some(EarlyStopPlan { patience, .. }) = plan.schedule.early_stop else { return };
    let Some(every) = plan.eval.as_ref().and_then(|eval| eval.every) else {
        checker.invalid_with_hint(
            "schedule.early_stop",
            "needs held-out losses during the stage",
            "give `eval.every`",
        );
        return;
    };
    if let Amount::Steps(steps) = plan.schedule.length
        && (patience as u64).saturating_mul(every) >= steps
    {
        checker.invalid_with_hint(
            "schedule.early_stop.patience",
            format!("is never reached: {patience} evaluations, one every {every} of {steps} steps"),
            "lower it or `eval.every`",
        );
    }
}

/// A section that is not wanted is fine; one that is wanted and failed is not.
#[expect(clippy::option_option, reason = "outer: whether it resolved; inner: whether it is wanted")]
pub(super) fn wanted<T>(section: Option<Option<T>>) -> Option<Option<T>> {
    match section {
        None => Some(None),
        Some(resolved) => resolved.map(Some),
    }
}

fn run(checker: &mut Checker<'_>, raw: RawRunSection) -> Option<RunPlan> {
    let name = checker.required("run.name", raw.name);
    let dir = checker.required("run.dir", raw.dir);
    let (name, dir) = (name?, dir?);
    if name.trim().is_empty() {
        checker.invalid("run.name", "must not be empty");
    }
    let dir = under(&raw.root, &dir);
    if dir.as_os_str().is_empty() {
        checker.invalid("run.dir", "must not be empty");
    } else if dir.parent().is_none() {
        checker.invalid("run.dir", "must be a folder of its own");
    }
    let RawRunSection { seed, device, precision, time_limit_secs, time_margin_secs, .. } = raw;
    if let Some(limit) = time_limit_secs {
        let must = format!("must be more than `run.time_margin_secs`, {time_margin_secs}");
        checker.expect(limit > time_margin_secs, "run.time_limit_secs", &must, limit);
    }
    Some(RunPlan { name, dir, seed, device, precision, time_limit_secs, time_margin_secs })
}

/// `path` below `root` unless it is absolute, without `.` steps, so that equal folders compare equal.
fn under(root: &Path, path: &Path) -> PathBuf {
    root.join(path).components().filter(|step| *step != Component::CurDir).collect()
}

fn model(checker: &mut Checker<'_>, raw: RawModel) -> Option<ModelPlan> {
    let projector = projector(checker, &raw.projector);
    let vision = vision(checker, raw.vision);
    let llm = llm(checker, raw.llm);
    Some(ModelPlan { vision: vision?, projector, llm: llm? })
}

fn projector(checker: &mut Checker<'_>, raw: &RawProjector) -> ProjectorConfig {
    let default = if raw.kind == ProjectorKind::PixelShuffle { 2 } else { 1 };
    let config = ProjectorConfig { kind: raw.kind, merge: raw.merge.unwrap_or(default) };
    if let Err(sail_model::Error::Config { reason, .. }) = config.validate() {
        checker.invalid("model.projector.merge", reason);
    }
    config
}

fn vision(checker: &mut Checker<'_>, raw: RawVision) -> Option<VisionPlan> {
    let source =
        source(checker, "model.vision", raw.from, raw.random, |keys| VisionConfig::from_keys(keys).map(drop));
    let image_px = checker.required("model.vision.image_px", raw.image_px);
    if let Some(image_px) = image_px {
        checker.expect(
            (1..=16_384).contains(&image_px),
            "model.vision.image_px",
            "must be from 1 to 16384",
            image_px,
        );
    }
    Some(VisionPlan { source: source?, image_px: image_px? })
}

fn llm(checker: &mut Checker<'_>, raw: RawLlm) -> Option<LlmPlan> {
    let (beside_weights, from_hub) = match &raw.from {
        Some(ModelRef::Folder(folder)) => (Some(folder.join("tokenizer.json")), false),
        Some(ModelRef::Hub { .. }) => (None, true),
        None => (None, false),
    };
    let source =
        source(checker, "model.llm", raw.from, raw.random, |keys| LlmConfig::from_keys(keys).map(drop))?;
    let tokenizer = raw.tokenizer.or(beside_weights);
    if tokenizer.is_none() && !from_hub {
        checker.invalid_with_hint(
            "model.llm.tokenizer",
            "missing",
            "`random` weights bring no tokenizer: name a `tokenizer.json`",
        );
    }
    (tokenizer.is_some() || from_hub).then_some(LlmPlan { source, tokenizer })
}

/// Exactly one of `from` and `random`.
fn source(
    checker: &mut Checker<'_>,
    section: &str,
    from: Option<ModelRef>,
    random: Option<Value>,
    check: impl Fn(&Value) -> sail_model::Result<()>,
) -> Option<ModelSource> {
    match (from, random) {
        (Some(model), None) => Some(ModelSource::From(model)),
        (None, Some(config)) => {
            if !config.get("model_type").is_some_and(Value::is_string) {
                checker.invalid_with_hint(
                    &format!("{section}.random"),
                    "must be a mapping with a `model_type`",
                    "write the keys of the family's own `config.json`",
                );
                return None;
            }
            random_keys(checker, section, &config, check);
            Some(ModelSource::Random(config))
        }
        (Some(_), Some(_)) => {
            checker.invalid_with_hint(
                section,
                "has both `from` and `random`",
                "keep one; `from: null` takes back an inherited one",
            );
            None
        }
        (None, None) => {
            checker.invalid_with_hint(
                &format!("{section}.from"),
                "missing",
                "name a folder or `hf:org/name` with `from`, or a shape with `random: { model_type: ... }`",
            );
            None
        }
    }
}

/// Reports every key that the family does not take: the one at fault is left out and the rest looked at again.
fn random_keys(
    checker: &mut Checker<'_>,
    section: &str,
    config: &Value,
    check: impl Fn(&Value) -> sail_model::Result<()>,
) {
    let mut keys = config.clone();
    while let Err(error) = check(&keys) {
        let (key, reason) = match error {
            sail_model::Error::Config { key, reason, .. } => (key, reason),
            other => (String::new(), other.to_string()),
        };
        if keys.as_object_mut().and_then(|keys| keys.remove(&key)).is_none() {
            checker.invalid(&format!("{section}.random"), format!("`{key}`: {reason}"));
            return;
        }
        let path = FieldPath::parse(section).map(|path| path.child("random").child(&key));
        checker.fault(path.unwrap_or_default(), Problem::Invalid(reason));
        if key == "model_type" {
            return;
        }
    }
}

fn init(checker: &mut Checker<'_>, raw: RawInit, root: &Path) -> Option<InitPlan> {
    let from = checker.required("init.from", raw.from)?;
    Some(InitPlan { from: under(root, &from) })
}

fn batch(checker: &mut Checker<'_>, raw: &RawBatch) -> Option<BatchPlan> {
    let tokens_per_pack = checker.required("batch.tokens_per_pack", raw.tokens_per_pack);
    let packs_per_step = checker.required("batch.packs_per_step", raw.packs_per_step);
    let RawRecompute { vision, llm } = raw.recompute;
    let vision_images = raw.vision_images;
    let plan = BatchPlan {
        tokens_per_pack: tokens_per_pack?,
        packs_per_step: packs_per_step?,
        vision_images,
        recompute: RecomputePlan { vision, llm },
    };
    let (tokens, packs) = (plan.tokens_per_pack, plan.packs_per_step);
    let between = "must be from 2 to 16777216";
    checker.expect((2..=1 << 24).contains(&tokens), "batch.tokens_per_pack", between, tokens);
    checker.expect(packs >= 1, "batch.packs_per_step", "must be at least 1", packs);
    let at_least = "must be at least 1";
    checker.expect(vision_images >= 1, "batch.vision_images", at_least, vision_images);
    Some(plan)
}

fn parallel(checker: &mut Checker<'_>, raw: &RawParallel) -> ParallelPlan {
    let RawParallel { strategy, reduce, bucket_mb, timeout_secs, first_step_timeout_secs } = *raw;
    let must = "must be from 1 to 65536";
    checker.expect((1..=65_536).contains(&bucket_mb), "parallel.bucket_mb", must, bucket_mb);
    for (path, secs) in [
        ("parallel.timeout_secs", timeout_secs),
        ("parallel.first_step_timeout_secs", first_step_timeout_secs),
    ] {
        checker.expect((1..=604_800).contains(&secs), path, "must be from 1 to 604800, a week", secs);
    }
    ParallelPlan { strategy, reduce, bucket_mb, timeout_secs, first_step_timeout_secs }
}

fn checkpoint(checker: &mut Checker<'_>, raw: &RawCheckpoint) -> CheckpointPlan {
    every(checker, "checkpoint.every", raw.every, "leave it out for a checkpoint only at the end");
    checker.expect(raw.keep_last >= 1, "checkpoint.keep_last", "must be at least 1", raw.keep_last);
    every(checker, "checkpoint.keep_every", raw.keep_every, "leave it out to keep none for their step");
    let RawCheckpoint { every, keep_last, keep_every, keep_best, max_failures, timeout_secs } = *raw;
    checker.expect(keep_best != Some(0), "checkpoint.keep_best", "must be at least 1", 0);
    checker.expect(timeout_secs >= 1, "checkpoint.timeout_secs", "must be at least 1", timeout_secs);
    CheckpointPlan { every, keep_last, keep_every, keep_best, max_failures, timeout_secs }
}

fn guard(checker: &mut Checker<'_>, raw: &RawGuard) -> GuardPlan {
    let RawGuard { not_finite, spike, spike_z, window, max_trips, self_check } = *raw;
    checker.expect(spike_z > 0.0, "guard.spike_z", "must be above 0", spike_z);
    checker.expect((2..=100_000).contains(&window), "guard.window", "must be from 2 to 100000", window);
    GuardPlan { not_finite, spike, spike_z, window, max_trips, self_check }
}

fn log(checker: &mut Checker<'_>, raw: RawLog) -> Option<LogPlan> {
    let RawLog { every, line_secs, peak_tflops, tensorboard, prometheus, mlflow } = raw;
    checker.expect(every >= 1, "log.every", "must be at least 1", every);
    checker.expect(line_secs >= 1, "log.line_secs", "must be at least 1", line_secs);
    if let Some(peak) = peak_tflops {
        checker.expect((1e-3..=1e9).contains(&peak), "log.peak_tflops", "must be from 0.001 to 1e9", peak);
    }
    let mlflow = wanted(mlflow.map(|mlflow| self::mlflow(checker, mlflow)));
    Some(LogPlan { every, line_secs, peak_tflops, tensorboard, prometheus, mlflow: mlflow? })
}

fn mlflow(checker: &mut Checker<'_>, raw: RawMlflow) -> Option<MlflowPlan> {
    let RawMlflow { url, experiment, flush_secs, model } = raw;
    let url = checker.required("log.mlflow.url", url)?;
    if !["http://", "https://"].iter().any(|scheme| url.len() > scheme.len() && url.starts_with(scheme)) {
        checker.invalid_with_hint(
            "log.mlflow.url",
            format!("is no web address, found `{url}`"),
            "an MLflow server is needed, like `http://127.0.0.1:5000`; `mlflow server` starts one",
        );
    } else if url.contains(['?', '#']) {
        checker.invalid_with_hint(
            "log.mlflow.url",
            "must be an address without `?` and `#`, of which what follows would be written to the run's folder",
            "give a token in `MLFLOW_TRACKING_TOKEN`",
        );
    } else if url.contains('@') {
        checker.invalid_with_hint(
            "log.mlflow.url",
            "must not hold a user or a password, which would be written to the run's folder",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
        );
    }
    let is_name = !experiment.trim().is_empty() && experiment.len() <= 500;
    checker.expect(
        is_name,
        "log.mlflow.experiment",
        "must have from 1 to 500 letters",
        format!("`{experiment}`"),
    );
    // The other ranks wait meanwhile, for as long as `parallel.timeout_secs` lets them.
    let must = "must be from 1 to 600";
    checker.expect((1..=600).contains(&flush_secs), "log.mlflow.flush_secs", must, flush_secs);
    Some(MlflowPlan { url: url.trim_end_matches('/').to_owned(), experiment, flush_secs, model })
}

fn watchdog(checker: &mut Checker<'_>, raw: &RawWatchdog) -> WatchdogPlan {
    let RawWatchdog { factor, least_secs, limit_secs } = *raw;
    let must = "must be from 1 to 1000000";
    checker.expect((1.0..=1e6).contains(&factor), "watchdog.factor", must, factor);
    for (path, secs) in [("watchdog.least_secs", least_secs), ("watchdog.limit_secs", limit_secs)] {
        checker.expect((1..=604_800).contains(&secs), path, "must be from 1 to 604800, a week", secs);
    }
    let must = format!("must be more than `watchdog.least_secs`, {least_secs}");
    checker.expect(limit_secs == 0 || limit_secs > least_secs, "watchdog.limit_secs", &must, limit_secs);
    WatchdogPlan { factor, least_secs, limit_secs }
}

fn export(checker: &mut Checker<'_>, raw: &RawExport) -> Option<ExportPlan> {
    checker.required("export.vit", raw.vit).map(|vit| ExportPlan { vit })
}

/// An optional cadence: at least 1 where it is given.
pub(super) fn every(checker: &mut Checker<'_>, path: &str, steps: Option<u64>, hint: &str) {
    if steps == Some(0) {
        checker.invalid_with_hint(path, "must be at least 1, found 0", hint);
    }
}
