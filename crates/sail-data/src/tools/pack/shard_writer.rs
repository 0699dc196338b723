//! Writes one tar shard with bytes that depend on its members alone: no time, no owner.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::manifest::DoneShard;
use super::sample::Keys;
use crate::tools::error::{Result, ToolError};
use crate::tools::files::{publish, temporary};

const BLOCK: u64 = 512;

/// A shard that is being written, under a temporary name.
pub(super) struct ShardWriter {
    path: PathBuf,
    unfinished: PathBuf,
    archive: tar::Builder<Summing<BufWriter<File>>>,
    pub(super) samples: u64,
}

/// Counts and sums up what passes.
#[derive(Debug)]
struct Summing<T> {
    inner: T,
    bytes: u64,
    crc: crc32fast::Hasher,
}

impl<T> Summing<T> {
    fn new(inner: T) -> Self {
        Self { inner, bytes: 0, crc: crc32fast::Hasher::new() }
    }

    fn note(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.crc.update(bytes);
    }
}

impl<T: Write> Write for Summing<T> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.note(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Summing<T> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.note(&buf[..n]);
        Ok(n)
    }
}

/// Bytes that a sample takes in a shard.
pub(super) fn size(members: &[(String, Vec<u8>)]) -> u64 {
    members.iter().map(|(_, data)| BLOCK + (data.len() as u64).next_multiple_of(BLOCK)).sum()
}

impl ShardWriter {
    /// Begins a shard that will be called `path`.
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        let unfinished = temporary(&path);
        let file = File::create(&unfinished).map_err(ToolError::io("write", &path))?;
        let archive = tar::Builder::new(Summing::new(BufWriter::with_capacity(1 << 20, file)));
        Ok(Self { path, unfinished, archive, samples: 0 })
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.archive.get_ref().bytes
    }

    /// Appends a sample.
    pub(super) fn append(&mut self, members: &[(String, Vec<u8>)]) -> Result<()> {
        for (name, data) in members {
            let mut header = tar::Header::new_ustar();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            let mut append = |archive: &mut tar::Builder<_>| {
                header.set_path(name)?;
                header.set_cksum();
                archive.append(&header, data.as_slice())
            };
            append(&mut self.archive).map_err(ToolError::io("write", &self.path))?;
        }
        self.samples += 1;
        Ok(())
    }

    /// Ends the shard, flushes it to the disk and gives it its name.
    pub(super) fn finish(self) -> Result<DoneShard> {
        let Self { path, unfinished, archive, samples } = self;
        let failed = || ToolError::io("write", &path);
        let mut summing = archive.into_inner().map_err(failed())?;
        summing.flush().map_err(failed())?;
        summing.inner.get_ref().sync_all().map_err(failed())?;
        publish(&unfinished, &path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(DoneShard { name, samples, bytes: summing.bytes, crc32: summing.crc.finalize() })
    }
}

/// Makes sure that a finished shard is as it was written, and notes its keys.
///
/// # Errors
/// [`ToolError::Damaged`].
pub(super) fn verify(folder: &Path, done: &DoneShard, keys: &mut Keys) -> Result<()> {
    let path = folder.join(&done.name);
    let damaged = |detail: String| ToolError::Damaged { shard: path.clone(), detail };
    let cannot = |error: std::io::Error| damaged(format!("cannot be read: {error}"));
    let file = File::open(&path).map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    if bytes != done.bytes {
        return Err(damaged(format!("has {bytes} bytes, {} were written", done.bytes)));
    }
    let mut summing = Summing::new(std::io::BufReader::with_capacity(1 << 20, file));
    let mut archive = tar::Archive::new(&mut summing);
    for entry in archive.entries().map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry.path_bytes();
        if let Some(key) = name.strip_suffix(b".json") {
            keys.note(&String::from_utf8_lossy(key));
        }
    }
    std::io::copy(&mut summing, &mut std::io::sink()).map_err(cannot)?;
    if summing.crc.finalize() != done.crc32 {
        return Err(damaged("has other contents than were written".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path) -> DoneShard {
        let mut writer = ShardWriter::create(folder.join("a-000000.tar")).unwrap();
        let members = [("k.json".to_owned(), b"{}".to_vec()), ("k.jpg".to_owned(), vec![7; 600])];
        writer.append(&members).unwrap();
        assert_eq!(writer.bytes(), size(&members));
        writer.finish().unwrap()
    }

    #[test]
    fn a_finished_shard_verifies_until_it_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let done = write(dir.path());
        assert_eq!((done.bytes, done.samples), (512 + 512 + 512 + 1024 + 1024, 1));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        let mut keys = Keys::default();
        verify(dir.path(), &done, &mut keys).unwrap();
        assert!(!keys.note("k"), "its key is in use");

        let path = dir.path().join(&done.name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[1600] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let message = verify(dir.path(), &done, &mut keys).unwrap_err().to_string();
        assert!(message.contains("other contents"), "{message}");
        std::fs::write(&path, &bytes[..100]).unwrap();
        let message = verify(dir.path(), &done, &mut keys).unwrap_err().to_string();
        assert!(message.contains("has 100 bytes"), "{message}");
        std::fs::remove_file(&path).unwrap();
        assert!(verify(dir.path(), &done, &mut keys).is_err());
    }

    #[test]
    fn the_same_members_give_the_same_bytes() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(write(one.path()), write(two.path()));
        let read = |dir: &tempfile::TempDir| std::fs::read(dir.path().join("a-000000.tar")).unwrap();
        assert_eq!(read(&one), read(&two));
    }
}
