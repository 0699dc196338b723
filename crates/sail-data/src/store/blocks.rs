//! Blocks of remote shards in memory: each is fetched once, for whoever waits for it, and kept for a while.
//!
//! A sequential reader, recognised by having the previous block here, gets the next ones ahead of time. The
//! samples of a shard are read at random soon after their headers were walked over, so most are served from
//! the blocks of that walk; a sample that is not here any more is fetched alone, not with its whole block.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

use bytes::Bytes;

use super::lock;
use super::runtime::{runtime, wait_for};
use super::transfer::Remote;
use crate::error::{Error, Result};

/// Blocks in one stretch of reading ahead.
const BLOCKS_AHEAD: u64 = 4;
const BLOCK_BYTES: Range<u64> = 64 << 10..4 << 20;
/// Readers for whose reading ahead there is memory.
const READERS: u64 = 16;
const LEAST_BUDGET_BYTES: u64 = 64 << 20;

/// The blocks of all remote shards of one store.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) block_bytes: u64,
    most_ahead: u64,
    budget_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By shard and number in it.
    slots: BTreeMap<(u64, u64), Slot>,
    bytes: u64,
    clock: u64,
    shards_so_far: u64,
    shards_open: u64,
}

#[derive(Debug)]
struct Slot {
    flight: Arc<Flight>,
    bytes: u64,
    last_used: u64,
}

type Landing = std::result::Result<Bytes, Arc<Error>>;

/// A block on its way, and those who wait for it.
#[derive(Debug, Default)]
struct Flight {
    landed: Mutex<Option<Landing>>,
    arrived: Condvar,
}

impl Flight {
    fn wait(&self) -> std::io::Result<Bytes> {
        let mut landed = lock(&self.landed);
        loop {
            if let Some(result) = landed.as_ref() {
                return result.clone().map_err(std::io::Error::other);
            }
            landed = self.arrived.wait(landed).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn land(&self, result: Landing) {
        lock(&self.landed).get_or_insert(result);
        self.arrived.notify_all();
    }
}

/// A remote shard read through the blocks; they go when it does.
#[derive(Debug)]
pub(super) struct RemoteContent {
    remote: Arc<Remote>,
    id: u64,
    blocks: Arc<Blocks>,
}

impl Blocks {
    pub(super) fn new(read_ahead_bytes: u64) -> Self {
        let block_bytes = (read_ahead_bytes / BLOCKS_AHEAD).clamp(BLOCK_BYTES.start, BLOCK_BYTES.end);
        Self {
            block_bytes,
            most_ahead: read_ahead_bytes.div_ceil(block_bytes),
            budget_bytes: read_ahead_bytes.saturating_mul(READERS).max(LEAST_BUDGET_BYTES),
            state: Mutex::default(),
        }
    }

    /// Begins to serve a shard whose first block is here already.
    pub(super) fn admit(self: &Arc<Self>, remote: Remote, first: Bytes) -> RemoteContent {
        let mut state = lock(&self.state);
        state.shards_so_far += 1;
        state.shards_open += 1;
        let id = state.shards_so_far;
        let slot = state.insert((id, 0), first.len() as u64);
        slot.land(Ok(first));
        state.shrink(self.budget_bytes, (id, 0));
        RemoteContent { remote: Arc::new(remote), id, blocks: Arc::clone(self) }
    }

    #[cfg(test)]
    pub(super) fn limit(&mut self, budget_bytes: u64) {
        self.budget_bytes = budget_bytes;
    }

    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// How far a reader may run ahead so that all of them fit.
    fn ahead(&self, shards_open: u64) -> u64 {
        let fair = self.budget_bytes / self.block_bytes / (2 * shards_open.max(1));
        self.most_ahead.min(fair.max(1))
    }
}

impl State {
    fn insert(&mut self, key: (u64, u64), bytes: u64) -> Arc<Flight> {
        let flight = Arc::new(Flight::default());
        self.clock += 1;
        self.bytes += bytes;
        self.slots.insert(key, Slot { flight: Arc::clone(&flight), bytes, last_used: self.clock });
        flight
    }

    fn touch(&mut self, key: (u64, u64)) -> Option<Arc<Flight>> {
        self.clock += 1;
        let slot = self.slots.get_mut(&key)?;
        slot.last_used = self.clock;
        Some(Arc::clone(&slot.flight))
    }

    fn remove(&mut self, key: (u64, u64)) {
        if let Some(slot) = self.slots.remove(&key) {
            self.bytes -= slot.bytes;
        }
    }

    /// Drops the blocks used longest ago, but none on its way, and not the one just asked for.
    fn shrink(&mut self, budget_bytes: u64, but: (u64, u64)) {
        while self.bytes > budget_bytes {
            let here = self.slots.iter().filter(|(key, slot)| {
                **key != but && slot.flight.landed.try_lock().is_ok_and(|landed| landed.is_some())
            });
            let Some(oldest) = here.min_by_key(|(_, slot)| slot.last_used).map(|(&key, _)| key) else {
                return;
            };
            self.remove(oldest);
        }
    }
}

impl RemoteContent {
    pub(super) fn len(&self) -> u64 {
        self.remote.len()
    }

    fn range(&self, index: u64) -> Range<u64> {
        let start = index * self.blocks.block_bytes;
        start..(start + self.blocks.block_bytes).min(self.len())
    }

    /// For readers that walk on: takes whole blocks and fetches the next ones ahead.
    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        if offset >= self.len() || buf.is_empty() {
            return Ok(0);
        }
        let index = offset / self.blocks.block_bytes;
        let block = self.walk_to(index).map_err(std::io::Error::other)?.wait()?;
        let inside = block.get((offset - self.range(index).start) as usize..).unwrap_or_default();
        let n = inside.len().min(buf.len());
        buf[..n].copy_from_slice(&inside[..n]);
        Ok(n)
    }

    /// For one sample: takes what is in memory, and fetches exactly the rest.
    pub(super) fn read(&self, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        let end = offset + len as u64;
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            let index = at / self.blocks.block_bytes;
            let known = lock(&self.blocks.state).touch((self.id, index));
            if let Some(flight) = known {
                let (block, start) = (flight.wait()?, self.range(index).start);
                bytes.extend_from_slice(
                    &block[(at - start) as usize..(end - start).min(block.len() as u64) as usize],
                );
            } else {
                let until = self.next_known(index + 1).map_or(end, |known| self.range(known).start.min(end));
                let remote = Arc::clone(&self.remote);
                let missing = wait_for(async move { remote.bytes(at..until).await });
                bytes.extend_from_slice(&missing.map_err(std::io::Error::other)?);
            }
        }
        Ok(bytes)
    }

