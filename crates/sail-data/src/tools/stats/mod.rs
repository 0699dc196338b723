//! The distributions of a data set: one [`Figures`] a source, in memory that does not grow with its samples.
//!
//! Image headers are read, pixels are not decoded. `text` and `html` show the result.

mod html;
mod text;

use serde::{Deserialize, Serialize};

pub(crate) use html::page;
pub(crate) use text::{count as text_count, report};

use super::access::{Drafted, Setup, pictures, token_counts};
use super::error::Result;
use super::sketch::{Bar, Names, Sketch, Summary};
use super::walk::{Found, Progress, walk};

/// What is measured, of samples or of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Measure {
    ImagesPerSample,
    ImageWidth,
    ImageHeight,
    TilesPerImage,
    TilesPerSample,
    VisualTokens,
    TextTokens,
    TotalTokens,
    AnswerTokens,
}

impl Measure {
    /// All, in the order of a report.
    pub(crate) const ALL: [Self; 9] = [
        Self::ImagesPerSample,
        Self::ImageWidth,
        Self::ImageHeight,
        Self::TilesPerImage,
        Self::TilesPerSample,
        Self::VisualTokens,
        Self::TextTokens,
        Self::TotalTokens,
        Self::AnswerTokens,
    ];

    /// What a row of a report is called.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::ImagesPerSample => "images per sample",
            Self::ImageWidth => "image width, px",
            Self::ImageHeight => "image height, px",
            Self::TilesPerImage => "tiles per image",
            Self::TilesPerSample => "tiles per sample",
            Self::VisualTokens => "visual tokens per sample",
            Self::TextTokens => "text tokens per sample",
            Self::TotalTokens => "tokens per sample",
            Self::AnswerTokens => "answer tokens per sample",
        }
    }

    /// Whether it needs a tokenizer.
    fn counts_text(self) -> bool {
        matches!(self, Self::TextTokens | Self::TotalTokens | Self::AnswerTokens)
    }
}

/// The distributions of one source.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    pub(crate) name: String,
    pub(crate) shards: usize,
    pub(crate) samples: u64,
    pub(crate) bad: Names,
    /// Samples with more tokens than a pack.
    pub(crate) too_long: u64,
    pub(crate) licenses: Names,
    pub(crate) origins: Names,
    sketches: Vec<Sketch>,
}

/// The distributions of all sources.
#[derive(Debug)]
pub(crate) struct Stats {
    pub(crate) sources: Vec<Figures>,
    /// Tokens of a pack, when it is known; and whether text was tokenised.
    pub(crate) limit: Option<usize>,
    pub(crate) counts_text: bool,
    /// Path and error of each shard that could not be read to its end.
    pub(crate) broken: Vec<(String, crate::Error)>,
}

/// The two fields of an annotation that say where a sample comes from.
#[derive(Default, Deserialize)]
struct Provenance {
    license: Option<String>,
    source: Option<String>,
}

/// What is counted of a sample; made on any thread.
struct Counted {
    outcome: std::result::Result<Numbers, &'static str>,
    provenance: Provenance,
}

struct Numbers {
    tokens: usize,
    answers: usize,
    visual: usize,
    /// Width, height and tiles of each image.
    images: Vec<(u32, u32, usize)>,
}

impl Figures {
    fn new(name: &str, shards: usize) -> Self {
        Self {
            name: name.to_owned(),
            shards,
            samples: 0,
            bad: Names::default(),
            too_long: 0,
            licenses: Names::default(),
            origins: Names::default(),
            sketches: vec![Sketch::default(); Measure::ALL.len()],
        }
    }

    /// The distribution of a measure.
    pub(crate) fn sketch(&self, measure: Measure) -> &Sketch {
        &self.sketches[measure as usize]
    }

    fn add(&mut self, counted: Counted, limit: Option<usize>) {
        self.samples += 1;
        let Provenance { license, source } = counted.provenance;
        self.licenses.add(license.as_deref().unwrap_or("(none)"), 1);
        self.origins.add(source.as_deref().unwrap_or("(none)"), 1);
        let numbers = match counted.outcome {
            Ok(numbers) => numbers,
            Err(reason) => return self.bad.add(reason, 1),
        };
        self.too_long += u64::from(limit.is_some_and(|limit| numbers.tokens > limit));
        let mut add = |measure: Measure, value: usize| self.sketches[measure as usize].add(value as u64);
        add(Measure::ImagesPerSample, numbers.images.len());
        for &(width, height, tiles) in &numbers.images {
            add(Measure::ImageWidth, width as usize);
            add(Measure::ImageHeight, height as usize);
            add(Measure::TilesPerImage, tiles);
        }
        add(Measure::TilesPerSample, numbers.images.iter().map(|&(_, _, tiles)| tiles).sum());
        add(Measure::VisualTokens, numbers.visual);
        add(Measure::TextTokens, numbers.tokens - numbers.visual);
        add(Measure::TotalTokens, numbers.tokens);
        add(Measure::AnswerTokens, numbers.answers);
    }

