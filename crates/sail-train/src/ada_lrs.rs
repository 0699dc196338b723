//! A line search for the learning rate on the slope of the training loss: `AdaLRS`, as in the SAIL-VL2 report
//! (arXiv 2509.14033).
//!
//! A window of steps is made at the rate that there is, and once more, from the same weights on the same data, at a
//! higher one; what is not wanted of the two is undone. Pure: losses in, decisions out. The train loop takes the
//! snapshots and goes back to them; docs/decisions/0015-paired-trials.md says why the data is the same.

use serde::{Deserialize, Serialize};

use crate::config::AdaLrsPlan;

/// How fast the loss falls in a window of steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slope {
    /// Loss that a step takes away.
    pub speed: f64,
    /// Standard error of it.
    pub error: f64,
}

impl Slope {
    /// How much faster the loss falls in `tried` than in `measured`, of three steps or more. Before its first update, and
    /// so in its first step, either has the same loss; from then on the first is below the second by their difference.
    /// This is the slope of a line through that origin, fitted to the differences by least squares, and its error.
    pub fn gain(measured: &[f64], tried: &[f64]) -> Self {
        let differences: Vec<f64> = measured.iter().zip(tried).map(|(m, t)| m - t).skip(1).collect();
        let points = || differences.iter().enumerate().map(|(i, y)| ((i + 1) as f64, *y));
        let sum_xx: f64 = points().map(|(x, _)| x * x).sum();
        let speed = points().map(|(x, y)| x * y).sum::<f64>() / sum_xx;
        let squares: f64 = points().map(|(x, y)| (y - speed * x).powi(2)).sum();
        Self { speed, error: (squares / (differences.len() as f64 - 1.0) / sum_xx).sqrt() }
    }
}

/// Where a search stands. Checkpoints hold it as it is between two windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdaLrs {
    /// What all learning rates are multiplied with.
    pub scale: f64,
    /// Trials that have ended.
    trials: i32,
    #[serde(skip)]
    window: Option<Window>,
    /// Whether windows before this one were made at the same rate, and left: nothing has shown yet that it is not too high.
    /// While it counts, checkpoints are of where it was not so yet.
    #[serde(skip)]
    has_left: bool,
}

/// A window of steps that is made twice.
#[derive(Clone, Debug, Default, PartialEq)]
struct Window {
    /// Losses at the rate that there is.
    measured: Vec<f64>,
    /// Steps that were not made at that rate, since their data is at fault: neither are they at the other.
    skipped: Vec<u64>,
    /// While the trial runs: losses at the higher rate, and the scale before it.
    tried: Option<(Vec<f64>, f64)>,
}

/// What a trial has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The loss falls faster by more than twice the error: the steps of the trial stay, and the higher rate.
    Keep,
    /// About as fast: the steps before the trial stay, and their rate.
    Leave,
    /// Slower by more than twice the error: the rate may be too high itself. Neither stays, nor do windows before this one
    /// that were left at it; all are made anew at a lower rate.
    GoBack,
}

/// A trial that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its number, from 1.
    pub trial: i32,
    /// The scale before it.
    pub scale_before: f64,
    /// The scale that was tried.
    pub scale_tried: f64,
    /// How much faster the loss fell in it; `None` where it broke off at a step that is not to be made.
    pub gain: Option<Slope>,
    /// What follows.
    pub verdict: Finding,
    /// The scale from now on.
    pub scale: f64,
}

/// What follows after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Next {
    /// The next step.
    Step,
    /// The steps of the window once more, at the higher rate that `scale` is of now.
    Try,
    /// The trial has ended.
    End(Trial),
}

impl Default for AdaLrs {
    fn default() -> Self {
        Self { scale: 1.0, trials: 0, window: None, has_left: false }
    }
}

impl AdaLrs {
    /// Trials that have ended.
    pub fn trials(&self) -> u64 {
        self.trials.unsigned_abs().into()
    }

    /// Whether steps may yet be undone: those since the window began.
    pub fn in_window(&self) -> bool {
        self.window.is_some()
    }

    /// Whether the higher rate is being tried.
    pub fn in_trial(&self) -> bool {
        self.window.as_ref().is_some_and(|window| window.tried.is_some())
    }

