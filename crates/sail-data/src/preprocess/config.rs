//! `preprocessor_config.json` to [`Preprocessor`]: keys, class defaults, and what is refused.
//!
//! The rules are those of `_set_attributes` and `_standardize_kwargs` of transformers 5.17
//! (`image_processing_utils.py`): null is as good as missing, and keys that the class does not know have no
//! effect. What would change the pixels in a way that is not supported is an error.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Preprocessor, Resize, Statistics, Target};
use crate::error::{Error, Result};
use crate::image::{Filter, Size};

/// Largest edge that a file may ask for, in pixels.
const MAX_EDGE: u64 = 8192;

const SUPPORTED: &str = "`BitImageProcessor`, `CLIPImageProcessor`, `SiglipImageProcessor`, `ViTImageProcessor` and \
     `GotOcr2ImageProcessor`";

/// Keys that must not be true, and what they would do.
const REFUSED: [(&str, &str); 3] = [
    ("crop_to_patches", "cutting a picture into patches"),
    ("do_pad", "padding"),
    ("use_square_size", "another meaning of `size`"),
];

/// What a class does where the file says nothing.
struct Class {
    /// Without `Fast` and `Pil`.
    name: &'static str,
    mean: [f64; 3],
    std: [f64; 3],
    filter: Filter,
    size: Target,
    /// `do_center_crop`, to 224 x 224; the classes without it have no `crop_size` either.
    crops: bool,
    /// Whether a whole number as `size` is both edges, not the shorter one.
    square: bool,
    /// Whether `do_center_crop` has any effect.
    can_crop: bool,
}

const CLIP_MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
const EDGE: usize = 224;

const CLIP: Class = Class {
    name: "CLIPImageProcessor",
    mean: CLIP_MEAN,
    std: CLIP_STD,
    filter: Filter::Bicubic,
    size: Target::ShortestEdge(EDGE),
    crops: true,
    square: false,
    can_crop: true,
};
const VIT: Class = Class {
    name: "ViTImageProcessor",
    mean: [0.5; 3],
    std: [0.5; 3],
    filter: Filter::Bilinear,
    size: Target::Exact(Size { height: EDGE, width: EDGE }),
    crops: false,
    square: true,
    can_crop: true,
};
const CLASSES: [Class; 5] = [
    CLIP,
    Class { name: "BitImageProcessor", ..CLIP },
    VIT,
    Class { name: "SiglipImageProcessor", filter: Filter::Bicubic, square: false, ..VIT },
    Class {
        name: "GotOcr2ImageProcessor",
        size: Target::Exact(Size { height: 384, width: 384 }),
        crops: false,
        square: true,
        can_crop: false,
        ..CLIP
    },
];

pub(super) fn read(path: &Path) -> Result<Preprocessor> {
    let io = |cause| Error::Io { path: path.to_path_buf(), cause };
    let text = std::fs::read(path).map_err(io)?;
    let keys = serde_json::from_slice(&text).map_err(|cause| io(cause.into()))?;
    Fields { path, keys }.preprocessor()
}

/// The keys of one file.
struct Fields<'a> {
    path: &'a Path,
    keys: Map<String, Value>,
}

