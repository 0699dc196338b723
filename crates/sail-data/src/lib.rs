//! Sharded image-text streams: shards to samples to packs.
//!
//! This crate reads WebDataset shards and JSON lines, turns each sample into token ids, labels and image tiles, and
//! packs samples of different lengths into training packs of a fixed token budget. It knows nothing of
//! tensors, ranks or optimizers: what leaves it is host memory ([`Pack`]), which `sail-train` turns into
//! tensors.
//!
//! The way of a sample:
//!
//! ```text
//! store    local files, web servers, object stores: locations, their plain bytes     -> Blob
//! order    which (shard, part) units a stream reads, and the shuffle inside them     -> reference
//! shard    the bytes of one sample, read at its offset                               -> members
//! layout   the turns, the pictures they name, videos as frames                       -> conversation
//! draft    image headers, tiling, token ids: all lengths, no pixels yet              -> draft
//! packer   the drafts that share a pack                                              -> drafts
//! image    decode, resize, cut, normalise                                            -> Sample
//! sample   concatenation                                                             -> Pack
//! ```
//!
//! A stream is a pure function of the data, the specification and its own [`StreamState`], so the order
//! of packs does not depend on the number of threads, and a run resumes from a state without replaying
//! anything. A bad sample ([`BadSample`]) is skipped, counted and logged; a broken shard stops the run.
//!
//! Streaming shards, and going on from a position (`examples/stream.rs` is the same with packs that are shuffled and cut
//! to a budget):
//!
//! ```
//! use std::{path::Path, sync::Arc};
//!
//! use sail_data::{
//!     DataSpec, ImageSpec, ImageTokens, Loader, LoaderOptions, LossWeight, SourceSpec, Template, TextEncoder, TextSpec,
//! };
//!
//! # fn main() -> Result<(), sail_data::Error> {
//! let [start, context, end] = ["<img>", "<IMG_CONTEXT>", "</img>"].map(String::from);
//! let text = TextSpec {
//!     template: Template::Chatml,
//!     template_file: None,
//!     system: None,
//!     image_tokens: ImageTokens { start, context, end },
//!     loss_weight: LossWeight::Token,
//! };
//! let encoder = Arc::new(TextEncoder::new(Path::new("../../configs/tiny/tokenizer.json"), &text)?);
//! let captions = SourceSpec::new("caption", vec!["../../data/demo/caption-heldout-*.tar".into()]);
//! // Every sample once, in the order of the shards; an image is one tile of 112 pixels, or 16 tokens.
//! let spec = DataSpec { tokens_per_pack: 256, ..DataSpec::in_order(vec![captions], text, ImageSpec::square(112, 16)) };
//!
//! let mut loader = Loader::new(&spec, Arc::clone(&encoder), LoaderOptions::alone(2), None)?;
//! let first = loader.next_pack()?.pack.expect("there are samples");
//! assert!(first.ids.len() <= 256 && first.samples.len() == first.images.len());
//!
//! let position = loader.position();
//! let second = loader.next_pack()?;
//! let mut resumed = Loader::new(&spec, encoder, LoaderOptions::alone(1), Some(position))?;
//! assert_eq!(resumed.next_pack()?, second);
//! # Ok(())
//! # }
//! ```

mod annotation;
pub mod cli;
mod draft;
mod error;
mod heldout;
mod image;
#[doc(hidden)]
pub mod inside;
mod labelled;
mod layout;
mod loader;
mod mix;
mod order;
mod packer;
mod preprocess;
mod rng;
mod sample;
mod shard;
mod source;
mod spec;
mod state;
mod store;
mod stream;
mod tally;
mod text;
mod tiling;
mod tools;
mod weights;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use annotation::{Role, Turn};
pub use error::{BadSample, Error, Result};
pub use heldout::{check_sources, expand_shards, for_each_sample, read_samples, shard_paths};
pub use image::{load_image, strip};
pub use labelled::{LabelledImage, LabelledImages};
pub use loader::{Loaded, Loader, LoaderOptions};
pub use preprocess::{Pixels, Preprocessor};
pub use sample::{IGNORE, Images, Pack, Prompt, Sample, SampleId, SamplePrompt};
pub use spec::{
    Alpha, AnyResolution, Balance, CacheSpec, DataSpec, ImageSpec, ImageTokens, Layout, Length, LossWeight,
    MixBy, PageChoice, Reencode, SourceSpec, StoreSpec, Template, TextSpec, Tiling, TooLong,
};
pub use state::{Position, StreamState};
pub use tally::Tally;
pub use text::{Encoded, JinjaTemplate, StructureTokens, TextEncoder};
pub use tools::page::printable;
