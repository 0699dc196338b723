//! What commands that read samples have in common: which shards, and how they are read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::builder::NonEmptyStringValueParser;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::spec::{DataSpec, ImageSpec, Layout, SourceSpec, Template, TextSpec, Tiling};
use crate::tools::access::{IMAGE_TOKENS, Setup, text_spec};
use crate::tools::error::{Result, ToolError};

/// The normalisation of most encoders (`ImageNet`'s), and the largest image that Pillow opens.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// For a command with an option `--spec`.
#[derive(Debug, clap::Args)]
pub(super) struct ShardArgs {
    /// Shards: paths with braces and globs
    #[arg(value_name = "SHARD", required_unless_present = "spec")]
    pub(super) shards: Vec<String>,
    /// `conversations`, `captions`, `pages` or `interleaved` [default: conversations]
    #[arg(long, requires = "shards", value_parser = by_name::<Layout>, help_heading = "How samples are read")]
    layout: Option<Layout>,
    /// The folder of the images that JSON lines name [default: that of the file]
    #[arg(long, value_name = "FOLDER", requires = "shards", help_heading = "How samples are read")]
    images: Option<String>,
    /// Number of threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

#[derive(Debug, clap::Args)]
pub(super) struct DataArgs {
    /// A specification with `tokenizer` and `data`, such as the `data.yaml` of a run; gives all that follows
    #[arg(
        long, value_name = "FILE", help_heading = "How samples are read",
        conflicts_with_all = ["tokenizer", "template", "system", "image_tokens", "image_px", "tokens_per_tile", "max_tiles", "no_thumbnail", "tokens_per_pack"]
    )]
    spec: Option<PathBuf>,
    /// A `tokenizer.json`, or the folder of one; without it text is not tokenised
    #[arg(long, value_name = "PATH", help_heading = "How samples are read")]
    tokenizer: Option<PathBuf>,
    /// The chat template: `chatml`, `sail`, `smollm`, or `jinja` (the tokenizer's own) [default: chatml]
    #[arg(long, requires = "tokenizer", value_parser = by_name::<Template>, help_heading = "How samples are read")]
    template: Option<Template>,
    /// System prompt for samples without one; empty for none
    #[arg(long, value_name = "TEXT", requires = "tokenizer", help_heading = "How samples are read")]
    system: Option<String>,
    #[arg(
        help = "The tokens before, for and after an image [default: <img>,<IMG_CONTEXT>,</img>]",
        long, value_name = "START,CONTEXT,END", requires = "tokenizer", value_delimiter = ',',
        value_parser = NonEmptyStringValueParser::new(), help_heading = "How samples are read"
    )]
    image_tokens: Option<Vec<String>>,
    /// Side of a tile, in pixels [default: 448]
    #[arg(long, value_name = "PX", help_heading = "How samples are read")]
    image_px: Option<usize>,
    /// Visual tokens of a tile [default: 256]
    #[arg(long, value_name = "N", help_heading = "How samples are read")]
    tokens_per_tile: Option<usize>,
    /// Most tiles of an image, without its thumbnail [default: 12]
    #[arg(long, value_name = "N", help_heading = "How samples are read")]
    max_tiles: Option<usize>,
    /// No tile of the whole image beside several tiles
    #[arg(long, help_heading = "How samples are read")]
    no_thumbnail: bool,
    /// Tokens of a pack; a sample with more is too long
    #[arg(long, value_name = "N", requires = "tokenizer", help_heading = "How samples are read")]
    tokens_per_pack: Option<usize>,
    #[command(flatten)]
    shards: ShardArgs,
}

/// The file that a run leaves in its folder.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SpecFile {
    tokenizer: PathBuf,
    pub(super) data: DataSpec,
}

/// The value of an enum that the specification names in snake case.
pub(super) fn by_name<T: DeserializeOwned>(name: &str) -> std::result::Result<T, String> {
    serde_json::from_value(Value::String(name.to_owned())).map_err(|error| error.to_string())
}

/// A number of bytes, with or without a unit.
pub(super) fn bytes(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" | "k" => 1_000,
        "mb" | "m" => 1_000_000,
        "gb" | "g" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err("expected a number with KB, MB, GB, KiB, MiB or GiB".into()),
    };
    let number: u64 =
        digits.trim().parse().map_err(|_| "expected a whole number, such as 500MB".to_owned())?;
    number.checked_mul(factor).filter(|&bytes| bytes > 0).ok_or("it is out of range".into())
}

/// The threads that a command works on.
pub(super) fn threads(threads: Option<u16>) -> Result<rayon::ThreadPool> {
    let threads = threads.map_or(0, usize::from);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| crate::Error::Threads { threads, detail: error.to_string() }.into())
}

impl ShardArgs {
    /// The threads that were asked for.
    pub(super) fn threads(&self) -> Result<rayon::ThreadPool> {
        threads(self.threads)
    }

    /// A source of these shards, read as the options say.
    pub(super) fn source(&self, name: &str, shards: Vec<String>) -> SourceSpec {
        let layout = self.layout.unwrap_or_default();
        SourceSpec { layout, images: self.images.clone(), ..SourceSpec::new(name, shards) }
    }
}

impl DataArgs {
    /// The threads that were asked for.
    pub(super) fn threads(&self) -> Result<rayon::ThreadPool> {
        self.shards.threads()
    }

    /// Finds the shards and loads the tokenizer.
    pub(super) fn open(&self) -> Result<Setup> {
        let sources = self.sources();
        let Some(path) = &self.spec else {
            let mut spec = DataSpec::in_order(sources, self.text()?, self.image());
            spec.tokens_per_pack = self.tokens_per_pack.unwrap_or(usize::MAX);
            return self.setup(spec, self.tokenizer.as_deref());
        };
        let SpecFile { tokenizer, mut data } = read_spec(path)?;
        if !sources.is_empty() {
            data.sources = sources;
        }
        self.setup(data, Some(&tokenizer))
    }

