//! Exporting the vision encoder, the language model and the whole model as folders that others load.
//!
//! Every folder is read back and must compute what the model in memory computes before it takes its
//! place. `sail.rs` and `internvl.rs` are the layouts of the whole model. Called by the train loop at the
//! end of a stage and by `sail-train export`.

mod internvl;
mod sail;
mod text;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sail_data::{ImageSpec, Role, TextEncoder, TextSpec, Turn};
use sail_model::attention::Segments;
use sail_model::llm::{Llm, LlmConfig};
use sail_model::params::{Builder, Params};
use sail_model::vision::{self, Vision, VisionConfig, VisionExport, VitLayout};
use sail_model::vlm::{Batch, Visual, Vlm, VlmConfig, VlmSources};
use sail_model::weights::{FileSource, Folder, Naming, arrange, read_json};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::{Device, Kind, Tensor, no_grad};

use crate::checkpoint::Checkpoint;
use crate::config::Module;
use crate::error::{Error, Result};
use crate::lineage::{self, LINEAGE};
use crate::origin::{Folders, Sources, as_in_its_folder};
use crate::session::{self, Session};
use crate::stage::Fingerprints;
use crate::trained::{Trained, specs};

/// A model that agrees with its export to this; both compute in fp32.
const LIMIT: f64 = 1e-5;
/// Largest image that an exported model is asked about, pixels.
const MAX_PIXELS: u64 = 200_000_000;

/// The layouts of a whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MllmLayout {
    /// SAIL-VL's, with the Python code that loads it.
    Sail,
    /// transformers' own `InternVLForConditionalGeneration`.
    InternVl,
}

/// A whole model to be exported, fp32.
struct Mllm<'a> {
    config: &'a VlmConfig,
    model: &'a Vlm,
    image: &'a ImageSpec,
    text: &'a TextSpec,
    tokenizer: &'a Path,
    encoder: &'a TextEncoder,
    lineage: Option<&'a Value>,
}

impl<'a> Mllm<'a> {
    fn of(trained: &'a Trained) -> Self {
        Self {
            config: trained.model.config(),
            model: &trained.model,
            image: &trained.image,
            text: &trained.text,
            tokenizer: &trained.tokenizer,
            encoder: &trained.encoder,
            lineage: trained.lineage.as_ref(),
        }
    }

    fn params(&self, module: &str) -> Params {
        self.model.module_params(module).expect("invariant: the three modules' names are in the code")
    }
}

/// Writes a session's vision encoder, `exact` in fp32 by full names, to `out` and returns `out`. `saved` is the
/// checkpoint of the same step.
///
/// # Errors
/// [`Error::ExportMismatch`] when what was written gives other features than what is in memory.
pub fn vit(
    session: &Session,
    exact: Params,
    saved: &Checkpoint,
    layout: VitLayout,
    out: &Path,
) -> Result<PathBuf> {
    let config = session.model.config();
    let (image, _) = specs(&session.plan, config)?;
    // Of the exact weights: those that the model computes with may be rounded ones.
    let exact = local(exact);
    let params = Rc::new(RefCell::new(Params::new()));
    let builder = Builder::new(params.clone(), "vision", &exact, (Kind::Float, Device::Cpu));
    let model = Vision::new(&config.vision, &builder)?;
    write_vit(model, params.take(), &image, (layout, Kind::Float), lineage::of_checkpoint(saved), out)
}

