//! The one background runtime on which all requests run, and the way into it from any thread.

use std::future::Future;
use std::sync::{Mutex, OnceLock, mpsc};

use tokio::runtime::{Builder, Handle, Runtime};

use crate::error::{Error, Result};

use super::lock;

const THREADS: usize = 2;

static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// The runtime, started at the first remote shard; it lives as long as the process.
pub(super) fn runtime() -> Result<Handle> {
    let _one_at_a_time = lock(&STARTING);
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime.handle().clone());
    }
    // Another part of the process may have chosen a provider before: both are right.
    drop(rustls::crypto::ring::default_provider().install_default());
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("sail-store")
        .enable_all()
        .build()
        .map_err(|error| Error::Threads { threads: THREADS, detail: error.to_string() })?;
    Ok(RUNTIME.get_or_init(|| runtime).handle().clone())
}

/// Runs a future on the runtime and waits for it; right on any thread that is not one of the runtime's.
pub(super) fn wait_for<T: Send + 'static>(
    future: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    runtime()?.spawn(async move {
        // The waiting thread cannot have gone.
        drop(sender.send(future.await));
    });
    let panicked = |_| Error::Threads { threads: THREADS, detail: "a request panicked".into() };
    receiver.recv().map_err(panicked)?
}
