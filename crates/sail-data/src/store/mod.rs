//! Where shards lie: local files, web servers and object stores behind one blocking interface.
//!
//! [`Store::find`] turns patterns into locations and [`Store::open`] a location into a [`Blob`], whose bytes
//! are those of a plain tar archive: a compressed shard is decompressed once, into the cache on disk or into
//! a file without a name. This module knows nothing of samples; `shard` and `source` call it.
//!
//! ```text
//! find      patterns to locations
//! endpoint  a URL's store, with credentials from the environment
//! transfer  ranged requests that go on where they broke off      trouble: what is tried again, and when
//! blocks    blocks of remote shards in memory, fetched ahead
//! disk      whole shards on disk, up to a size                   unpack: decompression
//! blob      positioned reads of what was opened
//! ```

mod blob;
mod blocks;
mod disk;
mod endpoint;
mod find;
mod runtime;
#[cfg(test)]
mod server;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_disk;
mod transfer;
mod trouble;
mod unpack;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{Cursor, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;

use self::blob::Content;
use self::blocks::Blocks;
use self::disk::DiskCache;
use self::endpoint::{Address, Endpoints};
use self::runtime::wait_for;
use self::transfer::{Remote, unwrap_io};
use self::trouble::Patience;
use self::unpack::{Codec, GENEROUS_BYTES, MAGIC_BYTES};
use crate::error::{Error, Result};
use crate::spec::StoreSpec;

pub(crate) use self::blob::Blob;

/// Blobs kept open after their last use, so that streams that take turns share them.
const KEPT_BLOBS: usize = 32;
/// Bytes of decompressed files kept open like that; their disk space is free only when they are closed.
const KEPT_BYTES: u64 = 16 << 30;
/// Locations remembered before those not in use are forgotten.
const REMEMBERED: usize = 4096;

/// Opens shards. Clones share everything.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    inner: Arc<Inner>,
}

/// A location's blob while it is in use; locked while it is being opened.
type Shared = Arc<Mutex<Weak<Blob>>>;

#[derive(Debug)]
struct Inner {
    patience: Patience,
    endpoints: Endpoints,
    blocks: Arc<Blocks>,
    cache: Option<DiskCache>,
    opened: Mutex<BTreeMap<String, Shared>>,
    /// The one used last is at the back.
    kept: Mutex<VecDeque<Arc<Blob>>>,
}

