//! Recognition with a frozen encoder (arXiv 2507.01643, Table 6): how many images probes of its features name rightly, on
//! a test set and on sets that shift away from the training images.
//!
//! Dimension letters: n images, d width of features, c classes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::{Deserialize, Serialize};
use tch::{Tensor, no_grad};

use super::attentive::Attentive;
use super::features::{Features, Label, features, patches};
use super::probe::{Mlp, Standard};
use super::{Context, write};
use crate::config::{AttentivePlan, KnnPlan, MlpPlan, RecognitionPlan, TestPlan};
use crate::error::{Error, Result};
use crate::metrics::{Vote, classify};

/// Images whose scores are in memory together.
const MOST_AT_ONCE: i64 = 1 << 12;
/// Training images by whose patches all are shifted and scaled.
const STANDARD_IMAGES: i64 = 256;

/// What was found of one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecognitionResult {
    /// Of the task.
    pub name: String,
    /// Training images.
    pub train_images: usize,
    /// Classes of the training images.
    pub classes: usize,
    /// Width of the features.
    pub width: i64,
    /// Mean loss of the perceptron's last epoch, nats an image.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mlp_loss: Option<f64>,
    /// The same of the attentive probe.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub attentive_loss: Option<f64>,
    /// In the order of the file.
    pub tests: Vec<TestResult>,
}

/// What was found on one test set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestResult {
    /// Of the set.
    pub name: String,
    /// Its images.
    pub images: usize,
    /// Share of the images that each probe names rightly.
    pub top1: BTreeMap<String, f64>,
}

/// The training images' classes by name, and back by number.
struct Classes(BTreeMap<String, i64>);

impl Classes {
    fn of(labels: &[Label]) -> Self {
        let names: BTreeSet<&String> = labels.iter().map(|label| &label.class).collect();
        Self(names.into_iter().cloned().zip(0..).collect())
    }

    /// The numbers `[n]` of images' classes.
    fn numbers(&self, set: &str, labels: &[Label]) -> Result<Vec<i64>> {
        let number = |label: &Label| {
            self.0.get(&label.class).copied().ok_or_else(|| {
                Error::usage(
                    format!("`{}` of `{set}` has the class `{}`, which no training image has", label.id, label.class),
                    "classes are compared by name: those of folders by the folder's, those of shards by the text of `.cls`",
                )
            })
        };
        labels.iter().map(number).collect()
    }
}

/// Trains the probes and asks them about each test set; what they say of each image goes to `SET.jsonl`.
///
/// # Errors
/// Those of the images; [`Error::Usage`] for a class without a training image.
pub(super) fn measure(context: &Context, task: &RecognitionPlan) -> Result<RecognitionResult> {
    if let Some(AttentivePlan { heads, .. }) = task.attentive {
        Attentive::check(context.subject.vision().config().hidden_size(), heads)?;
    }
    let folder = context.folder(&task.name).join("features");
    let train = features(context, &task.train, "train", &folder)?;
    let classes = Classes::of(&train.labels);
    if classes.0.len() < 2 {
        return Err(Error::usage(
            format!("the training images of `{}` are all of one class", task.name),
            "give images of at least two classes",
        ));
    }
    let numbers = Tensor::from_slice(&classes.numbers("train", &train.labels)?);
    // Before any probe is trained, since a class may have no training image.
    let mut asked = Vec::new();
    for test in &task.tests {
        let images = features(context, &test.images, &test.name, &folder)?;
        let truths = classes.numbers(&test.name, &images.labels)?;
        asked.push((test, images, truths));
    }
    let probes = Probes::train(context, task, &train, &numbers, classes.0.len() as i64)?;
    let answered = asked
        .iter()
        .map(|(test, images, truths)| ask(context, task, test, (images, truths), &classes, &probes));
    let tests = answered.collect::<Result<_>>()?;
    Ok(RecognitionResult {
        name: task.name.clone(),
        train_images: train.labels.len(),
        classes: classes.0.len(),
        width: train.x_nd.size()[1],
        mlp_loss: probes.mlp.as_ref().map(|mlp| mlp.loss),
        attentive_loss: probes.attentive.as_ref().map(|attentive| attentive.loss),
        tests,
    })
}

