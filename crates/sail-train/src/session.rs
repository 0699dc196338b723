//! Everything a stage needs, built from its plan: model, optimizer, data, position.
//!
//! Where its weights come from is `origin.rs`'s matter; the loop over it is [`crate::train_loop`].

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use sail_data::{Loader, LoaderOptions, Tally, TextEncoder, TextSpec};
use sail_model::llm::LlmConfig;
use sail_model::params::Params;
use sail_model::vision::VisionConfig;
use sail_model::vlm::{Loss, Vlm, VlmConfig};
use serde_json::{Value, json};
use tch::{Cuda, Device, Kind, Tensor};

use crate::batch::to_batch;
use crate::checkpoint::{Checkpoint, InitRecord, Piece, RunState, Snapshot, Totals, Untouched};
use crate::config::{DeviceChoice, ModelSource, Module, Plan, Precision, VisualShape};
use crate::error::{Error, Result};
use crate::eval::Evaluator;
use crate::optim::{Optimizer, StateKind};
use crate::origin::{Folders, Sources, open_finished, untouched};
use crate::stage::{Fingerprints, FreezeTable, module_of};
use crate::step::Step;

/// A stage ready to run.
pub struct Session {
    /// What it follows.
    pub plan: Plan,
    /// The model; its trained parameters require gradients.
    pub model: Vlm,
    /// Masters and moments of what is trained.
    pub optimizer: Optimizer,
    /// Text to tokens and back.
    pub encoder: Arc<TextEncoder>,
    /// Held-out samples, where the plan evaluates.
    pub evaluator: Option<Evaluator>,
    /// Where the tensors are.
    pub device: Device,
    /// What the model computes in.
    pub precision: Kind,
    /// Optimizer steps done.
    pub step: u64,
    /// What was trained on so far.
    pub totals: Totals,
    loader: Loader,
    /// What the loader reads, as `sail-data --spec` takes it.
    data_spec: Value,
    init: Option<InitRecord>,
    untouched: BTreeMap<Module, Untouched>,
    /// fp32 weights of frozen modules, where the model computes in another type.
    exact: Params,
    started_from: Fingerprints,
}

impl Session {
    /// Builds the stage, at the position of `resume` if there is one.
    ///
    /// # Errors
    /// Whatever a file, a configuration or the data reports; a checkpoint of another plan.
    pub fn build(plan: &Plan, resume: Option<&Checkpoint>) -> Result<Self> {
        let device = choose_device(plan.run.device)?;
        let precision = choose_precision(plan.run.precision, device);
        let init = match (resume, &plan.init) {
            (None, Some(init)) => Some(open_finished(&init.from)?),
            _ => None,
        };
        let stored = resume.or(init.as_ref());
        let folders = Folders::for_model(plan, stored)?;
        let config = model_config(plan, &folders)?;
        let shape = visual_shape(plan, &config)?;
        let spec = plan.data_spec(shape);
        let tokenizer = folders.tokenizer(plan);
        let encoder = Arc::new(encoder(&tokenizer, &spec.text, &config.llm)?);
        let sources = Sources::open(plan, &folders, &config, stored)?;
        let model = Vlm::new(&config, sources.for_model(), (Kind::Float, device))?;
        let mut started_from = Fingerprints::new(model.params());
        let untouched = untouched(plan, stored, &started_from)?;
        let exact =
            if precision == Kind::Float { Params::new() } else { exact_frozen(&model, plan, &untouched)? };
        let mut optimizer = Optimizer::new(model.params(), &plan.train, plan.optimizer.clone(), precision)?;
        if precision != Kind::Float {
            started_from = Fingerprints::new(model.params());
        }
        let (mut step, mut totals, mut data) = (0, Totals::default(), None);
        let mut init_record = init.as_ref().map(Checkpoint::record);
        if let Some(checkpoint) = resume {
            optimizer.restore(checkpoint.optimizer_steps(), |name, kind| checkpoint.tensor(name, kind))?;
            let state = checkpoint.state();
            (step, totals, data) = (state.step, state.totals, Some(state.data.clone()));
            init_record.clone_from(&state.init);
        }
        let evaluator = match (&plan.eval, plan.eval_spec(shape)) {
            (Some(eval), Some(spec)) => Some(Evaluator::new(spec, eval, &encoder)?),
            _ => None,
        };
        let options = LoaderOptions::alone(plan.data.threads);
        let loader = Loader::new(&spec, Arc::clone(&encoder), options, data)?;
        let plan = plan.clone();
        Ok(Self {
            plan,
            model,
            optimizer,
            encoder,
            evaluator,
            device,
            precision,
            step,
            totals,
            loader,
            data_spec: json!({"tokenizer": tokenizer, "data": spec}),
            init: init_record,
            untouched,
            exact,
            started_from,
        })
    }

    /// The freeze plan as a table.
    pub fn freeze_table(&self) -> Result<FreezeTable> {
        FreezeTable::new(self.model.params(), &self.plan.train)
    }

