//! The records of a JSON file, one at a time: the lines of JSON lines, or the elements of one array.
//!
//! Records are cut out by their brackets and quotes and parsed elsewhere, so that a broken one does not hide
//! the others, and a file of any size needs the memory of its largest record.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::tools::error::{Result, ToolError};

/// A larger record is a file that is not what it says.
const MOST_BYTES: usize = 256 << 20;

/// One record, as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawRecord {
    /// Where it begins.
    pub(super) offset: u64,
    pub(super) text: Vec<u8>,
}

/// Cuts a file into records.
#[derive(Debug)]
pub(super) struct Records {
    path: PathBuf,
    reader: BufReader<File>,
    /// Bytes taken from the file.
    offset: u64,
    array: bool,
    /// Whether the array's end, or that of the file, has been met.
    done: bool,
}

impl Records {
    /// Opens a file at its beginning, or at the offset of one of its records.
    pub(super) fn open(path: &Path, offset: u64) -> Result<Self> {
        let failed = || ToolError::io("read", path);
        let reader = BufReader::with_capacity(1 << 16, File::open(path).map_err(failed())?);
        let mut records = Self { path: path.to_owned(), reader, offset: 0, array: false, done: false };
        // Editors on Windows begin a file with a byte order mark.
        records.skip(|byte| byte.is_ascii_whitespace() || [0xef, 0xbb, 0xbf].contains(&byte))?;
        records.array = records.peek()? == Some(b'[');
        if offset > records.offset {
            records.reader.seek(SeekFrom::Start(offset)).map_err(failed())?;
            records.offset = offset;
        } else if records.array {
            records.take(1);
        }
        Ok(records)
    }

    /// The next record; `None` at the end.
    ///
    /// # Errors
    /// [`ToolError::BrokenJson`] where the array itself is malformed.
    pub(super) fn next(&mut self) -> Result<Option<RawRecord>> {
        if self.done {
            return Ok(None);
        }
        let record = if self.array { self.element()? } else { self.line()? };
        self.done = record.is_none();
        Ok(record)
    }

    fn line(&mut self) -> Result<Option<RawRecord>> {
        loop {
            let (offset, mut text) = (self.offset, Vec::new());
            loop {
                let chunk = fill(&mut self.reader, &self.path)?;
                if chunk.is_empty() {
                    break;
                }
                let end = chunk.iter().position(|&byte| byte == b'\n');
                let taken = end.map_or(chunk.len(), |end| end + 1);
                text.extend_from_slice(&chunk[..taken]);
                self.take(taken);
                self.check_size(offset, &text)?;
                if end.is_some() {
                    break;
                }
            }
            if text.is_empty() {
                return Ok(None);
            }
            if !text.trim_ascii().is_empty() {
                return Ok(Some(RawRecord { offset, text: text.trim_ascii().to_vec() }));
            }
        }
    }

    fn element(&mut self) -> Result<Option<RawRecord>> {
        self.skip(|byte| byte.is_ascii_whitespace() || byte == b',')?;
        match self.peek()? {
            Some(b']') => {
                self.take(1);
                self.skip(|byte| byte.is_ascii_whitespace())?;
                match self.peek()? {
                    None => Ok(None),
                    Some(_) => Err(self.broken(self.offset, "something follows the end of the array")),
                }
            }
            None => Err(self.broken(self.offset, "the array has no end; is the file cut short?")),
            Some(_) => self.value().map(Some),
        }
    }

    /// Everything up to the comma or bracket that ends an element.
    fn value(&mut self) -> Result<RawRecord> {
        let (offset, mut text) = (self.offset, Vec::new());
        let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
        loop {
            let chunk = fill(&mut self.reader, &self.path)?;
            if chunk.is_empty() {
                return Err(self.broken(offset, "the element that begins here has no end"));
            }
            let mut ends = None;
            for (index, &byte) in chunk.iter().enumerate() {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if quoted => escaped = true,
                    b'"' => quoted = !quoted,
                    _ if quoted => {}
                    b'[' | b'{' => depth += 1,
                    b',' | b']' if depth == 0 => {
                        ends = Some(index);
                        break;
                    }
                    b']' | b'}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
            }
            let taken = ends.unwrap_or(chunk.len());
            text.extend_from_slice(&chunk[..taken]);
            self.take(taken);
            self.check_size(offset, &text)?;
            if ends.is_some() {
                return Ok(RawRecord { offset, text: text.trim_ascii().to_vec() });
            }
        }
    }

