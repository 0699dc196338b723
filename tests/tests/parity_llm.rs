//! Language models of all families against transformers, on the goldens that `goldens/make_llm.py` makes:
//! each sequence alone, all three in one pack, generation with a cache, and files written as they were read.
//! The ignored test does the same for many random configurations, made by `reference/random_llm.py`.
//!
//! The error of a tensor is max |found - golden| / max |golden|; between a pack and its sequences alone it is
//! that of the Euclidean norms, as in `packs.rs`.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use sail_model::attention::Segments;
use sail_model::generate::{GenerateOptions, from_ids};
use sail_model::llm::{Llm, LlmConfig, Trunk};
use sail_model::params::{Builder, Params};
use sail_model::weights::{FileSource, Folder, arrange};
use tch::{Device, Kind, Reduction, Tensor};

const SEQUENCES: usize = 3;
const FORWARD_TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-4;

const CASES: [&str; 9] = [
    "llama",
    "llama_linear",
    "llama_llama3",
    "qwen2",
    "qwen2_yarn",
    "qwen3",
    "qwen3_yarn",
    "qwen3_moe",
    "qwen3_moe_sparse_step",
];

fn goldens() -> impl Iterator<Item = PathBuf> {
    CASES.iter().map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name))
}

fn read(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// The largest errors seen, by what was measured.
#[derive(Debug, Default)]
struct Worst(BTreeMap<&'static str, f64>);

impl Worst {
    fn check(&mut self, kind: &'static str, what: &str, found: &Tensor, golden: &Tensor, tolerance: f64) {
        assert_eq!(found.size(), golden.size(), "{what}");
        let largest = |x: &Tensor| x.abs().max().double_value(&[]);
        let error = largest(&(found - golden)) / largest(golden).max(f64::MIN_POSITIVE);
        assert!(error <= tolerance, "{what}: relative error {error:e} > {tolerance:e}");
        let worst = self.0.entry(kind).or_default();
        *worst = worst.max(error);
    }
}

/// A model with its golden.
struct Case {
    folder: PathBuf,
    llm: Llm,
    params: Params,
    golden: BTreeMap<String, Tensor>,
}

impl Case {
    fn read(folder: &Path) -> Self {
        let config = LlmConfig::read(folder).unwrap();
        let source = FileSource::open(folder).unwrap().with(config.naming());
        let params = Rc::new(RefCell::new(Params::new()));
        let builder = Builder::new(params.clone(), "llm", &source, (Kind::Float, Device::Cpu));
        let llm = Llm::new(&config, &builder).unwrap();
        let golden = read(&folder.join("golden.safetensors"));
        Self { folder: folder.to_owned(), llm, params: params.take(), golden }
    }

    fn each(&self, key: &str) -> Vec<Tensor> {
        (0..SEQUENCES).map(|i| self.golden[&format!("{key}.{i}")].shallow_clone()).collect()
    }

    /// The blocks' output for sequences packed one after the other.
    fn trunk(&self, sequences: &[Tensor]) -> Trunk {
        let lengths: Vec<i64> = sequences.iter().map(|ids| ids.size()[0]).collect();
        let positions: Vec<i64> = lengths.iter().flat_map(|length| 0..*length).collect();
        let x_td = self.llm.embed(&Tensor::cat(sequences, 0));
        let segments = Segments::of_lengths(lengths).unwrap();
        self.llm.trunk(&x_td, &Tensor::from_slice(&positions), &segments, None)
    }

    /// Logits of sequences packed one after the other.
    fn logits(&self, sequences: &[Tensor]) -> Tensor {
        self.llm.logits(&self.llm.final_norm(&self.trunk(sequences).x_td))
    }

    fn track_gradients(&mut self) {
        for param in self.params.values_mut() {
            let _ = param.requires_grad_(true);
            param.zero_grad();
        }
    }

    /// Weighted loss summed over packs of these sequences, with its gradients by name.
    fn loss_and_gradients(&mut self, packs: &[&[usize]]) -> (Tensor, Params) {
        self.track_gradients();
        let mut total = Tensor::zeros([] as [i64; 0], (Kind::Float, Device::Cpu));
        for pack in packs {
            let pick = |key: &str| {
                let all = self.each(key);
                pack.iter().map(|i| all[*i].shallow_clone()).collect::<Vec<_>>()
            };
            let (targets, weights) = (Tensor::cat(&pick("targets"), 0), Tensor::cat(&pick("weights"), 0));
            let logits = self.logits(&pick("ids"));
            let losses = logits.cross_entropy_loss(&targets, None::<&Tensor>, Reduction::None, -100, 0.0);
            let loss = (losses * weights).sum(Kind::Float);
            loss.backward();
            total += loss.detach();
        }
        let grads = self.params.iter().map(|(name, param)| (name.clone(), param.grad().copy())).collect();
        (total, grads)
    }

    fn check_forward(&self, worst: &mut Worst) {
        let (ids, golden) = (self.each("ids"), self.each("logits"));
        let what = |how: &str| format!("{} {how}", self.folder.display());
        for (i, golden) in golden.iter().enumerate() {
            let logits = self.logits(&ids[i..=i]);
            worst.check("logits", &what(&format!("{i} alone")), &logits, golden, FORWARD_TOLERANCE);
        }
        let golden = Tensor::cat(&golden, 0);
        worst.check("logits", &what("packed"), &self.logits(&ids), &golden, FORWARD_TOLERANCE);
    }

    /// Loss and the gradient of every parameter, none left over on either side; and the pack's against those of
    /// its sequences alone.
    fn check_gradients(&mut self, worst: &mut Worst, packed_tolerance: f64) {
        let folder = self.folder.display().to_string();
        let alone = self.loss_and_gradients(&[&[0], &[1], &[2]]);
        let packed = self.loss_and_gradients(&[&[0, 1, 2]]);
        for (how, (loss, grads)) in [("alone", &alone), ("packed", &packed)] {
            let what = |name: &str| format!("{folder} {how} {name}");
            worst.check("loss", &what("loss"), loss, &self.golden["loss"], FORWARD_TOLERANCE);
            let mut left: BTreeSet<&str> =
                self.golden.keys().filter_map(|key| key.strip_prefix("grad.")).collect();
            for (full_name, grad) in grads {
                let local = full_name.strip_prefix("llm.").unwrap();
                assert!(left.remove(local), "the golden has no gradient of {local}");
                let golden = &self.golden[&format!("grad.{local}")];
                worst.check("gradient", &what(local), grad, golden, GRADIENT_TOLERANCE);
            }
            assert!(left.is_empty(), "not in the model: {left:?}");
        }
        worst.check("packed loss", &folder, &packed.0, &alone.0, 1e-6);
        for (name, grad) in &packed.1 {
            let alone = &alone.1[name];
            let error = (grad - alone).norm().double_value(&[]) / alone.norm().double_value(&[]).max(1e-12);
            assert!(error <= packed_tolerance, "{folder} {name}: a pack differs by {error:e}");
        }
    }

    /// The loss for unevenly used experts, and its gradients.
    fn check_balance(&mut self, worst: &mut Worst) {
        let Some(golden) = self.golden.get("balance").map(Tensor::shallow_clone) else {
            let layers = self.llm.config().decoder().num_hidden_layers;
            assert!((0..layers).all(|layer| self.llm.config().shape(layer).moe.is_none()));
            return;
        };
        self.track_gradients();
        let routing = self.trunk(&self.each("ids")).routing.unwrap();
        let balance = routing.balance_loss();
        let folder = self.folder.display().to_string();
        worst.check("balance", &folder, &balance, &golden, FORWARD_TOLERANCE);
        let visits = self.golden["visits"].to_kind(Kind::Float);
        let shares = &visits / visits.sum(Kind::Float);
        worst.check("visits", &folder, &routing.shares_e(), &shares, 1e-6);
        balance.backward();
        for (key, golden) in &self.golden {
            if let Some(name) = key.strip_prefix("balance_grad.") {
                let grad = self.params[&format!("llm.{name}")].grad();
                let what = format!("{folder} {name}");
                worst.check("balance gradient", &what, &grad, golden, GRADIENT_TOLERANCE);
            }
        }
    }

    fn check_generation(&self) {
        let ids = |key: &str| Vec::<i64>::try_from(&self.golden[key]).unwrap();
        let (prompt, golden) = (ids("ids.0"), ids("greedy"));
        // Beside a longer prompt, which must not matter.
        let prompts = [&prompt[..], &[prompt.as_slice(), &golden].concat()];
        let options = GenerateOptions::greedy(golden.len(), &[]);
        let found = from_ids(&self.llm, &prompts, &options, &mut |_, _| true).unwrap();
        assert_eq!(found[0], golden, "{}", self.folder.display());
        let empty: &[i64] = &[];
        assert!(from_ids(&self.llm, &[&prompt, empty], &options, &mut |_, _| true).is_err());
    }

    /// What is written is what was read: every tensor bit by bit under its name, and the configuration.
    fn check_writing(&self) {
        let out = tempfile::TempDir::new().unwrap();
        let local: Params = (self.params.iter())
            .map(|(name, tensor)| (name["llm.".len()..].to_owned(), tensor.shallow_clone()))
            .collect();
        let config = self.llm.config();
        let stored = arrange(&local, config.export_layout(), "").unwrap();
        Folder::new(stored).json("config.json", &config.to_json()).write(out.path()).unwrap();
        let [before, after] =
            [&*self.folder, out.path()].map(|folder| read(&folder.join("model.safetensors")));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (key, tensor) in &before {
            assert!(tensor.kind() == after[key].kind() && tensor.equal(&after[key]), "{key}");
        }
        assert_eq!(&LlmConfig::read(out.path()).unwrap(), config);
    }
}

#[test]
fn models_compute_what_transformers_computes() {
    goldens().for_each(|folder| Case::read(&folder).check_forward(&mut Worst::default()));
}

#[test]
fn models_have_the_gradients_of_transformers() {
    goldens().for_each(|folder| Case::read(&folder).check_gradients(&mut Worst::default(), 1e-5));
}

#[test]
fn models_continue_as_transformers() {
    goldens().for_each(|folder| Case::read(&folder).check_generation());
}

#[test]
fn unevenly_used_experts_cost_what_they_cost_in_transformers() {
    goldens().for_each(|folder| Case::read(&folder).check_balance(&mut Worst::default()));
}

#[test]
fn reading_and_writing_changes_no_bit_and_no_key() {
    goldens().for_each(|folder| Case::read(&folder).check_writing());
}

#[test]
fn an_expert_that_no_row_visits_has_a_gradient_of_zero() {
    let folder = goldens().find(|folder| folder.ends_with("qwen3_moe")).unwrap();
    let mut case = Case::read(&folder);
    let visits = Vec::<i64>::try_from(&case.golden["visits"]).unwrap();
    let unused = visits.iter().position(|visits| *visits == 0).unwrap() as i64;
    let (_, grads) = case.loss_and_gradients(&[&[0, 1, 2]]);
    let grad = &grads["llm.model.layers.0.mlp.experts.gate_up_proj"];
    let of = |expert: i64| grad.get(expert).abs().max().double_value(&[]);
    assert!(of(unused) == 0.0 && of(unused + 1) > 0.0);
}

/// For random configurations of every family. 25 of each; `SAIL_SEED` draws others.
#[test]
#[ignore = "takes minutes, and the reference packages"]
fn random_models_are_those_of_transformers() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seed = std::env::var("SAIL_SEED").unwrap_or("1".into());
    let out = tempfile::TempDir::new().unwrap();
    let made = Command::new(tests.join("../.venv/bin/python"))
        .arg(tests.join("reference/random_llm.py"))
        .args(["25", &seed])
        .arg(out.path())
        .status()
        .expect("scripts/setup.sh --reference has made .venv");
    assert!(made.success());
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let mut by_family: BTreeMap<&str, (usize, Worst)> = BTreeMap::new();
    for folder in &folders {
        let mut case = Case::read(folder);
        let (cases, worst) = by_family.entry(case.llm.config().model_type()).or_default();
        *cases += 1;
        case.check_forward(worst);
        // A drawn bias may have a gradient that is mostly cancelled, and with it more of its rounding left.
        case.check_gradients(worst, GRADIENT_TOLERANCE);
        case.check_balance(worst);
        case.check_generation();
        case.check_writing();
    }
    assert_eq!(by_family.len(), 4);
    for (family, (cases, worst)) in by_family {
        println!("{family}: {cases} cases, largest errors {:?}", worst.0);
    }
}
