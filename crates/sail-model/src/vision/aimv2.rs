//! `AIMv2` (Fini et al. 2024, arXiv 2411.14402), which SAILViT is: transformers' `Aimv2VisionModel`
//! without its head. Files of Apple's and SAIL's own code are read by [`original_names`].
//!
//! Patches -> `RMSNorm` -> + positions; pre-norm blocks of attention and `SwiGLU`; final `RMSNorm`. No
//! class token. Called by [`super::Vision`].

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::family::{Geometry, NormKind, Positions, VisionFamily, VisionModel, VitShape};
use super::parts::{Common, Patches, Renaming, attend, check_activation, resize_positions, side};
use crate::attention::Segments;
use crate::blocks::Blocks;
use crate::error::Result;
use crate::keys::{Refusal, UnknownKeys};
use crate::nn::{Linear, RmsNorm, swiglu};
use crate::params::{Builder, Init};
use crate::weights::{Layout, Piece, own_names};

/// Fields of transformers' `Aimv2VisionConfig`, with its defaults but for `use_head`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "the fields are those of the published config.json")]
pub(super) struct Aimv2Config {
    /// Width of the residual stream.
    pub(super) hidden_size: i64,
    /// Inner width of the `SwiGLU`.
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
    /// Gate of the `SwiGLU`; only `silu` is built.
    pub(super) hidden_act: String,
    /// Only 0 is built.
    pub(super) attention_dropout: f64,
    /// Added to the mean square in every `RMSNorm`.
    pub(super) rms_norm_eps: f64,
    /// Bias in all four projections of the attention.
    pub(super) qkv_bias: bool,
    /// Bias in the `SwiGLU`.
    pub(super) mlp_bias: bool,
    /// Standard deviation of randomly initialised matrices.
    pub(super) initializer_range: f64,
    /// Attention pooling behind the final norm; only false is built.
    pub(super) use_head: bool,
    /// Computed sine and cosine positions in place of a table.
    pub(super) is_native: bool,
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

impl VisionFamily for Aimv2Config {
    const MODEL_TYPE: &'static str = "aimv2_vision_model";
    const ARCHITECTURE: &'static str = "Aimv2VisionModel";
    const LAYOUTS: &'static [Layout] = &[own_names, original_names];
    // The pooling head of the contrastive variants.
    const IGNORED: &'static [&'static str] = &["head."];
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
            patch_norm: Some(NormKind::Rms),
            heads: self.num_attention_heads,
            norm: NormKind::Rms,
            qk_norm: false,
            inner: self.intermediate_size,
            gated: true,
            layer_scale: false,
            final_norm: Some(NormKind::Rms),
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
                ("rms_norm_eps", self.rms_norm_eps),
                ("initializer_range", self.initializer_range),
            ],
            dropouts: vec![("attention_dropout", self.attention_dropout)],
        };
        common.check()?;
        if self.use_head {
            let reason = "the pooling head is not supported; set false to use the features before it";
            return Err(("use_head", reason.into()));
        }
        if self.is_native && self.hidden_size % 4 != 0 {
            let reason = format!("computed positions need a multiple of 4, is {}", self.hidden_size);
            return Err(("hidden_size", reason));
        }
        check_activation("hidden_act", &self.hidden_act, &["silu"])
    }

    fn build(&self, builder: &Builder) -> Result<Box<dyn VisionModel + Send>> {
        Ok(Box::new(Aimv2::new(self, builder)?))
    }

    /// `aimv2` of Apple's code and `sailvit` of SAIL's, which name the biases otherwise.
    fn from_alias(model_type: &str, keys: &Map<String, Value>) -> Option<Map<String, Value>> {
        if !matches!(model_type, "aimv2" | "sailvit") {
            return None;
        }
        let mut keys = keys.clone();
        let bias = keys.remove("use_bias").unwrap_or(false.into());
        keys.insert("mlp_bias".into(), bias);
        keys.insert("use_head".into(), false.into());
        Some(keys)
    }

    /// transformers' own default is a head, so a file that leaves the key out has one.
    fn complete(keys: &mut Map<String, Value>, written_by: UnknownKeys) {
        keys.entry("use_head").or_insert((written_by == UnknownKeys::Skip).into());
    }

    fn original_layout(&self) -> Option<(Layout, Value)> {
        // SAIL's code has one bias for queries, keys and values, and one for all else.
        let config = json!({
            "architectures": ["SAILViTModel"], "model_type": "sailvit",
            "hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers, "num_attention_heads": self.num_attention_heads,
            "num_channels": self.num_channels, "image_size": self.image_size,
            "patch_size": self.patch_size, "rms_norm_eps": self.rms_norm_eps,
            "attention_dropout": 0.0, "projection_dropout": 0.0,
            "qkv_bias": self.qkv_bias, "use_bias": self.mlp_bias,
        });
        (!self.is_native && self.qkv_bias == self.mlp_bias).then_some((original_names as Layout, config))
    }
}

