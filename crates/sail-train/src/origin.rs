//! Where the weights of a stage come from: a checkpoint, a Hugging Face folder or hub, or random values.
//!
//! Called by [`crate::session`] while it builds the model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use sail_model::params::{Init, RandomSource, TensorSource};
use sail_model::vlm::{VlmConfig, VlmSources};
use sail_model::weights::{FileSource, ModelRef, Naming, Shards, Wanted};
use tch::Tensor;

use crate::checkpoint::{self, Checkpoint, Untouched};
use crate::config::{ModelSource, Module, Plan};
use crate::error::{Error, Result};
use crate::lineage::{self, Lineage};
use crate::optim::StateKind;
use crate::stage::Fingerprints;
use crate::train_loop::SUMMARY;

/// The checkpoint that `init.from` names: itself, or the last one of a finished run.
pub(crate) fn open_finished(from: &Path) -> Result<Checkpoint> {
    let checkpoint = checkpoint::open_or_newest(from)?.ok_or_else(|| {
        Error::usage(
            format!("`init.from`: `{}` holds no complete checkpoint", from.display()),
            "run that stage first, or name one of its `step-…` folders",
        )
    })?;
    let state = checkpoint.state();
    let (progress, length) = (state.progress(), state.plan.schedule.length);
    if !length.is_reached(progress) && checkpoint.dir() != from && !ended_before_its_length(from, state.step)
    {
        let done = length.with_count(length.of(progress));
        return Err(Error::usage(
            format!("`init.from`: the run in `{}` stopped after {done} of {length}", from.display()),
            format!("finish it, or name the checkpoint itself: `{}`", checkpoint.dir().display()),
        ));
    }
    Ok(checkpoint)
}

/// Whether the run's summary, which is written when it ends, is of this step.
fn ended_before_its_length(run_dir: &Path, step: u64) -> bool {
    let summary = fs::read(run_dir.join(SUMMARY)).ok();
    let summary = summary.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    summary.is_some_and(|summary| summary["steps"] == step)
}

/// Refuses to go on from `resume` where `init.from` holds other weights now than the run started from;
/// where they are gone there is nothing to compare.
pub(crate) fn check_lineage(plan: &Plan, resume: &Checkpoint) -> Result<()> {
    let (Some(init), Some(then)) = (&plan.init, resume.state().lineage.stages.last()) else { return Ok(()) };
    match checkpoint::open_or_newest(&init.from)? {
        // One that is damaged now was passed over for an older one; it is what the run started from all the same.
        Some(now) if now.seal() != then.seal && !checkpoint::is_there(&then.dir, &then.seal) => {
            Err(Error::usage(
                format!(
                    "`{}` started from other weights than `{}` holds now",
                    plan.run.dir.display(),
                    init.from.display()
                ),
                format!("remove `{}` to train this stage anew from them", plan.run.dir.display()),
            ))
        }
        _ => Ok(()),
    }
}

/// Folders of the models that a plan names. What it names on a hub is fetched, once for each of these.
#[derive(Debug)]
pub(crate) struct Folders(BTreeMap<Module, PathBuf>);

impl Folders {
    /// With what a check of the plan needs.
    ///
    /// # Errors
    /// Also when a folder that the run starts from has weights that are cut short or not all there.
    pub(crate) fn for_check(plan: &Plan) -> Result<Self> {
        let folders = Self::fetch(plan, |module| with_tokenizer(plan, module, false))?;
        for module in [Module::Vision, Module::Llm].into_iter().filter(|_| plan.init.is_none()) {
            if let Some(ModelSource::From(ModelRef::Folder(folder))) = source_of(plan, module) {
                Shards::open(folder)?;
            }
        }
        Ok(folders)
    }

    /// With what the model's shapes are read from: of a hub's models, config.json alone.
    pub(crate) fn for_shapes(plan: &Plan) -> Result<Self> {
        Self::fetch(plan, |_| Wanted::default())
    }

    /// With all that the model is built from, where `stored` holds a part of it.
    pub(crate) fn for_model(plan: &Plan, stored: Option<&Checkpoint>) -> Result<Self> {
        Self::fetch(plan, |module| {
            let weights = stored.is_none_or(|checkpoint| !holds(checkpoint, module));
            with_tokenizer(plan, module, weights)
        })
    }

