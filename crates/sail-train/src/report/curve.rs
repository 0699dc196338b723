//! How the figures of a run went, in as few points as a picture has room for.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Points of a curve at most.
const MOST: usize = 800;

/// What `metrics.jsonl` says of a step, as far as it is drawn. What is not a number, as the loss of a run that broke, is
/// written as null.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct StepLine {
    pub(super) step: u64,
    loss: Option<f64>,
    grad_norm: Option<f64>,
    lr: BTreeMap<String, f64>,
    tokens: f64,
    pub(super) step_secs: f64,
    data_wait_secs: f64,
    parts_secs: BTreeMap<String, f64>,
    mfu: Option<f64>,
    peak_memory_bytes: Option<f64>,
}

/// Figures over the steps of a run, one of each for a point: a mean over neighbouring steps where there are too many.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct Curve {
    /// The last step of each point.
    step: Vec<u64>,
    loss: Vec<Option<f64>>,
    loss_low: Vec<Option<f64>>,
    loss_high: Vec<Option<f64>>,
    grad_norm: Vec<Option<f64>>,
    tokens_per_sec: Vec<Option<f64>>,
    /// Share of the time.
    data_wait: Vec<Option<f64>>,
    mfu: Vec<Option<f64>>,
    peak_memory_bytes: Vec<Option<f64>>,
    /// By part of the model.
    lr: BTreeMap<String, Vec<Option<f64>>>,
    /// By what the time was spent on.
    parts_secs: BTreeMap<String, Vec<Option<f64>>>,
}

impl Curve {
    pub(super) fn of(steps: &[StepLine]) -> Self {
        let mut curve = Self::default();
        let names = |of: fn(&StepLine) -> &BTreeMap<String, f64>| -> BTreeSet<String> {
            steps.iter().flat_map(|step| of(step).keys().cloned()).collect()
        };
        let (rates, parts) = (names(|step| &step.lr), names(|step| &step.parts_secs));
        for point in steps.chunks(steps.len().div_ceil(MOST).max(1)) {
            let figure = |of: &dyn Fn(&StepLine) -> Option<f64>| mean(point.iter().filter_map(of));
            let ratio = |of: fn(&StepLine) -> f64| {
                Some(point.iter().map(of).sum::<f64>() / point.iter().map(|step| step.step_secs).sum::<f64>())
            };
            let losses = || point.iter().filter_map(|step| step.loss);
            curve.step.extend(point.last().map(|step| step.step));
            curve.loss.push(mean(losses()));
            curve.loss_low.push(losses().reduce(f64::min));
            curve.loss_high.push(losses().reduce(f64::max));
            curve.grad_norm.push(figure(&|step| step.grad_norm));
            curve.tokens_per_sec.push(ratio(|step| step.tokens));
            curve.data_wait.push(ratio(|step| step.data_wait_secs));
            curve.mfu.push(figure(&|step| step.mfu));
            curve.peak_memory_bytes.push(figure(&|step| step.peak_memory_bytes));
            for name in &rates {
                let value = figure(&|step| step.lr.get(name).copied());
                curve.lr.entry(name.clone()).or_default().push(value);
            }
            for name in &parts {
                let value = figure(&|step| step.parts_secs.get(name).copied());
                curve.parts_secs.entry(name.clone()).or_default().push(value);
            }
        }
        curve
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    (count > 0.0).then(|| sum / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_steps_become_few_points_and_few_stay_as_they_are() {
        let step = |step: u64| StepLine {
            step,
            loss: (!step.is_multiple_of(10)).then_some(step as f64),
            tokens: 6.0,
            step_secs: 2.0,
            lr: BTreeMap::from([("llm".to_owned(), 1e-3)]).into_iter().filter(|_| step > 1000).collect(),
            ..StepLine::default()
        };
        let few = Curve::of(&[step(9), step(10)]);
        assert_eq!((few.step, few.loss), (vec![9, 10], vec![Some(9.0), None]));
        let many = Curve::of(&(1..=2000).map(step).collect::<Vec<_>>());
        assert_eq!(many.step.len(), 667);
        assert_eq!((many.step[0], many.step.last()), (3, Some(&2000)));
        assert_eq!((many.loss[0], many.loss_low[0], many.loss_high[0]), (Some(2.0), Some(1.0), Some(3.0)));
        assert!(many.tokens_per_sec.iter().all(|rate| *rate == Some(3.0)));
        assert_eq!((many.lr["llm"][0], many.lr["llm"][666]), (None, Some(1e-3)));
        assert_eq!(Curve::of(&[]), Curve::default());
    }
}
