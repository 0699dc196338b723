//! Language models: decoders with Hugging Face's parameter names, over packed sequences.
//!
//! Each family is one file with the keys of its config.json, their published defaults and what it asks of
//! the decoder that all share; a new one is a file like `qwen3.rs` and one line in `FAMILIES`. Not a chat
//! interface and not a tokenizer. Called by [`crate::vlm`], which puts visual tokens among
//! the embeddings, and by [`crate::generate`].
//!
//! Dimension letters: t rows of the pack, r chosen rows, d model width.

mod cache;
mod config;
mod decoder;
mod family;
mod llama;
mod moe;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod resolve;
mod rope;
mod rotary;
mod window;

pub use cache::KvCache;
pub use config::{DecoderConfig, LlmConfig, TokenIds};
pub use family::{DecoderShape, LlmFamily, MoeShape};
pub use moe::Routing;
pub use rope::{RopeParameters, RopeScaling, Yarn};

use tch::{Device, Tensor};

use crate::attention::Segments;
use crate::blocks::Blocks;
use crate::error::Result;
use crate::nn::RmsNorm;
use crate::params::{Builder, Init};
use cache::LayerCaches;
use decoder::DecoderBlock;
use family::Family;
use rotary::Rotary;

/// The families there are.
static FAMILIES: &[Family] = &[
    Family::of::<llama::Llama>(),
    Family::of::<qwen2::Qwen2>(),
    Family::of::<qwen3::Qwen3>(),
    Family::of::<qwen3_moe::Qwen3Moe>(),
];

/// A decoder with embedding and head.
pub struct Llm {
    config: LlmConfig,
    embed_tokens_vd: Tensor,
    blocks: Blocks<DecoderBlock>,
    norm: RmsNorm,
    /// None: the embedding table serves.
    lm_head_vd: Option<Tensor>,
    rotary: Rotary,
}

/// What the blocks make of embeddings.
#[derive(Debug)]
pub struct Trunk {
    /// Output of the last block `[t, d]`, before the final norm.
    pub x_td: Tensor,
    /// Where the routers sent the rows; None without experts.
    pub routing: Option<Routing>,
}

impl Llm {
    /// Builds the model that `config` describes; parameters are `model.embed_tokens.weight`,
    /// `model.layers.N.…`, `model.norm.weight` and, when untied, `lm_head.weight`.
    pub fn new(config: &LlmConfig, builder: &Builder) -> Result<Self> {
        config.validate()?;
        let decoder = config.decoder();
        let table = [decoder.vocab_size, decoder.hidden_size];
        let init = Init::Normal(decoder.initializer_range);
        let model = builder.sub("model");
        let embed_tokens_vd = model.sub("embed_tokens").param("weight", &table, init)?;
        let blocks = Blocks::new(&model.sub("layers"), decoder.num_hidden_layers, |i, builder| {
            DecoderBlock::new(decoder, config.shape(i), builder)
        })?;
        let norm = RmsNorm::new(&model.sub("norm"), decoder.hidden_size, decoder.rms_norm_eps)?;
        let lm_head_vd = if decoder.tie_word_embeddings {
            None
        } else {
            Some(builder.sub("lm_head").param("weight", &table, init)?)
        };
        let device = embed_tokens_vd.device();
        let rotary = Rotary::new(decoder.head_dim, &decoder.rope_parameters, device);
        builder.finish()?;
        Ok(Self { config: config.clone(), embed_tokens_vd, blocks, norm, lm_head_vd, rotary })
    }

    /// The description it was built from.
    pub fn config(&self) -> &LlmConfig {
        &self.config
    }

    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.embed_tokens_vd.device()
    }

    /// Token ids `[t]` int64 -> embeddings `[t, d]`.
    pub fn embed(&self, ids_t: &Tensor) -> Tensor {
        Tensor::embedding(&self.embed_tokens_vd, ids_t, -1, false, false)
    }

    /// Embeddings `[t, d]` through all blocks.
    ///
    /// `positions_t` `[t]` int64 counts from 0 in each sequence. With caches, one for each segment, a
    /// segment continues its cache's sequence, and its positions begin at the cache's `rows()`.
    pub fn trunk(
        &self,
        x_td: &Tensor,
        positions_t: &Tensor,
        segments: &Segments,
        mut caches: Option<&mut [KvCache]>,
    ) -> Trunk {
        let rotation = self.rotary.at(positions_t, x_td.kind());
        let mut x_td = x_td.shallow_clone();
        let mut routing: Option<Routing> = None;
        for (layer, block) in self.blocks.iter().enumerate() {
            let of_layer = caches.as_deref_mut().map(|caches| LayerCaches { caches, layer });
            let of_block;
            (x_td, of_block) = block.forward(&x_td, &rotation, segments, of_layer);
            routing = match (routing, of_block) {
                (Some(all), Some(one)) => Some(Routing::plus(one, &all)),
                (all, one) => all.or(one),
            };
        }
        Trunk { x_td, routing }
    }

    /// As [`Llm::trunk`], after the final norm.
    pub fn hidden(
        &self,
        x_td: &Tensor,
        positions_t: &Tensor,
        segments: &Segments,
        caches: Option<&mut [KvCache]>,
    ) -> Tensor {
        self.norm.forward(&self.trunk(x_td, positions_t, segments, caches).x_td)
    }

    /// The final norm, row by row: `[r, d]` -> `[r, d]`.
    pub fn final_norm(&self, x_rd: &Tensor) -> Tensor {
        self.norm.forward(x_rd)
    }

    /// Rows after the final norm `[r, d]` -> scores of every token `[r, vocab]`, in the parameters'
    /// type.
    pub fn logits(&self, x_rd: &Tensor) -> Tensor {
        x_rd.linear(self.lm_head_vd.as_ref().unwrap_or(&self.embed_tokens_vd), None::<&Tensor>)
    }

    /// An empty cache with room for `rows` rows; it grows when they are not enough.
    pub fn new_cache(&self, rows: i64) -> KvCache {
        let decoder = self.config.decoder();
        let kind = (self.embed_tokens_vd.kind(), self.embed_tokens_vd.device());
        KvCache::new(decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_dim, rows, kind)
    }
}
