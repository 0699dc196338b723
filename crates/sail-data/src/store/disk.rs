//! Whole shards in a folder of bounded size, which several processes may share.
//!
//! A shard is written to `KEY.part` under an exclusive lock and renamed to `KEY.tar` when it is complete, so
//! whatever has the final name can be read. The length of a part is its reservation: it is set before the
//! first byte when the size is known. Room is made under the lock of the folder, by removing the shards used
//! longest ago and the parts that nobody holds a lock on: those of killed processes. A file that is removed
//! while it is read stays readable, since it is open.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::spec::CacheSpec;

/// Between two looks whether others have finished.
const POLL: Duration = Duration::from_millis(50);
/// How much a shard of unknown size may grow between two times of making room.
const GROWTH_BYTES: u64 = 32 << 20;

#[derive(Debug)]
pub(super) struct DiskCache {
    dir: PathBuf,
    max_bytes: u64,
}

/// A shard on its way into the cache, locked.
#[derive(Debug)]
pub(super) struct Part<'a> {
    cache: &'a DiskCache,
    pub(super) file: File,
    path: PathBuf,
    location: &'a str,
    reserved: u64,
}

/// A file of the cache.
#[derive(Debug)]
struct Entry {
    used: SystemTime,
    path: PathBuf,
    bytes: u64,
}

impl DiskCache {
    pub(super) fn new(spec: &CacheSpec) -> Result<Self> {
        let dir = std::path::absolute(&spec.dir).map_err(io(&spec.dir))?;
        std::fs::create_dir_all(&dir).map_err(io(&dir))?;
        Ok(Self { dir, max_bytes: spec.max_bytes })
    }

    /// The shard of this `identity` (which tells its versions apart), made by `fill` when it is not here.
    ///
    /// # Errors
    /// [`Error::CacheTooSmall`], [`Error::Io`], and what `fill` says; then nothing of it stays.
    pub(super) fn get(
        &self,
        location: &str,
        identity: &str,
        bytes: Option<u64>,
        fill: impl FnOnce(&mut Part<'_>) -> Result<()>,
    ) -> Result<File> {
        let name = key(identity);
        let done = self.dir.join(format!("{name}.tar"));
        let path = self.dir.join(format!("{name}.part"));
        if let Some(bytes) = bytes.filter(|&bytes| bytes > self.max_bytes) {
            return Err(self.too_small(location, bytes));
        }
        let file = match claim(&path, &done)? {
            Claim::Whole(file) => return Ok(file),
            Claim::Part(file) => file,
        };
        let mut part = Part { cache: self, file, path: path.clone(), location, reserved: 0 };
        let filled = part.begin(bytes.unwrap_or(0)).and_then(|()| fill(&mut part));
        if let Err(error) = filled.and_then(|()| part.finish(&done)) {
            // The error is what matters; a leftover is removed by the next who needs room.
            drop(std::fs::remove_file(&path));
            return Err(error);
        }
        // Opened before its name was given, so it is here even if others have removed it since.
        Ok(part.file)
    }

    fn too_small(&self, location: &str, bytes: u64) -> Error {
        Error::CacheTooSmall { location: location.to_owned(), bytes, max_bytes: self.max_bytes }
    }

    /// Removes files until `bytes` more fit beside the others. False when what is left is being written.
    fn make_room(&self, bytes: u64, own: &Path) -> Result<bool> {
        let mut entries = self.entries(own)?;
        entries.sort_by(|a, b| (a.used, &a.path).cmp(&(b.used, &b.path)));
        let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        for entry in &entries {
            if total.saturating_add(bytes) <= self.max_bytes {
                return Ok(true);
            }
            if remove(&entry.path)? {
                total -= entry.bytes;
            }
        }
        Ok(total.saturating_add(bytes) <= self.max_bytes)
    }

    fn entries(&self, own: &Path) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(io(&self.dir))? {
            let path = entry.map_err(io(&self.dir))?.path();
            if path == own || !is_ours(&path) {
                continue;
            }
            match path.metadata() {
                Ok(about) => {
                    let used = about.modified().map_err(io(&path))?;
                    entries.push(Entry { used, bytes: about.len(), path });
                }
                // Another process was quicker.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(io(&path)(error)),
            }
        }
        Ok(entries)
    }

