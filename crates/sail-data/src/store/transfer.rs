//! One object on a server: ranged requests that go on from the byte where they stopped.
//!
//! Every answer is compared with the object that was opened (size, `ETag`, time), so bytes of two versions
//! are never mixed. Blocks and whole downloads are both made of [`Remote::fetch`]; nothing here caches.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{GetOptions, GetResult, ObjectMeta, ObjectStore};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::timeout;

use super::runtime::runtime;
use super::trouble::{Outcome, Patience, Tries, Trouble, without_query};
use crate::error::{Error, Result};

/// Chunks that wait between the network and whoever writes them away.
const CHUNKS_IN_FLIGHT: usize = 64;

/// An object as it was when it was opened.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    /// The URL as the user wrote it.
    pub(super) location: String,
    store: Arc<dyn ObjectStore>,
    path: Path,
    patience: Patience,
    meta: ObjectMeta,
}

/// Where the bytes of a request go.
enum Sink {
    Memory(Vec<u8>),
    Channel(Sender<Result<Bytes>>),
}

impl Sink {
    async fn push(&mut self, chunk: Bytes) -> Outcome<()> {
        match self {
            Self::Memory(bytes) => bytes.extend_from_slice(&chunk),
            Self::Channel(sender) => sender.send(Ok(chunk)).await.map_err(|_| Trouble::Abandoned)?,
        }
        Ok(())
    }
}

impl Remote {
    /// Asks for the first `first_bytes` of an object, which also says what object it is.
    pub(super) async fn open(
        location: String,
        (store, path): (Arc<dyn ObjectStore>, Path),
        patience: Patience,
        first_bytes: u64,
    ) -> Result<(Self, Bytes)> {
        let mut tries = Tries::new(&location, patience);
        let reply = loop {
            let options = GetOptions { range: Some((0..first_bytes).into()), ..GetOptions::default() };
            match request(store.as_ref(), &path, options, patience).await {
                Ok(reply) => break reply,
                // A range of an empty object cannot be satisfied.
                Err(Trouble::Store(error)) if error.to_string().contains("416") => {
                    let head = GetOptions { head: true, ..GetOptions::default() };
                    match request(store.as_ref(), &path, head, patience).await {
                        Ok(reply) if reply.meta.size == 0 => break reply,
                        _ => tries.failed(Trouble::Store(error)).await?,
                    }
                }
                Err(trouble) => tries.failed(trouble).await?,
            }
        };
        let remote = Self { location, store, path, patience, meta: reply.meta.clone() };
        let wanted = first_bytes.min(remote.meta.size);
        let mut sink = Sink::Memory(Vec::with_capacity(wanted as usize));
        let mut at = 0;
        // What is missing is asked for again, with retries.
        let taken = remote.take(reply, &mut at, wanted, &mut sink).await;
        if let Err(error @ Trouble::Overlong) = taken {
            Tries::new(&remote.location, patience).failed(error).await?;
        }
        remote.fetch(at..wanted, &mut sink).await?;
        let Sink::Memory(first) = sink else { return Ok((remote, Bytes::new())) };
        Ok((remote, first.into()))
    }

    pub(super) fn len(&self) -> u64 {
        self.meta.size
    }

    /// Its name in the cache, different for every version of it. Where a tag tells objects apart, a new
    /// signature in the URL does not make a new one.
    pub(super) fn identity(&self) -> String {
        let (size, written) = (self.meta.size, self.meta.last_modified.to_rfc3339());
        match &self.meta.e_tag {
            Some(tag) => format!("{} {size} {written} {tag}", without_query(&self.location)),
            None => format!("{} {size} {written}", self.location),
        }
    }

    /// The bytes of a range that lies inside the object.
    pub(super) async fn bytes(&self, range: Range<u64>) -> Result<Bytes> {
        let mut sink = Sink::Memory(Vec::with_capacity((range.end - range.start) as usize));
        self.fetch(range, &mut sink).await?;
        match sink {
            Sink::Memory(bytes) => Ok(bytes.into()),
            Sink::Channel(_) => Ok(Bytes::new()),
        }
    }

