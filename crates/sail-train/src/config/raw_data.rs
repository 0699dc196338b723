//! The form of the `data` section and of sources: the second half of the reference manual, see `raw.rs`.

use std::path::PathBuf;

use sail_data::{Layout, LossWeight, MixBy, PageChoice, StoreSpec, Template, TooLong};
use schemars::JsonSchema;
use serde::Deserialize;

use super::raw_values::RawList;
use super::schema::words;
use super::values::VisualBalance;

/// `data`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawData {
    /// Logical streams the data order is cut into; fixes the order and is never the number of threads or devices.
    /// A multiple or a divisor of `batch.packs_per_step`. Default: 1.
    pub(super) streams: usize,
    /// Threads that decode ahead, at most 512. They do not change the order. Default: 1.
    pub(super) threads: usize,
    /// Samples in the shuffle buffer, per stream and source. Default: 256.
    pub(super) shuffle_buffer: usize,
    /// Candidate samples the packer chooses from, at least, per stream; there are always enough for two packs.
    /// Default: 64.
    pub(super) pack_buffer: usize,
    /// What the sources' weights are shares of: `samples` or `tokens`. Default: `samples`.
    #[schemars(schema_with = "words::<MixBy>")]
    pub(super) mix_by: MixBy,
    /// How often every source is read; one that ends leaves the mixture, and with the last one the stage ends.
    /// Default: as often as the steps need.
    pub(super) epochs: Option<u64>,
    /// Samples after which the stage ends, over all sources. Default: as many as the steps need.
    pub(super) samples: Option<u64>,
    /// What happens to a sample with more tokens than a pack: `drop`, `error`, or `truncate_text` (cut at its end, never
    /// inside an image). Default: `drop`.
    #[schemars(schema_with = "words::<TooLong>")]
    pub(super) too_long: TooLong,
    /// How visual tokens are spread over the packs, so that all devices have equal work: `mean` (each has the
    /// stream's share so far) or `off`. Default: `mean`.
    #[schemars(schema_with = "words::<VisualBalance>")]
    pub(super) balance: VisualBalance,
    /// Visual tokens that every pack should have, instead of the mean. Default: none.
    pub(super) visual_tokens_per_pack: Option<usize>,
    /// Share of unusable samples above which a source stops the run, in `[0, 1)`. Default: 0.05.
    pub(super) max_error_rate: f64,
    /// Largest image that is decoded, pixels; larger ones count as unusable. Default: 50 million.
    pub(super) max_pixels: u64,
    /// Chat template: `chatml`, `sail`, `smollm` or `jinja` (the tokenizer's own). Default: `chatml`.
    #[schemars(schema_with = "words::<Template>")]
    pub(super) template: Template,
    /// A Jinja template, instead of that in the tokenizer's folder; with `template: jinja` alone. Default: none.
    pub(super) template_file: Option<PathBuf>,
    /// System prompt for samples that bring none; `""`: none. Default: the template's own.
    pub(super) system: Option<String>,
    /// How much each of a sample's n answer tokens counts: `token` 1, `sample` 1/n, `square` 1/sqrt(n).
    /// Default: `token`.
    #[schemars(schema_with = "words::<LossWeight>")]
    pub(super) loss_weight: LossWeight,
    /// The tokens an image is written as; each must be in the tokenizer.
    pub(super) image_tokens: RawImageTokens,
    /// How an image is cut into tiles.
    pub(super) tiling: RawTiling,
    /// Images at their own aspect ratio instead of tiles; sides become multiples of patch size x
    /// `model.projector.merge`. Default: tiles.
    pub(super) any_resolution: Option<RawAnyResolution>,
    /// Most frames of a video; more are thinned out evenly. Default: 32.
    pub(super) max_frames: usize,
    /// Colour (`[R, G, B]`, 0 to 255) that transparent images are laid on. Default: transparency is dropped, as in the
    /// published SAIL-VL code.
    pub(super) background: Option<[u8; 3]>,
    /// Whether images are turned upright as their EXIF orientation says. Default: true.
    pub(super) exif_orientation: bool,
    /// Images that are compressed to JPEG once more before they are used, as an augmentation. Default: none.
    pub(super) reencode: Option<RawReencode>,
    /// Mean of each RGB channel after scaling to `[0, 1]`. Default: `ImageNet`'s, `[0.485, 0.456, 0.406]`.
    pub(super) mean: [f64; 3],
    /// Standard deviation of each RGB channel, above 0. Default: `ImageNet`'s, `[0.229, 0.224, 0.225]`.
    pub(super) std: [f64; 3],
    /// How shards are fetched and kept.
    pub(super) store: RawStore,
    /// Keeps what a vision encoder that never trains makes of images. Default: none.
    pub(super) feature_cache: Option<RawFeatureCache>,
    /// What is mixed. At least one is required.
    pub(super) sources: Option<Vec<RawSource>>,
}

impl Default for RawData {
    fn default() -> Self {
        Self {
            streams: 1,
            threads: 1,
            shuffle_buffer: 256,
            pack_buffer: 64,
            mix_by: MixBy::Samples,
            epochs: None,
            samples: None,
            too_long: TooLong::Drop,
            balance: VisualBalance::Mean,
            visual_tokens_per_pack: None,
            max_error_rate: 0.05,
            max_pixels: 50_000_000,
            template: Template::Chatml,
            template_file: None,
            system: None,
            loss_weight: LossWeight::Token,
            image_tokens: RawImageTokens::default(),
            tiling: RawTiling::default(),
            any_resolution: None,
            max_frames: 32,
            background: None,
            exif_orientation: true,
            reencode: None,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            store: RawStore::default(),
            feature_cache: None,
            sources: None,
        }
    }
}

