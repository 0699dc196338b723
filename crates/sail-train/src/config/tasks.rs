//! The form of a file of tasks, which `sail-train eval --tasks` measures, and the checked [`TasksPlan`].
//!
//! Read with what reads a stage's file: every fault is reported at once, with its line. docs/evaluate-tasks.md is the manual.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sail_data::Layout;
use serde::{Deserialize, Serialize};

use super::check::Checker;
use super::de;
use super::error::{ConfigErrors, Origin};
use super::path::FieldPath;
use super::raw_values::RawList;
use super::source;
use super::values::DeviceChoice;
use crate::metrics::folded;

/// What is measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TasksPlan {
    /// Where it is computed; no part of what is.
    #[serde(skip)]
    pub device: DeviceChoice,
    /// Of random weights of probes, of the order of their samples, and of what is picked from clouds.
    pub seed: u64,
    /// Images that are encoded together.
    #[serde(skip)]
    pub batch_images: usize,
    /// Probes of the frozen encoder.
    pub recognition: Vec<RecognitionPlan>,
    /// Distances of visual tokens and the embeddings of words.
    pub affinity: Vec<AffinityPlan>,
    /// Losses on held-out answers.
    pub loss: Vec<LossPlan>,
    /// Generated answers.
    pub generation: Vec<GenerationPlan>,
    /// Given answers.
    pub choice: Vec<ChoicePlan>,
}

impl TasksPlan {
    /// The names of the tasks that an encoder alone cannot be asked.
    pub fn needs_whole_model(&self) -> Vec<&str> {
        let affinity = self.affinity.iter().map(|task| &task.name);
        let loss = self.loss.iter().map(|task| &task.name);
        let generation = self.generation.iter().map(|task| &task.name);
        let choice = self.choice.iter().map(|task| &task.name);
        affinity.chain(loss).chain(generation).chain(choice).map(String::as_str).collect()
    }
}

/// Classes by a probe of the frozen encoder's features; at least one of the probes is there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RecognitionPlan {
    /// Of the task, and of its folder.
    pub name: String,
    /// What the probes learn from.
    pub train: ImagesPlan,
    /// What they are measured on, at least one.
    pub tests: Vec<TestPlan>,
    /// The nearest neighbours vote.
    pub knn: Option<KnnPlan>,
    /// A perceptron of two layers is trained.
    pub mlp: Option<MlpPlan>,
    /// A query that looks at all patches is trained.
    pub attentive: Option<AttentivePlan>,
}

/// Images with a class each.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagesPlan {
    /// A folder of folders, one for each class.
    Folder(PathBuf),
    /// Tar shards with an image and a `.cls` member in each sample.
    Shards(Vec<String>),
}

/// A test set.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TestPlan {
    /// In tables and of files.
    pub name: String,
    /// Its images.
    pub images: ImagesPlan,
    /// Whether only the classes that are in it can be answered, as is usual for ImageNet-A and -R.
    pub own_classes: bool,
}

/// `knn`
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct KnnPlan {
    /// Neighbours.
    pub k: i64,
    /// What cosines are divided by.
    pub temperature: f64,
}

/// `mlp`
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MlpPlan {
    /// Width of the hidden layer.
    pub hidden: i64,
    /// Times through the training images.
    pub epochs: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Images of a step.
    pub batch: i64,
}

/// `attentive`
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AttentivePlan {
    /// Of the attention; they divide the width of the features.
    pub heads: i64,
    /// Times through the training images, which are encoded anew in each.
    pub epochs: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Images of a step.
    pub batch: i64,
}

/// How close visual tokens are to the embeddings of words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AffinityPlan {
    /// Of the task, and of its folder.
    pub name: String,
    /// Shards as those of training.
    pub shards: Vec<String>,
    /// So many images.
    pub images: usize,
    /// Points of each cloud that are paired for the Wasserstein distance.
    pub points: i64,
}

/// Samples with conversations.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SamplesPlan {
    /// Shards as those of training.
    pub shards: Vec<String>,
    /// How their members become conversations.
    pub layout: Layout,
    /// So many from the beginning; `None`: all.
    pub most: Option<usize>,
}

/// Losses on held-out answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LossPlan {
    /// Of the task, and of its folder.
    pub name: String,
    /// What the loss is of.
    pub samples: SamplesPlan,
    /// Most tokens that go through the model together, at least those of the longest sample.
    pub tokens_per_pack: usize,
}

/// Generated answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GenerationPlan {
    /// Of the task, and of its folder.
    pub name: String,
    /// What is asked.
    pub samples: SamplesPlan,
    /// Longest answer, tokens.
    pub max_new_tokens: usize,
    /// A file with the truths of each sample, instead of its own answer.
    pub references: Option<PathBuf>,
}

