//! Features of images by a vision encoder's folder: `sail-train embed`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sail_data::Preprocessor;
use sail_model::vision::Vision;
use sail_model::weights::{Shards, write_safetensors};
use tch::{Device, Tensor, no_grad};

use crate::error::{Error, Result};
use crate::export::load_vit;
use crate::output;

/// What the features are of.
#[derive(Debug)]
pub enum Input<'a> {
    /// Image files, prepared as the folder's `preprocessor_config.json` says.
    Images(&'a [PathBuf]),
    /// A safetensors file with `pixel_values` `[n, 3, height, width]`, ready for the encoder.
    Pixels(&'a Path),
}

/// Writes `pixel_values` `[n, 3, height, width]` and `last_hidden_state` `[n, tokens, width]` in fp32 to
/// `out`. Images that come out in several sizes are written one by one, as `pixel_values.0`,
/// `last_hidden_state.0` and so on.
///
/// # Errors
/// When the folder, an image or the pixels cannot be used.
pub fn embed(vit: &Path, input: &Input, out: &Path) -> Result<()> {
    match input {
        Input::Images(images) => output::check(out, images)?,
        Input::Pixels(file) => output::check(out, &[file.to_path_buf()])?,
    }
    let model = load_vit(vit, Device::Cpu)?;
    let pixels = match input {
        Input::Images(images) => prepare(vit, images)?,
        Input::Pixels(file) => vec![Shards::open(file)?.tensor("pixel_values")?],
    };
    let mut tensors = BTreeMap::new();
    let one = pixels.len() == 1;
    for (i, pixels_nchw) in pixels.into_iter().enumerate() {
        let name = |name: &str| if one { name.to_owned() } else { format!("{name}.{i}") };
        tensors.insert(name("last_hidden_state"), features(&model, &pixels_nchw)?);
        tensors.insert(name("pixel_values"), pixels_nchw);
    }
    output::replace(out, |partial| Ok(write_safetensors(partial, &tensors)?))
}

/// Image by image, so that memory does not grow with their number.
fn features(model: &Vision, pixels_nchw: &Tensor) -> Result<Tensor> {
    if pixels_nchw.size().len() != 4 {
        return Err(Error::usage(
            format!("`pixel_values` has shape {:?}", pixels_nchw.size()),
            "give images `[n, 3, height, width]`",
        ));
    }
    let images = pixels_nchw.f_split(1, 0)?.into_iter();
    let states = images.map(|image| no_grad(|| model.last_hidden_state(&image)));
    Ok(Tensor::f_cat(&states.collect::<sail_model::Result<Vec<_>>>()?, 0)?)
}

/// One batch of all images where they have one size, otherwise one of each.
fn prepare(vit: &Path, images: &[PathBuf]) -> Result<Vec<Tensor>> {
    let preprocessor = Preprocessor::read(&vit.join("preprocessor_config.json"))?;
    let mut batches = Vec::with_capacity(images.len());
    for image in images {
        let pixels = preprocessor.apply_file(image)?;
        let (height, width) = (pixels.height as i64, pixels.width as i64);
        batches.push(Tensor::from_slice(&pixels.pixels).f_reshape([1, 3, height, width])?);
    }
    let one_size = batches.windows(2).all(|pair| pair[0].size() == pair[1].size());
    if one_size { Ok(vec![Tensor::f_cat(&batches, 0)?]) } else { Ok(batches) }
}
