//! The whole model: vision transformer, projector and language model on packed sequences.
//!
//! Visual tokens take the places of the image-context tokens among the embeddings. What is frozen,
//! in which type parameters are and who scales the loss is decided outside. Called by the trainer,
//! the evaluation and the `generate` command.
//!
//! Dimension letters: t rows of the pack, r rows with a target, v visual tokens, d model width; `nchw`
//! is pixels.

use std::cell::RefCell;
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor};

use crate::attention::Segments;
use crate::error::{Error, Result};
use crate::generate::greedy_from_embeddings;
use crate::llm::{Llm, LlmConfig};
use crate::params::{Builder, Params, TensorSource};
use crate::projector::{Projector, visual_tokens};
use crate::vision::{VisionConfig, VisionModel, build_vision};

/// The target of a row that predicts nothing.
pub const IGNORE: i64 = -100;

/// The modules, as their parameters' names begin.
pub const MODULES: [&str; 3] = ["vision", "projector", "llm"];

/// What a [`Vlm`] is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VlmConfig {
    /// The vision transformer.
    pub vision: VisionConfig,
    /// The projector merges `merge` x `merge` patches into one visual token.
    pub merge: i64,
    /// The language model.
    pub llm: LlmConfig,
}

impl VlmConfig {
    /// Visual tokens of a tile of `px` x `px` pixels.
    ///
    /// # Errors
    /// [`Error::Config`] when patches do not divide the tile, or `merge` the grid of patches.
    pub fn tokens_per_tile(&self, px: i64) -> Result<i64> {
        visual_tokens(self.vision.grid_side(px)?, self.merge)
    }
}

/// Where the parameters of each module come from.
#[derive(Clone, Copy)]
pub struct VlmSources<'a> {
    /// Of `vision.…`.
    pub vision: &'a dyn TensorSource,
    /// Of `projector.…`.
    pub projector: &'a dyn TensorSource,
    /// Of `llm.…`.
    pub llm: &'a dyn TensorSource,
}

/// A pack on the model's device.
#[derive(Debug)]
pub struct Batch {
    /// Token ids `[t]` int64.
    pub ids_t: Tensor,
    /// Positions `[t]` int64, from 0 in each sequence.
    pub positions_t: Tensor,
    /// Where each sequence ends: `[0, l0, l0 + l1, .., t]`.
    pub cu_seqlens: Vec<i64>,
    /// Normalised tiles `[n, 3, px, px]`; None for a pack of text alone.
    pub pixels_nchw: Option<Tensor>,
    /// Rows `[v]` int64 that the visual tokens replace, without repetition, in the order of tiles.
    pub image_rows_v: Tensor,
    /// The token that each row predicts `[t]` int64, or [`IGNORE`].
    pub targets_t: Tensor,
    /// Weight of each row's loss `[t]` fp32.
    pub weights_t: Tensor,
}

/// A question to be answered by [`Vlm::generate`].
#[derive(Debug)]
pub struct Prompt {
    /// Token ids up to the place of the answer.
    pub ids: Vec<i64>,
    /// Normalised tiles `[n, 3, px, px]`; None without an image.
    pub pixels_nchw: Option<Tensor>,
    /// Places in `ids` that the visual tokens replace, in the order of tiles.
    pub image_rows: Vec<i64>,
}

/// A vision-language model. Its parameters are shared with [`Vlm::params`]: `requires_grad`, data and
/// gradients set on one are seen by the other.
pub struct Vlm {
    config: VlmConfig,
    vision: Box<dyn VisionModel + Send>,
    projector: Projector,
    llm: Llm,
    params: Params,
    device: Device,
}

impl Vlm {
    /// Builds the three modules on `device`, in fp32 and without gradients.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that does not fit, and what the sources report.
    pub fn new(config: &VlmConfig, sources: VlmSources, device: Device) -> Result<Self> {
        let params = Rc::new(RefCell::new(Params::new()));
        let builder = |module, source| Builder::new(params.clone(), module, source, device);
        let vision = build_vision(&config.vision, &builder("vision", sources.vision))?;
        let (from, to) = (config.vision.hidden_size(), config.llm.hidden_size());
        let projector = Projector::new(from, to, config.merge, &builder("projector", sources.projector))?;
        let llm = Llm::new(&config.llm, &builder("llm", sources.llm))?;
        Ok(Self { config: config.clone(), vision, projector, llm, params: params.take(), device })
    }

    /// The description it was built from.
    pub fn config(&self) -> &VlmConfig {
        &self.config
    }

    /// All parameters by full name.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The parameters of one of [`MODULES`] by the name that the module's own files use.
    ///
    /// # Errors
    /// [`Error::UnknownModule`].
    pub fn module_params(&self, module: &str) -> Result<Params> {
        if !MODULES.contains(&module) {
            return Err(Error::UnknownModule { name: module.to_owned() });
        }
        let local = |name: &str| Some(name.strip_prefix(module)?.strip_prefix('.')?.to_owned());
        let params = self.params.iter();
        Ok(params.filter_map(|(name, param)| Some((local(name)?, param.shallow_clone()))).collect())
    }

    /// The vision transformer.
    pub fn vision(&self) -> &dyn VisionModel {
        &*self.vision
    }

    /// The language model.
    pub fn llm(&self) -> &Llm {
        &self.llm
    }

