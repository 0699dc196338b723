//! What a data stream is made of: sources, text and image rules. No defaults; the configuration of
//! `sail-train` resolves those. [`DataSpec::validate`] is called by everything that takes a specification.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A mixture of sources and how it becomes packs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// The sources, mixed by their weights.
    pub sources: Vec<SourceSpec>,
    /// What the weights are shares of.
    pub mix_by: MixBy,
    /// How long the stream is.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub length: Length,
    /// Number of logical streams S; pack g comes from stream g mod S.
    pub streams: usize,
    /// Seed of every order decision.
    pub seed: u64,
    /// Largest number of tokens in a pack.
    pub tokens_per_pack: usize,
    /// How visual tokens are spread over the packs.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub balance: Balance,
    /// What happens to a sample with more tokens than a pack.
    pub too_long: TooLong,
    /// Samples held for shuffling, per stream and source; 1 keeps the order of the shards' samples.
    pub shuffle_buffer: usize,
    /// Candidate samples, at least, from which a stream fills a pack; there are always enough for two packs.
    pub pack_buffer: usize,
    /// Share of bad samples, in [0, 1), above which a source stops the run.
    pub max_error_rate: f64,
    /// How turns become tokens.
    pub text: TextSpec,
    /// How images become tiles.
    pub image: ImageSpec,
    /// How shards are fetched.
    pub store: StoreSpec,
}

/// How visual tokens are spread over the packs, so that the encoder has the same work on every device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// As it comes; packs are filled for their tokens alone.
    Off,
    /// Every pack has the share that the stream had so far.
    Mean,
    /// Every pack has this many.
    Tokens(usize),
}

/// What the weights of the sources are shares of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixBy {
    /// Samples.
    Samples,
    /// Tokens, visual ones included.
    Tokens,
}

/// How long the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// As long as it is read; sources begin anew.
    Endless,
    /// Every source is read this many times; one that ends leaves the mixture.
    Epochs(u64),
    /// This many samples are taken from the mixture, over all streams; bad ones count, those that their sampling
    /// weight leaves out do not.
    Samples(u64),
}

/// What happens to a sample with more tokens than a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// The run stops.
    Error,
    /// It is skipped and counted.
    Drop,
    /// It is cut off at its end, never inside an image; without anything left to learn it is skipped.
    TruncateText,
}

/// How shards are fetched and kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoreSpec {
    /// How often a failed request is tried again.
    pub retries: usize,
    /// Longest time to connect, and longest silence of a server, in seconds.
    pub timeout_secs: f64,
    /// How far a remote shard is fetched ahead of its reader.
    pub read_ahead_bytes: u64,
    /// Where whole shards are kept on disk; `None`: nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSpec>,
}

/// A folder of fetched shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheSpec {
    /// The folder.
    pub dir: PathBuf,
    /// Most bytes in it; the shards used longest ago go first.
    pub max_bytes: u64,
}

impl Default for StoreSpec {
    fn default() -> Self {
        Self { retries: 5, timeout_secs: 30.0, read_ahead_bytes: 32 << 20, cache: None }
    }
}

/// One source: a set of shards with a weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// Unique name, used in logs and counters.
    pub name: String,
    /// Paths or URLs of shards, with brace expansion (`{000..099}`) and globs: tar files (also compressed), or JSON
    /// lines (`.jsonl`) whose images are files.
    pub shards: Vec<String>,
    /// Folder or URL that the image names in JSON lines begin at; `None`: the folder of the shard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<String>,
    /// How a sample's members become a conversation.
    #[serde(default, skip_serializing_if = "is_default")]
    pub layout: Layout,
    /// What is asked in the layouts that have no questions, one of these by the sample's key; empty: the layout's own
    /// question.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub questions: Vec<String>,
    /// Which page of a document becomes the sample.
    #[serde(default, skip_serializing_if = "is_default")]
    pub page: PageChoice,
    /// Weight of the mixture, by samples; relative to the other sources.
    pub weight: f64,
    /// A file of `sail-data rebalance`: with which probability a stream reads each sample in an epoch, drawn anew in
    /// each. `None`: every sample is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_weights: Option<PathBuf>,
}

/// How a sample's members become a conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// The annotation holds the turns, as `conversations` (LLaVA, InternVL) or as `messages`.
    #[default]
    Conversations,
    /// img2dataset: an image and its caption (`.txt`, or `caption` in `.json`).
    Captions,
    /// IDL-WDS: a document's pages (multi-page TIFF) and their text (`pages` in `.json`).
    Pages,
    /// Energon, OBELICS: `images` and `texts`, null where the other has its turn. A text after an image is an answer.
    Interleaved,
}

