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

use std::iter;

use sail_torch::{CrossEntropy, linear_cross_entropy};
use tch::{Device, Tensor};

use crate::attention::Segments;
use crate::blocks::Blocks;
use crate::error::Result;
use crate::nn::RmsNorm;
use crate::params::{Builder, Init};
use cache::LayerCaches;
use decoder::DecoderBlock;
use family::Family;
use rotary::{Rotary, Rotation};

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
    /// Where the routers sent the rows; None without experts, and with caches.
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
        caches: Option<&mut [KvCache]>,
    ) -> Trunk {
        let rotation = self.rotary.at(positions_t, x_td.kind());
        let Some(caches) = caches else {
            let step = |block: &DecoderBlock, x_td: &Tensor, (rotation, segments): &(Rotation, Segments)| {
                let (x_td, routing) = block.forward(x_td, rotation, segments, None);
                iter::once(x_td).chain(routing.into_iter().flat_map(Routing::into_tensors)).collect()
            };
            let rows = x_td.size()[0];
            let (x_td, beside) = self.blocks.forward(x_td, (rotation, segments.clone()), step);
            let routings = (0..).zip(beside).filter_map(|(layer, tensors)| {
                self.config.shape(layer).moe.map(|moe| Routing::of_tensors(tensors, rows, moe))
            });
            return Trunk { x_td, routing: routings.reduce(|all, one| one.plus(&all)) };
        };
        let mut x_td = x_td.shallow_clone();
        for (layer, block) in self.blocks.iter().enumerate() {
            let of_layer = LayerCaches { caches: &mut *caches, layer };
            (x_td, _) = block.forward(&x_td, &rotation, segments, Some(of_layer));
        }
        Trunk { x_td, routing: None }
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
        let [scores_rv] =
            sail_torch::linears(x_rd, [(self.head(), None)], None).unwrap_or_else(|error| panic!("{error}"));
        scores_rv
    }

    /// `[vocab, d]`
    fn head(&self) -> &Tensor {
        self.lm_head_vd.as_ref().unwrap_or(&self.embed_tokens_vd)
    }

    /// Output of the last block in rows with a target `[r, d]` -> their weighted cross-entropy, through the final norm and
    /// the head; see [`sail_torch::linear_cross_entropy`] for `targets_r` and `weights_r`.
    ///
    /// # Errors
    /// A target that is no token.
    pub fn cross_entropy(
        &self,
        x_rd: &Tensor,
        targets_r: &Tensor,
        weights_r: &Tensor,
    ) -> Result<CrossEntropy> {
        Ok(linear_cross_entropy(&self.norm.forward(x_rd), self.head(), targets_r, weights_r)?)
    }

    /// An empty cache with room for `rows` rows; it grows when they are not enough.
    pub fn new_cache(&self, rows: i64) -> KvCache {
        let decoder = self.config.decoder();
        let kind = (self.embed_tokens_vd.kind(), self.embed_tokens_vd.device());
        KvCache::new(decoder.num_hidden_layers, decoder.num_key_value_heads, decoder.head_dim, rows, kind)
    }
}