    /// Tiles `[n, 3, px, px]` -> visual tokens `[v, d]`, all tokens of the first tile first.
    ///
    /// # Errors
    /// [`Error::Config`] when the tiles' sides do not divide into patches and merged patches,
    /// [`Error::BatchShape`] when the tiles are not square images of three channels.
    pub fn image_features(&self, pixels_nchw: &Tensor) -> Result<Tensor> {
        let found = pixels_nchw.size();
        match found[..] {
            [_, 3, height, width] if height == width => self.config.tokens_per_tile(width)?,
            _ => {
                let (images, px) = (found.first().copied().unwrap_or(0), self.config.vision.image_size());
                let expected = vec![images, 3, px, px];
                return Err(Error::BatchShape { field: "pixels_nchw", found, expected });
            }
        };
        Ok(self.projector.forward(&self.vision.forward(pixels_nchw)).flatten(0, 1))
    }

    /// Sum over rows of weight times cross-entropy: a 0-dimensional fp32 tensor. Only rows with a
    /// target pass through the last norm and the head.
    ///
    /// It has a graph to the parameters that require gradients and took part. A pack of text alone
    /// does not use `vision` and `projector`: where only those train, the loss requires no gradient.
    ///
    /// # Errors
    /// [`Error::BatchShape`], [`Error::Segments`], [`Error::ImageRows`] when the parts of the batch do
    /// not fit together.
    pub fn loss_sum(&self, batch: &Batch) -> Result<Tensor> {
        let rows_r = rows_with_target(batch);
        let losses_r = self.losses_of(batch, &rows_r)?;
        Ok((losses_r * batch.weights_t.index_select(0, &rows_r)).sum(Kind::Float))
    }

    /// Cross-entropy, without weights, of the rows that have a target, in their order `[r]` fp32.
    ///
    /// # Errors
    /// As [`Vlm::loss_sum`].
    pub fn row_losses(&self, batch: &Batch) -> Result<Tensor> {
        self.losses_of(batch, &rows_with_target(batch))
    }

    fn losses_of(&self, batch: &Batch, rows_r: &Tensor) -> Result<Tensor> {
        let segments = batch.check()?;
        let x_td = self.embed(&batch.ids_t, batch.pixels_nchw.as_ref(), &batch.image_rows_v)?;
        let x_td = self.llm.trunk(&x_td, &batch.positions_t, &segments, None);
        let x_rd = self.llm.final_norm(&x_td.index_select(0, rows_r));
        let logits_rv = self.llm.logits(&x_rd).to_kind(Kind::Float);
        let targets_r = batch.targets_t.index_select(0, rows_r);
        let no_class_weights = None::<&Tensor>;
        Ok(logits_rv.f_cross_entropy_loss(&targets_r, no_class_weights, Reduction::None, IGNORE, 0.0)?)
    }

    /// Embeddings `[t, d]` with visual tokens in the rows `image_rows_v`. Those rows' own embeddings
    /// get no gradient.
    fn embed(&self, ids_t: &Tensor, pixels_nchw: Option<&Tensor>, image_rows_v: &Tensor) -> Result<Tensor> {
        let x_td = self.llm.embed(ids_t);
        let tiles = pixels_nchw.filter(|pixels| pixels.numel() > 0);
        let features_vd = tiles.map(|pixels| self.image_features(pixels)).transpose()?;
        let features = features_vd.as_ref().map_or(0, |x| x.size()[0]);
        let rows = image_rows_v.numel() as i64;
        if rows != features {
            return Err(Error::ImageRows { rows, features });
        }
        match features_vd {
            None => Ok(x_td),
            Some(x_vd) => Ok(x_td.f_index_copy(0, image_rows_v, &x_vd.to_kind(x_td.kind()))?),
        }
    }

    /// Answers greedily, without a graph: at most `max_new_tokens` ids, of which the last is one of
    /// `stop_ids` when that ended the answer.
    ///
    /// # Errors
    /// [`Error::ImageRows`], and [`Error::Segments`] for an empty prompt.
    pub fn generate(&self, prompt: &Prompt, max_new_tokens: usize, stop_ids: &[i64]) -> Result<Vec<i64>> {
        tch::no_grad(|| {
            let on_device = |ids: &[i64]| Tensor::from_slice(ids).to_device(self.device);
            let pixels_nchw = prompt.pixels_nchw.as_ref().map(|pixels| pixels.to_device(self.device));
            let (ids_t, rows_v) = (on_device(&prompt.ids), on_device(&prompt.image_rows));
            let x_td = self.embed(&ids_t, pixels_nchw.as_ref(), &rows_v)?;
            greedy_from_embeddings(&self.llm, &x_td, max_new_tokens, stop_ids)
        })
    }
}

impl Batch {
    /// Checks that there is one entry for each token, and gives the sequences' boundaries.
    fn check(&self) -> Result<Segments> {
        let expected = vec![self.ids_t.numel() as i64];
        let fields = [
            ("ids_t", &self.ids_t),
            ("positions_t", &self.positions_t),
            ("targets_t", &self.targets_t),
            ("weights_t", &self.weights_t),
        ];
        match fields.into_iter().find(|(_, tensor)| tensor.size() != expected) {
            None => Segments::new(&self.cu_seqlens, expected[0]),
            Some((field, tensor)) => Err(Error::BatchShape { field, found: tensor.size(), expected }),
        }
    }
}

/// Indices `[r]` of the rows whose target is a token.
fn rows_with_target(batch: &Batch) -> Tensor {
    batch.targets_t.ne(IGNORE).nonzero().squeeze_dim(1)
}