/// Names in the files of Apple's and SAIL's code.
const ORIGINAL: Renaming = Renaming {
    outside: &[
        ("embeddings.patch_embed.", "preprocessor.patchifier.proj."),
        ("embeddings.rms_norm.", "preprocessor.patchifier.norm."),
        ("rms_norm.", "trunk.post_trunk_norm."),
    ],
    blocks: ("encoder.layers.", "trunk.blocks."),
    inside: &[
        ("attention.out_proj.", "attn.proj."),
        ("ffn.gate_proj.", "mlp.fc1."),
        ("ffn.up_proj.", "mlp.fc3."),
        ("ffn.down_proj.", "mlp.fc2."),
        ("rms_norm1.", "norm_1."),
        ("rms_norm2.", "norm_2."),
    ],
    qkv: (["attention.q_proj.", "attention.k_proj.", "attention.v_proj."], "attn.qkv."),
};

/// [`ORIGINAL`], with `[1, p, d]` positions.
fn original_names(name: &str, shape: &[i64]) -> Vec<Piece> {
    if name == "embeddings.position_embedding.weight" {
        return vec![Piece::whole("preprocessor.pos_embed", &[&[1], shape].concat())];
    }
    ORIGINAL.pieces(name, shape)
}

impl Aimv2Config {
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
struct Aimv2 {
    patches: Patches,
    patch_norm: RmsNorm,
    /// None: computed.
    positions_pd: Option<Tensor>,
    blocks: Blocks<Block>,
    norm: RmsNorm,
}

impl Aimv2 {
    fn new(config: &Aimv2Config, builder: &Builder) -> Result<Self> {
        let (d, patch) = (config.hidden_size, config.patch_size);
        let rows = (config.image_size / patch).pow(2);
        let embeddings = builder.sub("embeddings");
        let layers = builder.sub("encoder").sub("layers");
        let table = || embeddings.sub("position_embedding").param("weight", &[rows, d], config.init());
        Ok(Self {
            patches: Patches::new(&embeddings.sub("patch_embed"), (d, patch), config.init())?,
            patch_norm: config.norm(&embeddings.sub("rms_norm"))?,
            positions_pd: if config.is_native { None } else { Some(table()?) },
            blocks: Blocks::new(&layers, config.num_hidden_layers, |_, builder| Block::new(config, builder))?,
            norm: config.norm(&builder.sub("rms_norm"))?,
        })
    }
}

impl VisionModel for Aimv2 {
    fn embed(&self, pixels_nchw: &Tensor) -> Tensor {
        let (patches_nsd, grid) = self.patches.forward(pixels_nchw);
        let x_nsd = self.patch_norm.forward(&patches_nsd);
        let positions_sd = match &self.positions_pd {
            Some(table_pd) => resize_positions(table_pd, grid),
            None => sincos_positions(grid, x_nsd.size()[2], x_nsd.device()).to_kind(x_nsd.kind()),
        };
        x_nsd + positions_sd
    }

