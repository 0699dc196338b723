//! Bytes by key in files that are only ever appended to; not what the bytes are, which is [`super`]'s matter.
//!
//! A folder belongs to no one. Every process that adds to it has two files of its own, `000001.features` with the bytes
//! and `000001.index` with a line of [`ENTRY`] bytes for each of them, written after the bytes; it reads those of all.
//! So nothing that was written is ever written again, whoever is killed whenever: bytes without a line are not found,
//! a line that is not whole has another checksum and is passed over, and so have bytes that never reached the disk.
//!
//! Bytes are read at offsets, not mapped (docs/decisions/0018).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::warn;

use crate::error::{Error, Result};

/// What bytes are found by: a SHA-256.
pub(super) type Key = [u8; 32];

/// Bytes of a line: key, offset, size, checksum of the bytes, checksum of the line; numbers in little-endian order.
const ENTRY: usize = 32 + 8 + 8 + 4 + 4;

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// The number of the file.
    file: u64,
    offset: u64,
    bytes: u64,
    crc32: u32,
}

/// The files of a folder, and one's own.
pub(super) struct Store {
    /// With other folders of stores, which share its space.
    root: PathBuf,
    dir: PathBuf,
    /// Of each key those that were found, of which any may have been damaged.
    places: HashMap<Key, Vec<Place>>,
    /// Bytes of each index that were looked at.
    seen: BTreeMap<u64, u64>,
    /// Indexes that could not be looked at, and are not looked at again.
    unreadable: BTreeSet<u64>,
    /// None until something is added.
    own: Option<Own>,
    /// Whether more is added.
    grows: bool,
    /// Whether the folder could be looked at when it last was.
    is_there: bool,
    /// Bytes below `root`, as far as they are known, and most there may be.
    taken: u64,
    max_bytes: u64,
    damaged: AtomicU64,
}

/// The files that only this process writes to.
struct Own {
    number: u64,
    features: File,
    index: File,
    features_bytes: u64,
    index_bytes: u64,
}

impl Store {
    /// The folder `name` of `root`, in which all folders together have at most `max_bytes`; made where it is not there.
    /// With 0 bytes it is only read, and nothing is made.
    ///
    /// # Errors
    /// [`Error::Usage`] when it cannot be made or looked at.
    pub(super) fn open(root: &Path, name: &str, max_bytes: u64) -> Result<Self> {
        let dir = root.join(name);
        let grows = max_bytes > 0;
        let unusable = |error: io::Error| {
            Error::usage(
                format!(
                    "`data.feature_cache.dir` is `{}`, in which no features can be kept: {error}",
                    root.display()
                ),
                format!(
                    "name a folder that is there or can be made, and in which `{name}` can be made and written"
                ),
            )
        };
        if grows && !dir.is_dir() {
            fs::create_dir_all(&dir).map_err(unusable)?;
        }
        let mut store = Self {
            root: root.to_owned(),
            dir,
            places: HashMap::new(),
            seen: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            own: None,
            grows,
            is_there: true,
            taken: 0,
            max_bytes,
            damaged: AtomicU64::new(0),
        };
        if grows || store.dir.is_dir() {
            store.look().map_err(unusable)?;
        }
        Ok(store)
    }

    /// Its folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// How many keys it knows.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether it knows the key.
    pub(super) fn has(&self, key: &Key) -> bool {
        self.places.contains_key(key)
    }

    /// Takes note of what other processes have added since, and of the space that is left.
    pub(super) fn refresh(&mut self) {
        let looked = self.look();
        if let (Err(error), true) = (&looked, self.is_there && self.grows) {
            let lost = if self.own.is_some() { ", and what this one adds may be lost" } else { "" };
            warn!("{}: {error}; what other processes add is not found{lost}", self.dir.display());
        }
        self.is_there = looked.is_ok();
    }

