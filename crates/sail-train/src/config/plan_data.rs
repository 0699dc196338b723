//! The resolved `data` section of a plan, and what the data crate is told of it.

use std::path::PathBuf;

use sail_data::{
    Alpha, AnyResolution, Balance, DataSpec, ImageSpec, ImageTokens, Length, LossWeight, MixBy, Reencode,
    SourceSpec, StoreSpec, Template, TextSpec, Tiling, TooLong,
};
use serde::{Deserialize, Serialize};

use super::plan::Plan;
use super::values::VisualBalance;

/// The training stream. What `sail-data` needs of it is cut out by [`Plan::data_spec`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataPlan {
    /// Logical streams the data order is cut into.
    pub streams: usize,
    /// Threads that decode ahead; they do not change the order.
    pub threads: usize,
    /// Samples in the shuffle buffer, per stream and source.
    pub shuffle_buffer: usize,
    /// Candidate samples the packer chooses from, per stream.
    pub pack_buffer: usize,
    /// What the sources' weights are shares of.
    pub mix_by: MixBy,
    /// How often every source is read; `None`: as often as the steps need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Samples after which the stage ends; `None`: as many as the steps need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<u64>,
    /// What happens to a sample with more tokens than a pack.
    pub too_long: TooLong,
    /// How visual tokens are spread over the packs.
    pub balance: VisualBalance,
    /// Visual tokens that every pack should have; `None`: the mean so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visual_tokens_per_pack: Option<usize>,
    /// Share of unusable samples above which a source stops the run.
    pub max_error_rate: f64,
    /// Largest image that is decoded, pixels.
    pub max_pixels: u64,
    /// The chat template.
    pub template: Template,
    /// A Jinja template; `None`: that of the tokenizer's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_file: Option<PathBuf>,
    /// The system prompt; `None`: the template's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// How much an answer token counts.
    pub loss_weight: LossWeight,
    /// The tokens an image is written as.
    pub image_tokens: ImageTokens,
    /// How an image is cut into tiles.
    pub tiling: Tiling,
    /// Images at their own aspect ratio instead of tiles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub any_resolution: Option<AnyResolutionPlan>,
    /// Most frames of a video.
    pub max_frames: usize,
    /// Colour below transparent images; `None`: transparency is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<[u8; 3]>,
    /// Whether images are turned upright.
    pub exif_orientation: bool,
    /// Compression as an augmentation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reencode: Option<Reencode>,
    /// Mean of each RGB channel, subtracted after scaling to `[0, 1]`.
    pub mean: [f64; 3],
    /// Standard deviation of each RGB channel, divided by afterwards.
    pub std: [f64; 3],
    /// How shards are fetched and kept.
    pub store: StoreSpec,
    /// Where features of a frozen vision encoder are kept, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_cache: Option<FeatureCachePlan>,
    /// What is mixed, at least one.
    pub sources: Vec<SourceSpec>,
}

/// Features of images by a vision encoder that the stage never trains, see [`crate::feature_cache`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureCachePlan {
    /// The folder.
    pub dir: PathBuf,
    /// Most bytes in it; 0, which a configuration cannot say: it is only read.
    pub max_bytes: u64,
}

/// Images at their own aspect ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnyResolutionPlan {
    /// Fewest visual tokens of an image.
    pub min_tokens: usize,
    /// Most visual tokens of an image.
    pub max_tokens: usize,
}

/// What the model makes of pixels, as far as the data has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisualShape {
    /// Visual tokens of a tile.
    pub tokens_per_tile: usize,
    /// Pixels that a visual token is wide and high: patch size times merge.
    pub unit_px: usize,
}

impl Plan {
    /// What the data crate needs for training.
    pub fn data_spec(&self, shape: VisualShape) -> DataSpec {
        self.spec_of(&self.data.sources, shape)
    }

    /// The same for the held-out sources; `None` when the plan has no evaluation.
    pub fn eval_spec(&self, shape: VisualShape) -> Option<DataSpec> {
        let reencode = None;
        let spec = self.eval.as_ref().map(|eval| self.spec_of(&eval.sources, shape))?;
        Some(DataSpec { image: ImageSpec { reencode, ..spec.image.clone() }, ..spec })
    }

    fn spec_of(&self, sources: &[SourceSpec], shape: VisualShape) -> DataSpec {
        let VisualShape { tokens_per_tile, unit_px } = shape;
        let data = self.data.clone();
        DataSpec {
            sources: sources.to_vec(),
            mix_by: data.mix_by,
            length: match (data.epochs, data.samples) {
                (Some(epochs), _) => Length::Epochs(epochs),
                (None, Some(samples)) => Length::Samples(samples),
                (None, None) => Length::Endless,
            },
            streams: data.streams,
            seed: self.run.seed,
            tokens_per_pack: self.batch.tokens_per_pack,
            balance: match (data.balance, data.visual_tokens_per_pack) {
                (_, Some(tokens)) => Balance::Tokens(tokens),
                (VisualBalance::Mean, None) => Balance::Mean,
                (VisualBalance::Off, None) => Balance::Off,
            },
            too_long: data.too_long,
            shuffle_buffer: data.shuffle_buffer,
            pack_buffer: data.pack_buffer,
            max_error_rate: data.max_error_rate,
            text: TextSpec {
                template: data.template,
                template_file: data.template_file,
                system: data.system,
                image_tokens: data.image_tokens,
                loss_weight: data.loss_weight,
            },
            image: ImageSpec {
                tiling: data.tiling,
                any_resolution: data.any_resolution.map(|AnyResolutionPlan { min_tokens, max_tokens }| {
                    AnyResolution { unit_px, min_tokens, max_tokens }
                }),
                max_frames: data.max_frames,
                alpha: data.background.map_or(Alpha::Drop, Alpha::Over),
                exif_orientation: data.exif_orientation,
                reencode: data.reencode,
                mean: data.mean.map(|value| value as f32),
                std: data.std.map(|value| value as f32),
                max_pixels: data.max_pixels,
                ..ImageSpec::square(self.model.vision.image_px, tokens_per_tile)
            },
            store: data.store,
        }
    }
}
