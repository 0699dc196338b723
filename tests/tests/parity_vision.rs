//! Vision models and projector against transformers and the published projector code, on the goldens
//! that `goldens/make_vision.py` makes.
//!
//! The error of a tensor is max |found - golden| / max |golden|. The bias of the keys is measured by the
//! gradient of their weight instead: it shifts all scores of a query alike, so that its own gradient is
//! zero but for rounding.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sail_model::params::{Builder, Params};
use sail_model::projector::{Projector, ProjectorConfig, ProjectorKind};
use sail_model::vision::{Features, Vision, VisionConfig, VisionExport, VitLayout, export};
use sail_model::weights::{FileSource, Folder};
use tch::{Device, Kind, Tensor};

const FORWARD_TOLERANCE: f64 = 1e-5;
const GRADIENT_TOLERANCE: f64 = 1e-4;

type Tensors = BTreeMap<String, Tensor>;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name)
}

fn read(path: &Path) -> Tensors {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn largest(x: &Tensor) -> f64 {
    x.abs().max().double_value(&[])
}

fn assert_close(what: &str, found: &Tensor, golden: &Tensor, tolerance: f64) {
    assert_close_to(what, found, golden, largest(golden), tolerance);
}

fn assert_close_to(what: &str, found: &Tensor, golden: &Tensor, scale: f64, tolerance: f64) {
    assert_eq!(found.size(), golden.size(), "{what}");
    let error = largest(&(found - golden)) / scale;
    assert!(error <= tolerance, "{what}: relative error {error:e} > {tolerance:e}");
}

/// Every parameter has the golden's gradient, or none where the golden has none, and no golden
/// gradient is left over.
fn assert_gradients(module: &str, params: &Params, golden: &Tensors, prefix: &str, without: &[&str]) {
    let mut left: BTreeSet<&str> = golden.keys().filter_map(|key| key.strip_prefix(prefix)).collect();
    for (name, param) in params {
        let name = name.strip_prefix(&format!("{module}.")).unwrap();
        if without.contains(&name) {
            assert!(!left.contains(name) && !param.grad().defined(), "{name}");
            continue;
        }
        assert!(left.remove(name), "the golden has no gradient of {name}");
        let grad = param.grad();
        assert!(grad.defined(), "{name} has no gradient");
        let golden_of = |name: &str| &golden[&format!("{prefix}{name}")];
        let scale = match name.strip_suffix("bias") {
            Some(keys) if keys.ends_with(".k_proj.") || keys.ends_with(".key.") => {
                largest(golden_of(&format!("{keys}weight")))
            }
            _ => largest(golden_of(name)),
        };
        assert_close_to(name, &grad, golden_of(name), scale, GRADIENT_TOLERANCE);
    }
    assert!(left.is_empty(), "not in the model: {left:?}");
}

fn track_gradients(params: &mut Params) {
    for param in params.values_mut() {
        let _ = param.requires_grad_(true);
        param.zero_grad();
    }
}

/// A golden's model; its parameters under their full names. Every tensor of the file has its place.
fn load(name: &str) -> (VisionConfig, Vision, Params) {
    let config = VisionConfig::read(&folder(name)).unwrap();
    let source = FileSource::open(&folder(name)).unwrap().with(config.naming());
    let params = Rc::new(RefCell::new(Params::new()));
    let builder = Builder::new(params.clone(), "vision", &source, (Kind::Float, Device::Cpu));
    let model = Vision::new(&config, &builder).unwrap();
    (config, model, params.take())
}

/// Forward and gradients for each size of images in the golden; returns the number of sizes.
fn check_vision(name: &str) -> usize {
    let (config, model, mut params) = load(name);
    let golden = read(&folder(name).join("golden.safetensors"));
    let cases = golden.keys().filter(|key| key.starts_with("pixels.")).count();
    for i in 0..cases {
        // A gradient of an earlier case must not stand in for one that is missing here.
        track_gradients(&mut params);
        let pixels = golden[&format!("pixels.{i}")].shallow_clone().set_requires_grad(true);
        let output = model.last_hidden_state(&pixels).unwrap();
        assert_close(
            &format!("{name} {i}"),
            &output,
            &golden[&format!("last_hidden_state.{i}")],
            FORWARD_TOLERANCE,
        );
        let features = model.features(&[pixels.shallow_clone()]).unwrap();
        let (h, w) = (pixels.size()[2] / config.patch_size(), pixels.size()[3] / config.patch_size());
        assert_eq!(features.grids, [(h, w), (h, w)]);
        let patches = output.narrow(1, output.size()[1] - h * w, h * w).flatten(0, 1);
        assert!(features.x_td.equal(&patches), "{name} {i}: features are not the last tokens");

        (output * &golden[&format!("weight.{i}")]).sum(Kind::Float).backward();
        let prefix = format!("grad.{i}.");
        let of_pixels = format!("{prefix}pixels");
        assert_close(&of_pixels, &pixels.grad(), &golden[&of_pixels], GRADIENT_TOLERANCE);
        let of_params: Tensors = golden
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix) && **key != of_pixels)
            .map(|(key, tensor)| (key.clone(), tensor.shallow_clone()))
            .collect();
        assert_gradients("vision", &params, &of_params, &prefix, config.without_gradient());
    }
    cases
}

