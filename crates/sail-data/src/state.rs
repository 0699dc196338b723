//! Where streams stand: what a checkpoint keeps of the data.
//!
//! A state names places in shards, not contents, so restoring it costs the same wherever it lies. States of
//! all streams together are a [`Position`]; it does not know how many ranks there are.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::order::Cursor;
use crate::shard::SampleRef;
use crate::source::Source;
use crate::stream::Shared;
use crate::tally::Tally;

/// The position of a stream after a pack: everything that is needed to give the packs that follow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamState {
    pub(crate) stream: usize,
    /// Tells the seed, the streams, the sources and their shards from others.
    pub(crate) fingerprint: u64,
    pub(crate) sources: Vec<SourceState>,
    /// Samples that wait for a pack: source and place.
    pub(crate) candidates: Vec<(usize, SampleRef)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SourceState {
    pub(crate) name: String,
    pub(crate) cursor: Cursor,
    pub(crate) tally: Tally,
}

/// Where the data stands between two steps: the states of streams, and whose turn is next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// The stream that the next pack comes from: g mod S after g packs.
    pub next_stream: usize,
    /// In ascending order; a rank's position holds those of its own streams.
    pub streams: Vec<StreamState>,
}

impl Position {
    /// The position of all ranks together.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] when they do not stand at the same step or share a stream.
    pub fn merge(ranks: Vec<Self>) -> Result<Self> {
        let mismatch = |detail: String| Err(Error::StateMismatch { detail });
        let next_stream = ranks.first().map_or(0, |position| position.next_stream);
        if let Some(other) = ranks.iter().find(|position| position.next_stream != next_stream) {
            let other = other.next_stream;
            return mismatch(format!("one rank goes on with stream {next_stream}, another with {other}"));
        }
        let mut streams: Vec<StreamState> = ranks.into_iter().flat_map(|position| position.streams).collect();
        streams.sort_by_key(|state| state.stream);
        match streams.windows(2).find(|pair| pair[0].stream == pair[1].stream) {
            Some(pair) => mismatch(format!("two ranks have stream {}", pair[0].stream)),
            None => Ok(Self { next_stream, streams }),
        }
    }
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

    pub(crate) fn start(shared: &Shared, stream: usize, fingerprint: u64) -> Self {
        let fresh = |source: &Arc<Source>| SourceState {
            name: source.name.clone(),
            cursor: Cursor::default(),
            tally: Tally::default(),
        };
        let sources = shared.sources.iter().map(fresh).collect();
        Self { stream, fingerprint, sources, candidates: Vec::new() }
    }

    pub(crate) fn checked(self, shared: &Shared, number: usize, fingerprint: u64) -> Result<Self> {
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
            return mismatch(
                "the seed, the number of streams, the list of shards, the size of one or the sampling weights have changed".into(),
            );
        }
        let buffered =
            self.sources.iter().enumerate().flat_map(|(source, saved)| {
                saved.cursor.buffered().iter().map(move |&place| (source, place))
            });
        let unknown = self.candidates.iter().copied().chain(buffered).find(|(source, place)| {
            shared.sources.get(*source).is_none_or(|source| place.shard as usize >= source.shards.len())
        });
        match unknown {
            Some(candidate) => mismatch(format!("it refers to {candidate:?}, which does not exist")),
            None => Ok(self),
        }
    }
}
