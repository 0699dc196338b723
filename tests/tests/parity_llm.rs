//! Language models against transformers, on the goldens that `goldens/make_llm.py` makes: each
//! sequence alone, all three in one pack, and generation with a cache.
//!
//! The error of a tensor is max |found - golden| / max |golden|.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sail_model::attention::Segments;
use sail_model::generate::greedy;
use sail_model::llm::{Llm, LlmConfig};
use sail_model::params::{Builder, Params};
use sail_model::weights::FileSource;
use tch::{Device, Kind, Reduction, Tensor};

const SEQUENCES: usize = 3;
const FORWARD_TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-4;

/// A model with its golden.
struct Case {
    llm: Llm,
    params: Params,
    golden: BTreeMap<String, Tensor>,
}

impl Case {
    fn read(name: &str) -> Self {
        let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name);
        let config = LlmConfig::read(&folder).unwrap();
        let source = FileSource::open(&folder).unwrap().with(config.naming());
        let params = Rc::new(RefCell::new(Params::new()));
        let builder = Builder::new(params.clone(), "llm", &source, (Kind::Float, Device::Cpu));
        let llm = Llm::new(&config, &builder).unwrap();
        let golden = Tensor::read_safetensors(folder.join("golden.safetensors")).unwrap();
        Self { llm, params: params.take(), golden: golden.into_iter().collect() }
    }

    fn each(&self, key: &str) -> Vec<Tensor> {
        (0..SEQUENCES).map(|i| self.golden[&format!("{key}.{i}")].shallow_clone()).collect()
    }

    /// Logits of sequences packed one after the other.
    fn logits(&self, sequences: &[Tensor]) -> Tensor {
        let lengths: Vec<i64> = sequences.iter().map(|ids| ids.size()[0]).collect();
        let positions: Vec<i64> = lengths.iter().flat_map(|length| 0..*length).collect();
        let mut cu_seqlens = vec![0];
        for length in &lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length);
        }
        let segments = Segments::new(&cu_seqlens, positions.len() as i64).unwrap();
        let x_td = self.llm.embed(&Tensor::cat(sequences, 0));
        let positions_t = Tensor::from_slice(&positions);
        self.llm.logits(&self.llm.hidden(&x_td, &positions_t, &segments, None))
    }

    /// Weighted loss summed over packs of these sequences, with its gradients by name.
    fn loss_and_gradients(&mut self, packs: &[&[usize]]) -> (Tensor, Params) {
        for param in self.params.values_mut() {
            let _ = param.requires_grad_(true);
            param.zero_grad();
        }
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
}

fn assert_close(what: &str, found: &Tensor, golden: &Tensor, tolerance: f64) {
    assert_eq!(found.size(), golden.size(), "{what}");
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    let error = largest(&(found - golden)) / largest(golden);
    assert!(error <= tolerance, "{what}: relative error {error:e} > {tolerance:e}");
}

fn check_forward(name: &str) {
    let case = Case::read(name);
    let (ids, golden) = (case.each("ids"), case.each("logits"));
    for (i, golden) in golden.iter().enumerate() {
        let logits = case.logits(&ids[i..=i]);
        assert_close(&format!("{name} {i} alone"), &logits, golden, FORWARD_TOLERANCE);
    }
    let packed = case.logits(&ids);
    assert_close(&format!("{name} packed"), &packed, &Tensor::cat(&golden, 0), FORWARD_TOLERANCE);
}

/// Loss and the gradient of every parameter, none left over on either side.
fn check_gradients(name: &str) {
    let mut case = Case::read(name);
    let alone = case.loss_and_gradients(&[&[0], &[1], &[2]]);
    let packed = case.loss_and_gradients(&[&[0, 1, 2]]);
    for (how, (loss, grads)) in [("alone", &alone), ("packed", &packed)] {
        assert_close(&format!("{name} loss {how}"), loss, &case.golden["loss"], FORWARD_TOLERANCE);
        let mut left: BTreeSet<&str> =
            case.golden.keys().filter_map(|key| key.strip_prefix("grad.")).collect();
        for (full_name, grad) in grads {
            let local = full_name.strip_prefix("llm.").unwrap();
            assert!(left.remove(local), "the golden has no gradient of {local}");
            let golden = &case.golden[&format!("grad.{local}")];
            assert_close(&format!("{name} {how} {local}"), grad, golden, GRADIENT_TOLERANCE);
        }
        assert!(left.is_empty(), "not in the model: {left:?}");
    }
    assert_close("packed and alone", &packed.0, &alone.0, 1e-6);
    for (name, grad) in &packed.1 {
        assert_close(&format!("{name} packed and alone"), grad, &alone.1[name], 1e-5);
    }
}

fn check_generation(name: &str) {
    let case = Case::read(name);
    let ids = |key: &str| Vec::<i64>::try_from(&case.golden[key]).unwrap();
    let (prompt, golden) = (ids("ids.0"), ids("greedy"));
    assert_eq!(greedy(&case.llm, &prompt, golden.len(), &[]).unwrap(), golden);
    let stop = golden[3];
    let end = golden.iter().position(|id| *id == stop).unwrap();
    assert_eq!(greedy(&case.llm, &prompt, golden.len(), &[stop]).unwrap(), golden[..=end]);
    assert_eq!(greedy(&case.llm, &prompt, 0, &[]).unwrap(), [0i64; 0]);
    assert!(greedy(&case.llm, &[], 1, &[]).is_err());
}

#[test]
fn llama_computes_what_transformers_computes() {
    check_forward("llama");
}

#[test]
fn qwen3_computes_what_transformers_computes() {
    check_forward("qwen3");
}

#[test]
fn llama_has_the_gradients_of_transformers() {
    check_gradients("llama");
}

#[test]
fn qwen3_has_the_gradients_of_transformers() {
    check_gradients("qwen3");
}

#[test]
fn llama_continues_as_transformers() {
    check_generation("llama");
}

#[test]
fn qwen3_continues_as_transformers() {
    check_generation("qwen3");
}

#[test]
fn parameters_have_the_names_of_hugging_face() {
    let names = |name: &str| Case::read(name).params.into_keys().collect::<BTreeSet<_>>();
    let (llama, qwen3) = (names("llama"), names("qwen3"));
    let only_qwen3: Vec<&str> = qwen3.difference(&llama).map(String::as_str).collect();
    assert!(llama.is_subset(&qwen3));
    assert_eq!(
        only_qwen3,
        [
            "llm.lm_head.weight",
            "llm.model.layers.0.self_attn.k_norm.weight",
            "llm.model.layers.0.self_attn.q_norm.weight",
            "llm.model.layers.1.self_attn.k_norm.weight",
            "llm.model.layers.1.self_attn.q_norm.weight",
        ]
    );
}
