//! A sample ready for the model, and a pack of samples: plain host memory, no tensors.

use std::borrow::Borrow;
use std::fmt;

use crate::annotation::{Role, Turn};
use crate::text::TextEncoder;

/// The target of a position that has nothing to predict.
pub const IGNORE: i64 = -100;

/// Where a sample comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct SampleId {
    /// Name of the source.
    pub source: String,
    /// Path of the shard.
    pub shard: String,
    /// Key inside the shard: the member path up to the first dot of its base name.
    pub key: String,
}

impl fmt::Display for SampleId {
    /// `source/shard/key`, the shard by its file name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shard = self.shard.rsplit('/').next().unwrap_or_default();
        write!(f, "{}/{shard}/{}", self.source, self.key)
    }
}

/// The tiles of images, or whole images of any resolution, one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Images {
    /// Height and width of each, in pixels; none for text-only samples.
    pub sizes: Vec<(usize, usize)>,
    /// `[3, height, width]` of each, row-major: (value / 255 - mean) / std per channel.
    pub pixels: Vec<f32>,
}

impl Images {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }

    /// Each by itself: its (height, width), and its pixels `[3, height, width]`.
    pub fn iter(&self) -> impl Iterator<Item = ((usize, usize), &[f32])> {
        let mut rest = self.pixels.as_slice();
        self.sizes.iter().map(move |size| {
            let (image, after) = rest.split_at(values(size));
            rest = after;
            (*size, image)
        })
    }

    /// Neighbours of one size: how many, their (height, width), and their pixels `[n, 3, height, width]`.
    pub fn batches(&self) -> impl Iterator<Item = (usize, (usize, usize), &[f32])> {
        let mut rest = self.pixels.as_slice();
        self.sizes.chunk_by(PartialEq::eq).map(move |alike| {
            let (batch, after) = rest.split_at(alike.iter().map(values).sum());
            rest = after;
            (alike.len(), alike[0], batch)
        })
    }

    /// The first `n` images.
    fn first(&self, n: usize) -> Self {
        let sizes = self.sizes[..n].to_vec();
        let pixels = self.pixels[..sizes.iter().map(values).sum()].to_vec();
        Self { sizes, pixels }
    }

    /// Appends others.
    fn extend(&mut self, other: &Self) {
        self.sizes.extend_from_slice(&other.sizes);
        self.pixels.extend_from_slice(&other.pixels);
    }
}

/// Values of an image of this height and width.
fn values(&(height, width): &(usize, usize)) -> usize {
    3 * height * width
}

/// One sample ready for the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Where it comes from.
    pub id: SampleId,
    /// Token ids `[t]`.
    pub ids: Vec<i64>,
    /// The id to predict from each position `[t]` (shifted already), [`IGNORE`] where nothing is learnt.
    /// The last position never has one.
    pub targets: Vec<i64>,
    /// Loss weight of each position `[t]`; 0 where the target is [`IGNORE`].
    pub weights: Vec<f32>,
    /// The tiles of all its images (or these whole), in the order of `image_rows`.
    pub images: Images,
    /// Positions in `ids` that stand for visual tokens, in the order of `images`, as many for each as its area is
    /// of all.
    pub image_rows: Vec<i64>,
    /// The turns as written.
    pub turns: Vec<Turn>,
}

/// Token ids to be continued by the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids `[t]`, ending with the assistant's header.
    pub ids: Vec<i64>,
    /// Positions in `ids` that stand for visual tokens, in the order of the images.
    pub image_rows: Vec<i64>,
}

/// The question of a sample, with the answer it hopes for.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplePrompt {
    /// Everything up to the first answer.
    pub prompt: Prompt,
    /// The images in the prompt.
    pub images: Images,
    /// The text of the first answer.
    pub truth: String,
}

