//! `InternViT` (Chen et al. 2023, arXiv 2312.14238): transformers' `InternVLVisionModel`. Files of `InternVL`'s
//! own code are read and written by [`ORIGINAL`].
//!
//! Patches behind a class token, + learned positions resampled to the grid in use; pre-norm blocks of
//! attention and GELU MLP with a scale per channel. No final norm unless the class token is the image's
//! feature. Called by [`super::Vision`].

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tch::Tensor;

use super::family::{Geometry, NormKind, Positions, VisionFamily, VisionModel, VitShape};
use super::parts::{
    Common, GELU, Mlp, Patches, Renaming, attend, behind_class, check_activation, positions_behind_class,
    side,
};
use crate::attention::Segments;
use crate::blocks::Blocks;
use crate::error::Result;
use crate::keys::Refusal;
use crate::nn::{LayerNorm, Linear, RmsNorm};
use crate::params::{Builder, Init};
use crate::weights::{Layout, Piece, own_names};

/// Added to the mean square in the norms of queries and keys, whatever `layer_norm_eps` is.
const QK_NORM_EPS: f64 = 1e-6;

/// Fields of transformers' `InternVLVisionConfig`, with its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "the fields are those of the published config.json")]
pub(super) struct InternVitConfig {
    /// Width of the residual stream.
    pub(super) hidden_size: i64,
    /// Transformer blocks.
    pub(super) num_hidden_layers: i64,
    /// Attention heads.
    pub(super) num_attention_heads: i64,
    /// Bias in the projections to queries, keys and values.
    pub(super) attention_bias: bool,
    /// `RMSNorm` of queries and of keys, over the whole width.
    pub(super) use_qk_norm: bool,
    /// Inner width of the MLP.
    pub(super) intermediate_size: i64,
    /// `gelu` or `gelu_pytorch_tanh`.
    pub(super) hidden_act: String,
    /// Only 0 is built.
    pub(super) hidden_dropout_prob: f64,
    /// Only 0 is built.
    pub(super) attention_dropout: f64,
    /// Only 0 is built.
    pub(super) projection_dropout: f64,
    /// Standard deviation of randomly initialised matrices.
    pub(super) initializer_range: f64,
    /// `layer_norm` or `rms_norm`, in the blocks.
    pub(super) norm_type: String,
    /// Added to the variance in the blocks' norms and in the final one.
    pub(super) layer_norm_eps: f64,
    /// Side in pixels of the images of the position table.
    #[serde(deserialize_with = "side")]
    pub(super) image_size: i64,
    /// Side of a patch in pixels.
    #[serde(deserialize_with = "side")]
    pub(super) patch_size: i64,
    /// Colour channels; only 3 is built.
    pub(super) num_channels: i64,
    /// There is an `embeddings.mask_token`, which pre-training used and features do not.
    pub(super) use_mask_token: bool,
    /// There is a position table.
    pub(super) use_absolute_position_embeddings: bool,
    /// What the scales per channel start at.
    pub(super) layer_scale_init_value: f64,
    /// An image's feature is the mean of its patches, so that there is no final norm.
    pub(super) use_mean_pooling: bool,
}

impl Default for InternVitConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            attention_bias: false,
            use_qk_norm: false,
            intermediate_size: 4096,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.0,
            attention_dropout: 0.0,
            projection_dropout: 0.0,
            initializer_range: 0.02,
            norm_type: "layer_norm".into(),
            layer_norm_eps: 1e-6,
            image_size: 448,
            patch_size: 14,
            num_channels: 3,
            use_mask_token: false,
            use_absolute_position_embeddings: true,
            layer_scale_init_value: 0.1,
            use_mean_pooling: true,
        }
    }
}

