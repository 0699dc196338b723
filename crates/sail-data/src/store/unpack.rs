//! Compressed shards: recognised by their first bytes and decompressed once, as a stream, into a file.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use flate2::read::MultiGzDecoder;

use super::transfer::unwrap_io;
use crate::error::{Error, Result};

const CHUNK_BYTES: usize = 1 << 20;
/// Longest look at the beginning of a shard that is needed to recognise its compression.
pub(super) const MAGIC_BYTES: usize = 4;
/// The limit of decompressed shards without a cache: more than any sensible shard.
pub(super) const GENEROUS_BYTES: u64 = 64 << 30;

/// A compression that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Gzip,
    Zstd,
}

impl Codec {
    /// The compression of a shard that begins with these bytes; `None` for a plain one.
    ///
    /// # Errors
    /// [`Error::CompressedShard`] for compressions that are known but not read.
    pub(super) fn of(location: &str, first: &[u8]) -> Result<Option<Self>> {
        let refused = match first {
            [0x1f, 0x8b, ..] => return Ok(Some(Self::Gzip)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => return Ok(Some(Self::Zstd)),
            [b'B', b'Z', b'h', ..] => "bzip2",
            [0xfd, b'7', b'z', b'X', ..] => "xz",
            _ => return Ok(None),
        };
        Err(Error::CompressedShard { shard: location.to_owned(), codec: refused })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// Decompresses all of `source` to the end of `file`. `grow` is told each new length in advance.
    ///
    /// # Errors
    /// [`Error::BadCompression`], what `grow` says, and what the source fails with.
    pub(super) fn unpack(
        self,
        location: &str,
        source: impl Read,
        file: &mut File,
        mut grow: impl FnMut(u64) -> Result<()>,
    ) -> Result<u64> {
        let bad = |error: std::io::Error| Error::BadCompression {
            location: location.to_owned(),
            codec: self.name(),
            detail: error.to_string(),
        };
        let mut plain: Box<dyn Read> = match self {
            Self::Gzip => Box::new(MultiGzDecoder::new(source)),
            Self::Zstd => Box::new(zstd::Decoder::new(source).map_err(bad)?),
        };
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut length = 0;
        loop {
            let n = match plain.read(&mut chunk) {
                Ok(0) => return Ok(length),
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(unwrap_io(error, bad)),
            };
            length += n as u64;
            grow(length)?;
            file.write_all(&chunk[..n]).map_err(|cause| Error::Io {
                path: PathBuf::from(format!("{location} (decompressed)")),
                cause,
            })?;
        }
    }
}
