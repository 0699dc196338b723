//! The one place where host data becomes tensors.

use sail_data::{Images, Pack};
use sail_model::vlm::Batch;
use tch::{Device, Tensor};

/// A pack as the model takes it, on `device`.
pub fn to_batch(pack: &Pack, device: Device) -> Batch {
    let _span = sail_torch::span("to device");
    let longs = |values: &[i64]| Tensor::from_slice(values).to_device(device);
    Batch {
        ids_t: longs(&pack.ids),
        positions_t: longs(&pack.positions),
        cu_seqlens: pack.cu_seqlens.clone(),
        images: to_images(&pack.images, device),
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