    fn merge(&mut self, other: &Self) {
        self.shards += other.shards;
        self.samples += other.samples;
        self.too_long += other.too_long;
        self.bad.merge(&other.bad);
        self.licenses.merge(&other.licenses);
        self.origins.merge(&other.origins);
        for (mine, theirs) in self.sketches.iter_mut().zip(&other.sketches) {
            mine.merge(theirs);
        }
    }
}

impl Stats {
    /// Reads every sample up to its image headers.
    ///
    /// # Errors
    /// None of a shard: those are listed.
    pub(crate) fn measure(mut setup: Setup, progress: &dyn Progress) -> Result<Self> {
        let limit = Some(setup.spec.tokens_per_pack).filter(|&limit| limit < usize::MAX && setup.counts_text);
        // Nothing is too long for being measured.
        setup.spec.tokens_per_pack = usize::MAX;
        let new = |source: &crate::source::Source| Figures::new(&source.name, source.shards.len());
        let mut sources: Vec<Figures> = setup.sources.iter().map(new).collect();
        let mut broken = Vec::new();
        walk(
            &setup.sources,
            progress,
            |source, place| Ok(count(&setup, &setup.draft(source, place)?)),
            |source, found| {
                match found {
                    Found::Sample(counted) => sources[source].add(counted, limit),
                    Found::BrokenShard { shard, error } => broken.push((shard.to_owned(), error)),
                    Found::UnfitWeights { error, .. } => return Err(error.into()),
                }
                Ok(())
            },
        )?;
        Ok(Self { sources, limit, counts_text: setup.counts_text, broken })
    }

    /// All sources together.
    pub(crate) fn total(&self) -> Figures {
        let mut total = Figures::new("all sources", 0);
        self.sources.iter().for_each(|source| total.merge(source));
        total
    }

    /// The measures that this data and tokenizer give.
    pub(crate) fn measures(&self) -> impl Iterator<Item = Measure> {
        Measure::ALL.into_iter().filter(|measure| self.counts_text || !measure.counts_text())
    }

    /// For other programs: every source and, as the last entry, all of them together.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        let figures = |figures: &Figures| {
            let distributions: serde_json::Map<_, _> = self
                .measures()
                .map(|measure| {
                    let sketch = figures.sketch(measure);
                    let (summary, histogram) = (sketch.summary(), sketch.bars(40));
                    let name = serde_json::to_value(measure).unwrap_or_default();
                    let name = name.as_str().unwrap_or_default().to_owned();
                    // Sums of more than 2^64 tokens do not occur.
                    let shown =
                        Distribution { count: sketch.count(), sum: sketch.sum() as u64, summary, histogram };
                    (name, serde_json::json!(shown))
                })
                .collect();
            serde_json::json!({
                "name": figures.name, "shards": figures.shards, "samples": figures.samples,
                "bad": figures.bad, "too_long": self.limit.map(|_| figures.too_long),
                "licenses": figures.licenses, "sources": figures.origins, "distributions": distributions,
            })
        };
        serde_json::json!({
            "tokens_per_pack": self.limit,
            "sources": self.sources.iter().map(figures).collect::<Vec<_>>(),
            "total": figures(&self.total()),
            "broken_shards": self.broken.iter().map(|(shard, error)| {
                serde_json::json!({"shard": shard, "error": error.to_string()})
            }).collect::<Vec<_>>(),
        })
    }
}

#[derive(Serialize)]
struct Distribution {
    count: u64,
    sum: u64,
    #[serde(flatten)]
    summary: Option<Summary>,
    histogram: Vec<Bar>,
}

fn count(setup: &Setup, drafted: &Drafted) -> Counted {
    let json = drafted.annotation.as_deref();
    let provenance = json.and_then(|json| serde_json::from_slice(json).ok()).unwrap_or_default();
    let numbers = |draft| {
        let (tokens, answers, visual) = token_counts(draft);
        let images = pictures(draft, &setup.spec.image);
        let images = images.into_iter().map(|image| (image.width, image.height, image.tiles)).collect();
        Numbers { tokens, answers, visual, images }
    };
    let outcome = drafted.draft.as_ref().map(numbers).map_err(|rejected| rejected.cause.reason());
    Counted { outcome, provenance }
}