#[test]
fn aimv2_is_that_of_transformers() {
    assert_eq!(check_vision("aimv2"), 2);
}

#[test]
fn dinov2_is_that_of_transformers() {
    assert_eq!(check_vision("dinov2"), 3);
}

#[test]
fn reading_and_writing_changes_no_bit_and_no_key() {
    for name in ["aimv2", "dinov2"] {
        let (config, _, params) = load(name);
        let out = tempfile::TempDir::new().unwrap();
        let local = params.into_iter().map(|(name, tensor)| (name["vision.".len()..].to_owned(), tensor));
        let VisionExport { tensors, config: json } =
            export(&config, local.collect(), config.image_size(), VitLayout::Transformers, "").unwrap();
        Folder::new(tensors).json("config.json", &json).write(out.path()).unwrap();

        let (before, after) =
            (read(&folder(name).join("model.safetensors")), read(&out.path().join("model.safetensors")));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (key, tensor) in &before {
            assert_eq!(tensor.kind(), after[key].kind());
            assert!(tensor.equal(&after[key]), "{name}: {key}");
        }
        assert_eq!(VisionConfig::read(out.path()).unwrap(), config);
    }
}

#[test]
fn projector_is_the_published_one() {
    let source = FileSource::open(&folder("projector")).unwrap();
    let golden = read(&folder("projector").join("golden.safetensors"));
    let (features, output) = (&golden["features"], &golden["output"]);
    let params = Rc::new(RefCell::new(Params::new()));
    let builder = Builder::new(params.clone(), "projector", &source, (Kind::Float, Device::Cpu));
    let config = ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge: 2 };
    let projector = Projector::new(config, features.size()[2], output.size()[2], &builder).unwrap();
    let mut params = params.take();
    track_gradients(&mut params);
    let features = features.shallow_clone().set_requires_grad(true);
    let grids = vec![(4, 4); features.size()[0] as usize];
    assert_eq!(config.visual_tokens(grids[0]).unwrap(), output.size()[1]);
    let found = projector.forward(&Features { x_td: features.flatten(0, 1), grids }).unwrap();
    let found = found.view_as(output);
    assert_close("output", &found, output, FORWARD_TOLERANCE);
    (found * &golden["weight"]).sum(Kind::Float).backward();
    assert_close("features", &features.grad(), &golden["grad.features"], GRADIENT_TOLERANCE);
    let of_params = golden.into_iter().filter(|(key, _)| key != "grad.features").collect();
    assert_gradients("projector", &params, &of_params, "grad.", &[]);
}
