//! The images that JSON lines name: files below one folder or URL, and nothing outside it.

use std::io::{Error as IoError, ErrorKind};
use std::path::Path;

use bytes::Bytes;

use super::IMAGE_EXTENSIONS;
use crate::error::{BadSample, Error, Failure};
use crate::store::{Store, is_remote};

/// Most bytes of an image file: it is held in memory as a whole.
const MAX_FILE_BYTES: u64 = 1 << 30;
/// The code of Linux for a chain of links without an end.
const LINK_LOOP: i32 = 40;

/// Where images begin.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    store: Store,
    root: String,
}

impl Folder {
    /// The folder that a shard lies in.
    pub(super) fn beside(store: &Store, shard: &str) -> Self {
        let root =
            shard.rsplit_once('/').map_or(".", |(folder, _)| if folder.is_empty() { "/" } else { folder });
        Self { store: store.clone(), root: root.to_owned() }
    }

    /// This folder or URL.
    pub(super) fn at(store: &Store, root: &str) -> Self {
        Self { store: store.clone(), root: root.to_owned() }
    }

    /// Another folder or URL.
    pub(super) fn move_to(&mut self, root: &str) {
        root.clone_into(&mut self.root);
    }

    /// The content of the file with this name.
    ///
    /// # Errors
    /// [`BadSample::BadPath`], [`BadSample::MissingFile`]; [`Error`] for what is no fault of the sample.
    pub(super) fn read(&self, name: &str) -> Result<Bytes, Failure> {
        let path = self.resolve(name)?;
        let blob = self.store.open(&path).map_err(|error| self.blame(&path, error))?;
        let bytes = blob.len();
        if bytes > MAX_FILE_BYTES {
            let detail = format!("it has {bytes} bytes, more than the limit of {MAX_FILE_BYTES}");
            return Err(BadSample::MissingFile { path, detail }.into());
        }
        let read = blob.read(0, bytes).map_err(|cause| Error::Io { path: path.clone().into(), cause });
        Ok(read.map_err(|error| self.blame(&path, error))?.into())
    }

    /// The names of the images in a folder, sorted; none when `name` is no folder, or the root is remote.
    ///
    /// # Errors
    /// As [`Folder::read`].
    pub(super) fn list(&self, name: &str) -> Result<Option<Vec<String>>, Failure> {
        let path = self.resolve(name)?;
        if self.is_remote() || !Path::new(&path).is_dir() {
            return Ok(None);
        }
        let failed = |cause: IoError| self.blame(&path, Error::Io { path: path.clone().into(), cause });
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?.file_name();
            let Some(entry) = entry.to_str() else { continue };
            let extension =
                entry.rsplit_once('.').map_or("", |(_, extension)| extension).to_ascii_lowercase();
            if IMAGE_EXTENSIONS.contains(&extension.as_str()) {
                names.push(format!("{}/{entry}", name.trim_end_matches('/')));
            }
        }
        names.sort_unstable();
        Ok(Some(names))
    }

    fn is_remote(&self) -> bool {
        is_remote(&self.root)
    }

    /// The path or URL of `name`, which must stay below the root.
    fn resolve(&self, name: &str) -> Result<String, BadSample> {
        let mut depth = 0_usize;
        let below = |part: &str| {
            match part {
                "" | "." => {}
                ".." => depth = depth.checked_sub(1)?,
                _ => depth += 1,
            }
            Some(())
        };
        let stays = name.split('/').try_for_each::<_, Option<()>>(below).is_some();
        if !stays || depth == 0 || name.starts_with('/') || is_remote(name) || name.contains('\0') {
            return Err(BadSample::BadPath { reference: shortened(name) });
        }
        let name =
            if self.root.starts_with("http") && self.is_remote() { escaped(name) } else { name.to_owned() };
        Ok(format!("{}/{name}", self.root.trim_end_matches('/')))
    }

    /// Whose fault it is that a file cannot be read. A server that does not answer says nothing about the sample.
    fn blame(&self, path: &str, error: Error) -> Failure {
        let missing =
            |detail: String| Failure::Sample(BadSample::MissingFile { path: shortened(path), detail });
        let cause = match &error {
            Error::Io { cause, .. } => cause,
            // No image: there is none, or its first bytes are those of a compressed file.
            Error::NoObject { .. }
            | Error::CompressedShard { .. }
            | Error::BadCompression { .. }
            | Error::TooLargeUnpacked { .. } => return missing(error.to_string()),
            _ => return Failure::Run(error),
        };
        let theirs = match cause.kind() {
            ErrorKind::NotFound => true,
            _ if self.is_remote() => false,
            ErrorKind::PermissionDenied
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::InvalidFilename
            | ErrorKind::InvalidInput
            | ErrorKind::UnexpectedEof => true,
            // Not a regular file, as the store says.
            ErrorKind::Other => cause.raw_os_error().is_none(),
            _ => cause.raw_os_error() == Some(LINK_LOOP),
        };
        if theirs { missing(cause.to_string()) } else { Failure::Run(error) }
    }
}

/// A name as it stands in a URL.
fn escaped(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let escape = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    name.bytes().map(escape).collect()
}

/// A name for a message: annotations can hold anything at any length.
pub(super) fn shortened(name: &str) -> String {
    const MAX_CHARS: usize = 200;
    match name.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::StoreSpec;

    fn folder(root: &str) -> Folder {
        Folder { store: Store::new(&StoreSpec::default()).unwrap(), root: root.into() }
    }

    #[test]
    fn names_stay_below_the_root() {
        for name in ["a.jpg", "a/../b.jpg", "./a//b.jpg", "..a/b.jpg", "a/./b", "naïve café.jpg"] {
            assert_eq!(folder("/r/").resolve(name).unwrap(), format!("/r/{name}"));
        }
        for name in
            ["", ".", "..", "/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "a\0.jpg", "http://h/x", "a/.."]
        {
            let refused = folder("/r").resolve(name).unwrap_err();
            assert_eq!(refused.reason(), "bad_path", "{name}");
        }
        assert_eq!(folder("https://h/r").resolve("a b/c?.jpg").unwrap(), "https://h/r/a%20b/c%3F.jpg");
        assert_eq!(folder("s3://b/r").resolve("a b.jpg").unwrap(), "s3://b/r/a b.jpg");
    }

    #[test]
    fn the_default_root_is_the_folder_of_the_shard() {
        let root = |shard| Folder::beside(&folder("").store, shard).root;
        assert_eq!(
            ["a.jsonl", "/a.jsonl", "d/e/a.jsonl", "s3://b/a.jsonl"].map(root),
            [".", "/", "d/e", "s3://b"]
        );
    }

    #[test]
    fn long_names_are_cut_in_messages() {
        assert_eq!(shortened(&"ä".repeat(200)), "ä".repeat(200));
        assert_eq!(shortened(&"ä".repeat(5000)), format!("{}...", "ä".repeat(200)));
    }
}