    /// The first block from `index` on that is in memory or on its way.
    fn next_known(&self, index: u64) -> Option<u64> {
        let state = lock(&self.blocks.state);
        state.slots.range((self.id, index)..=(self.id, u64::MAX)).next().map(|(key, _)| key.1)
    }

    fn walk_to(&self, index: u64) -> Result<Arc<Flight>> {
        let mut state = lock(&self.blocks.state);
        let sequential = index == 0 || state.slots.contains_key(&(self.id, index - 1));
        let flight = self.get_or_fetch(&mut state, index)?;
        if sequential {
            let last = (self.len() - 1) / self.blocks.block_bytes;
            for next in index + 1..=(index + self.blocks.ahead(state.shards_open)).min(last) {
                self.get_or_fetch(&mut state, next)?;
            }
        }
        state.shrink(self.blocks.budget_bytes, (self.id, index));
        Ok(flight)
    }

    fn get_or_fetch(&self, state: &mut State, index: u64) -> Result<Arc<Flight>> {
        let key = (self.id, index);
        if let Some(flight) = state.touch(key) {
            return Ok(flight);
        }
        let range = self.range(index);
        let runtime = runtime()?;
        let flight = state.insert(key, range.end - range.start);
        let (remote, blocks, landing) =
            (Arc::clone(&self.remote), Arc::clone(&self.blocks), Arc::clone(&flight));
        let fetched = runtime.spawn(async move { remote.bytes(range).await });
        runtime.spawn(async move {
            let panicked =
                |error| Error::Threads { threads: 1, detail: format!("a request failed: {error}") };
            let result = fetched.await.map_err(panicked).and_then(|result| result).map_err(Arc::new);
            if result.is_err() {
                // Whoever comes later tries again.
                lock(&blocks.state).remove(key);
            }
            landing.land(result);
        });
        Ok(flight)
    }
}

impl Drop for RemoteContent {
    fn drop(&mut self) {
        let mut state = lock(&self.blocks.state);
        state.shards_open -= 1;
        let keys: Vec<_> =
            state.slots.range((self.id, 0)..=(self.id, u64::MAX)).map(|(&key, _)| key).collect();
        for key in keys {
            state.remove(key);
        }
    }
}
