//! Sampling weights: with which probability each sample of a source is read in an epoch.
//!
//! They are a safetensors file with one F32 tensor of `[samples]` for each shard. Its name is the shard's path as the
//! source lists it, its values are in the order of the shard's samples. `sail-data rebalance` writes such files;
//! others may, and may leave the metadata out.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::spec::{Layout, SourceSpec};

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

impl Origin {
    /// Refuses weights of other texts than the source's.
    fn check(&self, source: &SourceSpec) -> std::result::Result<(), String> {
        let (then, now) = (self.layout.name(), source.layout.name());
        if then != now {
            return Err(format!("were made of samples read as `{then}`, and the source reads `{now}`"));
        }
        if source.takes_random_pages() {
            let detail = "were made of the first page of each document, and the source takes a random one";
            return Err(format!("{detail}, expected `page: first`"));
        }
        Ok(())
    }
}

/// The weights of a source's samples: 4 bytes each, for all streams together.
#[derive(Debug)]
pub(crate) struct SamplingWeights {
    /// By the number of the shard.
    shards: Vec<Box<[f32]>>,
    /// Tells them from others.
    pub(crate) fingerprint: u64,
}

impl SamplingWeights {
    /// Reads the weights of a source with these shards. What the file has for others is left out.
    ///
    /// # Errors
    /// Why they cannot be used, as the end of a sentence about them.
    pub(crate) fn read(
        path: &Path,
        source: &SourceSpec,
        shards: &[String],
    ) -> std::result::Result<Self, String> {
        if path.to_string_lossy().contains("://") {
            return Err(
                "are elsewhere, expected a local file: weights are read as a whole, so fetch it".into()
            );
        }
        let bytes = std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
        let no_file = |error: SafeTensorError| format!("are no safetensors file: {error}");
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(no_file)?;
        let origin = header.metadata().as_ref().and_then(|metadata| metadata.get(METADATA));
        let origin: Option<Origin> = origin
            .map(|text| serde_json::from_str(text))
            .transpose()
            .map_err(|error| format!("have metadata that cannot be read: {error}"))?;
        origin.as_ref().map_or(Ok(()), |origin| origin.check(source))?;
        let file = SafeTensors::deserialize(&bytes).map_err(no_file)?;
        let mut weights = Vec::with_capacity(shards.len());
        for shard in shards {
            let made_of = origin.as_ref().and_then(|origin| origin.shard_bytes.get(shard));
            if let (Some(&then), Some(now)) = (made_of, local_bytes(shard))
                && then != now
            {
                return Err(format!("were made of the shard `{shard}` when it had {then} bytes, now {now}"));
            }
            let tensor = file.tensor(shard).map_err(|_| format!("have none for the shard `{shard}`"))?;
            weights.push(values(shard, &tensor)?);
        }
        // A file that keeps next to nothing would have a stream search for ever.
        let kept: f64 = weights.iter().flatten().map(|&weight| f64::from(weight)).sum();
        if kept < 1.0 {
            return Err(format!("keep {kept:.3} samples an epoch, expected at least 1"));
        }
        let fingerprint = fingerprint(&weights);
        Ok(Self { shards: weights, fingerprint })
    }

    /// The weight of sample number `ordinal` of a shard; `None` past the last one.
    pub(crate) fn of(&self, shard: u32, ordinal: u64) -> Option<f32> {
        self.shards[shard as usize].get(ordinal as usize).copied()
    }

    /// How many samples of a shard have a weight.
    pub(crate) fn len(&self, shard: u32) -> u64 {
        self.shards[shard as usize].len() as u64
    }
}

fn values(shard: &str, tensor: &TensorView) -> std::result::Result<Box<[f32]>, String> {
    let (dtype, shape) = (tensor.dtype(), tensor.shape());
    if dtype != Dtype::F32 || shape.len() != 1 {
        return Err(format!(
            "have {dtype:?} of {shape:?} for the shard `{shard}`, expected F32 of [samples]"
        ));
    }
    let value = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
    let values: Box<[f32]> = tensor.data().as_chunks().0.iter().map(value).collect();
    match values.iter().position(|value| !(0.0..=1.0).contains(value)) {
        Some(sample) => Err(format!(
            "give sample {sample} of the shard `{shard}` the weight {}, expected a number from 0 to 1",
            values[sample]
        )),
        None => Ok(values),
    }
}

fn fingerprint(shards: &[Box<[f32]>]) -> u64 {
    let mut hash = Sha256::new();
    for weights in shards {
        hash.update((weights.len() as u64).to_le_bytes());
        weights.iter().for_each(|weight| hash.update(weight.to_le_bytes()));
    }
    let digest: [u8; 32] = hash.finalize().into();
    u64::from_le_bytes(std::array::from_fn(|byte| digest[byte]))
}

/// Whether a file begins as those that [`to_bytes`] makes, whatever has become of the rest of it.
pub(crate) fn is_file_of(path: &Path) -> bool {
    let header = |bytes: Vec<u8>| {
        let (length, rest) = bytes.split_first_chunk()?;
        let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        serde_json::from_slice::<serde_json::Value>(header).ok()
    };
    let header = std::fs::read(path).ok().and_then(header);
    header.is_some_and(|header| header["__metadata__"][METADATA].is_string())
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
