//! A file of JSON lines that outlasts a full disk, a kill within a line, and a run that goes back.
//!
//! Called by [`super::Events`], which says what is written and what is forgotten.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tracing::warn;

use crate::error::{Error, Result};

/// A file of JSON lines.
pub(super) struct Lines {
    pub(super) path: PathBuf,
    file: File,
    /// What could not be written to it yet.
    unwritten: Vec<u8>,
}

impl Lines {
    /// Opened to write to, with the lines to `keep`.
    pub(super) fn open(path: PathBuf, keep: impl Fn(&Value) -> bool) -> Result<Self> {
        keep_if(&path, keep)?;
        let file = Self::append_to(&path)?;
        Ok(Self { path, file, unwritten: Vec::new() })
    }

    fn append_to(path: &Path) -> Result<File> {
        OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))
    }

    /// Takes away all but the lines to `keep`.
    pub(super) fn keep_if(&mut self, keep: impl Fn(&Value) -> bool) -> Result<()> {
        self.catch_up()?;
        keep_if(&self.path, keep)?;
        self.file = Self::append_to(&self.path)?;
        Ok(())
    }

    /// A disk that is full now may not be so later: the run goes on, and its lines are kept until then.
    pub(super) fn write(&mut self, line: &Value) {
        let was_behind = !self.unwritten.is_empty();
        self.unwritten.extend(format!("{line}\n").bytes());
        if let Err(error) = self.catch_up()
            && !was_behind
        {
            warn!("{error}; its lines are kept in memory until they can be written");
        }
    }

    pub(super) fn catch_up(&mut self) -> Result<()> {
        write_what_fits(&mut self.file, &mut self.unwritten).map_err(Error::io(&self.path))
    }
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

pub(super) fn is_at_most(line: &Value, field: &str, last: u64) -> bool {
    line[field].as_u64().is_some_and(|known| known <= last)
}

/// Rewrites a file of lines with those to `keep`, and without a line cut off in writing.
fn keep_if(path: &Path, keep: impl Fn(&Value) -> bool) -> Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let mut kept = Vec::new();
    // Bytes: a line may be cut within a character.
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(Error::io(path))?;
        if serde_json::from_slice::<Value>(&line).is_ok_and(|line| keep(&line)) {
            kept.extend(line);
            kept.push(b'\n');
        }
    }
    let temporary = path.with_extension("tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(&kept)?;
        file.sync_all()
    });
    written.and_then(|()| fs::rename(&temporary, path)).map_err(Error::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_steps_and_cut_lines_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st").unwrap();
        keep_if(&path, |line| is_at_most(line, "step", 2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n");
        keep_if(&dir.path().join("absent"), |_| true).unwrap();

        // Within a character, as a kill or a full disk cuts it.
        let whole = "{\"step\":1,\"source\":\"\u{e9}\"}\n";
        fs::write(&path, [whole.as_bytes(), &whole.as_bytes()[..21]].concat()).unwrap();
        assert!(fs::read_to_string(&path).is_err(), "it is cut within the letter");
        keep_if(&path, |line| is_at_most(line, "step", 2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    }

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
