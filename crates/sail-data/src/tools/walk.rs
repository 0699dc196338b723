//! Every sample of every shard, once, in order, on all threads.

use rayon::prelude::*;

use super::error::Result;
use crate::shard::SampleRef;
use crate::source::Source;

/// What a walk comes across.
#[derive(Debug)]
pub(crate) enum Found<'a, T> {
    /// What was made of a sample.
    Sample(T),
    /// A shard that cannot be read on from here; the others are.
    BrokenShard {
        /// Its path.
        shard: &'a str,
        /// Why.
        error: crate::Error,
    },
    /// A shard, read to its end, that has another number of samples than its source has sampling weights for it.
    UnfitWeights {
        /// Its path.
        shard: &'a str,
        /// Both numbers.
        error: crate::Error,
    },
}

/// Told how far a walk is.
pub(crate) trait Progress: Sync {
    /// `samples` more have been visited.
    fn samples(&self, samples: u64);
    /// One more shard has been read to its end.
    fn shard(&self);
}

/// Samples in work at a time, per thread: what is read of them is given up before the next ones.
const BATCH_PER_THREAD: usize = 16;

/// Makes something of every sample, in parallel, and visits the results in the order of the shards.
///
/// # Errors
/// Those of `visit`, after which nothing more is read.
pub(crate) fn walk<T: Send>(
    sources: &[Source],
    progress: &dyn Progress,
    work: impl Fn(&Source, SampleRef) -> crate::Result<T> + Sync,
    mut visit: impl FnMut(usize, Found<'_, T>) -> Result<()>,
) -> Result<()> {
    let batch = BATCH_PER_THREAD * rayon::current_num_threads();
    for (index, source) in sources.iter().enumerate() {
        let mut waiting: Vec<SampleRef> = Vec::with_capacity(batch);
        for shard in 0..source.shards.len() {
            let path = &source.shards[shard];
            let mut fault = None;
            let mut scanner = match source.open(shard) {
                Ok(opened) => Some(opened.scan(0, 0)),
                Err(error) => {
                    fault = Some(Found::BrokenShard { shard: path, error });
                    None
                }
            };
            while let Some(scanning) = &mut scanner {
                match scanning.next_sample() {
                    Ok(Some(extent)) => waiting.push(SampleRef { shard: shard as u32, epoch: 0, extent }),
                    Ok(None) => {
                        let unfit = source.check_samples(shard as u32, scanning.ordinal()).err();
                        fault = unfit.map(|error| Found::UnfitWeights { shard: path, error });
                        scanner = None;
                    }
                    Err(error) => {
                        fault = Some(Found::BrokenShard { shard: path, error });
                        scanner = None;
                    }
                }
                if waiting.len() >= batch {
                    flush(index, source, &mut waiting, progress, &work, &mut visit)?;
                }
            }
            if let Some(fault) = fault {
                flush(index, source, &mut waiting, progress, &work, &mut visit)?;
                visit(index, fault)?;
            }
            progress.shard();
        }
        flush(index, source, &mut waiting, progress, &work, &mut visit)?;
    }
    Ok(())
}

fn flush<T: Send>(
    index: usize,
    source: &Source,
    waiting: &mut Vec<SampleRef>,
    progress: &dyn Progress,
    work: &(impl Fn(&Source, SampleRef) -> crate::Result<T> + Sync),
    visit: &mut impl FnMut(usize, Found<'_, T>) -> Result<()>,
) -> Result<()> {
    let made: Vec<_> = waiting.par_iter().map(|&place| work(source, place)).collect();
    progress.samples(made.len() as u64);
    for (place, result) in waiting.drain(..).zip(made) {
        let found = match result {
            Ok(made) => Found::Sample(made),
            Err(error) => Found::BrokenShard { shard: &source.shards[place.shard as usize], error },
        };
        visit(index, found)?;
    }
    Ok(())
}

/// Progress that is not shown.
#[cfg(test)]
pub(crate) struct Silent;

#[cfg(test)]
impl Progress for Silent {
    fn samples(&self, _: u64) {}
    fn shard(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{spec, write_shards};

    #[test]
    fn a_broken_shard_does_not_hide_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let paths = write_shards(dir.path(), &[3, 4, 50]);
        let whole = std::fs::read(&paths[1]).unwrap();
        std::fs::write(&paths[1], &whole[..whole.len() - 1536]).unwrap();
        let pattern = dir.path().join("*.tar").display().to_string();
        let sources = Source::open_all(&spec(&[&pattern])).unwrap();
        let mut seen = Vec::new();
        let work = |source: &Source, place: SampleRef| {
            Ok(source.open(place.shard as usize)?.read(place.extent)?.key)
        };
        walk(&sources, &Silent, work, |_, found| {
            seen.push(match found {
                Found::Sample(key) => key,
                Found::BrokenShard { error: crate::Error::BrokenShard { offset, .. }, .. } => {
                    format!("broken at {offset}")
                }
                Found::BrokenShard { error, .. } | Found::UnfitWeights { error, .. } => panic!("{error}"),
            });
            Ok(())
        })
        .unwrap();
        let expected: Vec<String> = (0..3)
            .map(|n| format!("0-{n}"))
            // Whether the member before the break is its sample's last one, nobody knows.
            .chain((0..2).map(|n| format!("1-{n}")))
            .chain([format!("broken at {}", whole.len() - 2048)])
            .chain((0..50).map(|n| format!("2-{n}")))
            .collect();
        assert_eq!(seen, expected);
    }
}
