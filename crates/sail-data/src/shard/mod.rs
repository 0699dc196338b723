//! One shard: where its samples lie, and the members of one sample at its place.
//!
//! A [`Scanner`] yields the extent of each sample, from any sample's offset on, without decoding anything;
//! [`Shard::read`] reads the members of one. What kinds of shards there are, is known here only; `tar` reads
//! archives.

pub(crate) mod index;
mod tar;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{BadSample, Result};
use crate::store::{Blob, Store};

/// One sample's place: a shard of its source, and a byte range in it. Stored as `[shard, epoch, offset, bytes]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "(u32, u32, u64, u64)", into = "(u32, u32, u64, u64)")]
pub(crate) struct SampleRef {
    /// Index of the shard in its source.
    pub(crate) shard: u32,
    /// The epoch of its source that it is drawn in, from 0.
    pub(crate) epoch: u32,
    /// Its bytes in the shard.
    pub(crate) extent: Extent,
}

/// The bytes of a sample in its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Extent {
    /// Where it begins: in an archive, at the header of its first member.
    pub(crate) offset: u64,
    /// Bytes up to its end: in an archive, that of its last member's padding.
    pub(crate) bytes: u64,
}

impl From<(u32, u32, u64, u64)> for SampleRef {
    fn from((shard, epoch, offset, bytes): (u32, u32, u64, u64)) -> Self {
        Self { shard, epoch, extent: Extent { offset, bytes } }
    }
}

impl From<SampleRef> for (u32, u32, u64, u64) {
    fn from(SampleRef { shard, epoch, extent: Extent { offset, bytes } }: SampleRef) -> Self {
        (shard, epoch, offset, bytes)
    }
}

/// An open shard.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    blob: Arc<Blob>,
}

/// Yields the extents of the samples of one shard, in order.
#[derive(Debug)]
pub(crate) struct Scanner(tar::TarScanner);

impl Shard {
    /// Opens the shard at this path.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), [`Error::CompressedShard`](crate::Error::CompressedShard).
    pub(crate) fn open(store: &Store, path: &str) -> Result<Self> {
        let blob = store.open(path)?;
        tar::check_plain(&blob)?;
        Ok(Self { blob })
    }

    /// A scanner that goes on at the offset of sample number `ordinal`.
    pub(crate) fn scan(&self, offset: u64, ordinal: u64) -> Scanner {
        Scanner(tar::TarScanner::new(Arc::clone(&self.blob), offset, ordinal))
    }

    /// Reads the sample at `place`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) and [`Error::BrokenShard`](crate::Error::BrokenShard), also when the
    /// shard has changed since it was scanned.
    pub(crate) fn read(&self, place: Extent) -> Result<RawSample> {
        tar::read_sample(&self.blob, place)
    }

    /// Whether any sample lies in the shard.
    pub(crate) fn has_samples(&self) -> Result<bool> {
        Ok(self.scan(0, 0).next_sample()?.is_some())
    }
}

impl Scanner {
    /// Where the next sample begins, or the search for it goes on.
    pub(crate) fn offset(&self) -> u64 {
        self.0.offset()
    }

    /// The number of the next sample in the shard.
    pub(crate) fn ordinal(&self) -> u64 {
        self.0.ordinal()
    }

    /// The next sample; `None` at the end of the shard.
    ///
    /// # Errors
    /// [`Error::BrokenShard`](crate::Error::BrokenShard) when the shard is truncated or malformed.
    pub(crate) fn next_sample(&mut self) -> Result<Option<Extent>> {
        self.0.next_sample()
    }
}

/// One member of a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    /// Everything after the first dot of the base name, in lower case.
    pub(crate) suffix: String,
    pub(crate) data: Vec<u8>,
}

/// The members of one sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawSample {
    pub(crate) key: String,
    pub(crate) members: Vec<Member>,
}

impl RawSample {
    /// The member with this suffix.
    pub(crate) fn member(&self, suffix: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.suffix == suffix)
    }

    /// Refuses a sample with two members of the same suffix.
    pub(crate) fn check_unique(&self) -> std::result::Result<(), BadSample> {
        for (index, member) in self.members.iter().enumerate() {
            if self.members[..index].iter().any(|other| other.suffix == member.suffix) {
                return Err(BadSample::DuplicateMember { name: member.name.clone() });
            }
        }
        Ok(())
    }
}
