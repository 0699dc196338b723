//! `AIMv2` (Fini et al. 2024) in transformers' layout, `Aimv2VisionModel` without its head.
//!
//! Patches -> `RMSNorm` -> + learned positions; pre-norm blocks of attention and `SwiGLU`; final
//! `RMSNorm`. No class token. Called by [`super::build_vision`].

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::config::{Common, Refusal, side};
use super::{VisionModel, attend, patchify, resize_positions};
use crate::error::Result;
use crate::nn::{Linear, RmsNorm};
use crate::params::{Builder, Init};

/// Fields of transformers' `Aimv2VisionConfig`, with its defaults but for `use_head`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "the fields are those of the published config.json")]
pub struct Aimv2Config {
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Inner width of the `SwiGLU`.
    pub intermediate_size: i64,
    /// Transformer blocks.
    pub num_hidden_layers: i64,
    /// Attention heads.
    pub num_attention_heads: i64,
    /// Colour channels; only 3 is built.
    pub num_channels: i64,
    /// Side in pixels of the images of the position table.
    #[serde(deserialize_with = "side")]
    pub image_size: i64,
    /// Side of a patch in pixels.
    #[serde(deserialize_with = "side")]
    pub patch_size: i64,
    /// Gate of the `SwiGLU`; only `silu` is built.
    pub hidden_act: String,
    /// Only 0 is built.
    pub attention_dropout: f64,
    /// Added to the mean square in every `RMSNorm`.
    pub rms_norm_eps: f64,
    /// Bias in all four projections of the attention.
    pub qkv_bias: bool,
    /// Bias in the `SwiGLU`.
    pub mlp_bias: bool,
    /// Standard deviation of randomly initialised matrices.
    pub initializer_range: f64,
    /// Attention pooling behind the final norm; only false is built.
    pub use_head: bool,
    /// Computed sine and cosine positions in place of a table; only false is built.
    pub is_native: bool,
}

impl Default for Aimv2Config {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 2816,
            num_hidden_layers: 24,
            num_attention_heads: 8,
            num_channels: 3,
            image_size: 224,
            patch_size: 14,
            hidden_act: "silu".into(),
            attention_dropout: 0.0,
            rms_norm_eps: 1e-5,
            qkv_bias: false,
            mlp_bias: false,
            initializer_range: 0.02,
            use_head: false,
            is_native: false,
        }
    }
}

impl Aimv2Config {
    pub(super) const MODEL_TYPE: &str = "aimv2_vision_model";

    pub(super) fn check(&self) -> std::result::Result<(), Refusal> {
        let common = Common {
            positive: vec![
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_hidden_layers", self.num_hidden_layers),
                ("num_attention_heads", self.num_attention_heads),
                ("image_size", self.image_size),
                ("patch_size", self.patch_size),
            ],
            heads: self.num_attention_heads,
            channels: self.num_channels,
            hidden: self.hidden_size,
            image: self.image_size,
            patch: self.patch_size,
            eps: ("rms_norm_eps", self.rms_norm_eps),
            initializer_range: self.initializer_range,
            dropouts: vec![("attention_dropout", self.attention_dropout)],
        };
        common.check()?;
        if self.use_head {
            let reason = "the pooling head is not supported; set false to use the features before it";
            return Err(("use_head", reason.into()));
        }
        if self.is_native {
            return Err(("is_native", "only false, the learned position table, is supported".into()));
        }
        if self.hidden_act != "silu" {
            return Err(("hidden_act", format!("only `silu` is supported, is `{}`", self.hidden_act)));
        }
        Ok(())
    }

    fn init(&self) -> Init {
        Init::TruncNormal(self.initializer_range)
    }

    fn linear(&self, builder: &Builder, inputs: i64, outputs: i64, bias: bool) -> Result<Linear> {
        Linear::new(builder, inputs, outputs, bias, self.init())
    }