    /// Whether a window is to begin now, once a snapshot is taken: as long as there is a higher rate to try.
    pub fn is_ready(&self, plan: &AdaLrsPlan) -> bool {
        self.window.is_none() && self.factors(plan).0 > 1.0
    }

    /// Whether going back from a window that begins now is to where an earlier one did.
    pub fn has_left(&self) -> bool {
        self.has_left
    }

    /// Begins a window.
    pub fn begin(&mut self) {
        self.window = Some(Window::default());
    }

    /// Forgets a window in which nothing is tried yet: what its beginning could be gone back to with is gone.
    pub fn forget_window(&mut self) {
        (self.window, self.has_left) = (None, false);
    }

    /// Takes note that a step is not made at the rate that there is.
    pub fn skip(&mut self, step: u64) {
        if let Some(window) = self.window.as_mut().filter(|window| window.tried.is_none()) {
            window.skipped.push(step);
        }
    }

    /// Whether a step is not to be made in the trial that runs, as it was not before.
    pub fn skips(&self, step: u64) -> bool {
        self.in_trial() && self.window.as_ref().is_some_and(|window| window.skipped.contains(&step))
    }

    /// Takes note of a step's loss.
    pub fn observe(&mut self, plan: &AdaLrsPlan, loss: f64) -> Next {
        let up = self.factors(plan).0;
        let Some(window) = &mut self.window else { return Next::Step };
        let losses = window.tried.as_mut().map_or(&mut window.measured, |(losses, _)| losses);
        losses.push(loss);
        if losses.len() < plan.window {
            return Next::Step;
        }
        let Some((tried, _)) = &window.tried else {
            window.tried = Some((Vec::new(), self.scale));
            self.scale *= up;
            return Next::Try;
        };
        let gain = Slope::gain(&window.measured, tried);
        let verdict = match gain.speed {
            faster if faster > 2.0 * gain.error => Finding::Keep,
            slower if slower < -2.0 * gain.error => Finding::GoBack,
            _ => Finding::Leave,
        };
        Next::End(self.end(plan, Some(gain), verdict))
    }

    /// Ends a trial in which a step is not to be made: it is worse.
    pub fn break_off(&mut self, plan: &AdaLrsPlan) -> Trial {
        self.end(plan, None, Finding::GoBack)
    }

