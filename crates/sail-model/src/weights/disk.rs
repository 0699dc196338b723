//! One large file, written in blocks by a thread of its own and around the system's cache.
//!
//! Through the cache every byte would be copied once more, and what it has of the training data would make place
//! for weights that nobody reads soon. Used by [`super::write`].

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::{panic, thread};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::file_error;
use crate::error::Result;

/// Bytes that are written at once.
const BLOCK: usize = 8 << 20;

/// Most bytes that are put into a block at once: they are still in the core's cache when they are looked at.
pub(super) const PIECE: usize = 256 << 10;

/// Blocks besides the one that is filled.
const SPARE: usize = 3;

/// What disks ask of addresses and sizes, bytes; a system page.
const ALIGN: usize = 4096;

/// Writes what `fill` puts and syncs it. The file's error goes before that of `fill`.
///
/// # Errors
/// [`crate::Error::File`] on an IO error; what `fill` returns.
pub(super) fn write_file(path: &Path, fill: impl FnOnce(&mut Blocks) -> Result<()>) -> Result<()> {
    let mut file = Direct::create(path).map_err(file_error(path))?;
    write_behind(&mut file, path, fill)?;
    file.file.sync_all().map_err(file_error(path))
}

fn write_behind(
    out: &mut (impl Write + Send),
    path: &Path,
    fill: impl FnOnce(&mut Blocks) -> Result<()>,
) -> Result<()> {
    thread::scope(|scope| {
        // The ends that a failed writer drops wake up whoever waits at the others.
        let (full, to_write) = mpsc::channel::<(Block, usize)>();
        let (written, empty) = mpsc::channel();
        let writer = move || {
            for (mut block, used) in to_write {
                out.write_all(&block.bytes()[..used])?;
                // The last ones are not asked for any more.
                drop(written.send(block));
            }
            Ok(())
        };
        let named = thread::Builder::new().name("sail-write".to_owned());
        let writer = named.spawn_scoped(scope, writer).map_err(file_error(path))?;
        let mut blocks = Blocks { block: Block::new(), used: 0, made: 0, full, empty, failed: false };
        let filled = fill(&mut blocks).map(|()| blocks.finish());
        drop(blocks);
        let written: io::Result<()> = writer.join().unwrap_or_else(|panic| panic::resume_unwind(panic));
        written.map_err(file_error(path)).and(filled)
    })
}

/// Where the bytes of a file go, in its order.
pub(super) struct Blocks {
    block: Block,
    used: usize,
    /// Spare blocks there are.
    made: usize,
    full: Sender<(Block, usize)>,
    empty: Receiver<Block>,
    /// The writer has ended before its time; what is put goes nowhere.
    failed: bool,
}