impl VisionFamily for InternVitConfig {
    const MODEL_TYPE: &'static str = "internvl_vision";
    const ARCHITECTURE: &'static str = "InternVLVisionModel";
    const LAYOUTS: &'static [Layout] = &[own_names, original_names];
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
            norm: self.norm_kind(),
            qk_norm: self.use_qk_norm,
            inner: self.intermediate_size,
            gated: false,
            layer_scale: true,
            final_norm: (!self.use_mean_pooling).then_some(NormKind::Layer),
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
            positive: vec![
                ("layer_norm_eps", self.layer_norm_eps),
                ("initializer_range", self.initializer_range),
            ],
            dropouts: vec![
                ("hidden_dropout_prob", self.hidden_dropout_prob),
                ("attention_dropout", self.attention_dropout),
                ("projection_dropout", self.projection_dropout),
            ],
        };
        common.check()?;
        if !matches!(&self.norm_type[..], "layer_norm" | "rms_norm") {
            let reason = format!("only `layer_norm` and `rms_norm` are supported, is `{}`", self.norm_type);
            return Err(("norm_type", reason));
        }
        check_activation("hidden_act", &self.hidden_act, &GELU)
    }

    fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>> {
        Ok(Box::new(InternVit::new(self, builder)?))
    }

    fn without_gradient(&self) -> &'static [&'static str] {
        if self.use_mask_token { &["embeddings.mask_token"] } else { &[] }
    }

    /// `intern_vit_6b` of `InternVL`'s own code, whose defaults are those of its 6B model. Its
    /// `drop_path_rate` and `use_flash_attn` are left as they are: of no effect in a file.
    fn from_alias(model_type: &str, keys: &Map<String, Value>) -> Option<Map<String, Value>> {
        if model_type != "intern_vit_6b" {
            return None;
        }
        let mut keys = keys.clone();
        for (theirs, ours, default) in [
            ("qkv_bias", "attention_bias", json!(false)),
            ("qk_normalization", "use_qk_norm", json!(true)),
            ("dropout", "projection_dropout", json!(0.0)),
            ("initializer_factor", "layer_scale_init_value", json!(0.1)),
        ] {
            let value = keys.remove(theirs).unwrap_or(default);
            keys.insert(ours.into(), value);
        }
        for (key, default) in [
            ("hidden_size", json!(3200)),
            ("num_attention_heads", json!(25)),
            ("intermediate_size", json!(12800)),
            ("num_hidden_layers", json!(48)),
            ("image_size", json!(224)),
            ("norm_type", json!("rms_norm")),
        ] {
            keys.entry(key).or_insert(default);
        }
        Some(keys)
    }

    fn original_layout(&self) -> Option<(Layout, Value)> {
        let config = json!({
            "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b",
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers, "num_attention_heads": self.num_attention_heads,
            "num_channels": self.num_channels, "image_size": self.image_size,
            "patch_size": self.patch_size, "hidden_act": self.hidden_act, "norm_type": self.norm_type,
            "layer_norm_eps": self.layer_norm_eps, "qkv_bias": self.attention_bias,
            "qk_normalization": self.use_qk_norm, "dropout": 0.0, "attention_dropout": 0.0,
            "drop_path_rate": 0.0, "initializer_range": self.initializer_range,
            "initializer_factor": self.layer_scale_init_value, "use_flash_attn": true,
        });
        // That code has one eps for all norms.
        let one_eps = !self.use_qk_norm || (self.layer_norm_eps - QK_NORM_EPS).abs() < 1e-12;
        let fits = self.use_absolute_position_embeddings && self.use_mean_pooling && !self.use_mask_token;
        (fits && one_eps).then_some((original_names as Layout, config))
    }
}

impl InternVitConfig {
    /// What `norm_type` names.
    fn norm_kind(&self) -> NormKind {
        if self.norm_type == "rms_norm" { NormKind::Rms } else { NormKind::Layer }
    }
}

/// Names in the files of `InternVL`'s own code.
const ORIGINAL: Renaming = Renaming {
    outside: &[
        ("embeddings.cls_token", "embeddings.class_embedding"),
        ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
        ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ],
    blocks: ("encoder.layer.", "encoder.layers."),
    inside: &[
        ("attention.projection_layer.", "attn.proj."),
        ("attention.q_norm.", "attn.q_norm."),
        ("attention.k_norm.", "attn.k_norm."),
        ("lambda_1", "ls1"),
        ("lambda_2", "ls2"),
        ("layernorm_before.", "norm1."),
        ("layernorm_after.", "norm2."),
    ],
    qkv: (["attention.q_proj.", "attention.k_proj.", "attention.v_proj."], "attn.qkv."),
};

fn original_names(name: &str, shape: &[i64]) -> Vec<Piece> {
    ORIGINAL.pieces(name, shape)
}

/// The model.
struct InternVit {
    patches: Patches,
    class_11d: Tensor,
    /// The class token's row first. None: there are no positions.
    positions_1pd: Option<Tensor>,
    blocks: Blocks<Block>,
    norm: Option<LayerNorm>,
}

