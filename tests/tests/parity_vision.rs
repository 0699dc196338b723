//! Vision models and projector against transformers and the published projector code, on the goldens
//! that `goldens/make_vision.py` makes, and on random configurations of `reference/random_vision.py`.
//!
//! The error of a tensor is max |found - golden| / max |golden|. The bias of the keys is measured by the
//! gradient of their weight instead: it shifts all scores of a query alike, so that its own gradient is
//! zero but for rounding.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
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

fn error_of(what: &str, found: &Tensor, golden: &Tensor, scale: f64) -> f64 {
    assert_eq!(found.size(), golden.size(), "{what}");
    largest(&(found - golden)) / scale
}

/// Returns the error.
fn assert_close(what: &str, found: &Tensor, golden: &Tensor, tolerance: f64) -> f64 {
    assert_within(what, error_of(what, found, golden, largest(golden)), tolerance)
}

fn assert_within(what: &str, error: f64, tolerance: f64) -> f64 {
    assert!(error <= tolerance, "{what}: relative error {error:e} > {tolerance:e}");
    error
}

/// Every parameter has the golden's gradient, or none where the golden has none, and no golden
/// gradient is left over. Returns the largest error.
fn assert_gradients(module: &str, params: &Params, golden: &Tensors, prefix: &str, without: &[&str]) -> f64 {
    let mut worst: f64 = 0.0;
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
        let error = error_of(name, &grad, golden_of(name), scale);
        worst = worst.max(assert_within(&format!("{module} {prefix}{name}"), error, GRADIENT_TOLERANCE));
    }
    assert!(left.is_empty(), "not in the model: {left:?}");
    worst
}

fn track_gradients(params: &mut Params) {
    for param in params.values_mut() {
        let _ = param.requires_grad_(true);
        param.zero_grad();
    }
}

/// A folder's model; its parameters under their full names. Every tensor of the file has its place.
fn load(folder: &Path) -> (VisionConfig, Vision, Params) {
    let config = VisionConfig::read(folder).unwrap();
    let source = FileSource::open(folder).unwrap().with(config.naming());
    let params = Rc::new(RefCell::new(Params::new()));
    let builder = Builder::new(params.clone(), "vision", &source, (Kind::Float, Device::Cpu));
    let model = Vision::new(&config, &builder).unwrap();
    (config, model, params.take())
}

/// What was compared, and the largest errors.
#[derive(Debug, Default)]
struct Compared {
    sizes: usize,
    forward: f64,
    gradient: f64,
}

/// Forward and gradients for each size of images in the golden.
fn check_vision(folder: &Path) -> Compared {
    let (config, model, mut params) = load(folder);
    let golden = read(&folder.join("golden.safetensors"));
    let mut compared = Compared::default();
    for i in 0..golden.keys().filter(|key| key.starts_with("pixels.")).count() {
        // A gradient of an earlier case must not stand in for one that is missing here.
        track_gradients(&mut params);
        let pixels = golden[&format!("pixels.{i}")].shallow_clone().set_requires_grad(true);
        let output = model.last_hidden_state(&pixels).unwrap();
        let (what, of_output) = (format!("{} {i}", folder.display()), format!("last_hidden_state.{i}"));
        let error = assert_close(&what, &output, &golden[&of_output], FORWARD_TOLERANCE);
        compared.forward = compared.forward.max(error);
        let features = model.features(&[pixels.shallow_clone()]).unwrap();
        let (h, w) = (pixels.size()[2] / config.patch_size(), pixels.size()[3] / config.patch_size());
        assert_eq!(features.grids, [(h, w), (h, w)]);
        let patches = output.narrow(1, output.size()[1] - h * w, h * w).flatten(0, 1);
        assert!(features.x_td.equal(&patches), "{what}: features are not the last tokens");

        (output * &golden[&format!("weight.{i}")]).sum(Kind::Float).backward();
        let prefix = format!("grad.{i}.");
        let of_pixels = format!("{prefix}pixels");
        let error = assert_close(&what, &pixels.grad(), &golden[&of_pixels], GRADIENT_TOLERANCE);
        let of_params: Tensors = golden
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix) && **key != of_pixels)
            .map(|(key, tensor)| (key.clone(), tensor.shallow_clone()))
            .collect();
        let of_params = assert_gradients("vision", &params, &of_params, &prefix, config.without_gradient());
        compared.gradient = compared.gradient.max(error).max(of_params);
        compared.sizes += 1;
    }
    compared
}

