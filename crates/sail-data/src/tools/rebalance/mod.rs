//! Sampling weights that even out over-represented n-grams, in two passes over a source's text.
//!
//! The first pass counts in how many samples each n-gram occurs, the second weighs every sample: a weight is the mean
//! over the sample's n-grams of min(1, sqrt(t / f)), where f is the share of the samples that have the n-gram and t
//! the threshold. That is the probability with which word2vec keeps a word of frequency f (Mikolov et al.,
//! "Distributed representations of words and phrases and their compositionality", 2013, section 2.3), put on n-grams.
//! Counts are sums and weights are visited in the order of the shards, so threads change nothing.

mod count_min;
mod ngrams;
mod text;

use std::collections::BTreeMap;

use serde::Serialize;

use self::count_min::{CountMin, LEAST_BYTES, TOLERATED};
use self::ngrams::Ngrams;
pub(crate) use self::text::report;
use super::access::answers;
use super::error::{Result, ToolError};
use super::walk::{Found, Progress, walk};
use crate::error::{BadSample, Error};
use crate::shard::SampleRef;
use crate::source::Source;
use crate::tally::Tally;
use crate::weights::{Origin, local_bytes, to_bytes};

/// N-grams in a smaller share of the samples are not listed, however low the threshold: there may be too many to be
/// held in memory.
const LEAST_LISTED: f64 = 1e-3;

/// The least memory for counts.
pub(crate) const LEAST_MEMORY_BYTES: u64 = LEAST_BYTES;

/// Counts may be too high by this share of the threshold, all but a few of them.
const NOISE_OF_THRESHOLD: f64 = 0.1;

/// How weights are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Words of an n-gram, at least 1.
    pub(crate) n: usize,
    /// Share of the samples, in (0, 1], that an n-gram may have without lowering a weight.
    pub(crate) threshold: f64,
    /// Memory for counts, at least [`LEAST_MEMORY_BYTES`].
    pub(crate) memory_bytes: u64,
}

/// Weights of all samples, and what they change.
#[derive(Debug)]
pub(crate) struct Rebalanced {
    /// By shard, in the order of its samples.
    pub(crate) weights: BTreeMap<String, Vec<f32>>,
    pub(crate) summary: Summary,
}

/// What the weights change: counts of all samples, and the counts that are expected of the samples kept.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) n: usize,
    pub(crate) threshold: f64,
    /// Samples, those among them without a text by reason, and how many an epoch is expected to keep.
    pub(crate) samples: u64,
    pub(crate) unreadable: BTreeMap<String, u64>,
    pub(crate) kept: f64,
    pub(crate) least_weight: f32,
    /// Pairs of a sample with a text and one of its n-grams.
    pub(crate) ngrams: Change,
    /// Those with a text: shares of the samples are shares of these.
    pub(crate) texts: Change,
    /// N-grams in a larger share of the samples than `listed_above`, most frequent first.
    pub(crate) listed_above: f64,
    pub(crate) frequent: Vec<Frequent>,
}

/// A number of all samples, and what is expected of it in those that are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Change {
    pub(crate) before: f64,
    pub(crate) after: f64,
}

/// The samples that have an n-gram.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Frequent {
    pub(crate) ngram: String,
    pub(crate) samples: Change,
}

/// What weighs a sample.
struct Scale {
    options: Options,
    counts: CountMin,
    /// Samples with a text.
    texts: f64,
    /// N-grams in a larger share of them are listed.
    listed_above: f64,
}

/// A sample with a text, weighed.
struct Weighed {
    weight: f64,
    ngrams: usize,
    /// Those that are listed, by hash.
    frequent: Vec<(u64, String)>,
}