impl Sample {
    /// The prompt of the first answer, for generation: ids up to and including the assistant's header.
    pub fn prompt(&self) -> SamplePrompt {
        let header_end = self.targets.iter().position(|&target| target != IGNORE);
        let length = header_end.map_or(self.ids.len(), |last| last + 1);
        let rows = self.image_rows.partition_point(|&row| row < length as i64);
        // Visual tokens are as many as the area: all tiles have the same, others one for so many pixels.
        let area = self.images.pixels.len() * rows;
        let shown = self.images.sizes.iter().scan(0, |pixels, size| {
            *pixels += values(size) * self.image_rows.len();
            (*pixels <= area).then_some(())
        });
        let answer = self.turns.iter().find(|turn| turn.is_answer());
        SamplePrompt {
            prompt: Prompt { ids: self.ids[..length].to_vec(), image_rows: self.image_rows[..rows].to_vec() },
            images: self.images.first(shown.count()),
            truth: answer.map_or_else(String::new, |turn| turn.text.clone()),
        }
    }

    /// What is asked first, marks of images included; empty where nobody asks.
    pub fn question(&self) -> &str {
        let asked = self.turns.iter().find(|turn| turn.role == Role::User);
        asked.map_or("", |turn| &turn.text)
    }

    /// The same images with other turns, of which `visual_tokens` has the number for each mark of an image.
    ///
    /// # Errors
    /// [`Error::Unusable`](crate::Error::Unusable) where the turns cannot be encoded.
    pub fn with_turns(
        &self,
        turns: Vec<Turn>,
        (visual_tokens, images): (&[usize], Images),
        encoder: &TextEncoder,
    ) -> crate::Result<Self> {
        let encoded = encoder.encode(&turns, visual_tokens);
        let encoded = encoded.map_err(|cause| crate::Error::Unusable { what: self.id.to_string(), cause })?;
        Ok(Self {
            id: self.id.clone(),
            ids: encoded.ids,
            targets: encoded.targets,
            weights: encoded.weights,
            images,
            image_rows: encoded.image_rows,
            turns,
        })
    }

    /// Number of positions with a target.
    pub fn answer_tokens(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}

impl Turn {
    /// Whether this turn is learnt: an assistant's turn with some text.
    pub fn is_answer(&self) -> bool {
        self.role == Role::Assistant && !self.text.trim().is_empty()
    }
}

/// Samples laid end to end; attention stays inside each segment of `cu_seqlens`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pack {
    /// Token ids `[t]` of all samples.
    pub ids: Vec<i64>,
    /// Targets `[t]`, [`IGNORE`] where nothing is learnt.
    pub targets: Vec<i64>,
    /// Loss weights `[t]`.
    pub weights: Vec<f32>,
    /// Position inside the sample `[t]`, starting at 0 for each.
    pub positions: Vec<i64>,
    /// Boundaries of the samples in `ids`: `[n + 1]`, from 0 to t.
    pub cu_seqlens: Vec<i64>,
    /// All images, in the order of `image_rows`.
    pub images: Images,
    /// How many of the images belong to each sample.
    pub images_per_sample: Vec<usize>,
    /// Indices into the pack's `ids` that stand for visual tokens, in the order of the images.
    pub image_rows: Vec<i64>,
    /// The samples, in order.
    pub samples: Vec<SampleId>,
}

impl Pack {
    /// Lays samples end to end. No padding: the length is the sum of theirs.
    pub fn collate<S: Borrow<Sample>>(samples: &[S]) -> Self {
        let samples: Vec<&Sample> = samples.iter().map(Borrow::borrow).collect();
        let tokens = samples.iter().map(|sample| sample.ids.len()).sum();
        let pixels = samples.iter().map(|sample| sample.images.pixels.len()).sum();
        let mut pack = Self {
            ids: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            weights: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            cu_seqlens: vec![0],
            images: Images { sizes: Vec::new(), pixels: Vec::with_capacity(pixels) },
            images_per_sample: Vec::with_capacity(samples.len()),
            image_rows: Vec::new(),
            samples: Vec::with_capacity(samples.len()),
        };
        for sample in samples {
            let start = pack.ids.len() as i64;
            pack.ids.extend_from_slice(&sample.ids);
            pack.targets.extend_from_slice(&sample.targets);
            pack.weights.extend_from_slice(&sample.weights);
            pack.positions.extend(0..sample.ids.len() as i64);
            pack.cu_seqlens.push(pack.ids.len() as i64);
            pack.image_rows.extend(sample.image_rows.iter().map(|row| row + start));
            pack.images.extend(&sample.images);
            pack.images_per_sample.push(sample.images.len());
            pack.samples.push(sample.id.clone());
        }
        pack
    }

