//! The one place where host data becomes tensors.

use std::collections::VecDeque;

use sail_data::{Images, Pack};
use sail_model::vision::Features;
use sail_model::vlm::{Batch, Visual, Vlm};
use sail_torch::upload;
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

impl<'a> Feed<'a> {
    /// A pack as the model takes it.
    ///
    /// # Errors
    /// As [`FeatureCache::features`].
    pub fn batch(&self, pack: &Pack) -> Result<Batch> {
        with_images(pack, self.images(&pack.images)?, self.device)
    }

    /// Packs as the model takes them, in their order. A vision transformer that is not trained encodes the images of several
    /// packs together, without a graph: of one at least, and of those that follow it while they have no more than
    /// `vision_images` together.
    pub fn batches(&self, packs: &'a [Pack], vision_images: usize) -> Batches<'a> {
        let ahead = (self.cache.is_none() && !self.model.trains("vision")).then_some(vision_images);
        Batches { feed: *self, packs, ahead, encoded: VecDeque::new() }
    }

    /// Images as the model takes them: their features where there is a cache.
    ///
    /// # Errors
    /// As [`FeatureCache::features`].
    pub fn images(&self, images: &Images) -> Result<Visual> {
        match self.cache {
            Some(cache) if !images.is_empty() => Ok(Visual::Features(cache.features(self.model, images)?)),
            _ => Ok(Visual::Pixels(to_images([images], self.device)?)),
        }
    }
}

/// See [`Feed::batches`].
pub struct Batches<'a> {
    feed: Feed<'a>,
    /// Those that are still to come.
    packs: &'a [Pack],
    /// Most images that are encoded together; None where each pack's are a part of its own forward pass.
    ahead: Option<usize>,
    /// Features of the first of `packs`.
    encoded: VecDeque<Features>,
}

impl Batches<'_> {
    /// The next one; None after the last.
    ///
    /// # Errors
    /// As [`Feed::batch`] and [`Vlm::encode`].
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let Some((pack, rest)) = self.packs.split_first() else { return Ok(None) };
        let Feed { model, device, .. } = self.feed;
        let batch = match self.ahead {
            Some(most) if !pack.images.is_empty() => {
                if self.encoded.is_empty() {
                    self.encoded = encode(model, device, together(self.packs, most))?.into();
                }
                let features = self.encoded.pop_front().expect("invariant: one for each pack with images");
                with_images(pack, Visual::Features(features), device)?
            }
            _ => self.feed.batch(pack)?,
        };
        self.packs = rest;
        Ok(Some(batch))
    }
}

/// The first of some packs, and those after it whose images may be encoded with its own.
fn together(packs: &[Pack], most: usize) -> &[Pack] {
    let mut images = 0;
    let fits = |pack: &&Pack| {
        images += pack.images.len();
        images <= most
    };
    let fitting = packs.iter().take_while(fits).count();
    &packs[..fitting.max(1)]
}

/// Features of those packs that have images.
fn encode(model: &Vlm, device: Device, packs: &[Pack]) -> Result<Vec<Features>> {
    let images: Vec<&Images> =
        packs.iter().map(|pack| &pack.images).filter(|images| !images.is_empty()).collect();
    let pixels = to_images(images.iter().copied(), device)?;
    let counts: Vec<usize> = images.iter().map(|images| images.len()).collect();
    Ok(model.encode(&pixels)?.split(&counts)?)
}

/// A pack as the model takes it, on `device`, its images as pixels.
///
/// # Errors
/// Those of libtorch.
pub fn to_batch(pack: &Pack, device: Device) -> Result<Batch> {
    with_images(pack, Visual::Pixels(to_images([&pack.images], device)?), device)
}

fn with_images(pack: &Pack, images: Visual, device: Device) -> Result<Batch> {
    let _span = sail_torch::span("to device");
    Ok(Batch {
        ids_t: upload(&pack.ids, device)?,
        positions_t: upload(&pack.positions, device)?,
        cu_seqlens: pack.cu_seqlens.clone(),
        images,
        images_per_sequence: pack.images_per_sample.clone(),
        image_rows: pack.image_rows.clone(),
        names: pack.samples.iter().map(ToString::to_string).collect(),
        targets: pack.targets.clone(),
        weights: pack.weights.clone(),
    })
}

/// Neighbours of one size as one batch of images `[n, 3, height, width]`, fp32; none without any.
///
/// # Errors
/// Those of libtorch.
pub fn to_images<'a>(images: impl IntoIterator<Item = &'a Images>, device: Device) -> Result<Vec<Tensor>> {
    let _span = sail_torch::span("to device");
    let batch = |(n, (height, width), pixels): (usize, (usize, usize), &[f32])| {
        Ok(upload(pixels, device)?.f_view([n as i64, 3, height as i64, width as i64])?)
    };
    images.into_iter().flat_map(Images::batches).map(batch).collect()
}

#[cfg(test)]
mod tests {
    use sail_data::Sample;

    use super::*;

    #[test]
    fn packs_are_encoded_together_while_their_images_are_few() {
        let pack = |images: usize| Pack {
            images: Images { sizes: vec![(1, 1); images], pixels: vec![0.0; 3 * images] },
            ..Pack::collate::<Sample>(&[])
        };
        let packs = [3, 0, 2, 4, 9, 1].map(pack);
        let counts = |from: usize, most| together(&packs[from..], most).len();
        assert_eq!([5, 8, 9, 100].map(|most| counts(0, most)), [3, 3, 4, 6]);
        assert_eq!(counts(0, 2), 1, "a pack alone has more than are asked for");
        assert_eq!((counts(4, 9), counts(4, 10)), (1, 2));
    }
}
