//! Tasks that measure a checkpoint or an exported encoder: `sail-train eval --tasks`.
//!
//! A file lists them ([`crate::config::load_tasks`]); each writes into a folder of its own below `--out`, and its result
//! to `result.json` there once it is done, so that a measurement that was killed goes on. Everything is computed in fp32.
//! What is computed of features and answers is [`crate::metrics`]'s; the loss on a plan's own held-out data is
//! [`crate::eval`]'s.

mod affinity;
mod answers;
mod attentive;
mod features;
mod follow;
mod lines;
mod loss;
mod probe;
mod recognition;
mod scatter;
mod table;

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;
use std::{fmt, fs, iter};

use sail_data::{LabelledImages, Preprocessor, expand_shards};
use sail_model::params::{Init, RandomSource, TensorSource};
use sail_model::vision::Vision;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tracing::info;

use crate::config::{ImagesPlan, Module, Precision, TasksPlan, hex};
use crate::device::{choose_device, take_precision};
use crate::error::{Error, Result};
use crate::export::load_vit_with_params;
use crate::lock::{LOCK, RunLock};
use crate::output;
use crate::stage::Fingerprints;
use crate::trained::Trained;

pub use affinity::AffinityResult;
pub use answers::{ChoiceResult, GenerationResult};
pub use follow::follow;
pub use loss::LossResult;
pub use recognition::{RecognitionResult, TestResult};

/// Says what a folder holds results of.
const IDENTITY: &str = "evaluation.json";
const RESULT: &str = "result.json";

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// A run, one of its `step-…` folders, or an exported whole model.
    Checkpoint(&'a Path),
    /// A vision encoder's folder, exported or as published.
    Vit(&'a Path),
}

/// All results, in the order of the file.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// By task.
    pub recognition: Vec<RecognitionResult>,
    /// By task.
    pub affinity: Vec<AffinityResult>,
    /// By task.
    pub loss: Vec<LossResult>,
    /// By task.
    pub generation: Vec<GenerationResult>,
    /// By task.
    pub choice: Vec<ChoiceResult>,
}

/// As tables in Markdown.
impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&table::markdown(self))
    }
}

/// A subject with its weights.
enum Opened {
    Whole(Box<Trained>),
    /// `config` is the digest of its `config.json`.
    Vit {
        vision: Vision,
        preprocessor: Preprocessor,
        config: String,
        digest: String,
    },
}

/// What every task is given.
struct Context<'a> {
    subject: &'a Opened,
    device: Device,
    seed: u64,
    batch_images: usize,
    out: &'a Path,
}

/// Measures `subject` and writes `results.json` and `results.md` to the folder `out`, beside what each task writes. What
/// is there of the same tasks and weights is not measured again.
///
/// # Errors
/// [`Error::Usage`] when the folder is one of other tasks or weights, or a task needs a language model and there is none;
/// those of reading images and weights.
pub fn run(plan: &TasksPlan, subject: Subject, out: &Path) -> Result<Results> {
    if let (Subject::Vit(vit), Some(task)) = (subject, plan.needs_whole_model().first()) {
        return Err(Error::usage(
            format!("`{task}` needs a language model, and `{}` has none", vit.display()),
            "give `--checkpoint` instead of `--vit`, or leave all but `recognition` out",
        ));
    }
    let device = choose(plan)?;
    measure(plan, &Opened::open(subject, plan, device)?, device, out)
}

/// Where it is computed, in fp32.
fn choose(plan: &TasksPlan) -> Result<Device> {
    let device = choose_device(plan.device)?;
    sail_torch::set_device(device)?;
    take_precision(Precision::Fp32, device)?;
    Ok(device)
}

/// As [`run`], of weights in memory.
fn measure(plan: &TasksPlan, opened: &Opened, device: Device, out: &Path) -> Result<Results> {
    let identity = json!({
        "weights": opened.digest(), "preprocessing": opened.preparing()?, "tasks": plan, "data": data_of(plan)?,
    });
    fs::create_dir_all(out).map_err(Error::io(out))?;
    // Held until the end: two would write the same lines.
    let _lock = RunLock::take(out)?;
    claim(out, &identity)?;
    let context = Context { subject: opened, device, seed: plan.seed, batch_images: plan.batch_images, out };
    let mut results = Results::default();
    for task in &plan.recognition {
        results.recognition.push(context.once(&task.name, || recognition::measure(&context, task))?);
    }
    for task in &plan.affinity {
        results.affinity.push(context.once(&task.name, || affinity::measure(&context, task))?);
    }
    for task in &plan.loss {
        results.loss.push(context.once(&task.name, || loss::measure(&context, task))?);
    }
    for task in &plan.generation {
        results.generation.push(context.once(&task.name, || answers::generate(&context, task))?);
    }
    for task in &plan.choice {
        results.choice.push(context.once(&task.name, || answers::choose(&context, task))?);
    }
    write_json(&out.join("results.json"), &results)?;
    write(&out.join("results.md"), &results.to_string())?;
    Ok(results)
}