    /// Sum of the loss weights.
    pub fn weight_sum(&self) -> f64 {
        self.weights.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// Number of positions with a target.
    pub fn answer_tokens(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(key: &str, ids: &[i64], rows: &[i64], tiles: usize) -> Sample {
        let n = ids.len();
        let mut targets = vec![IGNORE; n];
        targets[n - 2] = ids[n - 1];
        Sample {
            id: SampleId { source: "s".into(), shard: "a.tar".into(), key: key.into() },
            ids: ids.to_vec(),
            weights: targets.iter().map(|&t| f32::from(u8::from(t != IGNORE))).collect(),
            targets,
            images: Images { sizes: vec![(1, 1); tiles], pixels: vec![ids[0] as f32; tiles * 3] },
            image_rows: rows.to_vec(),
            turns: vec![
                Turn { role: Role::User, text: "<image>\nq".into() },
                Turn { role: Role::Assistant, text: "a".into() },
            ],
        }
    }

    #[test]
    fn a_pack_is_its_samples_end_to_end() {
        let samples = [sample("a", &[1, 2, 3, 4], &[1, 2], 2), sample("b", &[5, 6, 7], &[0], 1)];
        let pack = Pack::collate(&samples);
        assert_eq!(pack.ids, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(pack.targets, [IGNORE, IGNORE, 4, IGNORE, IGNORE, 7, IGNORE]);
        assert_eq!(pack.positions, [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!(pack.cu_seqlens, [0, 4, 7]);
        assert_eq!(pack.image_rows, [1, 2, 4]);
        assert_eq!(
            pack.images,
            Images { sizes: vec![(1, 1); 3], pixels: vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0] }
        );
        assert_eq!(pack.images_per_sample, [2, 1]);
        assert_eq!(pack.samples[1].key, "b");
    }

    #[test]
    fn the_prompt_ends_where_the_first_answer_begins() {
        let mut two_images = sample("a", &[1, 2, 3, 4, 5], &[1, 3], 2);
        two_images.targets = vec![IGNORE, IGNORE, 4, IGNORE, IGNORE];
        let asked = two_images.prompt();
        assert_eq!(asked.prompt, Prompt { ids: vec![1, 2, 3], image_rows: vec![1] });
        assert_eq!(asked.images.len(), 1, "the second image comes after the first answer");
        assert_eq!(asked.truth, "a");
    }

    #[test]
    fn the_images_of_a_prompt_are_those_whose_tokens_it_has() {
        let mut sample = sample("a", &[1, 2, 3, 4, 5, 6, 7, 8], &[0, 1, 4], 0);
        // Two tokens, then one.
        sample.images = Images { sizes: vec![(2, 4), (2, 2)], pixels: vec![0.0; 36] };
        sample.targets = vec![IGNORE, IGNORE, 4, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE];
        assert_eq!(sample.prompt().images.sizes, [(2, 4)]);
        sample.targets = vec![IGNORE, IGNORE, IGNORE, IGNORE, 6, IGNORE, IGNORE, IGNORE];
        assert_eq!(sample.prompt().images.sizes, [(2, 4), (2, 2)]);
        sample.targets = vec![2, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE];
        assert!(sample.prompt().images.is_empty());
    }

    #[test]
    fn neighbours_of_one_size_are_one_batch() {
        let pixels: Vec<f32> = (0..27).map(|at| at as f32).collect();
        let images = Images { sizes: vec![(1, 2), (1, 2), (2, 1), (1, 2), (1, 1)], pixels };
        let batches: Vec<_> =
            images.batches().map(|(n, size, pixels)| (n, size, pixels[0], pixels.len())).collect();
        assert_eq!(
            batches,
            [(2, (1, 2), 0.0, 12), (1, (2, 1), 12.0, 6), (1, (1, 2), 18.0, 6), (1, (1, 1), 24.0, 3)]
        );
        assert_eq!(Images::default().batches().count(), 0);
    }
}
