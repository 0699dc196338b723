//! The one place where the tools meet the rest of the crate: sources, drafts, pictures, tokens.

use std::io::Cursor;
use std::path::Path;

use image::{ImageFormat, RgbImage};
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::error::{Result, ToolError};
use crate::annotation::Turn;
use crate::draft::{Draft, Rejected};
use crate::error::BadSample;
use crate::image::{Picture, Size, frame_count};
use crate::layout::{self, Context, Conversation};
use crate::sample::{IGNORE, Sample};
use crate::shard::{Member, RawSample, SampleRef};
use crate::source::Source;
use crate::spec::{
    DataSpec, ImageSpec, ImageTokens, LossWeight, SourceSpec, StoreSpec, Template, TextSpec, TooLong,
};
use crate::store::Store;
use crate::text::TextEncoder;

/// A data specification with its sources found and its tokenizer loaded.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) spec: DataSpec,
    pub(crate) encoder: TextEncoder,
    pub(crate) sources: Vec<Source>,
    /// Whether `encoder` is a real one, so that numbers of text tokens mean something.
    pub(crate) counts_text: bool,
}

impl Setup {
    /// Finds the shards and loads the tokenizer. Without one, every byte of text counts as a token, which is
    /// enough to check conversations and images.
    pub(crate) fn open(mut spec: DataSpec, tokenizer: Option<&Path>) -> Result<Self> {
        // A tool goes on where training would stop, and reports the sample.
        if spec.too_long == TooLong::Error {
            spec.too_long = TooLong::Drop;
        }
        let sources = Source::open_all(&spec)?;
        let encoder = match tokenizer {
            Some(path) => TextEncoder::new(path, &spec.text)?,
            None => byte_encoder(&spec.text)?,
        };
        Ok(Self { spec, encoder, sources, counts_text: tokenizer.is_some() })
    }

    /// The sample at `place` up to its image headers, and its annotation; see [`Draft::read`].
    pub(crate) fn draft(&self, source: &Source, place: SampleRef) -> crate::Result<Drafted> {
        let raw = source.open(place.shard as usize)?.read(place.extent)?;
        let key = raw.key.clone();
        let annotation = raw.member("json").map(|json| json.data.to_vec());
        let draft = Draft::from_raw(&self.spec, &self.encoder, source, place, &raw)?;
        Ok(Drafted { key, annotation, draft })
    }

    /// As [`draft`](Self::draft), for a conversation that is not in a shard yet; its images are files in a folder.
    pub(crate) fn draft_of(
        &self,
        source: &Source,
        key: &str,
        annotation: Vec<u8>,
        folder: &Path,
    ) -> crate::Result<std::result::Result<Draft, Box<Rejected>>> {
        let json = Member { name: format!("{key}.json"), suffix: "json".into(), data: annotation.into() };
        let raw = RawSample::new(key, vec![json]);
        let raw = raw.with_images_in(&source.store, &folder.display().to_string());
        let extent = crate::shard::Extent { offset: 0, bytes: 0 };
        Draft::from_raw(&self.spec, &self.encoder, source, SampleRef { shard: 0, epoch: 0, extent }, &raw)
    }

    /// Decodes the images of a draft.
    pub(crate) fn finish(&self, draft: Draft) -> std::result::Result<Sample, Box<Rejected>> {
        draft.finish(&self.spec.image)
    }
}

/// A sample up to its image headers.
#[derive(Debug)]
pub(crate) struct Drafted {
    pub(crate) key: String,
    /// Its `.json` member, when it has one.
    pub(crate) annotation: Option<Vec<u8>>,
    pub(crate) draft: std::result::Result<Draft, Box<Rejected>>,
}

/// One image of a draft.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PictureFacts {
    pub(crate) name: String,
    /// In the file (upright where it is turned), in pixels.
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Tiles per row and per column.
    pub(crate) columns: usize,
    pub(crate) rows: usize,
    pub(crate) thumbnail: bool,
    pub(crate) tiles: usize,
    pub(crate) visual_tokens: usize,
}

