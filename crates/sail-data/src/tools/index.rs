//! Writes the index of a tar shard; `shard::index` says what that is and reads it.

use std::path::Path;

use super::error::Result;
use super::files::write_atomically;
use crate::shard::end_mark;
use crate::shard::index::index_path;
use crate::source::Source;

/// Writes `{shard}.idx` beside shard number `shard` of `source`. Gives its path and the number of samples.
///
/// # Errors
/// Those of the shard, which must be whole, and of writing.
pub(crate) fn write_index(source: &Source, shard: usize) -> Result<(String, u64)> {
    let path = &source.shards[shard];
    let mut scanner = source.open(shard)?.scan(0, 0);
    let (mut bytes, mut end) = (Vec::new(), 0);
    while let Some(extent) = scanner.next_sample()? {
        bytes.extend_from_slice(&extent.offset.to_le_bytes());
        end = extent.offset + extent.bytes;
    }
    let mark = end_mark(source.store.open(path)?.as_ref(), end)?;
    bytes.extend_from_slice(&mark.to_le_bytes());
    let index = index_path(path);
    write_atomically(Path::new(&index), &bytes)?;
    Ok((index, bytes.len() as u64 / 8 - 1))
}
