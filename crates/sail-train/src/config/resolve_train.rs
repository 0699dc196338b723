//! `train`, `optimizer` and `schedule`: what is trained when, how, and at which rates. Called by [`super::resolve`].

use super::check::Checker;
use super::plan::{
    AdaLrsPlan, EarlyStopPlan, EmaPlan, OptimizerPlan, RulePlan, SchedulePlan, TrainPlan, UnlockPlan,
};
use super::raw_train::{
    RawAdaLrs, RawEarlyStop, RawEma, RawOptimizer, RawRates, RawRule, RawSchedule, RawTrain, RawUnlock,
};
use super::raw_values::{RawAmount, RawList, RawModule};
use super::values::{Amount, Module, ModulePlan, Rates, ScheduleKind};

/// Resolves `train`; unlock points are checked against `schedule` where that resolved.
pub(super) fn train(
    checker: &mut Checker<'_>,
    raw: RawTrain,
    optimizer: &RawOptimizer,
    schedule: Option<&SchedulePlan>,
) -> Option<TrainPlan> {
    let betas = optimizer.betas;
    let mut of = |module: Module, raw: &Option<RawModule>| {
        let path = format!("train.{module}");
        if raw.is_none() {
            let hint = format!("write `{module}: frozen` or `{module}: {{ lr: RATE }}`");
            checker.invalid_with_hint(&path, "missing", hint);
        }
        part(checker, &path, raw.as_ref()?, betas, Some(module))
    };
    let vision = of(Module::Vision, &raw.vision);
    let projector = of(Module::Projector, &raw.projector);
    let llm = of(Module::Llm, &raw.llm);
    let rules: Vec<Option<RulePlan>> =
        raw.rules.into_iter().enumerate().map(|(index, raw)| rule(checker, index, raw, betas)).collect();
    let unfreeze: Vec<Option<UnlockPlan>> = raw
        .unfreeze
        .into_iter()
        .enumerate()
        .map(|(index, raw)| unlock(checker, index, raw, betas, schedule))
        .collect();
    let plan = TrainPlan {
        rules: rules.into_iter().collect::<Option<_>>()?,
        unfreeze: unfreeze.into_iter().collect::<Option<_>>()?,
        ..TrainPlan::of(vision?, projector?, llm?)
    };
    let at_start = plan.iter().map(|(_, module)| module).chain(plan.rules.iter().map(|rule| &rule.train));
    if !at_start.into_iter().any(ModulePlan::is_trained) {
        checker.invalid_with_hint(
            "train",
            "every module is frozen, so there is nothing to train",
            "give at least one module a rate, as in `projector: { lr: 1e-3 }`; unlock points come after the first step",
        );
    }
    Some(plan)
}