#[test]
fn models_are_those_of_transformers() {
    let goldens = [
        ("aimv2", 2),
        ("aimv2_native", 2),
        ("dinov2", 3),
        ("internvit", 2),
        ("internvit_norm", 1),
        ("siglip", 2),
    ];
    for (name, sizes) in goldens {
        assert_eq!(check_vision(&folder(name)).sizes, sizes, "{name}");
    }
}

/// Writes what `folder` holds, read as a model, in `layout` to `out`.
fn rewrite(folder: &Path, layout: VitLayout, out: &Path) {
    let (config, _, params) = load(folder);
    let local = params.into_iter().map(|(name, tensor)| (name["vision.".len()..].to_owned(), tensor));
    let VisionExport { tensors, config } =
        export(&config, local.collect(), config.image_size(), layout, "").unwrap();
    Folder::new(tensors).json("config.json", &config).write(out).unwrap();
}

fn assert_same_bits(folder: &Path, again: &Path) {
    let [before, after] = [folder, again].map(|folder| read(&folder.join("model.safetensors")));
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (key, tensor) in &before {
        assert_eq!(tensor.kind(), after[key].kind());
        assert!(tensor.equal(&after[key]), "{}: {key}", folder.display());
    }
    assert_eq!(VisionConfig::read(again).unwrap(), VisionConfig::read(folder).unwrap());
}

#[test]
fn reading_and_writing_changes_no_bit_and_no_key() {
    for name in ["aimv2", "aimv2_native", "dinov2", "internvit", "internvit_norm", "siglip"] {
        let out = tempfile::TempDir::new().unwrap();
        rewrite(&folder(name), VitLayout::Transformers, out.path());
        assert_same_bits(&folder(name), out.path());
    }
}

#[test]
fn the_published_codes_own_layouts_change_no_bit() {
    for (name, key) in [
        ("aimv2", "trunk.blocks.1.attn.qkv.weight"),
        ("aimv2", "preprocessor.pos_embed"),
        ("internvit", "encoder.layers.1.attn.qkv.bias"),
        ("internvit", "encoder.layers.0.ls2"),
    ] {
        let [theirs, ours] = [0; 2].map(|_| tempfile::TempDir::new().unwrap());
        rewrite(&folder(name), VitLayout::Original, theirs.path());
        assert!(read(&theirs.path().join("model.safetensors")).contains_key(key), "{key}");
        rewrite(theirs.path(), VitLayout::Transformers, ours.path());
        assert_same_bits(&folder(name), ours.path());
    }
}

fn run_reference(arguments: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut python = Command::new(root.join(".venv/bin/python"));
    let status = python.arg(root.join("tests/reference/random_vision.py")).args(arguments).status().unwrap();
    assert!(status.success(), "{arguments:?}: {status}");
}

/// 25 configurations of each family, and one inside a larger model; `SAIL_SEED` draws others. Needs `setup.sh --reference`.
#[test]
#[ignore = "runs transformers for a few minutes"]
fn random_configurations_are_those_of_transformers() {
    let out = tempfile::TempDir::new().unwrap();
    let seed = std::env::var("SAIL_SEED").unwrap_or("1".into());
    run_reference(&["25", &seed, out.path().to_str().unwrap()]);
    let mut worst: BTreeMap<&str, Compared> = BTreeMap::new();
    for family in ["aimv2", "dinov2", "internvit", "siglip"] {
        let _ = check_vision(&out.path().join(format!("{family}-inside")));
        for i in 0..25 {
            let folder = out.path().join(format!("{family}-{i}"));
            let Compared { sizes, forward, gradient } = check_vision(&folder);
            let worst = worst.entry(family).or_default();
            worst.sizes += sizes;
            worst.forward = worst.forward.max(forward);
            worst.gradient = worst.gradient.max(gradient);
            rewrite(&folder, VitLayout::Transformers, &folder.join("exported"));
        }
    }
    println!("{worst:#?}");
    run_reference(&["check", out.path().to_str().unwrap()]);
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
    let _ = assert_gradients("projector", &params, &of_params, "grad.", &[]);
}
