//! A file that is only written at its end, and outlasts a full disk: what does not fit is kept in memory until it does.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::error::{Error, Result};

/// Such a file.
pub(super) struct Appender {
    path: PathBuf,
    file: File,
    /// What could not be written to it yet.
    unwritten: Vec<u8>,
}

impl Appender {
    /// Opened, and made where it is not there.
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let file = open(&path)?;
        Ok(Self { path, file, unwritten: Vec::new() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Another file is at its path now.
    pub(super) fn open_again(&mut self) -> Result<()> {
        self.file = open(&self.path)?;
        Ok(())
    }

    /// A disk that is full now may not be so later: the run goes on, and what it writes is kept until then.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        let was_behind = !self.unwritten.is_empty();
        self.unwritten.extend(bytes);
        if let Err(error) = self.catch_up()
            && !was_behind
        {
            warn!("{error}; what is written to it is kept in memory until there is room");
        }
    }

    /// Writes what could not be written before.
    pub(super) fn catch_up(&mut self) -> Result<()> {
        write_what_fits(&mut self.file, &mut self.unwritten).map_err(Error::io(&self.path))
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))
}

/// Writes, and takes away, as many bytes as the system takes.
fn write_what_fits(file: &mut impl Write, bytes: &mut Vec<u8>) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => drop(bytes.drain(..written)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_full_disk_does_not_take_is_written_later() {
        /// Takes as many bytes as there is room for.
        struct Disk(Vec<u8>, usize);
        impl Write for Disk {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let fits = bytes.len().min(self.1 - self.0.len());
                self.0.extend(&bytes[..fits]);
                if fits == 0 { Err(ErrorKind::StorageFull.into()) } else { Ok(fits) }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (mut disk, mut lines) = (Disk(vec![], 5), b"one\ntwo\n".to_vec());
        assert!(write_what_fits(&mut disk, &mut lines).is_err());
        assert_eq!(lines, b"wo\n");
        lines.extend(b"three\n");
        disk.1 = 100;
        write_what_fits(&mut disk, &mut lines).unwrap();
        assert!(lines.is_empty());
        assert_eq!(disk.0, b"one\ntwo\nthree\n");
    }
}
