//! SmolLM2-135M-Instruct continues five chats token by token as transformers does, by the golden that
//! `goldens/make_smollm2.py` makes. Needs the weights that `scripts/fetch_demo_weights.py` fetches.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use sail_model::generate::{GenerateOptions, from_ids};
use sail_model::llm::{Llm, LlmConfig};
use sail_model::params::{Builder, Params};
use sail_model::weights::{FileSource, read_json};
use serde_json::Value;
use tch::{Device, Kind};

fn load() -> Llm {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/smollm2-135m-instruct");
    assert!(
        folder.join("model.safetensors").is_file(),
        "no weights in {}: run `scripts/fetch_demo_weights.py`",
        folder.display()
    );
    let config = LlmConfig::read(&folder).unwrap();
    let source = FileSource::open(&folder).unwrap().with(config.naming());
    let params = Rc::new(RefCell::new(Params::new()));
    Llm::new(&config, &Builder::new(params, "llm", &source, (Kind::Float, Device::Cpu))).unwrap()
}

fn ids(case: &Value, key: &str) -> Vec<i64> {
    case[key].as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

#[test]
fn smollm2_continues_as_transformers() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/smollm2_greedy.json");
    let golden = read_json(&golden).unwrap();
    let llm = load();
    // One row at a time is bound by memory; a second thread only waits where the machine is busy.
    tch::set_num_threads(1);
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let expected = ids(case, "generated_ids");
        assert_eq!(expected.len() as u64, golden["new_tokens"].as_u64().unwrap());
        let options = GenerateOptions::greedy(expected.len(), &[]);
        let found = from_ids(&llm, &[&ids(case, "prompt_ids")], &options, &mut |_, _| true).unwrap();
        assert_eq!(found, [expected], "{}", case["question"]);
    }
}
