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

use sail_torch::{CrossEntropy, Span, span, upload};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::attention::Segments;
use crate::blocks::Listener;
use crate::error::{Error, Result};
use crate::generate::{GenerateOptions, OnToken, from_embeddings};
use crate::llm::{Llm, LlmConfig, Trunk};
use crate::params::{Builder, Params, ShapesOnly, TensorSource};
use crate::projector::{Projector, ProjectorConfig};
use crate::vision::{Features, Vision, VisionConfig};

/// The target of a row that predicts nothing.
pub const IGNORE: i64 = -100;

/// The modules, as their parameters' names begin.
pub const MODULES: [&str; 3] = ["vision", "projector", "llm"];

/// What a [`Vlm`] is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VlmConfig {
    /// The vision transformer.
    pub vision: VisionConfig,
    /// What makes visual tokens of its features.
    pub projector: ProjectorConfig,
    /// The language model.
    pub llm: LlmConfig,
}

impl VlmConfig {
    /// Visual tokens of an image of `height` x `width` pixels.
    ///
    /// # Errors
    /// [`Error::Config`] when patches do not divide the image, or `merge` the grid of patches.
    pub fn visual_tokens(&self, height: i64, width: i64) -> Result<i64> {
        self.projector.visual_tokens(self.vision.grid(height, width)?)
    }

    fn tokens_of_grids(&self, grids: &[(i64, i64)]) -> Result<Vec<i64>> {
        grids.iter().map(|grid| self.projector.visual_tokens(*grid)).collect()
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

/// Images on the model's device, on either side of the vision transformer.
#[derive(Debug)]
pub enum Visual {
    /// Batches of normalised images of one size each, `[n, 3, height, width]`; none for text alone.
    Pixels(Vec<Tensor>),
    /// What [`Vision::features`] gave for them earlier: the vision transformer does not run, and gets no gradient.
    Features(Features),
}

impl Visual {
    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Pixels(batches) => batches.is_empty(),
            Self::Features(features) => features.grids.is_empty(),
        }
    }
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
    /// Its images, in the order of the sequences.
    pub images: Visual,
    /// How many of the images belong to each sequence, in order.
    pub images_per_sequence: Vec<usize>,
    /// Rows `[v]` that the visual tokens replace, without repetition, in the order of the images.
    pub image_rows: Vec<i64>,
    /// What each sequence is called in messages.
    pub names: Vec<String>,
    /// The token that each row predicts `[t]`, or [`IGNORE`]; on the host, where it is known which rows have one.
    pub targets: Vec<i64>,
    /// Weight of each row's loss `[t]`.
    pub weights: Vec<f32>,
}

/// What a batch costs: fp32 tensors.
#[derive(Debug)]
pub struct Loss {
    /// Sum over rows of weight times cross-entropy, 0-dimensional.
    pub sum: Tensor,
    /// Cross-entropy, without weights, of the rows that have a target, in their order `[r]`; without a graph.
    pub losses_r: Tensor,
    /// `router_aux_loss_coef` times the loss for unevenly used experts, a mean over the batch's rows; None
    /// for a language model without experts.
    pub balance: Option<Tensor>,
}

/// A question to be answered by [`Vlm::generate`].
#[derive(Debug)]
pub struct Prompt {
    /// Token ids up to the place of the answer.
    pub ids: Vec<i64>,
    /// Its images.
    pub images: Visual,
    /// Places in `ids` that the visual tokens replace, in the order of the images.
    pub image_rows: Vec<i64>,
}

/// A vision-language model. Its parameters are shared with [`Vlm::params`]: `requires_grad`, data and
/// gradients set on one are seen by the other.
pub struct Vlm {
    config: VlmConfig,
    vision: Vision,
    projector: Projector,
    llm: Llm,
    params: Params,
    listener: Listener,
    device: Device,
}

