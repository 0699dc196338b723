//! The decoder block that all families share, and its two halves.
//!
//! Parameters have the names of Hugging Face's `model.layers.N`. Not the whole model: embedding,
//! last norm and head are [`super::Llm`]'s.
//!
//! Dimension letters: t rows of the pack, d model width, n query heads, m key and value heads, h head
//! width.

use tch::Tensor;

use super::cache::LayerCaches;
use super::config::DecoderConfig;
use super::family::DecoderShape;
use super::moe::{Routing, SparseMlp};
use super::rotary::Rotation;
use crate::attention::{Segments, Visibility, cached_attention, concatenated, packed_attention};
use crate::error::Result;
use crate::nn::{Linear, RmsNorm, swiglu};
use crate::params::{Builder, Init};

/// One block: `x += attention(norm(x))`, `x += mlp(norm(x))`.
pub(super) struct DecoderBlock {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

enum Mlp {
    Dense(SwiGlu),
    Sparse(SparseMlp),
}

impl DecoderBlock {
    pub(super) fn new(decoder: &DecoderConfig, shape: DecoderShape, builder: &Builder) -> Result<Self> {
        let norm = |name| RmsNorm::new(&builder.sub(name), decoder.hidden_size, decoder.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::new(decoder, shape, &builder.sub("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: match shape.moe {
                None => Mlp::Dense(SwiGlu::new(decoder, &builder.sub("mlp"))?),
                Some(moe) => Mlp::Sparse(SparseMlp::new(decoder, moe, &builder.sub("mlp"))?),
            },
        })
    }

    /// `[t, d]` -> `[t, d]`, and where its router sent the rows. With caches each segment continues one.
    pub(super) fn forward(
        &self,
        x_td: &Tensor,
        rotation: &Rotation,
        segments: &Segments,
        caches: Option<LayerCaches>,
    ) -> (Tensor, Option<Routing>) {
        let normed = self.input_layernorm.forward(x_td);
        let x_td = x_td + self.self_attn.forward(&normed, rotation, segments, caches);
        let normed = self.post_attention_layernorm.forward(&x_td);
        match &self.mlp {
            Mlp::Dense(mlp) => (x_td + mlp.forward(&normed, segments.grad_rows()), None),
            Mlp::Sparse(mlp) => {
                let (y_td, routing) = mlp.forward(&normed);
                (x_td + y_td, Some(routing))
            }
        }
    }
}

/// Causal attention with grouped key and value heads (Ainslie et al. 2023).
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    /// Of queries and of keys, where the family has them.
    norms: Option<(RmsNorm, RmsNorm)>,
    head_dim: i64,
}

impl Attention {
    fn new(decoder: &DecoderConfig, shape: DecoderShape, builder: &Builder) -> Result<Self> {
        let init = Init::Normal(decoder.initializer_range);
        let linear =
            |name, inputs, outputs, bias| Linear::new(&builder.sub(name), inputs, outputs, bias, init);
        let norm = |name| RmsNorm::new(&builder.sub(name), decoder.head_dim, decoder.rms_norm_eps);
        let q_width = decoder.num_attention_heads * decoder.head_dim;
        let kv_width = decoder.num_key_value_heads * decoder.head_dim;
        let width = decoder.hidden_size;
        Ok(Self {
            q_proj: linear("q_proj", width, q_width, shape.qkv_bias)?,
            k_proj: linear("k_proj", width, kv_width, shape.qkv_bias)?,
            v_proj: linear("v_proj", width, kv_width, shape.qkv_bias)?,
            o_proj: linear("o_proj", q_width, width, false)?,
            norms: if shape.qk_norm { Some((norm("q_norm")?, norm("k_norm")?)) } else { None },
            head_dim: decoder.head_dim,
        })
    }

    fn forward(
        &self,
        x_td: &Tensor,
        rotation: &Rotation,
        segments: &Segments,
        caches: Option<LayerCaches>,
    ) -> Tensor {
        let rows = x_td.size()[0];
        let projections = [&self.q_proj, &self.k_proj, &self.v_proj];
        let [mut q_tnh, mut k_tmh, v_tmh] = Linear::forward_together(projections, x_td, segments.grad_rows())
            .map(|x| x.view([rows, -1, self.head_dim]));
        if let Some((q_norm, k_norm)) = &self.norms {
            (q_tnh, k_tmh) = (q_norm.forward(&q_tnh), k_norm.forward(&k_tmh));
        }
        let (q_tnh, k_tmh) = (rotation.apply(&q_tnh), rotation.apply(&k_tmh));
        let out_tnh = match caches {
            None => packed_attention(&q_tnh, &k_tmh, &v_tmh, segments, Visibility::Causal),
            Some(mut caches) => {
                let split = |x: &Tensor| x.split_with_sizes(segments.lengths(), 0).into_iter();
                let rows = split(&q_tnh).zip(split(&k_tmh)).zip(split(&v_tmh));
                let outputs: Vec<Tensor> = (rows.zip(caches.iter_mut()))
                    .map(|(((q_tnh, k_tmh), v_tmh), cache)| {
                        let (k_1mch, v_1mch) = cache.append(&k_tmh, &v_tmh);
                        cached_attention(&q_tnh, &k_1mch, &v_1mch)
                    })
                    .collect();
                concatenated(outputs)
            }
        };
        let out_td = out_tnh.reshape([rows, -1]);
        let [y_td] = Linear::forward_together([&self.o_proj], &out_td, segments.grad_rows());
        y_td
    }
}

/// `down(silu(gate(x)) * up(x))` (Shazeer 2020).
struct SwiGlu {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl SwiGlu {
    fn new(decoder: &DecoderConfig, builder: &Builder) -> Result<Self> {
        let (width, inner) = (decoder.hidden_size, decoder.intermediate_size);
        let init = Init::Normal(decoder.initializer_range);
        let linear = |name, inputs, outputs| Linear::new(&builder.sub(name), inputs, outputs, false, init);
        Ok(Self {
            gate: linear("gate_proj", width, inner)?,
            up: linear("up_proj", width, inner)?,
            down: linear("down_proj", inner, width)?,
        })
    }

    fn forward(&self, x_td: &Tensor, grad_rows_r: Option<&Tensor>) -> Tensor {
        let [gate, up] = Linear::forward_together([&self.gate, &self.up], x_td, grad_rows_r);
        let [y_td] = Linear::forward_together([&self.down], &swiglu(&gate, &up), grad_rows_r);
        y_td
    }
}
