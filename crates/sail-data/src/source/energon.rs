//! Dataset folders of Megatron-Energon: which shards their `train` split has.
//!
//! Read are `.nv-meta/split.yaml` and, where there is none, `.nv-meta/.info.json`. What a sample is made of is told by
//! the source's `layout`, not by `dataset.yaml`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use webdataset::braceexpand;

use crate::error::{Error, Result};
use crate::store::Store;

/// A file of this folder has more bytes only when it is something else.
const MAX_BYTES: u64 = 256 << 20;

#[derive(Deserialize)]
struct Split {
    split_parts: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    exclude: Vec<String>,
}

#[derive(Deserialize)]
struct Info {
    shard_counts: serde_json::Map<String, Value>,
}

/// The shards of the training split when `pattern` names a dataset folder, as patterns; else none.
///
/// # Errors
/// [`Error::Pattern`] when its files cannot be understood, [`Error::Io`].
pub(super) fn train_split(store: &Store, name: &str, pattern: &str) -> Result<Option<Vec<String>>> {
    let folder = pattern.trim_end_matches('/');
    let meta = format!("{folder}/.nv-meta");
    if !Path::new(&meta).is_dir() {
        return Ok(None);
    }
    let malformed = |detail: String| Error::Pattern { name: name.into(), pattern: pattern.into(), detail };
    let split = format!("{meta}/split.yaml");
    let shards = if Path::new(&split).exists() {
        let split: Split = serde_yaml::from_slice(&read(store, &split)?)
            .map_err(|error| malformed(format!("`{split}` is no list of shards: {error}")))?;
        train_shards(split).map_err(malformed)?
    } else {
        let info = format!("{meta}/.info.json");
        let info: Info = serde_json::from_slice(&read(store, &info)?)
            .map_err(|error| malformed(format!("`{info}` does not count shards: {error}")))?;
        info.shard_counts.into_iter().map(|(shard, _)| shard).collect()
    };
    if shards.is_empty() {
        return Err(malformed("its split `train` has no shards".into()));
    }
    let folder = glob::Pattern::escape(folder);
    let escape = |shard: String| format!("{folder}/{}", glob::Pattern::escape(&shard));
    Ok(Some(shards.into_iter().map(escape).collect()))
}

/// The shards of `train`, braces expanded, without those that are excluded.
fn train_shards(mut split: Split) -> std::result::Result<Vec<String>, String> {
    let parts: Vec<String> = split.split_parts.keys().map(|part| format!("`{part}`")).collect();
    let train = split
        .split_parts
        .remove("train")
        .ok_or_else(|| format!("it has no split `train`, but {}", parts.join(", ")))?;
    let expand = |names: Vec<String>| -> std::result::Result<Vec<String>, String> {
        let expanded = names.iter().map(|name| braceexpand(name)).collect::<std::result::Result<Vec<_>, _>>();
        Ok(expanded.map_err(|error| error.to_string())?.concat())
    };
    let (shards, excluded) = (expand(train)?, expand(split.exclude)?);
    if let Some(unknown) = excluded.iter().find(|name| !shards.contains(name) && name.contains(".tar/")) {
        return Err(format!("it excludes the sample `{unknown}`; only whole shards can be left out"));
    }
    Ok(shards.into_iter().filter(|shard| !excluded.contains(shard)).collect())
}

fn read(store: &Store, path: &str) -> Result<Vec<u8>> {
    let blob = store.open(path)?;
    blob.read(0, blob.len().min(MAX_BYTES)).map_err(|cause| Error::Io { path: path.into(), cause })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Source;
    use crate::testing::spec;

    /// A dataset folder with these files in `.nv-meta`, and three shards.
    fn dataset(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for folder in [".nv-meta", "shards"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        for shard in 0..3 {
            std::fs::write(dir.path().join(format!("shards/{shard}.tar")), "").unwrap();
        }
        for (name, text) in files {
            std::fs::write(dir.path().join(".nv-meta").join(name), text).unwrap();
        }
        dir
    }

    fn shards(files: &[(&str, &str)]) -> Result<Vec<String>> {
        let dir = dataset(files);
        let root = dir.path().display().to_string();
        let found = Source::open_all(&spec(&[&format!("{root}/")]))?.remove(0).shards;
        Ok(found.iter().map(|shard| shard.strip_prefix(&root).unwrap().to_owned()).collect())
    }

    #[test]
    fn the_training_split_is_read() {
        let split =
            "exclude: []\nsplit_parts:\n  train:\n  - shards/{0..1}.tar\n  val: [shards/2.tar]\n  test: []\n";
        let info = r#"{"shard_counts": {"shards/2.tar": 5, "shards/0.tar": 7}}"#;
        let first = ["/shards/0.tar", "/shards/1.tar"];
        assert_eq!(shards(&[("split.yaml", split), (".info.json", info)]).unwrap(), first);
        assert_eq!(shards(&[(".info.json", info)]).unwrap(), ["/shards/2.tar", "/shards/0.tar"]);
        let without = split.replace("[]\nsplit", "[shards/0.tar]\nsplit");
        assert_eq!(shards(&[("split.yaml", &without)]).unwrap(), ["/shards/1.tar"]);
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        let cases = [
            ("split.yaml", "split_parts: [", "split.yaml"),
            ("split.yaml", "split_parts: {val: [a.tar]}", "`val`"),
            ("split.yaml", "split_parts: {train: []}", "no shards"),
            (
                "split.yaml",
                "split_parts: {train: [shards/0.tar]}\nexclude: [shards/0.tar/key]",
                "whole shards",
            ),
            ("split.yaml", "split_parts: {train: [shards/9.tar]}", "9.tar"),
            (".info.json", "[]", ".info.json"),
            ("dataset.yaml", "{}", ".info.json"),
        ];
        for (name, text, expected) in cases {
            let message = shards(&[(name, text)]).unwrap_err().to_string();
            assert!(message.contains(expected), "{name}: {message}");
        }
    }
}
