//! A source with its shards found: patterns expanded, files there, names distinct.

mod energon;

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::rng::Key;
use crate::shard::index::Index;
use crate::shard::{Scanner, Shard};
use crate::spec::{DataSpec, Length, SourceSpec};
use crate::store::{Store, is_remote};
use crate::weights::{SamplingWeights, local_bytes};

/// A source ready to be read.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    /// Where its shards are read from.
    pub(crate) store: Store,
    /// What it is made of.
    pub(crate) spec: SourceSpec,
    /// Shard paths, in the order of the patterns.
    pub(crate) shards: Vec<String>,
    /// How often it is read; `None`: endlessly.
    pub(crate) epochs: Option<u64>,
    /// Into how many parts each shard is cut, so that there is one for every stream.
    pub(crate) parts: usize,
    /// The sequence of its random draws.
    pub(crate) key: Key,
    /// With which probability each sample is read; `None`: all are.
    weights: Option<Arc<SamplingWeights>>,
    /// The order of the units in the epochs asked for last: all streams share them.
    orders: Arc<Mutex<Vec<(u64, UnitOrder)>>>,
}

/// The units of an epoch in the order in which they are dealt to the streams.
type UnitOrder = Arc<[u32]>;

/// Epochs whose order is kept. Streams are seldom further apart.
const KEPT_ORDERS: usize = 2;

impl Source {
    /// Finds the shards of all sources.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`], [`Error::Pattern`], [`Error::NoShards`], [`Error::DuplicateShard`],
    /// [`Error::SamplingWeights`].
    pub(crate) fn open_all(spec: &DataSpec) -> Result<Vec<Self>> {
        spec.validate()?;
        let store = Store::new(&spec.store)?;
        let mut sources = Vec::with_capacity(spec.sources.len());
        for source in &spec.sources {
            let shards = find_shards(&store, source)?;
            let weights = source.sampling_weights.as_deref();
            let weights = weights.map(|path| SamplingWeights::read(path, source, &shards)).transpose();
            let weights = weights.map_err(|detail| bad_weights(source, detail))?.map(Arc::new);
            sources.push(Self {
                name: source.name.clone(),
                store: store.clone(),
                spec: source.clone(),
                epochs: if let Length::Epochs(epochs) = spec.length { Some(epochs) } else { None },
                parts: spec.streams.div_ceil(shards.len()),
                shards,
                key: Key::new(spec.seed).with_name(&source.name),
                weights,
                orders: Arc::default(),
            });
        }
        Ok(sources)
    }

    /// Opens shard number `shard`.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub(crate) fn open(&self, shard: usize) -> Result<Shard> {
        let shard = Shard::open(&self.store, &self.shards[shard])?;
        Ok(shard.with_images(self.spec.images.as_deref()))
    }

    /// A scanner of shard number `shard` that goes on at the offset of sample number `ordinal`; it goes by the
    /// shard's index where a local one has one.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub(crate) fn scan(&self, shard: usize, offset: u64, ordinal: u64) -> Result<Scanner> {
        let path = &self.shards[shard];
        let opened = self.open(shard)?;
        let index = if is_remote(path) { None } else { Index::open(&self.store, path)? };
        Ok(match index {
            Some(index) => Scanner::indexed(opened, index, ordinal),
            None => opened.scan(offset, ordinal),
        })
    }

    /// Number of (shard, part) units in an epoch.
    pub(crate) fn units(&self) -> usize {
        self.shards.len() * self.parts
    }

    /// The order of the units in an epoch.
    pub(crate) fn order(&self, epoch: u64) -> UnitOrder {
        // What another thread left there when it panicked is a whole order.
        let mut kept = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = kept.iter().find(|(of, _)| *of == epoch) {
            return Arc::clone(order);
        }
        let order: UnitOrder = self.key.with_name("epoch").with(epoch).permutation(self.units()).into();
        if kept.len() == KEPT_ORDERS {
            kept.remove(0);
        }
        kept.push((epoch, Arc::clone(&order)));
        order
    }

    /// Whether sample number `ordinal` of a shard is read in this epoch: a draw of its own against its weight.
    ///
    /// # Errors
    /// [`Error::SamplingWeights`] when it has none.
    pub(crate) fn keeps(&self, epoch: u64, shard: u32, ordinal: u64) -> Result<bool> {
        let Some(weights) = &self.weights else { return Ok(true) };
        let Some(weight) = weights.of(shard, ordinal) else {
            let (path, len) = (&self.shards[shard as usize], weights.len(shard));
            let detail = format!("have {len} weights for the shard `{path}`, which has more samples");
            return Err(bad_weights(&self.spec, detail));
        };
        let draw = self.key.with_name("keep").with(epoch).with(u64::from(shard)).fraction(ordinal);
        Ok(draw < f64::from(weight))
    }

    /// Refuses weights for another number of samples than a shard was found to have.
    ///
    /// # Errors
    /// [`Error::SamplingWeights`].
    pub(crate) fn check_samples(&self, shard: u32, samples: u64) -> Result<()> {
        match &self.weights {
            Some(weights) if weights.len(shard) != samples => {
                let (path, len) = (&self.shards[shard as usize], weights.len(shard));
                let detail =
                    format!("have {len} weights for the shard `{path}`, which has {samples} samples");
                Err(bad_weights(&self.spec, detail))
            }
            _ => Ok(()),
        }
    }

    /// A number that tells this source's shards and weights from others', local shards also by their size.
    pub(crate) fn fingerprint(&self) -> u64 {
        let size = |shard: &String| local_bytes(shard).unwrap_or(0);
        let key = self.key.with(self.parts as u64);
        let key = self.weights.as_ref().map_or(key, |weights| key.with(weights.fingerprint));
        self.shards.iter().fold(key, |key, shard| key.with_name(shard).with(size(shard))).bits(0)
    }
}