impl Opened {
    fn open(subject: Subject, plan: &TasksPlan, device: Device) -> Result<Self> {
        match subject {
            Subject::Checkpoint(path) => {
                Ok(Self::Whole(Box::new(Trained::open(path, plan.device, Precision::Fp32)?)))
            }
            Subject::Vit(path) => {
                let preprocessor = Preprocessor::read(&path.join("preprocessor_config.json"))?;
                let (vision, params) = load_vit_with_params(path, device)?;
                let digest = Fingerprints::new(&params).digest_of(Module::Vision);
                let config = path.join("config.json");
                let config = hex(&Sha256::digest(fs::read(&config).map_err(Error::io(&config))?));
                Ok(Self::Vit { vision, preprocessor, config, digest })
            }
        }
    }

    fn vision(&self) -> &Vision {
        match self {
            Self::Whole(trained) => trained.model.vision(),
            Self::Vit { vision, .. } => vision,
        }
    }

    /// How images become what the encoder sees: of a whole model one tile without its surroundings.
    fn preprocessor(&self) -> Preprocessor {
        match self {
            Self::Whole(trained) => {
                let image = &trained.image;
                Preprocessor::square(image.tile_px, image.mean, image.std)
            }
            Self::Vit { preprocessor, .. } => preprocessor.clone(),
        }
    }

    /// What is made of images and text on the way to the weights, and of what shape these are.
    fn preparing(&self) -> Result<String> {
        match self {
            Self::Whole(trained) => {
                let tokenizer = fs::read(&trained.tokenizer).map_err(Error::io(&trained.tokenizer))?;
                let (image, text, model) = (&trained.image, &trained.text, trained.model.config());
                Ok(format!("{image:?} {text:?} {model:?} tokenizer {}", hex(&Sha256::digest(tokenizer))))
            }
            Self::Vit { preprocessor, config, .. } => Ok(format!("{preprocessor:?} config {config}")),
        }
    }

    /// Tells these weights from others.
    fn digest(&self) -> String {
        match self {
            Self::Whole(trained) => {
                let prints = Fingerprints::new(trained.model.params());
                Module::ALL.map(|module| prints.digest_of(module)).join(" ")
            }
            Self::Vit { digest, .. } => digest.clone(),
        }
    }
}

impl Context<'_> {
    fn folder(&self, task: &str) -> PathBuf {
        self.out.join(task)
    }

    /// The result that a task has left, or what `measure` gives.
    fn once<T: Serialize + DeserializeOwned>(
        &self,
        task: &str,
        measure: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let folder = self.folder(task);
        let path = folder.join(RESULT);
        if path.exists() {
            info!("`{task}` is done already: {}", path.display());
            return read_json(&path);
        }
        info!("measuring `{task}`");
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let result = measure()?;
        write_json(&path, &result)?;
        Ok(result)
    }

    /// The numbers from 0 to below `n` in an order that the seed and the name give.
    fn permutation(&self, name: &str, n: i64) -> Result<Tensor> {
        permutation(self.seed, name, n)
    }
}

/// The numbers from 0 to below `n`, int64 on the CPU, in an order that the seed and the name give.
fn permutation(seed: u64, name: &str, n: i64) -> Result<Tensor> {
    let draws = Tensor::f_zeros([n], (Kind::Float, Device::Cpu))?;
    RandomSource::new(seed, "order").fill(name, &draws, Init::Normal(1.0))?;
    Ok(draws.f_argsort(0, false)?)
}

/// Tells the files that tasks read from others: path, size and time of change of each, and of a remote one its name. What
/// is not there is an error, before anything is measured.
fn data_of(plan: &TasksPlan) -> Result<String> {
    let mut files: Vec<PathBuf> = Vec::new();
    for task in &plan.recognition {
        for images in iter::once(&task.train).chain(task.tests.iter().map(|test| &test.images)) {
            match images {
                ImagesPlan::Folder(folder) => {
                    files.extend(LabelledImages::in_folder(folder)?.files().map(Path::to_owned));
                }
                ImagesPlan::Shards(shards) => files.extend(shards_of(&task.name, shards)?),
            }
        }
    }
    for task in &plan.affinity {
        files.extend(shards_of(&task.name, &task.shards)?);
    }
    let samples = (plan.loss.iter().map(|task| (&task.name, &task.samples)))
        .chain(plan.generation.iter().map(|task| (&task.name, &task.samples)))
        .chain(plan.choice.iter().map(|task| (&task.name, &task.samples)));
    for (name, samples) in samples {
        files.extend(shards_of(name, &samples.shards)?);
    }
    files.extend(plan.generation.iter().filter_map(|task| task.references.clone()));
    let mut sum = Sha256::new();
    for path in files {
        sum.update(path.as_os_str().as_encoded_bytes());
        if !path.to_string_lossy().contains("://") {
            let about = fs::metadata(&path).map_err(Error::io(&path))?;
            let changed = about.modified().map_err(Error::io(&path))?;
            let since = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
            sum.update(format!(" {} {}\n", about.len(), since.as_nanos()));
        }
    }
    Ok(hex(&sum.finalize()))
}

