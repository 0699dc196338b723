//! Continuing token sequences with a cache of keys and values.
//!
//! Prompts of different lengths are continued together and without padding: first all rows of all prompts
//! are one pack, then one row of each sequence that goes on. Called by [`crate::vlm::Vlm::generate`], and
//! directly where there is no image. Not a server: nothing joins a batch that has begun.
//!
//! Dimension letters: t rows of all sequences, b sequences, d model width, v tokens of the vocabulary.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardUniform};
use sail_torch::upload;
use tch::{Kind, Tensor};

use crate::attention::Segments;
use crate::error::{Error, Result};
use crate::llm::{KvCache, Llm};

/// How a text goes on, and when it ends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens of a continuation.
    pub max_new_tokens: usize,
    /// Tokens are drawn after their scores are divided by this, above 0; None: the likeliest is taken.
    pub temperature: Option<f64>,
    /// Tokens are drawn from the likeliest that together have this probability, in (0, 1]; at least one
    /// (Holtzman et al. 2019, arXiv 1904.09751).
    pub top_p: Option<f64>,
    /// What is drawn depends on this, on the place of the prompt in the list and on the number of tokens
    /// before; not on the other prompts.
    pub seed: u64,
    /// A continuation ends with one of these.
    pub stop_ids: Vec<i64>,
}

impl GenerateOptions {
    /// The likeliest token each time.
    pub fn greedy(max_new_tokens: usize, stop_ids: &[i64]) -> Self {
        Self { max_new_tokens, stop_ids: stop_ids.to_vec(), ..Self::default() }
    }

    /// Checks that the numbers make sense.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(&self) -> Result<()> {
        let refuse = |key: &str, reason: String| {
            Err(Error::Config { family: "generation".into(), key: key.into(), reason })
        };
        match (self.temperature, self.top_p) {
            (Some(t), _) if !(t > 0.0 && t.is_finite()) => refuse(
                "temperature",
                format!("must be above 0, is {t}; leave it out for the likeliest token"),
            ),
            (_, Some(p)) if !(p > 0.0 && p <= 1.0) => {
                refuse("top_p", format!("must be above 0 and at most 1, is {p}"))
            }
            (None, Some(_)) => refuse("top_p", "needs a temperature".into()),
            _ => Ok(()),
        }
    }
}

/// Told of every new token, by the place of its prompt in the list; false ends that sequence.
pub type OnToken<'a> = &'a mut dyn FnMut(usize, i64) -> bool;

/// Continues prompts of token ids; see [`from_embeddings`].
///
/// # Errors
/// As [`from_embeddings`].
pub fn from_ids(
    llm: &Llm,
    prompts: &[&[i64]],
    options: &GenerateOptions,
    on_token: OnToken,
) -> Result<Vec<Vec<i64>>> {
    let embed = |ids: &&[i64]| -> Result<Tensor> { Ok(llm.embed(&upload(ids, llm.device())?)) };
    let prompts = tch::no_grad(|| prompts.iter().map(embed).collect::<Result<Vec<_>>>())?;
    from_embeddings(llm, &prompts, options, on_token)
}

/// Continues prompts given as embeddings `[t, d]` each, building no graph.
///
/// Gives for each at most `max_new_tokens` ids; the last is one of `stop_ids` when that ended the text.
///
/// # Errors
/// [`Error::Segments`] for an empty prompt, and as [`GenerateOptions::validate`].
pub fn from_embeddings(
    llm: &Llm,
    prompts: &[Tensor],
    options: &GenerateOptions,
    on_token: OnToken,
) -> Result<Vec<Vec<i64>>> {
    options.validate()?;
    let mut answers = vec![Vec::new(); prompts.len()];
    if prompts.is_empty() || options.max_new_tokens == 0 {
        return Ok(answers);
    }
    tch::no_grad(|| {
        let mut lengths: Vec<i64> = prompts.iter().map(|prompt_td| prompt_td.size()[0]).collect();
        let room = |rows: &i64| llm.new_cache(rows + options.max_new_tokens as i64);
        let mut caches: Vec<KvCache> = lengths.iter().map(room).collect();
        let mut live: Vec<usize> = (0..prompts.len()).collect();
        let mut rows_td = Tensor::f_cat(prompts, 0)?;
        for step in 0..options.max_new_tokens {
            let scores_bv = next_scores(llm, &rows_td, &lengths, &mut caches)?;
            let next = choose(&scores_bv, options, &live, step)?;
            let mut goes_on = Vec::with_capacity(live.len());
            for (sequence, id) in live.iter().zip(&next) {
                answers[*sequence].push(*id);
                goes_on.push(on_token(*sequence, *id) && !options.stop_ids.contains(id));
            }
            caches = kept(caches, &goes_on);
            live = kept(live, &goes_on);
            let next = kept(next, &goes_on);
            if live.is_empty() {
                break;
            }
            lengths = vec![1; live.len()];
            rows_td = llm.embed(&upload(&next, llm.device())?);
        }
        Ok(answers)
    })
}

