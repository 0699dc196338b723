//! Where the samples of a tar shard begin, in a file beside it: `{shard}.idx`.
//!
//! The format is that of Megatron-Energon's `.tar.idx`: 64-bit little-endian byte offsets, one per sample (that
//! of its first member's header), and at the end the offset at which the archive's end mark begins. An index is
//! never loaded: it is read where it is needed, so that a shard of any size is entered at any sample at once.

use std::io::ErrorKind;
use std::sync::Arc;

use super::tar::is_header;
use super::{Extent, Shard};
use crate::error::{Error, Result};
use crate::store::{Blob, Store};

const BLOCK: u64 = 512;
const ENTRY: u64 = 8;

/// An open index that fits its shard.
#[derive(Debug)]
pub(crate) struct Index {
    blob: Arc<Blob>,
    samples: u64,
}

/// The path of a shard's index.
pub(crate) fn index_path(shard: &str) -> String {
    format!("{shard}.idx")
}

impl Index {
    /// Opens the index beside a shard; `None` when there is none, or when it does not fit the shard, which is
    /// logged as a warning.
    ///
    /// # Errors
    /// [`Error::Io`] when a file that exists cannot be read.
    pub(crate) fn open(store: &Store, shard: &str) -> Result<Option<Self>> {
        let path = index_path(shard);
        let blob = match store.open(&path) {
            Ok(blob) => blob,
            Err(Error::Io { cause, .. }) if cause.kind() == ErrorKind::NotFound => return Ok(None),
            Err(Error::NoObject { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let index = Self { samples: (blob.len() / ENTRY).saturating_sub(1), blob };
        match index.misfit(store.open(shard)?.as_ref())? {
            None => Ok(Some(index)),
            Some(detail) => {
                tracing::warn!(index = %path, "the index does not fit its shard and is ignored: {detail}");
                Ok(None)
            }
        }
    }

    /// Number of samples.
    pub(crate) fn len(&self) -> u64 {
        self.samples
    }

    /// The bytes of sample number `n`; `None` past the last one.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BrokenShard`] for offsets that do not ascend.
    pub(crate) fn extent(&self, n: u64) -> Result<Option<Extent>> {
        if n >= self.samples {
            return Ok(None);
        }
        let (offset, end) = (self.offset(n)?, self.offset(n + 1)?);
        if offset < end && offset.is_multiple_of(BLOCK) && end.is_multiple_of(BLOCK) {
            return Ok(Some(Extent { offset, bytes: end - offset }));
        }
        let detail = format!("sample {n} lies from {offset} to {end}");
        Err(Error::BrokenShard { shard: self.blob.location().to_owned(), offset: n * ENTRY, detail })
    }

    fn offset(&self, entry: u64) -> Result<u64> {
        let mut bytes = [0; ENTRY as usize];
        self.blob.read_exact_at(entry * ENTRY, &mut bytes).map_err(io(&self.blob))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Why this is no index of that shard. Looks at both ends only.
    fn misfit(&self, shard: &Blob) -> Result<Option<String>> {
        let size = self.blob.len();
        if size == 0 || !size.is_multiple_of(ENTRY) {
            return Ok(Some(format!("its size is {size}, not a positive multiple of {ENTRY}")));
        }
        let (first, last) = (self.offset(0)?, self.offset(self.samples)?);
        if !last.is_multiple_of(BLOCK) || last.checked_add(BLOCK).is_none_or(|end| end > shard.len()) {
            let length = shard.len();
            return Ok(Some(format!("it ends at {last}, and the shard has {length} bytes")));
        }
        if shard.read(last, BLOCK).map_err(io(shard))?.iter().any(|&byte| byte != 0) {
            return Ok(Some(format!("the shard goes on at {last}, where it should end")));
        }
        if self.samples == 0 {
            return Ok(None);
        }
        if first >= last || !first.is_multiple_of(BLOCK) {
            return Ok(Some(format!("its first sample is at {first}, and its end at {last}")));
        }
        let header = shard.read(first, BLOCK).map_err(io(shard))?;
        Ok((!is_header(&header)).then(|| format!("no member begins at {first}")))
    }
}

/// Walks a shard by its index alone.
#[derive(Debug)]
pub(super) struct IndexScanner {
    index: Index,
    /// Kept open: its samples will be read, and a compressed one must not be unpacked for each.
    _shard: Shard,
    ordinal: u64,
    /// Where sample number `ordinal` begins, once it is known.
    offset: u64,
}

impl IndexScanner {
    pub(super) fn new(shard: Shard, index: Index, ordinal: u64) -> Self {
        Self { index, _shard: shard, ordinal, offset: 0 }
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn ordinal(&self) -> u64 {
        self.ordinal
    }

    /// As [`Scanner::next_sample`](super::Scanner::next_sample).
    pub(super) fn next_sample(&mut self) -> Result<Option<Extent>> {
        let extent = self.index.extent(self.ordinal)?;
        if let Some(extent) = extent {
            self.ordinal += 1;
            self.offset = extent.offset + extent.bytes;
        }
        Ok(extent)
    }
}

fn io(blob: &Blob) -> impl FnOnce(std::io::Error) -> Error + '_ {
    |cause| Error::Io { path: blob.location().into(), cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::{Shard, end_mark};
    use crate::spec::StoreSpec;
    use crate::testing::{tar, write_shards};

    fn store() -> Store {
        Store::new(&StoreSpec::default()).unwrap()
    }

    struct Fixture {
        _dir: tempfile::TempDir,
        shard: String,
        offsets: Vec<u64>,
    }

    /// A shard of three samples with the offsets of its index, which is not written.
    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let shard = write_shards(dir.path(), &[3])[0].display().to_string();
        let mut scanner = Shard::open(&store(), &shard).unwrap().scan(0, 0);
        let (mut offsets, mut end) = (Vec::new(), 0);
        while let Some(extent) = scanner.next_sample().unwrap() {
            offsets.push(extent.offset);
            end = extent.offset + extent.bytes;
        }
        offsets.push(end_mark(&store().open(&shard).unwrap(), end).unwrap());
        Fixture { _dir: dir, shard, offsets }
    }

    fn open(fixture: &Fixture, offsets: &[u64], extra: &[u8]) -> Result<Option<Index>> {
        let mut bytes: Vec<u8> = offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        bytes.extend_from_slice(extra);
        std::fs::write(index_path(&fixture.shard), bytes).unwrap();
        Index::open(&store(), &fixture.shard)
    }

    #[test]
    fn every_sample_is_found_at_its_place() {
        let fixture = fixture();
        assert!(Index::open(&store(), &fixture.shard).unwrap().is_none(), "there is no index yet");
        let index = open(&fixture, &fixture.offsets, &[]).unwrap().unwrap();
        assert_eq!(index.len(), 3);
        let shard = Shard::open(&store(), &fixture.shard).unwrap();
        let mut scanner = shard.scan(0, 0);
        for n in 0..3 {
            let extent = index.extent(n).unwrap().unwrap();
            assert_eq!(Some(extent), scanner.next_sample().unwrap());
            assert_eq!(shard.read(extent).unwrap().key, format!("0-{n}"));
        }
        assert_eq!(index.extent(3).unwrap(), None);
    }

    #[test]
    fn an_index_that_does_not_fit_is_ignored() {
        let fixture = fixture();
        let good = fixture.offsets.clone();
        let end = good[3];
        let cases: [(&str, Vec<u64>, &[u8]); 8] = [
            ("empty", vec![], &[]),
            ("an odd size", good.clone(), &[0]),
            ("an end past the shard", vec![0, good[1], end + 4096], &[]),
            ("an end that is no block", vec![0, good[1], end + 1], &[]),
            ("an end where a sample begins", vec![0, good[1]], &[]),
            ("an end that overflows", vec![0, u64::MAX - 511], &[]),
            ("a first sample that is no header", vec![good[0] + 512, end], &[]),
            ("a first sample after the end", vec![end + 512, end], &[]),
        ];
        for (name, offsets, extra) in cases {
            assert!(open(&fixture, &offsets, extra).unwrap().is_none(), "{name}");
        }
        let index = open(&fixture, &[good[0], good[2], good[1], end], &[]).unwrap().unwrap();
        let message = index.extent(1).unwrap_err().to_string();
        assert!(message.contains("broken at byte 8"), "{message}");
    }

    /// The size in the header of a link is not that of any content.
    #[test]
    fn a_link_before_the_end_mark_has_no_content() {
        let dir = tempfile::tempdir().unwrap();
        let shard = dir.path().join("a.tar").display().to_string();
        let whole = tar(&[("a.json", "{}")]);
        let mut link = whole[..512].to_vec();
        link[124..136].copy_from_slice(b"00000002000\0");
        link[148..156].fill(b' ');
        link[156] = b'1';
        let sum: u32 = link.iter().map(|&byte| u32::from(byte)).sum();
        link[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        std::fs::write(&shard, [&whole[..1024], &link, &[0; 1024]].concat()).unwrap();
        assert_eq!(end_mark(&store().open(&shard).unwrap(), 0).unwrap(), 1536);
    }

    #[test]
    fn the_end_mark_is_behind_members_of_no_sample() {
        let fixture = fixture();
        let blob = store().open(&fixture.shard).unwrap();
        assert_eq!(end_mark(&blob, 0).unwrap(), fixture.offsets[3]);
        assert!(matches!(end_mark(&blob, blob.len()), Err(Error::BrokenShard { .. })));
    }
}
