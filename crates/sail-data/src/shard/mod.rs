//! One shard: where its samples lie, and the members of one sample at its place.
//!
//! A [`Scanner`] yields the extent of each sample, from any sample's offset on, without decoding anything;
//! [`Shard::read`] reads the members of one. What kinds of shards there are, is known here only: `tar` reads
//! archives, `jsonl` JSON lines, and `folder` the images that those name.

mod folder;
pub(crate) mod index;
mod jsonl;
mod tar;

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use self::folder::{Folder, shortened};
pub(crate) use self::tar::end_mark;
use crate::error::{BadSample, Error, Failure, Result};
use crate::store::{Blob, Store, is_remote};

/// One sample's place: a shard of its source, and a byte range in it. Stored as `[shard, epoch, offset, bytes]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "(u32, u32, u64, u64)", into = "(u32, u32, u64, u64)")]
pub(crate) struct SampleRef {
    /// Index of the shard in its source.
    pub(crate) shard: u32,
    /// The epoch of its source that it is drawn in, from 0.
    pub(crate) epoch: u32,
    /// Its bytes in the shard.
    pub(crate) extent: Extent,
}

/// The bytes of a sample in its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Extent {
    /// Where it begins: in an archive, at the header of its first member.
    pub(crate) offset: u64,
    /// Bytes up to its end: in an archive, that of its last member's padding.
    pub(crate) bytes: u64,
}

impl From<(u32, u32, u64, u64)> for SampleRef {
    fn from((shard, epoch, offset, bytes): (u32, u32, u64, u64)) -> Self {
        Self { shard, epoch, extent: Extent { offset, bytes } }
    }
}

impl From<SampleRef> for (u32, u32, u64, u64) {
    fn from(SampleRef { shard, epoch, extent: Extent { offset, bytes } }: SampleRef) -> Self {
        (shard, epoch, offset, bytes)
    }
}

/// An open shard.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    blob: Arc<Blob>,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Tar,
    /// JSON lines, and where the images that they name lie.
    Lines(Folder),
}

/// Yields the extents of the samples of one shard, in order.
#[derive(Debug)]
pub(crate) struct Scanner(AnyScanner);

#[derive(Debug)]
enum AnyScanner {
    Indexed(index::IndexScanner),
    Tar(tar::TarScanner),
    Lines(jsonl::LineScanner),
}

impl Shard {
    /// Opens the shard at this path: JSON lines by the extension, else a tar archive.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::CompressedShard`], [`Error::WholeJson`].
    pub(crate) fn open(store: &Store, path: &str) -> Result<Self> {
        let kind = match extension(path).as_str() {
            "jsonl" => Kind::Lines(Folder::beside(store, path)),
            "json" => return Err(Error::WholeJson { shard: path.to_owned() }),
            _ => Kind::Tar,
        };
        let blob = store.open(path)?;
        Ok(Self { blob, kind })
    }

    /// The images that JSON lines name begin at this folder or URL, not at the folder of the shard.
    pub(crate) fn with_images(mut self, root: Option<&str>) -> Self {
        if let (Kind::Lines(folder), Some(root)) = (&mut self.kind, root) {
            folder.move_to(root);
        }
        self
    }

    /// A scanner that goes on at the offset of sample number `ordinal`.
    pub(crate) fn scan(&self, offset: u64, ordinal: u64) -> Scanner {
        let blob = Arc::clone(&self.blob);
        Scanner(match self.kind {
            Kind::Tar => AnyScanner::Tar(tar::TarScanner::new(blob, offset, ordinal)),
            Kind::Lines(_) => AnyScanner::Lines(jsonl::LineScanner::new(blob, offset, ordinal)),
        })
    }

    /// Reads the sample at `place`.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::BrokenShard`], also when the shard has changed since it was scanned.
    pub(crate) fn read(&self, place: Extent) -> Result<RawSample> {
        match &self.kind {
            Kind::Tar => tar::read_sample(&self.blob, place),
            Kind::Lines(folder) => {
                let sample = jsonl::read_sample(&self.blob, place)?;
                Ok(RawSample { folder: Some(folder.clone()), ..sample })
            }
        }
    }

    /// Whether any sample lies in the shard.
    pub(crate) fn has_samples(&self) -> Result<bool> {
        Ok(self.scan(0, 0).next_sample()?.is_some())
    }
}

impl Scanner {
    /// Goes by an index of the shard, from sample number `ordinal` on.
    pub(crate) fn indexed(shard: Shard, index: index::Index, ordinal: u64) -> Self {
        Self(AnyScanner::Indexed(index::IndexScanner::new(shard, index, ordinal)))
    }

    /// Where the next sample begins, or the search for it goes on.
    pub(crate) fn offset(&self) -> u64 {
        match &self.0 {
            AnyScanner::Indexed(scanner) => scanner.offset(),
            AnyScanner::Tar(scanner) => scanner.offset(),
            AnyScanner::Lines(scanner) => scanner.offset(),
        }
    }

    /// The number of the next sample in the shard.
    pub(crate) fn ordinal(&self) -> u64 {
        match &self.0 {
            AnyScanner::Indexed(scanner) => scanner.ordinal(),
            AnyScanner::Tar(scanner) => scanner.ordinal(),
            AnyScanner::Lines(scanner) => scanner.ordinal(),
        }
    }