/// What is known of a draft's images.
pub(crate) fn pictures(draft: &Draft, spec: &ImageSpec) -> Vec<PictureFacts> {
    draft.pictures().iter().map(|picture| facts(picture, spec)).collect()
}

fn facts(picture: &Picture, spec: &ImageSpec) -> PictureFacts {
    let Size { height, width } = picture.size(spec);
    let grid = picture.grid();
    PictureFacts {
        name: picture.name().to_owned(),
        width: width as u32,
        height: height as u32,
        columns: grid.columns,
        rows: grid.rows,
        thumbnail: grid.thumbnail,
        tiles: grid.tiles(),
        visual_tokens: picture.visual_tokens(spec),
    }
}

/// The images of a draft as files with their extensions, in the order of its marks.
///
/// # Errors
/// That of a page or frame that cannot be decoded.
pub(crate) fn image_files(draft: &Draft) -> std::result::Result<Vec<(&'static str, Vec<u8>)>, BadSample> {
    draft.pictures().iter().map(image_file).collect()
}

/// The file as it is, or the page or frame alone where the file has several.
fn image_file(picture: &Picture) -> std::result::Result<(&'static str, Vec<u8>), BadSample> {
    let bytes = picture.bytes();
    if frame_count(picture.name(), bytes)? == 1 {
        return Ok((extension(bytes).unwrap_or("jpg"), bytes.to_vec()));
    }
    let mut png = Cursor::new(Vec::new());
    let failed = |error: image::ImageError| BadSample::BadImage {
        image: picture.name().to_owned(),
        detail: error.to_string(),
    };
    picture.decode()?.write_to(&mut png, ImageFormat::Png).map_err(failed)?;
    Ok(("png", png.into_inner()))
}

/// The usual extension of an image file, by its first bytes.
pub(crate) fn extension(bytes: &[u8]) -> Option<&'static str> {
    image::guess_format(bytes).ok().and_then(|format| format.extensions_str().first().copied())
}

/// Tokens, answer tokens and visual tokens of a draft.
pub(crate) fn token_counts(draft: &Draft) -> (usize, usize, usize) {
    let encoded = draft.encoded();
    let answers = encoded.targets.iter().filter(|&&target| target != IGNORE).count();
    (encoded.ids.len(), answers, encoded.image_rows.len())
}

/// The tiles of a sample as pictures: what the encoder sees, with the normalisation undone.
pub(crate) fn tile_pictures(sample: &Sample, spec: &ImageSpec) -> Vec<RgbImage> {
    let byte = |value: f32, channel: usize| {
        ((value * spec.std[channel] + spec.mean[channel]) * 255.0).round().clamp(0.0, 255.0) as u8
    };
    let pictures = |(_, (height, width), pixels): (usize, (usize, usize), &[f32])| {
        let area = height * width;
        let picture = |planes: &[f32]| {
            RgbImage::from_fn(width as u32, height as u32, |x, y| {
                let pixel = y as usize * width + x as usize;
                image::Rgb(std::array::from_fn(|channel| byte(planes[channel * area + pixel], channel)))
            })
        };
        pixels.chunks_exact(3 * area).map(picture).collect::<Vec<RgbImage>>()
    };
    sample.images.batches().flat_map(pictures).collect()
}

/// Files that a pattern names.
pub(crate) fn find_files(pattern: &str) -> Result<Vec<String>> {
    Ok(Store::new(&StoreSpec::default())?.find("input", pattern)?)
}

/// One source alone, with its shards found.
pub(crate) fn find_shards(source: SourceSpec) -> Result<Source> {
    find_shards_in(source, StoreSpec::default())
}

/// The same, fetched as `store` says.
pub(crate) fn find_shards_in(source: SourceSpec, store: StoreSpec) -> Result<Source> {
    let spec = DataSpec::in_order(vec![source], text_spec(IMAGE_TOKENS), ImageSpec::square(1, 1));
    Ok(Source::open_all(&DataSpec { store, ..spec })?.remove(0))
}

