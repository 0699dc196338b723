//! Steps that would do harm: a loss or gradient that is not a number, a loss far above the last ones.
//!
//! Judged by the train loop before the update, from numbers that all ranks have alike, so that all decide the same.
//! What was judged so far is part of a checkpoint: a resumed run judges as one that was not interrupted.

use std::collections::VecDeque;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::config::{GuardAction, GuardPlan};

/// The median absolute deviation of normally distributed values, times this, is their standard deviation.
const MAD_TO_SIGMA: f64 = 1.4826;
/// Losses that hardly differ make no spike of one that differs a little: the least deviation, of the median.
const LEAST_SIGMA: f64 = 1e-3;

/// What the guard has seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuardState {
    /// Losses of the last steps that were good, oldest first.
    losses: VecDeque<f64>,
    /// The last steps that were not good; those that the run went back from included.
    trips: Vec<u64>,
    /// How many steps were judged.
    judged: u64,
}

/// Why a step is not made, and what is done instead.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trip {
    /// What is wrong.
    pub reason: Reason,
    /// What to do.
    pub action: GuardAction,
    /// Whether the run ends because it is one too many.
    pub too_many: bool,
}

/// What is wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Reason {
    /// Its loss or its gradient is not a number.
    NotFinite,
    /// Its loss is far above those before.
    Spike {
        /// How many robust standard deviations.
        z: f64,
        /// The median of the losses before.
        median: f64,
        /// How many these are.
        window: usize,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFinite => f.write_str("not finite"),
            Self::Spike { z, median, window } => write!(
                f,
                "a spike, {z:.1} robust standard deviations above the median {median:.4} of {window} steps"
            ),
        }
    }
}

impl GuardState {
    /// Judges the step of this number by its mean loss and its gradient norm; nothing is wrong where this returns
    /// `None`. A trip that is one too many in a window ends the run whatever the plan does otherwise.
    pub fn judge(&mut self, plan: &GuardPlan, step: u64, loss: f64, grad_norm: f64) -> Option<Trip> {
        self.judged += 1;
        let Some((reason, action)) = self.fault(plan, loss, grad_norm) else {
            self.losses.push_back(loss);
            while self.losses.len() > plan.window {
                self.losses.pop_front();
            }
            return None;
        };
        self.remember(plan, step);
        let too_many = action != GuardAction::Stop && self.trips.len() > plan.max_trips;
        Some(Trip { reason, action: if too_many { GuardAction::Stop } else { action }, too_many })
    }

    /// Takes note of a step that is not made since it was not made before at another rate, whatever it is like at this one.
    pub fn pass_over(&mut self, plan: &GuardPlan, step: u64) {
        self.judged += 1;
        self.remember(plan, step);
    }

    /// Counts a step among those that were not good.
    fn remember(&mut self, plan: &GuardPlan, step: u64) {
        // By the number of the step: a run that goes back again and again gets no further, and comes to its end.
        self.trips.retain(|trip| trip + plan.window as u64 > step);
        self.trips.push(step);
    }

    /// How many steps were judged so far. Unlike the number of the step, it never goes back while a run goes on.
    pub fn judged(&self) -> u64 {
        self.judged
    }

    /// The same where the run is put back to when it stood as `then`: what went wrong since is not forgotten.
    #[must_use]
    pub fn back_to(self, then: &Self) -> Self {
        Self { losses: then.losses.clone(), ..self }
    }

    fn fault(&self, plan: &GuardPlan, loss: f64, grad_norm: f64) -> Option<(Reason, GuardAction)> {
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Some((Reason::NotFinite, plan.not_finite));
        }
        let action = plan.spike?;
        let window = self.losses.len();
        if window < plan.window.div_ceil(2) {
            return None;
        }
        let median = median(self.losses.iter().copied());
        let deviation = self::median(self.losses.iter().map(|loss| (loss - median).abs()));
        let z = (loss - median) / (MAD_TO_SIGMA * deviation).max(LEAST_SIGMA * median.abs());
        (z > plan.spike_z).then_some((Reason::Spike { z, median, window }, action))
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: GuardPlan = GuardPlan {
        not_finite: GuardAction::Skip,
        spike: Some(GuardAction::Rollback),
        spike_z: 6.0,
        window: 10,
        max_trips: 2,
        self_check: true,
    };

