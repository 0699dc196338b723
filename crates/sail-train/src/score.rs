//! How likely a model finds the answers of a data set: `sail-train score`.
//!
//! One line of JSON per sample, in shard order. Not an evaluation: no mean, no exchanged images, which
//! are [`crate::eval`]'s.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sail_data::{DataSpec, IGNORE, Pack, Sample, SourceSpec, for_each_sample, shard_paths};
use serde::Serialize;
use tch::{Kind, no_grad};

use crate::batch::to_batch;
use crate::error::{Error, Result};
use crate::output;
use crate::trained::Trained;

/// Share of unusable samples above which nothing is written, as in training by default.
const MAX_ERROR_RATE: f64 = 0.05;
/// Tokens of samples that go through the model together.
const TOKENS_PER_PACK: usize = 4096;

/// The score of one sample.
#[derive(Debug, Serialize)]
struct Score {
    /// Path of the shard.
    shard: String,
    /// Key inside the shard.
    key: String,
    /// The answer's tokens, the end of each turn included.
    tokens: Vec<i64>,
    /// Natural logarithm of the probability of each, given everything before it.
    logprobs: Vec<f64>,
    /// Their sum: the log-likelihood of the answer.
    sum: f64,
}

/// Scores every sample of `shards` and writes the lines to `out`, which is there once all are. A sample that
/// cannot be used is named in the log; more than one in twenty of them is an error. Returns how many
/// there are.
///
/// # Errors
/// Those of reading the shards and of running the model, and when `out` cannot be written.
pub fn score(trained: &Trained, shards: &[String], out: &Path) -> Result<u64> {
    let sources = vec![SourceSpec::new("data", shards.to_vec())];
    let in_order = DataSpec::in_order(sources, trained.text.clone(), trained.image.clone());
    let spec = DataSpec { max_error_rate: MAX_ERROR_RATE, ..in_order };
    let inputs: Vec<PathBuf> = shard_paths(&spec)?.into_iter().map(PathBuf::from).collect();
    output::check(out, &inputs)?;
    let mut scored = 0;
    output::replace(out, |partial| {
        let mut lines = BufWriter::new(File::create(partial).map_err(Error::io(partial))?);
        let (mut waiting, mut tokens) = (Vec::new(), 0);
        let mut write = |samples: &mut Vec<Sample>| -> Result<()> {
            for line in score_pack(trained, &std::mem::take(samples))? {
                let line =
                    serde_json::to_string(&line).expect("invariant: a score has only numbers and text");
                writeln!(lines, "{line}").map_err(Error::io(partial))?;
            }
            Ok(())
        };
        for_each_sample(&spec, &trained.encoder, None, |sample| {
            if !waiting.is_empty() && tokens + sample.ids.len() > TOKENS_PER_PACK {
                write(&mut waiting)?;
                tokens = 0;
            }
            tokens += sample.ids.len();
            scored += 1;
            waiting.push(sample);
            Result::Ok(())
        })?;
        write(&mut waiting)?;
        let file = lines.into_inner().map_err(|error| Error::io(partial)(error.into_error()))?;
        file.sync_all().map_err(Error::io(partial))
    })?;
    Ok(scored)
}

fn score_pack(trained: &Trained, samples: &[Sample]) -> Result<Vec<Score>> {
    let of_samples = answer_logprobs(trained, samples)?;
    let scores = samples.iter().zip(of_samples).map(|(sample, logprobs)| {
        let tokens = sample.targets.iter().copied().filter(|target| *target != IGNORE).collect();
        let sum = logprobs.iter().sum();
        Score { shard: sample.id.shard.clone(), key: sample.id.key.clone(), tokens, logprobs, sum }
    });
    Ok(scores.collect())
}

/// The natural logarithm of the probability of each token that is learnt, the end of its turn included, given all before
/// it; of samples that go through the model as one pack.
///
/// # Errors
/// Those of the model.
pub(crate) fn answer_logprobs(trained: &Trained, samples: &[Sample]) -> Result<Vec<Vec<f64>>> {
    if samples.is_empty() {
        return Ok(Vec::new());
    }
    let batch = to_batch(&Pack::collate(samples), trained.device)?;
    let losses = no_grad(|| trained.model.loss(&batch))?.losses_r.to_kind(Kind::Double);
    let losses = Vec::<f64>::try_from(losses)?;
    let mut rest = losses.into_iter().map(|loss| -loss);
    Ok(samples.iter().map(|sample| rest.by_ref().take(sample.answer_tokens()).collect()).collect())
}
