//! `DINOv2` (Oquab et al. 2023, arXiv 2304.07193): transformers' `Dinov2Model`.
//!
//! Patches behind a class token, + learned positions resampled to the grid in use; pre-norm blocks of
//! attention and GELU MLP with a scale per channel; final layer norm. Called by [`super::Vision`].

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::family::{Geometry, NormKind, Positions, VisionFamily, VisionModel, VitShape};
use super::parts::{
    Common, GELU, Mlp, Patches, attend, behind_class, check_activation, positions_behind_class, side,
};
use crate::attention::Segments;
use crate::blocks::Blocks;
use crate::error::Result;
use crate::keys::Refusal;
use crate::nn::{LayerNorm, Linear};
use crate::params::{Builder, Init};

/// Fields of transformers' `Dinov2Config`, with its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "the fields are those of the published config.json")]
pub(super) struct Dinov2Config {
    /// Width of the residual stream.
    pub(super) hidden_size: i64,
    /// Transformer blocks.
    pub(super) num_hidden_layers: i64,
    /// Attention heads.
    pub(super) num_attention_heads: i64,
    /// Inner width of the MLP in widths of the stream.
    pub(super) mlp_ratio: i64,
    /// `gelu` or `gelu_pytorch_tanh`.
    pub(super) hidden_act: String,
    /// Only 0 is built.
    pub(super) hidden_dropout_prob: f64,
    /// Only 0 is built.
    pub(super) attention_probs_dropout_prob: f64,
    /// Standard deviation of randomly initialised matrices.
    pub(super) initializer_range: f64,
    /// Added to the variance in every layer norm.
    pub(super) layer_norm_eps: f64,
    /// Side in pixels of the images of the position table.
    #[serde(deserialize_with = "side")]
    pub(super) image_size: i64,
    /// Side of a patch in pixels.
    #[serde(deserialize_with = "side")]
    pub(super) patch_size: i64,
    /// Colour channels; only 3 is built.
    pub(super) num_channels: i64,
    /// Bias in the projections to queries, keys and values.
    pub(super) qkv_bias: bool,
    /// What the scales per channel start at.
    pub(super) layerscale_value: f64,
    /// Only 0 is built.
    pub(super) drop_path_rate: f64,
    /// `SwiGLU` in place of the MLP; only false is built.
    pub(super) use_swiglu_ffn: bool,
    /// Of transformers' backbone interface; read and written, without effect.
    pub(super) apply_layernorm: bool,
    /// Of transformers' backbone interface; read and written, without effect.
    pub(super) reshape_hidden_states: bool,
    /// There is an `embeddings.mask_token`, which pre-training used and features do not.
    pub(super) use_mask_token: bool,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            mlp_ratio: 4,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            initializer_range: 0.02,
            layer_norm_eps: 1e-6,
            image_size: 224,
            patch_size: 14,
            num_channels: 3,
            qkv_bias: true,
            layerscale_value: 1.0,
            drop_path_rate: 0.0,
            use_swiglu_ffn: false,
            apply_layernorm: true,
            reshape_hidden_states: true,
            use_mask_token: true,
        }
    }
}

impl VisionFamily for Dinov2Config {
    const MODEL_TYPE: &'static str = "dinov2";
    const ARCHITECTURE: &'static str = "Dinov2Model";
    const IGNORED: &'static [&'static str] = &["classifier."];
    const POSITIONS: Positions =
        Positions { name: "embeddings.position_embeddings", prefix: 1, resampled: true };

    fn geometry(&self) -> Geometry {
        Geometry {
            hidden_size: self.hidden_size,
            num_layers: self.num_hidden_layers,
            image_size: self.image_size,
            patch_size: self.patch_size,
        }
    }

    fn shape(&self) -> VitShape {
        VitShape {
            prefix: 1,
            patch_norm: None,
            heads: self.num_attention_heads,
            norm: NormKind::Layer,
            qk_norm: false,
            inner: self.hidden_size * self.mlp_ratio,
            gated: false,
            layer_scale: true,
            final_norm: Some(NormKind::Layer),
        }
    }

    fn set_image_size(&mut self, px: i64) {
        self.image_size = px;
    }

    fn check(&self) -> std::result::Result<(), Refusal> {
        let common = Common {
            geometry: self.geometry(),
            heads: self.num_attention_heads,
            channels: self.num_channels,
            inner: ("mlp_ratio", self.mlp_ratio),
            positive: vec![
                ("layer_norm_eps", self.layer_norm_eps),
                ("initializer_range", self.initializer_range),
            ],
            dropouts: vec![
                ("hidden_dropout_prob", self.hidden_dropout_prob),
                ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
                ("drop_path_rate", self.drop_path_rate),
            ],
        };
        common.check()?;
        if self.use_swiglu_ffn {
            return Err(("use_swiglu_ffn", "only false, the GELU MLP, is supported".into()));
        }
        check_activation("hidden_act", &self.hidden_act, &GELU)
    }

    fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>> {
        Ok(Box::new(Dinov2::new(self, builder)?))
    }

    fn without_gradient(&self) -> &'static [&'static str] {
        if self.use_mask_token { &["embeddings.mask_token"] } else { &[] }
    }
}

