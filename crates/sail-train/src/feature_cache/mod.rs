//! Features that a frozen vision transformer gave for images, kept from epoch to epoch and from run to run.
//!
//! An image is known by its pixels as the encoder sees them, an encoder by its configuration, its weights, the type and
//! kind of device that it computes with and the release of this program: what differs in any of them is another key, and
//! lies in another folder but for the pixels. The features of an image are computed by itself, so that they do not
//! depend on what lies beside it in its pack, nor on what of the pack was found: the same bits, cold or warm, on any
//! number of ranks.
//!
//! Not in checkpoints. How bytes are kept is `store`'s matter. Called where packs become tensors ([`crate::batch`]).

mod store;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;

use rayon::prelude::*;
use sail_data::Images;
use sail_model::vision::{Features, VisionConfig};
use sail_model::vlm::Vlm;
use sail_torch::upload;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor, no_grad};

use self::store::{Key, Store};
use crate::config::{FeatureCachePlan, Module, Precision, hex};
use crate::error::Result;
use crate::stage::Fingerprints;

/// To be raised whenever the same pixels and weights come to give other features.
const FORMAT: u32 = 1;

/// How images were come by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheUse {
    /// Images whose features were there.
    pub hits: u64,
    /// Images that the vision transformer saw.
    pub misses: u64,
}

impl CacheUse {
    /// Adds another's counts.
    pub fn add(&mut self, other: Self) {
        self.hits += other.hits;
        self.misses += other.misses;
    }
}

impl fmt::Display for CacheUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hits, misses } = self;
        write!(f, "features of {hits} images were in the cache, of {misses} they were computed")
    }
}

/// The features of one frozen vision transformer.
pub struct FeatureCache {
    store: RefCell<Store>,
    /// Tells the encoder from all others.
    encoder: String,
    kind: Kind,
    device: Device,
    used: Cell<CacheUse>,
}

impl FeatureCache {
    /// That of an encoder with `weights`, which computes in `precision`, not `auto`, on `device`.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when the folder cannot be made or read.
    pub fn open(
        plan: &FeatureCachePlan,
        vision: &VisionConfig,
        weights: &Fingerprints,
        (precision, device): (Precision, Device),
    ) -> Result<Self> {
        let encoder = json!({
            "format": FORMAT, "vision": vision.to_json(), "weights": weights.digest_of(Module::Vision),
            "dtype": precision.name(), "device": if device.is_cuda() { "cuda" } else { "cpu" },
            "program": env!("CARGO_PKG_VERSION"),
        });
        let encoder = hex(&Sha256::digest(encoder.to_string()));
        let store = Store::open(&plan.dir, &encoder[..16], plan.max_bytes)?;
        Ok(Self {
            store: RefCell::new(store),
            encoder,
            kind: precision.kind(),
            device,
            used: Cell::default(),
        })
    }

    /// The features of images, at least one, as the encoder of `model` gives them for each alone; those that are not there
    /// are computed, without a graph, and added.
    ///
    /// # Errors
    /// As [`Vlm::encode`], and those of libtorch.
    pub fn features(&self, model: &Vlm, images: &Images) -> Result<Features> {
        let (config, encoder, kind) = (&model.config().vision, &self.encoder, self.kind);
        let store = &mut *self.store.borrow_mut();
        let images: Vec<Shown<'_>> = images.iter().collect();
        let keys: Vec<Key> = images.par_iter().map(|(size, pixels)| key(encoder, *size, pixels)).collect();
        if !keys.iter().all(|key| store.has(key)) {
            store.refresh();
        }
        let grid = |((height, width), _): &Shown<'_>| config.grid(*height as i64, *width as i64);
        let grids = images.iter().map(grid).collect::<sail_model::Result<Vec<(i64, i64)>>>()?;
        let rows: Vec<i64> = grids.iter().map(|(h, w)| h * w).collect();
        let row_bytes = config.hidden_size() as usize * kind.elt_size_in_bytes();
        let shape = [rows.iter().sum(), config.hidden_size()];
        // All that is found goes to the device as one.
        let mut bytes = vec![0; shape[0] as usize * row_bytes];
        let mut rest = &mut bytes[..];
        let place = |rows: &i64| {
            rest.split_off_mut(..*rows as usize * row_bytes).expect("invariant: as long as all of them")
        };
        let places: Vec<&mut [u8]> = rows.iter().map(place).collect();
        let read = |(key, place): (&Key, &mut [u8])| store.read(key, place);
        let found: Vec<bool> = keys.par_iter().zip(places).map(read).collect();
        let x_td = upload(&bytes, self.device)?.f_view_dtype(kind)?.f_view(shape)?;

        let mut used = self.used.get();
        let mut computed: BTreeMap<Key, Tensor> = BTreeMap::new();
        for (i, mut part_td) in x_td.f_split_with_sizes(&rows[..], 0)?.into_iter().enumerate() {
            if found[i] {
                used.hits += 1;
                continue;
            }
            // An image may come twice in a pack.
            let of_image_td = if let Some(known_td) = computed.get(&keys[i]) {
                used.hits += 1;
                known_td.shallow_clone()
            } else {
                used.misses += 1;
                let made_td = self.compute(model, images[i])?;
                store.add(keys[i], &to_bytes(&made_td)?);
                computed.insert(keys[i], made_td.shallow_clone());
                made_td
            };
            part_td.f_copy_(&of_image_td)?;
        }
        self.used.set(used);
        Ok(Features { x_td, grids })
    }

    /// What was counted since the last call.
    pub fn take_used(&self) -> CacheUse {
        self.used.take()
    }

    /// `[t, d]` of one image.
    fn compute(&self, model: &Vlm, ((height, width), pixels): Shown<'_>) -> Result<Tensor> {
        let pixels_nchw = upload(pixels, self.device)?.f_view([1, 3, height as i64, width as i64])?;
        Ok(no_grad(|| model.encode(&[pixels_nchw]))?.x_td)
    }
}

impl fmt::Display for FeatureCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let store = self.store.borrow();
        write!(f, "features of {} images in {}", store.len(), store.dir().display())
    }
}

/// Height and width of an image, and its pixels `[3, height, width]`.
type Shown<'a> = ((usize, usize), &'a [f32]);

fn key(encoder: &str, (height, width): (usize, usize), pixels: &[f32]) -> Key {
    const PIECE: usize = 4096;
    let mut hash = Sha256::new();
    hash.update(encoder);
    hash.update((height as u64).to_le_bytes());
    hash.update((width as u64).to_le_bytes());
    let mut bytes = [0; 4 * PIECE];
    for piece in pixels.chunks(PIECE) {
        for (bytes, value) in bytes.chunks_exact_mut(4).zip(piece) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        hash.update(&bytes[..4 * piece.len()]);
    }
    hash.finalize().into()
}

fn to_bytes(x_td: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = vec![0; x_td.numel() * x_td.kind().elt_size_in_bytes()];
    x_td.to_device(Device::Cpu).contiguous().f_copy_data_u8(&mut bytes, x_td.numel())?;
    Ok(bytes)
}