/// Asks every probe about a set, and writes a line of each image.
fn ask(
    context: &Context,
    task: &RecognitionPlan,
    test: &TestPlan,
    (images, truths): (&Features, &Vec<i64>),
    classes: &Classes,
    probes: &Probes,
) -> Result<TestResult> {
    let allowed: Option<BTreeSet<i64>> = test.own_classes.then(|| truths.iter().copied().collect());
    let said = probes.ask(context, images, allowed.as_ref())?;
    let names: Vec<&String> = classes.0.keys().collect();
    let mut lines = String::new();
    for (i, label) in images.labels.iter().enumerate() {
        let mut line = BTreeMap::from([("image", &label.id), ("class", &label.class)]);
        line.extend(said.iter().map(|(probe, said)| (*probe, names[said[i] as usize])));
        let line = serde_json::to_string(&line).expect("invariant: a map of texts");
        writeln!(lines, "{line}").expect("invariant: a string takes all text");
    }
    write(&context.folder(&task.name).join(format!("{}.jsonl", test.name)), &lines)?;
    let right = |said: &Vec<i64>| said.iter().zip(truths).filter(|(said, truth)| said == truth).count();
    let share = |said: &Vec<i64>| right(said) as f64 / truths.len() as f64;
    let top1 = said.iter().map(|(probe, said)| ((*probe).to_owned(), share(said))).collect();
    Ok(TestResult { name: test.name.clone(), images: truths.len(), top1 })
}

/// The probes of a task, trained.
struct Probes<'a> {
    knn: Option<(Vote, &'a Tensor, &'a Tensor)>,
    mlp: Option<TrainedMlp>,
    attentive: Option<TrainedAttentive>,
    classes: i64,
}

struct TrainedMlp {
    mlp: Mlp,
    standard: Standard,
    loss: f64,
    device: tch::Device,
}

impl<'a> Probes<'a> {
    fn train(
        context: &Context,
        task: &RecognitionPlan,
        train: &'a Features,
        numbers: &'a Tensor,
        classes: i64,
    ) -> Result<Self> {
        let knn = task.knn.map(|KnnPlan { k, temperature }| {
            (Vote { neighbours: k, temperature: Some(temperature) }, &train.x_nd, numbers)
        });
        let mlp = task.mlp.map(|plan| TrainedMlp::new(context, plan, &train.x_nd, numbers, classes));
        let mlp = mlp.transpose()?;
        let attentive =
            task.attentive.map(|plan| TrainedAttentive::new(context, plan, train, numbers, classes));
        Ok(Self { knn, mlp, attentive: attentive.transpose()?, classes })
    }

    /// The class of each image by each probe, of `allowed` ones where only those can be answered.
    fn ask(
        &self,
        context: &Context,
        set: &Features,
        allowed: Option<&BTreeSet<i64>>,
    ) -> Result<BTreeMap<&'static str, Vec<i64>>> {
        let mut said = BTreeMap::new();
        let x_nd = &set.x_nd;
        let refused = |class: &i64| allowed.is_some_and(|allowed| !allowed.contains(class));
        let refused = Tensor::from_slice(&(0..self.classes).filter(refused).collect::<Vec<_>>());
        let refused = refused.to_device(context.device);
        if let Some((vote, train_md, numbers_m)) = self.knn {
            // Neighbours of other classes do not vote.
            let (train_md, numbers_m) = match allowed {
                None => (train_md.shallow_clone(), numbers_m.shallow_clone()),
                Some(allowed) => {
                    let all = Vec::<i64>::try_from(numbers_m)?;
                    let places = (0..).zip(&all).filter(|(_, class)| allowed.contains(*class));
                    let places = Tensor::from_slice(&places.map(|(place, _)| place).collect::<Vec<i64>>());
                    (train_md.f_index_select(0, &places)?, numbers_m.f_index_select(0, &places)?)
                }
            };
            let classes_n = classify(x_nd, (&train_md, &numbers_m), self.classes, vote)?;
            said.insert("knn", Vec::<i64>::try_from(classes_n)?);
        }
        if let Some(mlp) = &self.mlp {
            said.insert("mlp", mlp.ask(x_nd, &refused)?);
        }
        if let Some(attentive) = &self.attentive {
            said.insert("attentive", attentive.ask(context, set, &refused)?);
        }
        Ok(said)
    }
}