    fn encode(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let step = |block: &Block, x_td: &Tensor, images: &Segments| vec![block.forward(x_td, images)];
        let (x_td, _) = self.blocks.forward(x_td, images.clone(), step);
        self.norm.forward(&x_td)
    }
}

/// `[h * w, d]`: sine and cosine of the column in the first half of the width, of the row in the second,
/// with frequencies `10000^(-4i/d)` (transformers' `Aimv2VisionEmbeddings`); fp32, computed in fp64.
fn sincos_positions((h, w): (i64, i64), d: i64, device: Device) -> Tensor {
    let exact = (Kind::Double, device);
    let exponents = Tensor::arange(d / 4, exact) / (d / 4) as f64;
    let omega = Tensor::pow_scalar(10000.0, &exponents).reciprocal();
    let angles = |places: Tensor| places.outer(&omega);
    let rows = angles(Tensor::arange(h, exact).repeat_interleave_self_int(w, 0, None));
    let columns = angles(Tensor::arange(w, exact).repeat([h]));
    Tensor::cat(&[columns.sin(), columns.cos(), rows.sin(), rows.cos()], 1).to_kind(Kind::Float)
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

    fn forward(&self, x_td: &Tensor, images: &Segments) -> Tensor {
        let normed = self.norm1.forward(x_td);
        let [q, k, v] = Linear::forward_together([&self.q, &self.k, &self.v], &normed, None);
        let x_td = x_td + self.out.forward(&attend(&q, &k, &v, self.heads, images));
        let normed = self.norm2.forward(&x_td);
        let [gate, up] = Linear::forward_together([&self.gate, &self.up], &normed, None);
        x_td + self.down.forward(&swiglu(&gate, &up))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_its_place_in_the_original_layout() {
        let at = |name: &str| {
            let pieces = original_names(name, &[6, 4]);
            let [piece] = &pieces[..] else { panic!("{name}: {pieces:?}") };
            (piece.name.clone(), piece.shape.clone(), piece.elements.clone())
        };
        let whole = |name: &str| (name.to_owned(), vec![6, 4], 0..24);
        let block = "encoder.layers.11.";
        let cases = [
            ("embeddings.patch_embed.weight", whole("preprocessor.patchifier.proj.weight")),
            ("embeddings.patch_embed.bias", whole("preprocessor.patchifier.proj.bias")),
            ("embeddings.rms_norm.weight", whole("preprocessor.patchifier.norm.weight")),
            ("embeddings.position_embedding.weight", ("preprocessor.pos_embed".into(), vec![1, 6, 4], 0..24)),
            ("rms_norm.weight", whole("trunk.post_trunk_norm.weight")),
            ("attention.q_proj.weight", ("trunk.blocks.11.attn.qkv.weight".into(), vec![18, 4], 0..24)),
            ("attention.k_proj.weight", ("trunk.blocks.11.attn.qkv.weight".into(), vec![18, 4], 24..48)),
            ("attention.v_proj.bias", ("trunk.blocks.11.attn.qkv.bias".into(), vec![18, 4], 48..72)),
            ("attention.out_proj.weight", whole("trunk.blocks.11.attn.proj.weight")),
            ("ffn.gate_proj.weight", whole("trunk.blocks.11.mlp.fc1.weight")),
            ("ffn.up_proj.weight", whole("trunk.blocks.11.mlp.fc3.weight")),
            ("ffn.down_proj.bias", whole("trunk.blocks.11.mlp.fc2.bias")),
            ("rms_norm1.weight", whole("trunk.blocks.11.norm_1.weight")),
            ("rms_norm2.weight", whole("trunk.blocks.11.norm_2.weight")),
        ];
        for (name, expected) in cases {
            let in_block = !(name.starts_with("embeddings.") || name.starts_with("rms_norm."));
            let name = if in_block { format!("{block}{name}") } else { name.to_owned() };
            assert_eq!(at(&name), expected, "{name}");
        }
    }

    #[test]
    fn computed_positions_follow_the_formula() {
        let positions = sincos_positions((2, 3), 8, Device::Cpu);
        assert_eq!(positions.size(), [6, 8]);
        // Row 1, column 2 is patch 5; frequencies 1 and 1/100.
        let expected = [2f64, 0.02].map(f64::sin).into_iter().chain([2f64, 0.02].map(f64::cos));
        let expected = expected.chain([1f64, 0.01].map(f64::sin)).chain([1f64, 0.01].map(f64::cos));
        for (i, expected) in expected.enumerate() {
            assert!((positions.double_value(&[5, i as i64]) - expected).abs() < 1e-6, "{i}");
        }
    }
}
