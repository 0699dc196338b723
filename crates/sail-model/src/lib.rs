//! Vision transformers, projector and language models on libtorch.
//!
//! Knows no rank, no optimizer, no run directory.
//!
//! A vision encoder's folder, exported or as published, and the features of an image (`examples/embed_image.rs` runs it):
//!
//! ```no_run
//! use std::{path::Path, rc::Rc};
//!
//! use sail_data::Preprocessor;
//! use sail_model::params::Builder;
//! use sail_model::vision::{Vision, VisionConfig};
//! use sail_model::weights::FileSource;
//! use tch::{Device, Kind, Tensor, no_grad};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = Path::new("runs/tiny/stage3/export/vit");
//! let config = VisionConfig::read(folder)?;
//! let source = FileSource::open(folder)?.with(config.naming());
//! let builder = Builder::new(Rc::default(), "vision", &source, (Kind::Float, Device::Cpu));
//! let model = Vision::new(&config, &builder)?;
//!
//! let pixels = Preprocessor::read(&folder.join("preprocessor_config.json"))?.apply_file(Path::new("photo.jpg"))?;
//! let shape = [1, 3, pixels.height as i64, pixels.width as i64];
//! let pixels_nchw = Tensor::from_slice(&pixels.pixels).f_reshape(shape)?;
//! let features = no_grad(|| model.features(&[pixels_nchw]))?;
//! println!("{:?} patches, {:?}", features.grids, features.x_td.size());
//! # Ok(())
//! # }
//! ```

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
