//! A line search for the learning rate on the slope of the training loss: `AdaLRS`, as in the SAIL-VL2 report
//! (arXiv 2509.14033).
//!
//! Windows of steps alternate: one measures how fast the loss falls, the next tries a higher rate from a snapshot taken
//! between the two. Pure: losses in, decisions out. The train loop takes the snapshots and goes back to them.

use serde::{Deserialize, Serialize};

use crate::config::AdaLrsPlan;

/// How fast the loss falls in a window of steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slope {
    /// Loss that a step takes away: the slope of a line through the losses, fitted by least squares, its sign turned.
    pub speed: f64,
    /// Standard error of it.
    pub error: f64,
}

impl Slope {
    /// Of at least 3 losses.
    pub fn of(losses: &[f64]) -> Self {
        let n = losses.len() as f64;
        let (mean_x, mean_y) = ((n - 1.0) / 2.0, losses.iter().sum::<f64>() / n);
        let points = || losses.iter().enumerate().map(|(x, y)| (x as f64 - mean_x, y - mean_y));
        let sum_xx: f64 = points().map(|(x, _)| x * x).sum();
        let slope = points().map(|(x, y)| x * y).sum::<f64>() / sum_xx;
        let residuals: f64 = points().map(|(x, y)| (y - slope * x).powi(2)).sum();
        Self { speed: -slope, error: (residuals / (n - 2.0) / sum_xx).sqrt() }
    }
}

/// Where a search stands. Checkpoints hold it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdaLrs {
    /// What all learning rates are multiplied with.
    pub scale: f64,
    /// Trials that have ended.
    trials: i32,
    /// Of the steps of this window.
    losses: Vec<f64>,
    /// While a trial runs: the scale and the slope before it.
    trial: Option<(f64, Slope)>,
}

/// What a trial has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The loss falls faster by more than twice the error: the higher rate stays.
    Keep,
    /// About as fast: the steps stay, the rate is the old one again.
    Leave,
    /// Slower by more than twice the error: weights and moments go back to before the trial, and the rate is lowered.
    GoBack,
}

/// A trial that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Trial {
    /// Its number, from 1.
    pub trial: i32,
    /// The scale before it.
    pub scale_before: f64,
    /// The scale that was tried.
    pub scale_tried: f64,
    /// The slope before it.
    pub before: Slope,
    /// The slope in it.
    pub tried: Slope,
    /// What follows.
    pub verdict: Finding,
    /// The scale from now on.
    pub scale: f64,
}

impl Default for AdaLrs {
    fn default() -> Self {
        Self { scale: 1.0, trials: 0, losses: Vec::new(), trial: None }
    }
}

impl AdaLrs {
    /// The same, where what a trial could go back to is gone: the old rate, and windows that begin anew.
    #[must_use]
    pub fn without_trial(self) -> Self {
        match self.trial {
            Some((scale, _)) => Self { scale, losses: Vec::new(), trial: None, ..self },
            None => self,
        }
    }

    /// Trials that have ended.
    pub fn trials(&self) -> u64 {
        self.trials.unsigned_abs().into()
    }

    /// Whether a trial runs: weights and moments may go back to its beginning.
    pub fn in_trial(&self) -> bool {
        self.trial.is_some()
    }

    /// Whether a trial is to begin now, once a snapshot is taken.
    pub fn is_ready(&self, plan: &AdaLrsPlan) -> bool {
        self.trial.is_none() && self.losses.len() >= plan.window && self.factors(plan) != (1.0, 1.0)
    }

    /// Begins a trial at the higher rate.
    pub fn begin(&mut self, plan: &AdaLrsPlan) {
        let before = Slope::of(&std::mem::take(&mut self.losses));
        self.trial = Some((self.scale, before));
        self.scale *= self.factors(plan).0;
    }

    /// Takes note of a step's loss; of the last one of a trial, decides.
    pub fn observe(&mut self, plan: &AdaLrsPlan, loss: f64) -> Option<Trial> {
        self.losses.push(loss);
        let full = self.losses.len() >= plan.window;
        let Some((scale_before, before)) = self.trial.filter(|_| full) else {
            // Nothing is measured any more once the search is over, and of a window that waits only the last steps.
            let most = if self.factors(plan) == (1.0, 1.0) { 0 } else { plan.window };
            self.losses.drain(..self.losses.len().saturating_sub(most));
            return None;
        };
        let tried = Slope::of(&std::mem::take(&mut self.losses));
        let (scale_tried, (_, down)) = (self.scale, self.factors(plan));
        let change = tried.speed - before.speed;
        let (verdict, scale) = if change > 2.0 * before.error {
            (Finding::Keep, scale_tried)
        } else if change < -2.0 * before.error {
            (Finding::GoBack, scale_before * down)
        } else {
            (Finding::Leave, scale_before)
        };
        self.trials += 1;
        (self.scale, self.trial) = (scale, None);
        Some(Trial { trial: self.trials, scale_before, scale_tried, before, tried, verdict, scale })
    }