impl Vlm {
    /// Builds the three modules, with parameters of this type on this device, and without gradients.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration that does not fit, and what the sources report.
    pub fn new(config: &VlmConfig, sources: VlmSources, to: (Kind, Device)) -> Result<Self> {
        let params = Rc::new(RefCell::new(Params::new()));
        let listener = Listener::default();
        let builder =
            |module, source| Builder::new(params.clone(), module, source, to).listened_by(&listener);
        let vision = Vision::new(&config.vision, &builder("vision", sources.vision))?;
        let (from, llm_hidden) = (config.vision.hidden_size(), config.llm.hidden_size());
        let projector = builder("projector", sources.projector);
        let projector = Projector::new(config.projector, from, llm_hidden, &projector)?;
        let llm = Llm::new(&config.llm, &builder("llm", sources.llm))?;
        let (params, device) = (params.take(), to.1);
        Ok(Self { config: config.clone(), vision, projector, llm, params, listener, device })
    }

    /// The names and shapes of a model of any size, see [`ShapesOnly`]: nothing can be computed with it.
    ///
    /// # Errors
    /// As [`Vlm::new`].
    pub fn shapes_only(config: &VlmConfig) -> Result<Self> {
        let sources = VlmSources { vision: &ShapesOnly, projector: &ShapesOnly, llm: &ShapesOnly };
        Self::new(config, sources, (Kind::Float, Device::Cpu))
    }

    /// The description it was built from.
    pub fn config(&self) -> &VlmConfig {
        &self.config
    }

