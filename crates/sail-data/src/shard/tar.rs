//! Tar shards: where their samples lie, and the members of one sample.
//!
//! A [`TarScanner`] walks the headers of a shard and yields the byte range of each sample, from any sample's offset
//! on; payloads are not read for that. How names become keys and suffixes is WebDataset's rule.

mod header;

use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use webdataset::core::utils::{base_plus_ext, is_shard_metadata};

use self::header::{Failure, File, Found, check_sum, next_file};
use super::{Extent, Member, RawSample};
use crate::error::{Error, Result};
use crate::store::Blob;

const NO_END_MARK: &str = "it ends without the end mark of a tar archive; is it truncated?";
/// Most bytes of one sample: it is held in memory as a whole.
const MAX_SAMPLE_BYTES: u64 = 2 << 30;

/// Yields the extents of the samples of one archive, in order.
#[derive(Debug)]
pub(super) struct TarScanner {
    blob: Arc<Blob>,
    /// Where the next header begins.
    position: u64,
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
        Self { blob, position: offset, ahead: None, ordinal }
    }

    /// Where the next sample begins, or the search for it goes on.
    pub(super) fn offset(&self) -> u64 {
        self.ahead.as_ref().map_or(self.position, |member| member.start)
    }

    /// The number of the next sample in the shard.
    pub(super) fn ordinal(&self) -> u64 {
        self.ordinal
    }

    /// The next sample: adjacent members that share a key.
    ///
    /// # Errors
    /// [`Error::BrokenShard`] when the archive is truncated or not a tar, [`Error::Io`].
    pub(super) fn next_sample(&mut self) -> Result<Option<Extent>> {
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
        let bytes = end - first.start;
        if bytes > MAX_SAMPLE_BYTES {
            let detail = format!("the sample `{}` has {bytes} bytes, at most {MAX_SAMPLE_BYTES}", first.key);
            return Err(broken(&self.blob, first.start, detail));
        }
        self.ordinal += 1;
        Ok(Some(Extent { offset: first.start, bytes }))
    }

    /// The next regular member that belongs to a sample.
    fn next_member(&mut self) -> Result<Option<Span>> {
        loop {
            let found = next_file(self.blob.as_ref(), self.position);
            match found.map_err(|failure| explain(&self.blob, 0, failure))? {
                Found::File(File { name, start, end, .. }) => {
                    self.position = end;
                    if let Some((key, _)) = key_and_suffix(&name) {
                        return Ok(Some(Span { key: key.to_owned(), start, end }));
                    }
                }
                Found::EndMark(mark) => {
                    nothing_follows(&self.blob, mark)?;
                    return Ok(None);
                }
                Found::EndOfBytes => {
                    return Err(broken(&self.blob, self.position, NO_END_MARK.into()));
                }
            }
        }
    }
}

/// The key and the suffix of a member; none when it belongs to no sample.
fn key_and_suffix(name: &str) -> Option<(&str, &str)> {
    base_plus_ext(name).filter(|_| !is_shard_metadata(name))
}

fn broken(blob: &Blob, offset: u64, detail: String) -> Error {
    Error::BrokenShard { shard: blob.location().to_owned(), offset, detail }
}

fn explain(blob: &Blob, base: u64, failure: Failure) -> Error {
    match failure {
        Failure::Broken { at, detail } => broken(blob, base + at, detail),
        Failure::Io(cause) => Error::Io { path: blob.location().into(), cause },
    }
}

/// Where the end mark of an archive begins, sought from the header at `at` on.
///
/// # Errors
/// [`Error::BrokenShard`] when there is none, [`Error::Io`].
pub(crate) fn end_mark(blob: &Blob, mut at: u64) -> Result<u64> {
    loop {
        match next_file(blob, at).map_err(|failure| explain(blob, 0, failure))? {
            Found::File(file) => at = file.end,
            Found::EndMark(mark) => return Ok(mark),
            Found::EndOfBytes => return Err(broken(blob, at, NO_END_MARK.into())),
        }
    }
}

/// An archive ends with zeros. What else is behind them would be lost without a word: the header before it is zeroed, or
/// archives were joined.
fn nothing_follows(blob: &Blob, mark: u64) -> Result<()> {
    const AT_ONCE: u64 = 1 << 20;
    let mut at = mark;
    while at < blob.len() {
        let count = AT_ONCE.min(blob.len() - at);
        let bytes =
            blob.read(at, count).map_err(|cause| Error::Io { path: blob.location().into(), cause })?;
        if let Some(place) = bytes.iter().position(|&byte| byte != 0) {
            let detail = format!(
                "an end mark, and something that is not zero behind it, at byte {}: a header was lost, or archives were joined",
                at + place as u64
            );
            return Err(broken(blob, mark, detail));
        }
        at += count;
    }
    Ok(())
}

/// Whether a block is a member's header: its checksum says so.
pub(super) fn is_header(block: &[u8]) -> bool {
    check_sum(block).is_ok()
}

/// Reads the sample at `place`.
///
/// # Errors
/// [`Error::Io`] and [`Error::BrokenShard`], also when the file has changed since it was scanned.
pub(super) fn read_sample(blob: &Blob, place: Extent) -> Result<RawSample> {
    let broken = |detail: String| broken(blob, place.offset, detail);
    let bytes = blob.read(place.offset, place.bytes).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => broken(error.to_string()),
        _ => Error::Io { path: blob.location().into(), cause: error },
    })?;
    // Members share the bytes that were read.
    let bytes = Bytes::from(bytes);
    let mut sample: Option<RawSample> = None;
    let mut at = 0;
    loop {
        let found = next_file(&bytes[..], at).map_err(|failure| explain(blob, place.offset, failure))?;
        let Found::File(file) = found else { break };
        at = file.end;
        let Some((key, suffix)) = key_and_suffix(&file.name) else { continue };
        let sample = sample.get_or_insert_with(|| RawSample::new(key, Vec::new()));
        if sample.key != key {
            return Err(broken(format!("found the key `{key}` inside the sample `{}`", sample.key)));
        }
        let suffix = suffix.to_ascii_lowercase();
        let content = file.data as usize..(file.data + file.size) as usize;
        sample.members.push(Member { suffix, data: bytes.slice(content), name: file.name });
    }
    sample.ok_or_else(|| broken("there is no sample".into()))
}
