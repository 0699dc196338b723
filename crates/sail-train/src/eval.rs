//! Held-out evaluation: the loss with the true image, with another sample's image, and a few
//! generated answers.
//!
//! The gap between the two losses is the cheapest honest sign that the model looks at the image.
//! Called by the train loop on its cadence and by `sail-train eval`.

use std::collections::BTreeMap;
use std::fmt;

use sail_data::{DataSpec, LossWeight, Pack, Role, Sample, TextEncoder, read_samples};
use sail_model::generate::GenerateOptions;
use sail_model::vlm::{Prompt, Vlm};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, no_grad};

use crate::batch::{to_batch, to_images};
use crate::config::EvalPlan;
use crate::error::{Error, Result};

/// Losses of one source, or of all; each is a mean over answer tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// Samples measured.
    pub samples: usize,
    /// Answer tokens measured.
    pub answer_tokens: u64,
    /// With the true images.
    pub loss: f64,
    /// The samples that have images, with and without the right ones; `None` where there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<ImageLosses>,
}

/// Losses over the samples whose images could be exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageLosses {
    /// With each sample's own images.
    pub true_image: f64,
    /// With another sample's.
    pub shuffled_image: f64,
}

impl ImageLosses {
    /// How much worse the wrong image is, nats a token.
    pub fn gap(&self) -> f64 {
        self.shuffled_image - self.true_image
    }
}

/// A generated answer beside the truth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// `source/shard/key` of the sample.
    pub sample: String,
    /// What was asked.
    pub question: String,
    /// What the data says.
    pub truth: String,
    /// What the model says.
    pub answer: String,
}

/// One evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// By source.
    pub sources: BTreeMap<String, Losses>,
    /// Over all sources.
    pub total: Losses,
    /// A few answers of each source.
    pub generations: Vec<Generation>,
}

/// The held-out samples, in memory, with how to measure on them.
pub struct Evaluator {
    sources: BTreeMap<String, Vec<Sample>>,
    plan: EvalPlan,
    tokens_per_pack: usize,
}

/// Sums that become a mean.
#[derive(Clone, Copy, Default)]
struct Sum {
    loss: f64,
    tokens: f64,
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.tokens += other.tokens;
    }

    fn mean(self) -> f64 {
        self.loss / self.tokens
    }
}

impl Evaluator {
    /// Reads the held-out samples of `spec`'s sources, at most `plan.samples` of each.
    pub fn new(mut spec: DataSpec, plan: &EvalPlan, encoder: &TextEncoder) -> Result<Self> {
        // Held-out losses are means over answer tokens, whatever the training weighs.
        spec.text.loss_weight = LossWeight::Token;
        let mut sources: BTreeMap<String, Vec<Sample>> = BTreeMap::new();
        for sample in read_samples(&spec, encoder, Some(plan.samples))? {
            sources.entry(sample.id.source.clone()).or_default().push(sample);
        }
        Ok(Self { sources, plan: plan.clone(), tokens_per_pack: spec.tokens_per_pack })
    }

    /// The first held-out sample with an image.
    pub fn image_sample(&self) -> Option<&Sample> {
        self.sources.values().flatten().find(|sample| !sample.images.is_empty())
    }

    /// Measures `model`, without a graph.
    pub fn run(&self, model: &Vlm, encoder: &TextEncoder, device: Device) -> Result<EvalReport> {
        no_grad(|| {
            let mut report = EvalReport::default();
            let (mut all, mut all_true, mut all_shuffled) = (Sum::default(), Sum::default(), Sum::default());
            for (name, samples) in &self.sources {
                let (with_image, without): (Vec<&Sample>, Vec<&Sample>) =
                    samples.iter().partition(|sample| !sample.images.is_empty());
                let (own, other) = exchange_images(&with_image);
                let rest: Vec<&Sample> = with_image
                    .iter()
                    .copied()
                    .filter(|s| !own.iter().any(|o| o.id == s.id))
                    .chain(without)
                    .collect();
                let true_image = self.loss(model, own.iter().copied(), device)?;
                let shuffled = self.loss(model, other.iter(), device)?;
                let mut sum = self.loss(model, rest.into_iter(), device)?;
                sum.add(true_image);
                if !(sum.loss.is_finite() && shuffled.loss.is_finite()) {
                    return Err(Error::HeldOutNotFinite { name: name.clone() });
                }
                report.sources.insert(name.clone(), losses(samples.len(), sum, true_image, shuffled));
                all.add(sum);
                all_true.add(true_image);
                all_shuffled.add(shuffled);
                for sample in samples.iter().take(self.plan.generate) {
                    report.generations.push(self.answer(model, encoder, sample, device)?);
                }
            }
            let samples = self.sources.values().map(Vec::len).sum();
            report.total = losses(samples, all, all_true, all_shuffled);
            Ok(report)
        })
    }

