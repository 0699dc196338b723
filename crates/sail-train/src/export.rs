//! Exporting the vision encoder and the language model, and using what was exported.
//!
//! An exported encoder is read back and must give the features of the model in memory before its path is
//! reported.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sail_data::{ImageSpec, Tiling, load_image};
use sail_model::params::{Builder, Params};
use sail_model::vision::{self, Vision, VisionConfig, VisionExport, VitLayout};
use sail_model::weights::{FileSource, Folder, Stored, read_json, write_safetensors};
use serde::Deserialize;
use tch::{Device, Kind, Tensor, no_grad};

use crate::batch::to_images;
use crate::config::Module;
use crate::error::{Error, Result};
use crate::session::Session;

/// Writes the session's vision encoder to `out` in the transformers layout and returns `out`.
///
/// # Errors
/// [`Error::ExportMismatch`] when what was written gives other features than what is in memory.
pub fn vit(session: &Session, out: &Path) -> Result<PathBuf> {
    let plan = &session.plan;
    let [mean, std] = [plan.data.mean, plan.data.std].map(|values| values.map(|value| value as f32));
    let px = plan.model.vision.image_px as i64;
    let params = local_params(session, Module::Vision);
    let config = &session.model.config().vision;
    let VisionExport { tensors, config } = vision::export(config, params, px, VitLayout::Transformers, "")?;
    let folder = Folder::new(tensors)
        .json("config.json", &config)
        .json("preprocessor_config.json", &vision::preprocessor_json(px, mean, std));

    let (device, kind) = (session.device, session.precision);
    let pixels_nchw = sample_pixels(session)?.to_kind(kind);
    let features = |model: &Vision| -> Result<Tensor> {
        Ok(no_grad(|| model.last_hidden_state(&pixels_nchw))?.to_kind(Kind::Double))
    };
    folder.write_checked(out, |written| {
        let (here, there) = (features(session.model.vision())?, features(&load_vit(written, device, kind)?)?);
        let difference = (here - there).abs().max().double_value(&[]);
        // The same weights in the same arithmetic: rounding of another order of sums is all there can be.
        let limit = if kind == Kind::Float { 1e-5 } else { 1e-2 };
        if difference <= limit {
            return Ok(());
        }
        Err(Error::ExportMismatch { path: out.to_owned(), difference })
    })?;
    Ok(out.to_owned())
}

/// Writes the session's language model to `out` as a Hugging Face folder, its tokenizer included, and
/// returns `out`.
///
/// # Errors
/// When the folder cannot be written, or exists and is no model folder.
pub fn llm(session: &Session, out: &Path) -> Result<PathBuf> {
    let params = local_params(session, Module::Llm);
    let tokenizer = read_json(&session.tokenizer)?;
    let mut config = session.model.config().llm.to_json();
    config["dtype"] = "float32".into();
    let stored = params.iter().map(|(name, tensor)| (name.clone(), Stored::from(tensor)));
    let folder = Folder::new(stored.collect()).json("config.json", &config);
    folder.json("tokenizer.json", &tokenizer).write(out)?;
    Ok(out.to_owned())
}

/// A module's fp32 parameters by the names of its own files.
fn local_params(session: &Session, module: Module) -> BTreeMap<String, Tensor> {
    let prefix = format!("{module}.");
    let params = session.exact_params(module).into_iter();
    params.filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_owned(), tensor))).collect()
}

/// Features of image files by an exported encoder, as a safetensors file with `pixel_values` and
/// `last_hidden_state`, fp32.
pub fn embed(vit: &Path, images: &[PathBuf], out: &Path) -> Result<()> {
    let spec = image_spec(&vit.join("preprocessor_config.json"))?;
    let model = load_vit(vit, Device::Cpu, Kind::Float)?;
    let mut pixels = Vec::with_capacity(images.len());
    for image in images {
        pixels.extend(to_images(&load_image(image, &spec)?, Device::Cpu));
    }
    let pixels_nchw = Tensor::cat(&pixels, 0);
    let features_nsd = no_grad(|| model.last_hidden_state(&pixels_nchw))?;
    let tensors = [("pixel_values".to_owned(), pixels_nchw), ("last_hidden_state".to_owned(), features_nsd)];
    Ok(write_safetensors(out, &tensors.into_iter().collect())?)
}

/// What an export says of the pixels its encoder takes: square images of one size, no tiles.
fn image_spec(file: &Path) -> Result<ImageSpec> {
    #[derive(Deserialize)]
    struct Preprocessor {
        size: Size,
        image_mean: [f32; 3],
        image_std: [f32; 3],
    }
    #[derive(Deserialize)]
    struct Size {
        height: usize,
        width: usize,
    }
    let invalid = |reason: String| {
        let reason = format!("{reason}\n\nhint: only folders that `sail-train` exported can be read here");
        sail_model::Error::File { path: file.to_owned(), reason }
    };
    let Preprocessor { size, image_mean, image_std } =
        serde_json::from_value(read_json(file)?).map_err(|error| invalid(error.to_string()))?;
    if size.height != size.width {
        return Err(
            invalid(format!("images of {} x {} pixels are not square", size.width, size.height)).into()
        );
    }
    Ok(ImageSpec {
        tile_px: size.height,
        tokens_per_tile: 1,
        tiling: Tiling { min: 1, max: 1, thumbnail: false },
        mean: image_mean,
        std: image_std,
        max_pixels: u64::MAX,
    })
}

fn load_vit(folder: &Path, device: Device, kind: Kind) -> Result<Vision> {
    let config = VisionConfig::read(folder)?;
    let source = FileSource::open(folder)?.with(config.naming());
    let params = Rc::new(RefCell::new(Params::new()));
    Ok(Vision::new(&config, &Builder::new(params, "vision", &source, (kind, device)))?)
}

/// A held-out image, or without any a fixed pattern that differs from patch to patch.
fn sample_pixels(session: &Session) -> Result<Tensor> {
    let held_out = session.evaluator.as_ref().and_then(|evaluator| evaluator.image_sample());
    if let Some(pixels_nchw) = held_out.and_then(|sample| to_images(&sample.tiles, session.device).pop()) {
        return Ok(pixels_nchw);
    }
    let px = session.plan.model.vision.image_px as i64;
    Ok(Tensor::linspace(-2.0, 2.0, 3 * px * px, (Kind::Float, session.device)).f_reshape([1, 3, px, px])?)
}
