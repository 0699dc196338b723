//! Checkpoints: folders named `step-00001200` that are either complete and verified or ignored.
//!
//! ```text
//! step-00001200/
//!   rank-00000.safetensors   a rank's pieces, keyed `<kind>/<full parameter name>`; kinds: param, exp_avg, exp_avg_sq, ema
//!   rank-00001.safetensors   ...
//!   state.json               step, counters, data position, the resolved plan
//!   manifest.json            every file's size and CRC-32, every piece's global shape and slice
//!   COMPLETE                 written last: the CRC-32 of manifest.json
//! ```
//!
//! A module that still has exactly the weights of the folder it came from is not stored: the
//! manifest names the folder and a fingerprint of the weights instead, checked when they are used.
//! A [`Snapshot`] is what one is made from; the [`Saver`] writes it while training goes on (`write.rs`), `read.rs`
//! opens such folders, `retention.rs` says which may go. docs/checkpoint.md describes the format.

mod read;
mod retention;
mod saver;
mod snapshot;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sail_model::weights::{ModelRef, read_json};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ada_lrs::AdaLrs;
use crate::config::{Module, Plan, Progress};
use crate::error::{Error, Result};
use crate::guard::GuardState;
use crate::lineage::Lineage;

pub use read::{Checkpoint, newest, newest_before};
pub use saver::{Save, Saver};
pub use snapshot::{Piece, Snapshot};
pub(crate) use write::{checksum, remove_partial};

const FORMAT: u32 = 3;
const STATE: &str = "state.json";
pub(crate) const MANIFEST: &str = "manifest.json";
const COMPLETE: &str = "COMPLETE";

/// Where a run stands; everything but tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps done.
    pub step: u64,
    /// Counters since the first step of the stage.
    pub totals: Totals,
    /// Position in the training data.
    pub data: sail_data::Position,
    /// How far the stage had come at each unlock point that it has passed, by index in the plan.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unlocked: BTreeMap<usize, Progress>,
    /// Updates that the optimizer has made.
    pub updates: Updates,
    /// Where the search for a learning rate stands, where the plan has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ada_lrs: Option<AdaLrs>,
    /// What was judged of the steps so far.
    pub guard: GuardState,
    /// Held-out losses by step; that of this step is measured after it is saved.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub held_out: BTreeMap<u64, f64>,
    /// Where its weights come from.
    pub lineage: Lineage,
    /// The plan the run follows.
    pub plan: Plan,
}

impl RunState {
    /// How far the stage has come.
    pub fn progress(&self) -> Progress {
        Progress { steps: self.step, tokens: self.totals.tokens }
    }
}

/// How often parameters were updated; their moments are of that age.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Updates {
    /// Those that were trained all the time.
    pub all: u64,
    /// Those that were unlocked later, by full name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub later: BTreeMap<String, u64>,
}

impl Updates {
    /// Of one parameter.
    pub fn of(&self, name: &str) -> u64 {
        self.later.get(name).copied().unwrap_or(self.all)
    }

    /// Whether some of them never were.
    pub fn any_never(&self) -> bool {
        self.all == 0 || self.later.values().any(|count| *count == 0)
    }
}

/// Whether a checkpoint of this seal is in `dir`, whole or not.
pub(crate) fn is_there(dir: &Path, seal: &str) -> bool {
    self::seal(dir).is_some_and(|found| found == seal)
}

/// What tells a complete checkpoint from another of the same step.
pub(crate) fn seal(dir: &Path) -> Option<String> {
    std::fs::read_to_string(dir.join(COMPLETE)).ok().map(|found| found.trim().to_owned())
}

/// The checkpoint in `path` itself, or the newest of a run that verifies.
pub fn open_or_newest(path: &Path) -> Result<Option<Checkpoint>> {
    if path.join(MANIFEST).exists() { Checkpoint::open(path).map(Some) } else { newest(path) }
}

/// What the newest complete checkpoint of a run says of itself, in its `state.json`; its other files are not looked at.
pub(crate) fn newest_state(run_dir: &Path) -> Result<Option<Value>> {
    let newest = complete(run_dir)?.pop();
    Ok(newest.map(|(_, dir)| read_json(&dir.join(STATE))).transpose()?)
}

/// The complete checkpoints in a run folder by step, oldest first; their content is not looked at.
pub(crate) fn complete(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    Ok(list(run_dir)?.into_iter().filter(|(_, dir)| dir.join(COMPLETE).is_file()).collect())
}

/// What a stage has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Samples trained on, repetitions counted.
    pub samples: u64,
    /// Tokens trained on, image tokens included.
    pub tokens: u64,
    /// Tokens that carried a loss.
    pub answer_tokens: u64,
}

/// Where a module that is not stored has its weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Untouched {
    /// What was given as `model.<module>.from`.
    pub from: ModelRef,
    /// Of the weights in memory, see [`crate::stage::Fingerprints`].
    pub fingerprint: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// With the commit, where the program knows it.
    sail_version: String,
    /// Of the libtorch that it ran with; earlier checkpoints do not say.
    #[serde(default)]
    torch_version: String,
    plan_hash: String,
    world_size: u32,
    untouched: BTreeMap<Module, Untouched>,
    files: BTreeMap<String, FileRecord>,
    pieces: Vec<PieceRecord>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    bytes: u64,
    pub(crate) crc32: u32,
}

/// Where one piece of one tensor lies.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PieceRecord {
    file: String,
    /// Key in the file.
    key: String,
    /// Full parameter name.
    name: String,
    kind: String,
    /// Of the whole tensor.
    shape: Vec<i64>,
    /// Half-open range of the flattened tensor that this piece holds.
    elements: [i64; 2],
}

/// Whether a run folder holds anything that was a checkpoint once, whole or not.
pub(crate) fn any(run_dir: &Path) -> Result<bool> {
    Ok(!list(run_dir)?.is_empty())
}

/// `step-00001200`.
fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The checkpoints in a run folder by step, oldest first; their content is not looked at.
fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(run_dir)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(run_dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(step) = name.and_then(|name| name.strip_prefix("step-")).and_then(|n| n.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}