/// Weighs all samples of a source. A sample without a text has the weight 1, so that training reports it.
///
/// # Errors
/// Errors of the shards; [`Error::NoGoodSample`] and [`Error::EmptySource`] when no sample has a text; texts that
/// change with the epoch; a threshold below one sample; less memory than the threshold needs.
pub(crate) fn rebalance(source: &Source, options: Options, progress: &dyn Progress) -> Result<Rebalanced> {
    if source.spec.takes_random_pages() {
        return Err(ToolError::usage(
            format!("source `{}` takes a random page of each document, another each epoch", source.name),
            "a weight belongs to one text: give the source `page: first`",
        ));
    }
    let counts = CountMin::new(options.memory_bytes);
    let tally = count(source, options.n, &counts, progress)?;
    let texts = check_texts(source, &tally, options.threshold)?;
    check_noise(&counts, options, texts)?;
    let listed_above = options.threshold.max(LEAST_LISTED);
    let scale = Scale { options, counts, texts: texts as f64, listed_above };
    let mut weights: BTreeMap<String, Vec<f32>> =
        source.shards.iter().map(|shard| (shard.clone(), Vec::new())).collect();
    let mut summary = Summary {
        n: options.n,
        threshold: options.threshold,
        samples: tally.seen,
        unreadable: tally.skipped,
        kept: 0.0,
        least_weight: 1.0,
        ngrams: Change::default(),
        texts: Change::default(),
        listed_above,
        frequent: Vec::new(),
    };
    let mut frequent: BTreeMap<u64, Frequent> = BTreeMap::new();
    visit(
        source,
        progress,
        |answers| answers.ok().map(|answers| scale.weigh(&answers)),
        |shard, weighed| {
            let weight = weighed.as_ref().map_or(1.0, |weighed| weighed.weight);
            weights.entry(shard.to_owned()).or_default().push(weight as f32);
            summary.kept += weight;
            summary.least_weight = summary.least_weight.min(weight as f32);
            let Some(weighed) = weighed else { return };
            summary.texts.add(1.0, weight);
            summary.ngrams.add(weighed.ngrams as f64, weight);
            for (hash, ngram) in weighed.frequent {
                let new = Frequent { ngram, samples: Change::default() };
                frequent.entry(hash).or_insert(new).samples.add(1.0, weight);
            }
        },
    )?;
    summary.frequent = frequent.into_values().collect();
    summary
        .frequent
        .sort_by(|a, b| b.samples.before.total_cmp(&a.samples.before).then_with(|| a.ngram.cmp(&b.ngram)));
    Ok(Rebalanced { weights, summary })
}

impl Scale {
    fn weigh(&self, answers: &[String]) -> Weighed {
        let ngrams = Ngrams::of(answers, self.options.n);
        let (mut sum, mut frequent) = (0.0, Vec::new());
        for (index, hash) in ngrams.hashes().enumerate() {
            let share = f64::from(self.counts.count(hash)) / self.texts;
            sum += (self.options.threshold / share).sqrt().min(1.0);
            if share > self.listed_above {
                frequent.push((hash, ngrams.text(index)));
            }
        }
        let ngrams = ngrams.hashes().len();
        Weighed { weight: sum / ngrams as f64, ngrams, frequent }
    }
}

/// The number of samples with a text, of which the threshold must be at least one.
fn check_texts(source: &Source, tally: &Tally, threshold: f64) -> Result<u64> {
    let skipped = tally.total_skipped();
    let texts = tally.seen - skipped;
    match tally.commonest() {
        _ if texts > 0 && threshold * texts as f64 >= 1.0 => Ok(texts),
        _ if texts > 0 => Err(ToolError::usage(
            format!("a threshold of {threshold} is less than one of {texts} samples"),
            "give a higher `--threshold`, or n-grams that occur once would count as frequent",
        )),
        Some((reason, _)) => {
            let (name, reason) = (source.name.clone(), reason.to_owned());
            Err(Error::NoGoodSample { name, skipped, reason }.into())
        }
        None => Err(Error::EmptySource { name: source.name.clone(), shards: source.shards.len() }.into()),
    }
}