impl Dinov2Config {
    fn init(&self) -> Init {
        Init::TruncNormal(self.initializer_range)
    }

    fn linear(&self, builder: &Builder, inputs: i64, outputs: i64, bias: bool) -> Result<Linear> {
        Linear::new(builder, inputs, outputs, bias, self.init())
    }

    fn norm(&self, builder: &Builder) -> Result<LayerNorm> {
        LayerNorm::new(builder, self.hidden_size, self.layer_norm_eps)
    }
}

/// The model.
struct Dinov2 {
    patches: Patches,
    class_11d: Tensor,
    /// The class token's row first.
    positions_1pd: Tensor,
    blocks: Blocks<Block>,
    norm: LayerNorm,
}

impl Dinov2 {
    fn new(config: &Dinov2Config, builder: &Builder) -> Result<Self> {
        let (d, patch) = (config.hidden_size, config.patch_size);
        let rows = (config.image_size / patch).pow(2) + 1;
        let embeddings = builder.sub("embeddings");
        let convolution = embeddings.sub("patch_embeddings").sub("projection");
        let layers = builder.sub("encoder").sub("layer");
        if config.use_mask_token {
            // Held by the parameters alone: no feature depends on it.
            let _ = embeddings.param("mask_token", &[1, d], Init::Zeros)?;
        }
        Ok(Self {
            patches: Patches::new(&convolution, (d, patch), config.init())?,
            class_11d: embeddings.param("cls_token", &[1, 1, d], config.init())?,
            positions_1pd: embeddings.param("position_embeddings", &[1, rows, d], config.init())?,
            blocks: Blocks::new(&layers, config.num_hidden_layers, |_, builder| Block::new(config, builder))?,
            norm: config.norm(&builder.sub("layernorm"))?,
        })
    }
}

impl VisionModel for Dinov2 {
    fn prefix(&self) -> i64 {
        1
    }

    fn embed(&self, pixels_nchw: &Tensor) -> Tensor {
        let (patches_nsd, grid) = self.patches.forward(pixels_nchw);
        behind_class(&self.class_11d, &patches_nsd) + positions_behind_class(&self.positions_1pd, grid)
    }

    fn encode(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let step = |block: &Block, x_td: &Tensor, images: &Segments| vec![block.forward(x_td, images)];
        let (x_td, _) = self.blocks.forward(x_td, images.clone(), step);
        self.norm.forward(&x_td)
    }
}

/// `x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x))`
struct Block {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: i64,
    scale1_d: Tensor,
    norm2: LayerNorm,
    mlp: Mlp,
    scale2_d: Tensor,
}

impl Block {
    fn new(config: &Dinov2Config, builder: &Builder) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.hidden_size * config.mlp_ratio);
        let attention = builder.sub("attention");
        let projection =
            |name: &str| config.linear(&attention.sub("attention").sub(name), d, d, config.qkv_bias);
        let scale = |name: &str| {
            builder.sub(name).param("lambda1", &[d], Init::Constant(config.layerscale_value as f32))
        };
        Ok(Self {
            norm1: config.norm(&builder.sub("norm1"))?,
            q: projection("query")?,
            k: projection("key")?,
            v: projection("value")?,
            out: config.linear(&attention.sub("output").sub("dense"), d, d, true)?,
            heads: config.num_attention_heads,
            scale1_d: scale("layer_scale1")?,
            norm2: config.norm(&builder.sub("norm2"))?,
            mlp: Mlp::new(&builder.sub("mlp"), (d, inner), &config.hidden_act, config.init())?,
            scale2_d: scale("layer_scale2")?,
        })
    }

    fn forward(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let normed = self.norm1.forward(x_td);
        let [q, k, v] = Linear::forward_together([&self.q, &self.k, &self.v], &normed, None);
        let attended = attend(&q, &k, &v, self.heads, images);
        let x_td = x_td + self.out.forward(&attended) * &self.scale1_d;
        let inner = self.mlp.forward(&self.norm2.forward(&x_td));
        x_td + inner * &self.scale2_d
    }
}
