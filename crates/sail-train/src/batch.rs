//! The one place where host data becomes tensors.

use sail_data::{Pack, Tiles};
use sail_model::vlm::Batch;
use tch::{Device, Tensor};

/// A pack as the model takes it, on `device`.
pub fn to_batch(pack: &Pack, device: Device) -> Batch {
    let longs = |values: &[i64]| Tensor::from_slice(values).to_device(device);
    Batch {
        ids_t: longs(&pack.ids),
        positions_t: longs(&pack.positions),
        cu_seqlens: pack.cu_seqlens.clone(),
        images: to_images(&pack.tiles, device),
        images_per_sequence: pack.tiles_per_sample.clone(),
        image_rows: pack.image_rows.clone(),
        names: pack.samples.iter().map(ToString::to_string).collect(),
        targets_t: longs(&pack.targets),
        weights_t: Tensor::from_slice(&pack.weights).to_device(device),
    }
}

/// Tiles as one batch of images `[n, 3, px, px]`, fp32; none without any.
pub fn to_images(tiles: &Tiles, device: Device) -> Vec<Tensor> {
    if tiles.n == 0 {
        return Vec::new();
    }
    let px = tiles.px as i64;
    vec![Tensor::from_slice(&tiles.pixels).reshape([tiles.n as i64, 3, px, px]).to_device(device)]
}