    /// After 20 good steps whose losses fall from 3 to 2.
    fn after_good_steps(plan: &GuardPlan) -> GuardState {
        let mut guard = GuardState::default();
        for i in 0..20 {
            let loss = 3.0 - 0.05 * f64::from(i) + if i % 2 == 0 { 0.02 } else { -0.02 };
            assert_eq!(guard.judge(plan, 1 + i as u64, loss, 1.0), None, "step {i}");
        }
        guard
    }

    #[test]
    fn what_is_not_a_number_or_far_above_is_found() {
        let good = after_good_steps(&PLAN);
        let judge = |loss, norm| good.clone().judge(&PLAN, 21, loss, norm);
        for (loss, norm) in [(f64::NAN, 1.0), (2.0, f64::INFINITY), (f64::NEG_INFINITY, f64::NAN)] {
            assert_eq!(
                judge(loss, norm),
                Some(Trip { reason: Reason::NotFinite, action: GuardAction::Skip, too_many: false })
            );
        }
        let Some(Trip { reason: Reason::Spike { z, median, window }, action, .. }) = judge(5.0, 1.0) else {
            panic!("a spike")
        };
        assert!(z > 6.0 && (2.2..2.3).contains(&median) && window == 10, "{z} {median} {window}");
        assert_eq!(action, GuardAction::Rollback);
        // Lower is no spike, and neither is a little higher or a large gradient.
        assert_eq!([judge(0.1, 1.0), judge(2.6, 1.0), judge(2.0, 1e9)], [None, None, None]);
    }

    #[test]
    fn equal_losses_and_few_ones_make_no_spike() {
        let mut guard = GuardState::default();
        for (step, loss) in (1..).zip([2.0, 9.0, 2.0, 2.0]) {
            assert_eq!(guard.judge(&PLAN, step, loss, 1.0), None);
        }
        let mut guard = GuardState::default();
        for step in 1..=10 {
            assert_eq!(guard.judge(&PLAN, step, 2.0, 1.0), None);
        }
        assert_eq!(guard.judge(&PLAN, 11, 2.01, 1.0), None);
        assert!(guard.judge(&PLAN, 12, 2.1, 1.0).is_some());
    }

    #[test]
    fn a_trip_too_many_in_a_window_ends_the_run() {
        let mut guard = after_good_steps(&PLAN);
        let mut actions = Vec::new();
        for i in 0..30 {
            let loss = if [0, 3, 20, 24, 26].contains(&i) { f64::NAN } else { 2.0 };
            actions.extend(guard.judge(&PLAN, 21 + i, loss, 1.0).map(|trip| (i, trip.action)));
        }
        let (skip, stop) = (GuardAction::Skip, GuardAction::Stop);
        assert_eq!(actions, [(0, skip), (3, skip), (20, skip), (24, skip), (26, stop)]);
    }

    /// However far apart the steps are that a run goes back from: where it gets no further, it ends.
    #[test]
    fn a_run_does_not_go_back_for_ever() {
        let plan = GuardPlan { not_finite: GuardAction::Rollback, ..PLAN };
        let mut guard = GuardState::default();
        for round in 0..=PLAN.max_trips {
            for step in 1..50 {
                assert_eq!(guard.judge(&plan, step, 2.0, 1.0), None);
            }
            let trip = guard.judge(&plan, 50, f64::NAN, 1.0).unwrap();
            let is_last = round == PLAN.max_trips;
            assert_eq!(trip.too_many, is_last);
            assert_eq!(trip.action, if is_last { GuardAction::Stop } else { GuardAction::Rollback });
        }
    }

    /// Whatever its loss is like there: it is no good one, and one of those that may not be too many.
    #[test]
    fn a_step_that_is_passed_over_is_no_good_one() {
        let mut judged = after_good_steps(&PLAN);
        let mut passed = judged.clone();
        assert!(judged.judge(&PLAN, 21, f64::NAN, 1.0).is_some());
        passed.pass_over(&PLAN, 21);
        assert_eq!(passed, judged);
    }

    #[test]
    fn going_back_forgets_losses_and_remembers_trips() {
        let then = after_good_steps(&PLAN);
        let mut now = then.clone();
        for (step, loss) in (21..).zip([1.9, 1.8, f64::NAN]) {
            now.judge(&PLAN, step, loss, 1.0);
        }
        let back = now.clone().back_to(&then);
        assert_eq!(back.losses, then.losses);
        assert_eq!((back.trips, back.judged), (now.trips, now.judged));
    }
}
