//! The typed configuration: YAML files and `--set` overrides to a [`Plan`].
//!
//! Four steps, each in its own files: text to a tree that knows where everything was written (`source`, `tree`);
//! the tree to the file's form, where serde types and names are checked (`de`, `raw`); the form to a [`Plan`], where
//! defaults are filled in and values checked against each other (`resolve`); and the plan's own behaviour (`plan`,
//! `identity`). Every step collects its faults and goes on, so that [`load`] reports all of them.
//!
//! Precedence: defaults < the file that `extends` names < the file < `--set path=value`.
//!
//! ```no_run
//! use sail_train::config::{Config, load};
//!
//! match load("configs/tiny/stage1.yaml".as_ref(), &["run.root=/tmp/try".to_owned()])? {
//!     Config::Stage(plan) => println!("{}", plan.to_yaml()),
//!     Config::Curriculum(curriculum) => println!("{} stages", curriculum.stages.len()),
//! }
//! # Ok::<(), sail_train::config::ConfigErrors>(())
//! ```

mod check;
mod de;
mod error;
mod identity;
mod path;
mod plan;
mod plan_data;
mod raw;
mod raw_data;
mod raw_train;
mod raw_values;
mod resolve;
mod resolve_data;
mod resolve_train;
mod schema;
mod select;
mod source;
mod tasks;
#[cfg(test)]
mod tests;
mod tree;
mod values;

use std::path::{Path, PathBuf};

pub use error::{ConfigError, ConfigErrors, Origin, Problem};
pub use identity::Difference;
pub(crate) use identity::hex;
pub use path::{FieldPath, Step};
pub use plan::{
    AdaLrsPlan, BatchPlan, CheckpointPlan, EarlyStopPlan, EmaPlan, EvalPlan, ExportPlan, GuardPlan, InitPlan,
    LlmPlan, LogPlan, MlflowPlan, ModelPlan, OptimizerPlan, ParallelPlan, Plan, RecomputePlan, RulePlan,
    RunPlan, SchedulePlan, TrainPlan, UnlockPlan, VisionPlan, WatchdogPlan,
};
pub use plan_data::{AnyResolutionPlan, DataPlan, FeatureCachePlan, VisualShape};
pub use schema::schema;
pub use select::Selector;
pub use tasks::{
    AffinityPlan, AttentivePlan, ChoicePlan, GenerationPlan, ImagesPlan, KnnPlan, LossPlan, MlpPlan,
    RecognitionPlan, SamplesPlan, TasksPlan, TestPlan, load_tasks,
};
pub use values::{
    Amount, DeviceChoice, GuardAction, Listen, ModelSource, Module, ModulePlan, Precision, Progress, Rates,
    Recompute, ReduceDtype, ScheduleKind, Strategy, VisualBalance,
};

use check::Checker;
use raw::RawCurriculum;
use tree::Node;

/// What a configuration file describes.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// One stage.
    Stage(Box<Plan>),
    /// Stages that run one after the other.
    Curriculum(CurriculumPlan),
}

impl Config {
    /// The stages in the order they run, at least one.
    pub fn plans(&self) -> Vec<&Plan> {
        match self {
            Self::Stage(plan) => vec![plan],
            Self::Curriculum(curriculum) => curriculum.stages.iter().map(|(_, plan)| plan).collect(),
        }
    }

    /// The resolved configuration: a stage as [`Plan::to_yaml`], a curriculum as one such document per stage, each
    /// below a comment with its file.
    pub fn to_yaml(&self) -> String {
        match self {
            Self::Stage(plan) => plan.to_yaml(),
            Self::Curriculum(curriculum) => {
                curriculum.stages.iter().fold(String::new(), |text, (file, plan)| {
                    text + &format!("---\n# {}\n", file.display()) + &plan.to_yaml()
                })
            }
        }
    }
}

/// Stages that run one after the other; each names what it starts from in its own `init.from`.
#[derive(Clone, Debug, PartialEq)]
pub struct CurriculumPlan {
    /// Shown in logs.
    pub name: String,
    /// Each stage's file and plan, at least one; no two write to the same folder.
    pub stages: Vec<(PathBuf, Plan)>,
}

/// One `--set`: a path and the value for it.
type Override = (FieldPath, Node);

