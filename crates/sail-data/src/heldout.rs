//! Held-out data: every good sample once, in shard order, for evaluation.

use crate::draft::Draft;
use crate::error::{Error, Result};
use crate::sample::Sample;
use crate::shard::SampleRef;
use crate::source::{Source, find_shards};
use crate::spec::{DataSpec, SourceSpec, StoreSpec};
use crate::store::Store;
use crate::tally::Tally;
use crate::text::TextEncoder;

/// Finds sources whose patterns match nothing or cannot be opened, without reading samples.
///
/// # Errors
/// As [`crate::Loader::new`] for the specification and the patterns.
pub fn check_sources(spec: &DataSpec) -> Result<()> {
    Source::open_all(spec).map(drop)
}

/// The shards that the sources' patterns name, in order.
///
/// # Errors
/// As [`check_sources`].
pub fn shard_paths(spec: &DataSpec) -> Result<Vec<String>> {
    Ok(Source::open_all(spec)?.into_iter().flat_map(|source| source.shards).collect())
}

/// The shards that some patterns name, in order; `name` is theirs in messages.
///
/// # Errors
/// [`Error::NoShards`] for a pattern that nothing matches, [`Error::DuplicateShard`].
pub fn expand_shards(name: &str, patterns: &[String]) -> Result<Vec<String>> {
    find_shards(&Store::new(&StoreSpec::default())?, &SourceSpec::new(name, patterns.to_vec()))
}

/// Every good sample of the sources, in shard order, once, at most `limit` per source (`None`: all), one
/// at a time.
///
/// `streams`, `seed`, the buffers, the weights and the sampling weights play no part. Bad samples are skipped
/// and logged as in training.
///
/// # Errors
/// Errors of the shards, [`Error::TooManyBad`], and [`Error::EmptySource`] or [`Error::NoGoodSample`] for a
/// source that gives nothing; those of `visit`.
pub fn for_each_sample<E: From<Error>>(
    spec: &DataSpec,
    encoder: &TextEncoder,
    limit: Option<usize>,
    mut visit: impl FnMut(Sample) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    for source in Source::open_all(spec)? {
        visit_source(spec, encoder, &source, limit.unwrap_or(usize::MAX), &mut visit)?;
    }
    Ok(())
}

/// The samples of [`for_each_sample`] in a list.
///
/// # Errors
/// As [`for_each_sample`].
pub fn read_samples(spec: &DataSpec, encoder: &TextEncoder, limit: Option<usize>) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for_each_sample(spec, encoder, limit, |sample| {
        samples.push(sample);
        Result::Ok(())
    })?;
    Ok(samples)
}

fn visit_source<E: From<Error>>(
    spec: &DataSpec,
    encoder: &TextEncoder,
    source: &Source,
    limit: usize,
    visit: &mut impl FnMut(Sample) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut tally = Tally::default();
    let mut given = 0;
    for shard in 0..source.shards.len() {
        if given >= limit {
            break;
        }
        let mut scanner = source.open(shard)?.scan(0, 0);
        while given < limit {
            let Some(extent) = scanner.next_sample()? else { break };
            let place = SampleRef { shard: shard as u32, epoch: 0, extent };
            tally.seen += 1;
            match Draft::read(spec, encoder, source, place)?.and_then(|draft| draft.finish(&spec.image)) {
                Ok(sample) => {
                    given += 1;
                    visit(sample)?;
                }
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
            Err(Error::NoGoodSample { name: source.name.clone(), skipped, reason: reason.to_owned() }.into())
        }
        None => Err(Error::EmptySource { name: source.name.clone(), shards: source.shards.len() }.into()),
    }
}