    /// The next sample; `None` at the end of the shard.
    ///
    /// # Errors
    /// [`Error::BrokenShard`] when the shard is truncated or malformed, [`Error::Io`].
    pub(crate) fn next_sample(&mut self) -> Result<Option<Extent>> {
        match &mut self.0 {
            AnyScanner::Indexed(scanner) => scanner.next_sample(),
            AnyScanner::Tar(scanner) => scanner.next_sample(),
            AnyScanner::Lines(scanner) => scanner.next_sample(),
        }
    }
}

/// The extension of a path or URL that tells the kind of shard, in lower case, without that of a compression.
fn extension(path: &str) -> String {
    let path = if is_remote(path) { path.split(['?', '#']).next().unwrap_or(path) } else { path };
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    let compressed = [".gz", ".zst", ".bz2", ".xz"].iter().find_map(|codec| name.strip_suffix(codec));
    compressed.unwrap_or(&name).rsplit_once('.').map_or("", |(_, extension)| extension).to_owned()
}

/// The extensions of members and files that are images.
pub(crate) const IMAGE_EXTENSIONS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];

/// One member of a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    /// Everything after the first dot of the base name, in lower case.
    pub(crate) suffix: String,
    pub(crate) data: Bytes,
}

impl Member {
    /// Whether it is an image by its extension.
    pub(crate) fn is_image(&self) -> bool {
        IMAGE_EXTENSIONS.contains(&self.suffix.rsplit('.').next().unwrap_or_default())
    }
}

/// The members of one sample.
#[derive(Clone, Debug)]
pub(crate) struct RawSample {
    pub(crate) key: String,
    pub(crate) members: Vec<Member>,
    /// Where its images lie when they are files of their own.
    folder: Option<Folder>,
}

impl RawSample {
    /// A sample that is all in its members.
    pub(crate) fn new(key: &str, members: Vec<Member>) -> Self {
        Self { key: key.to_owned(), members, folder: None }
    }

    /// The same, with the images that it names in a folder or at a URL.
    pub(crate) fn with_images_in(self, store: &Store, root: &str) -> Self {
        Self { folder: Some(Folder::at(store, root)), ..self }
    }

    /// The member with this suffix.
    pub(crate) fn member(&self, suffix: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.suffix == suffix)
    }

    /// The text of the member with this suffix, without a byte order mark.
    ///
    /// # Errors
    /// [`BadSample::Text`] when it is not UTF-8.
    pub(crate) fn text(&self, suffix: &str) -> std::result::Result<Option<&str>, BadSample> {
        let Some(member) = self.member(suffix) else { return Ok(None) };
        match std::str::from_utf8(&member.data) {
            Ok(text) => Ok(Some(text.strip_prefix('\u{feff}').unwrap_or(text))),
            Err(error) => Err(BadSample::Text { detail: format!("`{suffix}` is not UTF-8: {error}") }),
        }
    }

    /// The `.json` member, without a byte order mark.
    pub(crate) fn json(&self) -> Option<&[u8]> {
        let data = &self.member("json")?.data[..];
        Some(data.strip_prefix("\u{feff}".as_bytes()).unwrap_or(data))
    }

    /// The names of its image members, in the order of the archive.
    pub(crate) fn image_names(&self) -> Vec<String> {
        self.members.iter().filter(|member| member.is_image()).map(|member| member.name.clone()).collect()
    }

    /// The image that an annotation names: a member by its name, base name or suffix, or a file.
    ///
    /// # Errors
    /// [`BadSample::UnknownImage`], [`BadSample::BadPath`], [`BadSample::MissingFile`]; errors of a remote store.
    pub(crate) fn image(&self, reference: &str) -> std::result::Result<Bytes, Failure> {
        if let Some(folder) = &self.folder {
            return folder.read(reference);
        }
        let images = || self.members.iter().filter(|member| member.is_image());
        let suffix = reference.to_ascii_lowercase();
        let found = images()
            .find(|member| member.name == reference)
            .or_else(|| images().find(|member| base_name(&member.name) == base_name(reference)))
            .or_else(|| images().find(|member| member.suffix == suffix));
        let unknown = || BadSample::UnknownImage {
            reference: shortened(reference),
            members: shortened(&self.suffixes()),
        };
        Ok(found.map(|member| member.data.clone()).ok_or_else(unknown)?)
    }

    /// The names of the images in the folder that an annotation names, sorted; none when it is no folder.
    ///
    /// # Errors
    /// As [`RawSample::image`].
    pub(crate) fn images_in(&self, reference: &str) -> std::result::Result<Option<Vec<String>>, Failure> {
        self.folder.as_ref().map_or(Ok(None), |folder| folder.list(reference))
    }

    /// The suffixes of its members, for messages.
    pub(crate) fn suffixes(&self) -> String {
        let suffixes: Vec<String> =
            self.members.iter().map(|member| format!("`{}`", member.suffix)).collect();
        if suffixes.is_empty() { "none".to_owned() } else { suffixes.join(", ") }
    }

    /// Refuses a sample with two members of the same suffix.
    pub(crate) fn check_unique(&self) -> std::result::Result<(), BadSample> {
        let mut seen = std::collections::HashSet::new();
        match self.members.iter().find(|member| !seen.insert(&member.suffix)) {
            Some(member) => Err(BadSample::DuplicateMember { name: member.name.clone() }),
            None => Ok(()),
        }
    }
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}
