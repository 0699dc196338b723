//! A draft: a sample with its tokens counted and its images still encoded.
//!
//! Everything that decides the length of a sample is known from the annotation and the image headers, so
//! packing never waits for pixels, and nothing is ever cut to fit.

use crate::annotation::{Annotation, Turn, place_marks};
use crate::error::{BadSample, Result};
use crate::image::Picture;
use crate::sample::{Sample, SampleId, Tiles};
use crate::shard::{Member, RawSample, SampleRef};
use crate::source::Source;
use crate::spec::{DataSpec, ImageSpec};
use crate::text::{Encoded, TextEncoder};

const IMAGE_SUFFIXES: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// A sample whose length is known and whose images are not decoded yet.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) id: SampleId,
    encoded: Encoded,
    pictures: Vec<Picture>,
    turns: Vec<Turn>,
}

/// A sample that cannot be used, and why.
#[derive(Clone, Debug)]
pub(crate) struct Rejected {
    pub(crate) id: SampleId,
    pub(crate) cause: BadSample,
}

impl Rejected {
    /// Names the sample in the log.
    pub(crate) fn log(&self) {
        let SampleId { source, shard, key } = &self.id;
        let reason = self.cause.reason();
        tracing::warn!(%source, %shard, %key, reason, "sample skipped: {}", self.cause);
    }
}

impl Draft {
    /// Reads the sample at `place` up to its image headers.
    ///
    /// # Errors
    /// The outer error is one of the shard and stops the run; the inner one concerns this sample only.
    pub(crate) fn read(
        spec: &DataSpec,
        encoder: &TextEncoder,
        source: &Source,
        place: SampleRef,
    ) -> Result<std::result::Result<Self, Box<Rejected>>> {
        let raw = source.open(place.shard as usize)?.read(place.extent)?;
        Ok(Self::from_raw(spec, encoder, source, place, raw))
    }

    /// The draft of a sample whose members have been read already.
    pub(crate) fn from_raw(
        spec: &DataSpec,
        encoder: &TextEncoder,
        source: &Source,
        place: SampleRef,
        raw: RawSample,
    ) -> std::result::Result<Self, Box<Rejected>> {
        let shard = source.shards[place.shard as usize].clone();
        let id = SampleId { source: source.name.clone(), shard, key: raw.key.clone() };
        match Self::parse(spec, encoder, raw) {
            Ok((encoded, pictures, turns)) => Ok(Self { id, encoded, pictures, turns }),
            Err(cause) => Err(Box::new(Rejected { id, cause })),
        }
    }

    fn parse(
        spec: &DataSpec,
        encoder: &TextEncoder,
        raw: RawSample,
    ) -> std::result::Result<(Encoded, Vec<Picture>, Vec<Turn>), BadSample> {
        raw.check_unique()?;
        let json = raw.member("json").ok_or_else(|| BadSample::NoAnnotation { members: suffixes(&raw) })?;
        let Annotation { mut turns, images } = Annotation::parse(&json.data)?;
        let members = find_images(raw, images)?;
        place_marks(&mut turns, members.len())?;
        let count = members.len();
        let plan = |Member { name, data, .. }| Picture::plan(name, data, count, &spec.image);
        let pictures =
            members.into_iter().map(plan).collect::<std::result::Result<Vec<Picture>, BadSample>>()?;
        let visual_tokens: Vec<usize> =
            pictures.iter().map(|picture| picture.visual_tokens(&spec.image)).collect();
        let encoded = encoder.encode(&turns, &visual_tokens)?;
        let (tokens, limit) = (encoded.ids.len(), spec.tokens_per_pack);
        if tokens > limit {
            return Err(BadSample::TooLong { tokens, limit });
        }
        Ok((encoded, pictures, turns))
    }

    /// Tokens of the sample.
    pub(crate) fn tokens(&self) -> usize {
        self.encoded.ids.len()
    }

    /// Its tokens and labels.
    pub(crate) fn encoded(&self) -> &Encoded {
        &self.encoded
    }

    /// Its images, still encoded.
    pub(crate) fn pictures(&self) -> &[Picture] {
        &self.pictures
    }

    /// Its turns, with a mark for each image.
    pub(crate) fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// Decodes the images.
    pub(crate) fn finish(self, spec: &ImageSpec) -> std::result::Result<Sample, Box<Rejected>> {
        let mut tiles = Tiles::none(spec.tile_px);
        for picture in &self.pictures {
            if let Err(cause) = picture.render(spec, &mut tiles) {
                return Err(Box::new(Rejected { id: self.id, cause }));
            }
        }
        let Encoded { ids, targets, weights, image_rows } = self.encoded;
        Ok(Sample { id: self.id, ids, targets, weights, tiles, image_rows, turns: self.turns })
    }
}

fn suffixes(raw: &RawSample) -> String {
    let suffixes: Vec<String> = raw.members.iter().map(|member| format!("`{}`", member.suffix)).collect();
    if suffixes.is_empty() { "none".to_owned() } else { suffixes.join(", ") }
}

/// The members that hold the sample's images: those that the annotation names, by member name, base name or
/// suffix; or, when it has no such field, all image members in the order of the archive.
fn find_images(raw: RawSample, names: Option<Vec<String>>) -> std::result::Result<Vec<Member>, BadSample> {
    let is_image = |member: &Member| {
        let extension = member.suffix.rsplit('.').next().unwrap_or_default();
        IMAGE_SUFFIXES.contains(&extension)
    };
    let Some(names) = names else {
        return Ok(raw.members.into_iter().filter(is_image).collect());
    };
    let find = |reference: &str| {
        let by_name = |member: &&Member| member.name == reference;
        let by_base_name = |member: &&Member| base_name(&member.name) == base_name(reference);
        let by_suffix = |member: &&Member| member.suffix == reference.to_ascii_lowercase();
        let images = || raw.members.iter().filter(|member| is_image(member));
        images()
            .find(by_name)
            .or_else(|| images().find(by_base_name))
            .or_else(|| images().find(by_suffix))
            .cloned()
    };
    let unknown = |reference: &String| BadSample::UnknownImage {
        reference: reference.clone(),
        members: suffixes(&raw),
    };
    names.iter().map(|reference| find(reference).ok_or_else(|| unknown(reference))).collect()
}

fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}
