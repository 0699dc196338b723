//! What the families share: patches, attention within images, position tables for any grid, layouts that
//! rename, and checks of configurations.
//!
//! Called by the families' files. Dimension letters as in [`super`].

use serde::{Deserialize, Deserializer};
use tch::{Kind, Tensor};

use super::family::Geometry;
use crate::attention::{Segments, Visibility, packed_attention};
use crate::error::Result;
use crate::keys::{Refusal, check_sizes};
use crate::nn::Linear;
use crate::params::{Builder, Init};
use crate::weights::{Piece, own_names};

/// The convolution with stride = kernel that makes patches.
pub(super) struct Patches {
    weight_dcpp: Tensor,
    bias_d: Tensor,
}

impl Patches {
    /// Takes `weight` `[d, 3, patch, patch]`, started by `init`, and `bias` `[d]`, started at zero.
    pub(super) fn new(builder: &Builder, (d, patch): (i64, i64), init: Init) -> Result<Self> {
        let weight_dcpp = builder.param("weight", &[d, 3, patch, patch], init)?;
        Ok(Self { weight_dcpp, bias_d: builder.param("bias", &[d], Init::Zeros)? })
    }

    /// `[n, 3, height, width]` of any float type -> patches `[n, h * w, d]` of the weight's, rows of the grid
    /// first, and `(h, w)`. Pixels right of the last whole patch and below it are left out.
    pub(super) fn forward(&self, pixels_nchw: &Tensor) -> (Tensor, (i64, i64)) {
        let patch = self.weight_dcpp.size()[3];
        let pixels_nchw = pixels_nchw.to_kind(self.weight_dcpp.kind());
        let stride = [patch, patch];
        let patches_ndhw =
            pixels_nchw.conv2d(&self.weight_dcpp, Some(&self.bias_d), stride, [0, 0], [1, 1], 1);
        let (_, _, h, w) = patches_ndhw.size4().expect("invariant: a convolution gives [n, d, h, w]");
        (patches_ndhw.flatten(2, 3).transpose(1, 2), (h, w))
    }
}

/// Puts the class token `[1, 1, d]` before the patches `[n, s, d]` of every image.
pub(super) fn behind_class(class_11d: &Tensor, patches_nsd: &Tensor) -> Tensor {
    let class_n1d = class_11d.expand([patches_nsd.size()[0], -1, -1], false);
    Tensor::cat(&[class_n1d, patches_nsd.shallow_clone()], 1)
}

/// The rows of a table `[1, 1 + p, d]` for the class token and a grid `[1 + h * w, d]`, as
/// [`resize_positions`].
pub(super) fn positions_behind_class(table_1pd: &Tensor, grid: (i64, i64)) -> Tensor {
    let table_pd = table_1pd.squeeze_dim(0);
    let rows = table_pd.size()[0];
    let patches_pd = resize_positions(&table_pd.narrow(0, 1, rows - 1), grid);
    Tensor::cat(&[table_pd.narrow(0, 0, 1), patches_pd], 0)
}

/// Every token of an image attends to every other: q, k, v `[t, d]` -> `[t, d]`, scaled by
/// `1 / sqrt(d / heads)`.
pub(super) fn attend(q_td: &Tensor, k_td: &Tensor, v_td: &Tensor, heads: i64, images: &Segments) -> Tensor {
    let (t, d) = q_td.size2().expect("invariant: queries are [t, d]");
    let split = |x_td: &Tensor| x_td.view([t, heads, d / heads]);
    packed_attention(&split(q_td), &split(k_td), &split(v_td), images, Visibility::Full).reshape([t, d])
}

/// `fc2(gelu(fc1(x)))`
pub(super) struct Mlp {
    fc1: Linear,
    fc2: Linear,
    /// libtorch's name of the approximation.
    gelu: &'static str,
}

impl Mlp {
    /// Takes `fc1` and `fc2` with biases, for widths `d` and `inner` and an activation that
    /// [`check_activation`] found to be one of [`GELU`].
    pub(super) fn new(builder: &Builder, (d, inner): (i64, i64), act: &str, init: Init) -> Result<Self> {
        Ok(Self {
            fc1: Linear::new(&builder.sub("fc1"), d, inner, true, init)?,
            fc2: Linear::new(&builder.sub("fc2"), inner, d, true, init)?,
            gelu: if act == "gelu_pytorch_tanh" { "tanh" } else { "none" },
        })
    }