impl InternVit {
    fn new(config: &InternVitConfig, builder: &Builder) -> Result<Self> {
        let (d, patch) = (config.hidden_size, config.patch_size);
        let rows = (config.image_size / patch).pow(2) + 1;
        let (embeddings, layers) = (builder.sub("embeddings"), builder.sub("encoder").sub("layer"));
        let init = Init::TruncNormal(config.initializer_range);
        if config.use_mask_token {
            // Held by the parameters alone: no feature depends on it.
            let _ = embeddings.param("mask_token", &[1, 1, d], Init::Zeros)?;
        }
        let positions = || embeddings.param("position_embeddings", &[1, rows, d], init);
        let norm = || LayerNorm::new(&builder.sub("layernorm"), d, config.layer_norm_eps);
        Ok(Self {
            patches: Patches::new(&embeddings.sub("patch_embeddings").sub("projection"), (d, patch), init)?,
            class_11d: embeddings.param("cls_token", &[1, 1, d], init)?,
            positions_1pd: config.use_absolute_position_embeddings.then(positions).transpose()?,
            blocks: Blocks::new(&layers, config.num_hidden_layers, |_, builder| Block::new(config, builder))?,
            norm: (!config.use_mean_pooling).then(norm).transpose()?,
        })
    }
}

impl VisionModel for InternVit {
    fn prefix(&self) -> i64 {
        1
    }

    fn embed(&self, pixels_nchw: &Tensor) -> Tensor {
        let (patches_nsd, grid) = self.patches.forward(pixels_nchw);
        let x_nsd = behind_class(&self.class_11d, &patches_nsd);
        match &self.positions_1pd {
            Some(table_1pd) => x_nsd + positions_behind_class(table_1pd, grid),
            None => x_nsd,
        }
    }

    fn encode(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let step = |block: &Block, x_td: &Tensor, images: &Segments| vec![block.forward(x_td, images)];
        let (x_td, _) = self.blocks.forward(x_td, images.clone(), step);
        self.norm.as_ref().map_or(x_td.shallow_clone(), |norm| norm.forward(&x_td))
    }
}

/// The norm that `norm_type` names.
enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    fn new(config: &InternVitConfig, builder: &Builder) -> Result<Self> {
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        Ok(match config.norm_kind() {
            NormKind::Rms => Self::Rms(RmsNorm::new(builder, d, eps)?),
            NormKind::Layer => Self::Layer(LayerNorm::new(builder, d, eps)?),
        })
    }

    fn forward(&self, x_td: &Tensor) -> Tensor {
        match self {
            Self::Layer(norm) => norm.forward(x_td),
            Self::Rms(norm) => norm.forward(x_td),
        }
    }
}

/// `x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x))`
struct Block {
    norm1: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    out: Linear,
    heads: i64,
    scale1_d: Tensor,
    norm2: Norm,
    mlp: Mlp,
    scale2_d: Tensor,
}

impl Block {
    fn new(config: &InternVitConfig, builder: &Builder) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let init = Init::TruncNormal(config.initializer_range);
        let scale_init = Init::Constant(config.layer_scale_init_value as f32);
        let attention = builder.sub("attention");
        let projection = |name: &str, bias| Linear::new(&attention.sub(name), d, d, bias, init);
        let qk_norm = |name: &str| {
            config.use_qk_norm.then(|| RmsNorm::new(&attention.sub(name), d, QK_NORM_EPS)).transpose()
        };
        Ok(Self {
            norm1: Norm::new(config, &builder.sub("layernorm_before"))?,
            q: projection("q_proj", config.attention_bias)?,
            k: projection("k_proj", config.attention_bias)?,
            v: projection("v_proj", config.attention_bias)?,
            q_norm: qk_norm("q_norm")?,
            k_norm: qk_norm("k_norm")?,
            out: projection("projection_layer", true)?,
            heads: config.num_attention_heads,
            scale1_d: builder.param("lambda_1", &[d], scale_init)?,
            norm2: Norm::new(config, &builder.sub("layernorm_after"))?,
            mlp: Mlp::new(&builder.sub("mlp"), (d, inner), &config.hidden_act, init)?,
            scale2_d: builder.param("lambda_2", &[d], scale_init)?,
        })
    }

    fn forward(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let normed = self.norm1.forward(x_td);
        let [q, k, v] = Linear::forward_together([&self.q, &self.k, &self.v], &normed, None);
        let q = self.q_norm.as_ref().map_or(q.shallow_clone(), |norm| norm.forward(&q));
        let k = self.k_norm.as_ref().map_or(k.shallow_clone(), |norm| norm.forward(&k));
        let attended = attend(&q, &k, &v, self.heads, images);
        let x_td = x_td + self.out.forward(&attended) * &self.scale1_d;
        let inner = self.mlp.forward(&self.norm2.forward(&x_td));
        x_td + inner * &self.scale2_d
    }
}
