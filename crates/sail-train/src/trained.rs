//! A trained model to be used: out of a checkpoint, a run, or an exported folder.
//!
//! Weights without optimizer, data or position; what training needs is [`crate::session`]'s. Called by
//! the commands that use a model: `generate`, `score`, `export`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sail_data::{ImageSpec, TextEncoder, TextSpec};
use sail_model::params::Params;
use sail_model::vlm::{Vlm, VlmConfig};
use serde_json::Value;
use tch::{Device, Kind};

use crate::checkpoint::{self, Checkpoint};
use crate::config::{DeviceChoice, Module, Plan, Precision};
use crate::device::{choose_device, take_precision};
use crate::error::{Error, Result};
use crate::export;
use crate::lineage;
use crate::origin::{Folders, Sources, untouched};
use crate::session;
use crate::stage::Fingerprints;

/// A model with everything that turns images and text into its input.
pub struct Trained {
    /// The model; no parameter requires a gradient.
    pub model: Vlm,
    /// How images become tiles.
    pub image: ImageSpec,
    /// How turns become tokens.
    pub text: TextSpec,
    /// The `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// Text to tokens and back.
    pub encoder: TextEncoder,
    /// Where the tensors are.
    pub device: Device,
    /// Where its weights come from, see [`crate::lineage`]; `None` for a folder that does not say.
    pub lineage: Option<Value>,
}

impl Trained {
    /// Opens a run or one of its `step-…` folders, or a folder that `export --what mllm` wrote.
    ///
    /// # Errors
    /// When it is none of these, or its parts do not fit together.
    pub fn open(path: &Path, device: DeviceChoice, precision: Precision) -> Result<Self> {
        let device = choose_device(device)?;
        sail_torch::set_device(device)?;
        let trained = match export::open_mllm(path, device)? {
            Some(exported) => exported,
            None => Self::from_checkpoint(&open_any(path)?, device)?,
        };
        trained.convert(take_precision(precision, device)?.kind());
        Ok(trained)
    }

    /// The model of a checkpoint in fp32, with moving averages where it has some; the modules that it names instead of
    /// storing them are read from their folders.
    ///
    /// # Errors
    /// When a folder holds other weights than those that the checkpoint was trained with.
    pub fn from_checkpoint(checkpoint: &Checkpoint, device: Device) -> Result<Self> {
        let plan = &checkpoint.state().plan;
        let folders = Folders::for_model(plan, Some(checkpoint))?;
        let config = session::model_config(plan, &folders)?;
        let sources = Sources::open(plan, &folders, &config, Some(checkpoint))?.averaged();
        let model = Vlm::new(&config, sources.for_model(), (Kind::Float, device))?;
        untouched(plan, Some(checkpoint), &Fingerprints::new(model.params()), &BTreeSet::new())?;
        let (image, text) = specs(plan, &config)?;
        let tokenizer = folders.tokenizer(plan);
        let encoder = session::encoder(&tokenizer, &text, &config.llm)?;
        let lineage = Some(lineage::of_checkpoint(checkpoint));
        Ok(Self { model, image, text, tokenizer, encoder, device, lineage })
    }

    /// The parameters of a module by the names of its own files.
    pub fn local_params(&self, module: Module) -> Result<Params> {
        Ok(self.model.module_params(module.name())?)
    }

    fn convert(&self, kind: Kind) {
        for param in self.model.params().values() {
            param.shallow_clone().set_data(&param.to_kind(kind));
        }
    }
}

/// How a plan turns images and text into the model's input.
pub(crate) fn specs(plan: &Plan, config: &VlmConfig) -> Result<(ImageSpec, TextSpec)> {
    let spec = plan.data_spec(session::visual_shape(plan, config)?);
    Ok((spec.image, spec.text))
}

/// A checkpoint by its own folder, or the newest of a run.
///
/// # Errors
/// When it is neither.
pub fn open_any(path: &Path) -> Result<Checkpoint> {
    checkpoint::open_or_newest(path)?.ok_or_else(|| {
        Error::usage(
            if path.exists() {
                format!("`{}` is neither a complete checkpoint nor a run that holds one", path.display())
            } else {
                format!("there is no `{}`", path.display())
            },
            "name a run's folder or one of its `step-…` folders; `generate`, `score` and `export --what mllm` also take \
             an exported whole model",
        )
    })
}