fn shards_of(task: &str, patterns: &[String]) -> Result<Vec<PathBuf>> {
    Ok(expand_shards(task, patterns)?.into_iter().map(PathBuf::from).collect())
}

/// Makes `out` a folder of results of what `identity` says, or finds that it is one.
fn claim(out: &Path, identity: &Value) -> Result<()> {
    let path = out.join(IDENTITY);
    if path.exists() {
        let found: Value = read_json(&path)?;
        let differs = ["weights", "preprocessing", "tasks", "data"]
            .into_iter()
            .find(|field| found[field] != identity[field]);
        return match differs {
            None => Ok(()),
            Some(field) => Err(Error::usage(
                format!("`{}` holds results of other {field}", out.display()),
                "name another folder for `--out`, or remove this one",
            )),
        };
    }
    for entry in fs::read_dir(out).map_err(Error::io(out))? {
        if entry.map_err(Error::io(out))?.file_name() == LOCK {
            continue;
        }
        return Err(Error::usage(
            format!("`{}` is not empty and holds no results", out.display()),
            "name a new folder for `--out`",
        ));
    }
    write_json(&path, identity)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|error| {
        let what = format!("`{}` is not what this command writes: {error}", path.display());
        Error::usage(what, "remove the folder that it is in, so that this is measured anew")
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).expect("invariant: results are numbers and text");
    write(path, &(text + "\n"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    output::replace(path, |partial| fs::write(partial, text).map_err(Error::io(partial)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_takes_results_of_one_model_and_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b");
        fs::create_dir_all(&out).unwrap();
        let lock = RunLock::take(&out).unwrap();
        assert!(RunLock::take(&out).is_err(), "one process at a time");
        let identity = json!({ "weights": "1", "tasks": [1], "data": "2" });
        claim(&out, &identity).unwrap();
        claim(&out, &identity).unwrap();
        for other in ["weights", "tasks", "data"] {
            let what = format!("results of other {other}");
            let mut identity = identity.clone();
            identity[other] = json!("changed");
            let message = claim(&out, &identity).unwrap_err().to_string();
            assert!(message.contains(&what) && message.contains("hint:"), "{message}");
        }
        fs::remove_file(out.join(IDENTITY)).unwrap();
        fs::write(out.join("precious"), "").unwrap();
        assert!(claim(&out, &identity).unwrap_err().to_string().contains("is not empty"));
        drop(lock);
    }

    #[test]
    fn files_that_change_are_other_data() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("a/1.png", "1"), ("b/2.png", "2")] {
            fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            fs::write(dir.path().join(name), text).unwrap();
        }
        let tasks = dir.path().join("tasks.yaml");
        let images = dir.path().display();
        let text = format!(
            "recognition:\n  - {{ name: x, train: {{ folder: {images} }}, tests: [{{ name: y, folder: {images} }}], knn: {{}} }}\n"
        );
        fs::write(&tasks, text).unwrap();
        let plan = crate::config::load_tasks(&tasks).unwrap();
        let before = data_of(&plan).unwrap();
        assert_eq!(data_of(&plan).unwrap(), before);
        fs::write(dir.path().join("b/2.png"), "22").unwrap();
        let longer = data_of(&plan).unwrap();
        assert_ne!(longer, before);
        // An image that is in another class now.
        fs::rename(dir.path().join("b/2.png"), dir.path().join("a/2.png")).unwrap();
        assert_ne!(data_of(&plan).unwrap(), longer);
        fs::remove_dir_all(dir.path().join("a")).unwrap();
        assert!(data_of(&plan).is_err());
    }

    #[test]
    fn an_order_has_every_number_once_and_is_that_of_its_name() {
        let order = |seed, name| Vec::<i64>::try_from(permutation(seed, name, 100).unwrap()).unwrap();
        let mut sorted = order(1, "a");
        assert_ne!(sorted, order(1, "b"));
        assert_ne!(sorted, order(2, "a"));
        assert_eq!(sorted, order(1, "a"));
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }
}