impl Blocks {
    /// Lets `fill` write the next `size` bytes, at most [`PIECE`], and shows them.
    ///
    /// # Errors
    /// That of `fill`.
    pub(super) fn put(&mut self, size: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<&[u8]> {
        if self.used >= BLOCK {
            self.hand_over();
        }
        let bytes = &mut self.block.bytes()[self.used..self.used + size];
        self.used += size;
        fill(bytes)?;
        Ok(bytes)
    }

    /// Gives away a full block; what stands past its end begins the next one.
    fn hand_over(&mut self) {
        let rest = self.used - BLOCK;
        let next = if self.made < SPARE {
            self.made += 1;
            Some(Block::new())
        } else {
            self.empty.recv().ok()
        };
        if let (Some(mut next), false) = (next, self.failed) {
            next.bytes()[..rest].copy_from_slice(&self.block.bytes()[BLOCK..self.used]);
            let full = std::mem::replace(&mut self.block, next);
            self.failed = self.full.send((full, BLOCK)).is_err();
        } else {
            self.failed = true;
        }
        self.used = rest;
    }

    fn finish(&mut self) {
        if self.used >= BLOCK {
            self.hand_over();
        }
        let last = std::mem::replace(&mut self.block, Block { memory: Vec::new(), start: 0 });
        // A writer that has failed says so itself.
        drop(self.full.send((last, self.used)));
    }
}

/// A block and a piece past its end, aligned for the disk.
struct Block {
    memory: Vec<u8>,
    start: usize,
}

impl Block {
    fn new() -> Self {
        let memory = vec![0; BLOCK + PIECE + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN);
        Self { memory, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

/// A file that is written around the system's cache where its file system can, and as far as sizes are whole pages.
struct Direct {
    file: File,
    is_direct: bool,
}

impl Direct {
    fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        let direct = options.clone().custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path);
        if direct.as_ref().is_err_and(is_not_supported) {
            return Ok(Self { file: options.open(path)?, is_direct: false });
        }
        Ok(Self { file: direct?, is_direct: true })
    }
}

impl Write for Direct {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes);
        if !(self.is_direct && written.as_ref().is_err_and(is_not_supported)) {
            return written;
        }
        self.is_direct = false;
        fcntl_setfl(&self.file, fcntl_getfl(&self.file)?.difference(OFlags::DIRECT))?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn is_not_supported(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::OPNOTSUPP].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Puts `sizes`, each of another byte, and gives what the file should be.
    fn put_all(blocks: &mut Blocks, sizes: &[usize]) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for (i, &size) in sizes.iter().enumerate() {
            let piece = vec![i as u8; size];
            let shown = blocks.put(size, |bytes| {
                bytes.copy_from_slice(&piece);
                Ok(())
            })?;
            assert_eq!(shown, piece);
            all.extend(piece);
        }
        Ok(all)
    }

    #[test]
    fn what_goes_through_many_blocks_is_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let many = (SPARE + 3) * BLOCK / PIECE;
        // Ends inside a page, at a page, at a block; nothing at all.
        for sizes in
            [vec![PIECE - 3; many], vec![PIECE; many + 1], vec![PIECE; BLOCK / PIECE], vec![7], vec![]]
        {
            let mut all = Vec::new();
            write_file(&path, |blocks| {
                all = put_all(blocks, &sizes)?;
                Ok(())
            })
            .unwrap();
            assert!(fs::read(&path).unwrap() == all, "{} bytes", all.len());
        }
    }

    /// Not all file systems can write around the cache; the system's own kinds of memory cannot or could not.
    #[test]
    fn files_in_memory_are_written() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("file");
        write_file(&path, |blocks| put_all(blocks, &[PIECE; 70]).map(drop)).unwrap();
        assert_eq!(fs::read(path).unwrap().len(), 70 * PIECE);
    }

    #[test]
    fn a_file_that_refuses_is_written_through_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = Direct::create(&path).unwrap();
        // Neither its address nor its size is what a disk takes.
        file.write_all(&[1; 3 * ALIGN][1..ALIGN]).unwrap();
        file.write_all(&[2; ALIGN]).unwrap();
        assert_eq!(fs::read(path).unwrap(), [vec![1; ALIGN - 1], vec![2; ALIGN]].concat());
    }

    /// A disk that is full after so many blocks.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_writer_that_fails_is_told_and_nothing_waits_for_it() {
        let many = (SPARE + 3) * BLOCK / PIECE;
        for writes in 0..SPARE + 3 {
            let filled = write_behind(&mut Full(writes), Path::new("weights"), |blocks| {
                put_all(blocks, &vec![PIECE; many]).map(drop)
            });
            let error = filled.unwrap_err().to_string();
            assert!(error.contains("weights") && error.contains("no storage space"), "{error}");
        }
    }

    #[test]
    fn an_error_while_filling_is_told() {
        let filled = write_behind(&mut io::sink(), Path::new("weights"), |blocks| {
            put_all(blocks, &[5])?;
            Err(file_error(Path::new("weights"))("no such tensor"))
        });
        assert!(filled.unwrap_err().to_string().contains("no such tensor"));
    }
}
