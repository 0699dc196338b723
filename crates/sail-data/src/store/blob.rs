//! The plain content of one shard, wherever it lies: positioned reads, nothing of tar.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::FileExt;

use rustix::buffer::spare_capacity;
use rustix::io::{Errno, pread};

use super::blocks::RemoteContent;

/// A shard's plain content. Reads may come from many threads at once.
#[derive(Debug)]
pub(crate) struct Blob {
    location: String,
    content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    File {
        file: File,
        len: u64,
        /// Bytes of disk that become free when it is closed: those of a file without a name.
        held_bytes: u64,
        /// Whether it was fetched or decompressed to be opened.
        costly: bool,
    },
    Remote(RemoteContent),
}

impl Content {
    /// A file that was made for this.
    pub(super) fn made(location: &str, file: File, held_bytes: u64) -> crate::error::Result<Self> {
        let about = file.metadata();
        let len = about.map_err(|cause| crate::error::Error::Io { path: location.into(), cause })?.len();
        Ok(Self::File { file, len, held_bytes, costly: true })
    }
}

impl Blob {
    pub(super) fn new(location: &str, content: Content) -> Self {
        Self { location: location.to_owned(), content }
    }

    /// The path or URL under which it was opened.
    pub(crate) fn location(&self) -> &str {
        &self.location
    }

    /// Bytes of the plain content.
    pub(crate) fn len(&self) -> u64 {
        match &self.content {
            Content::File { len, .. } => *len,
            Content::Remote(remote) => remote.len(),
        }
    }

    /// Reads up to `buf.len()` bytes at `offset`; 0 at the end. For walking through a shard: remote content
    /// is fetched in whole blocks, ahead of the walk.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match &self.content {
            Content::File { file, .. } => loop {
                match file.read_at(buf, offset) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    result => return result,
                }
            },
            Content::Remote(remote) => remote.read_at(offset, buf),
        }
    }

    /// Fills `buf` from `offset` on, as [`Blob::read_at`] does.
    ///
    /// # Errors
    /// `UnexpectedEof` when the content ends before that.
    pub(crate) fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.read_at(offset + filled as u64, &mut buf[filled..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
        }
        Ok(())
    }

    /// Reads exactly `len` bytes at `offset`. For a single sample: of remote content, only what is not in
    /// memory yet is fetched.
    ///
    /// # Errors
    /// `UnexpectedEof` when the content ends before that.
    pub(crate) fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let end = offset.checked_add(len).filter(|&end| end <= self.len());
        if end.is_none() {
            let detail = format!("{len} bytes at {offset} are asked for, and it has {}", self.len());
            return Err(Error::new(ErrorKind::UnexpectedEof, detail));
        }
        match &self.content {
            Content::File { file, .. } => {
                // Into memory that was not cleared before: clearing costs a third of reading from the page cache.
                let mut bytes = Vec::with_capacity(len as usize);
                while (bytes.len() as u64) < len {
                    let at = offset + bytes.len() as u64;
                    match pread(file, spare_capacity(&mut bytes), at) {
                        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                bytes.truncate(len as usize);
                Ok(bytes)
            }
            Content::Remote(remote) => remote.read(offset, len as usize),
        }
    }

    /// Bytes of disk that become free when it is closed.
    pub(super) fn held_bytes(&self) -> u64 {
        match self.content {
            Content::File { held_bytes, .. } => held_bytes,
            Content::Remote(_) => 0,
        }
    }

    /// Whether opening it anew takes more than a system call.
    pub(super) fn is_costly(&self) -> bool {
        !matches!(self.content, Content::File { costly: false, .. })
    }
}
