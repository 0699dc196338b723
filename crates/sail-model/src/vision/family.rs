//! What a family's file provides, and how the families are listed.
//!
//! Not a family itself. Called by [`super::VisionConfig`], which holds the description of any family.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tch::Tensor;

use crate::attention::Segments;
use crate::error::Result;
use crate::keys::{Refusal, UnknownKeys, config_error};
use crate::params::Builder;
use crate::weights::{Layout, own_names};

/// A vision transformer under construction or built: pixels to tokens, tokens to features.
pub trait VisionModel {
    /// Class and other tokens that [`VisionModel::embed`] puts before the patches of each image.
    fn prefix(&self) -> i64 {
        0
    }

    /// Images of one size `[n, 3, h * patch, w * patch]` of any float type to the tokens that the first
    /// block takes `[n, prefix + h * w, d]`, positions added, rows of the grid first.
    fn embed(&self, pixels_nchw: &Tensor) -> Tensor;

    /// All blocks and the final norm, where there is one: `[t, d]` -> `[t, d]`, every image a segment that sees itself only.
    fn encode(&self, x_td: &Tensor, images: &Segments) -> Tensor;
}

/// What every family's description says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Width of the features.
    pub hidden_size: i64,
    /// Transformer blocks.
    pub num_layers: i64,
    /// Side in pixels of the images that the position table was made for.
    pub image_size: i64,
    /// Side of a patch in pixels.
    pub patch_size: i64,
}

/// What a family's blocks are made of, and what stands around them: enough to count work and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VitShape {
    /// Class and other tokens before the patches of each image.
    pub prefix: i64,
    /// Norm of the patches before positions are added.
    pub patch_norm: Option<NormKind>,
    /// Attention heads.
    pub heads: i64,
    /// Both norms of a block.
    pub norm: NormKind,
    /// Queries and keys pass through an `RMSNorm` over their whole width.
    pub qk_norm: bool,
    /// Inner width of the feed-forward layer.
    pub inner: i64,
    /// The feed-forward layer is a `SwiGLU`; if not, two matrices with a GELU between.
    pub gated: bool,
    /// Both halves of a block are scaled per channel.
    pub layer_scale: bool,
    /// Norm after the last block.
    pub final_norm: Option<NormKind>,
}

/// A normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// With mean and bias.
    Layer,
    /// By the mean square.
    Rms,
}

/// Where a family keeps the positions that its patches are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// Name of the table, `[.., p, d]`, inside the module.
    pub name: &'static str,
    /// Rows of the table before those of the patches.
    pub prefix: i64,
    /// transformers resamples the table for images of another size; if not, an export must hold the table
    /// of the size it is for.
    pub resampled: bool,
}

/// A family: the fields of its config.json, under transformers' names and with its defaults, and the
/// model they describe.
pub trait VisionFamily:
    Clone + Debug + Default + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// `model_type` of config.json.
    const MODEL_TYPE: &'static str;
    /// The class of transformers that the weights are for.
    const ARCHITECTURE: &'static str;
    /// Put in front of the names by files of larger models that hold this one; the empty one first.
    const PREFIXES: &'static [&'static str] = &[
        "",
        // Dual encoders; the SAIL-VL and InternVL code; older files of SigLIP's vision part alone.
        "vision_model.",
        // LLaVA, InternVL, PaliGemma and Gemma 3 as transformers writes them, from its version 5 down.
        "model.vision_tower.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "vision_tower.vision_model.",
        // LLaVA's own code.
        "model.vision_tower.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
        // An image classifier.
        "dinov2.",
    ];
    /// How files name the tensors, this family's own names first.
    const LAYOUTS: &'static [Layout] = &[own_names];
    /// Tensors that files may hold and no feature depends on; see [`crate::weights::Naming::ignored`].
    const IGNORED: &'static [&'static str] = &[];
    /// The table of positions.
    const POSITIONS: Positions;

    /// Width, depth and sizes.
    fn geometry(&self) -> Geometry;

    /// What the model is made of.
    fn shape(&self) -> VitShape;

    /// Changes the size of images that the position table is for.
    fn set_image_size(&mut self, px: i64);

    /// Checks that the fields fit together and ask for nothing that is not built.
    ///
    /// # Errors
    /// The first key that does not pass.
    fn check(&self) -> std::result::Result<(), Refusal>;

    /// Builds the model.
    ///
    /// # Errors
    /// What the builder's source reports.
    fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>>;

    /// Parameters, by the names inside the module, that no feature depends on. They get no gradient and
    /// are kept so that an export is complete.
    fn without_gradient(&self) -> &'static [&'static str] {
        &[]
    }

    /// The keys of another published config.json of this family, with another `model_type`, under the
    /// names of this one; None for any other.
    fn from_alias(model_type: &str, keys: &Map<String, Value>) -> Option<Map<String, Value>> {
        let _ = (model_type, keys);
        None
    }

    /// Puts values in that a file that leaves them out means otherwise than `Default` does.
    fn complete(keys: &mut Map<String, Value>, written_by: UnknownKeys) {
        let _ = (keys, written_by);
    }

    /// Names and config.json of the family's own published code, where that computes this model.
    fn original_layout(&self) -> Option<(Layout, Value)> {
        None
    }
}

