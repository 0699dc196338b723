//! One model in the cache that Hugging Face tools share: `blobs/<etag>`, `snapshots/<commit>/<file>` as
//! links to them, `refs/<revision>` with a commit, and locks beside.
//!
//! Layout and locks are those of the Python package `huggingface_hub` (its `file_download.py`), so that
//! both can use one cache at once. Knows no network. A file is linked only when it is whole: what a
//! snapshot has is complete.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use hf_hub::{Cache, Repo};
use serde_json::Value;

use super::Wanted;
use crate::error::{Error, Result};
use crate::weights::{CONFIG, INDEX, SINGLE, TOKENIZER, file_error, read_json};

/// How long another process may hold a file's lock while the file does not grow.
const LOCK_IDLE: Duration = Duration::from_secs(600);
const LOCK_POLL: Duration = Duration::from_millis(200);

/// One model's part of the cache.
#[derive(Debug)]
pub(super) struct Cached {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cached {
    pub(super) fn new(cache: &Cache, repo: &Repo) -> Self {
        let name = repo.folder_name();
        Self { folder: cache.path().join(&name), locks: cache.path().join(".locks").join(name) }
    }

    /// `models--org--name`.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit that a revision is, or was when it was last looked up.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let noted = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(noted.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes which commit a branch or tag is.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        make_parent(&path)?;
        fs::write(&path, commit).map_err(file_error(&path))
    }

    /// The snapshot of a revision, where it has all that is wanted.
    pub(super) fn complete(&self, revision: &str, wanted: Wanted) -> Option<PathBuf> {
        let snapshot = self.snapshot(&self.commit(revision)?);
        let has = |file: &str| snapshot.join(file).is_file();
        let weights = || {
            has(SINGLE) || {
                let index = read_json(&snapshot.join(INDEX)).ok();
                index.and_then(|index| shards(&index)).is_some_and(|files| files.iter().all(|file| has(file)))
            }
        };
        let complete = has(CONFIG) && (!wanted.tokenizer || has(TOKENIZER)) && (!wanted.weights || weights());
        complete.then_some(snapshot)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Where a blob is written until it is whole.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Makes a whole download the blob.
    pub(super) fn finish(&self, etag: &str) -> Result<()> {
        let (from, to) = (self.incomplete(etag), self.blob(etag));
        File::open(&from).and_then(|file| file.sync_all()).map_err(file_error(&from))?;
        fs::rename(&from, &to).map_err(file_error(&to))
    }

    /// Puts a blob into a snapshot.
    pub(super) fn link(&self, etag: &str, commit: &str, file: &Path) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        make_parent(&path)?;
        if path.is_symlink() {
            fs::remove_file(&path).map_err(file_error(&path))?;
        }
        symlink(Path::new("../../blobs").join(etag), &path).map_err(file_error(&path))
    }

    /// Waits until no other process works on a blob, and keeps others from it for as long as the returned
    /// file lives. A process that ends, however it ends, releases its locks.
    pub(super) fn lock(&self, etag: &str) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        make_parent(&self.blob(etag))?;
        let open = || {
            let file = File::options().write(true).create(true).truncate(false).open(&path);
            file.map_err(file_error(&path))
        };
        let mut file = open()?;
        let length = || fs::metadata(self.incomplete(etag)).map_or(0, |metadata| metadata.len());
        let mut seen: Option<(u64, Instant)> = None;
        loop {
            match file.try_lock() {
                Ok(()) if file.metadata().map_err(file_error(&path))?.nlink() > 0 => return Ok(file),
                // Its last holder removed it, as some programs do: it keeps nobody out any more.
                Ok(()) => {
                    file = open()?;
                    continue;
                }
                Err(TryLockError::Error(error)) => return Err(file_error(&path)(error)),
                Err(TryLockError::WouldBlock) => {}
            }
            match seen {
                None => tracing::info!("waiting for another process that fetches `{etag}`"),
                Some((before, since)) if before == length() => {
                    if since.elapsed() > LOCK_IDLE {
                        let reason = "another process holds this lock and fetches nothing";
                        return Err(Error::File { path, reason: reason.to_owned() });
                    }
                    sleep(LOCK_POLL);
                    continue;
                }
                Some(_) => {}
            }
            seen = Some((length(), Instant::now()));
            sleep(LOCK_POLL);
        }
    }
}

/// Whether a revision is a whole commit, which never changes.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The files that an index names, sorted, each once; `None` where it is no index, or one that names
/// anything but safetensors files beside itself.
pub(super) fn shards(index: &Value) -> Option<Vec<String>> {
    let beside = |file: &&str| {
        let is_safetensors = Path::new(file).extension().is_some_and(|ending| ending == "safetensors");
        is_safetensors && !file.starts_with('.') && !file.contains(['/', '\\', '?', '#', '%'])
    };
    let map = index.get("weight_map")?.as_object()?;
    let files: Option<Vec<&str>> = map.values().map(|file| file.as_str().filter(beside)).collect();
    let mut files: Vec<String> = files?.into_iter().map(str::to_owned).collect();
    files.sort();
    files.dedup();
    (!files.is_empty()).then_some(files)
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| fs::create_dir_all(parent).map_err(file_error(parent)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_index_names_files_beside_it() {
        let of = |files: &[&str]| {
            let map: serde_json::Map<_, _> =
                files.iter().enumerate().map(|(index, file)| (index.to_string(), json!(file))).collect();
            shards(&json!({ "weight_map": map }))
        };
        assert_eq!(
            of(&["b.safetensors", "a.safetensors", "b.safetensors"]).unwrap(),
            ["a.safetensors", "b.safetensors"]
        );
        let wrong = ["../a.safetensors", "/a.safetensors", "x/a.safetensors", "a.bin", "a.safetensors?x"];
        assert!(wrong.iter().all(|file| of(&["a.safetensors", file]).is_none()));
        assert!(of(&[]).is_none() && shards(&json!([])).is_none());
    }

    #[test]
    fn a_lock_keeps_others_out_even_if_its_file_goes_away() {
        let dir = tempfile::TempDir::new().unwrap();
        let repo = Repo::model("org/name".to_owned());
        let cached = || Cached::new(&Cache::new(dir.path().to_owned()), &repo);
        let path = dir.path().join(".locks/models--org--name/tag.lock");
        let first = cached().lock("tag").unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| cached().lock("tag").unwrap());
            sleep(LOCK_POLL * 2);
            assert!(!second.is_finished());
            fs::remove_file(&path).unwrap();
            drop(first);
            let _second = second.join().unwrap();
            assert!(matches!(File::open(&path).unwrap().try_lock(), Err(TryLockError::WouldBlock)));
        });
    }
}
