//! How much memory a model takes while it is read and while it is written, by the peak of the process's
//! resident memory.
//!
//! One test at a time: the peak is that of the whole process. Linux only.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use sail_model::params::{Builder, Params, RandomSource, TensorSource};
use sail_model::vision::{Vision, VisionConfig, VisionExport, VitLayout, export};
use sail_model::weights::{FileSource, Folder};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const MIB: f64 = (1u64 << 20) as f64;

/// A field of /proc/self/status, MiB.
fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_matches([':', '\t', ' ']).split(' ').next().unwrap().parse::<f64>().unwrap() / 1024.0
}

/// What the peak rises to above the memory in use before, MiB.
fn peak_above<T>(body: impl FnOnce() -> T) -> (T, f64) {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let result = body();
    (result, status("VmHWM") - before)
}

fn aimv2(hidden: i64, inner: i64, layers: i64) -> VisionConfig {
    let keys: Value = json!({
        "model_type": "aimv2_vision_model", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden / 128, "image_size": 448,
    });
    VisionConfig::from_keys(&keys).unwrap()
}

fn build(config: &VisionConfig, source: &dyn TensorSource) -> (Vision, Params) {
    let params = Rc::new(RefCell::new(Params::new()));
    let builder = Builder::new(params.clone(), "vision", source, (Kind::Float, Device::Cpu));
    let model = Vision::new(config, &builder).unwrap();
    (model, params.take())
}

/// Draws a model and writes it in SAIL's layout.
fn write(config: &VisionConfig, dir: &Path) {
    let (model, params) = build(config, &RandomSource::new(1, "vision"));
    drop(model);
    let local = params.into_iter().map(|(name, tensor)| (name["vision.".len()..].to_owned(), tensor));
    let VisionExport { tensors, config } = export(config, local.collect(), 448, VitLayout::Sail, "").unwrap();
    Folder::new(tensors).json("config.json", &config).write(dir).unwrap();
}

fn load(dir: &Path) -> (Vision, Params) {
    let config = VisionConfig::read(dir).unwrap();
    build(&config, &FileSource::open(dir).unwrap().with(config.naming()))
}

fn size_mib(params: &Params) -> f64 {
    params.values().map(|tensor| tensor.numel() as f64 * 4.0).sum::<f64>() / MIB
}

#[test]
fn loading_takes_the_model_and_at_most_a_tenth_more() {
    let dir = tempfile::TempDir::new().unwrap();
    write(&aimv2(1024, 2816, 8), dir.path());
    let ((_model, params), peak) = peak_above(|| load(dir.path()));
    let size = size_mib(&params);
    assert!(size > 300.0, "{size} MiB");
    assert!(peak <= 1.1 * size, "a model of {size:.0} MiB took {peak:.0} MiB");
}

/// The encoder of SAIL-VL2, from random weights to a folder and back.
#[test]
#[ignore = "writes 2.7 GB; run by ./scripts/test.sh --extended"]
fn sailvit_huge_is_exported_and_loaded_within_six_gigabytes() {
    let dir = tempfile::TempDir::new().unwrap();
    let config = aimv2(1536, 4096, 24);
    let ((), writing) = peak_above(|| write(&config, dir.path()));
    let (parameters, reading) = peak_above(|| {
        let (model, params) = load(dir.path());
        let image = Tensor::zeros([1, 3, 448, 448], (Kind::Float, Device::Cpu));
        let features = tch::no_grad(|| model.last_hidden_state(&image)).unwrap();
        assert_eq!(features.size(), [1, 1024, 1536]);
        params.values().map(|tensor| tensor.numel() as u64).sum::<u64>()
    });
    assert_eq!(parameters, 682_031_616);
    let size = parameters as f64 * 4.0 / MIB;
    println!("{size:.0} MiB: drawn and written with {writing:.0} MiB, read and used with {reading:.0} MiB");
    // Drawing leaves some of its chunks to the allocator; a second copy of the weights would be far above.
    assert!(writing <= 1.3 * size, "{writing:.0} MiB");
    assert!(reading <= 1.1 * size, "{reading:.0} MiB");
    assert!(status("VmHWM") * MIB <= 6e9, "{} MiB", status("VmHWM"));
}
