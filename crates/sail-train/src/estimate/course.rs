//! A stage from its first step to its last: what its steps take in, and how long they take together.
//!
//! Packs are full, as everywhere in an estimate. Between two unlock points all steps are the same, so that a stage
//! with such points is a sum over what lies between them.

use super::PackGuess;
use super::step::{StepModel, Steps};
use crate::config::{Amount, Plan};
use crate::error::Result;

/// What steps take in and compute, on all ranks together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Packs.
    pub packs: f64,
    /// Tokens, visual ones included.
    pub tokens: f64,
    /// Samples of the length that [`Course::sample_tokens`] says.
    pub samples: f64,
    /// Operations of forward and backward passes.
    pub flops: f64,
}

/// A stage from its first step to its last.
#[derive(Clone, Debug, PartialEq)]
pub struct Course {
    /// Tokens of a sample on average: what was guessed, else what `data.samples` and the schedule make of it, else a
    /// whole pack.
    pub sample_tokens: f64,
    /// Steps until the schedule's length or `data.samples` are reached, whichever comes first.
    pub steps: u64,
    /// A step once all unlock points are passed.
    pub step: Work,
    /// All steps.
    pub stage: Work,
    /// All steps under the strategy of the plan, seconds.
    pub secs: f64,
    /// `data.epochs`, which may end it earlier.
    pub epochs: Option<u64>,
    /// Whether the held-out loss may end it earlier.
    pub stops_early: bool,
    /// What lies between unlock points, at least one; none of them begins where it ends.
    pub phases: Vec<Phase>,
}

/// Steps that are all the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Phase {
    /// Steps done before it.
    pub start: u64,
    /// Operations of one of its steps.
    pub flops: f64,
    /// How long such a step takes under the strategy of the plan, seconds.
    pub secs: f64,
}

impl Course {
    /// Of a stage, and a step of each of its phases, those included that it does not come to for want of data.
    pub(super) fn of(stage: &Steps<'_>, guess: &PackGuess) -> Result<(Self, Vec<StepModel>)> {
        let plan = stage.plan;
        let packs = plan.batch.packs_per_step as f64;
        let tokens = packs * stage.pack.tokens() as f64;
        let (sample_tokens, made) = length(plan, guess, tokens);

        let mut points: Vec<(u64, usize)> = plan
            .train
            .unfreeze
            .iter()
            .enumerate()
            .map(|(i, unlock)| (steps_of(unlock.at, tokens), i))
            .collect();
        points.sort_unstable();
        let mut passed = Vec::new();
        let mut models = vec![stage.after(&passed)?];
        let mut phases = vec![phase(0, &models[0], plan)];
        for of_step in points.chunk_by(|a, b| a.0 == b.0) {
            passed.extend(of_step.iter().map(|(_, index)| index));
            let model = stage.after(&passed)?;
            phases.push(phase(of_step[0].0, &model, plan));
            models.push(model);
        }
        let flops = phases.last().map_or(0.0, |last| last.flops);
        // The data may end before a point.
        phases.retain(|phase| (phase.start as f64) < made);
        let ends = phases.iter().skip(1).map(|next| next.start as f64).chain([made]);
        let (mut all_flops, mut secs) = (0.0, 0.0);
        for (phase, end) in phases.iter().zip(ends) {
            let steps = end - phase.start as f64;
            all_flops += steps * phase.flops;
            secs += steps * phase.secs;
        }
        let step = Work { packs, tokens, samples: tokens / sample_tokens, flops };
        let stage = Work {
            packs: made * packs,
            tokens: made * tokens,
            samples: made * step.samples,
            flops: all_flops,
        };
        let (steps, epochs) = (made.ceil() as u64, plan.data.epochs);
        let stops_early = plan.schedule.early_stop.is_some();
        Ok((Self { sample_tokens, steps, step, stage, secs, epochs, stops_early, phases }, models))
    }
}

/// Tokens of a sample on average, and how many steps of `tokens` are made, the last perhaps not full.
fn length(plan: &Plan, guess: &PackGuess, tokens: f64) -> (f64, f64) {
    let pack = plan.batch.tokens_per_pack as f64;
    let steps = steps_of(plan.schedule.length, tokens) as f64;
    let samples = plan.data.samples.map(|samples| samples as f64);
    let planned = samples.map_or(pack, |samples| (steps * tokens / samples).clamp(1.0, pack));
    let sample_tokens = guess.sample_tokens.map_or(planned, |tokens| tokens as f64);
    let made = samples.map_or(steps, |samples| steps.min(samples * sample_tokens / tokens));
    (sample_tokens, made)
}

/// The first step after which a stage has come so far.
fn steps_of(amount: Amount, tokens_per_step: f64) -> u64 {
    match amount {
        Amount::Steps(steps) => steps,
        Amount::Tokens(tokens) => (tokens as f64 / tokens_per_step).ceil() as u64,
    }
}

