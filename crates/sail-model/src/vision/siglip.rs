//! `SigLIP` (Zhai et al. 2023, arXiv 2303.15343) and `SigLIP` 2 at a fixed resolution (Tschannen et al. 2025,
//! arXiv 2502.14786), which has the same architecture: transformers' `SiglipVisionModel` without its pooling
//! head.
//!
//! Patches + learned positions, no class token; pre-norm blocks of attention and GELU MLP; final layer norm.
//! Called by [`super::Vision`].

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::Tensor;

use super::family::{Geometry, NormKind, Positions, VisionFamily, VisionModel, VitShape};
use super::parts::{Common, GELU, Mlp, Patches, attend, check_activation, resize_positions, side};
use crate::attention::Segments;
use crate::blocks::Blocks;
use crate::error::Result;
use crate::keys::{Refusal, UnknownKeys};
use crate::nn::{LayerNorm, Linear};
use crate::params::{Builder, Init};

/// Fields of transformers' `SiglipVisionConfig`, with its defaults, and `vision_use_head`, which its class
/// reads where a file has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct SiglipConfig {
    /// Width of the residual stream.
    pub(super) hidden_size: i64,
    /// Inner width of the MLP.
    pub(super) intermediate_size: i64,
    /// Transformer blocks.
    pub(super) num_hidden_layers: i64,
    /// Attention heads.
    pub(super) num_attention_heads: i64,
    /// Colour channels; only 3 is built.
    pub(super) num_channels: i64,
    /// Side in pixels of the images of the position table.
    #[serde(deserialize_with = "side")]
    pub(super) image_size: i64,
    /// Side of a patch in pixels.
    #[serde(deserialize_with = "side")]
    pub(super) patch_size: i64,
    /// `gelu_pytorch_tanh` or `gelu`.
    pub(super) hidden_act: String,
    /// Added to the variance in every layer norm.
    pub(super) layer_norm_eps: f64,
    /// Only 0 is built.
    pub(super) attention_dropout: f64,
    /// Attention pooling behind the final norm; only false is built.
    pub(super) vision_use_head: bool,
}

impl Default for SiglipConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: "gelu_pytorch_tanh".into(),
            layer_norm_eps: 1e-6,
            attention_dropout: 0.0,
            vision_use_head: false,
        }
    }
}

impl VisionFamily for SiglipConfig {
    const MODEL_TYPE: &'static str = "siglip_vision_model";
    const ARCHITECTURE: &'static str = "SiglipVisionModel";
    // The pooling head, and a buffer that older files hold.
    const IGNORED: &'static [&'static str] = &["head.", "embeddings.position_ids"];
    // transformers resamples only where its caller asks for it.
    const POSITIONS: Positions =
        Positions { name: "embeddings.position_embedding.weight", prefix: 0, resampled: false };

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
            prefix: 0,
            patch_norm: None,
            heads: self.num_attention_heads,
            norm: NormKind::Layer,
            qk_norm: false,
            inner: self.intermediate_size,
            gated: false,
            layer_scale: false,
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
            inner: ("intermediate_size", self.intermediate_size),
            positive: vec![("layer_norm_eps", self.layer_norm_eps)],
            dropouts: vec![("attention_dropout", self.attention_dropout)],
        };
        common.check()?;
        if self.vision_use_head {
            let reason = "the pooling head is not supported; set false to use the features before it";
            return Err(("vision_use_head", reason.into()));
        }
        check_activation("hidden_act", &self.hidden_act, &GELU)
    }

    fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>> {
        Ok(Box::new(Siglip::new(self, builder)?))
    }

    /// The head of a published file is passed over, as its text model is.
    fn complete(keys: &mut Map<String, Value>, written_by: UnknownKeys) {
        if written_by == UnknownKeys::Skip {
            keys.insert("vision_use_head".into(), false.into());
        }
    }
}

/// Deviation of a new matrix, that of transformers' Xavier uniform initialisation (Glorot and Bengio 2010).
fn init(inputs: i64, outputs: i64) -> Init {
    Init::TruncNormal((2.0 / (inputs + outputs) as f64).sqrt())
}

/// The model.
struct Siglip {
    patches: Patches,
    positions_pd: Tensor,
    blocks: Blocks<Block>,
    norm: LayerNorm,
}

impl Siglip {
    fn new(config: &SiglipConfig, builder: &Builder) -> Result<Self> {
        let (d, patch) = (config.hidden_size, config.patch_size);
        let rows = (config.image_size / patch).pow(2);
        let (embeddings, layers) = (builder.sub("embeddings"), builder.sub("encoder").sub("layers"));
        let patches_init = Init::TruncNormal((1.0 / (3 * patch * patch) as f64).sqrt());
        let positions_init = Init::Normal((1.0 / d as f64).sqrt());
        Ok(Self {
            patches: Patches::new(&embeddings.sub("patch_embedding"), (d, patch), patches_init)?,
            positions_pd: embeddings.sub("position_embedding").param("weight", &[rows, d], positions_init)?,
            blocks: Blocks::new(&layers, config.num_hidden_layers, |_, builder| Block::new(config, builder))?,
            norm: LayerNorm::new(&builder.sub("post_layernorm"), d, config.layer_norm_eps)?,
        })
    }
}

impl VisionModel for Siglip {
    fn embed(&self, pixels_nchw: &Tensor) -> Tensor {
        let (patches_nsd, grid) = self.patches.forward(pixels_nchw);
        patches_nsd + resize_positions(&self.positions_pd, grid)
    }

    fn encode(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let step = |block: &Block, x_td: &Tensor, images: &Segments| vec![block.forward(x_td, images)];
        let (x_td, _) = self.blocks.forward(x_td, images.clone(), step);
        self.norm.forward(&x_td)
    }
}

/// `x += attention(norm1(x)); x += mlp(norm2(x))`
struct Block {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: i64,
    norm2: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(config: &SiglipConfig, builder: &Builder) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let attention = builder.sub("self_attn");
        let projection = |name: &str| Linear::new(&attention.sub(name), d, d, true, init(d, d));
        let norm = |name: &str| LayerNorm::new(&builder.sub(name), d, config.layer_norm_eps);
        Ok(Self {
            norm1: norm("layer_norm1")?,
            q: projection("q_proj")?,
            k: projection("k_proj")?,
            v: projection("v_proj")?,
            out: projection("out_proj")?,
            heads: config.num_attention_heads,
            norm2: norm("layer_norm2")?,
            mlp: Mlp::new(&builder.sub("mlp"), (d, inner), &config.hidden_act, init(d, inner))?,
        })
    }

    fn forward(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let normed = self.norm1.forward(x_td);
        let [q, k, v] = Linear::forward_together([&self.q, &self.k, &self.v], &normed, None);
        let x_td = x_td + self.out.forward(&attend(&q, &k, &v, self.heads, images));
        let inner = self.mlp.forward(&self.norm2.forward(&x_td));
        x_td + inner
    }
}
