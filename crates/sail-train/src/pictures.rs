//! Pictures of the held-out samples that a run answers: JPEG files in `held-out` of its folder, with `pictures.json`, which
//! says which sample each is of.
//!
//! Written when a run begins or goes on, read by what shows its answers.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::{fs, io};

use sail_model::weights::read_json;
use serde_json::Value;

use crate::error::{Error, Result};

const FOLDER: &str = "held-out";
const INDEX: &str = "pictures.json";

/// Writes `pictures`, files by sample; those of another run in this folder are replaced.
pub(crate) fn write(run_dir: &Path, pictures: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    if pictures.is_empty() {
        return Ok(());
    }
    let folder = run_dir.join(FOLDER);
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let mut index = BTreeMap::new();
    for (number, (sample, picture)) in pictures.iter().enumerate() {
        let name = format!("{number:04}.jpg");
        let path = folder.join(&name);
        fs::write(&path, picture).map_err(Error::io(&path))?;
        index.insert(sample, name);
    }
    let path = folder.join(INDEX);
    let text = serde_json::to_vec_pretty(&index).expect("invariant: a map of texts");
    fs::write(&path, text).map_err(Error::io(&path))
}

/// The files that [`write`] wrote, by sample; none where it wrote none.
///
/// # Errors
/// For an index that cannot be read.
pub(crate) fn list(run_dir: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let folder = run_dir.join(FOLDER);
    if !folder.join(INDEX).exists() {
        return Ok(BTreeMap::new());
    }
    let path = folder.join(INDEX);
    let index = read_json(&path)?;
    let files = index.as_object().into_iter().flatten();
    let file = |(sample, name): (&String, &Value)| {
        // A page shows these files to others.
        let name = name.as_str().filter(|name| Path::new(name).file_name() == Some(OsStr::new(name)));
        let name = name.ok_or_else(|| {
            Error::io(&path)(io::Error::other(format!("`{sample}` has no file in its folder")))
        })?;
        Ok((sample.clone(), folder.join(name)))
    };
    files.map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_found_by_their_samples() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(dir.path()).unwrap().is_empty());
        let pictures = BTreeMap::from([("a/0.tar/x".into(), vec![1]), ("b/0.tar/y".into(), vec![2, 3])]);
        write(dir.path(), &pictures).unwrap();
        let found = list(dir.path()).unwrap();
        let read = found
            .into_iter()
            .map(|(sample, path)| (sample, fs::read(path).unwrap()))
            .collect::<BTreeMap<_, _>>();
        assert_eq!(read, pictures);
        for wrong in [
            "{",
            r#"{"a/0.tar/x": "../plan.yaml"}"#,
            r#"{"a/0.tar/x": "/etc/hosts"}"#,
            r#"{"a/0.tar/x": ".."}"#,
        ] {
            fs::write(dir.path().join(FOLDER).join(INDEX), wrong).unwrap();
            assert!(list(dir.path()).is_err(), "{wrong}");
        }
    }
}
