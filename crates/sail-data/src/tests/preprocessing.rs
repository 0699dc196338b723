//! Preprocessors against transformers' (`tests/goldens/make_preprocess.py`), and every refusal of a file.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{Error, Preprocessor, load_image};

/// Largest and mean difference, in grey levels: none, but for rounding when these are
/// counted in fp32.
const LIMITS: (f32, f64) = (1e-3, 1e-3);

const KINDS: [&str; 10] = [
    "dinov2",
    "aimv2",
    "internvit",
    "vit",
    "siglip",
    "siglip2",
    "internvl",
    "uncropped",
    "padded",
    "lanczos",
];
const IMAGES: [&str; 8] =
    ["odd.png", "portrait.png", "tiny.png", "palette.png", "rgba.png", "gray.png", "photo.png", "photo.jpg"];

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/preprocess")
}

/// A preprocessor from a file with these keys.
fn from_json(keys: &Value) -> Result<Preprocessor, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("preprocessor_config.json");
    std::fs::write(&path, keys.to_string()).unwrap();
    Preprocessor::read(&path)
}

/// The keys of a kind's file.
fn keys(kind: &str) -> Value {
    let path = goldens().join(kind).join("preprocessor_config.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What the levels 0 to 255 become in each channel, by transformers.
fn levels(kind: &str) -> Vec<f32> {
    let bytes = std::fs::read(goldens().join(kind).join("levels.f32")).unwrap();
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

#[test]
fn every_pixel_is_that_of_transformers() {
    for kind in KINDS {
        let folder = goldens().join(kind);
        let preprocessor = Preprocessor::read(&folder.join("preprocessor_config.json")).unwrap();
        let levels = levels(kind);
        for image in IMAGES {
            let ours = preprocessor.apply_file(&goldens().join("images").join(image)).unwrap();
            let stem = image.split('.').next().unwrap();
            let golden = std::fs::read(folder.join(format!("{stem}.png"))).unwrap();
            let golden = crate::testing::decoded(image, &golden);
            assert_eq!((ours.width as u32, ours.height as u32), golden.dimensions(), "{kind} {image}");
            let plane = ours.height * ours.width;
            let difference = |(index, value): (usize, &f32)| {
                let (channel, pixel) = (index / plane, index % plane);
                let table = &levels[channel * 256..][..256];
                let theirs = table[usize::from(golden.as_raw()[pixel * 3 + channel])];
                (value - theirs).abs() / (table[255] - table[0]) * 255.0
            };
            let differences: Vec<f32> = ours.pixels.iter().enumerate().map(difference).collect();
            let largest = differences.iter().copied().fold(0.0, f32::max);
            let mean =
                differences.iter().map(|&value| f64::from(value)).sum::<f64>() / differences.len() as f64;
            println!("{kind} {image}: largest {largest:.4}, mean {mean:.4} levels");
            assert!(largest <= LIMITS.0, "{kind} {image}: {largest} levels");
            assert!(mean <= LIMITS.1, "{kind} {image}: {mean} levels in the mean");
        }
    }
}

#[test]
fn rescaling_and_normalising_give_the_very_numbers_of_transformers() {
    let ramp = image::RgbImage::from_fn(16, 16, |x, y| image::Rgb([(y * 16 + x) as u8; 3]));
    let ramp = crate::testing::png(&ramp);
    for kind in KINDS {
        let mut keys = keys(kind);
        keys["do_resize"] = false.into();
        keys["do_center_crop"] = false.into();
        let ours = from_json(&keys).unwrap().apply("ramp.png", &ramp).unwrap();
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(&ours.pixels), bits(&levels(kind)), "{kind}");
    }
}

#[test]
fn missing_keys_have_the_defaults_of_their_class() {
    let defaults = std::fs::read(goldens().join("defaults.json")).unwrap();
    let defaults: serde_json::Map<String, Value> = serde_json::from_slice(&defaults).unwrap();
    assert_eq!(defaults.len(), 5);
    for (class, written_out) in defaults {
        let written_out = from_json(&written_out).unwrap();
        let nulls = json!({"size": null, "crop_size": null, "do_resize": null, "image_mean": null,
                           "resample": null, "rescale_factor": null, "do_center_crop": null});
        for suffix in ["", "Fast", "Pil"] {
            let mut keys = nulls.clone();
            keys["image_processor_type"] = format!("{class}{suffix}").into();
            assert_eq!(from_json(&keys).unwrap(), written_out, "{class}{suffix}");
            let bare = json!({"image_processor_type": format!("{class}{suffix}")});
            assert_eq!(from_json(&bare).unwrap(), written_out, "{class}{suffix}");
        }
    }
}

#[test]
fn what_sail_train_exports_gives_the_pixels_of_a_tile_of_training() {
    // As sail-model's `preprocessor_json` writes it.
    let preprocessor = from_json(&json!({
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": true, "do_resize": true,
        "size": {"height": 28, "width": 28}, "resample": 3, "do_center_crop": false, "do_rescale": true,
        "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }))
    .unwrap();
    let spec = preprocessor.image_spec().unwrap();
    assert_eq!((spec.tile_px, spec.mean, spec.std), (28, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]));
    for image in IMAGES {
        let path = goldens().join("images").join(image);
        let (images, pixels) = (load_image(&path, &spec).unwrap(), preprocessor.apply_file(&path).unwrap());
        assert_eq!(images.sizes, [(pixels.height, pixels.width)]);
        assert_eq!(images.pixels, pixels.pixels, "{image}");
    }
}

#[test]
fn what_is_not_supported_is_named_by_file_and_key() {
    let cases = [
        ("image_processor_type", json!(null)),
        ("image_processor_type", json!("DINOv3ViTImageProcessorFast")),
        ("image_processor_type", json!(7)),
        ("resample", json!(0)),
        ("resample", json!(5)),
        ("resample", json!("bicubic")),
        ("size", json!({"longest_edge": 224})),
        ("size", json!({"shortest_edge": 224, "longest_edge": 300})),
        ("size", json!([224])),
        ("size", json!("224")),
        ("size.shortest_edge", json!({"shortest_edge": 0})),
        ("size.width", json!({"height": 224, "width": 1_000_000})),
        ("size.height", json!({"height": 224.5, "width": 224})),
        ("size", json!(-1)),
        ("crop_size", json!({"shortest_edge": 224})),
        ("crop_size.height", json!(0)),
        ("do_resize", json!("yes")),
        ("do_pad", json!(true)),
        ("crop_to_patches", json!(true)),
        ("rescale_factor", json!("1/255")),
        ("image_mean", json!([0.5, 0.5])),
        ("image_mean", json!([0.5, 0.5, 1e300])),
        ("image_std", json!([0.5, 0.0, 0.5])),
    ];
    for (place, value) in cases {
        let mut keys = json!({"image_processor_type": "CLIPImageProcessor"});
        keys[place.split('.').next().unwrap()] = value.clone();
        let message = from_json(&keys).unwrap_err().to_string();
        assert!(message.contains(&format!("preprocessor_config.json`: `{place}` ")), "{value}: {message}");
    }
    let uncroppable = json!({"image_processor_type": "ViTImageProcessor", "do_center_crop": true});
    assert!(from_json(&uncroppable).unwrap_err().to_string().contains("`crop_size` is missing"));
}

#[test]
fn a_file_that_cannot_be_read_or_is_no_object_is_an_error() {
    for text in ["", "[]", "{\"size\": 224"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("preprocessor_config.json");
        std::fs::write(&path, text).unwrap();
        assert!(matches!(Preprocessor::read(&path), Err(Error::Io { .. })), "{text}");
    }
    assert!(matches!(Preprocessor::read(Path::new("missing.json")), Err(Error::Io { .. })));
    let preprocessor = from_json(&json!({"image_processor_type": "ViTImageProcessor"})).unwrap();
    assert!(matches!(preprocessor.apply("x", b"no picture"), Err(Error::Unusable { .. })));
    assert!(matches!(preprocessor.apply_file(Path::new("missing.png")), Err(Error::Io { .. })));
}