/// Writes a checkpoint's vision encoder to `out`, in fp32 or bf16, and returns `out`. Nothing else of the
/// checkpoint is loaded, and the encoder is in memory once.
///
/// # Errors
/// As [`vit`].
pub fn vit_of(checkpoint: &Checkpoint, layout: VitLayout, kind: Kind, out: &Path) -> Result<PathBuf> {
    let plan = &checkpoint.state().plan;
    let folders = Folders::for_model(plan, Some(checkpoint))?;
    let config = session::model_config(plan, &folders)?;
    let sources = Sources::open(plan, &folders, &config, Some(checkpoint))?.averaged();
    let params = Rc::new(RefCell::new(Params::new()));
    let source = sources.for_model().vision;
    let builder = Builder::new(params.clone(), "vision", source, (Kind::Float, Device::Cpu));
    let model = Vision::new(&config.vision, &builder)?;
    let params = params.take();
    as_in_its_folder(plan, Some(checkpoint), Module::Vision, &Fingerprints::new(&params))?;
    let (image, _) = specs(plan, &config)?;
    vision::fit_positions(&config.vision, &local(shared(&params)), image.tile_px as i64, false)?;
    round(&params, kind);
    write_vit(model, params, &image, (layout, kind), lineage::of_checkpoint(checkpoint), out)
}

/// `params` are the model's own, under their full names.
fn write_vit(
    model: Vision,
    params: Params,
    image: &ImageSpec,
    (layout, kind): (VitLayout, Kind),
    lineage: Value,
    out: &Path,
) -> Result<PathBuf> {
    let (px, config) = (image.tile_px, model.config().clone());
    let expected = features_of(&model, px)?;
    let VisionExport { tensors, config } = vision::export(&config, local(params), px as i64, layout, "")?;
    // From here on the folder alone holds the weights, until they are written.
    drop(model);
    let config = with_lineage(with_dtype(config, kind), Some(lineage));
    let folder = Folder::new(tensors).in_kind(kind);
    let (folder, config) = match layout {
        VitLayout::Sail => sail::with_vision_code(folder, config),
        VitLayout::Transformers | VitLayout::Original => (folder, config),
    };
    let preprocessor = vision::preprocessor_json(px as i64, image.mean, image.std);
    let folder = folder.json("config.json", &config).json("preprocessor_config.json", &preprocessor);
    folder.write_checked(out, |written| {
        compare(out, &features_of(&load_vit(written, Device::Cpu)?, px)?, &expected)
    })?;
    Ok(out.to_owned())
}