/// Given answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChoicePlan {
    /// Of the task, and of its folder.
    pub name: String,
    /// What is asked.
    pub samples: SamplesPlan,
    /// What may be answered, at least two.
    pub choices: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawTasks {
    device: DeviceChoice,
    seed: u64,
    batch_images: usize,
    recognition: Vec<RawRecognition>,
    affinity: Vec<RawAffinity>,
    loss: Vec<RawLoss>,
    generation: Vec<RawGeneration>,
    choice: Vec<RawChoice>,
}

impl Default for RawTasks {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            seed: 42,
            batch_images: 32,
            recognition: Vec::new(),
            affinity: Vec::new(),
            loss: Vec::new(),
            generation: Vec::new(),
            choice: Vec::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawLoss {
    name: Option<String>,
    shards: Option<RawList<String>>,
    layout: Layout,
    samples: Option<usize>,
    tokens_per_pack: usize,
}

impl Default for RawLoss {
    fn default() -> Self {
        let layout = Layout::Conversations;
        Self { name: None, shards: None, layout, samples: None, tokens_per_pack: 8192 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawGeneration {
    name: Option<String>,
    shards: Option<RawList<String>>,
    layout: Layout,
    samples: Option<usize>,
    max_new_tokens: usize,
    references: Option<PathBuf>,
}

impl Default for RawGeneration {
    fn default() -> Self {
        let (layout, references) = (Layout::Conversations, None);
        Self { name: None, shards: None, layout, samples: None, max_new_tokens: 64, references }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawChoice {
    name: Option<String>,
    shards: Option<RawList<String>>,
    layout: Layout,
    samples: Option<usize>,
    choices: Vec<String>,
}

impl Default for RawChoice {
    fn default() -> Self {
        let (layout, choices) = (Layout::Conversations, Vec::new());
        Self { name: None, shards: None, layout, samples: None, choices }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawRecognition {
    name: Option<String>,
    train: RawImages,
    tests: Vec<RawTest>,
    knn: Option<RawKnn>,
    mlp: Option<RawMlp>,
    attentive: Option<RawAttentive>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawImages {
    folder: Option<PathBuf>,
    shards: Option<RawList<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawTest {
    name: Option<String>,
    folder: Option<PathBuf>,
    shards: Option<RawList<String>>,
    own_classes: bool,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawKnn {
    k: i64,
    temperature: f64,
}

impl Default for RawKnn {
    fn default() -> Self {
        Self { k: 20, temperature: 0.07 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawMlp {
    hidden: i64,
    epochs: u64,
    lr: f64,
    batch: i64,
}

impl Default for RawMlp {
    fn default() -> Self {
        Self { hidden: 2048, epochs: 10, lr: 1e-3, batch: 256 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawAttentive {
    heads: i64,
    epochs: u64,
    lr: f64,
    batch: i64,
}

impl Default for RawAttentive {
    fn default() -> Self {
        Self { heads: 8, epochs: 10, lr: 1e-3, batch: 256 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a mapping")]
struct RawAffinity {
    name: Option<String>,
    shards: Option<RawList<String>>,
    images: usize,
    points: i64,
}

impl Default for RawAffinity {
    fn default() -> Self {
        Self { name: None, shards: None, images: 5, points: 1024 }
    }
}

/// Reads a file of tasks.
///
/// # Errors
/// Every fault of the file.
pub fn load_tasks(path: &Path) -> Result<TasksPlan, ConfigErrors> {
    let mut errors = Vec::new();
    let named_at = (FieldPath::default(), Origin::Tasks);
    let Some(tree) = source::read_file(path, named_at, &mut errors) else { return Err(ConfigErrors(errors)) };
    let mut checker = Checker::new(&tree, errors);
    let raw: RawTasks = de::read(&mut checker);
    let plan = resolve(&mut checker, raw);
    let errors = checker.into_errors();
    match plan {
        Some(plan) if errors.is_empty() => Ok(plan),
        _ => Err(ConfigErrors(errors)),
    }
}

fn resolve(checker: &mut Checker<'_>, raw: RawTasks) -> Option<TasksPlan> {
    at_least_1(checker, "batch_images", raw.batch_images as u64);
    let tasks = [raw.affinity.len(), raw.loss.len(), raw.generation.len(), raw.choice.len()];
    if raw.recognition.len() + tasks.iter().sum::<usize>() == 0 {
        let hint = "list tasks below `recognition`, `affinity`, `loss`, `generation` or `choice`";
        checker.invalid_with_hint("recognition", "no task is given", hint);
    }
    let mut names = BTreeSet::new();
    let mut each = Each { checker, names: &mut names };
    let recognition = each.of("recognition", raw.recognition, recognition);
    let affinity = each.of("affinity", raw.affinity, affinity);
    let loss = each.of("loss", raw.loss, loss);
    let generation = each.of("generation", raw.generation, generation);
    let choice = each.of("choice", raw.choice, choice);
    Some(TasksPlan {
        device: raw.device,
        seed: raw.seed,
        batch_images: raw.batch_images,
        recognition: recognition?,
        affinity: affinity?,
        loss: loss?,
        generation: generation?,
        choice: choice?,
    })
}

/// What the tasks of a file share.
struct Each<'a, 'b> {
    checker: &'a mut Checker<'b>,
    /// Those that are taken.
    names: &'a mut BTreeSet<String>,
}

impl<'b> Each<'_, 'b> {
    /// All tasks of a kind; what is wrong with any of them is noted.
    fn of<R, P>(
        &mut self,
        kind: &str,
        raw: Vec<R>,
        resolve: impl Fn(&mut Checker<'b>, &str, R, &mut BTreeSet<String>) -> Option<P>,
    ) -> Option<Vec<P>> {
        let plans =
            (0..).zip(raw).map(|(i, raw)| resolve(self.checker, &format!("{kind}[{i}]"), raw, self.names));
        plans.collect::<Vec<_>>().into_iter().collect()
    }
}

fn loss(checker: &mut Checker<'_>, at: &str, raw: RawLoss, names: &mut BTreeSet<String>) -> Option<LossPlan> {
    let name = name(checker, &format!("{at}.name"), raw.name, names);
    at_least_1(checker, &format!("{at}.tokens_per_pack"), raw.tokens_per_pack as u64);
    let samples = samples(checker, at, raw.shards, raw.layout, raw.samples);
    Some(LossPlan { name: name?, samples: samples?, tokens_per_pack: raw.tokens_per_pack })
}

fn generation(
    checker: &mut Checker<'_>,
    at: &str,
    raw: RawGeneration,
    names: &mut BTreeSet<String>,
) -> Option<GenerationPlan> {
    let name = name(checker, &format!("{at}.name"), raw.name, names);
    at_least_1(checker, &format!("{at}.max_new_tokens"), raw.max_new_tokens as u64);
    let samples = samples(checker, at, raw.shards, raw.layout, raw.samples);
    let (max_new_tokens, references) = (raw.max_new_tokens, raw.references);
    Some(GenerationPlan { name: name?, samples: samples?, max_new_tokens, references })
}

fn choice(
    checker: &mut Checker<'_>,
    at: &str,
    raw: RawChoice,
    names: &mut BTreeSet<String>,
) -> Option<ChoicePlan> {
    let name = name(checker, &format!("{at}.name"), raw.name, names);
    // As answers are compared.
    let different: BTreeSet<String> = raw.choices.iter().map(|choice| folded(choice)).collect();
    if different.len() < 2 || different.len() < raw.choices.len() || different.contains("") {
        let path = format!("{at}.choices");
        checker.invalid_with_hint(
            &path,
            "are not at least two texts that differ in more than case and white space",
            "list what may be answered",
        );
    }
    let samples = samples(checker, at, raw.shards, raw.layout, raw.samples);
    Some(ChoicePlan { name: name?, samples: samples?, choices: raw.choices })
}

fn recognition(
    checker: &mut Checker<'_>,
    at: &str,
    raw: RawRecognition,
    names: &mut BTreeSet<String>,
) -> Option<RecognitionPlan> {
    let name = name(checker, &format!("{at}.name"), raw.name, names);
    let train = images(checker, &format!("{at}.train"), raw.train.folder, raw.train.shards);
    if raw.tests.is_empty() {
        checker.invalid_with_hint(
            &format!("{at}.tests"),
            "is empty",
            "list at least one set to be measured on",
        );
    }
    if raw.knn.is_none() && raw.mlp.is_none() && raw.attentive.is_none() {
        checker.invalid_with_hint(
            at,
            "has no probe",
            "write `mlp: {}`, `knn: {}` or `attentive: {}`, or several",
        );
    }
    let knn = raw.knn.map(|RawKnn { k, temperature }| {
        checker.expect(k >= 1, &format!("{at}.knn.k"), "must be at least 1", k);
        let path = format!("{at}.knn.temperature");
        checker.expect(temperature > 0.0, &path, "must be above 0", temperature);
        KnnPlan { k, temperature }
    });
    let mlp = raw.mlp.map(|RawMlp { hidden, epochs, lr, batch }| {
        at_least_1(checker, &format!("{at}.mlp.hidden"), hidden.max(0) as u64);
        trained(checker, &format!("{at}.mlp"), epochs, lr, batch);
        MlpPlan { hidden, epochs, lr, batch }
    });
    let attentive = raw.attentive.map(|RawAttentive { heads, epochs, lr, batch }| {
        at_least_1(checker, &format!("{at}.attentive.heads"), heads.max(0) as u64);
        trained(checker, &format!("{at}.attentive"), epochs, lr, batch);
        AttentivePlan { heads, epochs, lr, batch }
    });
    // Features of the training images lie beside those of the tests.
    let mut test_names = BTreeSet::from(["train".to_owned()]);
    let tests: Vec<_> = (0..)
        .zip(raw.tests)
        .map(|(i, raw)| {
            let at = format!("{at}.tests[{i}]");
            let name = self::name(checker, &format!("{at}.name"), raw.name, &mut test_names);
            let images = images(checker, &at, raw.folder, raw.shards);
            Some(TestPlan { name: name?, images: images?, own_classes: raw.own_classes })
        })
        .collect();
    Some(RecognitionPlan {
        name: name?,
        train: train?,
        tests: tests.into_iter().collect::<Option<_>>()?,
        knn,
        mlp,
        attentive,
    })
}

/// What probes that are trained have in common.
fn trained(checker: &mut Checker<'_>, at: &str, epochs: u64, lr: f64, batch: i64) {
    at_least_1(checker, &format!("{at}.epochs"), epochs);
    at_least_1(checker, &format!("{at}.batch"), batch.max(0) as u64);
    checker.expect(lr > 0.0 && lr.is_finite(), &format!("{at}.lr"), "must be above 0", lr);
}

fn affinity(
    checker: &mut Checker<'_>,
    at: &str,
    raw: RawAffinity,
    names: &mut BTreeSet<String>,
) -> Option<AffinityPlan> {
    let name = name(checker, &format!("{at}.name"), raw.name, names);
    at_least_1(checker, &format!("{at}.images"), raw.images as u64);
    let points = format!("{at}.points");
    let most = 20_000;
    let must = format!("must be from 3 to {most}, since pairing takes time by its cube");
    checker.expect((3..=most).contains(&raw.points), &points, &must, raw.points);
    let shards = checker.required(&format!("{at}.shards"), raw.shards);
    Some(AffinityPlan { name: name?, shards: shards?.0, images: raw.images, points: raw.points })
}

fn samples(
    checker: &mut Checker<'_>,
    at: &str,
    shards: Option<RawList<String>>,
    layout: Layout,
    most: Option<usize>,
) -> Option<SamplesPlan> {
    checker.expect(most != Some(0), &format!("{at}.samples"), "must be at least 1", 0);
    let shards = checker.required(&format!("{at}.shards"), shards)?.0;
    Some(SamplesPlan { shards, layout, most })
}

fn at_least_1(checker: &mut Checker<'_>, path: &str, count: u64) {
    checker.expect(count >= 1, path, "must be at least 1", count);
}

/// A name that may be that of a folder and is no other's.
fn name(
    checker: &mut Checker<'_>,
    path: &str,
    name: Option<String>,
    names: &mut BTreeSet<String>,
) -> Option<String> {
    let name = checker.required(path, name)?;
    let usual = |char: char| char.is_ascii_alphanumeric() || "-_.".contains(char);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(usual) {
        let hint = "use letters, digits, `-`, `_` and `.`, since files are called so";
        checker.invalid_with_hint(path, format!("`{name}` cannot be the name of a folder"), hint);
    } else if ["results.json", "results.md", "evaluation.json"].contains(&name.as_str()) {
        let hint = "results of all tasks are written beside the folder of each";
        checker.invalid_with_hint(path, format!("`{name}` is the name of a file there"), hint);
    } else if !names.insert(name.clone()) {
        let hint = "give each task, and each test of one beside `train`, a name of its own";
        checker.invalid_with_hint(path, format!("`{name}` is taken"), hint);
    }
    Some(name)
}

fn images(
    checker: &mut Checker<'_>,
    at: &str,
    folder: Option<PathBuf>,
    shards: Option<RawList<String>>,
) -> Option<ImagesPlan> {
    match (folder, shards) {
        (Some(folder), None) => Some(ImagesPlan::Folder(folder)),
        (None, Some(RawList(shards))) => Some(ImagesPlan::Shards(shards)),
        (both, _) => {
            let found = if both.is_some() { "has both `folder` and `shards`" } else { "names no images" };
            checker.invalid_with_hint(at, found, "give `folder` or `shards`, one of them");
            None
        }
    }
}