impl Store {
    /// Makes the cache's folder; no server is asked anything yet.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`], [`Error::Io`].
    pub(crate) fn new(spec: &StoreSpec) -> Result<Self> {
        let silence =
            Duration::try_from_secs_f64(spec.timeout_secs).ok().filter(|silence| !silence.is_zero());
        let silence = silence.ok_or_else(|| Error::InvalidSpec {
            field: "store.timeout_secs".into(),
            found: spec.timeout_secs.to_string(),
            expected: "a number above 0",
        })?;
        let inner = Inner {
            patience: Patience { retries: spec.retries, silence },
            endpoints: Endpoints::default(),
            blocks: Arc::new(Blocks::new(spec.read_ahead_bytes)),
            cache: spec.cache.as_ref().map(DiskCache::new).transpose()?,
            opened: Mutex::default(),
            kept: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The locations that a pattern of the source `name` names: braces are expanded in their order, then the matches of each glob
    /// sorted. URLs without a glob are not looked up.
    ///
    /// # Errors
    /// [`Error::Pattern`], [`Error::NoShards`], [`Error::Store`].
    pub(crate) fn find(&self, name: &str, pattern: &str) -> Result<Vec<String>> {
        find::find(self, name, pattern)
    }

    /// The content of a shard; the same blob for everyone while it is in use.
    ///
    /// # Errors
    /// [`Error::BadLocation`], [`Error::Io`], [`Error::Store`], [`Error::Changed`], [`Error::CompressedShard`],
    /// [`Error::BadCompression`], [`Error::TooLargeUnpacked`], [`Error::CacheTooSmall`].
    pub(crate) fn open(&self, location: &str) -> Result<Arc<Blob>> {
        let shared = self.inner.shared(location);
        let mut opened = lock(&shared);
        let blob = if let Some(blob) = opened.upgrade() {
            blob
        } else {
            let blob = Arc::new(Blob::new(location, self.inner.content(location)?));
            *opened = Arc::downgrade(&blob);
            blob
        };
        self.inner.keep(&blob);
        Ok(blob)
    }
}

impl Inner {
    fn shared(&self, location: &str) -> Shared {
        let mut opened = lock(&self.opened);
        if opened.len() >= REMEMBERED {
            // One that is being opened is held by whoever opens it.
            opened.retain(|_, shared| Arc::strong_count(shared) > 1 || lock(shared).strong_count() > 0);
        }
        Arc::clone(opened.entry(location.to_owned()).or_default())
    }

    fn keep(&self, blob: &Arc<Blob>) {
        if !blob.is_costly() {
            return;
        }
        let mut kept = lock(&self.kept);
        kept.retain(|other| !Arc::ptr_eq(other, blob));
        kept.push_back(Arc::clone(blob));
        while kept.len() > 1
            && (kept.len() > KEPT_BLOBS
                || kept.iter().map(|blob| blob.held_bytes()).sum::<u64>() > KEPT_BYTES)
        {
            kept.pop_front();
        }
    }

    fn content(&self, location: &str) -> Result<Content> {
        match Address::parse(location) {
            Some(address) => self.remote(location, &address),
            None => self.local(location),
        }
    }

    fn local(&self, location: &str) -> Result<Content> {
        let io = |cause| Error::Io { path: location.into(), cause };
        let refused =
            || io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is not a regular file"));
        // Asked before it is opened, since opening a FIFO waits for a writer.
        if !std::fs::metadata(location).map_err(io)?.is_file() {
            return Err(refused());
        }
        let file = File::open(location).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        if !about.is_file() {
            return Err(refused());
        }
        let mut first = Vec::with_capacity(MAGIC_BYTES);
        (&file).take(MAGIC_BYTES as u64).read_to_end(&mut first).map_err(io)?;
        let Some(codec) = Codec::of(location, &first)? else {
            return Ok(Content::File { file, len: about.len(), held_bytes: 0, costly: false });
        };
        let written = about.modified().map_err(io)?.duration_since(UNIX_EPOCH).unwrap_or_default();
        let version = format!("{} {}", about.len(), written.as_nanos());
        let name = std::path::absolute(location).map_err(io)?.display().to_string();
        self.unpacked(location, &format!("{name} {version}"), codec, || Ok(Cursor::new(first).chain(file)))
    }

    fn remote(&self, location: &str, address: &Address<'_>) -> Result<Content> {
        let place = self.endpoints.place(location, address)?;
        let (name, patience, first_bytes) = (location.to_owned(), self.patience, self.blocks.block_bytes);
        let (remote, first) =
            wait_for(async move { Remote::open(name, place, patience, first_bytes).await })?;
        let whole = |first: Bytes| {
            let rest = remote.stream(first.len() as u64)?;
            Ok(Cursor::new(first).chain(rest))
        };
        if let Some(codec) = Codec::of(location, &first)? {
            return self.unpacked(location, &remote.identity(), codec, || whole(first));
        }
        let Some(cache) = &self.cache else {
            return Ok(Content::Remote(self.blocks.admit(remote, first)));
        };
        let file = cache.get(location, &remote.identity(), Some(remote.len()), |part| {
            let io = |cause| Error::Io { path: location.into(), cause };
            std::io::copy(&mut whole(first)?, &mut part.file).map_err(|error| unwrap_io(error, io))?;
            Ok(())
        })?;
        Content::made(location, file, 0)
    }

    /// The decompressed content of `source`, in the cache or in a file that goes with the process.
    fn unpacked<R: Read>(
        &self,
        location: &str,
        identity: &str,
        codec: Codec,
        source: impl FnOnce() -> Result<R>,
    ) -> Result<Content> {
        if let Some(cache) = &self.cache {
            let file = cache.get(location, &format!("{identity} unpacked"), None, |part| {
                let mut file =
                    part.file.try_clone().map_err(|cause| Error::Io { path: location.into(), cause })?;
                codec.unpack(location, source()?, &mut file, |length| part.grow(length)).map(drop)
            })?;
            return Content::made(location, file, 0);
        }
        let mut file =
            tempfile::tempfile().map_err(|cause| Error::Io { path: std::env::temp_dir(), cause })?;
        let grow = |length| {
            let too_large = Error::TooLargeUnpacked { location: location.to_owned(), limit: GENEROUS_BYTES };
            if length > GENEROUS_BYTES { Err(too_large) } else { Ok(()) }
        };
        let held = codec.unpack(location, source()?, &mut file, grow)?;
        Content::made(location, file, held)
    }
}

/// Whether a location is a URL and not a local path.
pub(crate) fn is_remote(location: &str) -> bool {
    location.contains("://")
}

/// Locks also after another thread has panicked: what is behind these locks is always whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
