//! Vision transformers: images of any sizes in, one feature per patch out.
//!
//! Each family is one file: it computes what transformers computes for the same config.json and the
//! same tensors, and names its parameters as transformers does. A new family is a file like
//! `siglip.rs` and one line in `FAMILIES`; docs/adding-a-model.md goes through it. Nothing here knows
//! tiles, text or training. Called by `vlm`, by the trainer and by its `embed` and `export` commands.
//!
//! Images of different sizes share one forward: their tokens lie end to end, `[t, d]`, and attention
//! keeps each image to itself.
//!
//! Dimension letters: n images of one size, s tokens of an image, t tokens of all images, d width, h and w
//! the grid of patches, p rows of a position table; `nchw` is pixels.

mod aimv2;
mod config;
mod dinov2;
mod export;
mod family;
mod internvit;
mod parts;
mod siglip;

use tch::Tensor;

pub use config::VisionConfig;
pub use export::{VisionExport, VitLayout, dtype_name, export, fit_positions, preprocessor_json};
pub use family::{Geometry, NormKind, Positions, VisionFamily, VisionModel, VitShape};

use crate::attention::Segments;
use crate::error::{Error, Result};
use crate::params::Builder;
use family::Family;

/// The families there are.
static FAMILIES: &[Family] = &[
    Family::of::<aimv2::Aimv2Config>(),
    Family::of::<dinov2::Dinov2Config>(),
    Family::of::<internvit::InternVitConfig>(),
    Family::of::<siglip::SiglipConfig>(),
];

/// A vision transformer.
pub struct Vision {
    config: VisionConfig,
    model: Box<dyn VisionModel + Send>,
}

/// The features of images laid end to end, with the grid of each.
#[derive(Debug)]
pub struct Features {
    /// `[t, d]`, the patches of an image row by row of its grid.
    pub x_td: Tensor,
    /// Rows and columns of patches of each image.
    pub grids: Vec<(i64, i64)>,
}

impl Features {
    /// Those of the first images, of the next ones and so on, so many each.
    ///
    /// # Errors
    /// [`Error::BatchShape`] when they are not as many as all images.
    pub fn split(&self, images: &[usize]) -> Result<Vec<Self>> {
        let (all, asked) = (self.grids.len(), images.iter().sum::<usize>());
        if all != asked {
            let [found, expected] = [asked, all].map(|images| vec![images as i64]);
            return Err(Error::BatchShape { field: "images", found, expected });
        }
        let mut rest = &self.grids[..];
        let mut next =
            |images: &usize| rest.split_off(..*images).expect("invariant: as many as all").to_vec();
        let grids = images.iter().map(&mut next);
        let grids: Vec<Vec<(i64, i64)>> = grids.collect();
        let rows: Vec<i64> = grids.iter().map(|grids| grids.iter().map(|(h, w)| h * w).sum()).collect();
        let parts = self.x_td.f_split_with_sizes(rows, 0)?;
        Ok(parts.into_iter().zip(grids).map(|(x_td, grids)| Self { x_td, grids }).collect())
    }
}

impl Vision {
    /// Builds the model that `config` describes, with the parameters that `builder` gives.
    ///
    /// # Errors
    /// As [`VisionConfig::validate`], and what the builder's source reports.
    pub fn new(config: &VisionConfig, builder: &Builder) -> Result<Self> {
        config.validate()?;
        let model = config.build(builder)?;
        builder.finish()?;
        Ok(Self { config: config.clone(), model })
    }

    /// The description it was built from.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// Batches of normalised images, each `[n, 3, height, width]` of any float type, to the features of
    /// their patches after the last layer, without class tokens.
    ///
    /// # Errors
    /// As [`VisionConfig::grid`], and [`Error::BatchShape`] for what is not a batch of images.
    pub fn features(&self, batches: &[Tensor]) -> Result<Features> {
        let (x_td, grids) = self.encode(batches)?;
        if self.model.prefix() == 0 {
            return Ok(Features { x_td, grids });
        }
        let mut lengths = Vec::with_capacity(2 * grids.len());
        for (h, w) in &grids {
            lengths.extend([self.model.prefix(), h * w]);
        }
        let parts = x_td.f_split_with_sizes(lengths, 0)?;
        let patches: Vec<&Tensor> = parts.iter().skip(1).step_by(2).collect();
        Ok(Features { x_td: Tensor::f_cat(&patches, 0)?, grids })
    }

    /// What transformers calls `last_hidden_state`, of images of one size `[n, 3, height, width]`: class
    /// tokens in front where the family has them, then the patches `[n, s, d]`.
    ///
    /// # Errors
    /// As [`Vision::features`].
    pub fn last_hidden_state(&self, pixels_nchw: &Tensor) -> Result<Tensor> {
        let (x_td, grids) = self.encode(std::slice::from_ref(pixels_nchw))?;
        let d = x_td.size()[1];
        Ok(x_td.f_view([grids.len() as i64, -1, d])?)
    }

    fn encode(&self, batches: &[Tensor]) -> Result<(Tensor, Vec<(i64, i64)>)> {
        let (mut embedded, mut lengths, mut grids) = (Vec::new(), Vec::new(), Vec::new());
        for pixels_nchw in batches {
            let (n, grid) = self.grid_of(pixels_nchw)?;
            let x_nsd = self.model.embed(pixels_nchw);
            lengths.extend(std::iter::repeat_n(x_nsd.size()[1], n));
            grids.extend(std::iter::repeat_n(grid, n));
            embedded.push(x_nsd.flatten(0, 1));
        }
        let x_td = if let [one] = &embedded[..] { one.shallow_clone() } else { Tensor::f_cat(&embedded, 0)? };
        // What they are a copy of is not to last as long as all blocks.
        drop(embedded);
        Ok((self.model.encode(&x_td, &Segments::of_lengths(lengths)?), grids))
    }

    /// How many images a batch has, and their grid.
    fn grid_of(&self, pixels_nchw: &Tensor) -> Result<(usize, (i64, i64))> {
        match pixels_nchw.size()[..] {
            [n, 3, height, width] if n > 0 => Ok((n as usize, self.config.grid(height, width)?)),
            _ => {
                let (found, px) = (pixels_nchw.size(), self.config.image_size());
                let expected = vec![found.first().copied().unwrap_or(1).max(1), 3, px, px];
                Err(Error::BatchShape { field: "pixels_nchw", found, expected })
            }
        }
    }
}
