//! One logical stream: a sequence of packs that depends on the data, the specification and the stream's number
//! alone.
//!
//! A stream keeps `pack_buffer` samples as candidates. To make a pack it fills up the candidates, chooses,
//! decodes what was chosen, and fills the holes that samples with broken pixels leave. Work inside a step runs
//! in parallel on the threads of the current pool; its results are taken in order, so threads change nothing.

use std::sync::Arc;

use rayon::prelude::*;

use crate::draft::{Draft, Rejected};
use crate::error::{Error, Result};
use crate::mix::{Part, next_source};
use crate::order::Order;
use crate::packer::{Load, choose};
use crate::rng::Key;
use crate::sample::{Pack, Sample, SampleId};
use crate::shard::SampleRef;
use crate::source::Source;
use crate::spec::{Balance, DataSpec, Length, MixBy};
use crate::state::{SourceState, StreamState};
use crate::tally::{Rows, Tally};
use crate::text::TextEncoder;

/// Packs of more tokens are filled from candidates for two packs of so many.
const MOST_TOKENS_HELD: usize = 1 << 22;
/// Samples that are drafted before their lengths are looked at again.
const MOST_DRAFTED_AT_ONCE: usize = 256;

/// What all streams share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) spec: DataSpec,
    pub(crate) sources: Vec<Arc<Source>>,
    pub(crate) encoder: Arc<TextEncoder>,
    /// Tells the seed, the streams, the sources and their shards from others.
    pub(crate) fingerprint: u64,
}

impl Shared {
    pub(crate) fn new(spec: DataSpec, sources: Vec<Arc<Source>>, encoder: Arc<TextEncoder>) -> Self {
        let key = Key::new(spec.seed).with(spec.streams as u64);
        let fingerprint = sources.iter().fold(key, |key, source| key.with(source.fingerprint())).bits(0);
        Self { spec, sources, encoder, fingerprint }
    }

    fn draft(
        &self,
        (source, place): (usize, SampleRef),
    ) -> Result<std::result::Result<Draft, Box<Rejected>>> {
        Draft::read(&self.spec, &self.encoder, &self.sources[source], place)
    }

    /// Samples that a stream takes from the mixture.
    fn limit(&self, stream: usize) -> u64 {
        match self.spec.length {
            Length::Samples(samples) => {
                let streams = self.spec.streams as u64;
                samples / streams + u64::from((stream as u64) < samples % streams)
            }
            Length::Endless | Length::Epochs(_) => u64::MAX,
        }
    }
}

/// One logical stream.
#[derive(Debug)]
pub(crate) struct Stream {
    shared: Arc<Shared>,
    number: usize,
    fingerprint: u64,
    sources: Vec<Progress>,
    candidates: Vec<Candidate>,
}

/// One source as this stream reads it.
#[derive(Debug)]
struct Progress {
    order: Order,
    tally: Tally,
    phase: f64,
    open: bool,
}

/// A sample that waits for a pack. What a resumed stream finds waiting is drafted with its first pack.
#[derive(Debug)]
struct Candidate {
    source: usize,
    place: SampleRef,
    draft: Option<Draft>,
}

impl Stream {
    /// Stream `number`, from its beginning or from `state`. Nothing is read.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] when the state belongs to other data.
    pub(crate) fn new(shared: Arc<Shared>, number: usize, state: Option<StreamState>) -> Result<Self> {
        let fingerprint = shared.fingerprint;
        let state = match state {
            Some(state) => state.checked(&shared, number, fingerprint)?,
            None => StreamState::start(&shared, number, fingerprint),
        };
        let candidate = |(source, place)| Candidate { source, place, draft: None };
        let candidates = state.candidates.into_iter().map(candidate).collect();
        let progress = |(source, saved): (&Arc<Source>, SourceState)| Progress {
            phase: source.key.with_name("phase").fraction(number as u64),
            order: Order::new(
                Arc::clone(source),
                number,
                shared.spec.streams,
                shared.spec.shuffle_buffer,
                saved.cursor,
            ),
            tally: saved.tally,
            open: true,
        };
        let sources = shared.sources.iter().zip(state.sources).map(progress).collect();
        Ok(Self { shared, number, fingerprint, sources, candidates })
    }

