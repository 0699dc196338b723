//! Images with a class each, for probes of frozen encoders: folders of classes, or shards with `.cls` members.
//!
//! Not a stream and no conversation: images are read one by one, by number, in a fixed order. Called by the recognition
//! tasks of `sail-train eval`.

use std::path::{Path, PathBuf};

use crate::error::{BadSample, Error, Failure, Result};
use crate::shard::{Extent, IMAGE_EXTENSIONS, RawSample, Shard};
use crate::source::find_shards;
use crate::spec::{SourceSpec, StoreSpec};
use crate::store::Store;

/// An image file and its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledImage {
    /// `class/file`, or `shard/key`.
    pub id: String,
    /// Its class: the name of the folder, or the text of the `.cls` member.
    pub class: String,
    /// The file, still encoded.
    pub bytes: Vec<u8>,
}

/// Images with a class each, in a fixed order.
#[derive(Debug)]
pub struct LabelledImages {
    store: Store,
    shards: Vec<String>,
    places: Vec<Place>,
}

/// Where one image is.
#[derive(Debug)]
enum Place {
    File { path: PathBuf, class: String },
    InShard { shard: usize, extent: Extent },
}

impl LabelledImages {
    /// The image files in the folders of a folder, each of which has the name of a class. Files that are no images by
    /// their extension are passed over.
    ///
    /// # Errors
    /// [`Error::Io`] when a folder cannot be listed or there is no image.
    pub fn in_folder(root: &Path) -> Result<Self> {
        let mut places = Vec::new();
        for folder in entries(root)? {
            if !folder.is_dir() {
                continue;
            }
            let class = name_of(&folder)?;
            for path in entries(&folder)? {
                let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
                if IMAGE_EXTENSIONS.contains(&extension.as_str()) && path.is_file() {
                    places.push(Place::File { path, class: class.clone() });
                }
            }
        }
        if places.is_empty() {
            let none = "there is no image in the folders of it\n\nhint: a folder of images is one folder for each class";
            return Err(io(root)(std::io::Error::other(none)));
        }
        Ok(Self { store: Store::new(&StoreSpec::default())?, shards: Vec::new(), places })
    }

    /// The samples of tar shards: one image member and a `.cls` member each, as WebDataset has them.
    ///
    /// # Errors
    /// As for the shards of a source: patterns that match nothing, shards that are broken; [`Error::EmptySource`].
    pub fn in_shards(name: &str, patterns: &[String]) -> Result<Self> {
        let store = Store::new(&StoreSpec::default())?;
        let source = SourceSpec::new(name, patterns.to_vec());
        let (mut shards, mut places) = (Vec::new(), Vec::new());
        for path in find_shards(&store, &source)? {
            let shard = Shard::open(&store, &path)?;
            let mut scanner = shard.scan(0, 0);
            while let Some(extent) = scanner.next_sample()? {
                places.push(Place::InShard { shard: shards.len(), extent });
            }
            // Opened again to be read: there may be more than a process may have open.
            shards.push(path);
        }
        if places.is_empty() {
            return Err(Error::EmptySource { name: name.to_owned(), shards: shards.len() });
        }
        Ok(Self { store, shards, places })
    }

    /// The files of the images that are in folders; none of those in shards.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.places.iter().filter_map(|place| match place {
            Place::File { path, .. } => Some(path.as_path()),
            Place::InShard { .. } => None,
        })
    }

    /// How many there are; at least one.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none, which is never so.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Reads the image of this number, from 0.
    ///
    /// # Errors
    /// Those of the file or the shard; [`Error::Unusable`] for a sample without a class or with several images.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn read(&self, number: usize) -> Result<LabelledImage> {
        match &self.places[number] {
            Place::File { path, class } => Ok(LabelledImage {
                id: format!("{class}/{}", name_of(path)?),
                class: class.clone(),
                bytes: crate::image::read_file(path)?,
            }),
            Place::InShard { shard, extent } => {
                let path = &self.shards[*shard];
                let raw = Shard::open(&self.store, path)?.read(*extent)?;
                let id = format!("{}/{}", path.rsplit('/').next().unwrap_or_default(), raw.key);
                match member(&raw) {
                    Ok((class, bytes)) => Ok(LabelledImage { id, class, bytes }),
                    Err(Failure::Sample(cause)) => Err(Error::Unusable { what: id, cause }),
                    Err(Failure::Run(error)) => Err(error),
                }
            }
        }
    }
}

