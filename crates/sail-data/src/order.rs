//! The order in which one stream reads one source.
//!
//! An epoch of a source is a seeded permutation of its (shard, part) units; part p of P holds the samples
//! whose number in the shard is p modulo P. The permutations of all epochs, laid end to end, are dealt to the
//! S streams in turn: stream s reads the units at places s, s + S, s + 2S, ... Each epoch's units are thus
//! read exactly once across the streams, and in the long run every stream reads as many.
//!
//! Inside an epoch a bounded buffer shuffles the samples of a stream. It is drained before the next epoch
//! begins, so a stream never mixes epochs. All state is a few numbers and the buffered references; nothing
//! here reads a payload.
//!
//! A sample with a sampling weight is passed over unless a draw of the source's, by epoch, shard and number, is
//! below it. Positions are those of the shards' samples all the same.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::rng::Key;
use crate::shard::{SampleRef, Scanner};
use crate::source::Source;

/// Position of one stream in one source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cursor {
    /// Units that this stream has finished.
    units: u64,
    /// Where it stands in the unit after those.
    at: Option<InUnit>,
    /// The epoch of the buffered samples.
    epoch: u64,
    /// Samples waiting to be drawn.
    buffer: Vec<SampleRef>,
    /// Samples drawn so far.
    draws: u64,
}

impl Cursor {
    /// The samples that wait to be drawn.
    pub(crate) fn buffered(&self) -> &[SampleRef] {
        &self.buffer
    }

    /// Samples drawn so far.
    pub(crate) fn draws(&self) -> u64 {
        self.draws
    }
}

/// Position inside a shard.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct InUnit {
    offset: u64,
    /// Number of the next sample in the shard.
    ordinal: u64,
}

/// The endless sequence of one stream's samples of one source.
#[derive(Debug)]
pub(crate) struct Order {
    source: Arc<Source>,
    stream: usize,
    streams: usize,
    capacity: usize,
    /// The key of the buffer's draws.
    draw_key: Key,
    cursor: Cursor,
    scanner: Option<OpenUnit>,
}

#[derive(Debug)]
struct OpenUnit {
    shard: u32,
    scanner: Scanner,
    part: u64,
}

/// A (shard, part) unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unit {
    shard: u32,
    part: u64,
}

impl Order {
    /// The order of `stream` among `streams`, from `cursor` on.
    pub(crate) fn new(
        source: Arc<Source>,
        stream: usize,
        streams: usize,
        capacity: usize,
        cursor: Cursor,
    ) -> Self {
        let draw_key = source.key.with_name("draw").with(stream as u64);
        Self { source, stream, streams, capacity, draw_key, cursor, scanner: None }
    }

    /// The position after the last sample.
    pub(crate) fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// The next sample; `None` when the last epoch is over. `left_out` counts those that their weight leaves out.
    ///
    /// # Errors
    /// [`Error::BrokenShard`], [`Error::Io`], [`Error::SamplingWeights`] for another number of weights than samples,
    /// and [`Error::EmptySource`] instead of an endless search.
    pub(crate) fn next_sample(&mut self, left_out: &mut u64) -> Result<Option<SampleRef>> {
        self.fill(left_out)?;
        if self.cursor.buffer.is_empty() {
            return Ok(None);
        }
        let drawn = self.draw_key.below(self.cursor.draws, self.cursor.buffer.len());
        self.cursor.draws += 1;
        Ok(Some(self.cursor.buffer.swap_remove(drawn)))
    }

    /// Fills the buffer from the current epoch; begins the next one only when it is empty.
    fn fill(&mut self, left_out: &mut u64) -> Result<()> {
        let mut empty_units = 0;
        while self.cursor.buffer.len() < self.capacity {
            let (epoch, place) = self.place();
            if self.source.epochs.is_some_and(|epochs| epoch >= epochs) {
                break;
            }
            if epoch != self.cursor.epoch {
                if !self.cursor.buffer.is_empty() {
                    break;
                }
                self.cursor.epoch = epoch;
            }
            if let Some(sample) = self.next_of_unit(epoch, place, left_out)? {
                self.cursor.buffer.push(sample);
            } else {
                self.cursor.units += 1;
                empty_units += 1;
                if self.cursor.buffer.is_empty() && empty_units > self.source.units() {
                    self.check_not_empty()?;
                    empty_units = 0;
                }
            }
        }
        Ok(())
    }

    /// The epoch of the current unit and its place in that epoch's permutation.
    fn place(&self) -> (u64, usize) {
        let place = self.stream as u64 + self.cursor.units * self.streams as u64;
        let units = self.source.units() as u64;
        (place / units, (place % units) as usize)
    }

    fn unit(&self, epoch: u64, place: usize) -> Unit {
        let number = self.source.order(epoch)[place];
        let parts = self.source.parts as u32;
        Unit { shard: number / parts, part: u64::from(number % parts) }
    }

    /// The next sample of the current unit, `None` at its end.
    fn next_of_unit(&mut self, epoch: u64, place: usize, left_out: &mut u64) -> Result<Option<SampleRef>> {
        let mut open = if let Some(open) = self.scanner.take() {
            open
        } else {
            let unit = self.unit(epoch, place);
            let at = self.cursor.at.unwrap_or(InUnit { offset: 0, ordinal: 0 });
            let scanner = self.source.scan(unit.shard as usize, at.offset, at.ordinal)?;
            OpenUnit { shard: unit.shard, part: unit.part, scanner }
        };
        let parts = self.source.parts as u64;
        loop {
            let number = open.scanner.ordinal();
            let ours = number % parts == open.part;
            match open.scanner.next_sample()? {
                Some(_) if ours && !self.source.keeps(epoch, open.shard, number)? => *left_out += 1,
                Some(extent) if ours => {
                    let sample = SampleRef { shard: open.shard, epoch: epoch as u32, extent };
                    let (offset, ordinal) = (open.scanner.offset(), open.scanner.ordinal());
                    self.cursor.at = Some(InUnit { offset, ordinal });
                    self.scanner = Some(open);
                    return Ok(Some(sample));
                }
                Some(_) => {}
                None => {
                    self.source.check_samples(open.shard, number)?;
                    self.cursor.at = None;
                    return Ok(None);
                }
            }
        }
    }

    fn check_not_empty(&self) -> Result<()> {
        for shard in 0..self.source.shards.len() {
            if self.source.open(shard)?.has_samples()? {
                return Ok(());
            }
        }
        Err(Error::EmptySource { name: self.source.name.clone(), shards: self.source.shards.len() })
    }
}