    fn end(&mut self, plan: &AdaLrsPlan, gain: Option<Slope>, verdict: Finding) -> Trial {
        let (scale_tried, (_, down)) = (self.scale, self.factors(plan));
        let tried = self.window.take().and_then(|window| window.tried);
        let (_, scale_before) = tried.expect("invariant: called while a trial runs");
        let scale = match verdict {
            Finding::Keep => scale_tried,
            Finding::Leave => scale_before,
            Finding::GoBack => scale_before * down,
        };
        self.trials += 1;
        self.scale = scale;
        self.has_left = verdict == Finding::Leave;
        Trial { trial: self.trials, scale_before, scale_tried, gain, verdict, scale }
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

    /// A window at both rates, in which the loss falls by these.
    fn window(search: &mut AdaLrs, plan: &AdaLrsPlan, measured: f64, tried: impl Fn(f64) -> f64) -> Trial {
        assert!(search.is_ready(plan) && !search.in_window());
        search.begin();
        assert!(!search.is_ready(plan) && search.in_window() && !search.in_trial());
        let nexts = falling(measured).map(|loss| search.observe(plan, loss));
        assert_eq!(nexts, [Next::Step, Next::Step, Next::Step, Next::Try]);
        assert!(search.in_trial());
        let speed = tried(search.scale);
        match falling(speed).map(|loss| search.observe(plan, loss)) {
            [Next::Step, Next::Step, Next::Step, Next::End(trial)] => trial,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_gain_and_its_error_are_those_of_least_squares() {
        // By hand: y = 1, 3, 2 at x = 1, 2, 3: slope 13/14; squared residuals 1/196, 256/196, 121/196, so s^2 = 27/28.
        let gain = Slope::gain(&[9.0, 9.0, 9.0, 9.0], &[9.0, 8.0, 6.0, 7.0]);
        assert!((gain.speed - 13.0 / 14.0).abs() < 1e-12, "{gain:?}");
        assert!((gain.error - (27.0f64 / 28.0 / 14.0).sqrt()).abs() < 1e-12, "{gain:?}");
        // What data does to both is no difference.
        let noisy = [5.0, 7.0, 4.0, 6.0];
        let tried: Vec<f64> = noisy.iter().enumerate().map(|(i, loss)| loss - 0.5 * i as f64).collect();
        let gain = Slope::gain(&noisy, &tried);
        assert!((gain.speed - 0.5).abs() < 1e-12 && gain.error < 1e-12, "{gain:?}");
    }

    #[test]
    fn trials_keep_leave_and_go_back() {
        let mut search = AdaLrs::default();
        // Faster: kept.
        let trial = window(&mut search, &PLAN, 0.1, |_| 0.2);
        assert_eq!((trial.verdict, trial.trial), (Finding::Keep, 1));
        assert_eq!((trial.scale_before, trial.scale_tried, trial.scale, search.scale), (1.0, 3.0, 3.0, 3.0));
        // The next one goes up by 1.5 only, and as fast is left.
        let trial = window(&mut search, &PLAN, 0.2, |_| 0.2);
        assert_eq!((trial.verdict, trial.scale_tried, search.scale), (Finding::Leave, 4.5, 3.0));
        assert!(search.has_left(), "what comes next is at the same rate");
        // By now both factors have come to 1, and the search is over.
        assert!(!search.is_ready(&PLAN));
        assert_eq!(search.observe(&PLAN, 1.0), Next::Step);

        let mut search = AdaLrs::default();
        let trial = window(&mut search, &PLAN, 0.2, |_| 0.1);
        assert_eq!((trial.verdict, trial.scale_tried, search.scale), (Finding::GoBack, 3.0, 0.5));
        assert!(!search.has_left());

        let mut search = AdaLrs::default();
        search.begin();
        let _ = falling(0.1).map(|loss| search.observe(&PLAN, loss));
        search.observe(&PLAN, 5.0);
        let trial = search.break_off(&PLAN);
        assert_eq!((trial.verdict, trial.gain, search.scale), (Finding::GoBack, None, 0.5));
        assert!(!search.in_window());
    }

    #[test]
    fn what_was_skipped_is_skipped_in_the_trial() {
        let mut search = AdaLrs::default();
        search.skip(6);
        search.begin();
        search.skip(7);
        assert!(!search.skips(7), "it is being measured");
        let _ = falling(0.1).map(|loss| search.observe(&PLAN, loss));
        search.skip(8);
        assert_eq!([6, 7, 8].map(|step| search.skips(step)), [false, true, false]);
        let _ = falling(0.1).map(|loss| search.observe(&PLAN, loss));
        search.begin();
        let _ = falling(0.1).map(|loss| search.observe(&PLAN, loss));
        assert!(search.in_trial() && !search.skips(7), "it is of another window");
    }

    /// A loss whose speed is a parabola in the logarithm of the rate, and which falls ever slower as training does: from
    /// far below and far above, the search comes near the best rate.
    #[test]
    fn it_comes_near_the_best_rate_from_below_and_above() {
        let factors = [(3, 2), (2, 3)];
        for (start, (alpha, beta)) in
            [0.1, 10.0].into_iter().flat_map(|start| factors.map(|both| (start, both)))
        {
            let plan = AdaLrsPlan { window: 4, alpha, beta, lambda: 0.9 };
            let mut search = AdaLrs::default();
            let mut windows = 0;
            while search.is_ready(&plan) {
                let slower = 1.0 / f64::from(1 + windows);
                let speed = |scale: f64| slower * (0.5 - 0.02 * (start * scale).ln().powi(2));
                let measured = speed(search.scale);
                let trial = window(&mut search, &plan, measured, speed);
                assert!(trial.scale_tried > trial.scale_before, "{trial:?}");
                windows += 1;
            }
            let rate = start * search.scale;
            assert!((0.5..2.0).contains(&rate), "from {start}: {rate}");
        }
    }
}
