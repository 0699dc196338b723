//! CIDEr-D: how much a caption says what people say of the same image (Vedantam et al. 2015, arXiv 1411.5726).
//!
//! The numbers are those of `CiderScorer` in pycocoevalcap, the implementation of the COCO captions challenge, with
//! its document frequencies from the references at hand. That one reads captions that Stanford's tokenizer has taken
//! apart; [`words`] takes them apart here, at the borders of UAX #29, so published scores of other tools differ a little.

use std::collections::{BTreeMap, BTreeSet};

use super::text::unicode_words;

/// Longest n-gram.
const MOST: usize = 4;
/// Width of the penalty for captions of another length than the reference.
const SIGMA: f64 = 6.0;

/// A caption or a reference as words.
type Words = [String];

/// How often each n-gram occurs. Sorted, so that sums are always made in the same order.
type Counts<'w> = BTreeMap<&'w Words, f64>;

/// N-grams of one length with their weights, and the norm of these.
struct Weighted<'w> {
    by_length: [BTreeMap<&'w Words, f64>; MOST],
    norms: [f64; MOST],
    /// What the penalty compares: in that code the number of bigrams.
    length: f64,
}

/// The words of a caption: lower case, no punctuation.
pub fn words(caption: &str) -> Vec<String> {
    unicode_words(caption)
}

/// CIDEr-D of each caption against its references, usually from 0 to 10; their mean is the score of a data set. Images
/// without any reference get 0.
///
/// How much an n-gram counts depends on in how many images' references it occurs: of one image alone all scores are 0.
pub fn cider_d(samples: &[(Vec<String>, Vec<Vec<String>>)]) -> Vec<f64> {
    let mut documents: BTreeMap<&Words, f64> = BTreeMap::new();
    for (_, references) in samples {
        let seen: BTreeSet<&Words> = references.iter().flat_map(|words| ngrams(words)).collect();
        for ngram in seen {
            *documents.entry(ngram).or_default() += 1.0;
        }
    }
    let images = (samples.len() as f64).ln();
    samples
        .iter()
        .map(|(caption, references)| {
            let caption = weigh(caption, &documents, images);
            let of = |reference: &Vec<String>| similarity(&caption, &weigh(reference, &documents, images));
            let sum: f64 = references.iter().map(of).sum();
            // Nothing in common is 0 and not -0, which is the sum of no number.
            10.0 * (sum + 0.0) / (references.len().max(1) * MOST) as f64
        })
        .collect()
}

fn ngrams(words: &Words) -> impl Iterator<Item = &Words> {
    (1..=MOST).flat_map(|n| words.windows(n))
}

fn weigh<'w>(words: &'w Words, documents: &BTreeMap<&Words, f64>, images: f64) -> Weighted<'w> {
    let mut counts = Counts::new();
    for ngram in ngrams(words) {
        *counts.entry(ngram).or_default() += 1.0;
    }
    let mut weighted = Weighted { by_length: Default::default(), norms: [0.0; MOST], length: 0.0 };
    for (ngram, count) in counts {
        let frequency = documents.get(ngram).copied().unwrap_or(0.0).max(1.0);
        let weight = count * (images - frequency.ln());
        let n = ngram.len() - 1;
        weighted.by_length[n].insert(ngram, weight);
        weighted.norms[n] += weight * weight;
        if n == 1 {
            weighted.length += count;
        }
    }
    weighted.norms = weighted.norms.map(f64::sqrt);
    weighted
}

/// Sum over the lengths of n-grams.
fn similarity(caption: &Weighted, reference: &Weighted) -> f64 {
    let difference = caption.length - reference.length;
    let penalty = (-difference * difference / (2.0 * SIGMA * SIGMA)).exp();
    let of_length = |n: usize| {
        let common = |(ngram, weight): (&&Words, &f64)| {
            reference.by_length[n].get(*ngram).map_or(0.0, |other| weight.min(*other) * other)
        };
        let product: f64 = caption.by_length[n].iter().map(common).sum();
        let norms = caption.norms[n] * reference.norms[n];
        penalty * if norms == 0.0 { product } else { product / norms }
    };
    (0..MOST).map(of_length).sum()
}