    /// Up and down: `max(lambda^t alpha, 1)` and `1 / max(lambda^t beta, 1)` after t trials.
    fn factors(&self, plan: &AdaLrsPlan) -> (f64, f64) {
        let shrunk = plan.lambda.powi(self.trials);
        ((shrunk * f64::from(plan.alpha)).max(1.0), 1.0 / (shrunk * f64::from(plan.beta)).max(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: AdaLrsPlan = AdaLrsPlan { window: 4, alpha: 3, beta: 2, lambda: 0.5 };

    /// Losses that fall by `speed`, now and then a little off the line.
    fn falling(speed: f64) -> [f64; 4] {
        [(0.0, 0.01), (1.0, -0.01), (2.0, -0.01), (3.0, 0.01)].map(|(step, off)| 5.0 - speed * step + off)
    }

    fn window(search: &mut AdaLrs, speed: f64) -> Option<Trial> {
        falling(speed).into_iter().map(|loss| search.observe(&PLAN, loss)).last().flatten()
    }

    #[test]
    fn a_slope_and_its_error_are_those_of_least_squares() {
        // By hand: y = 1, 3, 2 over x = 0, 1, 2: slope 1/2, residuals -1/2, 1, -1/2, so s^2 = 3/2 and Sxx = 2.
        let slope = Slope::of(&[1.0, 3.0, 2.0]);
        assert!(
            (slope.speed + 0.5).abs() < 1e-12 && (slope.error - (1.5f64 / 2.0).sqrt()).abs() < 1e-12,
            "{slope:?}"
        );
        let line = Slope::of(&[4.0, 3.5, 3.0, 2.5]);
        assert!((line.speed - 0.5).abs() < 1e-12 && line.error < 1e-12, "{line:?}");
    }

    #[test]
    fn trials_keep_leave_and_go_back() {
        let mut search = AdaLrs::default();
        assert_eq!(window(&mut search, 0.1), None);
        assert!(search.is_ready(&PLAN) && !search.in_trial());
        search.begin(&PLAN);
        assert!(search.in_trial() && !search.is_ready(&PLAN));
        assert!((search.scale - 3.0).abs() < 1e-12);
        // Faster: kept.
        let trial = window(&mut search, 0.2).unwrap();
        assert_eq!((trial.verdict, trial.trial), (Finding::Keep, 1));
        assert!((search.scale - 3.0).abs() < 1e-12 && !search.in_trial());
        // The next one goes up by 1.5 only, and about as fast is left.
        assert_eq!(window(&mut search, 0.2), None);
        search.begin(&PLAN);
        assert!((search.scale - 4.5).abs() < 1e-12);
        assert_eq!(window(&mut search, 0.2).unwrap().verdict, Finding::Leave);
        assert!((search.scale - 3.0).abs() < 1e-12);
        // By now both factors have come to 1, and the search is over.
        assert_eq!(window(&mut search, 0.2), None);
        assert!(!search.is_ready(&PLAN));
        assert!(search.losses.is_empty());

        let mut search = AdaLrs::default();
        window(&mut search, 0.2);
        search.begin(&PLAN);
        let trial = window(&mut search, -0.3).unwrap();
        assert_eq!(trial.verdict, Finding::GoBack);
        assert!((search.scale - 0.5).abs() < 1e-12 && (trial.scale_tried - 3.0).abs() < 1e-12);
    }

    /// A loss that is a parabola in the rate: from far below and far above, the search comes near the best rate.
    #[test]
    fn it_comes_near_the_best_rate_from_below_and_above() {
        let plan = AdaLrsPlan { window: 4, alpha: 3, beta: 2, lambda: 0.9 };
        for start in [0.1, 10.0] {
            let mut search = AdaLrs::default();
            for _ in 0..60 {
                if search.is_ready(&plan) {
                    search.begin(&plan);
                }
                let rate = start * search.scale;
                let speed = 0.5 - 0.2 * rate.ln().powi(2);
                for loss in falling(speed) {
                    search.observe(&plan, loss);
                }
            }
            let rate = start * search.scale;
            assert!((0.5..2.0).contains(&rate), "from {start}: {rate}");
        }
    }
}