/// Reads a stage file, or a curriculum file: one that has `stages:`, a list of stage files relative to itself.
///
/// `sets` are `path=value`, the value in YAML. In a curriculum each applies to every stage; with `stages[N].` in
/// front (from 0) to that stage alone. `run.root` moves the folders of all stages together.
///
/// # Errors
/// Every fault of every file and override.
pub fn load(path: &Path, sets: &[String]) -> Result<Config, ConfigErrors> {
    let mut errors = Vec::new();
    let mut overrides = Vec::new();
    for text in sets {
        match source::read_set(text) {
            Ok(read) => overrides.push(read),
            Err(faults) => errors.extend(faults),
        }
    }
    let mut file_errors = Vec::new();
    let tree = source::read_file(path, (FieldPath::default(), Origin::CommandLine), &mut file_errors);
    let config = match tree {
        None => {
            errors.append(&mut file_errors);
            None
        }
        Some(tree) if tree.get("stages").is_some() => {
            curriculum(path, &tree, &overrides, file_errors, &mut errors).map(Config::Curriculum)
        }
        Some(tree) => {
            stage(tree, overrides.iter(), file_errors, &mut errors).map(|plan| Config::Stage(Box::new(plan)))
        }
    };
    match config {
        Some(config) if errors.is_empty() => Ok(config),
        _ => Err(ConfigErrors(without_repeats(errors))),
    }
}

fn stage<'o>(
    mut tree: Node,
    overrides: impl Iterator<Item = &'o Override>,
    mut file_errors: Vec<ConfigError>,
    errors: &mut Vec<ConfigError>,
) -> Option<Plan> {
    for (path, value) in overrides {
        if let Err(reason) = tree.set(&path.0, value.clone()) {
            let problem = Problem::Invalid(reason);
            let origin = value.origin.clone();
            file_errors.push(ConfigError { path: path.clone(), origin, problem, hint: None });
        }
    }
    match resolve::stage(&tree, file_errors) {
        Ok(plan) => Some(plan),
        Err(faults) => {
            errors.extend(faults);
            None
        }
    }
}

fn curriculum(
    path: &Path,
    tree: &Node,
    overrides: &[Override],
    file_errors: Vec<ConfigError>,
    errors: &mut Vec<ConfigError>,
) -> Option<CurriculumPlan> {
    let mut checker = Checker::new(tree, file_errors);
    let raw: RawCurriculum = de::read(&mut checker);
    let name = checker.required("name", raw.name);
    if raw.stages.is_empty() {
        checker.invalid_with_hint("stages", "is empty", "list stage files, relative to this one");
    }
    let mut stages: Vec<(PathBuf, Plan)> = Vec::new();
    let mut stage_errors = Vec::new();
    for (index, written) in raw.stages.iter().enumerate() {
        let file = source::sibling(path, written);
        let mut file_errors = Vec::new();
        let at = FieldPath(vec![Step::Key("stages".to_owned()), Step::Index(index)]);
        let named_at = (at.clone(), tree.origin_of(&at).clone());
        let Some(tree) = source::read_file(&file, named_at, &mut file_errors) else {
            stage_errors.append(&mut file_errors);
            continue;
        };
        let own: Vec<Override> = overrides.iter().filter_map(|set| for_stage(set, index)).collect();
        let Some(plan) = stage(tree, own.iter(), file_errors, &mut stage_errors) else { continue };
        if let Some((other, _)) = stages.iter().find(|(_, other)| other.run.dir == plan.run.dir) {
            let message = format!(
                "`{}` and `{}` both have `run.dir` {}",
                other.display(),
                file.display(),
                plan.run.dir.display()
            );
            let hint = "every stage needs a folder of its own; `run.root` moves them all together";
            checker.invalid_with_hint(&format!("stages[{index}]"), message, hint);
        }
        stages.push((file, plan));
    }
    for (path, value) in overrides {
        if let [Step::Key(key), Step::Index(index), ..] = path.0.as_slice()
            && key == "stages"
            && *index >= raw.stages.len()
        {
            let problem = Problem::Invalid(format!("there are {} stages, from 0", raw.stages.len()));
            let origin = value.origin.clone();
            stage_errors.push(ConfigError { path: path.clone(), origin, problem, hint: None });
        }
    }
    errors.extend(checker.into_errors());
    errors.extend(stage_errors);
    Some(CurriculumPlan { name: name?, stages })
}

/// The override as stage `index` sees it; `None` when it is for another stage.
fn for_stage((path, value): &Override, index: usize) -> Option<Override> {
    match path.0.as_slice() {
        [Step::Key(key), Step::Index(wanted), inner @ ..] if key == "stages" => {
            (*wanted == index).then(|| (FieldPath(inner.to_vec()), value.clone()))
        }
        _ => Some((path.clone(), value.clone())),
    }
}

/// An override that is wrong is wrong in every stage; it is shown once.
fn without_repeats(errors: Vec<ConfigError>) -> Vec<ConfigError> {
    let mut kept: Vec<ConfigError> = Vec::new();
    for error in errors {
        if !kept.contains(&error) {
            kept.push(error);
        }
    }
    kept
}
