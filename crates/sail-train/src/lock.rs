//! A run's folder belongs to one training at a time, and stays the folder that it was as long as that lasts.
//!
//! Taken where a stage begins, looked at by the saver. On the main rank only.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The file that is locked.
pub(crate) const LOCK: &str = ".lock";

/// The folder is this process's for as long as it lives.
#[derive(Debug)]
pub struct RunLock {
    run_dir: PathBuf,
    path: PathBuf,
    file: File,
}

impl RunLock {
    /// Makes the folder where there is none, and takes it.
    ///
    /// # Errors
    /// [`Error::Usage`] when another process has it.
    pub fn take(run_dir: &Path) -> Result<Self> {
        if run_dir.exists() && !run_dir.is_dir() {
            return Err(Error::usage(
                format!("`run.dir` is `{}`, which is no folder", run_dir.display()),
                "name a folder that is there or can be made",
            ));
        }
        fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
        let path = run_dir.join(LOCK);
        let file = File::create(&path).map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { run_dir: run_dir.to_owned(), path, file }),
            Err(TryLockError::WouldBlock) => Err(Error::usage(
                format!("another process is at work in `{}`", run_dir.display()),
                "wait for it, stop it, or choose another folder (`run.dir`, `--out`)",
            )),
            Err(TryLockError::Error(error)) => Err(Error::io(&path)(error)),
        }
    }

    /// Checks that the folder is still the one that was taken: who removes it may have started another run there.
    ///
    /// # Errors
    /// [`Error::FolderGone`].
    pub fn check(&self) -> Result<()> {
        let gone = || Error::FolderGone { path: self.run_dir.clone() };
        let held = self.file.metadata().map_err(Error::io(&self.path))?;
        match fs::metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => Ok(()),
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(&self.path)(error)),
            _ => Err(gone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_taken_once_and_is_missed() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let lock = RunLock::take(&run_dir).unwrap();
        lock.check().unwrap();
        assert_eq!(RunLock::take(&run_dir).unwrap_err().exit_code(), 2);

        fs::rename(&run_dir, dir.path().join("elsewhere")).unwrap();
        assert!(matches!(lock.check(), Err(Error::FolderGone { .. })));
        let new = RunLock::take(&run_dir).unwrap();
        assert!(matches!(lock.check(), Err(Error::FolderGone { .. })), "another one is in its place");
        new.check().unwrap();
        drop(lock);
        new.check().unwrap();
        assert!(RunLock::take(&run_dir).is_err(), "the new one is still taken");
    }
}
