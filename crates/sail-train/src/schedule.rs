//! The learning rate as a function of what is done: factors on each parameter's peak rate.
//!
//! Called by the train loop. Which parameter has which peak is [`crate::freeze`]'s matter.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use crate::config::{Amount, Progress, ScheduleKind, SchedulePlan, TrainPlan, UnlockPlan};

/// What a step's learning rates are multiplied with.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// The schedule's.
    pub all: f64,
    /// Those of each unlock point's own warm-up, on top of it, where it is reached.
    unlocked: Vec<Option<f64>>,
}

impl Factors {
    /// Of the step after `progress` that makes `tokens`; `unlocked` says how far the stage had come at
    /// each unlock point that it has passed.
    pub fn new(
        schedule: &SchedulePlan,
        train: &TrainPlan,
        unlocked: &BTreeMap<usize, Progress>,
        progress: Progress,
        tokens: u64,
    ) -> Self {
        let after = Progress { steps: progress.steps + 1, tokens: progress.tokens + tokens };
        let warmed = |(index, unlock): (usize, &UnlockPlan)| {
            let since = |then| unlock.warmup.of(after) - unlock.warmup.of(then);
            unlocked.get(&index).map(|&then| ramp(since(then), unlock.warmup.count()))
        };
        let unlocked = train.unfreeze.iter().enumerate().map(warmed).collect();
        Self { all: factor(schedule, schedule.length.of(after)), unlocked }
    }

    /// All of them times `scale`.
    #[must_use]
    pub fn times(self, scale: f64) -> Self {
        Self { all: self.all * scale, ..self }
    }

    /// The same for all.
    pub fn flat(all: f64) -> Self {
        Self { all, unlocked: Vec::new() }
    }

    /// Of what waited for an unlock point that is reached, or for none.
    pub fn of(&self, unlock: Option<usize>) -> f64 {
        self.reached(unlock).unwrap_or(0.0)
    }

    /// The same; `None` where the unlock point is not reached.
    pub fn reached(&self, unlock: Option<usize>) -> Option<f64> {
        let own = unlock.map_or(Some(1.0), |index| self.unlocked.get(index).copied().flatten())?;
        Some(self.all * own)
    }
}

/// A line from 0 to 1 over `length`.
fn ramp(done: u64, length: u64) -> f64 {
    if done < length { done as f64 / length as f64 } else { 1.0 }
}

/// The factor of the step that brings the stage to `after`, in what its length counts; in `[0, 1]`.
///
/// The warm-up is linear and reaches the peak on its last step. `cosine` (Loshchilov and Hutter, arXiv 1608.03983, one
/// period), `linear` and `wsd` (Hu et al., arXiv 2404.06395, with a linear decay) reach `min_ratio` on the last step of
/// the stage; `inverse_sqrt` is that of Vaswani et al., arXiv 1706.03762, section 5.3.
pub fn factor(plan: &SchedulePlan, after: u64) -> f64 {
    let SchedulePlan { kind, length, warmup, decay, min_ratio, .. } = *plan;
    if after <= warmup {
        return ramp(after, warmup);
    }
    // Steps count from the one after the warm-up, which has the peak once more, to the last one.
    let first = u64::from(matches!(length, Amount::Steps(_)));
    let down = |from: u64, whole: u64| {
        let whole = whole.saturating_sub(first).max(1);
        ((after - from).saturating_sub(first) as f64 / whole as f64).min(1.0)
    };
    let between = |share: f64| min_ratio + (1.0 - min_ratio) * share;
    match kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Cosine => between(0.5 * (1.0 + (PI * down(warmup, length.count() - warmup)).cos())),
        ScheduleKind::Linear => between(1.0 - down(warmup, length.count() - warmup)),
        ScheduleKind::Wsd => {
            let decay = decay.unwrap_or_default();
            let into = after.saturating_sub(length.count() - decay);
            if into == 0 { 1.0 } else { between(1.0 - ramp(into, decay)) }
        }
        ScheduleKind::InverseSqrt => (warmup.max(1) as f64 / after as f64).sqrt().max(min_ratio),
    }
}

