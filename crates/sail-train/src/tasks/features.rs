//! The features of a set of images: the patches after the encoder's last layer, without class tokens, or one vector each,
//! their mean.
//!
//! Means are written in pieces as they are computed; what a measurement that was killed has written is read back. Patches
//! are computed each time they are asked for, since they take a thousand times as much. Called by the recognition task.
//!
//! Dimension letters: n images, t patches of all, d width; `nchw` is pixels.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use sail_data::{LabelledImage, LabelledImages, Preprocessor};
use sail_model::vision::Vision;
use sail_model::weights::{Shards, write_safetensors};
use sail_torch::upload;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};
use tracing::info;

use super::{Context, read_json, write_json};
use crate::config::ImagesPlan;
use crate::error::{Error, Result};
use crate::output;

/// Images of a piece.
const PIECE: usize = 1024;

/// Features of images, with what the images are.
#[derive(Debug)]
pub(super) struct Features {
    /// `[n, d]` fp32 on the CPU.
    pub(super) x_nd: Tensor,
    /// Of each image.
    pub(super) labels: Vec<Label>,
    /// What they are of.
    pub(super) images: LabelledImages,
}

/// An image by its name and class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Label {
    pub(super) id: String,
    pub(super) class: String,
}

/// The features of a set, read back from `folder` as far as they are there.
///
/// # Errors
/// Those of reading the images; [`Error::Usage`] for an image without a class.
pub(super) fn features(
    context: &Context,
    images: &ImagesPlan,
    name: &str,
    folder: &Path,
) -> Result<Features> {
    let images = open(images, name)?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let preprocessor = context.subject.preprocessor();
    let (mut parts, mut labels) = (Vec::new(), Vec::new());
    for (piece, first) in (0..images.len()).step_by(PIECE).enumerate() {
        let tensors = folder.join(format!("{name}-{piece:05}.safetensors"));
        let names = folder.join(format!("{name}-{piece:05}.json"));
        if !tensors.exists() {
            let last = images.len().min(first + PIECE);
            let mut encoded = Vec::new();
            let mut of_piece = Vec::new();
            for start in (first..last).step_by(context.batch_images) {
                let end = last.min(start + context.batch_images);
                let batch = read(&images, start..end)?;
                let patches = encode(context.subject.vision(), &preprocessor, &batch, context.device)?;
                encoded.push(means(&patches)?);
                of_piece.extend(batch.into_iter().map(|LabelledImage { id, class, .. }| Label { id, class }));
            }
            write_json(&names, &of_piece)?;
            // Last, since it says that the piece is whole.
            let whole = BTreeMap::from([("features".to_owned(), Tensor::f_cat(&encoded, 0)?)]);
            output::replace(&tensors, |partial| Ok(write_safetensors(partial, &whole)?))?;
            info!("`{name}`: {last} of {} images encoded", images.len());
        }
        parts.push(Shards::open(&tensors)?.tensor("features")?);
        labels.extend(read_json::<Vec<Label>>(&names)?);
    }
    let x_nd = Tensor::f_cat(&parts, 0)?;
    if x_nd.f_isfinite()?.f_all()?.int64_value(&[]) == 0 {
        return Err(Error::usage(
            format!("features of `{name}` are not finite"),
            "are the weights of the encoder broken? look at the losses of the run that made them",
        ));
    }
    Ok(Features { x_nd, labels, images })
}

/// The patches `[t, d]` fp32 of each of the images with these numbers, which are encoded together, on the context's device.
pub(super) fn patches(context: &Context, images: &LabelledImages, numbers: &[i64]) -> Result<Vec<Tensor>> {
    let batch = read(images, numbers.iter().map(|number| *number as usize))?;
    encode(context.subject.vision(), &context.subject.preprocessor(), &batch, context.device)
}

fn open(images: &ImagesPlan, name: &str) -> Result<LabelledImages> {
    Ok(match images {
        ImagesPlan::Folder(folder) => LabelledImages::in_folder(folder)?,
        ImagesPlan::Shards(shards) => LabelledImages::in_shards(name, shards)?,
    })
}

fn read(images: &LabelledImages, numbers: impl Iterator<Item = usize>) -> Result<Vec<LabelledImage>> {
    numbers.map(|number| images.read(number).map_err(without_class)).collect()
}

/// Says what to do about a sample that the user has to mend.
fn without_class(error: sail_data::Error) -> Error {
    match error {
        sail_data::Error::Unusable { what, cause } => Error::usage(
            format!("cannot use `{what}`: {cause}"),
            "each sample needs one image and a `.cls` member with the name or number of its class",
        ),
        other => other.into(),
    }
}

/// The mean `[n, d]` of the patches of each image, fp32 on the CPU.
fn means(of_images: &[Tensor]) -> Result<Tensor> {
    let mean = |x_td: &Tensor| Ok(x_td.f_mean_dim([0].as_slice(), false, Kind::Float)?);
    let means = of_images.iter().map(mean).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_stack(&means, 0)?.to_device(Device::Cpu))
}

/// The patches `[t, d]` of each image.
fn encode(
    vision: &Vision,
    preprocessor: &Preprocessor,
    images: &[LabelledImage],
    device: Device,
) -> Result<Vec<Tensor>> {
    let prepared: Vec<_> = images
        .par_iter()
        .map(|image| preprocessor.apply(&image.id, &image.bytes))
        .collect::<sail_data::Result<_>>()?;
    let size = |image: &sail_data::Pixels| [image.height as i64, image.width as i64];
    // Neighbours of one size go through the first layer together.
    let mut batches = Vec::new();
    for alike in prepared.chunk_by(|a, b| size(a) == size(b)) {
        let pixels = alike.iter().flat_map(|image| &image.pixels).copied().collect::<Vec<f32>>();
        let [height, width] = size(&alike[0]);
        batches.push(upload(&pixels, device)?.f_view([alike.len() as i64, 3, height, width])?);
    }
    no_grad(|| {
        let encoded = vision.features(&batches)?;
        let patches: Vec<i64> = encoded.grids.iter().map(|(h, w)| h * w).collect();
        Ok(encoded.x_td.f_split_with_sizes(patches, 0)?)
    })
}
