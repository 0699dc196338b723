//! Files that are there whole or not at all.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::error::{Result, ToolError};

/// The name under which a file is written before it is renamed.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.tmp"))
}

/// Writes a file under a temporary name, flushes it to the disk, and renames it.
pub(crate) fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    let unfinished = temporary(path);
    let write = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(contents)?;
        file.sync_all()
    };
    write().map_err(ToolError::io("write", path))?;
    publish(&unfinished, path)
}

/// Renames a file that has been flushed, and flushes the folder so that the new name lasts.
pub(crate) fn publish(unfinished: &Path, path: &Path) -> Result<()> {
    std::fs::rename(unfinished, path).map_err(ToolError::io("write", path))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(ToolError::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_replaces_the_one_before_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let message = write_atomically(&dir.path().join("no/a.json"), b"").unwrap_err().to_string();
        assert!(message.starts_with("cannot write `"), "{message}");
    }
}