fn rule(checker: &mut Checker<'_>, index: usize, raw: RawRule, betas: [f64; 2]) -> Option<RulePlan> {
    let path = format!("train.rules[{index}]");
    let select = checker.required(&format!("{path}.match"), raw.r#match);
    let train = checker.required(&format!("{path}.train"), raw.train);
    let module = select.as_ref().map(|part| part.module);
    let train = part(checker, &format!("{path}.train"), &train?, betas, module)?;
    Some(RulePlan { part: select?, train })
}

fn unlock(
    checker: &mut Checker<'_>,
    index: usize,
    raw: RawUnlock,
    betas: [f64; 2],
    schedule: Option<&SchedulePlan>,
) -> Option<UnlockPlan> {
    let path = format!("train.unfreeze[{index}]");
    let parts = checker.required(&format!("{path}.match"), raw.r#match).map(|RawList(parts)| parts);
    if parts.as_ref().is_some_and(Vec::is_empty) {
        checker.invalid_with_hint(
            &format!("{path}.match"),
            "is empty",
            "name a part, such as `llm.blocks[20..]`",
        );
    }
    let projector = parts.iter().flatten().find(|part| part.module == Module::Projector);
    let module = projector.map(|part| part.module);
    let RawUnlock { lr, weight_decay, layer_decay, betas: own, .. } = raw;
    let rates = rates(checker, &path, &RawRates { lr, weight_decay, layer_decay, betas: own }, betas, module);
    let at = checker.required(&format!("{path}.at"), raw.at);
    let (at, schedule) = (at?, schedule?);
    let [at, warmup] = [("at", at), ("warmup", raw.warmup)].map(|(name, raw)| match raw {
        // Also where the stage's length is in tokens.
        RawAmount::Count(steps) => Amount::Steps(steps),
        raw => amount(checker, &format!("{path}.{name}"), raw, schedule.length),
    });
    if at.count() == 0 {
        checker.invalid_with_hint(
            &format!("{path}.at"),
            "is the start of the stage",
            "what is trained from the start is said by the module or by `train.rules`",
        );
    } else if at.has_unit_of(schedule.length) && at.count() >= schedule.length.count() {
        checker.invalid_with_hint(
            &format!("{path}.at"),
            format!("is the end of the stage or beyond it: {at} of {}", schedule.length),
            "nothing would be unlocked",
        );
    }
    Some(UnlockPlan { at, parts: parts?, rates: rates?, warmup })
}

/// `frozen` or rates; `module` is what it is a part of.
fn part(
    checker: &mut Checker<'_>,
    path: &str,
    raw: &RawModule,
    betas: [f64; 2],
    module: Option<Module>,
) -> Option<ModulePlan> {
    match raw {
        RawModule::Frozen => Some(ModulePlan::Frozen),
        RawModule::Train(raw) => rates(checker, path, raw, betas, module).map(ModulePlan::Train),
    }
}

fn rates(
    checker: &mut Checker<'_>,
    path: &str,
    raw: &RawRates,
    betas: [f64; 2],
    module: Option<Module>,
) -> Option<Rates> {
    let &RawRates { lr, weight_decay, layer_decay, betas: own } = raw;
    let lr = checker.required(&format!("{path}.lr"), lr);
    if let Some(lr) = lr.filter(|lr| *lr <= 0.0) {
        checker.invalid_with_hint(
            &format!("{path}.lr"),
            format!("must be above 0, found {lr}"),
            "write `frozen` in place of rates to leave a part as it is",
        );
    }
    if let Some(own) = own {
        self::betas(checker, &format!("{path}.betas"), own);
    }
    let must = "must not be negative";
    checker.expect(weight_decay >= 0.0, &format!("{path}.weight_decay"), must, weight_decay);
    let decay_path = format!("{path}.layer_decay");
    let must = "must be above 0 and at most 1";
    checker.expect(layer_decay > 0.0 && layer_decay <= 1.0, &decay_path, must, layer_decay);
    if module == Some(Module::Projector) && (layer_decay - 1.0).abs() > 0.0 {
        checker.invalid(&decay_path, "the projector has no blocks");
    }
    Some(Rates { lr: lr?, weight_decay, betas: own.unwrap_or(betas), layer_decay })
}

/// Resolves `optimizer`; its averages are checked against `train` where that resolved.
pub(super) fn optimizer(
    checker: &mut Checker<'_>,
    raw: RawOptimizer,
    train: Option<&TrainPlan>,
) -> Option<OptimizerPlan> {
    let RawOptimizer { betas, eps, clip_norm, ema } = raw;
    self::betas(checker, "optimizer.betas", betas);
    checker.expect(eps > 0.0, "optimizer.eps", "must be above 0", eps);
    if let Some(norm) = clip_norm
        && norm <= 0.0
    {
        checker.invalid_with_hint(
            "optimizer.clip_norm",
            format!("must be above 0, found {norm}"),
            "write `clip_norm: null` for no clipping",
        );
    }
    let ema = match ema {
        None => None,
        Some(raw) => Some(self::ema(checker, raw, train)?),
    };
    Some(OptimizerPlan { eps, clip_norm, ema })
}

fn ema(checker: &mut Checker<'_>, raw: RawEma, train: Option<&TrainPlan>) -> Option<EmaPlan> {
    let RawEma { decay, modules } = raw;
    let must = "must be above 0 and below 1";
    checker.expect(decay > 0.0 && decay < 1.0, "optimizer.ema.decay", must, decay);
    let RawList(modules) = checker.required("optimizer.ema.modules", modules)?;
    if modules.is_empty() {
        checker.invalid_with_hint(
            "optimizer.ema.modules",
            "is empty",
            "name a module, or leave `ema` out for no averages",
        );
    }
    let never = |module: &&Module| train.is_some_and(|train| !train.ever_trains(**module));
    if let Some(module) = modules.iter().find(never) {
        checker.invalid_with_hint(
            "optimizer.ema.modules",
            format!("`{module}` is never trained"),
            "a frozen module is its own average: leave it out",
        );
    }
    Some(EmaPlan { decay, modules: modules.into_iter().collect() })
}

/// Checks the decay of both moments.
fn betas(checker: &mut Checker<'_>, path: &str, betas: [f64; 2]) {
    for (index, beta) in betas.iter().enumerate() {
        let must = "must be from 0 to below 1";
        checker.expect((0.0..1.0).contains(beta), &format!("{path}[{index}]"), must, beta);
    }
}

pub(super) fn schedule(checker: &mut Checker<'_>, raw: &RawSchedule) -> Option<SchedulePlan> {
    let min_ratio = raw.min_ratio;
    checker.expect((0.0..=1.0).contains(&min_ratio), "schedule.min_ratio", "must be from 0 to 1", min_ratio);
    let (name, length) = match (raw.steps, raw.tokens) {
        (Some(steps), None) => ("steps", Amount::Steps(steps)),
        (None, Some(tokens)) => ("tokens", Amount::Tokens(tokens)),
        (None, None) => {
            checker.invalid_with_hint(
                "schedule.steps",
                "missing",
                "give the stage's length, in `steps` or `tokens`",
            );
            return None;
        }
        (Some(_), Some(_)) => {
            checker.invalid_with_hint(
                "schedule",
                "has both `steps` and `tokens`",
                "keep one; `steps: null` takes back an inherited one",
            );
            return None;
        }
    };
    checker.expect(length.count() >= 1, &format!("schedule.{name}"), "must be at least 1", length.count());
    let mut part = |field: &str, raw| {
        let path = format!("schedule.{field}");
        let amount = amount(checker, &path, raw, length);
        if amount.has_unit_of(length) {
            let must = format!("must not be more than `schedule.{name}`, {}", length.count());
            checker.expect(amount.count() <= length.count(), &path, &must, amount.count());
        } else {
            checker.invalid(&path, format!("is in other units than `schedule.{name}`"));
        }
        amount.count()
    };
    let warmup = part("warmup", raw.warmup);
    let decay = match (raw.kind, raw.decay) {
        (ScheduleKind::Wsd, given) => Some(part("decay", given.unwrap_or(RawAmount::Percent(20.0)))),
        (_, None) => None,
        (_, Some(_)) => {
            checker.invalid_with_hint(
                "schedule.decay",
                "is of `kind: wsd` alone",
                "leave it out; `decay: null` takes back an inherited one",
            );
            None
        }
    };
    if let Some(decay) = decay.filter(|decay| warmup.saturating_add(*decay) > length.count()) {
        let message = format!("begins within the warm-up: {decay} of {length}, of which {warmup} warm up");
        checker.invalid("schedule.decay", message);
    }
    if raw.kind == ScheduleKind::InverseSqrt && warmup == 0 {
        let hint = "the curve falls with the root of the warm-up over what is done";
        checker.invalid_with_hint("schedule.warmup", "must be above 0 with `kind: inverse_sqrt`", hint);
    }
    let ada_lrs = raw.ada_lrs.as_ref().map(|raw| ada_lrs(checker, raw));
    let early_stop = match &raw.early_stop {
        None => None,
        Some(raw) => Some(early_stop(checker, raw)?),
    };
    Some(SchedulePlan { kind: raw.kind, length, warmup, decay, min_ratio, ada_lrs, early_stop })
}

fn ada_lrs(checker: &mut Checker<'_>, raw: &RawAdaLrs) -> AdaLrsPlan {
    let RawAdaLrs { window, alpha, beta, lambda } = *raw;
    let path = |field: &str| format!("schedule.ada_lrs.{field}");
    checker.expect((3..=1_000_000).contains(&window), &path("window"), "must be from 3 to 1000000", window);
    for (field, value) in [("alpha", alpha), ("beta", beta)] {
        checker.expect((2..=1000).contains(&value), &path(field), "must be from 2 to 1000", value);
    }
    let is_between = lambda > 0.0 && lambda < 1.0;
    checker.expect(is_between, &path("lambda"), "must be above 0 and below 1", lambda);
    let common =
        (2..=alpha.min(beta).min(1000)).find(|by| alpha.is_multiple_of(*by) && beta.is_multiple_of(*by));
    if let Some(common) = common {
        checker.invalid_with_hint(
            &path("beta"),
            format!("{beta} and `alpha`, {alpha}, are both multiples of {common}"),
            "without a common divisor ups and downs do not come to the same rates again",
        );
    }
    AdaLrsPlan { window, alpha, beta, lambda }
}

fn early_stop(checker: &mut Checker<'_>, raw: &RawEarlyStop) -> Option<EarlyStopPlan> {
    let patience = checker.required("schedule.early_stop.patience", raw.patience);
    if let Some(patience) = patience {
        checker.expect(patience >= 1, "schedule.early_stop.patience", "must be at least 1", patience);
    }
    let must = "must not be negative";
    checker.expect(raw.min_delta >= 0.0, "schedule.early_stop.min_delta", must, raw.min_delta);
    Some(EarlyStopPlan { patience: patience?, min_delta: raw.min_delta })
}

/// An amount in the units that it is written in; a share is one of `whole`.
fn amount(checker: &mut Checker<'_>, path: &str, raw: RawAmount, whole: Amount) -> Amount {
    match raw {
        RawAmount::Count(count) => whole.with_count(count),
        RawAmount::Tokens(count) => Amount::Tokens(count),
        RawAmount::Percent(percent) => {
            let found = format!("{percent}%");
            let holds = (0.0..=100.0).contains(&percent);
            checker.expect(holds, path, "must be from 0% to 100%", found);
            let percent = if holds { percent } else { 0.0 };
            whole.with_count((whole.count() as f64 * percent / 100.0).round() as u64)
        }
    }
}
