//! Chat templates against transformers, on the goldens that `tests/goldens/make_templates.py` makes: ids and labels of
//! 200 conversations, each exactly.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::annotation::{Role, Turn};
use crate::sample::IGNORE;
use crate::spec::{Template, TextSpec};
use crate::testing::text_spec;
use crate::text::{Encoded, TextEncoder};

#[derive(Deserialize)]
struct Golden {
    tokenizer: String,
    template: String,
    system: Option<String>,
    bos_token: Option<String>,
    hashes: Vec<String>,
    full: Vec<Full>,
}

#[derive(Deserialize)]
struct Full {
    ids: Vec<i64>,
    learnt: Vec<[usize; 2]>,
}

#[derive(Deserialize)]
struct Conversation {
    turns: Vec<Message>,
    images: Vec<usize>,
}

#[derive(Deserialize)]
struct Message {
    role: Role,
    content: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/templates")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The tokenizer of a golden, in a folder of its own; `None` where the demo weights are not fetched.
fn write_tokenizer(golden: &Golden, dir: &Path) -> Option<PathBuf> {
    let changes = read(&folder().join("tokenizers.json"));
    let (base, added) = match golden.tokenizer.as_str() {
        "smollm2" => ("weights/smollm2-135m-instruct/tokenizer.json", &changes["smollm2"]),
        _ => ("configs/tiny/tokenizer.json", &changes["tiny"]),
    };
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(base);
    if !base.exists() {
        return None;
    }
    let mut tokenizer = read(&base);
    let tokens = tokenizer["added_tokens"].as_array_mut().unwrap();
    tokens.extend(added.as_array().unwrap().iter().cloned());
    if golden.tokenizer == "split" {
        tokenizer["pre_tokenizer"] = changes["split"].clone();
    }
    let config = serde_json::json!({"bos_token": golden.bos_token});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    let path = dir.join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    Some(path)
}

/// Positions that are learnt, as ranges; one range may hold answers that follow one another at once.
fn learnt(encoded: &Encoded) -> Vec<[usize; 2]> {
    let mut ranges: Vec<[usize; 2]> = Vec::new();
    for at in (1..encoded.ids.len()).filter(|&at| encoded.targets[at - 1] != IGNORE) {
        assert_eq!(encoded.targets[at - 1], encoded.ids[at]);
        match ranges.last_mut() {
            Some(last) if last[1] == at => last[1] += 1,
            _ => ranges.push([at, at + 1]),
        }
    }
    ranges
}

/// FNV-1a, 64 bits.
fn hash(encoded: &Encoded) -> String {
    let bounds = learnt(encoded).into_iter().flatten().map(|bound| bound as i64);
    let bytes = encoded.ids.iter().copied().chain(bounds).flat_map(i64::to_le_bytes);
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.fold(0xcbf2_9ce4_8422_2325, step))
}

fn compare(what: &str, golden: &Golden, encoder: &TextEncoder, conversations: &[Conversation]) {
    assert_eq!((golden.hashes.len(), conversations.len()), (200, 200));
    check_prompt(what, encoder);
    for (index, conversation) in conversations.iter().enumerate() {
        let turn = |message: &Message| Turn { role: message.role, text: message.content.clone() };
        let turns: Vec<Turn> = conversation.turns.iter().map(turn).collect();
        let encoded = encoder.encode(&turns, &conversation.images).unwrap();
        if let Some(full) = golden.full.get(index) {
            assert_eq!(encoded.ids, full.ids, "{what}, conversation {index}");
            assert_eq!(learnt(&encoded), full.learnt, "{what}, conversation {index}");
        }
        assert_eq!(hash(&encoded), golden.hashes[index], "{what}, conversation {index}");
    }
}

/// Generation begins with what stands before the same answer in training.
fn check_prompt(what: &str, encoder: &TextEncoder) {
    let turns = [(Role::User, "<image>\nWhat is this?"), (Role::Assistant, "A cat.")];
    let turns = turns.map(|(role, text)| Turn { role, text: text.to_owned() });
    let encoded = encoder.encode(&turns, &[3]).unwrap();
    let prompt = encoder.prompt("What is this?", &[3]).unwrap();
    assert_eq!(prompt.ids, encoded.ids[..learnt(&encoded)[0][0]], "{what}");
    assert_eq!(prompt.image_rows, encoded.image_rows, "{what}");
    let end = learnt(&encoded)[0][1] - 1;
    assert_eq!(encoder.stop_ids(), [encoded.ids[end]], "{what}");
}

#[test]
fn ids_and_labels_are_those_of_transformers() {
    let goldens: std::collections::BTreeMap<String, Golden> =
        serde_json::from_value(read(&folder().join("golden.json"))).unwrap();
    let conversations: Vec<Conversation> =
        serde_json::from_value(read(&folder().join("conversations.json"))).unwrap();
    assert_eq!(goldens.len(), 7);
    for (name, golden) in &goldens {
        let dir = tempfile::tempdir().unwrap();
        let Some(tokenizer) = write_tokenizer(golden, dir.path()) else {
            eprintln!("`{name}` is not compared: run scripts/fetch_demo_weights.py");
            continue;
        };
        let spec = TextSpec { system: golden.system.clone(), ..text_spec() };
        let built_in = match name.as_str() {
            "chatml" => Some(Template::Chatml),
            "sail" => Some(Template::Sail),
            "smollm" | "smollm_published" => Some(Template::Smollm),
            _ => None,
        };
        if let Some(template) = built_in {
            let encoder = TextEncoder::new(&tokenizer, &TextSpec { template, ..spec.clone() }).unwrap();
            compare(name, golden, &encoder, &conversations);
        }
        for file in [format!("{}.jinja", golden.template), format!("{}.generation.jinja", golden.template)] {
            let template_file = Some(folder().join(&file));
            let spec = TextSpec { template: Template::Jinja, template_file, ..spec.clone() };
            let encoder = TextEncoder::new(&tokenizer, &spec).unwrap();
            compare(&file, golden, &encoder, &conversations);
        }
    }
}