    fn look(&mut self) -> io::Result<()> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "index") {
                numbers.extend(path.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok()));
            }
        }
        numbers.sort_unstable();
        let own = self.own.as_ref().map(|own| own.number);
        numbers.retain(|number| Some(*number) != own && !self.unreadable.contains(number));
        for number in numbers {
            if let Err(error) = self.read_index(number) {
                self.unreadable.insert(number);
                warn!(
                    "{}: {error}; what it lists is computed anew",
                    path(&self.dir, number, "index").display()
                );
            }
        }
        if self.grows {
            self.taken = bytes_below(&self.root)?;
        }
        Ok(())
    }

    fn read_index(&mut self, number: u64) -> io::Result<()> {
        let path = path(&self.dir, number, "index");
        let seen = self.seen.entry(number).or_default();
        let new = fs::metadata(&path)?.len().saturating_sub(*seen) as usize / ENTRY * ENTRY;
        if new == 0 {
            return Ok(());
        }
        let mut lines = vec![0; new];
        File::open(&path)?.read_exact_at(&mut lines, *seen)?;
        *seen += new as u64;
        for (key, place) in lines.chunks_exact(ENTRY).filter_map(|line| read_line(number, line)) {
            self.places.entry(key).or_default().push(place);
        }
        Ok(())
    }

    /// Reads the bytes of a key into `target`, where they are there, so many, and as they were written; whether they
    /// are. What `target` holds otherwise is nothing.
    pub(super) fn read(&self, key: &Key, target: &mut [u8]) -> bool {
        let places = self.places.get(key).into_iter().flatten();
        places.rev().any(|place| self.read_at(place, target))
    }

    fn read_at(&self, place: &Place, target: &mut [u8]) -> bool {
        let mut read = || -> io::Result<()> {
            if place.bytes != target.len() as u64 {
                let (found, wanted) = (place.bytes, target.len());
                let reason = format!("{found} bytes where {wanted} are expected");
                return Err(io::Error::new(ErrorKind::InvalidData, reason));
            }
            File::open(path(&self.dir, place.file, "features"))?.read_exact_at(target, place.offset)?;
            if crc32fast::hash(target) != place.crc32 {
                return Err(io::Error::new(ErrorKind::InvalidData, "the checksum is another one"));
            }
            Ok(())
        };
        match read() {
            Ok(()) => true,
            Err(error) => {
                let count = 1 + self.damaged.fetch_add(1, Ordering::Relaxed);
                // A disk that is broken would fill the log.
                if count.is_power_of_two() {
                    let file = path(&self.dir, place.file, "features");
                    let (file, offset) = (file.display(), place.offset);
                    warn!("{file}: at {offset}: {error}; {count} damaged so far are computed anew");
                }
                false
            }
        }
    }

    /// Adds bytes, unless there is no more space for them: that ends the adding, not the process.
    pub(super) fn add(&mut self, key: Key, bytes: &[u8]) {
        if !self.grows {
            return;
        }
        let size = (bytes.len() + ENTRY) as u64;
        if self.taken + size > self.max_bytes {
            self.grows = false;
            let (dir, most) = (self.root.display(), self.max_bytes);
            warn!(
                "{dir}: {most} bytes are reached (`data.feature_cache.max_bytes`); no more features are kept"
            );
            return;
        }
        match self.append(key, bytes) {
            Ok(place) => {
                self.taken += size;
                self.places.entry(key).or_default().push(place);
            }
            Err(error) => {
                self.grows = false;
                warn!("{}: {error}; this process keeps no more features", self.dir.display());
            }
        }
    }

    fn append(&mut self, key: Key, bytes: &[u8]) -> io::Result<Place> {
        let own = match &mut self.own {
            Some(own) => own,
            none => none.insert(Own::create(&self.dir)?),
        };
        let place = Place {
            file: own.number,
            offset: own.features_bytes,
            bytes: bytes.len() as u64,
            crc32: crc32fast::hash(bytes),
        };
        own.features.write_all_at(bytes, place.offset)?;
        own.index.write_all_at(&line(&key, &place), own.index_bytes)?;
        own.features_bytes += place.bytes;
        own.index_bytes += ENTRY as u64;
        Ok(place)
    }
}