fn bad_weights(source: &SourceSpec, detail: String) -> Error {
    let path = source.sampling_weights.clone().unwrap_or_default();
    Error::SamplingWeights { name: source.name.clone(), path, detail }
}

/// The shards of all patterns, none of them twice.
pub(crate) fn find_shards(store: &Store, source: &SourceSpec) -> Result<Vec<String>> {
    let mut shards: Vec<String> = Vec::new();
    for pattern in &source.shards {
        match energon::train_split(store, &source.name, pattern)? {
            Some(names) => {
                for name in names {
                    shards.extend(store.find(&source.name, &name)?);
                }
            }
            None => shards.extend(store.find(&source.name, pattern)?),
        }
    }
    let mut sorted: Vec<&String> = shards.iter().collect();
    sorted.sort();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::DuplicateShard { name: source.name.clone(), shard: pair[0].clone() }),
        None => Ok(shards),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::spec;

    fn open(patterns: &[&str]) -> Result<Vec<Source>> {
        Source::open_all(&spec(patterns))
    }

    #[test]
    fn braces_and_globs_are_expanded_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        for name in ["b-0.tar", "b-1.tar", "a-1.tar", "a-2.tar"] {
            std::fs::write(at(name), "").unwrap();
        }
        let sources = open(&[&at("b-{0..1}.tar"), &at("a-*.tar")]).unwrap();
        assert_eq!(sources[0].shards, ["b-0.tar", "b-1.tar", "a-1.tar", "a-2.tar"].map(at));
        assert_eq!(sources[0].units(), 4);

        let message = open(&[&at("b-{0..2}.tar")]).unwrap_err().to_string();
        assert!(message.contains("b-{0..2}.tar") && message.contains("b-2.tar"), "{message}");
        assert!(matches!(open(&[&at("c-*.tar")]), Err(Error::NoShards { .. })));
        assert!(matches!(open(&[&at("a-*.tar"), &at("a-1.tar")]), Err(Error::DuplicateShard { .. })));
        assert!(matches!(open(&["[.tar"]), Err(Error::Pattern { .. })));
        assert!(matches!(open(&[&at("b-{0..999999}-{0..999999}.tar")]), Err(Error::Pattern { .. })));
    }

    #[test]
    fn a_name_that_is_not_utf8_is_not_left_out_in_silence() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        for name in [&b"a.tar"[..], b"\xff.tar", b"\xff.txt"] {
            std::fs::write(dir.path().join(std::ffi::OsStr::from_bytes(name)), "").unwrap();
        }
        let at = |name: &str| dir.path().join(name).display().to_string();
        let error = open(&[&at("*.tar")]).unwrap_err().to_string();
        assert!(error.contains("not UTF-8") && error.contains("\u{fffd}.tar"), "{error}");
        assert_eq!(open(&[&at("a*")]).unwrap()[0].shards.len(), 1);
    }

    #[test]
    fn few_shards_are_cut_so_that_every_stream_has_data() {
        let dir = tempfile::tempdir().unwrap();
        for index in 0..3 {
            std::fs::write(dir.path().join(format!("{index}.tar")), "").unwrap();
        }
        let mut spec = spec(&[&dir.path().join("*.tar").display().to_string()]);
        for (streams, parts) in [(1, 1), (3, 1), (4, 2), (8, 3)] {
            spec.streams = streams;
            assert_eq!(Source::open_all(&spec).unwrap()[0].parts, parts);
        }
    }

    #[test]
    fn sources_of_the_same_shards_differ_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let shard = dir.path().join("a.tar").display().to_string();
        std::fs::write(&shard, "").unwrap();
        let mut spec = spec(&[&shard]);
        spec.sources.push(SourceSpec { name: "other".into(), ..spec.sources[0].clone() });
        let sources = Source::open_all(&spec).unwrap();
        assert_ne!(sources[0].fingerprint(), sources[1].fingerprint());
    }
}
