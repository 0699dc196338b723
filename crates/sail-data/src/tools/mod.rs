//! What the commands of `sail-data` do, without their arguments and their printing (`cli`).
//!
//! ```text
//! pack      JSON and images, or shards of any layout  -> tar shards
//! index     a tar shard                               -> where its samples begin
//! check     shards                                    -> bad samples and broken shards
//! stats     shards                                    -> distributions, in fixed memory
//! inspect   one sample                                -> as the model sees it
//! rebalance the text of a source                      -> sampling weights
//! ```
//!
//! `access` is the one place that meets the rest of the crate; `walk` visits all samples on all threads.

pub(crate) mod access;
pub(crate) mod check;
pub(crate) mod error;
pub(crate) mod files;
pub(crate) mod index;
pub(crate) mod inspect;
pub(crate) mod pack;
pub(crate) mod page;
pub(crate) mod rebalance;
pub(crate) mod sketch;
pub(crate) mod stats;
pub(crate) mod walk;
