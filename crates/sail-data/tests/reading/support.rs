//! The demo mixture as a specification, and packs as lines that can be compared.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sail_data::{
    Balance, DataSpec, ImageSpec, ImageTokens, Length, Loaded, LossWeight, MixBy, SourceSpec, Template,
    TextEncoder, TextSpec, Tiling, TooLong,
};

/// The repository's folder.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

pub(crate) fn text_spec() -> TextSpec {
    TextSpec {
        template: Template::Chatml,
        template_file: None,
        system: None,
        image_tokens: ImageTokens {
            start: "<img>".into(),
            context: "<IMG_CONTEXT>".into(),
            end: "</img>".into(),
        },
        loss_weight: LossWeight::Token,
    }
}

/// The training shards in `folder` (a path or URL), mixed, in `streams` streams.
pub(crate) fn demo_spec(folder: &str, streams: usize) -> DataSpec {
    let source = |name: &str, last: usize, weight| {
        let shards = vec![format!("{folder}/{name}-train-{{000000..{last:06}}}.tar")];
        SourceSpec { weight, ..SourceSpec::new(name, shards) }
    };
    let sources = vec![source("caption", 2, 2.0), source("ocr", 1, 1.0), source("vqa", 1, 1.0)];
    let tiling = Tiling { min: 1, max: 4, thumbnail: true };
    let image = ImageSpec { tiling, ..ImageSpec::square(56, 4) };
    DataSpec {
        mix_by: MixBy::Tokens,
        length: Length::Endless,
        streams,
        seed: 11,
        tokens_per_pack: 1024,
        balance: Balance::Mean,
        too_long: TooLong::Drop,
        shuffle_buffer: 32,
        pack_buffer: 24,
        ..DataSpec::in_order(sources, text_spec(), image)
    }
}

pub(crate) fn encoder() -> Arc<TextEncoder> {
    Arc::new(TextEncoder::new(&root().join("configs/tiny/tokenizer.json"), &text_spec()).unwrap())
}

/// A pack with everything in it, as one line.
pub(crate) fn line(Loaded { pack, stream, .. }: &Loaded) -> String {
    let Some(pack) = pack else { return format!("{stream} has ended") };
    let keys: Vec<String> = pack.samples.iter().map(|id| format!("{}/{}", id.source, id.key)).collect();
    let mut hasher = DefaultHasher::new();
    (&pack.ids, &pack.targets, &pack.positions, &pack.cu_seqlens, &pack.image_rows).hash(&mut hasher);
    for value in pack.weights.iter().chain(&pack.images.pixels) {
        value.to_bits().hash(&mut hasher);
    }
    format!("{stream} {:016x} {}", hasher.finish(), keys.join(" "))
}
