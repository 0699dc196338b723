//! From patch features to the language model's visual tokens.
//!
//! Pixel shuffle, version 2 of the `InternVL` and SAIL-VL code (`ps_version: v2`), then their `mlp1`:
//! layer norm, linear, exact GELU, linear; or LLaVA's connectors without a shuffle. Knows neither of the
//! models it connects. Called by `vlm`.
//!
//! Dimension letters: t patches of all images, v visual tokens, n images, h and w the grid of patches, c
//! features of a patch.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::{LayerNorm, Linear};
use crate::params::{Builder, Init};
use crate::vision::Features;

/// `torch.nn.LayerNorm`'s default, which `mlp1` has.
const EPS: f64 = 1e-5;
/// Standard deviation of new matrices, the `initializer_range` of the published configurations.
const INIT_STD: f64 = 0.02;

/// What a projector is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectorKind {
    /// Pixel shuffle, layer norm, linear, GELU, linear: `0`, `1` and `3` of `mlp1`.
    #[default]
    PixelShuffle,
    /// Linear, GELU, linear (LLaVA 1.5's `mlp2x_gelu`): `0` and `2`.
    Mlp,
    /// One linear map (LLaVA 1.0's).
    Linear,
}

impl ProjectorKind {
    /// The word for it in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::PixelShuffle => "pixel_shuffle",
            Self::Mlp => "mlp",
            Self::Linear => "linear",
        }
    }
}

/// The description of a projector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectorConfig {
    /// What it is made of.
    #[serde(default)]
    pub kind: ProjectorKind,
    /// `merge` x `merge` neighbouring patches become one visual token; 1 without a pixel shuffle.
    pub merge: i64,
}

impl ProjectorConfig {
    /// Visual tokens of an image of `h` x `w` patches.
    ///
    /// # Errors
    /// [`Error::Config`] when `merge` does not divide both.
    pub fn visual_tokens(&self, (h, w): (i64, i64)) -> Result<i64> {
        let merge = self.merge;
        if merge >= 1 && h % merge == 0 && w % merge == 0 {
            return Ok((h / merge) * (w / merge));
        }
        Err(refuse(format!("{merge} does not divide a grid of {h} x {w} patches")))
    }

    /// Checks that the fields fit together.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(&self) -> Result<()> {
        match (self.kind, self.merge) {
            (_, merge) if merge < 1 => Err(refuse(format!("must be at least 1, is {merge}"))),
            (_, merge) if merge > 64 => Err(refuse(format!("must be at most 64, is {merge}"))),
            (ProjectorKind::PixelShuffle, _) | (_, 1) => Ok(()),
            (kind, merge) => {
                Err(refuse(format!("must be 1 for `{}`, which merges nothing, is {merge}", kind.name())))
            }
        }
    }
}

/// Makes visual tokens of the language model's width.
///
/// New parameters are normal with deviation 0.02 and zero bias, ones and zeros for the norm.
pub struct Projector {
    config: ProjectorConfig,
    norm: Option<LayerNorm>,
    linear_1: Linear,
    linear_2: Option<Linear>,
}

impl Projector {
    /// From features of width `vision_hidden` to tokens of width `llm_hidden`.
    ///
    /// # Errors
    /// As [`ProjectorConfig::validate`], and what the builder's source reports.
    pub fn new(
        config: ProjectorConfig,
        vision_hidden: i64,
        llm_hidden: i64,
        builder: &Builder,
    ) -> Result<Self> {
        config.validate()?;
        let merged = config.merge * config.merge * vision_hidden;
        let linear = |builder: &Builder, inputs| {
            Linear::new(builder, inputs, llm_hidden, true, Init::Normal(INIT_STD))
        };
        let (norm, linear_1, linear_2) = match config.kind {
            ProjectorKind::PixelShuffle => (
                Some(LayerNorm::new(&builder.sub(0), merged, EPS)?),
                linear(&builder.sub(1), merged)?,
                Some(linear(&builder.sub(3), llm_hidden)?),
            ),
            ProjectorKind::Mlp => {
                (None, linear(&builder.sub(0), merged)?, Some(linear(&builder.sub(2), llm_hidden)?))
            }
            ProjectorKind::Linear => (None, linear(builder, merged)?, None),
        };
        builder.finish()?;
        Ok(Self { config, norm, linear_1, linear_2 })
    }

