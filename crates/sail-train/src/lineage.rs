//! Where a model's weights come from: the folder or hub they began with, and the stages that trained them since.
//!
//! Checkpoints hold it, and every export has it in its config.json.

use std::collections::BTreeMap;
use std::path::PathBuf;

use sail_model::weights::ModelRef;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Totals};
use crate::config::{ModelSource, Module, Plan};

/// The key of config.json.
pub const LINEAGE: &str = "sail_lineage";

/// A checkpoint that a later stage started from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// `run.name`.
    pub run: String,
    /// Its step.
    pub step: u64,
    /// What the stage had seen by then.
    pub totals: Totals,
    /// Of the plan.
    pub plan_hash: String,
    /// Its folder.
    pub dir: PathBuf,
    /// What its `COMPLETE` holds: a checksum over everything in it.
    pub seal: String,
}

/// What exports say of a checkpoint's model: `{ "weights": { MODULE: ORIGIN }, "stages": [..] }`, the oldest stage first,
/// the checkpoint itself the last one. Folders of this machine are not named, only the last part of those that weights
/// began with.
pub fn of_checkpoint(checkpoint: &Checkpoint) -> Value {
    let stages: Vec<Value> = checkpoint.lineage().iter().map(stage).collect();
    json!({ "weights": origins(&checkpoint.state().plan), "stages": stages })
}

fn stage(ancestor: &Ancestor) -> Value {
    let Ancestor { run, step, totals, plan_hash, seal, dir: _ } = ancestor;
    let Totals { samples, tokens, .. } = totals;
    json!({
        "run": run, "step": step, "samples": samples, "tokens": tokens, "plan_hash": plan_hash, "checkpoint": seal,
    })
}

fn origins(plan: &Plan) -> BTreeMap<&'static str, String> {
    let origin = |source: &ModelSource| match source {
        ModelSource::From(ModelRef::Folder(folder)) => {
            folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
        }
        ModelSource::From(hub @ ModelRef::Hub { .. }) => hub.to_string(),
        ModelSource::Random(_) => "random".to_owned(),
    };
    let sources = [(Module::Vision, &plan.model.vision.source), (Module::Llm, &plan.model.llm.source)];
    sources.map(|(module, source)| (module.name(), origin(source))).into()
}
