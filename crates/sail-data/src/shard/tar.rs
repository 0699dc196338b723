//! Tar shards: where their samples lie, and the members of one sample.
//!
//! The archive format itself is read by `webdataset`. What is added here is the position: a [`TarScanner`]
//! walks the headers of a shard and yields the byte range of each sample, from any sample's offset on; the
//! payloads of a local shard are not read for that.

use std::io::{Error as IoError, ErrorKind, Read};
use std::sync::Arc;

use webdataset::core::utils::{base_plus_ext, is_shard_metadata};
use webdataset::shard::TarEntries;

use super::{Extent, Member, RawSample};
use crate::error::{Error, Result};
use crate::store::Blob;

const BLOCK: usize = 512;

/// Yields the extents of the samples of one archive, in order.
#[derive(Debug)]
pub(super) struct TarScanner {
    archive: Skim,
    /// The member read last, which begins the next sample.
    ahead: Option<Span>,
    /// Samples yielded so far, counted from the beginning of the shard.
    ordinal: u64,
}

#[derive(Debug)]
struct Span {
    key: String,
    start: u64,
    end: u64,
}

impl TarScanner {
    /// Goes on at the offset of sample number `ordinal`.
    pub(super) fn new(blob: Arc<Blob>, offset: u64, ordinal: u64) -> Self {
        Self { archive: Skim::new(blob, offset), ahead: None, ordinal }
    }

    /// Where the next sample begins, or the search for it goes on.
    pub(crate) fn offset(&self) -> u64 {
        self.ahead.as_ref().map_or(self.archive.position, |member| member.start)
    }

    /// The number of the next sample in the shard.
    pub(crate) fn ordinal(&self) -> u64 {
        self.ordinal
    }

    /// The next sample: adjacent members that share a key.
    ///
    /// # Errors
    /// [`Error::BrokenShard`] when the archive is truncated or not a tar.
    pub(crate) fn next_sample(&mut self) -> Result<Option<Extent>> {
        let first = match self.ahead.take() {
            Some(member) => member,
            None => match self.next_member()? {
                Some(member) => member,
                None => return Ok(None),
            },
        };
        let mut end = first.end;
        while let Some(member) = self.next_member()? {
            if member.key != first.key {
                self.ahead = Some(member);
                break;
            }
            end = member.end;
        }
        self.ordinal += 1;
        Ok(Some(Extent { offset: first.start, bytes: end - first.start }))
    }

    /// The next regular member that belongs to a sample.
    fn next_member(&mut self) -> Result<Option<Span>> {
        loop {
            let start = self.archive.position;
            let shard = self.archive.blob.location().to_owned();
            let broken = |detail: String| Error::BrokenShard { shard, offset: start, detail };
            // Every call reads whole members, so the parser needs no memory between calls.
            match TarEntries::new(&mut self.archive).next() {
                Some(Ok(entry)) if is_shard_metadata(&entry.name) => {}
                Some(Ok(entry)) => {
                    if let Some((key, _)) = base_plus_ext(&entry.name) {
                        let end = self.archive.position;
                        return Ok(Some(Span { key: key.to_owned(), start, end }));
                    }
                }
                Some(Err(error)) => {
                    // A server that fails does not make a shard a broken one.
                    let path = self.archive.blob.location().into();
                    let failure = self.archive.failure.take();
                    return Err(
                        failure.map_or_else(|| broken(error.to_string()), |cause| Error::Io { path, cause })
                    );
                }
                None if self.archive.at_end_mark => return Ok(None),
                None => {
                    return Err(broken(
                        "it ends without the end mark of a tar archive; is it truncated?".into(),
                    ));
                }
            }
        }
    }
}

/// A tar archive in which the payloads of regular members read as zeros, without being read from the file.
///
/// That makes walking the headers cheap while the parser still sees a well-formed archive.
#[derive(Debug)]
struct Skim {
    blob: Arc<Blob>,
    /// Why the blob could not be read.
    failure: Option<std::io::Error>,
    /// Bytes handed out so far, counted from the beginning of the file.
    position: u64,
    /// Whether the last header block was the zero block that ends an archive.
    at_end_mark: bool,
    header: [u8; BLOCK],
    /// Bytes of `header` handed out already; `BLOCK` when the next read begins a new block.
    header_used: usize,
    payload: Payload,
}

/// What follows the header being handed out.
#[derive(Clone, Copy, Debug)]
enum Payload {
    /// A member's content: skipped.
    Hidden(u64),
    /// A record of the format itself, such as a long name: passed through.
    Shown(u64),
}

impl Skim {
    fn new(blob: Arc<Blob>, offset: u64) -> Self {
        Self {
            blob,
            failure: None,
            position: offset,
            at_end_mark: false,
            header: [0; BLOCK],
            header_used: BLOCK,
            payload: Payload::Hidden(0),
        }
    }

