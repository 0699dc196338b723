//! Files that a command writes: there once they are whole, or not at all.
//!
//! Called by the commands that take `--out FILE`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Checks, before any work is done, that `out` can be written.
///
/// # Errors
/// [`Error::Usage`] when it is there and no file, when its folder is not there, or when it is one of `inputs`.
pub fn check(out: &Path, inputs: &[PathBuf]) -> Result<()> {
    let refuse = |what: &str, hint: &str| Err(Error::usage(format!("`{}` {what}", out.display()), hint));
    if out.exists() && !out.is_file() {
        return refuse("is not a regular file, so it is not replaced", "name a file for `--out`");
    }
    if !folder(out).is_dir() {
        return refuse("cannot be written: its folder does not exist", "make the folder first");
    }
    let same =
        |input: &PathBuf| matches!((input.canonicalize(), out.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if inputs.iter().any(same) {
        return refuse("is read by this command", "name another file for `--out`");
    }
    Ok(())
}

/// Has `write` write a file beside `out`, which then takes the place of `out`; on an error nothing is left.
///
/// # Errors
/// Those of [`check`], of `write`, and of the system.
pub fn replace(out: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    check(out, &[])?;
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let partial = folder(out).join(format!(".{name}.partial-{}", std::process::id()));
    let written = write(&partial).and_then(|()| fs::rename(&partial, out).map_err(Error::io(out)));
    if written.is_err() {
        // The first error is the one to report.
        drop(fs::remove_file(&partial));
    }
    written
}

fn folder(out: &Path) -> &Path {
    match out.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let write = |text: &'static str| move |path: &Path| fs::write(path, text).map_err(Error::io(path));
        replace(&out, write("one")).unwrap();
        replace(&out, write("two")).unwrap();
        let failed = |path: &Path| write("half")(path).and_then(|()| Err(Error::usage("no", "no")));
        assert!(replace(&out, failed).is_err());
        assert_eq!(fs::read_to_string(&out).unwrap(), "two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_must_not_be_replaced_is_refused_before_the_work() {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("data.tar");
        fs::write(&input, "").unwrap();
        let message = |out: &Path| check(out, std::slice::from_ref(&input)).unwrap_err().to_string();
        assert!(message("/dev/null".as_ref()).contains("not a regular file"));
        assert!(message(dir.path()).contains("not a regular file"));
        assert!(message(&dir.path().join("gone/out")).contains("its folder does not exist"));
        assert!(message(&dir.path().join("./data.tar")).contains("is read by this command"));
        assert!(check(&dir.path().join("new"), &[input]).is_ok());
    }
}
