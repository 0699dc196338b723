//! The packs of all streams in turn, prepared ahead on threads.
//!
//! At most one pack per stream is in preparation, and each is given out in turn, so order and content do not
//! depend on how many threads there are or which is faster. Streams belong to ranks, never samples, so they do
//! not depend on the number of ranks either.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};
use crate::sample::Pack;
use crate::source::Source;
use crate::spec::DataSpec;
use crate::state::{Position, StreamState};
use crate::stream::{Shared, Stream};
use crate::tally::Tally;
use crate::text::TextEncoder;

/// The turn of one stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Its pack; `None` when the stream has ended, which leaves its turn empty.
    pub pack: Option<Pack>,
    /// The stream.
    pub stream: usize,
    /// The stream's state after it.
    pub state: StreamState,
}

/// Which part of the packs is read here, and with how many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Threads that prepare packs.
    pub threads: usize,
    /// This process, of `world`.
    pub rank: usize,
    /// Processes that share the packs; divides the number of streams.
    pub world: usize,
}

impl LoaderOptions {
    /// All packs, with this many threads.
    pub fn alone(threads: usize) -> Self {
        Self { threads, rank: 0, world: 1 }
    }
}

/// The packs of the streams in turn: pack g comes from stream g mod S, and goes to rank g mod W.
#[derive(Debug)]
pub struct Loader {
    pool: Arc<ThreadPool>,
    shared: Arc<Shared>,
    options: LoaderOptions,
    /// This rank's streams that are not at work; stream s is at s / W.
    idle: Vec<Option<Stream>>,
    /// Packs in preparation, in the order in which they are given out.
    ahead: VecDeque<Pending>,
    /// How many packs may be in preparation.
    depth: usize,
    /// Which of this rank's streams is to be prepared next.
    preparing: usize,
    /// This rank's streams after the packs given out so far.
    states: Vec<StreamState>,
    /// Which of them have ended.
    ended: Vec<bool>,
    /// Which of this rank's streams gives the next pack.
    first: usize,
    stopped: bool,
}

#[derive(Debug)]
struct Pending {
    /// Which of this rank's streams.
    index: usize,
    result: Receiver<Prepared>,
}

struct Prepared {
    stream: Stream,
    result: Result<(Option<Pack>, StreamState)>,
}

impl Loader {
    /// Opens the sources and starts to prepare packs.
    ///
    /// `position` resumes: it holds the states of at least this rank's streams. Nothing is read for it.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`], errors of the shard patterns and shards, [`Error::StateMismatch`],
    /// [`Error::Threads`].
    pub fn new(
        spec: &DataSpec,
        encoder: Arc<TextEncoder>,
        options: LoaderOptions,
        position: Option<Position>,
    ) -> Result<Self> {
        let sources: Vec<Arc<Source>> = Source::open_all(spec)?.into_iter().map(Arc::new).collect();
        check_options(options, spec.streams)?;
        let shared = Arc::new(Shared::new(spec.clone(), sources, encoder));
        Self::at(shared, Arc::new(start_pool(options.threads)?), options, position)
    }

    /// Goes on from another position of the same sources, which need not be looked for again.
    ///
    /// # Errors
    /// As [`Loader::new`] with a position.
    pub fn go_to(&mut self, position: Position) -> Result<()> {
        let (shared, pool) = (Arc::clone(&self.shared), Arc::clone(&self.pool));
        // Packs in preparation are made to their end, and nobody waits for them.
        *self = Self::at(shared, pool, self.options, Some(position))?;
        Ok(())
    }

    fn at(
        shared: Arc<Shared>,
        pool: Arc<ThreadPool>,
        options: LoaderOptions,
        position: Option<Position>,
    ) -> Result<Self> {
        let LoaderOptions { threads, rank, world } = options;
        let (states, first) = own_states(position, shared.spec.streams, options)?;
        let open = |(index, state)| Stream::new(Arc::clone(&shared), rank + index * world, state).map(Some);
        let idle = states.into_iter().enumerate().map(open).collect::<Result<Vec<_>>>()?;
        let states: Vec<StreamState> = idle.iter().flatten().map(Stream::state).collect();
        let depth = states.len().min(threads + 1);
        let mut loader = Self {
            pool,
            shared,
            options,
            idle,
            ahead: VecDeque::with_capacity(depth),
            depth,
            preparing: first,
            ended: vec![false; states.len()],
            states,
            first,
            stopped: false,
        };
        loader.prepare_ahead();
        Ok(loader)
    }

