//! Vision transformers, projector and language models on libtorch.
//!
//! Knows no rank, no optimizer, no run directory.

pub mod attention;
pub mod blocks;
mod error;
pub mod generate;
pub mod keys;
pub mod llm;
pub mod nn;
pub mod params;
pub mod projector;
pub mod vision;
pub mod vlm;
pub mod weights;

pub use error::{Error, Result};