/// Which page of a document becomes the sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageChoice {
    /// The first with text.
    #[default]
    First,
    /// One of those with text, another each epoch.
    Random,
}

impl Layout {
    /// Its name in a specification.
    pub fn name(self) -> &'static str {
        match self {
            Self::Conversations => "conversations",
            Self::Captions => "captions",
            Self::Pages => "pages",
            Self::Interleaved => "interleaved",
        }
    }

    /// What is asked where the layout has no questions of its own and the source gives none.
    pub fn default_question(self) -> &'static str {
        match self {
            Self::Pages => "Read the text on this page.",
            _ => "Describe this image.",
        }
    }
}

/// How turns become tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextSpec {
    /// The chat template.
    pub template: Template,
    /// Where the Jinja template is, if not in the tokenizer's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_file: Option<PathBuf>,
    /// System prompt for samples without one: `None` is the template's own default, an empty string none.
    pub system: Option<String>,
    /// The tokens around and for an image.
    pub image_tokens: ImageTokens,
    /// Weight of each answer token in the loss.
    pub loss_weight: LossWeight,
}

/// The chat template: how turns are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// `<|im_start|>role\n...<|im_end|>\n`, no system message by default.
    Chatml,
    /// As `ChatML` without the newline after `<|im_end|>`. The system prompt is given by the configuration.
    Sail,
    /// `ChatML` with the default system prompt of `SmolLM` instruct models.
    Smollm,
    /// The tokenizer's own, in Jinja: `chat_template.jinja` beside it, else `chat_template` in its
    /// `tokenizer_config.json`. It says itself what is written without a system prompt.
    Jinja,
}

impl Template {
    /// The system prompt used when neither the sample nor the configuration gives one; a Jinja template has it in
    /// its text.
    pub fn default_system(self) -> Option<&'static str> {
        match self {
            Self::Chatml | Self::Sail | Self::Jinja => None,
            Self::Smollm => Some("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        }
    }

    /// The text between `<|im_end|>` and the next turn of a built-in template.
    pub fn separator(self) -> &'static str {
        match self {
            Self::Chatml | Self::Smollm => "\n",
            Self::Sail | Self::Jinja => "",
        }
    }
}

/// Weight of each answer token of a sample with n answer tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossWeight {
    /// 1: every token counts the same.
    Token,
    /// 1/n: every sample counts the same.
    Sample,
    /// 1/sqrt(n): between the two.
    Square,
}

impl LossWeight {
    /// The weight of one of `answer_tokens` tokens.
    pub fn per_token(self, answer_tokens: usize) -> f32 {
        let n = answer_tokens as f32;
        match self {
            Self::Token => 1.0,
            Self::Sample => 1.0 / n,
            Self::Square => 1.0 / n.sqrt(),
        }
    }
}

/// The tokens that stand for an image: `start`, then `context` once per visual token, then `end`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageTokens {
    /// Before the first visual token, such as `<img>`.
    pub start: String,
    /// One per visual token, such as `<IMG_CONTEXT>`.
    pub context: String,
    /// After the last visual token, such as `</img>`.
    pub end: String,
}

/// How images become pixels for the encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// Side of a square tile, in pixels.
    pub tile_px: usize,
    /// Visual tokens that the model makes of one tile.
    pub tokens_per_tile: usize,
    /// How many tiles, in which layout. Not used with `any_resolution`.
    pub tiling: Tiling,
    /// Images keep their aspect ratio and are not tiled; `None`: square tiles.
    pub any_resolution: Option<AnyResolution>,
    /// Most frames of a video; more are thinned out evenly.
    pub max_frames: usize,
    /// What becomes of transparency.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub alpha: Alpha,
    /// Whether images are turned upright as their EXIF orientation says.
    pub exif_orientation: bool,
    /// Compress images again before they are used, as an augmentation; `None`: never.
    pub reencode: Option<Reencode>,
    /// Mean per channel (R, G, B) of values in [0, 1].
    pub mean: [f32; 3],
    /// Standard deviation per channel (R, G, B) of values in [0, 1].
    pub std: [f32; 3],
    /// Images with more pixels (width x height) are bad samples, refused before decoding.
    pub max_pixels: u64,
}

/// Images at their own aspect ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnyResolution {
    /// Height and width become multiples of this: patch size times the projector's merge, in pixels.
    pub unit_px: usize,
    /// Fewest visual tokens of an image; a smaller one is enlarged.
    pub min_tokens: usize,
    /// Most visual tokens of an image; a larger one is shrunk.
    pub max_tokens: usize,
}

