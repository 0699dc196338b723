//! Where a model's weights come from: what they began with, and the stages that trained them since.
//!
//! Checkpoints hold it, and every export has it in its config.json.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sail_model::weights::{ModelRef, read_json};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Totals};
use crate::config::{ModelSource, Module};
use crate::error::Result;

/// The key of config.json.
pub const LINEAGE: &str = "sail_lineage";

/// Where the weights of a run come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lineage {
    /// What each module began with, before the first of the stages.
    pub weights: BTreeMap<Module, Value>,
    /// The checkpoints that stages started from, the oldest first: the run itself from the last one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<Ancestor>,
}

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

/// What a module begins with that is not taken from a checkpoint: the word `random`, a model's name, or with it the
/// lineage that its config.json in `folder` has. Of a folder the last part is the name: the rest is of this machine.
///
/// # Errors
/// When its config.json cannot be read.
pub fn origin(source: &ModelSource, folder: &Path) -> Result<Value> {
    let name = match source {
        ModelSource::Random(_) => return Ok("random".into()),
        ModelSource::From(hub @ ModelRef::Hub { .. }) => hub.to_string(),
        ModelSource::From(ModelRef::Folder(folder)) => {
            folder.file_name().map_or("a folder".into(), |name| name.to_string_lossy().into_owned())
        }
    };
    Ok(match read_json(&folder.join("config.json"))?.get(LINEAGE) {
        Some(lineage) => json!({ "from": name, LINEAGE: lineage }),
        None => name.into(),
    })
}

/// What exports say of a checkpoint's model: `{ "weights": { MODULE: ORIGIN }, "stages": [..] }`, the oldest stage first,
/// the checkpoint itself the last one; without folders of this machine.
pub fn of_checkpoint(checkpoint: &Checkpoint) -> Value {
    told(&checkpoint.lineage())
}

/// The same of any weights.
pub(crate) fn told(lineage: &Lineage) -> Value {
    let Lineage { weights, stages } = lineage;
    json!({ "weights": weights, "stages": stages.iter().map(stage).collect::<Vec<Value>>() })
}

fn stage(ancestor: &Ancestor) -> Value {
    let Ancestor { run, step, totals, plan_hash, seal, dir: _ } = ancestor;
    let Totals { samples, tokens, .. } = totals;
    json!({
        "run": run, "step": step, "samples": samples, "tokens": tokens, "plan_hash": plan_hash, "checkpoint": seal,
    })
}