impl Own {
    /// Files under the first number that nobody has: of which there is neither the one nor the other file.
    fn create(dir: &Path) -> io::Result<Self> {
        let new = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path);
        let pair = |number: u64| -> io::Result<Self> {
            // The index first: a file of features without one is nobody's, and in no way.
            let index = new(&path(dir, number, "index"))?;
            let features = new(&path(dir, number, "features")).inspect_err(|_| {
                // Empty, and this process's own.
                drop(fs::remove_file(path(dir, number, "index")));
            })?;
            Ok(Self { number, features, index, features_bytes: 0, index_bytes: 0 })
        };
        let mut number = 1;
        loop {
            match pair(number) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                made => return made,
            }
        }
    }
}

fn path(dir: &Path, number: u64, extension: &str) -> PathBuf {
    dir.join(format!("{number:06}.{extension}"))
}

fn line(key: &Key, place: &Place) -> [u8; ENTRY] {
    let mut line = [0; ENTRY];
    line[..32].copy_from_slice(key);
    line[32..40].copy_from_slice(&place.offset.to_le_bytes());
    line[40..48].copy_from_slice(&place.bytes.to_le_bytes());
    line[48..52].copy_from_slice(&place.crc32.to_le_bytes());
    let crc32 = crc32fast::hash(&line[..52]);
    line[52..].copy_from_slice(&crc32.to_le_bytes());
    line
}

/// The line of a file; None where it is not as it was written.
fn read_line(file: u64, line: &[u8]) -> Option<(Key, Place)> {
    let (key, rest) = line.split_first_chunk::<32>()?;
    let (offset, rest) = rest.split_first_chunk()?;
    let (bytes, rest) = rest.split_first_chunk()?;
    let (crc32, rest) = rest.split_first_chunk()?;
    let (of_line, _) = rest.split_first_chunk()?;
    let place = Place {
        file,
        offset: u64::from_le_bytes(*offset),
        bytes: u64::from_le_bytes(*bytes),
        crc32: u32::from_le_bytes(*crc32),
    };
    (crc32fast::hash(&line[..52]) == u32::from_le_bytes(*of_line)).then_some((*key, place))
}

