//! A file of JSON lines that outlasts a full disk, a kill within a line, and a run that goes back.
//!
//! Called by [`super::Events`], which says what is written and what is forgotten.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tracing::warn;

use super::appender::Appender;
use crate::error::{Error, Result};

/// A file of JSON lines.
pub(super) struct Lines(Appender);

impl Lines {
    /// Opened to write to, with the lines to `keep`.
    pub(super) fn open(path: PathBuf, keep: impl Fn(&Value) -> bool) -> Result<Self> {
        keep_if(&path, keep)?;
        Appender::open(path).map(Self)
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes away all but the lines to `keep`.
    pub(super) fn keep_if(&mut self, keep: impl Fn(&Value) -> bool) -> Result<()> {
        self.0.catch_up()?;
        keep_if(self.0.path(), keep)?;
        self.0.open_again()
    }

    pub(super) fn write(&mut self, line: &Value) {
        self.0.write(format!("{line}\n").as_bytes());
    }

    /// Writes what could not be written before.
    pub(super) fn catch_up(&mut self) -> Result<()> {
        self.0.catch_up()
    }
}

/// The lines of a file, without one that is cut off, in their order; none where there is no file.
pub(super) fn read(path: &Path) -> Result<impl Iterator<Item = Result<Value>>> {
    let file = match File::open(path) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io(path)(error)),
    };
    let path = path.to_owned();
    let lines = file.into_iter().flat_map(|file| BufReader::new(file).split(b'\n'));
    Ok(lines.filter_map(move |line| match line.map_err(Error::io(&path)) {
        Ok(line) => serde_json::from_slice(&line).ok().map(Ok),
        Err(error) => Some(Err(error)),
    }))
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
    let (mut kept, mut damaged) = (Vec::new(), Vec::new());
    let (mut file, mut line) = (BufReader::new(file), Vec::new());
    // Bytes: a line may be cut within a character.
    for number in 1.. {
        line.clear();
        if file.read_until(b'\n', &mut line).map_err(Error::io(path))? == 0 {
            break;
        }
        let is_ended = line.pop_if(|last| *last == b'\n').is_some();
        match serde_json::from_slice::<Value>(&line) {
            Ok(known) if keep(&known) => {
                kept.extend_from_slice(&line);
                kept.push(b'\n');
            }
            Err(_) if is_ended => damaged.push(number),
            // Not to be kept, or cut off in writing.
            _ => {}
        }
    }
    if let Some(first) = damaged.first() {
        warn!(
            "{}: {} damaged lines are taken out, the first is line {first}; the run's checkpoints are not concerned",
            path.display(),
            damaged.len()
        );
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

        // Damaged lines were taken out without a word, and lines behind them are none of theirs. The last one is whole.
        fs::write(&path, "x{\"step\":1}\n{\"step\":2}\n\n{\"step\":1}").unwrap();
        keep_if(&path, |line| is_at_most(line, "step", 2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":2}\n{\"step\":1}\n");

        // Within a character, as a kill or a full disk cuts it.
        let whole = "{\"step\":1,\"source\":\"\u{e9}\"}\n";
        fs::write(&path, [whole.as_bytes(), &whole.as_bytes()[..21]].concat()).unwrap();
        assert!(fs::read_to_string(&path).is_err(), "it is cut within the letter");
        keep_if(&path, |line| is_at_most(line, "step", 2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    }
}