/// What becomes of transparency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alpha {
    /// Dropped; the colours below it show, as in the published SAIL-VL code.
    Drop,
    /// Composited on this colour (R, G, B).
    Over([u8; 3]),
}

/// Compression as an augmentation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reencode {
    /// Share of the images that are compressed again, in [0, 1].
    pub probability: f64,
    /// Lowest and highest JPEG quality, in 1..=100.
    pub quality: [u8; 2],
}

/// Number of tiles per image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tiling {
    /// Fewest tiles, without the thumbnail.
    pub min: usize,
    /// Most tiles, without the thumbnail; shared between the images of a sample.
    pub max: usize,
    /// Append a tile of the whole image when there is more than one tile.
    pub thumbnail: bool,
}

impl SourceSpec {
    /// Conversations in these shards, with weight 1.
    pub fn new(name: &str, shards: Vec<String>) -> Self {
        Self {
            name: name.to_owned(),
            shards,
            images: None,
            layout: Layout::Conversations,
            questions: Vec::new(),
            page: PageChoice::First,
            weight: 1.0,
            sampling_weights: None,
        }
    }

    /// Whether a sample has another text in another epoch.
    pub(crate) fn takes_random_pages(&self) -> bool {
        self.layout == Layout::Pages && self.page == PageChoice::Random
    }
}

impl DataSpec {
    /// The sources one after the other, every sample once and whole.
    pub fn in_order(sources: Vec<SourceSpec>, text: TextSpec, image: ImageSpec) -> Self {
        Self {
            sources,
            mix_by: MixBy::Samples,
            length: Length::Epochs(1),
            streams: 1,
            seed: 0,
            tokens_per_pack: usize::MAX,
            balance: Balance::Off,
            too_long: TooLong::Error,
            shuffle_buffer: 1,
            pack_buffer: 1,
            max_error_rate: 0.05,
            text,
            image,
            store: StoreSpec::default(),
        }
    }

    /// Checks every value's range.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] names the first value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        check(!self.sources.is_empty(), "sources", &"[]", "at least one source")?;
        for (index, source) in self.sources.iter().enumerate() {
            let at = |field: &str| format!("sources[{index}].{field}");
            let unique = self.sources.iter().filter(|other| other.name == source.name).count() == 1;
            check(unique && !source.name.is_empty(), at("name"), &source.name, "a unique name")?;
            check(!source.shards.is_empty(), at("shards"), &"[]", "at least one shard")?;
            let weight_ok = source.weight.is_finite() && source.weight > 0.0;
            check(weight_ok, at("weight"), &source.weight, "a finite number above 0")?;
        }
        for (field, value) in [
            ("streams", self.streams),
            ("tokens_per_pack", self.tokens_per_pack),
            ("shuffle_buffer", self.shuffle_buffer),
            ("pack_buffer", self.pack_buffer),
        ] {
            check(value >= 1, field, &value, "at least 1")?;
        }
        let rate_ok = (0.0..1.0).contains(&self.max_error_rate);
        check(rate_ok, "max_error_rate", &self.max_error_rate, "a number in [0, 1)")?;
        if let Balance::Tokens(visual) = self.balance {
            check(visual <= self.tokens_per_pack, "balance", &visual, "at most `tokens_per_pack`")?;
        }
        if let Length::Epochs(n) | Length::Samples(n) = self.length {
            check(n >= 1, "length", &n, "at least 1")?;
        }
        let timeout = self.store.timeout_secs;
        check(timeout.is_finite() && timeout > 0.0, "store.timeout_secs", &timeout, "a number above 0")?;
        if let Some(file) = &self.text.template_file {
            let jinja = self.text.template == Template::Jinja;
            check(jinja, "text.template_file", &file.display(), "nothing, or `jinja` as `text.template`")?;
        }
        self.image.validate()
    }
}

impl ImageSpec {
    /// One square tile an image, values in [0, 1], nothing optional.
    pub fn square(tile_px: usize, tokens_per_tile: usize) -> Self {
        Self {
            tile_px,
            tokens_per_tile,
            tiling: Tiling { min: 1, max: 1, thumbnail: false },
            any_resolution: None,
            max_frames: 32,
            alpha: Alpha::Drop,
            exif_orientation: true,
            reencode: None,
            mean: [0.0; 3],
            std: [1.0; 3],
            max_pixels: 178_956_970,
        }
    }