    fn setup(&self, spec: DataSpec, tokenizer: Option<&Path>) -> Result<Setup> {
        let path =
            tokenizer.map(|path| if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() });
        Setup::open(spec, path.as_deref()).map_err(|error| match error {
            ToolError::Data(crate::Error::MissingToken { path, token, .. }) if self.spec.is_none() => {
                ToolError::usage(
                    format!("tokenizer `{}` has no token `{token}`", path.display()),
                    "name tokens that it has, with `--image-tokens START,CONTEXT,END`",
                )
            }
            other => other,
        })
    }

    fn sources(&self) -> Vec<SourceSpec> {
        let groups = by_stem(&self.shards.shards).into_iter();
        groups.map(|(name, shards)| self.shards.source(&name, shards)).collect()
    }

    fn text(&self) -> Result<TextSpec> {
        let names: [&str; 3] = match &self.image_tokens {
            None => IMAGE_TOKENS,
            Some(names) => match names.as_slice() {
                [start, context, end] => [start, context, end],
                names => {
                    return Err(ToolError::usage(
                        format!("`--image-tokens` has {} names, expected 3", names.len()),
                        "for example `--image-tokens '<img>,<IMG_CONTEXT>,</img>'`",
                    ));
                }
            },
        };
        let template = self.template.unwrap_or(Template::Chatml);
        Ok(TextSpec { template, system: self.system.clone(), ..text_spec(names) })
    }

    fn image(&self) -> ImageSpec {
        let max = self.max_tiles.unwrap_or(12);
        ImageSpec {
            tiling: Tiling { min: 1, max, thumbnail: !self.no_thumbnail },
            mean: MEAN,
            std: STD,
            ..ImageSpec::square(self.image_px.unwrap_or(448), self.tokens_per_tile.unwrap_or(256))
        }
    }
}

/// Reads a specification file.
pub(super) fn read_spec(path: &Path) -> Result<SpecFile> {
    let text = std::fs::read_to_string(path).map_err(ToolError::io("read", path))?;
    // JSON is YAML as well.
    serde_yaml::from_str(&text)
        .map_err(|error| ToolError::SpecFile { path: path.to_owned(), detail: error.to_string() })
}

/// Shards whose names differ in their last number are one source, called by what they share; a shell that
/// expands globs itself makes no difference.
fn by_stem(shards: &[String]) -> Vec<(String, Vec<String>)> {
    let mut order: Vec<(String, String)> = Vec::new();
    let mut groups: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for shard in shards {
        let (folder, file) = shard.rsplit_once('/').unwrap_or(("", shard));
        let group = (folder.to_owned(), stem(file));
        if !groups.contains_key(&group) {
            order.push(group.clone());
        }
        groups.entry(group).or_default().push(shard.clone());
    }
    let unique = |stem: &str| order.iter().filter(|(_, other)| other == stem).count() == 1;
    let name = |(folder, stem): &(String, String)| match stem.as_str() {
        "" if folder.is_empty() => "shards".to_owned(),
        "" => folder.clone(),
        _ if unique(stem) || folder.is_empty() => stem.clone(),
        _ => format!("{folder}/{stem}"),
    };
    let names: Vec<String> = order.iter().map(name).collect();
    names.into_iter().zip(order.iter().filter_map(|group| groups.remove(group))).collect()
}

/// A file name or pattern without its suffix and without the number, braces or globs at its end.
fn stem(file: &str) -> String {
    let end = [".tar", ".jsonl", ".json"].iter().filter_map(|suffix| file.find(suffix)).min();
    let name = &file[..end.unwrap_or(file.len())];
    let name = name.find(['{', '*', '?', '[']).map_or(name, |at| &name[..at]);
    name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches(['-', '_', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(shards: &[&str]) -> Vec<(String, usize)> {
        let shards: Vec<String> = shards.iter().map(|&shard| shard.to_owned()).collect();
        by_stem(&shards).into_iter().map(|(name, shards)| (name, shards.len())).collect()
    }

    #[test]
    fn sources_are_called_by_their_shards() {
        for (file, name) in [
            ("caption-train-000001.tar", "caption-train"),
            ("ocr-{000..099}.tar.gz", "ocr"),
            ("*.tar", ""),
            ("a_b.jsonl", "a_b"),
            ("00001.tar", ""),
        ] {
            assert_eq!(stem(file), name, "{file}");
        }
        let one = |name: &str, n| (name.to_owned(), n);
        assert_eq!(groups(&["d/a-1.tar", "d/b-1.tar", "d/a-2.tar"]), [one("a", 2), one("b", 1)]);
        assert_eq!(groups(&["d/a-1.tar", "e/a-1.tar"]), [one("d/a", 1), one("e/a", 1)]);
        assert_eq!(groups(&["d/1.tar", "2.tar"]), [one("d", 1), one("shards", 1)]);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("512"), Ok(512));
        assert_eq!(bytes("2MB"), Ok(2_000_000));
        assert_eq!(bytes("1GiB"), Ok(1 << 30));
        for wrong in ["", "MB", "0", "1.5GB", "-1", "1TB", "99999999999GB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_those_of_the_specification() {
        assert_eq!(by_name::<Layout>("pages"), Ok(Layout::Pages));
        let message = by_name::<Template>("vicuna").unwrap_err();
        assert!(message.contains("vicuna") && message.contains("chatml"), "{message}");
    }
}