/// Refuses counts that the sketch makes too high for the threshold.
fn check_noise(counts: &CountMin, options: Options, texts: u64) -> Result<()> {
    let tolerated = NOISE_OF_THRESHOLD * options.threshold * texts as f64;
    let probability = counts.probability_above(tolerated);
    if probability <= TOLERATED {
        return Ok(());
    }
    let (memory, threshold) = (options.memory_bytes, options.threshold);
    let mebibytes = CountMin::bytes_for(counts.total(), tolerated).div_ceil(1 << 20);
    Err(ToolError::usage(
        format!(
            "in {memory} bytes of memory {:.1} % of the counts are too high by more than a tenth of the threshold \
             ({threshold})",
            100.0 * probability
        ),
        format!("`--memory {mebibytes}MiB` is enough, and a higher `--threshold` needs less"),
    ))
}

/// The first pass: counts the samples, and those that have each n-gram.
fn count(source: &Source, n: usize, counts: &CountMin, progress: &dyn Progress) -> Result<Tally> {
    let mut tally = Tally::default();
    let work = |answers: std::result::Result<Vec<String>, BadSample>| {
        let ngrams = Ngrams::of(&answers.map_err(|bad| bad.reason())?, n);
        ngrams.hashes().for_each(|hash| counts.add(hash));
        Ok(())
    };
    visit(source, progress, work, |_, counted: std::result::Result<(), &'static str>| {
        tally.seen += 1;
        if let Err(reason) = counted {
            tally.skip(reason);
        }
    })?;
    Ok(tally)
}

/// Makes something of the answers of every sample on all threads, and visits it with its shard, in order.
fn visit<T: Send>(
    source: &Source,
    progress: &dyn Progress,
    work: impl Fn(std::result::Result<Vec<String>, BadSample>) -> T + Sync,
    mut visit: impl FnMut(&str, T),
) -> Result<()> {
    let sources = std::slice::from_ref(source);
    let work = |source: &Source, place: SampleRef| Ok((place.shard, work(answers(source, place)?)));
    walk(sources, progress, work, |_, found| match found {
        Found::Sample((shard, made)) => {
            visit(&source.shards[shard as usize], made);
            Ok(())
        }
        Found::BrokenShard { error, .. } | Found::UnfitWeights { error, .. } => Err(error.into()),
    })
}

impl Rebalanced {
    /// The file for training.
    ///
    /// # Errors
    /// When there are too many shards for one file.
    pub(crate) fn to_bytes(&self, source: &Source) -> Result<Vec<u8>> {
        let size = |shard: &String| Some((shard.clone(), local_bytes(shard)?));
        let Summary { n, threshold, .. } = self.summary;
        let layout = source.spec.layout;
        let shard_bytes = source.shards.iter().filter_map(size).collect();
        let origin = Origin { n, threshold, layout, shard_bytes };
        to_bytes(&origin, &self.weights).map_err(|error| {
            let message =
                format!("the weights of {} shards do not fit into a file: {error}", source.shards.len());
            ToolError::usage(message, "make larger shards with `sail-data pack`")
        })
    }
}

impl Change {
    /// Counts `number` in a sample of this weight.
    fn add(&mut self, number: f64, weight: f64) {
        self.before += number;
        self.after += number * weight;
    }

    /// The share of `whole` that it is.
    fn of(self, whole: Self) -> Self {
        Self { before: self.before / whole.before, after: self.after / whole.after }
    }
}

impl Summary {
    /// The share of all n-grams that the frequent ones have.
    fn frequent_share(&self) -> Change {
        self.frequent_sum(|count| count).of(self.ngrams)
    }

    /// How evenly the frequent n-grams share their samples: their entropy, in bits.
    fn frequent_entropy(&self) -> Change {
        let total = self.frequent_sum(|count| count);
        let sum = self.frequent_sum(|count| if count > 0.0 { count * count.log2() } else { 0.0 });
        let entropy = |total: f64, sum: f64| total.log2() - sum / total;
        Change { before: entropy(total.before, sum.before), after: entropy(total.after, sum.after) }
    }

    fn frequent_sum(&self, term: impl Fn(f64) -> f64) -> Change {
        self.frequent.iter().fold(Change::default(), |sum, frequent| Change {
            before: sum.before + term(frequent.samples.before),
            after: sum.after + term(frequent.samples.after),
        })
    }
}

#[cfg(test)]
mod tests;
