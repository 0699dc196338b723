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
        pixels_nchw: to_pixels(&pack.tiles, device),
        image_rows_v: longs(&pack.image_rows),
        targets_t: longs(&pack.targets),
        weights_t: Tensor::from_slice(&pack.weights).to_device(device),
    }
}

/// Tiles as `[n, 3, px, px]`, fp32; `None` without any.
pub fn to_pixels(tiles: &Tiles, device: Device) -> Option<Tensor> {
    let px = tiles.px as i64;
    (tiles.n > 0)
        .then(|| Tensor::from_slice(&tiles.pixels).reshape([tiles.n as i64, 3, px, px]).to_device(device))
}