    /// Runs `work` while no other process makes room.
    fn alone<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let path = self.dir.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(io(&path))?;
        file.lock().map_err(io(&path))?;
        // Closing the file releases it.
        work()
    }
}

impl Part<'_> {
    /// Empties what a killed process left, and reserves room.
    fn begin(&mut self, bytes: u64) -> Result<()> {
        self.file.set_len(0).map_err(io(&self.path))?;
        let granted = |part: &Self| {
            part.cache.alone(|| {
                let room = part.cache.make_room(bytes, &part.path)?;
                if room {
                    part.file.set_len(bytes).map_err(io(&part.path))?;
                }
                Ok(room)
            })
        };
        while !granted(self)? {
            // The others that write have their room already, so they come to an end.
            std::thread::sleep(POLL);
        }
        self.reserved = bytes;
        Ok(())
    }

    /// Makes room for a shard whose size is not known before it is written. It does not wait for others:
    /// they may wait for this one.
    ///
    /// # Errors
    /// [`Error::TooLargeUnpacked`] beyond the limit of the cache.
    pub(super) fn grow(&mut self, length: u64) -> Result<()> {
        let limit = self.cache.max_bytes;
        if length > limit {
            return Err(Error::TooLargeUnpacked { location: self.location.to_owned(), limit });
        }
        if length > self.reserved {
            self.reserved = length.saturating_add(GROWTH_BYTES).min(limit);
            self.cache.alone(|| self.cache.make_room(self.reserved, &self.path))?;
        }
        Ok(())
    }

    /// Gives the complete file its name, on disk before anyone can see it.
    fn finish(&mut self, done: &Path) -> Result<()> {
        self.file.sync_data().map_err(io(&self.path))?;
        std::fs::rename(&self.path, done).map_err(io(done))
    }
}

/// What there is of a shard.
enum Claim {
    Whole(File),
    /// A part to be written, locked by us.
    Part(File),
}

/// Waits until a shard is complete or its part is ours.
fn claim(path: &Path, done: &Path) -> Result<Claim> {
    loop {
        if let Some(whole) = hit(done)? {
            return Ok(Claim::Whole(whole));
        }
        let Some(part) = lock_part(path)? else { continue };
        // Finished by another between the two looks: then this part is a new and empty one.
        let Some(whole) = hit(done)? else { return Ok(Claim::Part(part)) };
        std::fs::remove_file(path).map_err(io(path))?;
        return Ok(Claim::Whole(whole));
    }
}

/// Opens a complete shard and notes its use.
fn hit(done: &Path) -> Result<Option<File>> {
    match File::open(done) {
        Ok(file) => {
            // On a file system that refuses it, shards are removed in the order of their arrival.
            drop(file.set_modified(SystemTime::now()));
            Ok(Some(file))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(done)(error)),
    }
}

/// Waits for the lock of a part; `None` when the part has been finished or removed meanwhile.
fn lock_part(path: &Path) -> Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path);
    let file = file.map_err(io(path))?;
    file.lock().map_err(io(path))?;
    let ours = file.metadata().map_err(io(path))?;
    let there = path.metadata().ok();
    Ok(there.is_some_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())).then_some(file))
}

/// Removes a complete shard, or a part that nobody writes. Whether it is gone.
fn remove(path: &Path) -> Result<bool> {
    let gone = |result: std::io::Result<()>| match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(path)(error)),
        _ => Ok(true),
    };
    if path.extension().is_some_and(|extension| extension == "tar") {
        return gone(std::fs::remove_file(path));
    }
    match File::open(path) {
        // The lock is held until it is removed: nobody can begin to write it in between.
        Ok(part) if part.try_lock().is_ok() => gone(std::fs::remove_file(path)),
        Ok(_) => Ok(false),
        Err(error) => gone(Err(error)),
    }
}

/// Whether a file was made by this cache: nothing else in the folder is ever touched.
fn is_ours(path: &Path) -> bool {
    let named = |stem: &str| stem.len() == 64 && stem.bytes().all(|byte| byte.is_ascii_hexdigit());
    path.file_stem().and_then(|stem| stem.to_str()).is_some_and(named)
        && path.extension().is_some_and(|extension| extension == "tar" || extension == "part")
}

fn key(identity: &str) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let hash = Sha256::digest(identity);
    let digits = hash.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |cause| Error::Io { path: path.to_owned(), cause }
}