    fn fetch(plan: &Plan, wanted: impl Fn(Module) -> Wanted) -> Result<Self> {
        let mut folders = BTreeMap::new();
        for module in Module::ALL {
            if let Some(ModelSource::From(model)) = source_of(plan, module) {
                if let ModelRef::Folder(folder) = model
                    && !folder.is_dir()
                {
                    return Err(Error::usage(
                        format!("`model.{module}.from`: there is no folder `{}`", folder.display()),
                        "paths are relative to the working folder; `.venv/bin/python scripts/fetch_demo_weights.py` brings the demo's",
                    ));
                }
                folders.insert(module, model.fetch(wanted(module))?);
            }
        }
        Ok(Self(folders))
    }

    /// The folder of a module that the plan does not start at random.
    pub(crate) fn get(&self, module: Module) -> &Path {
        self.0.get(&module).expect("invariant: asked for only where the plan has `from`")
    }

    /// What the modules begin with where there is no checkpoint.
    ///
    /// # Errors
    /// As [`lineage::origin`].
    pub(crate) fn origins(&self, plan: &Plan) -> Result<Lineage> {
        let mut weights = BTreeMap::new();
        for module in Module::ALL {
            let origin = match source_of(plan, module) {
                Some(source) => {
                    lineage::origin(source, self.0.get(&module).map_or(Path::new(""), PathBuf::as_path))?
                }
                None => "random".into(),
            };
            weights.insert(module, origin);
        }
        Ok(Lineage { weights, stages: Vec::new() })
    }

    /// The `tokenizer.json` of the plan.
    pub(crate) fn tokenizer(&self, plan: &Plan) -> PathBuf {
        let given = plan.model.llm.tokenizer.clone();
        given.unwrap_or_else(|| self.get(Module::Llm).join("tokenizer.json"))
    }
}

/// The tokenizer where the plan takes it from there, and perhaps the weights.
fn with_tokenizer(plan: &Plan, module: Module, weights: bool) -> Wanted {
    Wanted { tokenizer: module == Module::Llm && plan.model.llm.tokenizer.is_none(), weights }
}

/// Where each module's tensors come from.
pub(crate) struct Sources<'a>(BTreeMap<Module, Source<'a>>);

enum Source<'a> {
    Checkpoint(CheckpointSource<'a>),
    Folder(Box<FileSource>),
    Random(RandomSource),
}

impl<'a> Sources<'a> {
    /// Opens what the plan names; `stored` goes before it for the modules that it holds.
    pub(crate) fn open(
        plan: &Plan,
        folders: &Folders,
        config: &VlmConfig,
        stored: Option<&'a Checkpoint>,
    ) -> Result<Self> {
        let mut sources = BTreeMap::new();
        for module in Module::ALL {
            let in_checkpoint = stored.filter(|checkpoint| holds(checkpoint, module));
            let source = match (in_checkpoint, source_of(plan, module)) {
                (Some(checkpoint), _) => {
                    let kind = StateKind::Param;
                    Source::Checkpoint(CheckpointSource { checkpoint, module, kind })
                }
                (None, Some(ModelSource::From(_))) => {
                    let naming = match module {
                        Module::Vision => config.vision.naming(),
                        Module::Projector => Naming::default(),
                        Module::Llm => config.llm.naming(),
                    };
                    Source::Folder(Box::new(FileSource::open(folders.get(module))?.with(naming)))
                }
                (None, Some(ModelSource::Random(_)) | None) => {
                    Source::Random(RandomSource::new(plan.run.seed, module.name()))
                }
            };
            sources.insert(module, source);
        }
        Ok(Self(sources))
    }

    /// The same with moving averages in place of parameters, where a checkpoint has some.
    pub(crate) fn averaged(mut self) -> Self {
        for source in self.0.values_mut() {
            if let Source::Checkpoint(source) = source {
                source.kind = StateKind::Ema;
            }
        }
        self
    }