/// The class and the image of a sample.
fn member(raw: &RawSample) -> std::result::Result<(String, Vec<u8>), Failure> {
    raw.check_unique()?;
    let missing = |wanted| BadSample::NoAnnotation { wanted, members: raw.suffixes() };
    let class =
        raw.text("cls")?.ok_or_else(|| missing("`.cls` member, which names its class"))?.trim().to_owned();
    if class.is_empty() {
        return Err(BadSample::Text { detail: "`cls` is empty".to_owned() }.into());
    }
    match raw.image_names().as_slice() {
        [name] => Ok((class, raw.image(name)?.to_vec())),
        [] => Err(BadSample::NoImage { members: raw.suffixes() }.into()),
        _ => Err(missing("single image").into()),
    }
}

/// What is in a folder, sorted.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(folder).map_err(io(folder))?;
    let paths = listed.map(|entry| entry.map(|entry| entry.path()));
    let mut paths: Vec<PathBuf> = paths.collect::<std::io::Result<_>>().map_err(io(folder))?;
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| io(path)(std::io::Error::other("its name is not UTF-8")))
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Io { path, cause }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A tar archive of these members.
    fn archive(path: &Path, members: &[(&str, &str)]) {
        let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
        for (name, text) in members {
            let mut header = tar::Header::new_ustar();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        builder.finish().unwrap();
    }

    fn all(images: &LabelledImages) -> Vec<(String, String, Vec<u8>)> {
        let read = |number| images.read(number).unwrap();
        (0..images.len()).map(read).map(|image| (image.id, image.class, image.bytes)).collect()
    }

    fn expected(images: &[(&str, &str, &str)]) -> Vec<(String, String, Vec<u8>)> {
        let owned = |(id, class, bytes): &(&str, &str, &str)| {
            ((*id).to_owned(), (*class).to_owned(), bytes.as_bytes().to_vec())
        };
        images.iter().map(owned).collect()
    }

    #[test]
    fn a_folder_for_each_class() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("b/2.JPG", "b2"), ("a/1.png", "a1"), ("b/1.jpg", "b1"), ("a/notes.txt", "no")] {
            fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            fs::write(dir.path().join(name), text).unwrap();
        }
        fs::write(dir.path().join("readme.png"), "not in a class").unwrap();
        let images = LabelledImages::in_folder(dir.path()).unwrap();
        assert_eq!(
            all(&images),
            expected(&[("a/1.png", "a", "a1"), ("b/1.jpg", "b", "b1"), ("b/2.JPG", "b", "b2")])
        );
        fs::remove_dir_all(dir.path().join("b")).unwrap();
        fs::remove_file(dir.path().join("a/1.png")).unwrap();
        let Error::Io { cause, .. } = LabelledImages::in_folder(dir.path()).unwrap_err() else { panic!() };
        assert!(cause.to_string().contains("hint: a folder of images is one folder for each class"));
        assert!(LabelledImages::in_folder(&dir.path().join("gone")).is_err());
    }

    #[test]
    fn shards_with_a_class_beside_each_image() {
        let dir = tempfile::tempdir().unwrap();
        archive(
            &dir.path().join("s-0.tar"),
            &[("x.png", "x"), ("x.cls", " 3\n"), ("y.jpg", "y"), ("y.cls", "cat")],
        );
        archive(&dir.path().join("s-1.tar"), &[("z.cls", "3"), ("z.png", "z")]);
        let pattern = dir.path().join("s-{0..1}.tar").display().to_string();
        let images = LabelledImages::in_shards("test", &[pattern]).unwrap();
        assert_eq!(
            all(&images),
            expected(&[("s-0.tar/x", "3", "x"), ("s-0.tar/y", "cat", "y"), ("s-1.tar/z", "3", "z")])
        );
    }

    #[test]
    fn samples_that_say_no_class_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let shard = dir.path().join("bad.tar");
        archive(
            &shard,
            &[
                ("a.png", "x"),
                ("b.cls", "1"),
                ("c.cls", " "),
                ("c.png", ""),
                ("d.cls", "1"),
                ("d.png", ""),
                ("d.jpg", ""),
            ],
        );
        let images = LabelledImages::in_shards("test", &[shard.display().to_string()]).unwrap();
        let wanted = ["`.cls` member", "no image", "`cls` is empty", "no single image"];
        for (number, wanted) in wanted.into_iter().enumerate() {
            let Error::Unusable { what, cause } = images.read(number).unwrap_err() else { panic!() };
            assert_eq!(what, format!("bad.tar/{}", ["a", "b", "c", "d"][number]));
            assert!(cause.to_string().contains(wanted), "{cause}");
        }
    }
}
