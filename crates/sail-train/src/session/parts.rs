//! What a session is built of: shapes, tokenizer, freeze plan, optimizer, and the checks that they fit together.
//!
//! Most of it needs no weights, so that a plan can be looked at before anything is loaded ([`preflight`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sail_data::{TextEncoder, TextSpec};
use sail_model::llm::LlmConfig;
use sail_model::params::Params;
use sail_model::vision::VisionConfig;
use sail_model::vlm::{Vlm, VlmConfig};
use tch::{Device, Kind};

use crate::checkpoint::{Checkpoint, RunState, Untouched, Updates};
use crate::clock::{Clock, Part};
use crate::config::{ModelSource, Module, Plan, Progress, VisualShape};
use crate::device::choose_device;
use crate::error::{Error, Result};
use crate::freeze::{FreezePlan, RatesByName};
use crate::optim::{Optimizer, StateKind};
use crate::origin::Folders;
use crate::stage::{Fingerprints, module_of};
use crate::world::{Fields, World};

/// Opens a checkpoint that the main rank finds and verifies.
pub(super) fn open_on_all(world: &World, find: impl FnOnce() -> Result<Checkpoint>) -> Result<Checkpoint> {
    let mut found = None;
    let dir = world.from_main(|| {
        let checkpoint = find()?;
        let dir = checkpoint.dir().to_owned();
        found = Some(checkpoint);
        Ok(dir)
    })?;
    found.map_or_else(|| Checkpoint::open_verified(&dir), Ok)
}

/// Takes over what is trained of a model, and brings each block's parameters before it computes.
pub(super) fn optimizer(
    plan: &Plan,
    model: &Vlm,
    trained: &[&RatesByName],
    precision: Kind,
    world: &World,
) -> Result<Optimizer> {
    let (blocks, adamw, group) = (model.listener().blocks(), plan.optimizer.clone(), world.group());
    let optimizer = Optimizer::new(model.params(), blocks, trained, adamw, &plan.parallel, precision, group)?;
    model.listener().set(optimizer.on_block());
    Ok(optimizer)
}

/// A clock that learns from the model and the ranks what they do.
pub(super) fn clock(device: Device, model: &Vlm, world: &World) -> Clock {
    let clock = Clock::new(device);
    world.on_wait(clock.on_wait());
    let of_modules = clock.clone();
    model.listener().set_on_module(move |name| {
        let module = Module::ALL.into_iter().find(|module| module.name() == name);
        of_modules.enter(module.map_or(Part::Other, Part::Of));
    });
    clock
}

/// What two ranks must have alike before they share gradients.
pub(super) fn model_fields(model: &Vlm, weights: &Fingerprints) -> Fields {
    let mut fields: Fields =
        model.params().iter().map(|(name, tensor)| (name.clone(), format!("{:?}", tensor.size()))).collect();
    for module in Module::ALL {
        fields.insert(format!("weights of {module}"), weights.of_module(module));
    }
    fields
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
        freeze_plan(&Vlm::shapes_only(&config)?, plan)?;
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

/// What a plan trains when, of its model.
pub(crate) fn freeze_plan(model: &Vlm, plan: &Plan) -> Result<FreezePlan> {
    let sizes: Vec<(&str, Vec<i64>)> =
        model.params().iter().map(|(name, tensor)| (name.as_str(), tensor.size())).collect();
    let params = sizes.iter().map(|(name, size)| (*name, size.as_slice()));
    FreezePlan::new(params, &model.listener().blocks(), &plan.train)
}

/// The unlock points that a run had passed, where the plan still has them.
pub(super) fn passed(plan: &Plan, state: &RunState) -> BTreeMap<usize, Progress> {
    let then = &state.plan.train.unfreeze;
    let points = plan.train.unfreeze.iter().enumerate();
    points
        .filter_map(|(index, point)| {
            let old = then.iter().position(|old| (&old.at, &old.parts) == (&point.at, &point.parts))?;
            Some((index, *state.unlocked.get(&old)?))
        })
        .collect()
}

/// What is trained once a stage has passed these unlock points, in the order in which it began.
pub(super) fn trained_after<'a>(
    freeze: &'a FreezePlan,
    unlocked: &BTreeMap<usize, Progress>,
) -> Vec<&'a RatesByName> {
    let mut points: Vec<(u64, usize)> = unlocked.iter().map(|(&index, then)| (then.steps, index)).collect();
    points.sort_unstable();
    [freeze.first()]
        .into_iter()
        .chain(points.into_iter().map(|(_, index)| freeze.unlocked_by(index)))
        .collect()
}

