//! What a data stream is made of: sources, text and image rules. No defaults; the configuration of
//! `sail-train` resolves those. [`DataSpec::validate`] is called by everything that takes a specification.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A mixture of sources and how it becomes packs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// The sources, mixed by their weights.
    pub sources: Vec<SourceSpec>,
    /// Number of logical streams S; pack g comes from stream g mod S.
    pub streams: usize,
    /// Seed of every order decision.
    pub seed: u64,
    /// Largest number of tokens in a pack.
    pub tokens_per_pack: usize,
    /// Samples held for shuffling, per stream and source; 1 keeps the order of the shards' samples.
    pub shuffle_buffer: usize,
    /// Candidate samples from which a stream fills a pack; 1 packs in order.
    pub pack_buffer: usize,
    /// Share of bad samples, in [0, 1), above which a source stops the run.
    pub max_error_rate: f64,
    /// How turns become tokens.
    pub text: TextSpec,
    /// How images become tiles.
    pub image: ImageSpec,
}

/// One source: a set of shards with a weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// Unique name, used in logs and counters.
    pub name: String,
    /// Paths of tar files, with brace expansion (`{000..099}`) and globs.
    pub shards: Vec<String>,
    /// Weight of the mixture, by samples; relative to the other sources.
    pub weight: f64,
}

/// How turns become tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextSpec {
    /// The chat template.
    pub template: Template,
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
}

impl Template {
    /// The system prompt used when neither the sample nor the configuration gives one.
    pub fn default_system(self) -> Option<&'static str> {
        match self {
            Self::Chatml | Self::Sail => None,
            Self::Smollm => Some("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        }
    }

    /// The text between `<|im_end|>` and the next turn.
    pub fn separator(self) -> &'static str {
        match self {
            Self::Chatml | Self::Smollm => "\n",
            Self::Sail => "",
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

/// How images become tiles.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// Side of a square tile, in pixels.
    pub tile_px: usize,
    /// Visual tokens that the model makes of one tile.
    pub tokens_per_tile: usize,
    /// How many tiles, in which layout.
    pub tiling: Tiling,
    /// Mean per channel (R, G, B) of values in [0, 1].
    pub mean: [f32; 3],
    /// Standard deviation per channel (R, G, B) of values in [0, 1].
    pub std: [f32; 3],
    /// Images with more pixels (width x height) are bad samples, refused before decoding.
    pub max_pixels: u64,
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

impl DataSpec {
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
        self.image.validate()
    }
}

impl ImageSpec {
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
    fn a_spec_survives_json() {
        let spec = spec(&["a.tar"]);
        let text = serde_json::to_string(&spec).unwrap();
        assert!(text.contains("\"template\":\"chatml\""), "{text}");
        assert_eq!(serde_json::from_str::<DataSpec>(&text).unwrap(), spec);
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