    fn check_size(&self, offset: u64, text: &[u8]) -> Result<()> {
        if text.len() <= MOST_BYTES {
            return Ok(());
        }
        Err(self.broken(offset, "the record that begins here has more than 256 MiB"))
    }

    fn skip(&mut self, unwanted: impl Fn(u8) -> bool) -> Result<()> {
        loop {
            let chunk = fill(&mut self.reader, &self.path)?;
            let taken = chunk.iter().take_while(|&&byte| unwanted(byte)).count();
            let more = taken > 0 && taken == chunk.len();
            self.take(taken);
            if !more {
                return Ok(());
            }
        }
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        Ok(fill(&mut self.reader, &self.path)?.first().copied())
    }

    fn take(&mut self, bytes: usize) {
        self.reader.consume(bytes);
        self.offset += bytes as u64;
    }

    fn broken(&self, offset: u64, detail: &str) -> ToolError {
        ToolError::BrokenJson { path: self.path.clone(), offset, detail: detail.into() }
    }
}

fn fill<'a>(reader: &'a mut BufReader<File>, path: &Path) -> Result<&'a [u8]> {
    reader.fill_buf().map_err(ToolError::io("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(contents: &str, offset: u64) -> Result<Vec<(u64, String)>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(&path, contents).unwrap();
        let mut records = Records::open(&path, offset)?;
        let mut list = Vec::new();
        while let Some(record) = records.next()? {
            list.push((record.offset, String::from_utf8(record.text).unwrap()));
        }
        assert_eq!(records.next()?, None, "the end is the end");
        Ok(list)
    }

    #[test]
    fn lines_and_elements_are_the_same_records() {
        let own = |list: &[(u64, &str)]| -> Vec<(u64, String)> {
            list.iter().map(|&(offset, text)| (offset, text.to_owned())).collect()
        };
        assert_eq!(
            read("{\"a\":1}\n\n  {\"b\":2} \r\n3", 0).unwrap(),
            own(&[(0, "{\"a\":1}"), (9, "{\"b\":2}"), (21, "3")])
        );
        assert_eq!(
            read(" [{\"a\":\"],[\\\"}\"} ,\n{\"b\":[[1],{}]},7]\n", 0).unwrap(),
            own(&[(2, "{\"a\":\"],[\\\"}\"}"), (19, "{\"b\":[[1],{}]}"), (34, "7")])
        );
        assert_eq!(read("\u{feff}[7]", 0).unwrap(), own(&[(4, "7")]));
        for empty in ["", " \n", "[]", " [ ] "] {
            assert_eq!(read(empty, 0).unwrap(), [], "{empty:?}");
        }
    }

    #[test]
    fn a_broken_array_is_an_error_with_its_place() {
        for (contents, offset, part) in [
            ("[1, {\"a\"", 4, "no end"),
            ("[1,", 3, "cut short"),
            ("[1] 2", 4, "follows"),
            ("[\"a", 1, "no end"),
        ] {
            match read(contents, 0).unwrap_err() {
                ToolError::BrokenJson { offset: at, detail, .. } => {
                    assert!(at == offset && detail.contains(part), "{contents}: {at} {detail}");
                }
                other => panic!("{other}"),
            }
        }
    }

    proptest! {
        #[test]
        fn reading_goes_on_at_any_record(values in prop::collection::vec(prop::collection::vec("[a-z\\[\\]{},\"\\\\ é]{0,9}", 0..4), 1..12), array in any::<bool>()) {
            let texts: Vec<String> = values.iter().map(|value| serde_json::json!({"v": value}).to_string()).collect();
            let contents = if array { format!("[\n{}\n]", texts.join(" ,\n")) } else { texts.join("\n") };
            let all = read(&contents, 0).unwrap();
            prop_assert_eq!(all.iter().map(|(_, text)| text).collect::<Vec<_>>(), texts.iter().collect::<Vec<_>>());
            for (index, &(offset, _)) in all.iter().enumerate() {
                prop_assert_eq!(&read(&contents, offset).unwrap(), &all[index..]);
            }
        }
    }
}