    /// Features `[t, c]` -> visual tokens `[v, llm_hidden]`, each image's row by row of its merged grid.
    ///
    /// # Errors
    /// As [`ProjectorConfig::visual_tokens`].
    pub fn forward(&self, features: &Features) -> Result<Tensor> {
        let x_vc = pixel_shuffle(features, &self.config)?;
        let x_vc = self.norm.as_ref().map_or_else(|| x_vc.shallow_clone(), |norm| norm.forward(&x_vc));
        let x_vd = self.linear_1.forward(&x_vc);
        Ok(self
            .linear_2
            .as_ref()
            .map_or_else(|| x_vd.shallow_clone(), |last| last.forward(&x_vd.gelu("none"))))
    }
}

/// `[t, c]` -> `[v, merge^2 * c]`, image by image. A token holds, in order of their rows and then columns,
/// the features of the patches that it merges.
fn pixel_shuffle(features: &Features, config: &ProjectorConfig) -> Result<Tensor> {
    let merge = config.merge;
    for grid in &features.grids {
        config.visual_tokens(*grid)?;
    }
    if merge == 1 {
        return Ok(features.x_td.shallow_clone());
    }
    let c = features.x_td.size()[1];
    let batches: Vec<&[(i64, i64)]> = features.grids.chunk_by(|a, b| a == b).collect();
    let rows = |grids: &&[(i64, i64)]| grids.iter().map(|(h, w)| h * w).sum();
    let parts = features.x_td.f_split_with_sizes(batches.iter().map(rows).collect::<Vec<i64>>(), 0)?;
    let shuffle = |(x_tc, grids): (&Tensor, &&[(i64, i64)])| {
        let (n, (h, w)) = (grids.len() as i64, grids[0]);
        let x = x_tc.reshape([n, h / merge, merge, w / merge, merge, c]);
        x.permute([0, 1, 3, 2, 4, 5]).reshape([-1, merge * merge * c])
    };
    let shuffled: Vec<Tensor> = parts.iter().zip(&batches).map(shuffle).collect();
    if let [one] = &shuffled[..] { Ok(one.shallow_clone()) } else { Ok(Tensor::f_cat(&shuffled, 0)?) }
}

fn refuse(reason: String) -> Error {
    Error::Config { family: "projector".into(), key: "merge".into(), reason }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tch::{Device, Kind};

    use super::*;
    use crate::params::{Params, RandomSource};

    fn config(merge: i64) -> ProjectorConfig {
        ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge }
    }

    #[test]
    fn neighbours_are_merged_row_by_row_within_each_image() {
        let x_td = Tensor::arange(24, (Kind::Int64, Device::Cpu)).reshape([24, 1]);
        let features = Features { x_td, grids: vec![(4, 4), (2, 4)] };
        let merged = pixel_shuffle(&features, &config(2)).unwrap();
        assert_eq!(
            Vec::<i64>::try_from(merged.flatten(0, -1)).unwrap(),
            [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 16, 17, 20, 21, 18, 19, 22, 23]
        );
        assert!(pixel_shuffle(&features, &config(1)).unwrap().equal(&features.x_td));
        assert!(pixel_shuffle(&features, &config(4)).is_err());
    }

    #[test]
    fn kinds_have_the_published_names() {
        let names = |kind, merge| {
            let source = RandomSource::new(0, "projector");
            let params = Rc::new(RefCell::new(Params::new()));
            let builder = Builder::new(params.clone(), "projector", &source, (Kind::Float, Device::Cpu));
            let projector = Projector::new(ProjectorConfig { kind, merge }, 6, 10, &builder).unwrap();
            let x_td = Tensor::ones([8, 6], (Kind::Float, Device::Cpu));
            let out = projector.forward(&Features { x_td, grids: vec![(4, 2)] }).unwrap();
            assert_eq!(out.size(), [8 / (merge * merge), 10]);
            params.take().into_keys().collect::<Vec<_>>().join(" ").replace("projector.", "")
        };
        assert_eq!(names(ProjectorKind::PixelShuffle, 2), "0.bias 0.weight 1.bias 1.weight 3.bias 3.weight");
        assert_eq!(names(ProjectorKind::Mlp, 1), "0.bias 0.weight 2.bias 2.weight");
        assert_eq!(names(ProjectorKind::Linear, 1), "bias weight");
    }

    #[test]
    fn grids_that_do_not_merge_are_refused() {
        assert_eq!(config(2).visual_tokens((32, 16)).unwrap(), 128);
        let message = config(2).visual_tokens((36, 37)).unwrap_err().to_string();
        assert!(message.contains("2 does not divide a grid of 36 x 37"), "{message}");
        assert!(config(0).validate().is_err());
        assert!(ProjectorConfig { kind: ProjectorKind::Mlp, merge: 2 }.validate().is_err());
    }
}