    /// The next pack and the state after it; no pack when the stream has ended.
    ///
    /// # Errors
    /// Errors of the shards, and [`Error::TooManyBad`] instead of an endless search.
    pub(crate) fn next_pack(&mut self) -> Result<(Option<Pack>, StreamState)> {
        let mut undrafted = self.rows();
        let mut undecoded = self.rows();
        let mut samples: Vec<Sample> = Vec::new();
        while samples.is_empty() {
            self.fill(&mut undrafted)?;
            if self.candidates.is_empty() {
                return Ok((None, self.state()));
            }
            while !self.take(&mut samples, &mut undecoded)? {}
        }
        Ok((Some(Pack::collate(&samples)), self.state()))
    }

    fn rows(&self) -> Rows {
        Rows::new(self.sources.len(), self.shared.spec.max_error_rate)
    }

    /// Fills up the candidates, as far as there are samples.
    fn fill(&mut self, rows: &mut Rows) -> Result<()> {
        self.draft_waiting()?;
        loop {
            let places = self.next_places(self.missing())?;
            if places.is_empty() {
                break;
            }
            let shared = &self.shared;
            let drafts: Vec<_> = places.par_iter().map(|&at| shared.draft(at)).collect();
            for ((source, place), draft) in places.into_iter().zip(drafts) {
                let draft = draft?;
                let tally = &mut self.sources[source].tally;
                tally.seen += 1;
                tally.repeated += u64::from(place.epoch > 0);
                match draft {
                    Ok(draft) => {
                        tally.tokens += draft.load().tokens as u64;
                        tally.visual_tokens += draft.load().visual as u64;
                        rows.good(source);
                        self.candidates.push(Candidate { source, place, draft: Some(draft) });
                    }
                    Err(rejected) => self.reject(source, &rejected, rows)?,
                }
            }
        }
        Ok(())
    }

    /// How many more candidates are wanted: `pack_buffer` of them, and enough for two packs.
    fn missing(&self) -> usize {
        let spec = &self.shared.spec;
        let missing = spec.pack_buffer.saturating_sub(self.candidates.len());
        let drafts = self.candidates.iter().filter_map(|candidate| candidate.draft.as_ref());
        let held: usize = drafts.map(|draft| draft.load().tokens).sum();
        let wanted = spec.tokens_per_pack.min(MOST_TOKENS_HELD).saturating_mul(2);
        if self.sources.iter().all(|source| source.tally.seen == 0) {
            // How long samples are is not known yet.
            return missing;
        }
        let mean = self.mean_tokens() as usize;
        missing.max(wanted.saturating_sub(held).div_ceil(mean).min(MOST_DRAFTED_AT_ONCE))
    }

    /// Drafts the candidates of a resumed stream.
    fn draft_waiting(&mut self) -> Result<()> {
        let shared = &self.shared;
        let waiting = self.candidates.par_iter_mut().filter(|candidate| candidate.draft.is_none());
        waiting.try_for_each(|candidate| {
            let draft = shared.draft((candidate.source, candidate.place))?;
            candidate.draft = Some(draft.map_err(|rejected| {
                let Rejected { id: SampleId { shard, key, .. }, cause } = *rejected;
                let detail = format!("`{key}` of shard `{shard}` was a good sample and is not now: {cause}");
                Error::StateMismatch { detail }
            })?);
            Ok(())
        })
    }

    /// At most `wanted` next samples of the mixture, none when all sources have ended.
    fn next_places(&mut self, wanted: usize) -> Result<Vec<(usize, SampleRef)>> {
        let drawn: u64 = self.sources.iter().map(|source| source.order.cursor().draws()).sum();
        let left = self.shared.limit(self.number).saturating_sub(drawn);
        let wanted = wanted.min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut places = Vec::with_capacity(wanted);
        while places.len() < wanted {
            let parts: Vec<Part> = (0..self.sources.len()).map(|source| self.part(source)).collect();
            let Some(source) = next_source(&parts) else { break };
            let Progress { order, tally, open, .. } = &mut self.sources[source];
            match order.next_sample(&mut tally.left_out)? {
                Some(place) => places.push((source, place)),
                None => *open = false,
            }
        }
        Ok(places)
    }

    /// Tokens of a sample, over all sources, as far as is known; at least 1.
    fn mean_tokens(&self) -> f64 {
        let sum =
            |count: fn(&Tally) -> u64| self.sources.iter().map(|source| count(&source.tally)).sum::<u64>();
        (sum(|tally| tally.tokens) as f64 / sum(|tally| tally.seen).max(1) as f64).max(1.0)
    }

