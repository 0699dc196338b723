//! Results of single samples, a line of JSON each, which outlast a measurement that is killed.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// A file of lines that grows.
pub(super) struct Lines {
    path: PathBuf,
    file: File,
}

impl Lines {
    /// Opens a file to go on after its last whole line, and gives what is in it. Half a line, as a kill leaves it, is cut
    /// off.
    ///
    /// # Errors
    /// When the file cannot be read or written, or a whole line is none of `T`.
    pub(super) fn open<T: DeserializeOwned>(path: &Path) -> Result<(Vec<T>, Self)> {
        let bytes = if path.exists() { fs::read(path).map_err(Error::io(path))? } else { Vec::new() };
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let lines = bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let read = |line| serde_json::from_slice(line).map_err(|error| Error::io(path)(error.into()));
        let done = lines.map(read).collect::<Result<_>>()?;
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))?;
        file.set_len(whole as u64).map_err(Error::io(path))?;
        Ok((done, Self { path: path.to_owned(), file }))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn add(&mut self, line: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(line).expect("invariant: results are numbers and text");
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(Error::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_cut_in_half_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines.jsonl");
        let (done, mut lines) = Lines::open::<String>(&path).unwrap();
        assert!(done.is_empty());
        lines.add(&"one").unwrap();
        lines.add(&"two").unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 3]).unwrap();
        let (done, mut lines) = Lines::open::<String>(&path).unwrap();
        assert_eq!(done, ["one"]);
        lines.add(&"two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        fs::write(&path, "1\n").unwrap();
        assert!(Lines::open::<String>(&path).is_err());
    }
}