    /// The next turn of this rank's streams. After an error the loader gives nothing more.
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

    /// Whether all of this rank's streams have ended, as far as their turns have shown.
    pub fn has_ended(&self) -> bool {
        self.ended.iter().all(|&ended| ended)
    }

    /// Where this rank's streams stand after the packs given out: what [`Loader::new`] takes to go on from
    /// here. Those of all ranks go into [`Position::merge`].
    pub fn position(&self) -> Position {
        let next_stream = self.first * self.options.world;
        Position { next_stream, streams: self.states.clone() }
    }

    /// Samples seen, repeated and skipped so far, by source, over this rank's streams.
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
        let index = pending.index;
        let stream = self.options.rank + index * self.options.world;
        let prepared = pending.result.recv().map_err(|_| Error::WorkerPanicked { stream })?;
        self.idle[index] = Some(prepared.stream);
        let (pack, state) = prepared.result?;
        self.states[index] = state.clone();
        self.ended[index] = pack.is_none();
        self.first = (index + 1) % self.states.len();
        for (source, spec) in self.shared.spec.sources.iter().enumerate() {
            self.source_tally(source).check(&spec.name, self.shared.spec.max_error_rate)?;
        }
        Ok(Loaded { pack, stream, state })
    }

    fn prepare_ahead(&mut self) {
        while self.ahead.len() < self.depth {
            let index = self.preparing;
            // With at most as many packs ahead as there are streams, the next stream is never at work.
            let Some(mut stream) = self.idle[index].take() else { return };
            let (sender, result) = sync_channel(1);
            self.pool.spawn(move || {
                let result = stream.next_pack();
                // The loader may have been dropped meanwhile; then nobody waits for this pack.
                drop(sender.send(Prepared { stream, result }));
            });
            self.ahead.push_back(Pending { index, result });
            self.preparing = (index + 1) % self.idle.len();
        }
    }
}

fn check_options(options: LoaderOptions, streams: usize) -> Result<()> {
    let LoaderOptions { threads, rank, world } = options;
    let invalid = |field: &str, found: String, expected| {
        Err(Error::InvalidSpec { field: field.into(), found, expected })
    };
    if threads == 0 {
        return invalid("threads", "0".into(), "at least one thread");
    }
    if world == 0 || !streams.is_multiple_of(world) {
        let found = format!("{streams}, for {world} ranks");
        return invalid("streams", found, "a multiple of the number of ranks");
    }
    if rank >= world {
        return invalid("rank", format!("{rank}, of {world}"), "a number below that of the ranks");
    }
    Ok(())
}

/// The states of a rank's streams, and which of them is next.
fn own_states(
    position: Option<Position>,
    streams: usize,
    options: LoaderOptions,
) -> Result<(Vec<Option<StreamState>>, usize)> {
    let LoaderOptions { rank, world, .. } = options;
    let mismatch = |detail: String| Err(Error::StateMismatch { detail });
    let Some(Position { next_stream, streams: saved }) = position else {
        return Ok((vec![None; streams / world], 0));
    };
    if next_stream >= streams || !next_stream.is_multiple_of(world) {
        return mismatch(format!(
            "it goes on with stream {next_stream}, of {streams}, where {world} ranks cannot begin a step"
        ));
    }
    if let Some(other) = saved.iter().map(StreamState::stream).find(|&stream| stream >= streams) {
        return mismatch(format!("it has a stream {other}, now there are {streams}"));
    }
    let mut own = vec![None; streams / world];
    for state in saved {
        let (index, owner) = (state.stream() / world, state.stream() % world);
        if owner == rank {
            own[index] = Some(state);
        }
    }
    match own.iter().position(Option::is_none) {
        Some(missing) => mismatch(format!("it lacks stream {}, of {streams}", rank + missing * world)),
        None => Ok((own, next_stream / world)),
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