impl Fields<'_> {
    fn preprocessor(&self) -> Result<Preprocessor> {
        let class = self.class()?;
        for (key, what) in REFUSED {
            if self.flag(key, false)? {
                return Err(self.invalid(key, format!("is true: {what} is not supported")));
            }
        }
        let crops = self.flag("do_center_crop", class.crops)? && class.can_crop;
        let resize = if self.flag("do_resize", true)? { Some(self.resize(class)?) } else { None };
        let rescale = if self.flag("do_rescale", true)? { Some(self.rescale_factor()?) } else { None };
        let normalise = if self.flag("do_normalize", true)? { Some(self.statistics(class)?) } else { None };
        let crop = if crops { Some(self.crop_size(class)?) } else { None };
        Ok(Preprocessor { resize, crop, rescale, normalise })
    }

    /// The value of a key that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn invalid(&self, key: &str, detail: impl Into<String>) -> Error {
        Error::Preprocessor { path: self.path.to_path_buf(), key: key.to_owned(), detail: detail.into() }
    }

    fn class(&self) -> Result<&'static Class> {
        let named = ["image_processor_type", "feature_extractor_type"]
            .into_iter()
            .find_map(|key| self.get(key).map(|value| (key, value)));
        let Some((key, value)) = named else {
            return Err(self.invalid(
                "image_processor_type",
                format!("is missing, so what the file means is not known\n\nhint: name the class; {SUPPORTED} are supported"),
            ));
        };
        let name = value.as_str().unwrap_or_default().replace("FeatureExtractor", "ImageProcessor");
        let base = name.strip_suffix("Fast").or_else(|| name.strip_suffix("Pil")).unwrap_or(&name);
        CLASSES.iter().find(|class| class.name == base).ok_or_else(|| {
            self.invalid(key, format!("is {value}, which is not supported\n\nhint: {SUPPORTED} are"))
        })
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.invalid(key, format!("is {value}, expected true or false")))
    }

    fn resize(&self, class: &Class) -> Result<Resize> {
        let filter = match self.get("resample").map(|value| (value.as_u64(), value)) {
            None => class.filter,
            Some((Some(1), _)) => Filter::Lanczos,
            Some((Some(2), _)) => Filter::Bilinear,
            Some((Some(3), _)) => Filter::Bicubic,
            Some((_, value)) => {
                let detail = format!("is {value}; 1 (Lanczos), 2 (bilinear) and 3 (bicubic) are supported");
                return Err(self.invalid("resample", detail));
            }
        };
        let target = match self.get("size") {
            None => class.size,
            Some(value) => {
                let square = self.flag("default_to_square", class.square)?;
                self.target("size", value, square)?
            }
        };
        Ok(Resize { target, filter })
    }

    fn crop_size(&self, class: &Class) -> Result<Size> {
        let key = "crop_size";
        let Some(value) = self.get(key) else {
            let default = class.crops.then_some(Size { height: EDGE, width: EDGE });
            return default.ok_or_else(|| {
                let detail =
                    format!("is missing: `do_center_crop` is true, and `{}` has no default", class.name);
                self.invalid(key, detail)
            });
        };
        match self.target(key, value, true)? {
            Target::Exact(size) => Ok(size),
            Target::ShortestEdge(_) => {
                Err(self.invalid(key, format!("is {value}, expected `height` and `width`")))
            }
        }
    }

    /// A size in any of its forms; `square` says what a whole number means.
    fn target(&self, key: &str, value: &Value, square: bool) -> Result<Target> {
        let exact = |height: &Value, width: &Value| {
            let size = Size {
                height: self.edge(&format!("{key}.height"), height)?,
                width: self.edge(&format!("{key}.width"), width)?,
            };
            Ok(Target::Exact(size))
        };
        let unsupported = || {
            let forms =
                "{`height`, `width`}, {`shortest_edge`}, [height, width] and whole numbers are supported";
            Err(self.invalid(key, format!("is {value}; {forms}")))
        };
        match value {
            Value::Object(map) => {
                let map: Vec<(&str, &Value)> = map
                    .iter()
                    .map(|(name, edge)| (name.as_str(), edge))
                    .filter(|(_, edge)| !edge.is_null())
                    .collect();
                match map[..] {
                    [("height", height), ("width", width)] | [("width", width), ("height", height)] => {
                        exact(height, width)
                    }
                    [("shortest_edge", edge)] => {
                        Ok(Target::ShortestEdge(self.edge(&format!("{key}.shortest_edge"), edge)?))
                    }
                    _ => unsupported(),
                }
            }
            Value::Array(edges) => match &edges[..] {
                [height, width] => exact(height, width),
                _ => unsupported(),
            },
            Value::Number(_) if square => exact(value, value),
            Value::Number(_) => Ok(Target::ShortestEdge(self.edge(key, value)?)),
            _ => unsupported(),
        }
    }

    fn edge(&self, key: &str, value: &Value) -> Result<usize> {
        let edge = value.as_u64().filter(|edge| (1..=MAX_EDGE).contains(edge));
        let edge = edge.ok_or_else(|| {
            self.invalid(key, format!("is {value}, expected a whole number from 1 to {MAX_EDGE}"))
        })?;
        Ok(edge as usize)
    }

    fn rescale_factor(&self) -> Result<f64> {
        let key = "rescale_factor";
        let Some(value) = self.get(key) else { return Ok(1.0 / 255.0) };
        value.as_f64().ok_or_else(|| self.invalid(key, format!("is {value}, expected a number")))
    }

    fn statistics(&self, class: &Class) -> Result<Statistics> {
        let mean = self.channels("image_mean", class.mean)?;
        let std = self.channels("image_std", class.std)?;
        if let Some(value) = std.iter().find(|&&value| value <= 0.0) {
            return Err(self.invalid("image_std", format!("has {value}, expected numbers above 0")));
        }
        Ok(Statistics { mean, std })
    }

    /// One number per channel, or one for all.
    fn channels(&self, key: &str, default: [f64; 3]) -> Result<[f32; 3]> {
        let values: Option<Vec<f64>> = match self.get(key) {
            None => Some(default.to_vec()),
            Some(Value::Array(values)) => values.iter().map(Value::as_f64).collect(),
            Some(value) => value.as_f64().map(|value| vec![value; 3]),
        };
        let values = values.and_then(|values| <[f64; 3]>::try_from(values).ok());
        let values = values.map(|values| values.map(|value| value as f32));
        values.filter(|values| values.iter().all(|value| value.is_finite())).ok_or_else(|| {
            let found = self.get(key).unwrap_or(&Value::Null);
            self.invalid(key, format!("is {found}, expected three numbers, for red, green and blue"))
        })
    }
}