    /// The packs of the next step, fewer where streams have ended; `None` when all have.
    pub fn next_step(&mut self) -> Result<Option<Step>> {
        let started = Instant::now();
        let mut packs = Vec::with_capacity(self.plan.batch.packs_per_step);
        // With more streams than packs a step may find only streams that have ended, while others go on.
        while packs.is_empty() && !self.loader.has_ended() {
            for _ in 0..self.plan.batch.packs_per_step {
                packs.extend(self.loader.next_pack()?.pack);
            }
        }
        let waited = started.elapsed().as_secs_f64();
        let tokens_per_pack = self.plan.batch.tokens_per_pack;
        Ok((!packs.is_empty()).then(|| Step::new(packs, tokens_per_pack, waited)))
    }

    /// Forward and backward of every pack, gradients summed in the optimizer; the step's mean loss,
    /// a 0-dimensional tensor.
    pub fn accumulate(&mut self, step: &Step) -> Result<Tensor> {
        let mut total = Tensor::zeros([], (Kind::Float, self.device));
        for pack in &step.packs {
            let Loss { sum, balance } = self.model.loss(&to_batch(pack, self.device))?;
            let mut loss = sum / step.weight;
            // A frozen router is as it is; one that trains is kept from sending all rows one way.
            if let Some(balance) = balance.filter(|_| self.plan.train.llm.is_trained()) {
                loss += balance / step.packs.len() as f64;
            }
            // A pack of text alone reaches nothing that is trained before the language model.
            if loss.requires_grad() {
                loss.backward();
            }
            self.optimizer.accumulate();
            total += loss.detach();
        }
        Ok(total)
    }

    /// Takes note that the update for `step` was made.
    pub fn advance(&mut self, step: &Step) {
        self.step += 1;
        self.totals.samples += step.size.samples;
        self.totals.tokens += step.size.tokens;
        self.totals.answer_tokens += step.size.answer_tokens;
    }

    /// What the loader reads, in YAML, as `sail-data --spec` takes it.
    pub fn data_spec(&self) -> String {
        serde_yaml::to_string(&self.data_spec)
            .expect("invariant: a data specification has only text keys and finite numbers")
    }

    /// What was seen of each source so far.
    pub fn coverage(&self) -> BTreeMap<String, Tally> {
        self.loader.tallies()
    }

    /// Everything a checkpoint of this moment holds.
    pub fn snapshot(&self) -> Result<Snapshot<'_>> {
        let mut pieces = Vec::new();
        for (name, tensor) in self.model.params() {
            if self.optimizer.master(name).is_none() && !self.untouched.contains_key(&module_of(name)?) {
                let tensor = self.exact.get(name).unwrap_or(tensor).shallow_clone();
                pieces.push(Piece { name, kind: StateKind::Param.name(), tensor });
            }
        }
        for (name, kind, tensor) in self.optimizer.state() {
            pieces.push(Piece { name, kind: kind.name(), tensor: tensor.shallow_clone() });
        }
        Ok(Snapshot {
            state: RunState {
                step: self.step,
                totals: self.totals,
                data: self.loader.position(),
                init: self.init.clone(),
                plan: self.plan.clone(),
            },
            optimizer_steps: self.optimizer.steps(),
            pieces,
            untouched: self.untouched.clone(),
        })
    }

    /// The parameters of a module in fp32, by full name: masters where it is trained.
    pub fn exact_params(&self, module: Module) -> Params {
        let prefix = format!("{module}.");
        let of_module = self.model.params().iter().filter(|(name, _)| name.starts_with(&prefix));
        of_module
            .map(|(name, compute)| {
                let exact = self.optimizer.master(name).or_else(|| self.exact.get(name));
                (name.clone(), exact.map_or_else(|| compute.to_kind(Kind::Float), Tensor::shallow_clone))
            })
            .collect()
    }

    /// Checks that every trained parameter and moment is a number.
    ///
    /// # Errors
    /// [`Error::WeightsNotFinite`].
    pub fn check_finite(&self) -> Result<()> {
        let tensors: Vec<Tensor> =
            self.optimizer.state().map(|(_, _, tensor)| tensor.shallow_clone()).collect();
        let norm = sail_torch::global_norm(&tensors)?.double_value(&[]);
        if norm.is_finite() { Ok(()) } else { Err(Error::WeightsNotFinite { step: self.step }) }
    }

    /// Checks that no frozen parameter changed since the session was built.
    ///
    /// # Errors
    /// [`Error::FreezePlan`] naming the first that did.
    pub fn check_frozen(&self) -> Result<()> {
        self.started_from.check_frozen(self.model.params(), &self.plan.train)
    }
}