/// `data.image_tokens`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawImageTokens {
    /// Before an image. Default: `<img>`.
    pub(super) start: String,
    /// One for each visual token. Default: `<IMG_CONTEXT>`.
    pub(super) context: String,
    /// After an image. Default: `</img>`.
    pub(super) end: String,
}

impl Default for RawImageTokens {
    fn default() -> Self {
        Self { start: "<img>".to_owned(), context: "<IMG_CONTEXT>".to_owned(), end: "</img>".to_owned() }
    }
}

/// `data.tiling`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawTiling {
    /// Fewest tiles of an image, at least 1. Default: 1.
    pub(super) min: usize,
    /// Most tiles of an image, without the thumbnail. Default: 1.
    pub(super) max: usize,
    /// Whether an image of several tiles is followed by a small copy of the whole. Default: true.
    pub(super) thumbnail: bool,
}

impl Default for RawTiling {
    fn default() -> Self {
        Self { min: 1, max: 1, thumbnail: true }
    }
}

/// `data.any_resolution`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawAnyResolution {
    /// Fewest visual tokens of an image; a smaller one is enlarged. Default: 4.
    pub(super) min_tokens: usize,
    /// Most visual tokens of an image; a larger one is shrunk. Default: 4096.
    pub(super) max_tokens: usize,
}

impl Default for RawAnyResolution {
    fn default() -> Self {
        Self { min_tokens: 4, max_tokens: 4096 }
    }
}

/// `data.reencode`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawReencode {
    /// Share of the images, in `[0, 1]`. Default: 0.5.
    pub(super) probability: f64,
    /// Lowest and highest JPEG quality, 1 to 100. Default: `[75, 100]`.
    pub(super) quality: [u8; 2],
}

impl Default for RawReencode {
    fn default() -> Self {
        Self { probability: 0.5, quality: [75, 100] }
    }
}

/// `data.store`
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawStore {
    /// How often a request that fails is tried again. Default: 5.
    pub(super) retries: usize,
    /// Longest time to connect, and longest silence of a server, seconds. Default: 30.
    pub(super) timeout_secs: f64,
    /// How far a remote shard is fetched ahead, bytes. Default: 32 MiB.
    pub(super) read_ahead_bytes: u64,
    /// A folder in which fetched shards are kept. Default: none.
    pub(super) cache: Option<RawCache>,
}

impl Default for RawStore {
    fn default() -> Self {
        let StoreSpec { retries, timeout_secs, read_ahead_bytes, .. } = StoreSpec::default();
        Self { retries, timeout_secs, read_ahead_bytes, cache: None }
    }
}

/// `data.store.cache`
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawCache {
    /// The folder; processes may share it. Required.
    pub(super) dir: Option<PathBuf>,
    /// Most bytes in it; the shards used longest ago go first. Required.
    pub(super) max_bytes: Option<u64>,
}

/// `data.feature_cache`. The features of an image are computed once, by itself, and read back in later epochs, steps,
/// evaluations and runs that see the same pixels with the same encoder in the same dtype. For stages whose `train.vision`
/// is frozen throughout, without `data.reencode`. docs/data.md says when it pays.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
pub(super) struct RawFeatureCache {
    /// The folder; ranks and runs may share it. What is in it may be removed at any time. Required.
    pub(super) dir: Option<PathBuf>,
    /// Most bytes in it, those of other encoders included; then no more is added. Required.
    pub(super) max_bytes: Option<u64>,
}

/// An item of `data.sources` and `eval.sources`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, expecting = "a mapping with `name` and `shards`")]
pub(super) struct RawSource {
    /// Name in logs, unique in its list. Required.
    pub(super) name: Option<String>,
    /// Shards: a path or URL or a list of them, with braces (`{000..017}`) and globs (`*`): tar files, also compressed,
    /// JSON lines (`.jsonl`), or a dataset folder of Megatron-Energon. Required.
    pub(super) shards: Option<RawList<String>>,
    /// Folder or URL that the image names in JSON lines begin at. Default: the folder of the shard.
    pub(super) images: Option<String>,
    /// How a sample's members become a conversation: `conversations`, `captions`, `pages` or `interleaved`.
    /// Default: `conversations`.
    #[schemars(schema_with = "words::<Layout>")]
    pub(super) layout: Layout,
    /// What is asked where the layout has no questions, one of these by the sample's key. Default: the layout's own.
    pub(super) questions: Vec<String>,
    /// Which page of a document is taken: `first` (with text) or `random`, another each epoch. Default: `first`.
    #[schemars(schema_with = "words::<PageChoice>")]
    pub(super) page: PageChoice,
    /// Share of the samples drawn from here, relative to the other sources; above 0. Default: 1.0.
    pub(super) weight: f64,
    /// A file of sampling weights, as `sail-data rebalance` writes it: the probability with which each sample is read in an
    /// epoch, drawn anew in each. For `data.sources` alone. Default: every sample is read.
    pub(super) sampling_weights: Option<PathBuf>,
}

impl Default for RawSource {
    fn default() -> Self {
        Self {
            name: None,
            shards: None,
            images: None,
            layout: Layout::Conversations,
            questions: Vec::new(),
            page: PageChoice::First,
            weight: 1.0,
            sampling_weights: None,
        }
    }
}
