//! The one place where host data becomes tensors.

use sail_data::{Images, Pack};
use sail_model::vlm::{Batch, Visual, Vlm};
use tch::{Device, Tensor};

use crate::error::Result;
use crate::feature_cache::FeatureCache;

/// What a model is given, and on which device.
#[derive(Clone, Copy)]
pub struct Feed<'a> {
    /// The model.
    pub model: &'a Vlm,
    /// Where it is.
    pub device: Device,
    /// What has the features of images, where its vision transformer need not run.
    pub cache: Option<&'a FeatureCache>,
}

impl Feed<'_> {
    /// A pack as the model takes it.
    ///
    /// # Errors
    /// As [`FeatureCache::features`].
    pub fn batch(&self, pack: &Pack) -> Result<Batch> {
        Ok(with_images(pack, self.images(&pack.images)?, self.device))
    }

    /// Images as the model takes them: their features where there is a cache.
    ///
    /// # Errors
    /// As [`FeatureCache::features`].
    pub fn images(&self, images: &Images) -> Result<Visual> {
        match self.cache {
            Some(cache) if !images.is_empty() => Ok(Visual::Features(cache.features(self.model, images)?)),
            _ => Ok(Visual::Pixels(to_images(images, self.device))),
        }
    }
}

/// A pack as the model takes it, on `device`, its images as pixels.
pub fn to_batch(pack: &Pack, device: Device) -> Batch {
    with_images(pack, Visual::Pixels(to_images(&pack.images, device)), device)
}

fn with_images(pack: &Pack, images: Visual, device: Device) -> Batch {
    let _span = sail_torch::span("to device");
    let longs = |values: &[i64]| Tensor::from_slice(values).to_device(device);
    Batch {
        ids_t: longs(&pack.ids),
        positions_t: longs(&pack.positions),
        cu_seqlens: pack.cu_seqlens.clone(),
        images,
        images_per_sequence: pack.images_per_sample.clone(),
        image_rows: pack.image_rows.clone(),
        names: pack.samples.iter().map(ToString::to_string).collect(),
        targets_t: longs(&pack.targets),
        weights_t: Tensor::from_slice(&pack.weights).to_device(device),
    }
}

/// Neighbours of one size as one batch of images `[n, 3, height, width]`, fp32; none without any.
pub fn to_images(images: &Images, device: Device) -> Vec<Tensor> {
    let batch = |(n, (height, width), pixels): (usize, (usize, usize), &[f32])| {
        Tensor::from_slice(pixels).reshape([n as i64, 3, height as i64, width as i64]).to_device(device)
    };
    images.batches().map(batch).collect()
}
