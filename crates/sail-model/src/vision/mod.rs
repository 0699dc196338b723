//! Vision transformers: pixels in, one feature per patch out.
//!
//! Each family computes what transformers computes for the same config.json and the same tensors,
//! and names its parameters as transformers does. Nothing here knows tiles, text or training.
//! Called by `vlm`, by the trainer and by its `embed` and `export` commands.
//!
//! Dimension letters: n images, t tokens, d width, h and w the grid of patches, p rows of a position
//! table; `nchw` is pixels.

mod aimv2;
mod config;
mod dinov2;
mod export;

use tch::{Kind, Tensor};

pub use aimv2::Aimv2Config;
pub use config::VisionConfig;
pub use dinov2::Dinov2Config;
pub use export::{VisionExport, export, preprocessor_json};

use crate::error::Result;
use crate::params::Builder;

/// A vision transformer.
pub trait VisionModel {
    /// Pixels `[n, 3, h * patch, w * patch]`, normalised, of any float type, to patch features after
    /// the final norm `[n, h * w, hidden]`, rows of the grid first, without a class token.
    ///
    /// # Panics
    /// When the sides are not multiples of the patch.
    fn forward(&self, pixels_nchw: &Tensor) -> Tensor;

    /// What transformers calls `last_hidden_state`: as [`VisionModel::forward`], with the class token
    /// in front where the family has one `[n, tokens, hidden]`.
    fn last_hidden_state(&self, pixels_nchw: &Tensor) -> Tensor;
}

/// Builds the model that `config` describes, with the parameters that `builder` gives.
///
/// # Errors
/// As [`VisionConfig::validate`], and what the builder's source reports.
pub fn build_vision(config: &VisionConfig, builder: &Builder) -> Result<Box<dyn VisionModel + Send>> {
    config.validate()?;
    Ok(match config {
        VisionConfig::Aimv2(config) => Box::new(aimv2::Aimv2::new(config, builder)?),
        VisionConfig::Dinov2(config) => Box::new(dinov2::Dinov2::new(config, builder)?),
    })
}

/// Convolution with stride = kernel: `[n, 3, h * patch, w * patch]` -> `[n, d, h, w]`, in the type of
/// the weight.
fn patchify(pixels_nchw: &Tensor, weight: &Tensor, bias: &Tensor, patch: i64) -> Tensor {
    let (_, _, height, width) = pixels_nchw.size4().expect("invariant: pixels are [n, 3, height, width]");
    assert!(
        height % patch == 0 && width % patch == 0,
        "pixels of {height} x {width} do not divide into patches of {patch}"
    );
    let pixels_nchw = pixels_nchw.to_kind(weight.kind());
    pixels_nchw.conv2d(weight, Some(bias), [patch, patch], [0, 0], [1, 1], 1)
}

/// Every token of an image attends to every other: q, k, v `[n, t, d]` -> `[n, t, d]`, scaled by
/// `1 / sqrt(d / heads)`.
fn attend(q_ntd: &Tensor, k_ntd: &Tensor, v_ntd: &Tensor, heads: i64) -> Tensor {
    let (n, t, d) = q_ntd.size3().expect("invariant: queries are [n, t, d]");
    let split = |x_ntd: &Tensor| x_ntd.view([n, t, heads, d / heads]).transpose(1, 2);
    let (q, k, v) = (split(q_ntd), split(k_ntd), split(v_ntd));
    Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false)
        .transpose(1, 2)
        .reshape([n, t, d])
}

/// The position table of a square grid `[p, d]`, resampled to `h` x `w` patches `[h * w, d]`.
///
/// Bicubic in fp32 without antialiasing or aligned corners, as in transformers'
/// `Dinov2Embeddings.interpolate_pos_encoding`; the table itself where the grid is its own.
fn resize_positions(table_pd: &Tensor, h: i64, w: i64) -> Tensor {
    let (rows, d) = table_pd.size2().expect("invariant: a position table is [p, d]");
    let side = rows.isqrt();
    if (h, w) == (side, side) {
        return table_pd.shallow_clone();
    }
    let grid_1dhw = table_pd.to_kind(Kind::Float).reshape([1, side, side, d]).permute([0, 3, 1, 2]);
    let resized_1dhw = grid_1dhw.upsample_bicubic2d([h, w], false, None, None);
    resized_1dhw.to_kind(table_pd.kind()).permute([0, 2, 3, 1]).reshape([h * w, d])
}
