//! Held-out evaluation: the loss with the true image, with another sample's image, and a few
//! generated answers.
//!
//! The gap between the two losses is the cheapest honest sign that the model looks at the image.
//! Called by the train loop on its cadence and by `sail-train eval`.

use std::collections::BTreeMap;
use std::fmt;

use sail_data::{
    DataSpec, ImageSpec, Images, LossWeight, Pack, Role, Sample, TextEncoder, read_samples, strip,
};
use sail_model::generate::GenerateOptions;
use sail_model::vlm::Prompt;
use serde::{Deserialize, Serialize};
use tch::{Kind, no_grad};

use crate::batch::Feed;
use crate::config::EvalPlan;
use crate::error::{Error, Result};
use crate::world::World;

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
    image: ImageSpec,
}

/// Sums that become a mean.
#[derive(Clone, Copy, Default)]
struct Sum {
    loss: f64,
    tokens: f64,
}

/// Who of the ranks does what: each piece of work is the next one's.
struct Turns<'a> {
    world: &'a World,
    next: usize,
}

impl Turns<'_> {
    /// Whether the next piece of work is this rank's.
    fn is_mine(&mut self) -> bool {
        self.world.goes_on();
        let turn = self.next;
        self.next += 1;
        turn % self.world.size() == self.world.rank()
    }
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
        Ok(Self { sources, plan: plan.clone(), tokens_per_pack: spec.tokens_per_pack, image: spec.image })
    }

    /// The first held-out sample with an image.
    pub fn image_sample(&self) -> Option<&Sample> {
        self.sources.values().flatten().find(|sample| !sample.images.is_empty())
    }

    /// What the encoder sees of the samples that are answered, as JPEG files by [`Generation::sample`]; of those with images.
    pub fn pictures(&self) -> BTreeMap<String, Vec<u8>> {
        let answered = self.sources.values().flat_map(|samples| samples.iter().take(self.plan.generate));
        answered
            .filter_map(|sample| Some((sample.id.to_string(), strip(&sample.images, &self.image)?)))
            .collect()
    }

    /// Measures the model, without a graph. The ranks of `world` share the work; every rank makes the same call and
    /// gets the same report.
    ///
    /// # Errors
    /// [`Error::HeldOutNotFinite`], on all ranks; those of the model and of c10d.
    pub fn run(&self, feed: Feed<'_>, encoder: &TextEncoder, world: &World) -> Result<EvalReport> {
        let mut turns = Turns { world, next: 0 };
        let mut sums = Vec::new();
        let mut answers = BTreeMap::new();
        no_grad(|| {
            for samples in self.sources.values() {
                let (with_image, without): (Vec<&Sample>, Vec<&Sample>) =
                    samples.iter().partition(|sample| !sample.images.is_empty());
                let (own, other) = exchange_images(&with_image);
                let alone = |sample: &&&Sample| !own.iter().any(|exchanged| exchanged.id == sample.id);
                let rest: Vec<&Sample> = with_image.iter().filter(alone).copied().chain(without).collect();
                let true_image = self.loss(feed, own.iter().copied(), &mut turns)?;
                let shuffled = self.loss(feed, other.iter(), &mut turns)?;
                let rest = self.loss(feed, rest.into_iter(), &mut turns)?;
                sums.extend([true_image, shuffled, rest].map(|sum| [sum.loss, sum.tokens]));
                for sample in samples.iter().take(self.plan.generate) {
                    let turn = turns.next;
                    if turns.is_mine() {
                        answers.insert(turn, self.answer(feed, encoder, sample)?);
                    }
                }
            }
            Ok::<_, Error>(())
        })?;
        let mut all = vec![Sum::default(); sums.len()];
        for rank in world.gather_numbers(&sums.concat())? {
            for (sum, part) in all.iter_mut().zip(rank.chunks(2)) {
                sum.add(Sum { loss: part[0], tokens: part[1] });
            }
        }
        let generations: BTreeMap<usize, Generation> =
            world.gather(&answers)?.into_iter().flatten().collect();
        self.report(&all, generations.into_values().collect())
    }

    /// `sums` are those with the true images, with others, and of the remaining samples, for each source.
    fn report(&self, sums: &[Sum], generations: Vec<Generation>) -> Result<EvalReport> {
        let mut report = EvalReport { generations, ..EvalReport::default() };
        let (mut all, mut all_true, mut all_shuffled) = (Sum::default(), Sum::default(), Sum::default());
        for ((name, samples), sums) in self.sources.iter().zip(sums.chunks(3)) {
            let (true_image, shuffled, mut sum) = (sums[0], sums[1], sums[2]);
            sum.add(true_image);
            if !(sum.loss.is_finite() && shuffled.loss.is_finite()) {
                return Err(Error::HeldOutNotFinite { name: name.clone() });
            }
            report.sources.insert(name.clone(), losses(samples.len(), sum, true_image, shuffled));
            all.add(sum);
            all_true.add(true_image);
            all_shuffled.add(shuffled);
        }
        let samples = self.sources.values().map(Vec::len).sum();
        report.total = losses(samples, all, all_true, all_shuffled);
        Ok(report)
    }

    /// Over those of the packs of `samples` that are this rank's turn.
    fn loss<'a>(
        &self,
        feed: Feed<'_>,
        samples: impl Iterator<Item = &'a Sample>,
        turns: &mut Turns<'_>,
    ) -> Result<Sum> {
        let mut sum = Sum::default();
        let mut pack: Vec<&Sample> = Vec::new();
        let mut tokens = 0;
        let mut measure = |pack: &mut Vec<&'a Sample>| -> Result<()> {
            let samples = std::mem::take(pack);
            if !samples.is_empty() && turns.is_mine() {
                let pack = Pack::collate(&samples);
                let loss = feed.model.loss_sum(&feed.batch(&pack)?)?.to_kind(Kind::Double).double_value(&[]);
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

    /// The loss of the samples whose images [`Evaluator::run`] exchanges, when these are left out and their questions do
    /// not mention them, a mean over answer tokens; `None` where there are none. The ranks of `world` share the work.
    ///
    /// # Errors
    /// As [`Evaluator::run`].
    pub fn loss_without_images(
        &self,
        feed: Feed<'_>,
        encoder: &TextEncoder,
        world: &World,
    ) -> Result<Option<f64>> {
        let mut turns = Turns { world, next: 0 };
        let mut sum = Sum::default();
        for samples in self.sources.values() {
            let with_image: Vec<&Sample> =
                samples.iter().filter(|sample| !sample.images.is_empty()).collect();
            let (own, _) = exchange_images(&with_image);
            let bare = own.into_iter().map(|sample| without_images(sample, encoder));
            let bare = bare.collect::<Result<Vec<_>>>()?;
            sum.add(no_grad(|| self.loss(feed, bare.iter(), &mut turns))?);
        }
        let mut all = Sum::default();
        for rank in world.gather_numbers(&[sum.loss, sum.tokens])? {
            all.add(Sum { loss: rank[0], tokens: rank[1] });
        }
        if !all.loss.is_finite() {
            return Err(Error::HeldOutNotFinite { name: "without images".to_owned() });
        }
        Ok((all.tokens > 0.0).then(|| all.mean()))
    }

    fn answer(&self, feed: Feed<'_>, encoder: &TextEncoder, sample: &Sample) -> Result<Generation> {
        let (truth, answer) = answer(feed, encoder, sample, self.plan.max_new_tokens)?;
        let (sample, question) = (sample.id.to_string(), sample.question().to_owned());
        Ok(Generation { sample, question, truth, answer })
    }
}

/// What the data says to the first question of a sample, and what the model does, always with the likeliest token.
///
/// # Errors
/// Those of the model.
pub(crate) fn answer(
    feed: Feed<'_>,
    encoder: &TextEncoder,
    sample: &Sample,
    max_new_tokens: usize,
) -> Result<(String, String)> {
    let asked = sample.prompt();
    let images = feed.images(&asked.images)?;
    let prompt = Prompt { ids: asked.prompt.ids, images, image_rows: asked.prompt.image_rows };
    let options = GenerateOptions::greedy(max_new_tokens, encoder.stop_ids());
    let ids = feed.model.generate(&[prompt], &options, &mut |_, _| true)?.pop().unwrap_or_default();
    Ok((asked.truth, encoder.decode(&ids)?.trim().to_owned()))
}

/// The same conversation without its images and their marks.
fn without_images(sample: &Sample, encoder: &TextEncoder) -> Result<Sample> {
    let mut turns = sample.turns.clone();
    for turn in &mut turns {
        if turn.role == Role::User {
            turn.text = turn.text.replace("<image>\n", "").replace("<image>", "");
        }
    }
    Ok(sample.with_turns(turns, (&[], Images::default()), encoder)?)
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
