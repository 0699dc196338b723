//! The learning rate as a function of the step: a factor on each module's peak rate.
//!
//! Called by the train loop. Which module has which peak is [`crate::optim`]'s matter.

use crate::config::{ScheduleKind, SchedulePlan};

/// The factor for the optimizer step after `done` completed ones, in `[0, 1]`.
///
/// Warm-up is linear and reaches the peak on its last step; a cosine ends at `min_ratio` on the
/// last step of the stage (Loshchilov and Hutter, arXiv 1608.03983, one period).
pub fn factor(plan: &SchedulePlan, done: u64) -> f64 {
    if done < plan.warmup_steps {
        return (done + 1) as f64 / plan.warmup_steps as f64;
    }
    match plan.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Cosine => {
            let span = plan.steps.saturating_sub(plan.warmup_steps + 1).max(1);
            let progress = ((done - plan.warmup_steps) as f64 / span as f64).min(1.0);
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
            plan.min_ratio + (1.0 - plan.min_ratio) * cosine
        }
    }
}

/// Whether something with this cadence is due after `step` completed steps; without one it never is.
pub fn is_due(every: Option<u64>, step: u64) -> bool {
    every.is_some_and(|every| step.is_multiple_of(every))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(kind: ScheduleKind, steps: u64, warmup_steps: u64) -> SchedulePlan {
        SchedulePlan { kind, steps, warmup_steps, min_ratio: 0.1 }
    }

    #[test]
    fn warms_up_linearly_then_falls_to_the_minimum() {
        let plan = plan(ScheduleKind::Cosine, 10, 4);
        let factors: Vec<f64> = (0..10).map(|done| factor(&plan, done)).collect();
        assert_eq!(factors[..4], [0.25, 0.5, 0.75, 1.0]);
        assert!((factors[4] - 1.0).abs() < 1e-12, "the peak is held once more: {}", factors[4]);
        assert!(factors[4..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((factors[9] - 0.1).abs() < 1e-12);
    }

    #[test]
    fn edges_stay_in_range() {
        for (steps, warmup) in [(1, 0), (1, 1), (2, 1), (5, 5)] {
            for kind in [ScheduleKind::Cosine, ScheduleKind::Constant] {
                for done in 0..=steps {
                    let factor = factor(&plan(kind, steps, warmup), done);
                    assert!((0.0..=1.0).contains(&factor), "{kind:?} {steps} {warmup} {done}: {factor}");
                }
            }
        }
        assert!((factor(&plan(ScheduleKind::Constant, 9, 0), 8) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn cadence() {
        assert!(is_due(Some(3), 6) && !is_due(Some(3), 7) && !is_due(None, 6));
    }
}