/// Finds what a plan names that is not there or does not fit, without loading weights or training: so
/// that a mistake in a curriculum's last stage does not wait for the first ones.
///
/// # Errors
/// [`Error::Preflight`] with the first thing that is wrong.
pub fn preflight(plan: &Plan) -> Result<()> {
    let check = || -> Result<()> {
        choose_device(plan.run.device)?;
        let folders = Folders::for_check(plan)?;
        let config = model_config(plan, &folders)?;
        let shape = visual_shape(plan, &config)?;
        let spec = plan.data_spec(shape);
        encoder(&folders.tokenizer(plan), &spec.text, &config.llm)?;
        sail_data::check_sources(&spec)?;
        if plan.export.as_ref().is_some_and(|export| !config.vision.has_layout(export.vit)) {
            return Err(Error::usage(
                format!("`export.vit`: this `{}` has no such layout", config.vision.model_type()),
                "write `export: { vit: transformers }`",
            ));
        }
        plan.eval_spec(shape).map_or(Ok(()), |spec| Ok(sail_data::check_sources(&spec)?))
    };
    check().map_err(|source| Error::Preflight { run: plan.run.name.clone(), source: Box::new(source) })
}

/// fp32 copies, on the CPU, of the frozen weights that checkpoints store or an export writes.
fn exact_frozen(model: &Vlm, plan: &Plan, untouched: &BTreeMap<Module, Untouched>) -> Result<Params> {
    let mut exact = Params::new();
    for (name, tensor) in model.params() {
        let module = module_of(name)?;
        let wanted = module == Module::Vision || !untouched.contains_key(&module);
        if wanted && !plan.train.get(module).is_trained() {
            exact.insert(name.clone(), tensor.detach().to_device(Device::Cpu));
        }
    }
    Ok(exact)
}

/// The configurations of the three modules, read or taken from the plan.
pub(crate) fn model_config(plan: &Plan, folders: &Folders) -> Result<VlmConfig> {
    let vision = match &plan.model.vision.source {
        ModelSource::From(_) => VisionConfig::read(folders.get(Module::Vision))?,
        ModelSource::Random(value) => VisionConfig::from_keys(value)?,
    };
    let llm = match &plan.model.llm.source {
        ModelSource::From(_) => LlmConfig::read(folders.get(Module::Llm))?,
        ModelSource::Random(value) => LlmConfig::from_keys(value)?,
    };
    Ok(VlmConfig { vision, projector: plan.model.projector, llm })
}

/// What the model makes of pixels.
pub(crate) fn visual_shape(plan: &Plan, config: &VlmConfig) -> Result<VisualShape> {
    let px = plan.model.vision.image_px as i64;
    let unit = config.vision.patch_size() * config.projector.merge;
    let shape = |tokens| VisualShape { tokens_per_tile: tokens as usize, unit_px: unit as usize };
    config.visual_tokens(px, px).map(shape).map_err(|_| {
        Error::usage(
            format!(
                "`model.vision.image_px` {px} is not a multiple of {unit} (patch size {} x merge {})",
                config.vision.patch_size(),
                config.projector.merge
            ),
            format!("choose a multiple of {unit}, such as {}", (px / unit).max(1) * unit),
        )
    })
}

/// Text to tokens, with a tokenizer that the language model has rows for.
pub(crate) fn encoder(tokenizer: &Path, text: &TextSpec, llm: &LlmConfig) -> Result<TextEncoder> {
    let encoder = TextEncoder::new(tokenizer, text)?;
    let rows = llm.vocab_size() as usize;
    if encoder.vocab_size() > rows {
        return Err(Error::usage(
            format!(
                "`{}` has {} tokens, the language model's table {rows} rows",
                tokenizer.display(),
                encoder.vocab_size()
            ),
            "give the tokenizer that belongs to the model as `model.llm.tokenizer`",
        ));
    }
    Ok(encoder)
}

pub(crate) fn choose_device(choice: DeviceChoice) -> Result<Device> {
    let index = match choice {
        DeviceChoice::Cpu => return Ok(Device::Cpu),
        DeviceChoice::Auto if !Cuda::is_available() => return Ok(Device::Cpu),
        DeviceChoice::Auto => 0,
        DeviceChoice::Cuda(index) => index,
    };
    let found = Cuda::device_count();
    if (index as i64) < found {
        return Ok(Device::Cuda(index));
    }
    Err(Error::usage(
        format!("the device is `{choice}`, but libtorch sees {found} CUDA devices"),
        "choose `cpu` (`run.device` or `--device`), or check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    ))
}

pub(crate) fn choose_precision(choice: Precision, device: Device) -> Kind {
    match choice {
        Precision::Bf16 => Kind::BFloat16,
        Precision::Auto if device.is_cuda() => Kind::BFloat16,
        Precision::Auto | Precision::Fp32 => Kind::Float,
    }
}

/// Refuses a second process on one run folder for as long as the returned file lives.
pub fn lock(run_dir: &Path) -> Result<File> {
    std::fs::create_dir_all(run_dir).map_err(Error::io(run_dir))?;
    let path = run_dir.join(".lock");
    let file = File::create(&path).map_err(Error::io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::usage(
            format!("another process is training in `{}`", run_dir.display()),
            "wait for it, stop it, or choose another `run.dir`",
        )),
        Err(std::fs::TryLockError::Error(error)) => Err(Error::io(&path)(error)),
    }
}