fn kept<T>(items: Vec<T>, keep: &[bool]) -> Vec<T> {
    items.into_iter().zip(keep).filter_map(|(item, keep)| keep.then_some(item)).collect()
}

/// Scores `[b, v]` fp32 of what comes after each sequence, whose next `lengths` rows are `rows_td`.
fn next_scores(llm: &Llm, rows_td: &Tensor, lengths: &[i64], caches: &mut [KvCache]) -> Result<Tensor> {
    let segments = Segments::of_lengths(lengths.to_vec())?;
    let starts = caches.iter().map(KvCache::rows).zip(lengths);
    let positions: Vec<i64> = starts.flat_map(|(start, length)| start..start + length).collect();
    let positions_t = upload(&positions, llm.device())?;
    let x_td = llm.trunk(rows_td, &positions_t, &segments, Some(caches)).x_td;
    let ends = lengths.iter().scan(-1, |end, length| {
        *end += length;
        Some(*end)
    });
    let ends_b = upload(&ends.collect::<Vec<i64>>(), llm.device())?;
    Ok(llm.logits(&llm.final_norm(&x_td.index_select(0, &ends_b))).to_kind(Kind::Float))
}

/// The next token of each sequence.
fn choose(scores_bv: &Tensor, options: &GenerateOptions, live: &[usize], step: usize) -> Result<Vec<i64>> {
    let Some(temperature) = options.temperature else {
        return Ok(Vec::try_from(scores_bv.argmax(-1, false))?);
    };
    let probabilities_bv = (scores_bv / temperature).softmax(-1, Kind::Float);
    let (sorted_bv, ids_bv) = probabilities_bv.sort(-1, true);
    let up_to_bv = sorted_bv.to_kind(Kind::Double).cumsum(-1, Kind::Double);
    let before_bv = &up_to_bv - &sorted_bv;
    let mut next = Vec::with_capacity(live.len());
    for (b, sequence) in live.iter().enumerate() {
        let b = b as i64;
        let kept = match options.top_p {
            Some(p) => before_bv.get(b).lt(p).sum(Kind::Int64).int64_value(&[]).max(1),
            None => sorted_bv.size()[1],
        };
        let up_to_v = up_to_bv.get(b).narrow(0, 0, kept);
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        rng.set_stream(*sequence as u64);
        rng.set_word_pos(2 * step as u128);
        let draw: f64 = StandardUniform.sample(&mut rng);
        let place = up_to_v.le(draw * up_to_v.double_value(&[kept - 1])).sum(Kind::Int64).int64_value(&[]);
        next.push(ids_bv.int64_value(&[b, place.min(kept - 1)]));
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(options: &GenerateOptions, probabilities: &[f64], steps: usize) -> Vec<f64> {
        let scores: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
        let scores_bv = Tensor::from_slice(&scores).unsqueeze(0);
        let mut counts = vec![0.0; probabilities.len()];
        for step in 0..steps {
            counts[choose(&scores_bv, options, &[3], step).unwrap()[0] as usize] += 1.0 / steps as f64;
        }
        counts
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        let options = GenerateOptions { temperature: Some(1.0), seed: 5, ..GenerateOptions::default() };
        let close = |found: &[f64], expected: &[f64]| {
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.04), "{found:?} {expected:?}");
        };
        close(&draws(&options, &[0.1, 0.6, 0.3], 2000), &[0.1, 0.6, 0.3]);
        // Halving the temperature squares the probabilities.
        let cold = GenerateOptions { temperature: Some(0.5), ..options.clone() };
        close(&draws(&cold, &[0.1, 0.6, 0.3], 2000), &[0.01 / 0.46, 0.36 / 0.46, 0.09 / 0.46]);
        let nucleus = |top_p| GenerateOptions { top_p: Some(top_p), ..options.clone() };
        close(&draws(&nucleus(0.8), &[0.1, 0.6, 0.3], 2000), &[0.0, 2.0 / 3.0, 1.0 / 3.0]);
        close(&draws(&nucleus(0.5), &[0.1, 0.6, 0.3], 50), &[0.0, 1.0, 0.0]);
        close(&draws(&nucleus(1e-9), &[0.1, 0.6, 0.3], 50), &[0.0, 1.0, 0.0]);
        close(&draws(&nucleus(1.0), &[0.1, 0.6, 0.3], 2000), &[0.1, 0.6, 0.3]);
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        let sample =
            |temperature, top_p| GenerateOptions { temperature, top_p, ..GenerateOptions::default() };
        for (options, expected) in [
            (sample(Some(0.0), None), "`temperature`: must be above 0, is 0"),
            (sample(Some(f64::NAN), None), "`temperature`"),
            (sample(Some(1.0), Some(0.0)), "`top_p`: must be above 0 and at most 1, is 0"),
            (sample(Some(1.0), Some(1.5)), "`top_p`"),
            (sample(None, Some(0.5)), "`top_p`: needs a temperature"),
        ] {
            let message = options.validate().unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        assert!(sample(Some(0.7), Some(0.9)).validate().is_ok());
    }
}