    /// All parameters by full name.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Who is told which block is about to compute.
    pub fn listener(&self) -> &Listener {
        &self.listener
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

    /// Full names of the parameters that a pack may leave without a gradient whatever it holds: those that nothing
    /// depends on.
    pub fn without_gradient(&self) -> Vec<String> {
        let names = self.config.vision.without_gradient().iter();
        names.map(|name| format!("vision.{name}")).collect()
    }

    /// The vision transformer.
    pub fn vision(&self) -> &Vision {
        &self.vision
    }

    /// The language model.
    pub fn llm(&self) -> &Llm {
        &self.llm
    }

    /// Batches of images `[n, 3, height, width]` -> visual tokens `[v, d]`, all tokens of the first image
    /// first, and how many there are of each image.
    ///
    /// # Errors
    /// [`Error::Config`] when the sides do not divide into patches and merged patches,
    /// [`Error::BatchShape`] when a batch is not one of images.
    pub fn image_features(&self, images: &[Tensor]) -> Result<(Tensor, Vec<i64>)> {
        let features = self.encode(images)?;
        let tokens = self.config.tokens_of_grids(&features.grids)?;
        Ok((self.project(&features)?, tokens))
    }

    /// Features of batches of images `[n, 3, height, width]`, as [`Vision::features`].
    ///
    /// # Errors
    /// As [`Vision::features`].
    pub fn encode(&self, images: &[Tensor]) -> Result<Features> {
        let _in_vision = self.enter("vision");
        let features = self.vision.features(images)?;
        self.listener.enter_module_backward("vision", &features.x_td)?;
        Ok(features)
    }

    fn project(&self, features: &Features) -> Result<Tensor> {
        let _in_projector = self.enter("projector");
        let x_vd = self.projector.forward(features)?;
        self.listener.enter_module_backward("projector", &x_vd)?;
        Ok(x_vd)
    }

    /// A module computes from here on: until the span ends, as a trace shows it, or until another one does, as the
    /// listener is told.
    fn enter(&self, module: &'static str) -> Span {
        self.listener.enter_module(module);
        span(module)
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
        Ok(self.loss(batch)?.sum)
    }

    /// As [`Vlm::loss_sum`], with the loss for unevenly used experts beside it.
    ///
    /// # Errors
    /// As [`Vlm::loss_sum`].
    pub fn loss(&self, batch: &Batch) -> Result<Loss> {
        let segments = self.with_grad_rows(batch.check(&self.config)?, batch)?;
        let x_td = self.embed(&batch.ids_t, &batch.images, &batch.image_rows)?;
        let _in_llm = span("llm");
        let Trunk { x_td, routing } = self.llm.trunk(&x_td, &batch.positions_t, &segments, None);
        let (rows, (targets, weights)) = rows_with_target(batch);
        let (rows_r, targets_r) = (upload(&rows, self.device)?, upload(&targets, self.device)?);
        let weights_r = upload(&weights, self.device)?;
        let CrossEntropy { sum, losses_r } =
            self.llm.cross_entropy(&x_td.index_select(0, &rows_r), &targets_r, &weights_r)?;
        Ok(Loss { sum, losses_r, balance: routing.map(|routing| routing.weighted_balance_loss()) })
    }

    /// Where the language model is frozen, gradients need not go everywhere.
    fn with_grad_rows(&self, segments: Segments, batch: &Batch) -> Result<Segments> {
        match batch.grad_rows() {
            Some(rows) if !self.trains("llm") => Ok(segments.with_grad_rows(upload(&rows, self.device)?)),
            _ => Ok(segments),
        }
    }

    /// Whether a parameter of one of [`MODULES`] requires a gradient.
    ///
    /// # Panics
    /// For another name.
    pub fn trains(&self, module: &str) -> bool {
        assert!(MODULES.contains(&module), "`{module}` is none of {MODULES:?}");
        let is_of = |name: &str| name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        self.params.iter().any(|(name, param)| is_of(name) && param.requires_grad())
    }

    /// Embeddings `[t, d]` with visual tokens in `image_rows`, which were checked to be as many. Those
    /// rows' own embeddings get no gradient.
    fn embed(&self, ids_t: &Tensor, images: &Visual, image_rows: &[i64]) -> Result<Tensor> {
        if images.is_empty() {
            let _in_llm = self.enter("llm");
            return Ok(self.llm.embed(ids_t));
        }
        let x_vd = match images {
            Visual::Pixels(batches) => self.project(&self.encode(batches)?)?,
            Visual::Features(features) => self.project(features)?,
        };
        let _in_llm = self.enter("llm");
        // After the images: backward goes the other way round, so that the table's gradient can travel to other
        // ranks while that of the encoder is computed.
        let x_td = self.llm.embed(ids_t);
        let rows_v = upload(image_rows, self.device)?;
        Ok(x_td.f_index_copy(0, &rows_v, &x_vd.to_kind(x_td.kind()))?)
    }

    /// Answers questions together, without a graph; see [`from_embeddings`].
    ///
    /// # Errors
    /// [`Error::ImageRows`], [`Error::Segments`] for an empty prompt, and for options that make no sense.
    pub fn generate(
        &self,
        prompts: &[Prompt],
        options: &GenerateOptions,
        on_token: OnToken,
    ) -> Result<Vec<Vec<i64>>> {
        let embed = |(i, prompt): (usize, &Prompt)| -> Result<Tensor> {
            let ids_t = upload(&prompt.ids, self.device)?;
            let tokens = image_tokens(&self.config, &prompt.images)?.iter().sum();
            check_rows(&format!("prompt {i}"), prompt.image_rows.len() as i64, tokens)?;
            self.embed(&ids_t, &prompt.images, &prompt.image_rows)
        };
        let prompts = tch::no_grad(|| prompts.iter().enumerate().map(embed).collect::<Result<Vec<_>>>())?;
        from_embeddings(&self.llm, &prompts, options, on_token)
    }
}

impl Batch {
    /// Checks that there is one entry for each token and one visual token for each image position, and
    /// gives the sequences' boundaries.
    fn check(&self, config: &VlmConfig) -> Result<Segments> {
        let expected = vec![self.ids_t.numel() as i64];
        for (field, found) in [
            ("ids_t", self.ids_t.size()),
            ("positions_t", self.positions_t.size()),
            ("targets", vec![self.targets.len() as i64]),
            ("weights", vec![self.weights.len() as i64]),
        ] {
            if found != expected {
                return Err(Error::BatchShape { field, found, expected });
            }
        }
        let segments = Segments::new(&self.cu_seqlens, expected[0])?;
        let sequences = segments.lengths().len();
        let images = self.images_per_sequence.iter().sum::<usize>();
        let tokens = image_tokens(config, &self.images)?;
        for (field, found, expected) in [
            ("images_per_sequence", self.images_per_sequence.len(), sequences),
            ("names", self.names.len(), sequences),
            ("images", tokens.len(), images),
        ] {
            if found != expected {
                let [found, expected] = [found, expected].map(|count| vec![count as i64]);
                return Err(Error::BatchShape { field, found, expected });
            }
        }
        let mut tokens = tokens.into_iter();
        for (sequence, ends) in self.cu_seqlens.windows(2).enumerate() {
            let inside = |row: &&i64| (ends[0]..ends[1]).contains(*row);
            let rows = self.image_rows.iter().filter(inside).count() as i64;
            let features = tokens.by_ref().take(self.images_per_sequence[sequence]).sum();
            check_rows(&self.names[sequence], rows, features)?;
        }
        Ok(segments)
    }

