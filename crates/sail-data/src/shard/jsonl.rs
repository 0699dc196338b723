//! JSON lines: one annotation a line, its images in files beside them.
//!
//! A line's place is its byte range, so a scan goes on from any line and reads none before it.

use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use super::{Extent, Member, RawSample};
use crate::error::{Error, Result};
use crate::store::Blob;

/// Most bytes of a line; a file without line ends is no JSON lines.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// Most bytes of an `id` that serves as a key.
const MAX_KEY_BYTES: usize = 256;
const WINDOW_BYTES: u64 = 64 << 10;
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Yields the extents of the lines of one file, in order.
#[derive(Debug)]
pub(super) struct LineScanner {
    blob: Arc<Blob>,
    /// Where the next line begins.
    position: u64,
    /// Lines yielded so far, counted from the beginning of the shard; blank ones do not count.
    ordinal: u64,
    /// Bytes read already, from `window_at` on.
    window: Vec<u8>,
    window_at: u64,
}

impl LineScanner {
    /// Goes on at the offset of line number `ordinal`.
    pub(super) fn new(blob: Arc<Blob>, offset: u64, ordinal: u64) -> Self {
        Self { blob, position: offset, ordinal, window: Vec::new(), window_at: 0 }
    }

    /// Where the next line begins, or the search for it goes on.
    pub(super) fn offset(&self) -> u64 {
        self.position
    }

    /// The number of the next line that is not blank.
    pub(super) fn ordinal(&self) -> u64 {
        self.ordinal
    }

    /// The next line that is not blank.
    ///
    /// # Errors
    /// [`Error::BrokenShard`] when a line is too long, [`Error::Io`].
    pub(super) fn next_sample(&mut self) -> Result<Option<Extent>> {
        while self.position < self.blob.len() {
            let start = self.position;
            let (mut end, mut blank) = (start, true);
            loop {
                let piece = self.window_from(end)?;
                let stop = piece.iter().position(|&byte| byte == b'\n');
                let mut line = &piece[..stop.unwrap_or(piece.len())];
                if end == 0 {
                    line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
                }
                blank &= line.iter().all(u8::is_ascii_whitespace);
                end += stop.unwrap_or(piece.len()) as u64;
                if end - start > MAX_LINE_BYTES {
                    let line = self.ordinal + 1;
                    let detail = format!(
                        "line {line} (blank ones not counted) has more than {MAX_LINE_BYTES} bytes; is it JSON lines?"
                    );
                    return Err(self.broken(start, detail));
                }
                if stop.is_some() || end >= self.blob.len() {
                    break;
                }
            }
            self.position = (end + 1).min(self.blob.len());
            if !blank {
                self.ordinal += 1;
                return Ok(Some(Extent { offset: start, bytes: end - start }));
            }
        }
        Ok(None)
    }

    /// Some bytes from `at` on, which lies inside the file.
    fn window_from(&mut self, at: u64) -> Result<&[u8]> {
        let inside = at.checked_sub(self.window_at).filter(|&skip| skip < self.window.len() as u64);
        if inside.is_none() {
            let bytes = WINDOW_BYTES.min(self.blob.len() - at);
            self.window = self.blob.read(at, bytes).map_err(|cause| self.unread(at, cause))?;
            self.window_at = at;
        }
        Ok(&self.window[inside.unwrap_or(0) as usize..])
    }

    fn broken(&self, offset: u64, detail: String) -> Error {
        Error::BrokenShard { shard: self.blob.location().to_owned(), offset, detail }
    }

    fn unread(&self, at: u64, cause: std::io::Error) -> Error {
        match cause.kind() {
            ErrorKind::UnexpectedEof => self.broken(at, "it became shorter while it was read".into()),
            _ => Error::Io { path: self.blob.location().into(), cause },
        }
    }
}

/// Reads the line at `place`.
///
/// # Errors
/// [`Error::Io`], and [`Error::BrokenShard`] when there is no line any more.
pub(super) fn read_sample(blob: &Blob, place: Extent) -> Result<RawSample> {
    let broken = |detail: &str| Error::BrokenShard {
        shard: blob.location().to_owned(),
        offset: place.offset,
        detail: detail.to_owned(),
    };
    // One byte before and one behind tell whether it is a line.
    let before = u64::from(place.offset > 0);
    let wanted = before.saturating_add(place.bytes).saturating_add(1);
    let start = place.offset - before;
    let bytes = wanted.min(blob.len().saturating_sub(start));
    let changed = || broken("there is no line any more; has the file changed?");
    let line = blob.read(start, bytes).map_err(|cause| match cause.kind() {
        ErrorKind::UnexpectedEof => changed(),
        _ => Error::Io { path: blob.location().into(), cause },
    })?;
    let (head, line) = line.split_at_checked(before as usize).ok_or_else(changed)?;
    let (line, tail) = line.split_at_checked(place.bytes as usize).ok_or_else(changed)?;
    if [head, tail].iter().any(|edge| !matches!(edge, [] | [b'\n'])) || line.contains(&b'\n') {
        return Err(changed());
    }
    let line = if place.offset == 0 { line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line) } else { line };
    let key = own_key(line).unwrap_or_else(|| format!("{}@{}", stem(blob.location()), place.offset));
    let mut sample = RawSample::new(&key, Vec::new());
    sample.members.push(Member {
        name: key,
        suffix: "json".into(),
        data: Bytes::copy_from_slice(line.trim_ascii()),
    });
    Ok(sample)
}

#[derive(Deserialize)]
struct WithId {
    id: Id,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Text(String),
    Number(i64),
}

/// The `id` of an annotation, where it can serve as a key.
fn own_key(line: &[u8]) -> Option<String> {
    let id = match serde_json::from_slice::<WithId>(line).ok()?.id {
        Id::Text(id) => id,
        Id::Number(id) => id.to_string(),
    };
    let fit = (1..=MAX_KEY_BYTES).contains(&id.len()) && !id.contains(char::is_control);
    fit.then_some(id)
}

/// The name of the file without its extension.
fn stem(location: &str) -> &str {
    let name = location.rsplit('/').next().unwrap_or(location);
    name.split_once('.').map_or(name, |(stem, _)| stem)
}
