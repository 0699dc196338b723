//! One logical stream: an endless sequence of packs that depends on the data, the specification and the
//! stream's number alone.
//!
//! A stream keeps `pack_buffer` drafts as candidates. To make a pack it fills up the candidates, chooses,
//! decodes what was chosen, and fills the holes that samples with broken pixels leave. Work inside a step runs
//! in parallel on the threads of the current pool; its results are taken in order, so threads change nothing.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::draft::{Draft, Rejected};
use crate::error::{Error, Result};
use crate::order::{Cursor, Order};
use crate::packer::choose;
use crate::rng::Key;
use crate::sample::{Pack, Sample, SampleId};
use crate::shard::SampleRef;
use crate::source::Source;
use crate::spec::DataSpec;
use crate::tally::{Rows, Tally};
use crate::text::TextEncoder;

/// The position of a stream after a pack: everything that is needed to give the packs that follow.
///
/// It names places in shards, not contents, and restoring it reads the candidates again and nothing else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamState {
    stream: usize,
    /// Tells the seed, the streams, the sources and their shards from others.
    fingerprint: u64,
    /// Samples taken from the mixture so far.
    mixed: u64,
    sources: Vec<SourceState>,
    /// Samples that wait for a pack: source and place.
    candidates: Vec<(usize, SampleRef)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SourceState {
    name: String,
    cursor: Cursor,
    tally: Tally,
}

impl StreamState {
    /// The stream's number.
    pub fn stream(&self) -> usize {
        self.stream
    }

    /// How many samples wait for a pack.
    pub fn waiting(&self) -> usize {
        self.candidates.len()
    }

    /// The counts of each source in this stream, in the order of the specification.
    pub fn tallies(&self) -> impl Iterator<Item = (&str, &Tally)> {
        self.sources.iter().map(|source| (source.name.as_str(), &source.tally))
    }
}

/// What all streams share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) spec: DataSpec,
    pub(crate) sources: Vec<Arc<Source>>,
    pub(crate) encoder: Arc<TextEncoder>,
}

impl Shared {
    fn draft(
        &self,
        (source, place): (usize, SampleRef),
    ) -> Result<std::result::Result<Draft, Box<Rejected>>> {
        Draft::read(&self.spec, &self.encoder, &self.sources[source], place)
    }

    fn fingerprint(&self) -> u64 {
        let key = Key::new(self.spec.seed).with(self.spec.streams as u64);
        self.sources.iter().fold(key, |key, source| key.with(source.fingerprint())).bits(0)
    }
}

/// One logical stream.
#[derive(Debug)]
pub(crate) struct Stream {
    shared: Arc<Shared>,
    number: usize,
    fingerprint: u64,
    mix: Key,
    mixed: u64,
    orders: Vec<Order>,
    tallies: Vec<Tally>,
    candidates: Vec<Candidate>,
}

#[derive(Debug)]
struct Candidate {
    source: usize,
    place: SampleRef,
    draft: Draft,
}

impl Stream {
    /// Stream `number`, from its beginning or from `state`.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] when the state belongs to other data; errors of the shards.
    pub(crate) fn new(shared: Arc<Shared>, number: usize, state: Option<StreamState>) -> Result<Self> {
        let fingerprint = shared.fingerprint();
        let state = match state {
            Some(state) => state.checked(&shared, number, fingerprint)?,
            None => StreamState::start(&shared, number, fingerprint),
        };
        let drafts = state.candidates.par_iter().map(|&at| shared.draft(at)).collect::<Result<Vec<_>>>()?;
        let mut candidates = Vec::with_capacity(drafts.len());
        for ((source, place), draft) in state.candidates.into_iter().zip(drafts) {
            let draft = draft.map_err(|rejected| {
                let Rejected { id: SampleId { shard, key, .. }, cause } = *rejected;
                let detail = format!("`{key}` of shard `{shard}` was a good sample and is not now: {cause}");
                Error::StateMismatch { detail }
            })?;
            candidates.push(Candidate { source, place, draft });
        }
        let mut orders = Vec::with_capacity(state.sources.len());
        let mut tallies = Vec::with_capacity(state.sources.len());
        for (source, saved) in shared.sources.iter().zip(state.sources) {
            let (streams, capacity) = (shared.spec.streams, shared.spec.shuffle_buffer);
            orders.push(Order::new(Arc::clone(source), number, streams, capacity, saved.cursor));
            tallies.push(saved.tally);
        }
        let mix = Key::new(shared.spec.seed).with_name("mix").with(number as u64);
        Ok(Self { number, fingerprint, mix, mixed: state.mixed, orders, tallies, candidates, shared })
    }

    /// The next pack and the state after it.
    ///
    /// # Errors
    /// Errors of the shards, and [`Error::TooManyBad`] instead of an endless search.
    pub(crate) fn next_pack(&mut self) -> Result<(Pack, StreamState)> {
        let budget = self.shared.spec.tokens_per_pack;
        let mut undrafted = self.rows();
        let mut undecoded = self.rows();
        let mut samples: Vec<Sample> = Vec::new();
        while samples.is_empty() {
            self.fill(&mut undrafted)?;
            loop {
                let used: usize = samples.iter().map(|sample| sample.ids.len()).sum();
                if self.take(budget - used, &mut samples, &mut undecoded)? {
                    break;
                }
            }
        }
        Ok((Pack::collate(&samples), self.state()))
    }