    /// As the model's constructor takes them.
    pub(crate) fn for_model(&self) -> VlmSources<'_> {
        let get = |module| -> &dyn TensorSource {
            match &self.0[&module] {
                Source::Checkpoint(source) => source,
                Source::Folder(source) => &**source,
                Source::Random(source) => source,
            }
        };
        VlmSources { vision: get(Module::Vision), projector: get(Module::Projector), llm: get(Module::Llm) }
    }
}

/// The modules that have the weights of their folder and of which nothing is `trained`; checks that a checkpoint that
/// left them so meant the same weights.
pub(crate) fn untouched(
    plan: &Plan,
    stored: Option<&Checkpoint>,
    loaded: &Fingerprints,
    trained: &BTreeSet<Module>,
) -> Result<BTreeMap<Module, Untouched>> {
    let mut untouched = BTreeMap::new();
    for module in Module::ALL {
        let left = as_in_its_folder(plan, stored, module, loaded)?;
        if let Some(left) = left.filter(|_| !trained.contains(&module)) {
            untouched.insert(module, left);
        }
    }
    Ok(untouched)
}

/// A module whose weights are those of its folder and not `stored`'s; checks that they are the ones that
/// `stored` was trained with.
pub(crate) fn as_in_its_folder(
    plan: &Plan,
    stored: Option<&Checkpoint>,
    module: Module,
    loaded: &Fingerprints,
) -> Result<Option<Untouched>> {
    let before = stored.and_then(|checkpoint| Some((checkpoint, checkpoint.untouched().get(&module)?)));
    let Some(ModelSource::From(model)) = source_of(plan, module) else {
        let Some((checkpoint, before)) = before else { return Ok(None) };
        return Err(Error::usage(
            format!("`{}` was trained with the {module} of `{}`", checkpoint.dir().display(), before.from),
            format!("give that as `model.{module}.from`"),
        ));
    };
    if stored.is_some_and(|checkpoint| holds(checkpoint, module)) {
        return Ok(None);
    }
    let fingerprint = loaded.of_module(module);
    if let Some((checkpoint, before)) = before.filter(|(_, before)| before.fingerprint != fingerprint) {
        return Err(Error::usage(
            format!(
                "`model.{module}.from`: `{model}` has other weights than `{}`, with which `{}` was trained",
                before.from,
                checkpoint.dir().display(),
            ),
            match model {
                ModelRef::Folder(_) => "give the same weights, or start without `init.from`",
                ModelRef::Hub { .. } => {
                    "give the same weights, with `@` and the commit that they are of, or start without `init.from`"
                }
            },
        ));
    }
    Ok(Some(Untouched { from: model.clone(), fingerprint }))
}

/// Where the plan says that a module's weights come from; the projector always starts at random.
fn source_of(plan: &Plan, module: Module) -> Option<&ModelSource> {
    match module {
        Module::Vision => Some(&plan.model.vision.source),
        Module::Projector => None,
        Module::Llm => Some(&plan.model.llm.source),
    }
}

fn holds(checkpoint: &Checkpoint, module: Module) -> bool {
    !checkpoint.untouched().contains_key(&module)
}

/// A module's tensors from a checkpoint.
struct CheckpointSource<'a> {
    checkpoint: &'a Checkpoint,
    module: Module,
    /// What is wanted of each tensor that has it; of others the parameter.
    kind: StateKind,
}

impl TensorSource for CheckpointSource<'_> {
    fn fill(&self, name: &str, target: &Tensor, _init: Init) -> sail_model::Result<()> {
        let full = format!("{}.{name}", self.module);
        let unreadable = |error: Error| sail_model::Error::File {
            path: self.checkpoint.dir().to_owned(),
            reason: error.to_string(),
        };
        let kind = if self.checkpoint.holds(&full, self.kind) { self.kind } else { StateKind::Param };
        let tensor = self.checkpoint.tensor(&full, kind).map_err(unreadable)?;
        if tensor.size() == target.size() {
            target.shallow_clone().f_copy_(&tensor)?;
            return Ok(());
        }
        Err(sail_model::Error::Shape {
            path: self.checkpoint.dir().to_owned(),
            name: full,
            found: tensor.size(),
            expected: target.size(),
        })
    }
}
