//! The packs of all streams in turn, prepared ahead on threads.
//!
//! At most one pack per stream is in preparation, and each is given out in turn, so order and content do not
//! depend on how many threads there are or which is faster.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};
use crate::sample::Pack;
use crate::source::Source;
use crate::spec::DataSpec;
use crate::stream::{Shared, Stream, StreamState};
use crate::tally::Tally;
use crate::text::TextEncoder;

/// A pack, its stream, and the stream's state after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The pack.
    pub pack: Pack,
    /// The stream it comes from.
    pub stream: usize,
    /// The stream's state after it.
    pub state: StreamState,
}

/// Endless packs: pack g comes from stream g mod S.
#[derive(Debug)]
pub struct Loader {
    pool: ThreadPool,
    shared: Arc<Shared>,
    /// Streams that are not at work, by number.
    idle: Vec<Option<Stream>>,
    /// Packs in preparation, in the order in which they are given out.
    ahead: VecDeque<Pending>,
    /// How many packs may be in preparation.
    depth: usize,
    /// The stream whose pack is to be prepared next.
    next_stream: usize,
    /// Every stream's state after the packs given out so far.
    states: Vec<StreamState>,
    /// The stream whose pack is given out next.
    first: usize,
    stopped: bool,
}

#[derive(Debug)]
struct Pending {
    number: usize,
    result: Receiver<Prepared>,
}

struct Prepared {
    stream: Stream,
    result: Result<(Pack, StreamState)>,
}

impl Loader {
    /// Opens the sources and starts to prepare packs on `threads` threads.
    ///
    /// `states` resumes every stream (one state each, in order); `None` begins at the beginning.
    /// `next_stream` is the stream of the first pack: g mod S for a run that has taken g packs.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`], errors of the shard patterns and shards, [`Error::StateMismatch`],
    /// [`Error::Threads`].
    pub fn new(
        spec: &DataSpec,
        encoder: Arc<TextEncoder>,
        states: Option<Vec<StreamState>>,
        next_stream: usize,
        threads: usize,
    ) -> Result<Self> {
        let sources: Vec<Arc<Source>> = Source::open_all(spec)?.into_iter().map(Arc::new).collect();
        for (field, found, limit) in
            [("threads", threads, usize::MAX), ("next_stream", next_stream + 1, spec.streams)]
        {
            if found == 0 || found > limit {
                let found = format!("{found}, with {} streams", spec.streams);
                let expected = "at least one thread and an existing stream";
                return Err(Error::InvalidSpec { field: field.into(), found, expected });
            }
        }
        let shared = Arc::new(Shared { spec: spec.clone(), sources, encoder });
        let states = spread_states(states, spec.streams)?;
        let pool = start_pool(threads)?;
        let idle = pool.install(|| {
            let open = |(number, state)| Stream::new(Arc::clone(&shared), number, state).map(Some);
            states.into_iter().enumerate().map(open).collect::<Result<Vec<_>>>()
        })?;
        let states = idle.iter().flatten().map(Stream::state).collect();
        let depth = spec.streams.min(threads + 1);
        let ahead = VecDeque::with_capacity(depth);
        let mut loader = Self {
            pool,
            shared,
            idle,
            ahead,
            depth,
            next_stream,
            states,
            first: next_stream,
            stopped: false,
        };
        loader.prepare_ahead();
        Ok(loader)
    }

    /// The next pack. After an error the loader gives nothing more.
    ///
    /// # Errors
    /// Errors of the shards, [`Error::TooManyBad`], [`Error::WorkerPanicked`], [`Error::Stopped`].
    pub fn next_pack(&mut self) -> Result<Loaded> {
        let Some(pending) = self.ahead.pop_front().filter(|_| !self.stopped) else {
            return Err(Error::Stopped);
        };
        let loaded = self.finish(&pending);
        if loaded.is_ok() {
            self.prepare_ahead();
        } else {
            self.stopped = true;
        }
        loaded
    }

    /// Every stream's state after the packs given out, and the stream of the next one: what
    /// [`Loader::new`] takes to go on from here.
    pub fn position(&self) -> (Vec<StreamState>, usize) {
        (self.states.clone(), self.first)
    }

    /// Samples skipped so far, by source and reason, in the packs given out.
    pub fn skipped(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        self.tallies().into_iter().map(|(name, tally)| (name, tally.skipped)).collect()
    }

    /// Samples seen and skipped so far, by source, over all streams.
    pub fn tallies(&self) -> BTreeMap<String, Tally> {
        let sources = self.shared.sources.iter().enumerate();
        sources.map(|(index, source)| (source.name.clone(), self.source_tally(index))).collect()
    }

    fn source_tally(&self, source: usize) -> Tally {
        let mut sum = Tally::default();
        for (_, tally) in self.states.iter().filter_map(|state| state.tallies().nth(source)) {
            sum.add(tally);
        }
        sum
    }

    /// Waits for a pack and judges the sources by the counts after it.
    fn finish(&mut self, pending: &Pending) -> Result<Loaded> {
        let stream = pending.number;
        let prepared = pending.result.recv().map_err(|_| Error::WorkerPanicked { stream })?;
        self.idle[stream] = Some(prepared.stream);
        let (pack, state) = prepared.result?;
        self.states[stream] = state.clone();
        self.first = (stream + 1) % self.states.len();
        for (index, source) in self.shared.sources.iter().enumerate() {
            self.source_tally(index).check(&source.name, self.shared.spec.max_error_rate)?;
        }
        Ok(Loaded { pack, stream, state })
    }

    fn prepare_ahead(&mut self) {
        while self.ahead.len() < self.depth {
            let number = self.next_stream;
            // With at most S packs ahead, the next stream is never at work.
            let Some(mut stream) = self.idle[number].take() else { return };
            let (sender, result) = sync_channel(1);
            self.pool.spawn(move || {
                let result = stream.next_pack();
                // The loader may have been dropped meanwhile; then nobody waits for this pack.
                drop(sender.send(Prepared { stream, result }));
            });
            self.ahead.push_back(Pending { number, result });
            self.next_stream = (number + 1) % self.idle.len();
        }
    }
}

fn spread_states(states: Option<Vec<StreamState>>, streams: usize) -> Result<Vec<Option<StreamState>>> {
    match states {
        None => Ok((0..streams).map(|_| None).collect()),
        Some(states) if states.len() == streams => Ok(states.into_iter().map(Some).collect()),
        Some(states) => Err(Error::StateMismatch {
            detail: format!("it was saved with {} streams, now there are {streams}", states.len()),
        }),
    }
}

fn start_pool(threads: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("sail-data-{index}"))
        // The panic message is printed by the hook; the lost sender tells the loader.
        .panic_handler(|_| tracing::error!("a data worker panicked"))
        .build()
        .map_err(|error| Error::Threads { threads, detail: error.to_string() })
}