    fn rows(&self) -> Rows {
        Rows::new(self.orders.len(), self.shared.spec.max_error_rate)
    }

    /// Fills up the candidates.
    fn fill(&mut self, rows: &mut Rows) -> Result<()> {
        let wanted = self.shared.spec.pack_buffer;
        while self.candidates.len() < wanted {
            let mut places = Vec::with_capacity(wanted - self.candidates.len());
            while places.len() + self.candidates.len() < wanted {
                places.push(self.next_place()?);
            }
            let shared = &self.shared;
            let drafts: Vec<_> = places.par_iter().map(|&at| shared.draft(at)).collect();
            for ((source, place), draft) in places.into_iter().zip(drafts) {
                self.tallies[source].seen += 1;
                match draft? {
                    Ok(draft) => {
                        rows.good(source);
                        self.candidates.push(Candidate { source, place, draft });
                    }
                    Err(rejected) => self.reject(source, &rejected, rows)?,
                }
            }
        }
        Ok(())
    }

    /// The next sample of the mixture.
    fn next_place(&mut self) -> Result<(usize, SampleRef)> {
        let draw = self.mix.fraction(self.mixed);
        let source = self.shared.sources.partition_point(|source| source.share_end <= draw);
        let place = self.orders[source].next_sample()?;
        self.mixed += 1;
        Ok((source, place))
    }

    /// Moves the candidates that fit into `budget` tokens to `samples`; true when no hole was left.
    fn take(&mut self, budget: usize, samples: &mut Vec<Sample>, rows: &mut Rows) -> Result<bool> {
        let lengths: Vec<usize> = self.candidates.iter().map(|candidate| candidate.draft.tokens()).collect();
        let mut chosen = choose(&lengths, budget).into_iter().peekable();
        let (mut taken, mut kept) = (Vec::new(), Vec::with_capacity(lengths.len()));
        for (index, candidate) in std::mem::take(&mut self.candidates).into_iter().enumerate() {
            if chosen.next_if_eq(&index).is_some() {
                taken.push((candidate.source, candidate.draft));
            } else {
                kept.push(candidate);
            }
        }
        self.candidates = kept;
        let spec = &self.shared.spec.image;
        let decoded: Vec<_> =
            taken.into_par_iter().map(|(source, draft)| (source, draft.finish(spec))).collect();
        let mut whole = true;
        for (source, sample) in decoded {
            match sample {
                Ok(sample) => {
                    rows.good(source);
                    samples.push(sample);
                }
                Err(rejected) => {
                    whole = false;
                    self.reject(source, &rejected, rows)?;
                }
            }
        }
        Ok(whole)
    }

    fn reject(&mut self, source: usize, rejected: &Rejected, rows: &mut Rows) -> Result<()> {
        rejected.log();
        let reason = rejected.cause.reason();
        self.tallies[source].skip(reason);
        rows.bad(source, &rejected.id.source, reason)
    }

    /// The state now: after the packs given so far.
    pub(crate) fn state(&self) -> StreamState {
        let sources = self.shared.sources.iter().zip(&self.orders).zip(&self.tallies);
        StreamState {
            stream: self.number,
            fingerprint: self.fingerprint,
            mixed: self.mixed,
            sources: sources
                .map(|((source, order), tally)| SourceState {
                    name: source.name.clone(),
                    cursor: order.cursor().clone(),
                    tally: tally.clone(),
                })
                .collect(),
            candidates: self.candidates.iter().map(|candidate| (candidate.source, candidate.place)).collect(),
        }
    }
}

impl StreamState {
    fn start(shared: &Shared, stream: usize, fingerprint: u64) -> Self {
        let fresh = |source: &Arc<Source>| SourceState {
            name: source.name.clone(),
            cursor: Cursor::default(),
            tally: Tally::default(),
        };
        let sources = shared.sources.iter().map(fresh).collect();
        Self { stream, fingerprint, mixed: 0, sources, candidates: Vec::new() }
    }

    fn checked(self, shared: &Shared, number: usize, fingerprint: u64) -> Result<Self> {
        let mismatch = |detail: String| Err(Error::StateMismatch { detail });
        let saved: Vec<&str> = self.sources.iter().map(|source| source.name.as_str()).collect();
        let configured: Vec<&str> = shared.sources.iter().map(|source| source.name.as_str()).collect();
        if saved != configured {
            return mismatch(format!(
                "it was saved with the sources {saved:?}, now there are {configured:?}"
            ));
        }
        if self.stream != number {
            return mismatch(format!("the state of stream {} was given for stream {number}", self.stream));
        }
        if self.fingerprint != fingerprint {
            return mismatch("the seed, the number of streams or the list of shards has changed".into());
        }
        let unknown = self.candidates.iter().find(|(source, place)| {
            shared.sources.get(*source).is_none_or(|source| place.shard as usize >= source.shards.len())
        });
        match unknown {
            Some(candidate) => mismatch(format!("it refers to {candidate:?}, which does not exist")),
            None => Ok(self),
        }
    }
}