/// Whether something with this cadence is due after `step` completed steps; without one it never is.
pub fn is_due(every: Option<u64>, step: u64) -> bool {
    every.is_some_and(|every| step.is_multiple_of(every))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ModulePlan, Rates};

    const KINDS: [ScheduleKind; 5] = [
        ScheduleKind::Cosine,
        ScheduleKind::Constant,
        ScheduleKind::Linear,
        ScheduleKind::Wsd,
        ScheduleKind::InverseSqrt,
    ];

    fn plan(kind: ScheduleKind, length: Amount, warmup: u64) -> SchedulePlan {
        SchedulePlan {
            kind,
            length,
            warmup,
            decay: (kind == ScheduleKind::Wsd).then_some(length.count() / 5),
            ada_lrs: None,
            early_stop: None,
            min_ratio: 0.1,
        }
    }

    /// Of every step of a stage of steps.
    fn factors(kind: ScheduleKind, steps: u64, warmup: u64) -> Vec<f64> {
        let plan = plan(kind, Amount::Steps(steps), warmup);
        (1..=steps).map(|after| factor(&plan, after)).collect()
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    /// Each against its formula, written out.
    #[test]
    fn curves_are_their_closed_forms() {
        let warm = [0.25, 0.5, 0.75, 1.0];
        let then = |rest: [f64; 6]| [&warm[..], &rest].concat();
        let cosine = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0].map(|t: f64| 0.1 + 0.9 * 0.5 * (1.0 + (PI * t).cos()));
        assert_near(&factors(ScheduleKind::Cosine, 10, 4), &then(cosine));
        assert_near(&factors(ScheduleKind::Constant, 10, 4), &then([1.0; 6]));
        assert_near(&factors(ScheduleKind::Linear, 10, 4), &then([1.0, 0.82, 0.64, 0.46, 0.28, 0.1]));
        assert_near(&factors(ScheduleKind::Wsd, 10, 4), &then([1.0, 1.0, 1.0, 1.0, 0.55, 0.1]));
        let root = [5.0, 6.0, 7.0, 8.0, 9.0, 10.0].map(|t: f64| (4.0 / t).sqrt());
        assert_near(&factors(ScheduleKind::InverseSqrt, 10, 4), &then(root));
    }

    #[test]
    fn tokens_count_as_steps_do() {
        let length = Amount::Tokens(1000);
        let at = |kind, after| factor(&plan(kind, length, 100), after);
        assert_near(&[at(ScheduleKind::Cosine, 50), at(ScheduleKind::Cosine, 100)], &[0.5, 1.0]);
        assert_near(&[at(ScheduleKind::Cosine, 550)], &[0.1 + 0.9 * 0.5]);
        assert_near(&[at(ScheduleKind::Linear, 550), at(ScheduleKind::Linear, 1000)], &[0.55, 0.1]);
        // The last step may go beyond.
        assert_near(&KINDS.map(|kind| at(kind, 1300))[..2], &[0.1, 1.0]);
        assert_near(&[at(ScheduleKind::Wsd, 900), at(ScheduleKind::Wsd, 1300)], &[0.55, 0.1]);
    }

    #[test]
    fn edges_stay_in_range() {
        for (steps, warmup) in [(1, 0), (1, 1), (2, 1), (5, 5), (5, 0)] {
            for kind in KINDS {
                for factor in factors(kind, steps, warmup) {
                    assert!((0.0..=1.0).contains(&factor), "{kind:?} {steps} {warmup}: {factor}");
                }
            }
        }
    }

    #[test]
    fn an_unlock_point_warms_up_on_top_of_the_schedule() {
        let rates = Rates { lr: 1.0, weight_decay: 0.0, betas: [0.9, 0.95], layer_decay: 1.0 };
        let unlock =
            |warmup| UnlockPlan { at: Amount::Steps(4), parts: vec!["llm".parse().unwrap()], rates, warmup };
        let frozen = ModulePlan::Frozen;
        let train = TrainPlan {
            unfreeze: vec![unlock(Amount::Steps(4)), unlock(Amount::Tokens(100)), unlock(Amount::Steps(0))],
            ..TrainPlan::of(frozen, ModulePlan::Train(rates), frozen)
        };
        let schedule = plan(ScheduleKind::Linear, Amount::Steps(10), 0);
        let then = [0, 1, 2].map(|index| (index, Progress { steps: 4, tokens: 200 })).into();
        let progress = Progress { steps: 5, tokens: 230 };
        let factors = Factors::new(&schedule, &train, &then, progress, 20);
        let all = factor(&schedule, 6);
        assert_near(
            &[None, Some(0), Some(1), Some(2)].map(|unlock| factors.of(unlock)),
            &[all, 0.5 * all, 0.5 * all, all],
        );
        let before = Factors::new(&schedule, &train, &BTreeMap::new(), progress, 20);
        assert_eq!((before.reached(None), before.reached(Some(0))), (Some(before.all), None));
        let later = Factors::new(&schedule, &train, &then, Progress { steps: 9, tokens: 500 }, 20);
        assert_near(&[later.of(Some(0)), later.of(Some(1))], &[later.all, later.all]);
    }

    #[test]
    fn cadence() {
        assert!(is_due(Some(3), 6) && !is_due(Some(3), 7) && !is_due(None, 6));
    }
}