    /// A source's part in the mixture. Samples that were drawn and are not counted yet are expected to be as
    /// long as those before, so the mixture never waits for a draft.
    fn part(&self, source: usize) -> Part {
        let Progress { order, tally, phase, open } = &self.sources[source];
        let drawn = order.cursor().draws();
        let next = match self.shared.spec.mix_by {
            MixBy::Samples => 1.0,
            MixBy::Tokens if tally.seen == 0 => self.mean_tokens(),
            MixBy::Tokens => (tally.tokens as f64 / tally.seen as f64).max(1.0),
        };
        let given = match self.shared.spec.mix_by {
            MixBy::Samples => drawn as f64,
            MixBy::Tokens => tally.tokens as f64 + (drawn - tally.seen.min(drawn)) as f64 * next,
        };
        let weight = self.shared.spec.sources[source].weight;
        Part { weight, given, next, phase: *phase, open: *open }
    }

    /// The visual tokens that a whole pack should have.
    fn visual_target(&self) -> Option<usize> {
        let budget = self.shared.spec.tokens_per_pack;
        match self.shared.spec.balance {
            Balance::Off => None,
            Balance::Tokens(tokens) => Some(tokens),
            Balance::Mean => {
                let sum = |count: fn(&Tally) -> u64| {
                    self.sources.iter().map(|source| count(&source.tally)).sum::<u64>() as f64
                };
                let share = sum(|tally| tally.visual_tokens) / sum(|tally| tally.tokens).max(1.0);
                Some((share * budget as f64) as usize)
            }
        }
    }

    /// Moves the candidates that fit beside `samples` to them; true when no hole was left.
    fn take(&mut self, samples: &mut Vec<Sample>, rows: &mut Rows) -> Result<bool> {
        let used: usize = samples.iter().map(|sample| sample.ids.len()).sum();
        let seen: usize = samples.iter().map(|sample| sample.image_rows.len()).sum();
        let target = self.visual_target().map(|target| target.saturating_sub(seen));
        let drafts = || self.candidates.iter().filter_map(|candidate| candidate.draft.as_ref());
        let loads: Vec<Load> = drafts().map(Draft::load).collect();
        let chosen = choose(&loads, self.shared.spec.tokens_per_pack - used, target);
        let mut chosen = chosen.into_iter().peekable();
        let (mut taken, mut kept) = (Vec::new(), Vec::with_capacity(loads.len()));
        for (index, candidate) in std::mem::take(&mut self.candidates).into_iter().enumerate() {
            match candidate {
                Candidate { source, draft: Some(draft), .. } if chosen.next_if_eq(&index).is_some() => {
                    taken.push((source, draft));
                }
                waiting => kept.push(waiting),
            }
        }
        self.candidates = kept;
        let spec = &self.shared.spec.image;
        let finish = |(source, draft): (usize, Draft)| (source, draft.load(), draft.finish(spec));
        let decoded: Vec<_> = taken.into_par_iter().map(finish).collect();
        let mut whole = true;
        for (source, load, sample) in decoded {
            match sample {
                Ok(sample) => {
                    rows.good(source);
                    samples.push(sample);
                }
                Err(rejected) => {
                    whole = false;
                    // It is not given after all.
                    let tally = &mut self.sources[source].tally;
                    tally.tokens -= load.tokens as u64;
                    tally.visual_tokens -= load.visual as u64;
                    self.reject(source, &rejected, rows)?;
                }
            }
        }
        Ok(whole)
    }

    fn reject(&mut self, source: usize, rejected: &Rejected, rows: &mut Rows) -> Result<()> {
        rejected.log();
        let reason = rejected.cause.reason();
        self.sources[source].tally.skip(reason);
        rows.bad(source, &rejected.id.source, reason)
    }

    /// The state now: after the packs given so far.
    pub(crate) fn state(&self) -> StreamState {
        let sources = self.shared.sources.iter().zip(&self.sources);
        StreamState {
            stream: self.number,
            fingerprint: self.fingerprint,
            sources: sources
                .map(|(source, Progress { order, tally, .. })| SourceState {
                    name: source.name.clone(),
                    cursor: order.cursor().clone(),
                    tally: tally.clone(),
                })
                .collect(),
            candidates: self.candidates.iter().map(|candidate| (candidate.source, candidate.place)).collect(),
        }
    }
}