    /// Rows that see a visual token, in each sequence the first of them and what follows; None where so few do not that
    /// taking them out costs more than it saves (docs/decisions/0017).
    fn grad_rows(&self) -> Option<Vec<i64>> {
        let mut images = self.image_rows.iter().copied().peekable();
        let of_sequence = |ends: &[i64]| {
            let first = images.peek().copied().filter(|first| *first < ends[1]);
            while images.next_if(|row| *row < ends[1]).is_some() {}
            first.map_or(0..0, |first| first..ends[1])
        };
        let rows: Vec<i64> = self.cu_seqlens.windows(2).flat_map(of_sequence).collect();
        (4 * rows.len() as i64 <= 3 * self.cu_seqlens.last()?).then_some(rows)
    }
}

/// Visual tokens of each image.
fn image_tokens(config: &VlmConfig, images: &Visual) -> Result<Vec<i64>> {
    let batches = match images {
        Visual::Pixels(batches) => batches,
        Visual::Features(Features { x_td, grids }) => {
            let (found, rows) = (x_td.size(), grids.iter().map(|(h, w)| h * w).sum());
            let expected = vec![rows, config.vision.hidden_size()];
            if found != expected {
                return Err(Error::BatchShape { field: "images", found, expected });
            }
            return config.tokens_of_grids(grids);
        }
    };
    let mut tokens = Vec::new();
    for batch in batches {
        let found = batch.size();
        let [n, 3, height, width] = found[..] else {
            let px = config.vision.image_size();
            let expected = vec![found.first().copied().unwrap_or(1), 3, px, px];
            return Err(Error::BatchShape { field: "images", found, expected });
        };
        tokens.extend(std::iter::repeat_n(config.visual_tokens(height, width)?, n as usize));
    }
    Ok(tokens)
}

fn check_rows(name: &str, rows: i64, features: i64) -> Result<()> {
    if rows == features { Ok(()) } else { Err(Error::ImageRows { sample: name.to_owned(), rows, features }) }
}

/// Indices of the rows whose target is a token, the targets and their weights: `[r]` each.
fn rows_with_target(batch: &Batch) -> (Vec<i64>, (Vec<i64>, Vec<f32>)) {
    let rows = (0..).zip(batch.targets.iter().copied().zip(batch.weights.iter().copied()));
    rows.filter(|(_, (target, _))| *target != IGNORE).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_go_to_what_sees_an_image() {
        let none = || Tensor::from_slice::<i64>(&[]);
        let mut batch = Batch {
            ids_t: none(),
            positions_t: none(),
            // An image after two rows, text alone, images at the beginning and at the end.
            cu_seqlens: vec![0, 5, 8, 12],
            images: Visual::Pixels(vec![]),
            images_per_sequence: vec![1, 0, 2],
            image_rows: vec![2, 3, 8, 11],
            names: vec![],
            targets: vec![],
            weights: vec![],
        };
        assert_eq!(batch.grad_rows(), Some(vec![2, 3, 4, 8, 9, 10, 11]));
        batch.image_rows = vec![0, 5, 9];
        assert_eq!(batch.grad_rows(), None, "all but one row");
        batch.image_rows.clear();
        assert_eq!(batch.grad_rows(), Some(vec![]));
    }
}
