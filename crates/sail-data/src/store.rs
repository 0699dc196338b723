//! Where shards lie and how their bytes are read. Everything in this crate that reads a shard comes through here.

use std::fs::File;
use std::io::{Error as IoError, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use webdataset::braceexpand;

use crate::error::{Error, Result};
use crate::spec::StoreSpec;

/// Opens shards.
#[derive(Clone, Debug, Default)]
pub(crate) struct Store;

impl Store {
    /// A store with these limits.
    ///
    /// # Errors
    /// None yet.
    #[expect(clippy::unnecessary_wraps, reason = "opening remote stores can fail")]
    pub(crate) fn new(_spec: &StoreSpec) -> Result<Self> {
        Ok(Self)
    }

    /// The files that a pattern names: braces are expanded, then globs; each must match.
    ///
    /// # Errors
    /// [`Error::Pattern`], [`Error::NoShards`], [`Error::Io`].
    #[expect(clippy::unused_self, reason = "remote patterns need the store")]
    pub(crate) fn find(&self, name: &str, pattern: &str) -> Result<Vec<String>> {
        let malformed =
            |detail: String| Error::Pattern { name: name.into(), pattern: pattern.into(), detail };
        if pattern.contains("://") {
            return Err(malformed("only local files can be read".into()));
        }
        let mut found = Vec::new();
        for path in braceexpand(pattern).map_err(|e| malformed(e.to_string()))? {
            let before = found.len();
            for file in glob::glob(&path).map_err(|e| malformed(e.to_string()))? {
                let file = file.map_err(|e| Error::Io { path: e.path().into(), cause: e.into() })?;
                let file = file.into_os_string().into_string();
                found.push(file.map_err(|name| malformed(format!("{} is not UTF-8", name.display())))?);
            }
            if found.len() == before {
                return Err(Error::NoShards { name: name.into(), pattern: pattern.into(), missing: path });
            }
        }
        Ok(found)
    }

    /// Opens a shard for reading at any offset.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or is no regular file.
    #[expect(clippy::unused_self, reason = "remote shards need the store")]
    pub(crate) fn open(&self, location: &str) -> Result<Arc<Blob>> {
        let io = |cause| Error::Io { path: location.into(), cause };
        if !std::fs::metadata(location).map_err(io)?.is_file() {
            return Err(io(IoError::other("not a regular file")));
        }
        let file = File::open(location).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        Ok(Arc::new(Blob { location: location.to_owned(), file, length }))
    }
}

/// The bytes of one shard.
#[derive(Debug)]
pub(crate) struct Blob {
    location: String,
    file: File,
    length: u64,
}

impl Blob {
    /// Its path or URL.
    pub(crate) fn location(&self) -> &str {
        &self.location
    }

    /// Its size in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// Reads some bytes at `offset`; none at the end.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    /// Reads `bytes` bytes at `offset`.
    pub(crate) fn read(&self, offset: u64, bytes: u64) -> std::io::Result<Vec<u8>> {
        let there = self.length.saturating_sub(offset);
        if bytes > there {
            let detail = format!("{bytes} bytes wanted at {offset}, {there} are there");
            return Err(IoError::new(ErrorKind::UnexpectedEof, detail));
        }
        let mut data = vec![0; bytes as usize];
        self.read_exact_at(offset, &mut data)?;
        Ok(data)
    }

    /// Fills `buf` from `offset` on.
    pub(crate) fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.read_at(offset + filled as u64, &mut buf[filled..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
        }
        Ok(())
    }
}
