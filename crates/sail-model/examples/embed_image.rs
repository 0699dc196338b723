//! Reads a vision encoder's folder, exported or as published, and embeds an image.
//!
//! `cargo run --release --example embed_image -- runs/tiny/stage3/export/vit docs/images/sample.png`

use std::env;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use sail_data::Preprocessor;
use sail_model::params::Builder;
use sail_model::vision::{Vision, VisionConfig};
use sail_model::weights::FileSource;
use tch::{Device, Kind, Tensor, no_grad};

fn main() -> ExitCode {
    match run(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [folder, image] = args else {
        return Err("two arguments are needed\n\nhint: embed_image VIT_FOLDER IMAGE".into());
    };
    let (folder, image) = (Path::new(folder), Path::new(image));

    // `config.json` says which family it is; the tensors may have any of the names that the family's files have.
    let config = VisionConfig::read(folder)?;
    let source = FileSource::open(folder)?.with(config.naming());
    let builder = Builder::new(Rc::default(), "vision", &source, (Kind::Float, Device::Cpu));
    let model = Vision::new(&config, &builder)?;

    let pixels = Preprocessor::read(&folder.join("preprocessor_config.json"))?.apply_file(image)?;
    let (height, width) = (pixels.height as i64, pixels.width as i64);
    let pixels_nchw = Tensor::from_slice(&pixels.pixels).f_reshape([1, 3, height, width])?;

    let features = no_grad(|| model.features(&[pixels_nchw]))?;
    let mean_d = features.x_td.f_mean_dim(0, false, Kind::Float)?;
    let (rows, columns) = features.grids[0];
    println!(
        "{}: {height} x {width} px, {rows} x {columns} patches of width {}; the mean has norm {:.4}",
        config.model_type(),
        config.hidden_size(),
        f64::try_from(mean_d.f_norm()?)?,
    );
    Ok(())
}