/// The answers of the sample at `place`: what is learnt of it. Images are not decoded.
///
/// # Errors
/// The outer error is one of the shard; the inner one says why the sample cannot be used.
pub(crate) fn answers(
    source: &Source,
    place: SampleRef,
) -> crate::Result<std::result::Result<Vec<String>, BadSample>> {
    let raw = source.open(place.shard as usize)?.read(place.extent)?;
    let learnt = |conversation: Conversation| {
        let answers = conversation.turns.into_iter().filter(Turn::is_answer);
        answers.map(|turn| turn.text).collect()
    };
    Ok(layout::read(&raw, Context::new(source, place.epoch)).map(learnt))
}

/// The tokens before, for and after an image, where nobody says otherwise.
pub(crate) const IMAGE_TOKENS: [&str; 3] = ["<img>", "<IMG_CONTEXT>", "</img>"];

/// `ChatML` with these image tokens.
pub(crate) fn text_spec(image_tokens: [&str; 3]) -> TextSpec {
    let [start, context, end] = image_tokens.map(str::to_owned);
    TextSpec {
        template: Template::Chatml,
        template_file: None,
        system: None,
        image_tokens: ImageTokens { start, context, end },
        loss_weight: LossWeight::Token,
    }
}

/// A tokenizer of one token per byte of text.
fn byte_encoder(spec: &TextSpec) -> Result<TextEncoder> {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<String, Value> =
        alphabet.into_iter().enumerate().map(|(id, byte)| (byte.to_string(), json!(id))).collect();
    let image = &spec.image_tokens;
    let added: Vec<Value> = ["<|im_start|>", "<|im_end|>", &image.start, &image.context, &image.end]
        .into_iter()
        .enumerate()
        .map(|(n, token)| {
            json!({"id": 256 + n, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    });
    let dir = tempfile::tempdir().map_err(ToolError::io("write", &std::env::temp_dir()))?;
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).map_err(ToolError::io("write", &path))?;
    Ok(TextEncoder::new(&path, spec)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gradient, jpeg, png, spec, tar, text_spec};

    #[test]
    fn without_a_tokenizer_every_byte_is_a_token() {
        let encoder = byte_encoder(&text_spec()).unwrap();
        let turns = [crate::Turn { role: crate::Role::Assistant, text: "h\u{e9}".into() }];
        // <|im_start|> assistant \n, then the answer and <|im_end|>, then \n.
        assert_eq!(encoder.encode(&turns, &[]).unwrap().ids.len(), 1 + 10 + 3 + 1 + 1);
    }

    #[test]
    fn tiles_become_the_pixels_they_were_made_of() {
        let dir = tempfile::tempdir().unwrap();
        let (path, image) = (dir.path().join("a.tar"), gradient(8, 8));
        let json = r#"{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}"#;
        let members = [("a.json", json.as_bytes()), ("a.png", &png(&image))];
        std::fs::write(&path, tar(&members)).unwrap();
        let setup = Setup::open(spec(&[&path.display().to_string()]), None).unwrap();
        let extent = setup.sources[0].open(0).unwrap().scan(0, 0).next_sample().unwrap().unwrap();
        let place = SampleRef { shard: 0, epoch: 0, extent };
        let draft = setup.draft(&setup.sources[0], place).unwrap().draft.unwrap();
        let facts = pictures(&draft, &setup.spec.image);
        assert_eq!((facts[0].width, facts[0].height, facts[0].tiles), (8, 8, 1));
        let sample = setup.finish(draft).unwrap();
        assert_eq!(tile_pictures(&sample, &setup.spec.image), [image]);
    }

    #[test]
    fn the_first_bytes_tell_the_extension() {
        assert_eq!(extension(&png(&gradient(2, 2))), Some("png"));
        assert_eq!(extension(&jpeg(&gradient(2, 2))), Some("jpg"));
        assert_eq!(extension(b"text"), None);
    }
}
