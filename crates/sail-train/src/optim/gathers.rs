//! Updated parameters on their way back to every rank, while the next forward pass has begun.
//!
//! Each bucket is waited for just before the first block that computes with it. Owned by the optimizer; the
//! model tells which block comes next.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use sail_torch::Work;

use super::layout::Layout;
use crate::error::{Error, Result};
use crate::threads::lock;

/// Collectives under way. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Gathers(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    /// In the order in which they were started.
    pending: VecDeque<(Arc<Layout>, Work)>,
    failed: Option<Error>,
}

impl Gathers {
    /// Takes note that a bucket is under way.
    pub(super) fn push(&self, layout: Arc<Layout>, work: Work) {
        self.lock().pending.push_back((layout, work));
    }

    /// Waits for what `block` computes with. A failure is kept for [`Gathers::settle`]: a forward pass cannot
    /// report it.
    pub(super) fn before_block(&self, block: &str) {
        self.wait_for(|name| name.starts_with(block));
    }

    /// Waits for what lies outside of `blocks`.
    pub(super) fn before_forward(&self, blocks: &[String]) {
        self.wait_for(|name| !blocks.iter().any(|block| name.starts_with(block.as_str())));
    }

    /// Waits for everything.
    ///
    /// # Errors
    /// The first failure since the last call.
    pub(super) fn settle(&self) -> Result<()> {
        self.wait_for(|_| true);
        self.lock().failed.take().map_or(Ok(()), Err)
    }

    /// Waits for all up to the last that has a parameter which is `wanted`.
    fn wait_for(&self, wanted: impl Fn(&str) -> bool) {
        let mut inner = self.lock();
        let has_wanted = |(layout, _): &(Arc<Layout>, Work)| layout.entries.iter().any(|e| wanted(&e.name));
        let count = inner.pending.iter().rposition(has_wanted).map_or(0, |last| last + 1);
        for _ in 0..count {
            let Some((_, work)) = inner.pending.pop_front() else { return };
            if let Err(error) = work.wait() {
                inner.failed.get_or_insert(error.into());
            }
        }
    }

    /// Names of the parameters that are under way.
    #[cfg(test)]
    pub(super) fn pending(&self) -> Vec<String> {
        let inner = self.lock();
        let entries = inner.pending.iter().flat_map(|(layout, _)| &layout.entries);
        entries.map(|entry| entry.name.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}
