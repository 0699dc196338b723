//! Held-out data: every good sample once, in shard order, for evaluation.

use crate::draft::Draft;
use crate::error::{Error, Result};
use crate::sample::Sample;
use crate::shard::Scanner;
use crate::source::Source;
use crate::spec::DataSpec;
use crate::tally::Tally;
use crate::text::TextEncoder;

/// Finds sources whose patterns match nothing or cannot be opened, without reading samples.
///
/// # Errors
/// As [`crate::Loader::new`] for the specification and the patterns.
pub fn check_sources(spec: &DataSpec) -> Result<()> {
    Source::open_all(spec).map(drop)
}

/// Every good sample of the sources, in shard order, once, at most `limit` per source (`None`: all).
///
/// `streams`, `seed`, the buffers and the weights play no part. Bad samples are skipped and logged as in
/// training.
///
/// # Errors
/// Errors of the shards, [`Error::TooManyBad`], and [`Error::EmptySource`] or [`Error::NoGoodSample`] for a
/// source that gives nothing.
pub fn read_samples(spec: &DataSpec, encoder: &TextEncoder, limit: Option<usize>) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for source in Source::open_all(spec)? {
        read_source(spec, encoder, &source, limit.unwrap_or(usize::MAX), &mut samples)?;
    }
    Ok(samples)
}

fn read_source(
    spec: &DataSpec,
    encoder: &TextEncoder,
    source: &Source,
    limit: usize,
    samples: &mut Vec<Sample>,
) -> Result<()> {
    let end = samples.len().saturating_add(limit);
    let mut tally = Tally::default();
    for (index, shard) in source.shards.iter().enumerate() {
        let mut scanner = Scanner::open(shard, index as u32, 0, 0)?;
        while samples.len() < end {
            let Some(place) = scanner.next_sample()? else { break };
            tally.seen += 1;
            match Draft::read(spec, encoder, source, place)?.and_then(|draft| draft.finish(&spec.image)) {
                Ok(sample) => samples.push(sample),
                Err(rejected) => {
                    rejected.log();
                    tally.skip(rejected.cause.reason());
                    tally.check(&source.name, spec.max_error_rate)?;
                }
            }
        }
    }
    let skipped = tally.total_skipped();
    match tally.commonest() {
        _ if tally.seen > skipped || limit == 0 => Ok(()),
        Some((reason, _)) => {
            Err(Error::NoGoodSample { name: source.name.clone(), skipped, reason: reason.to_owned() })
        }
        None => Err(Error::EmptySource { name: source.name.clone(), shards: source.shards.len() }),
    }
}