    /// A blocking reader of everything from `offset` on; dropping it ends the transfer.
    pub(super) fn stream(&self, offset: u64) -> Result<Download> {
        let (sender, chunks) = channel(CHUNKS_IN_FLIGHT);
        let remote = self.clone();
        runtime()?.spawn(async move {
            let mut sink = Sink::Channel(sender.clone());
            if let Err(error) = remote.fetch(offset..remote.meta.size, &mut sink).await {
                // Nobody is left to be told when this fails.
                drop(sender.send(Err(error)).await);
            }
        });
        Ok(Download { chunks, chunk: Bytes::new(), left: self.meta.size - offset })
    }

    async fn fetch(&self, range: Range<u64>, sink: &mut Sink) -> Result<()> {
        let mut tries = Tries::new(&self.location, self.patience);
        let mut at = range.start;
        while at < range.end {
            let before = at;
            if let Err(trouble) = self.fetch_once(&mut at, range.end, sink).await {
                tries.progressed(at - before);
                tries.failed(trouble).await?;
            }
        }
        Ok(())
    }

    /// One request; `at` moves with every byte that has arrived.
    async fn fetch_once(&self, at: &mut u64, end: u64, sink: &mut Sink) -> Outcome<()> {
        // Weak tags never match `If-Match`; the comparison of the answer covers them.
        let if_match = self.meta.e_tag.clone().filter(|tag| !tag.starts_with("W/"));
        let options = GetOptions { range: Some((*at..end).into()), if_match, ..GetOptions::default() };
        let reply = request(self.store.as_ref(), &self.path, options, self.patience).await?;
        self.take(reply, at, end, sink).await
    }

    async fn take(&self, reply: GetResult, at: &mut u64, end: u64, sink: &mut Sink) -> Outcome<()> {
        self.check_same(&reply.meta)?;
        let mut body = reply.into_stream();
        while *at < end {
            let chunk = timeout(self.patience.silence, body.next())
                .await
                .map_err(|_| Trouble::Silent(self.patience.silence))?
                .ok_or(Trouble::Short { missing: end - *at })??;
            if chunk.len() as u64 > end - *at {
                return Err(Trouble::Overlong);
            }
            let length = chunk.len() as u64;
            sink.push(chunk).await?;
            *at += length;
        }
        Ok(())
    }

    fn check_same(&self, now: &ObjectMeta) -> Outcome<()> {
        let was = &self.meta;
        let detail = if now.size != was.size {
            format!("it had {} bytes and has {}", was.size, now.size)
        } else if now.e_tag != was.e_tag {
            let tag = |meta: &ObjectMeta| meta.e_tag.clone().unwrap_or_else(|| "none".into());
            format!("its ETag was {} and is {}", tag(was), tag(now))
        } else if now.last_modified != was.last_modified {
            format!("it was written at {} and at {}", was.last_modified, now.last_modified)
        } else {
            return Ok(());
        };
        Err(Trouble::Changed(detail))
    }
}

async fn request(
    store: &dyn ObjectStore,
    path: &Path,
    options: GetOptions,
    patience: Patience,
) -> Outcome<GetResult> {
    let reply = timeout(patience.silence, store.get_opts(path, options)).await;
    Ok(reply.map_err(|_| Trouble::Silent(patience.silence))??)
}

/// The blocking end of a transfer. It ends early only with an error.
#[derive(Debug)]
pub(super) struct Download {
    chunks: Receiver<Result<Bytes>>,
    chunk: Bytes,
    left: u64,
}

impl Read for Download {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        while self.chunk.is_empty() {
            match self.chunks.blocking_recv() {
                Some(Ok(chunk)) => self.chunk = chunk,
                Some(Err(error)) => return Err(std::io::Error::other(error)),
                None if self.left == 0 => return Ok(0),
                None => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let n = buf.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut buf[..n]);
        self.left -= n as u64;
        Ok(n)
    }
}

/// The crate's own error out of an IO error that carries one, else what `otherwise` makes of it.
pub(super) fn unwrap_io(error: std::io::Error, otherwise: impl FnOnce(std::io::Error) -> Error) -> Error {
    match error.downcast::<Error>() {
        Ok(ours) => ours,
        Err(error) => otherwise(error),
    }
}