    /// Reads the next header block; false at the end of the file.
    fn begin_block(&mut self) -> std::io::Result<bool> {
        let left = self.blob.len().saturating_sub(self.position).min(BLOCK as u64) as usize;
        if left == 0 {
            return Ok(false);
        }
        if left < BLOCK {
            return Err(IoError::new(
                ErrorKind::UnexpectedEof,
                format!("the file ends after {left} bytes of a header of {BLOCK}"),
            ));
        }
        self.blob.read_exact_at(self.position, &mut self.header)?;
        self.at_end_mark = self.header.iter().all(|&byte| byte == 0);
        self.header_used = 0;
        let size = payload_bytes(&self.header).div_ceil(BLOCK as u64).saturating_mul(BLOCK as u64);
        self.payload = match self.header[156] {
            b'0' | 0 | b'7' => Payload::Hidden(size),
            _ => Payload::Shown(size),
        };
        Ok(true)
    }
}

impl Read for Skim {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.read_some(buf).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => error,
            kind => {
                self.failure = Some(error);
                kind.into()
            }
        })
    }
}

impl Skim {
    fn read_some(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let in_header = self.header_used < BLOCK;
        let n = match self.payload {
            _ if in_header => {
                let n = buf.len().min(BLOCK - self.header_used);
                buf[..n].copy_from_slice(&self.header[self.header_used..self.header_used + n]);
                self.header_used += n;
                n
            }
            Payload::Hidden(0) | Payload::Shown(0) => {
                return if self.begin_block()? { self.read_some(buf) } else { Ok(0) };
            }
            Payload::Hidden(left) => {
                let there = self.blob.len().saturating_sub(self.position);
                let n = (buf.len() as u64).min(left).min(there) as usize;
                buf[..n].fill(0);
                self.payload = Payload::Hidden(left - n as u64);
                n
            }
            Payload::Shown(left) => {
                let wanted = (buf.len() as u64).min(left) as usize;
                let n = self.blob.read_at(self.position, &mut buf[..wanted])?;
                self.payload = Payload::Shown(left - n as u64);
                n
            }
        };
        self.position += n as u64;
        Ok(n)
    }
}

/// The size field of a tar header: octal digits, or base 256 when the top bit is set. An unreadable size
/// counts as 0 here; the parser that reads through [`Skim`] reports it.
fn payload_bytes(header: &[u8; BLOCK]) -> u64 {
    let field = &header[124..136];
    if field[0] & 0x80 != 0 {
        return field[4..].iter().fold(0, |size, &byte| (size << 8) | u64::from(byte));
    }
    let digits = field.iter().skip_while(|&&byte| byte == b' ').take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |size, &digit| size * 8 + u64::from(digit - b'0'))
}

/// Refuses a compressed archive, in which samples have no offsets.
///
/// # Errors
/// [`Error::CompressedShard`], [`Error::Io`].
pub(super) fn check_plain(blob: &Blob) -> Result<()> {
    let mut magic = [0; 4];
    let n = blob.read_at(0, &mut magic).map_err(|cause| Error::Io { path: blob.location().into(), cause })?;
    match compression(&magic[..n]) {
        Some(codec) => Err(Error::CompressedShard { shard: blob.location().to_owned(), codec }),
        None => Ok(()),
    }
}

fn compression(magic: &[u8]) -> Option<&'static str> {
    match magic {
        [0x1f, 0x8b, ..] => Some("gzip"),
        [0x28, 0xb5, 0x2f, 0xfd] => Some("zstd"),
        [b'B', b'Z', b'h', ..] => Some("bzip2"),
        [0xfd, b'7', b'z', b'X'] => Some("xz"),
        _ => None,
    }
}

/// Reads the sample at `place`.
///
/// # Errors
/// [`Error::Io`] and [`Error::BrokenShard`], also when the file has changed since it was scanned.
pub(super) fn read_sample(blob: &Blob, place: Extent) -> Result<RawSample> {
    let broken = |detail: String| Error::BrokenShard {
        shard: blob.location().to_owned(),
        offset: place.offset,
        detail,
    };
    let bytes = blob.read(place.offset, place.bytes).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => broken(error.to_string()),
        _ => Error::Io { path: blob.location().into(), cause: error },
    })?;
    let mut found: Option<RawSample> = None;
    for entry in TarEntries::new(bytes.as_slice()) {
        let entry = entry.map_err(|error| broken(error.to_string()))?;
        let Some((key, suffix)) = base_plus_ext(&entry.name).filter(|_| !is_shard_metadata(&entry.name))
        else {
            continue;
        };
        let sample = found.get_or_insert_with(|| RawSample { key: key.to_owned(), members: Vec::new() });
        if sample.key != key {
            return Err(broken(format!("found the key `{key}` inside the sample `{}`", sample.key)));
        }
        let suffix = suffix.to_ascii_lowercase();
        sample.members.push(Member { name: entry.name, suffix, data: entry.data });
    }
    found.ok_or_else(|| broken("there is no sample".into()))
}