impl TrainedMlp {
    fn new(
        context: &Context,
        plan: MlpPlan,
        x_nd: &Tensor,
        numbers_n: &Tensor,
        classes: i64,
    ) -> Result<Self> {
        let device = context.device;
        let standard = Standard::of(x_nd.f_split(MOST_AT_ONCE, 0)?.into_iter().map(Ok))?;
        let scaled_nd = standard.apply(x_nd)?.to_device(device);
        let mut mlp = Mlp::random((x_nd.size()[1], plan.hidden, classes), context.seed, device)?;
        let loss = mlp.train((&scaled_nd, &numbers_n.to_device(device)), plan, context.seed)?;
        finite("mlp", loss)?;
        Ok(Self { mlp, standard, loss, device })
    }

    fn ask(&self, x_nd: &Tensor, refused: &Tensor) -> Result<Vec<i64>> {
        let mut said = Vec::new();
        for part_nd in x_nd.f_split(MOST_AT_ONCE, 0)? {
            let part_nd = self.standard.apply(&part_nd)?.to_device(self.device);
            said.extend(likeliest(&no_grad(|| self.mlp.scores(&part_nd))?, refused)?);
        }
        Ok(said)
    }
}

struct TrainedAttentive {
    probe: Attentive,
    standard: Standard,
    loss: f64,
}

impl TrainedAttentive {
    fn new(
        context: &Context,
        plan: AttentivePlan,
        train: &Features,
        numbers_n: &Tensor,
        classes: i64,
    ) -> Result<Self> {
        let probe =
            Attentive::random(train.x_nd.size()[1], classes, plan.heads, context.seed, context.device)?;
        let some_n = context.permutation("standard", numbers_n.size()[0])?;
        let some_n = Vec::<i64>::try_from(some_n.narrow(0, 0, STANDARD_IMAGES.min(some_n.size()[0])))?;
        let patches_of = |numbers| Ok(Tensor::f_cat(&patches(context, &train.images, numbers)?, 0)?);
        let standard = Standard::of(some_n.chunks(context.batch_images).map(patches_of))?;
        let scaled = |numbers: &[i64]| scaled(context, train, numbers, &standard);
        let loss = probe.train(numbers_n, plan, context.seed, scaled)?;
        finite("attentive", loss)?;
        Ok(Self { probe, standard, loss })
    }

    fn ask(&self, context: &Context, set: &Features, refused: &Tensor) -> Result<Vec<i64>> {
        let mut said = Vec::new();
        let numbers: Vec<i64> = (0..set.labels.len() as i64).collect();
        for numbers in numbers.chunks(context.batch_images) {
            let seen = scaled(context, set, numbers, &self.standard)?;
            said.extend(likeliest(&no_grad(|| self.probe.scores(&seen))?, refused)?);
        }
        Ok(said)
    }
}

/// The patches of some images of a set, shifted and scaled.
fn scaled(context: &Context, set: &Features, numbers: &[i64], standard: &Standard) -> Result<Vec<Tensor>> {
    let mut all = Vec::with_capacity(numbers.len());
    for numbers in numbers.chunks(context.batch_images) {
        for x_td in patches(context, &set.images, numbers)? {
            all.push(standard.apply(&x_td)?);
        }
    }
    Ok(all)
}

fn finite(probe: &str, loss: f64) -> Result<()> {
    if loss.is_finite() {
        return Ok(());
    }
    Err(Error::usage(format!("the loss of the `{probe}` probe is not finite"), "lower its `lr`"))
}

/// The class with the highest of scores `[n, c]` of each image, but for those that are refused.
fn likeliest(scores_nc: &Tensor, refused: &Tensor) -> Result<Vec<i64>> {
    let scores_nc = scores_nc.f_index_fill(1, refused, f64::NEG_INFINITY)?;
    Ok(Vec::try_from(scores_nc.f_argmax(-1, false)?)?)
}
