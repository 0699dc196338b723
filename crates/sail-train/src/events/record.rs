//! What a run records, and the places it goes to.
//!
//! A record is a line of `metrics.jsonl` with what is too long for a line. What other programs are told is made from the
//! line, so that all of them say the same, and what one of them has missed can be told later.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::config::Module;

/// What a run records at once.
#[derive(Clone, Debug)]
pub(super) struct Record {
    /// Of `metrics.jsonl`.
    pub(super) line: Value,
    /// Norms of the gradients of all trained parameters, of a step that is reported.
    pub(super) grad_norms: BTreeMap<Module, Vec<f64>>,
}

impl From<Value> for Record {
    fn from(line: Value) -> Self {
        Self { line, grad_norms: BTreeMap::new() }
    }
}

/// How a run, or this part of it, has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are done.
    Finished,
    /// It was asked to stop; the same command goes on.
    Stopped,
    /// With an error.
    Failed,
}

/// A place besides `metrics.jsonl` that records go to. A record waits for no server, and for a file as long as the system
/// takes to buffer it; going back takes as long as the files of the run take to be written anew.
pub(super) trait Sink {
    /// Takes a record that is in `metrics.jsonl` already.
    fn record(&mut self, record: &Record);

    /// Forgets the steps after `step`; `metrics.jsonl` has done so already.
    fn back_to(&mut self, step: u64);

    /// Takes no more records.
    fn close(&mut self, ending: Ending);
}

/// Every number of a line under a name with slashes, which begins with the kind of the line: `train/lr/vision`. Held-out
/// losses are named by what they are of: `eval/loss` of all sources, `eval/SOURCE/loss_true_image` of one.
pub(super) fn figures(line: &Value) -> Vec<(String, f64)> {
    let mut figures = Vec::new();
    let Some(kind) = line["kind"].as_str() else { return figures };
    match kind {
        "eval" => {
            losses("eval", &line["report"]["total"], &mut figures);
            for (source, of_source) in line["report"]["sources"].as_object().into_iter().flatten() {
                losses(&format!("eval/{source}"), of_source, &mut figures);
            }
        }
        "train" | "checkpoint" => {
            for (key, value) in line.as_object().into_iter().flatten().filter(|(key, _)| !is_place(key)) {
                flatten(format!("{kind}/{key}"), value, &mut figures);
            }
        }
        _ => {}
    }
    figures
}

/// Which step a line is of, and when: no figures of it.
fn is_place(key: &str) -> bool {
    ["kind", "step", "time"].contains(&key)
}

fn losses(name: &str, losses: &Value, figures: &mut Vec<(String, f64)>) {
    let Some(losses) = losses.as_object() else { return };
    let images = losses.get("images").and_then(Value::as_object);
    let with_images: Map<String, Value> =
        images.into_iter().flatten().map(|(image, loss)| (format!("loss_{image}"), loss.clone())).collect();
    let others = losses.iter().filter(|(key, _)| *key != "images");
    for (key, value) in others.chain(&with_images) {
        flatten(format!("{name}/{key}"), value, figures);
    }
}

fn flatten(name: String, value: &Value, figures: &mut Vec<(String, f64)>) {
    match value {
        Value::Number(number) => figures.extend(number.as_f64().map(|number| (name, number))),
        Value::Object(values) => {
            for (key, value) in values {
                flatten(format!("{name}/{key}"), value, figures);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_number_has_a_name() {
        let line = json!({
            "kind": "train", "step": 3, "time": 1.5, "loss": 2.5, "mfu": null, "lr": {"vision.blocks[0..2]": 1e-3},
            "coverage": {"ocr": {"seen": 4, "skipped": {"bad_json": 1}}},
        });
        let expected = [
            ("train/loss", 2.5),
            ("train/lr/vision.blocks[0..2]", 1e-3),
            ("train/coverage/ocr/seen", 4.0),
            ("train/coverage/ocr/skipped/bad_json", 1.0),
        ];
        assert_eq!(figures(&line), expected.map(|(name, value)| (name.to_owned(), value)));
    }

    /// A source may be named like a loss.
    #[test]
    fn held_out_losses_are_named_by_their_source() {
        let report = json!({
            "total": {"samples": 2, "loss": 3.0},
            "sources": {"loss": {"loss": 1.0, "images": {"true_image": 1.0, "shuffled_image": 2.0}}},
            "generations": [{"answer": "7"}],
        });
        let figures = figures(&json!({"kind": "eval", "step": 0, "report": report}));
        let expected = [
            ("eval/samples", 2.0),
            ("eval/loss", 3.0),
            ("eval/loss/loss", 1.0),
            ("eval/loss/loss_true_image", 1.0),
            ("eval/loss/loss_shuffled_image", 2.0),
        ];
        assert_eq!(figures, expected.map(|(name, value)| (name.to_owned(), value)));
    }

    #[test]
    fn other_lines_have_none() {
        for line in [json!({"kind": "unlock", "step": 2, "tensors": 4}), json!({"step": 1}), json!(null)] {
            assert!(figures(&line).is_empty(), "{line}");
        }
    }
}