    fn loss<'a>(
        &self,
        model: &Vlm,
        samples: impl Iterator<Item = &'a Sample>,
        device: Device,
    ) -> Result<Sum> {
        let mut sum = Sum::default();
        let mut pack: Vec<&Sample> = Vec::new();
        let mut tokens = 0;
        let mut measure = |pack: &mut Vec<&'a Sample>| -> Result<()> {
            if !pack.is_empty() {
                let pack = Pack::collate(&std::mem::take(pack));
                let loss = model.loss_sum(&to_batch(&pack, device))?.to_kind(Kind::Double).double_value(&[]);
                sum.add(Sum { loss, tokens: pack.weight_sum() });
            }
            Ok(())
        };
        for sample in samples {
            if tokens + sample.ids.len() > self.tokens_per_pack {
                measure(&mut pack)?;
                tokens = 0;
            }
            tokens += sample.ids.len();
            pack.push(sample);
        }
        measure(&mut pack)?;
        Ok(sum)
    }

    fn answer(
        &self,
        model: &Vlm,
        encoder: &TextEncoder,
        sample: &Sample,
        device: Device,
    ) -> Result<Generation> {
        let asked = sample.prompt();
        let prompt = Prompt {
            ids: asked.prompt.ids,
            images: to_images(&asked.images, device),
            image_rows: asked.prompt.image_rows,
        };
        let options = GenerateOptions::greedy(self.plan.max_new_tokens, encoder.stop_ids());
        let ids = model.generate(&[prompt], &options, &mut |_, _| true)?.pop().unwrap_or_default();
        Ok(Generation {
            sample: sample.id.to_string(),
            question: sample
                .turns
                .iter()
                .find(|turn| turn.role == Role::User)
                .map_or_else(String::new, |t| t.text.clone()),
            truth: asked.truth,
            answer: encoder.decode(&ids)?.trim().to_owned(),
        })
    }
}

fn losses(samples: usize, sum: Sum, true_image: Sum, shuffled: Sum) -> Losses {
    let images = (true_image.tokens > 0.0)
        .then(|| ImageLosses { true_image: true_image.mean(), shuffled_image: shuffled.mean() });
    Losses { samples, answer_tokens: sum.tokens as u64, loss: sum.mean(), images }
}

/// Pairs of a sample and the same text with the images of another one. Samples of equally many
/// tiles (or images of the same sizes) pass theirs on by half the list, so that neighbours in a shard, which
/// may show the same thing, are not exchanged; one that is alone with its sizes is left out.
fn exchange_images<'a>(samples: &[&'a Sample]) -> (Vec<&'a Sample>, Vec<Sample>) {
    let mut by_sizes: BTreeMap<&[(usize, usize)], Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        by_sizes.entry(&sample.images.sizes).or_default().push(sample);
    }
    let (mut own, mut other) = (Vec::new(), Vec::new());
    for group in by_sizes.into_values().filter(|group| group.len() > 1) {
        let shift = group.len() / 2;
        for (i, sample) in group.iter().enumerate() {
            own.push(*sample);
            let images = group[(i + shift) % group.len()].images.clone();
            other.push(Sample { images, ..(*sample).clone() });
        }
    }
    (own, other)
}

impl fmt::Display for EvalReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<12} {:>8} {:>8} {:>8} {:>10} {:>14} {:>8}",
            "held-out", "samples", "tokens", "loss", "true image", "shuffled image", "gap"
        )?;
        let rows = self.sources.iter().map(|(name, losses)| (name.as_str(), losses));
        for (name, row) in rows.chain([("all", &self.total)]) {
            write!(f, "{name:<12} {:>8} {:>8} {:>8.4}", row.samples, row.answer_tokens, row.loss)?;
            match &row.images {
                Some(images) => writeln!(
                    f,
                    " {:>10.4} {:>14.4} {:>+8.4}",
                    images.true_image,
                    images.shuffled_image,
                    images.gap()
                )?,
                None => writeln!(f, " {:>10} {:>14} {:>8}", "-", "-", "-")?,
            }
        }
        Ok(())
    }
}
