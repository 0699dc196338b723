//! Sampling weights: with which probability each sample of a source is read in an epoch.
//!
//! They are a safetensors file with one F32 tensor of `[samples]` for each shard. Its name is the shard's path as the
//! source lists it, its values are in the order of the shard's samples. `sail-data rebalance` writes such files;
//! others may, and may leave the metadata out.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};
use serde::{Deserialize, Serialize};

use crate::spec::Layout;

/// The one entry of a file's metadata: JSON, whose order is fixed.
const METADATA: &str = "rebalance";

/// What a file's weights were made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Words of an n-gram.
    pub(crate) n: usize,
    /// Share of the samples above which an n-gram counts as frequent.
    pub(crate) threshold: f64,
    /// How the samples were read.
    pub(crate) layout: Layout,
    /// Sizes of the shards that are local files, in bytes.
    pub(crate) shard_bytes: BTreeMap<String, u64>,
}

/// The size of a shard that is a local file, in bytes.
pub(crate) fn local_bytes(shard: &str) -> Option<u64> {
    std::fs::metadata(shard).ok().map(|about| about.len())
}

/// A file of the weights of these shards. The same weights are the same bytes.
///
/// # Errors
/// When there are more shards than a safetensors header holds (100 MB of names).
pub(crate) fn to_bytes(
    origin: &Origin,
    shards: &BTreeMap<String, Vec<f32>>,
) -> std::result::Result<Vec<u8>, SafeTensorError> {
    let bytes = |weights: &Vec<f32>| weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    let shards: Vec<(&String, usize, Vec<u8>)> =
        shards.iter().map(|(shard, weights)| (shard, weights.len(), bytes(weights))).collect();
    let view = |(shard, samples, bytes)| Ok((shard, TensorView::new(Dtype::F32, vec![samples], bytes)?));
    let tensors = shards.iter().map(|(shard, samples, bytes)| view((*shard, *samples, bytes.as_slice())));
    let tensors = tensors.collect::<std::result::Result<Vec<_>, SafeTensorError>>()?;
    let origin = serde_json::to_string(origin).expect("invariant: numbers and names are JSON");
    safetensors::serialize(tensors, Some(HashMap::from([(METADATA.to_owned(), origin)])))
}