fn phase(start: u64, model: &StepModel, plan: &Plan) -> Phase {
    let flops = model.pass.total_flops().total() as f64 * plan.batch.packs_per_step as f64;
    Phase { start, flops, secs: model.estimate(plan.parallel.strategy).step_secs }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Config, load};
    use crate::estimate::StageEstimate;
    use crate::estimate::link::Cluster;

    /// Of a stage of the tiny models: 12 steps of 2 packs of 256 tokens, on 2 ranks.
    fn course(file: &str, sets: &[&str], sample_tokens: Option<u64>) -> Course {
        estimate(file, sets, sample_tokens).course
    }

    fn estimate(file: &str, sets: &[&str], sample_tokens: Option<u64>) -> StageEstimate {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny").join(file);
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        let Config::Stage(plan) = load(&path, &sets).unwrap() else { panic!("a stage") };
        let cluster = Cluster {
            world: 2,
            node_gpus: 8,
            node_bytes_per_sec: 400e9,
            gpu_bytes_per_sec: 450e9,
            peak_flops: 989e12,
            mfu: 0.4,
        };
        let guess = PackGuess { sample_tokens, ..PackGuess::default() };
        StageEstimate::of_plan(&plan, cluster, &guess).unwrap()
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * b.abs()
    }

    /// Tokens and samples of a step, steps, and tokens and samples of the stage.
    fn amounts(sets: &[&str], sample_tokens: Option<u64>) -> [f64; 5] {
        let Course { step, steps, stage, .. } = course("stage1.yaml", sets, sample_tokens);
        [step.tokens, step.samples, steps as f64, stage.tokens, stage.samples]
            .map(|value| (1e6 * value).round() / 1e6)
    }

    #[test]
    fn samples_and_steps_follow_from_the_plan() {
        let exactly = |found: [f64; 5], expected: [f64; 5]| {
            assert!(found.iter().zip(expected).all(|(a, b)| close(*a, b)), "{found:?}, {expected:?}");
        };
        exactly(amounts(&[], None), [512.0, 2.0, 12.0, 6144.0, 24.0]);
        exactly(amounts(&[], Some(64)), [512.0, 8.0, 12.0, 6144.0, 96.0]);
        // Four to a pack.
        exactly(amounts(&["data.samples=96"], None), [512.0, 8.0, 12.0, 6144.0, 96.0]);
        // They end the stage: they are shorter than those that would fill it, or fewer than its packs.
        exactly(amounts(&["data.samples=96"], Some(32)), [512.0, 16.0, 6.0, 3072.0, 96.0]);
        exactly(amounts(&["data.samples=9"], None), [512.0, 2.0, 5.0, 2304.0, 9.0]);
        let tokens = ["schedule.steps=null", "schedule.tokens=1000"];
        exactly(amounts(&tokens, None), [512.0, 2.0, 2.0, 1024.0, 4.0]);
    }

    #[test]
    fn a_stage_is_the_sum_of_its_phases() {
        let [before, after] = ["stage2.yaml", "stage3.yaml"].map(|file| course(file, &[], None));
        assert!(before.phases.len() == 1 && close(before.stage.flops, 12.0 * before.step.flops));
        let unfreeze = "train.unfreeze=[{at: 4, match: 'llm.blocks[1]', lr: 1e-3}, \
                        {at: 3000 tokens, match: llm, lr: 1e-3}]";
        let course = course("stage2.yaml", &[unfreeze], None);
        assert_eq!(course.phases.iter().map(|phase| phase.start).collect::<Vec<_>>(), [0, 4, 6]);
        let [first, second, last] = course.phases[..] else { panic!("three phases") };
        assert!(close(first.flops, before.step.flops) && close(first.secs, before.phases[0].secs));
        // A module counts as trained once something of it is; what travels is counted by parameter.
        assert!(close(second.flops, after.step.flops) && close(last.flops, after.step.flops));
        assert!(second.secs < last.secs);
        assert!(close(course.stage.flops, 4.0 * first.flops + 8.0 * last.flops));
        assert!(close(course.secs, 4.0 * first.secs + 2.0 * second.secs + 6.0 * last.secs));
        assert!(close(course.step.flops, last.flops));
    }

    /// Images that are encoded together before the encoder is trained may take more than training it.
    #[test]
    fn memory_is_that_of_the_phase_with_most() {
        let memory = |sets: &[&str]| {
            let sets = [&["batch.packs_per_step=400", "data.streams=2"], sets].concat();
            estimate("stage1.yaml", &sets, None).strategies[0].memory.activations
        };
        let [ahead, one] = [1000, 1].map(|images| format!("batch.vision_images={images}"));
        let unfreeze = "train.unfreeze=[{at: 4, match: vision, lr: 1e-3}]";
        let (frozen, trained) = (memory(&[&ahead]), memory(&[&one, unfreeze]));
        assert!(frozen > trained && memory(&[&one]) < trained, "{frozen} {trained}");
        assert_eq!(memory(&[&ahead, unfreeze]), frozen);
    }

    #[test]
    fn a_point_may_come_after_the_data() {
        let sets = ["data.samples=4", "train.unfreeze=[{at: 4, match: llm, lr: 1e-3}]"];
        let course = course("stage2.yaml", &sets, None);
        assert_eq!((course.phases.len(), course.steps), (1, 2));
        assert!(close(course.stage.flops, 2.0 * course.phases[0].flops));
    }
}