/// Bytes of the files in a folder and in its folders.
fn bytes_below(dir: &Path) -> io::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sum += bytes_below(&entry.path())?;
        } else if kind.is_file() {
            sum += entry.metadata()?.len();
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const MUCH: u64 = 1 << 30;

    fn key(n: u8) -> Key {
        [n; 32]
    }

    fn open(dir: &TempDir) -> Store {
        Store::open(dir.path(), "a", MUCH).unwrap()
    }

    /// One process that adds these, and is gone.
    fn added(dir: &TempDir, keys: &[u8]) {
        let mut store = open(dir);
        for n in keys {
            store.add(key(*n), &[*n; 100]);
        }
    }

    fn found(store: &Store, keys: &[u8]) -> Vec<u8> {
        let is_there = |n: &u8| {
            let mut bytes = [0; 100];
            store.read(&key(*n), &mut bytes) && bytes == [*n; 100]
        };
        keys.iter().copied().filter(is_there).collect()
    }

    fn edit(dir: &TempDir, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = dir.path().join("a").join(name);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn what_was_added_is_found_by_its_key_alone() {
        let dir = TempDir::new().unwrap();
        added(&dir, &[1, 2]);
        added(&dir, &[3]);
        let store = open(&dir);
        assert_eq!(found(&store, &[1, 2, 3, 4]), [1, 2, 3]);
        assert_eq!(store.len(), 3);
        assert!(!store.read(&key(1), &mut [0; 99]), "of another size");
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 4, "reading makes no files");
        assert_eq!(found(&Store::open(dir.path(), "b", MUCH).unwrap(), &[1]), [0u8; 0]);
    }

    /// Cut anywhere, as a kill may leave it: what was whole before is found, and more can be added.
    #[test]
    fn a_torn_end_costs_what_is_torn() {
        for cut in 0..2 * ENTRY {
            let dir = TempDir::new().unwrap();
            added(&dir, &[1, 2]);
            edit(&dir, "000001.index", |bytes| bytes.truncate(cut));
            let left: &[u8] = if cut >= ENTRY { &[1] } else { &[] };
            assert_eq!(found(&open(&dir), &[1, 2]), left, "{cut}");
            added(&dir, &[2]);
            assert_eq!(found(&open(&dir), &[1, 2]), [left, &[2]].concat(), "{cut}");
        }
        let dir = TempDir::new().unwrap();
        added(&dir, &[1, 2]);
        edit(&dir, "000001.features", |bytes| bytes.truncate(199));
        assert_eq!(found(&open(&dir), &[1, 2]), [1], "bytes that never reached the disk");
        // Killed between its two files.
        fs::remove_file(dir.path().join("a/000001.index")).unwrap();
        added(&dir, &[2]);
        assert_eq!(found(&open(&dir), &[1, 2]), [2]);
    }

    #[test]
    fn no_changed_bit_is_taken_for_what_was_written() {
        for bit in 0..8 * 100 {
            let dir = TempDir::new().unwrap();
            added(&dir, &[1, 2]);
            edit(&dir, "000001.features", |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            assert_eq!(found(&open(&dir), &[1, 2]), [2], "{bit}");
        }
        for bit in 0..8 * ENTRY {
            let dir = TempDir::new().unwrap();
            added(&dir, &[1, 2]);
            edit(&dir, "000001.index", |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            let store = open(&dir);
            assert_eq!((store.len(), found(&store, &[1, 2])), (1, vec![2]), "{bit}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_one_is_named() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        for root in [file.clone(), file.join("below"), "/proc/none".into()] {
            let error = Store::open(&root, "a", MUCH).err().unwrap();
            let start =
                format!("`data.feature_cache.dir` is `{}`, in which no features can be kept", root.display());
            assert!(error.to_string().starts_with(&start), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    /// An index that is none is passed over, and one whose features are gone is in nobody's way.
    #[test]
    fn odd_files_cost_what_is_in_them() {
        let dir = TempDir::new().unwrap();
        added(&dir, &[1]);
        let inside = open(&dir).dir().to_owned();
        fs::create_dir(inside.join("000007.index")).unwrap();
        std::os::unix::fs::symlink("/none", inside.join("000008.index")).unwrap();
        assert_eq!(found(&open(&dir), &[1]), [1]);
        fs::remove_file(inside.join("000001.features")).unwrap();
        let mut store = open(&dir);
        assert_eq!(found(&store, &[1]), [0u8; 0]);
        store.add(key(2), &[2; 100]);
        store.add(key(1), &[1; 100]);
        store.refresh();
        assert_eq!(found(&store, &[1, 2]), [1, 2]);
        assert_eq!(found(&open(&dir), &[1, 2]), [1, 2]);
    }

    #[test]
    fn damage_is_mended_by_adding_again() {
        let dir = TempDir::new().unwrap();
        added(&dir, &[1]);
        edit(&dir, "000001.features", |bytes| bytes[7] = 0);
        let mut store = open(&dir);
        assert_eq!(found(&store, &[1]), [0u8; 0]);
        store.add(key(1), &[1; 100]);
        assert_eq!(found(&store, &[1]), [1]);
        assert_eq!(found(&open(&dir), &[1]), [1]);
    }

    /// Whichever of the files has the damage: a later one mends it, and so does an earlier one that was still written to.
    #[test]
    fn what_was_mended_stays_mended() {
        let dir = TempDir::new().unwrap();
        let (mut first, mut second) = (open(&dir), open(&dir));
        first.add(key(1), &[1; 100]);
        second.add(key(2), &[2; 100]);
        edit(&dir, "000002.features", |bytes| bytes[7] = 0);
        first.refresh();
        assert_eq!(found(&first, &[2]), [0u8; 0]);
        first.add(key(2), &[2; 100]);
        assert_eq!(found(&open(&dir), &[1, 2]), [1, 2]);
    }

    #[test]
    fn without_bytes_it_is_only_read() {
        let dir = TempDir::new().unwrap();
        let reader = || Store::open(dir.path(), "a", 0).unwrap();
        let mut empty = reader();
        empty.add(key(1), &[1; 100]);
        empty.refresh();
        assert_eq!((empty.len(), fs::read_dir(dir.path()).unwrap().count()), (0, 0));
        added(&dir, &[1]);
        let mut store = reader();
        store.add(key(2), &[2; 100]);
        assert_eq!(found(&store, &[1, 2]), [1]);
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 2);
    }

    #[test]
    fn two_that_write_at_once_find_what_the_other_added() {
        let dir = TempDir::new().unwrap();
        let mut stores = [open(&dir), open(&dir)];
        for n in 0..20u8 {
            stores[usize::from(n) % 2].add(key(n), &[n; 100]);
        }
        // Both had this one to add.
        for store in &mut stores {
            store.add(key(20), &[20; 100]);
        }
        let all: Vec<u8> = (0..=20).collect();
        for store in &mut stores {
            assert_eq!(found(store, &all).len(), 11, "its own");
            store.refresh();
            assert_eq!(found(store, &all), all);
        }
        let threads: Vec<Store> = (0..8).map(|_| open(&dir)).collect();
        std::thread::scope(|scope| {
            for (n, mut store) in threads.into_iter().enumerate() {
                scope.spawn(move || {
                    for key_of in 0..20 {
                        store.add(key(50 + 20 * n as u8 + key_of), &[50 + 20 * n as u8 + key_of; 100]);
                    }
                });
            }
        });
        let all: Vec<u8> = (0..=20).chain(50..210).collect();
        assert_eq!(found(&open(&dir), &all), all);
    }

    #[test]
    fn it_grows_to_its_size_and_no_further() {
        let dir = TempDir::new().unwrap();
        added(&dir, &[1, 2]);
        let size = 100 + ENTRY as u64;
        let mut store = Store::open(dir.path(), "b", 4 * size).unwrap();
        for n in 3..9 {
            store.add(key(n), &[n; 100]);
        }
        assert_eq!(found(&store, &[3, 4, 5, 6, 7, 8]), [3, 4], "the other folder counts as well");
        assert_eq!(bytes_below(dir.path()).unwrap(), 4 * size);
    }

    #[test]
    fn a_full_disk_ends_the_adding_alone() {
        let dir = TempDir::new().unwrap();
        for full in [0, 1] {
            let mut store = open(&dir);
            store.add(key(1), &[1; 100]);
            let own = store.own.as_mut().unwrap();
            let device = OpenOptions::new().write(true).open("/dev/full").unwrap();
            *(if full == 0 { &mut own.features } else { &mut own.index }) = device;
            store.add(key(2), &[2; 100]);
            assert_eq!((store.grows, found(&store, &[1, 2])), (false, vec![1]));
            store.add(key(3), &[3; 100]);
            assert_eq!(found(&open(&dir), &[1, 2, 3]), [1]);
        }
    }

    #[test]
    fn a_folder_that_goes_away_ends_nothing() {
        let dir = TempDir::new().unwrap();
        added(&dir, &[1]);
        let mut store = open(&dir);
        fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(found(&store, &[1]), [0u8; 0]);
        store.refresh();
        store.add(key(2), &[2; 100]);
        assert_eq!(found(&store, &[2]), [0u8; 0]);
        fs::write(dir.path(), "no folder").unwrap();
        assert!(Store::open(dir.path(), "a", MUCH).is_err());
        fs::remove_file(dir.path()).unwrap();
        fs::create_dir(dir.path()).unwrap();
    }
}
