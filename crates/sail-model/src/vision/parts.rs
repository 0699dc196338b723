//! What the families share: patches, attention within images, position tables for any grid, and checks
//! of configurations.
//!
//! Called by the families' files. Dimension letters as in [`super`].

use serde::{Deserialize, Deserializer};
use tch::{Kind, Tensor};

use super::family::Refusal;
use crate::attention::{Segments, Visibility, packed_attention};

/// Convolution with stride = kernel: `[n, 3, h * patch, w * patch]` -> patches `[n, h * w, d]`, rows of the
/// grid first, and `(h, w)`; in the type of the weight.
pub(super) fn patchify(pixels_nchw: &Tensor, weight: &Tensor, bias: &Tensor) -> (Tensor, (i64, i64)) {
    let patch = weight.size()[3];
    let pixels_nchw = pixels_nchw.to_kind(weight.kind());
    let patches_ndhw = pixels_nchw.conv2d(weight, Some(bias), [patch, patch], [0, 0], [1, 1], 1);
    let (_, _, h, w) = patches_ndhw.size4().expect("invariant: a convolution gives [n, d, h, w]");
    (patches_ndhw.flatten(2, 3).transpose(1, 2), (h, w))
}

/// Every token of an image attends to every other: q, k, v `[t, d]` -> `[t, d]`, scaled by
/// `1 / sqrt(d / heads)`.
pub(super) fn attend(q_td: &Tensor, k_td: &Tensor, v_td: &Tensor, heads: i64, images: &Segments) -> Tensor {
    let (t, d) = q_td.size2().expect("invariant: queries are [t, d]");
    let split = |x_td: &Tensor| x_td.view([t, heads, d / heads]);
    packed_attention(&split(q_td), &split(k_td), &split(v_td), images, Visibility::Full).reshape([t, d])
}

/// The position table of a square grid `[p, d]`, resampled to `h` x `w` patches `[h * w, d]`.
///
/// Bicubic in fp32 without antialiasing or aligned corners, as in transformers'
/// `Dinov2Embeddings.interpolate_pos_encoding`; the table itself where the grid is its own.
pub(super) fn resize_positions(table_pd: &Tensor, (h, w): (i64, i64)) -> Tensor {
    let (rows, d) = table_pd.size2().expect("invariant: a position table is [p, d]");
    let side = rows.isqrt();
    if (h, w) == (side, side) {
        return table_pd.shallow_clone();
    }
    let grid_1dhw = table_pd.to_kind(Kind::Float).reshape([1, side, side, d]).permute([0, 3, 1, 2]);
    let resized_1dhw = grid_1dhw.upsample_bicubic2d([h, w], false, None, None);
    resized_1dhw.to_kind(table_pd.kind()).permute([0, 2, 3, 1]).reshape([h * w, d])
}

/// What every family asks of the fields they share.
pub(super) struct Common {
    /// Must be at least 1.
    pub(super) positive: Vec<(&'static str, i64)>,
    pub(super) heads: i64,
    pub(super) channels: i64,
    pub(super) hidden: i64,
    pub(super) image: i64,
    pub(super) patch: i64,
    pub(super) eps: (&'static str, f64),
    pub(super) initializer_range: f64,
    /// Dropout rates; only 0 is built.
    pub(super) dropouts: Vec<(&'static str, f64)>,
}

impl Common {
    pub(super) fn check(&self) -> Result<(), Refusal> {
        if let Some((key, value)) = self.positive.iter().find(|(_, value)| *value < 1) {
            return Err((key, format!("must be at least 1, is {value}")));
        }
        if let Some((key, value)) = self.dropouts.iter().find(|(_, rate)| *rate != 0.0) {
            return Err((key, format!("only 0 is supported, is {value}")));
        }
        let Self { hidden, heads, image, patch, eps: (eps_key, eps), .. } = self;
        let checks = [
            (self.channels == 3, "num_channels", format!("images have 3 channels, is {}", self.channels)),
            (
                hidden % heads == 0,
                "num_attention_heads",
                format!("{heads} does not divide the width {hidden}"),
            ),
            (image >= patch, "image_size", format!("{image} is smaller than a patch of {patch}")),
            (*eps > 0.0, *eps_key, format!("must be positive, is {eps}")),
            (
                self.initializer_range > 0.0,
                "initializer_range",
                format!("must be positive, is {}", self.initializer_range),
            ),
        ];
        match checks.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, key, reason)) => Err((key, reason)),
        }
    }
}

/// Refuses an activation that is not `built`.
pub(super) fn check_activation(key: &'static str, found: &str, built: &[&str]) -> Result<(), Refusal> {
    if built.contains(&found) {
        return Ok(());
    }
    Err((key, format!("only `{}` is supported, is `{found}`", built.join("` and `"))))
}

/// A side in pixels: `448`, or `[448, 448]` as transformers also allows.
pub(super) fn side<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Side {
        One(i64),
        Two([i64; 2]),
    }
    match Side::deserialize(deserializer) {
        Ok(Side::One(side)) => Ok(side),
        Ok(Side::Two([height, width])) if height == width => Ok(height),
        Ok(Side::Two(sides)) => Err(serde::de::Error::custom(format!("{sides:?} is not square"))),
        Err(_) => Err(serde::de::Error::custom("must be a number of pixels or a pair of equal ones")),
    }
}