    /// Checks every value's range.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] names the first value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("image.tile_px", self.tile_px),
            ("image.tokens_per_tile", self.tokens_per_tile),
            ("image.tiling.min", self.tiling.min),
        ] {
            check(value >= 1, field, &value, "at least 1")?;
        }
        let tiling = self.tiling;
        check(tiling.max >= tiling.min, "image.tiling.max", &tiling.max, "at least `image.tiling.min`")?;
        check(self.max_pixels >= 1, "image.max_pixels", &self.max_pixels, "at least 1")?;
        check(self.max_frames >= 1, "image.max_frames", &self.max_frames, "at least 1")?;
        if let Some(any) = self.any_resolution {
            check(any.unit_px >= 1, "image.any_resolution.unit_px", &any.unit_px, "at least 1")?;
            check(any.min_tokens >= 1, "image.any_resolution.min_tokens", &any.min_tokens, "at least 1")?;
            let expected = "at least `image.any_resolution.min_tokens`";
            check(
                any.max_tokens >= any.min_tokens,
                "image.any_resolution.max_tokens",
                &any.max_tokens,
                expected,
            )?;
        }
        if let Some(Reencode { probability, quality: [low, high] }) = self.reencode {
            let share = (0.0..=1.0).contains(&probability);
            check(share, "image.reencode.probability", &probability, "a number in [0, 1]")?;
            let ordered = 1 <= low && low <= high && high <= 100;
            let found = format!("[{low}, {high}]");
            check(ordered, "image.reencode.quality", &found, "two numbers of 1 to 100, the lower first")?;
        }
        for channel in 0..3 {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            check(mean.is_finite(), format!("image.mean[{channel}]"), &mean, "a finite number")?;
            check(
                std.is_finite() && std > 0.0,
                format!("image.std[{channel}]"),
                &std,
                "a finite number above 0",
            )?;
        }
        Ok(())
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn check(
    ok: bool,
    field: impl Into<String>,
    found: &dyn std::fmt::Display,
    expected: &'static str,
) -> Result<()> {
    if ok {
        Ok(())
    } else {
        Err(Error::InvalidSpec { field: field.into(), found: found.to_string(), expected })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::spec;

    #[test]
    fn layouts_are_called_as_in_a_specification() {
        for layout in [Layout::Conversations, Layout::Captions, Layout::Pages, Layout::Interleaved] {
            assert_eq!(serde_json::to_value(layout).unwrap(), layout.name());
        }
    }

    #[test]
    fn a_spec_survives_json() {
        let spec = spec(&["a.tar"]);
        let text = serde_json::to_string(&spec).unwrap();
        assert!(text.contains("\"template\":\"chatml\""), "{text}");
        assert_eq!(serde_json::from_str::<DataSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn a_spec_survives_yaml_by_way_of_json() {
        let mut spec = spec(&["a.tar"]);
        (spec.length, spec.balance) = (Length::Epochs(3), Balance::Tokens(64));
        spec.image.alpha = Alpha::Over([1, 2, 3]);
        let json = serde_json::to_value(&spec).unwrap();
        let text = serde_yaml::to_string(&json).unwrap();
        assert!(text.contains("length:\n  epochs: 3\n"), "{text}");
        assert_eq!(serde_yaml::from_str::<DataSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn every_range_is_checked() {
        type Spoil = fn(&mut DataSpec);
        let broken: [(&str, Spoil); 12] = [
            ("sources", |s| s.sources.clear()),
            ("sources[0].name", |s| s.sources[0].name.clear()),
            ("sources[0].shards", |s| s.sources[0].shards.clear()),
            ("sources[0].weight", |s| s.sources[0].weight = f64::NAN),
            ("streams", |s| s.streams = 0),
            ("pack_buffer", |s| s.pack_buffer = 0),
            ("max_error_rate", |s| s.max_error_rate = 1.0),
            ("image.tile_px", |s| s.image.tile_px = 0),
            ("image.tiling.min", |s| s.image.tiling.min = 0),
            ("image.tiling.max", |s| s.image.tiling = Tiling { min: 3, max: 2, thumbnail: false }),
            ("image.max_pixels", |s| s.image.max_pixels = 0),
            ("image.std[1]", |s| s.image.std[1] = 0.0),
        ];
        for (field, spoil) in broken {
            let mut spec = spec(&["a.tar"]);
            spoil(&mut spec);
            let message = spec.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("`{field}` is ")), "{field}: {message}");
        }
        assert!(spec(&["a.tar"]).validate().is_ok());
    }

    #[test]
    fn loss_weights_follow_their_formulas() {
        assert!((LossWeight::Token.per_token(16) - 1.0).abs() < f32::EPSILON);
        assert!((LossWeight::Sample.per_token(16) - 0.0625).abs() < f32::EPSILON);
        assert!((LossWeight::Square.per_token(16) - 0.25).abs() < f32::EPSILON);
    }
}