/// A family in the list of [`super::FAMILIES`].
pub(super) struct Family {
    /// `model_type` of its config.json.
    pub(super) model_type: &'static str,
    /// Reads keys of config.json; None when the `model_type` is none of the family's.
    pub(super) parse: Parse,
}

type Parse = fn(&str, &Map<String, Value>, UnknownKeys) -> Option<Result<Box<dyn AnyFamily>>>;

impl Family {
    /// The entry of `F`.
    pub(super) const fn of<F: VisionFamily>() -> Self {
        Self { model_type: F::MODEL_TYPE, parse: parse::<F> }
    }
}

/// [`VisionFamily`] as an object.
pub(super) trait AnyFamily: Debug + Send + Sync {
    fn model_type(&self) -> &'static str;
    fn architecture(&self) -> &'static str;
    fn naming(&self) -> crate::weights::Naming;
    fn positions(&self) -> Positions;
    fn geometry(&self) -> Geometry;
    fn shape(&self) -> VitShape;
    fn with_image_size(&self, px: i64) -> Box<dyn AnyFamily>;
    fn check(&self) -> std::result::Result<(), Refusal>;
    fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>>;
    fn without_gradient(&self) -> &'static [&'static str];
    fn fields(&self) -> Value;
    fn original_layout(&self) -> Option<(Layout, Value)>;
}

impl<F: VisionFamily> AnyFamily for F {
    fn model_type(&self) -> &'static str {
        F::MODEL_TYPE
    }

    fn architecture(&self) -> &'static str {
        F::ARCHITECTURE
    }

    fn naming(&self) -> crate::weights::Naming {
        crate::weights::Naming {
            prefixes: F::PREFIXES.to_vec(),
            layouts: F::LAYOUTS.to_vec(),
            ignored: F::IGNORED.to_vec(),
        }
    }

    fn positions(&self) -> Positions {
        F::POSITIONS
    }

    fn geometry(&self) -> Geometry {
        F::geometry(self)
    }

    fn shape(&self) -> VitShape {
        F::shape(self)
    }

    fn with_image_size(&self, px: i64) -> Box<dyn AnyFamily> {
        let mut config = self.clone();
        config.set_image_size(px);
        Box::new(config)
    }

    fn check(&self) -> std::result::Result<(), Refusal> {
        F::check(self)
    }

    fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>> {
        F::build(self, builder)
    }

    fn without_gradient(&self) -> &'static [&'static str] {
        F::without_gradient(self)
    }

    fn fields(&self) -> Value {
        serde_json::to_value(self).expect("invariant: the fields are numbers, strings and booleans")
    }

    fn original_layout(&self) -> Option<(Layout, Value)> {
        F::original_layout(self)
    }
}

fn parse<F: VisionFamily>(
    model_type: &str,
    given: &Map<String, Value>,
    unknown: UnknownKeys,
) -> Option<Result<Box<dyn AnyFamily>>> {
    let mut given = match F::from_alias(model_type, given) {
        _ if model_type == F::MODEL_TYPE => given.clone(),
        Some(keys) => keys,
        None => return None,
    };
    F::complete(&mut given, unknown);
    Some(read_fields::<F>(&given, unknown).map(|config| Box::new(config) as Box<dyn AnyFamily>))
}

fn read_fields<F: VisionFamily>(given: &Map<String, Value>, unknown: UnknownKeys) -> Result<F> {
    let wrong = |key: &str, reason: String| config_error(F::MODEL_TYPE, key, reason);
    let whole = |error: serde_json::Error| wrong("config.json", error.to_string());
    let known = serde_json::to_value(F::default()).map_err(whole)?;
    let mut fields = Map::new();
    for (key, value) in given.iter().filter(|(key, _)| *key != "model_type") {
        if known.get(key).is_none() {
            if unknown == UnknownKeys::Refuse {
                return Err(wrong(key, "this family has no such key".into()));
            }
            continue;
        }
        // Alone first, so that the error can name the key.
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        serde_json::from_value::<F>(alone).map_err(|error| wrong(key, error.to_string()))?;
        fields.insert(key.clone(), value.clone());
    }
    serde_json::from_value(Value::Object(fields)).map_err(whole)
}