pub(super) fn modules_of(trained: &[&RatesByName]) -> Result<BTreeSet<Module>> {
    trained.iter().flat_map(|trained| trained.keys()).map(|name| module_of(name)).collect()
}

/// fp32 copies, on the CPU, of the frozen weights that checkpoints may come to store, an export writes or an unlock
/// point frees.
pub(super) fn exact_frozen(
    model: &Vlm,
    plan: &Plan,
    trained: &[&RatesByName],
    untouched: &BTreeMap<Module, Untouched>,
) -> Result<Params> {
    let mut exact = Params::new();
    for (name, tensor) in model.params() {
        let module = module_of(name)?;
        // Once a part of a module is unlocked, checkpoints store all of it.
        let may_be_stored = plan.train.ever_trains(module) || !untouched.contains_key(&module);
        let wanted = module == Module::Vision || may_be_stored;
        if wanted && !trained.iter().any(|trained| trained.contains_key(name)) {
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

/// Gives what is trained the moments and averages of a checkpoint that the model was built from.
pub(super) fn restore(optimizer: &mut Optimizer, checkpoint: &Checkpoint) -> Result<()> {
    let updates = updates(optimizer, checkpoint);
    optimizer.restore(updates, |name, kind, elements| {
        // An average that the run did not have begins with the parameter.
        let begins = kind == StateKind::Ema && !checkpoint.holds(name, kind);
        checkpoint.elements(name, if begins { StateKind::Param } else { kind }, elements)
    })
}

/// How often the parameters that are trained now were updated until `checkpoint`.
fn updates(optimizer: &Optimizer, checkpoint: &Checkpoint) -> Updates {
    let then = &checkpoint.state().updates;
    let mut later = BTreeMap::new();
    for name in optimizer.names() {
        // What was frozen has no moments.
        let count = if checkpoint.holds(name, StateKind::ExpAvg) { then.of(name) } else { 0 };
        if count != then.all {
            later.insert(name.to_owned(), count);
        }
    }
    Updates { all: then.all, later }
}

/// A checkpoint has nothing that this model lacks: a deeper one would lose its upper blocks without a word.
pub(super) fn check_names(stored: Option<&Checkpoint>, model: &Vlm) -> Result<()> {
    let Some(checkpoint) = stored else { return Ok(()) };
    let extra = checkpoint.names().find(|name| !model.params().contains_key(*name));
    extra.map_or(Ok(()), |name| {
        Err(Error::usage(
            format!("`{}` holds `{name}`, which this model does not have", checkpoint.dir().display()),
            "give `model` the configuration that the checkpoint was trained with",
        ))
    })
}

/// A position that does not belong to the data is a matter of the configuration.
pub(super) fn no_way_on(error: sail_data::Error) -> Error {
    match error {
        sail_data::Error::StateMismatch { .. } => Error::usage(
            error.to_string(),
            "put back what the checkpoint was trained with, sampling weights included, or start anew in another `run.dir`",
        ),
        other => other.into(),
    }
}

/// Every rank has as many streams and packs as any other.
pub(super) fn check_division(plan: &Plan, world: usize) -> Result<()> {
    let shared = plan.shared_in_parts();
    if shared.iter().all(|(_, parts)| parts.is_multiple_of(world)) {
        return Ok(());
    }
    let both = shared.iter().map(|(_, parts)| parts.next_multiple_of(world)).max().unwrap_or(world);
    let [streams, packs] = shared.map(|(path, parts)| format!("`{path}`, {parts},"));
    Err(Error::usage(
        format!("{packs} and {streams} must be multiples of the {world} ranks"),
        format!("start another number of ranks, or set both to {both}, which makes it another run"),
    ))
}
