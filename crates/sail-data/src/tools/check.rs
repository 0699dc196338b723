//! Reads everything of every sample, as training would, and says what is wrong.

use std::collections::BTreeMap;

use serde::Serialize;

use super::access::Setup;
use super::error::Result;
use super::walk::{Found, Progress, walk};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Problem {
    /// A sample that would be skipped.
    BadSample { source: String, shard: String, key: String, reason: &'static str, detail: String },
    /// A shard that would stop a run.
    BrokenShard { source: String, shard: String, detail: String },
    /// Sampling weights for another number of samples than a shard has, which would stop a run as well.
    UnfitWeights { source: String, shard: String, detail: String },
}

/// How much was read, and what was wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Checked {
    pub(crate) shards: usize,
    pub(crate) samples: u64,
    pub(crate) images: u64,
    /// By reason.
    pub(crate) bad: BTreeMap<String, u64>,
    pub(crate) broken_shards: u64,
    /// Shards whose sampling weights do not fit.
    pub(crate) unfit_weights: u64,
}

impl Checked {
    /// Whether anything is wrong.
    pub(crate) fn is_clean(&self) -> bool {
        self.bad.is_empty() && self.broken_shards == 0 && self.unfit_weights == 0
    }
}

/// Checks every sample; `report` is told each problem as it is found, in the order of the shards.
///
/// # Errors
/// Those of `report`.
pub(crate) fn check(
    setup: &Setup,
    progress: &dyn Progress,
    mut report: impl FnMut(Problem) -> Result<()>,
) -> Result<Checked> {
    let shards = setup.sources.iter().map(|source| source.shards.len()).sum();
    let mut checked = Checked { shards, ..Checked::default() };
    walk(
        &setup.sources,
        progress,
        |source, place| {
            Ok(setup.draft(source, place)?.draft.and_then(|draft| {
                let images = draft.pictures().len() as u64;
                setup.finish(draft).map(|_| images)
            }))
        },
        |source, found| {
            let source = setup.sources[source].name.clone();
            match found {
                Found::Sample(Ok(images)) => {
                    checked.samples += 1;
                    checked.images += images;
                    Ok(())
                }
                Found::Sample(Err(rejected)) => {
                    checked.samples += 1;
                    let reason = rejected.cause.reason();
                    *checked.bad.entry(reason.to_owned()).or_default() += 1;
                    let (id, detail) = (rejected.id, rejected.cause.to_string());
                    report(Problem::BadSample { source, shard: id.shard, key: id.key, reason, detail })
                }
                Found::BrokenShard { shard, error } => {
                    checked.broken_shards += 1;
                    let detail = super::error::with_causes(&error);
                    report(Problem::BrokenShard { source, shard: shard.to_owned(), detail })
                }
                Found::UnfitWeights { shard, error } => {
                    checked.unfit_weights += 1;
                    let detail = super::error::with_causes(&error);
                    report(Problem::UnfitWeights { source, shard: shard.to_owned(), detail })
                }
            }
        },
    )?;
    Ok(checked)
}