    fn norm(&self, builder: &Builder) -> Result<RmsNorm> {
        RmsNorm::new(builder, self.hidden_size, self.rms_norm_eps)
    }
}

/// The model.
pub(super) struct Aimv2 {
    patch_weight: Tensor,
    patch_bias: Tensor,
    patch_size: i64,
    patch_norm: RmsNorm,
    positions_pd: Tensor,
    blocks: Vec<Block>,
    norm: RmsNorm,
}

impl Aimv2 {
    pub(super) fn new(config: &Aimv2Config, builder: &Builder) -> Result<Self> {
        let (d, patch) = (config.hidden_size, config.patch_size);
        let rows = (config.image_size / patch).pow(2);
        let embeddings = builder.sub("embeddings");
        let convolution = embeddings.sub("patch_embed");
        let layers = builder.sub("encoder").sub("layers");
        Ok(Self {
            patch_weight: convolution.param("weight", &[d, 3, patch, patch], config.init())?,
            patch_bias: convolution.param("bias", &[d], Init::Zeros)?,
            patch_size: patch,
            patch_norm: config.norm(&embeddings.sub("rms_norm"))?,
            positions_pd: embeddings.sub("position_embedding").param("weight", &[rows, d], config.init())?,
            blocks: (0..config.num_hidden_layers)
                .map(|i| Block::new(config, &layers.sub(i)))
                .collect::<Result<_>>()?,
            norm: config.norm(&builder.sub("rms_norm"))?,
        })
    }
}

impl VisionModel for Aimv2 {
    fn forward(&self, pixels_nchw: &Tensor) -> Tensor {
        let patches_ndhw = patchify(pixels_nchw, &self.patch_weight, &self.patch_bias, self.patch_size);
        let (_, _, h, w) = patches_ndhw.size4().expect("invariant: a convolution gives [n, d, h, w]");
        let x_ntd = self.patch_norm.forward(&patches_ndhw.flatten(2, 3).transpose(1, 2));
        let x_ntd = x_ntd + resize_positions(&self.positions_pd, h, w);
        let x_ntd = self.blocks.iter().fold(x_ntd, |x_ntd, block| block.forward(&x_ntd));
        self.norm.forward(&x_ntd)
    }

    fn last_hidden_state(&self, pixels_nchw: &Tensor) -> Tensor {
        self.forward(pixels_nchw)
    }
}

/// `x += attention(norm1(x)); x += ffn(norm2(x))`
struct Block {
    norm1: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: i64,
    norm2: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(config: &Aimv2Config, builder: &Builder) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let (attention, ffn) = (builder.sub("attention"), builder.sub("ffn"));
        let projection = |name: &str| config.linear(&attention.sub(name), d, d, config.qkv_bias);
        Ok(Self {
            norm1: config.norm(&builder.sub("rms_norm1"))?,
            q: projection("q_proj")?,
            k: projection("k_proj")?,
            v: projection("v_proj")?,
            out: projection("out_proj")?,
            heads: config.num_attention_heads,
            norm2: config.norm(&builder.sub("rms_norm2"))?,
            gate: config.linear(&ffn.sub("gate_proj"), d, inner, config.mlp_bias)?,
            up: config.linear(&ffn.sub("up_proj"), d, inner, config.mlp_bias)?,
            down: config.linear(&ffn.sub("down_proj"), inner, d, config.mlp_bias)?,
        })
    }

    fn forward(&self, x_ntd: &Tensor) -> Tensor {
        let normed = self.norm1.forward(x_ntd);
        let (q, k, v) = (self.q.forward(&normed), self.k.forward(&normed), self.v.forward(&normed));
        let x_ntd = x_ntd + self.out.forward(&attend(&q, &k, &v, self.heads));
        let normed = self.norm2.forward(&x_ntd);
        let inner = self.gate.forward(&normed).silu() * self.up.forward(&normed);
        x_ntd + self.down.forward(&inner)
    }
}