    /// `[t, d]` -> `[t, d]`
    pub(super) fn forward(&self, x_td: &Tensor) -> Tensor {
        self.fc2.forward(&self.fc1.forward(x_td).gelu(self.gelu))
    }
}

/// What transformers calls the GELU (Hendrycks and Gimpel 2016) and its approximation by a tanh.
pub(super) const GELU: [&str; 2] = ["gelu", "gelu_pytorch_tanh"];

/// The position table of a square grid `[p, d]`, resampled to `h` x `w` patches `[h * w, d]`.
///
/// Bicubic in fp32 without antialiasing or aligned corners, as in transformers'
/// `interpolate_pos_encoding`; the table itself where the grid is its own.
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

/// Another layout of the same tensors: names begin otherwise, and every block holds queries, keys and
/// values in one matrix.
pub(super) struct Renaming {
    /// How names outside the blocks begin, here and there.
    pub(super) outside: &'static [(&'static str, &'static str)],
    /// What is before the number of a block, here and there.
    pub(super) blocks: (&'static str, &'static str),
    /// How names inside a block begin, here and there.
    pub(super) inside: &'static [(&'static str, &'static str)],
    /// How the names of queries, keys and values begin here, and that of their matrix there.
    pub(super) qkv: ([&'static str; 3], &'static str),
}

impl Renaming {
    /// The pieces of a tensor; a name that is in no table keeps its end.
    pub(super) fn pieces(&self, name: &str, shape: &[i64]) -> Vec<Piece> {
        let renamed = |name: &str, table: &[(&str, &str)]| {
            table.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)))
        };
        let (ours, theirs) = self.blocks;
        let Some((block, rest)) = name.strip_prefix(ours).and_then(|rest| rest.split_once('.')) else {
            return own_names(&renamed(name, self.outside).unwrap_or(name.to_owned()), shape);
        };
        let (parts, whole) = self.qkv;
        let part = parts.iter().zip(0..).find_map(|(ours, index)| Some((rest.strip_prefix(ours)?, index)));
        if let Some((kind, index)) = part {
            return vec![Piece::part(format!("{theirs}{block}.{whole}{kind}"), shape, index, 3)];
        }
        let rest = renamed(rest, self.inside).unwrap_or(rest.to_owned());
        own_names(&format!("{theirs}{block}.{rest}"), shape)
    }
}

/// What every family asks of the fields they share.
pub(super) struct Common {
    pub(super) geometry: Geometry,
    pub(super) heads: i64,
    pub(super) channels: i64,
    /// Inner width of the MLP, or the field that gives it; must be at least 1.
    pub(super) inner: (&'static str, i64),
    /// Must be positive.
    pub(super) positive: Vec<(&'static str, f64)>,
    /// Dropout rates; only 0 is built.
    pub(super) dropouts: Vec<(&'static str, f64)>,
}

impl Common {
    pub(super) fn check(&self) -> std::result::Result<(), Refusal> {
        let Geometry { hidden_size: hidden, num_layers, image_size: image, patch_size: patch } =
            self.geometry;
        check_sizes(&[
            ("hidden_size", hidden),
            self.inner,
            ("num_hidden_layers", num_layers),
            ("num_attention_heads", self.heads),
            ("image_size", image),
            ("patch_size", patch),
        ])?;
        if let Some((key, value)) = self.dropouts.iter().find(|(_, rate)| *rate != 0.0) {
            return Err((key, format!("only 0 is supported, is {value}")));
        }
        if let Some((key, value)) = self.positive.iter().find(|(_, value)| *value <= 0.0) {
            return Err((key, format!("must be positive, is {value}")));
        }
        if self.channels != 3 {
            return Err(("num_channels", format!("images have 3 channels, is {}", self.channels)));
        }
        if hidden % self.heads != 0 {
            return Err((
                "num_attention_heads",
                format!("{} does not divide the width {hidden}", self.heads),
            ));
        }
        if image < patch {
            return Err(("image_size", format!("{image} is smaller than a patch of {patch}")));
        }
        Ok(())
    }
}

/// Refuses an activation that is not `built`.
pub(super) fn check_activation(
    key: &'static str,
    found: &str,
    built: &[&str],
) -> std::result::Result<(), Refusal> {
    if built.contains(&found) {
        return Ok(());
    }
    Err((key, format!("only `{}` is supported, is `{found}`", built.join("` and `"))))
}

/// A side in pixels: `448`, or `[448, 448]` as transformers also allows.
pub(super) fn side<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<i64, D::Error> {
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