/// The same tensors once more.
fn shared(params: &Params) -> Params {
    params.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// Parameters of one module by the names of its own files.
fn local(params: Params) -> Params {
    let rest = |name: &str| name.split_once('.').map_or(name, |(_, rest)| rest).to_owned();
    params.into_iter().map(|(name, tensor)| (rest(&name), tensor)).collect()
}

/// Writes the language model of a checkpoint to `out` as a Hugging Face folder, its tokenizer included,
/// and returns `out`.
///
/// # Errors
/// [`Error::ExportMismatch`] when what was written gives other scores than what is in memory.
pub fn llm(trained: Trained, kind: Kind, out: &Path) -> Result<PathBuf> {
    round(trained.model.params(), kind);
    let config = trained.model.config().llm.clone();
    let expected = scores_of(trained.model.llm())?;
    let tensors = arrange(&trained.local_params(Module::Llm)?, config.export_layout(), "")?;
    let folder = text::add_files(Folder::new(tensors).in_kind(kind), &Mllm::of(&trained), "<image>")?;
    let json = with_lineage(with_dtype(config.to_json(), kind), trained.lineage.clone());
    // From here on the folder alone holds the weights, until they are written.
    drop(trained);
    folder.json("config.json", &json).write_checked(out, |written| {
        let config = LlmConfig::read(written)?;
        let source = FileSource::open(written)?.with(config.naming());
        let builder = Builder::new(Rc::default(), "llm", &source, (Kind::Float, Device::Cpu));
        compare(out, &scores_of(&Llm::new(&config, &builder)?)?, &expected)
    })?;
    Ok(out.to_owned())
}

/// Writes the whole model to `out` and returns `out`.
///
/// # Errors
/// [`Error::Usage`] for a model that the layout has no place for, [`Error::ExportMismatch`] when what was
/// written computes another loss than what is in memory.
pub fn mllm(trained: Trained, layout: MllmLayout, kind: Kind, out: &Path) -> Result<PathBuf> {
    text::refuse_jinja(&trained.text)?;
    let vision = trained.local_params(Module::Vision)?;
    vision::fit_positions(&trained.model.config().vision, &vision, trained.image.tile_px as i64, true)?;
    drop(vision);
    round(trained.model.params(), kind);
    let expected = sample_losses(&trained.model, &trained.encoder, &trained.image)?;
    let mllm = Mllm::of(&trained);
    let folder = match layout {
        MllmLayout::Sail => sail::folder(&mllm, kind)?,
        MllmLayout::InternVl => internvl::folder(&mllm, kind)?,
    };
    // From here on the folder alone holds the weights, until they are written.
    drop(trained);
    folder.write_checked(out, |written| {
        let read = match layout {
            MllmLayout::Sail => sail::read(written, Device::Cpu)?,
            MllmLayout::InternVl => internvl::read(written, Device::Cpu)?,
        };
        compare(out, &sample_losses(&read.model, &read.encoder, &read.image)?, &expected)
    })?;
    Ok(out.to_owned())
}

/// Losses of a short conversation about a fixed pattern, fp32.
fn sample_losses(model: &Vlm, encoder: &TextEncoder, image: &ImageSpec) -> Result<Tensor> {
    let turns = [(Role::User, "<image>\nWhat is this?"), (Role::Assistant, "A pattern of colours.")];
    let turns = turns.map(|(role, text)| Turn { role, text: text.to_owned() });
    let unusable = |cause| sail_data::Error::Unusable { what: "the sample conversation".into(), cause };
    let encoded = encoder.encode(&turns, &[image.tokens_per_tile]).map_err(unusable)?;
    let rows = encoded.ids.len() as i64;
    let batch = Batch {
        ids_t: Tensor::from_slice(&encoded.ids),
        positions_t: Tensor::arange(rows, (Kind::Int64, Device::Cpu)),
        cu_seqlens: vec![0, rows],
        images: Visual::Pixels(vec![pattern(image.tile_px)]),
        images_per_sequence: vec![1],
        image_rows: encoded.image_rows,
        names: vec!["the sample conversation".to_owned()],
        targets: encoded.targets,
        weights: encoded.weights,
    };
    Ok(no_grad(|| model.loss(&batch))?.losses_r)
}

/// Scores of every token after a few.
fn scores_of(model: &Llm) -> Result<Tensor> {
    const ROWS: i64 = 8;
    no_grad(|| {
        let positions_t = Tensor::arange(ROWS, (Kind::Int64, Device::Cpu));
        let ids: Vec<i64> = (0..ROWS).map(|row| row * 7 % model.config().vocab_size()).collect();
        let ids_t = Tensor::from_slice(&ids);
        let x_td = model.hidden(&model.embed(&ids_t), &positions_t, &Segments::single(ROWS)?, None);
        Ok(model.logits(&x_td))
    })
}

fn features_of(model: &Vision, px: usize) -> Result<Tensor> {
    Ok(no_grad(|| model.last_hidden_state(&pattern(px)))?)
}

/// An image that differs from patch to patch `[1, 3, px, px]`.
fn pattern(px: usize) -> Tensor {
    let px = px as i64;
    Tensor::linspace(-2.0, 2.0, 3 * px * px, (Kind::Float, Device::Cpu)).reshape([1, 3, px, px])
}

fn compare(out: &Path, found: &Tensor, expected: &Tensor) -> Result<()> {
    let difference = if found.size() == expected.size() {
        let scale = expected.abs().max().double_value(&[]).max(1.0);
        (found - expected).abs().max().double_value(&[]) / scale
    } else {
        f64::INFINITY
    };
    if difference <= LIMIT { Ok(()) } else { Err(Error::ExportMismatch { path: out.to_owned(), difference }) }
}

/// Rounds parameters in place to what `kind` can hold, so that what is compared is what is written.
fn round(params: &Params, kind: Kind) {
    if kind != Kind::Float {
        for param in params.values() {
            param.shallow_clone().set_data(&param.to_kind(kind).to_kind(Kind::Float));
        }
    }
}

/// Both objects' members in one.
fn with_keys(mut json: Value, keys: Value) -> Value {
    if let (Value::Object(json), Value::Object(keys)) = (&mut json, keys) {
        json.extend(keys);
    }
    json
}

fn with_lineage(mut config: Value, lineage: Option<Value>) -> Value {
    if let Some(lineage) = lineage {
        config[LINEAGE] = lineage;
    }
    config
}

fn with_dtype(mut config: Value, kind: Kind) -> Value {
    config["dtype"] = vision::dtype_name(kind).into();
    config
}

/// Opens an exported whole model, in fp32; None when the folder holds none.
///
/// # Errors
/// When a file is missing or says what is not built.
pub(crate) fn open_mllm(path: &Path, device: Device) -> Result<Option<Trained>> {
    let config = path.join("config.json");
    if !config.is_file() {
        return Ok(None);
    }
    match read_json(&config)?["model_type"].as_str() {
        Some(sail::MODEL_TYPE) => sail::read(path, device).map(Some),
        Some(internvl::MODEL_TYPE) => internvl::read(path, device).map(Some),
        _ => Ok(None),
    }
}

/// A model whose modules lie in one folder, each under a prefix: vision, projector, language model.
fn open_parts(
    path: &Path,
    config: &VlmConfig,
    parts: [(Naming, &'static str); 3],
    image: ImageSpec,
    text: TextSpec,
    device: Device,
) -> Result<Trained> {
    let source = |(naming, prefix)| -> Result<FileSource> {
        Ok(FileSource::open(path)?.with(Naming { prefixes: vec![prefix], ..naming }))
    };
    let [vision, projector, llm] = parts.map(source);
    let (vision, projector, llm) = (vision?, projector?, llm?);
    let sources = VlmSources { vision: &vision, projector: &projector, llm: &llm };
    let model = Vlm::new(config, sources, (Kind::Float, device))?;
    let tokenizer = path.join("tokenizer.json");
    let encoder = session::encoder(&tokenizer, &text, &config.llm)?;
    let lineage = read_json(&path.join("config.json"))?.get(LINEAGE).cloned();
    Ok(Trained { model, image, text, tokenizer, encoder, device, lineage })
}

/// The merge factor that `downsample_ratio` of a config.json means.
fn merge_of(file: &Path, downsample_ratio: f64) -> Result<i64> {
    let merge = (1.0 / downsample_ratio).round();
    if merge >= 1.0 && (merge * downsample_ratio - 1.0).abs() < 1e-3 {
        return Ok(merge as i64);
    }
    let reason = format!("`downsample_ratio` {downsample_ratio} is not one divided by a whole number");
    Err(sail_model::Error::File { path: file.to_owned(), reason }.into())
}

/// The normalisation that an exported folder asks for.
fn mean_and_std(file: &Path) -> Result<([f32; 3], [f32; 3])> {
    #[derive(Deserialize)]
    struct Preprocessor {
        image_mean: [f32; 3],
        image_std: [f32; 3],
    }
    let Preprocessor { image_mean, image_std } = read_as(file)?;
    Ok((image_mean, image_std))
}

fn read_as<T: DeserializeOwned>(file: &Path) -> Result<T> {
    let invalid = |error: serde_json::Error| sail_model::Error::File {
        path: file.to_owned(),
        reason: error.to_string(),
    };
    Ok(serde_json::from_value(read_json(file)?).map_err(invalid)?)
}

/// A vision encoder out of a folder, in fp32.
pub(crate) fn load_vit(folder: &Path, device: Device) -> Result<Vision> {
    Ok(load_vit_with_params(folder, device)?.0)
}

/// The same, and its parameters by full name.
pub(crate) fn load_vit_with_params(folder: &Path, device: Device) -> Result<(Vision, Params)> {
    let config = VisionConfig::read(folder)?;
    let source = FileSource::open(folder)?.with(config.naming());
    let params = Rc::new(RefCell::new(Params::new()));
    let builder = Builder::new(params.clone(), "vision", &source, (Kind::Float, device));
    let model = Vision::new(&config, &builder)?;
    Ok((model, params.take()))
}
