//! A draft: a sample with its tokens counted and its images still encoded.
//!
//! Everything that decides the length of a sample is known from the annotation and the image headers, so
//! packing never waits for pixels. What is cut to fit is text, never an image.

use crate::annotation::Turn;
use crate::error::{BadSample, Error, Failure, Result};
use crate::image::Picture;
use crate::layout::{self, Context, Gathered};
use crate::packer::Load;
use crate::rng::Key;
use crate::sample::{Images, Sample, SampleId};
use crate::shard::{RawSample, SampleRef};
use crate::source::Source;
use crate::spec::{DataSpec, ImageSpec, TooLong};
use crate::text::{Encoded, TextEncoder};

/// A sample whose length is known and whose images are not decoded yet.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) id: SampleId,
    /// Random draws that belong to this sample in this epoch.
    key: Key,
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
        Self::from_raw(spec, encoder, source, place, &raw)
    }

    /// The draft of a sample whose members have been read already.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn from_raw(
        spec: &DataSpec,
        encoder: &TextEncoder,
        source: &Source,
        place: SampleRef,
        raw: &RawSample,
    ) -> Result<std::result::Result<Self, Box<Rejected>>> {
        let shard = source.shards[place.shard as usize].clone();
        let id = SampleId { source: source.name.clone(), shard, key: raw.key.clone() };
        let key = Key::new(spec.seed).with_name("sample").with_name(&id.key).with(u64::from(place.epoch));
        match Self::parse(spec, encoder, Context::new(source, place.epoch), raw) {
            Ok((encoded, pictures, turns)) => Ok(Ok(Self { id, key, encoded, pictures, turns })),
            Err(Failure::Sample(BadSample::TooLong { tokens, limit })) if spec.too_long == TooLong::Error => {
                let SampleId { source, shard, key } = id;
                Err(Error::SampleTooLong { source_name: source, shard, key, tokens, limit })
            }
            Err(Failure::Sample(cause)) => Ok(Err(Box::new(Rejected { id, cause }))),
            Err(Failure::Run(error)) => Err(error),
        }
    }

    fn parse(
        spec: &DataSpec,
        encoder: &TextEncoder,
        context: Context,
        raw: &RawSample,
    ) -> std::result::Result<(Encoded, Vec<Picture>, Vec<Turn>), Failure> {
        let named = layout::read(raw, context)?;
        let Gathered { turns, mut pictures } = layout::gather(raw, named, &spec.image)?;
        let visual_tokens: Vec<usize> =
            pictures.iter().map(|picture| picture.visual_tokens(&spec.image)).collect();
        let limit = spec.tokens_per_pack;
        let encoded = match spec.too_long {
            TooLong::TruncateText => encoder.encode_within(&turns, &visual_tokens, limit)?,
            TooLong::Drop | TooLong::Error => encoder.encode(&turns, &visual_tokens)?,
        };
        let tokens = encoded.ids.len();
        if tokens > limit {
            return Err(BadSample::TooLong { tokens, limit }.into());
        }
        pictures.truncate(encoded.images);
        Ok((encoded, pictures, turns))
    }

    /// What the sample adds to a pack.
    pub(crate) fn load(&self) -> Load {
        Load { tokens: self.encoded.ids.len(), visual: self.encoded.image_rows.len() }
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
        let mut images = Images::default();
        for picture in &self.pictures {
            if let Err(cause) = picture.render(spec, self.key, &mut images) {
                return Err(Box::new(Rejected { id: self.id, cause }));
            }
        }
        let Encoded { ids, targets, weights, image_rows, .. } = self.encoded;
        Ok(Sample { id: self.id, ids, targets, weights, images, image_rows, turns: self.turns })
    }
}
