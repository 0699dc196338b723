//! Feature affinity (arXiv 2507.01643, Table 7): how close the visual tokens of some images come to the embeddings of the
//! words, both seen in two dimensions by their principal components.
//!
//! The paper gives no more than that; what is open was decided so:
//! - after the projector both clouds have the language model's width and are seen along the same two components, those of
//!   as many visual tokens and embeddings together, so that the larger cloud does not choose alone;
//! - before the projector they have different widths. Each is seen along its own two components, around its own mean: the
//!   distances then compare shapes and sizes, not places;
//! - the nearest and the mean distance are of all visual tokens and all embeddings, the Wasserstein distance of as many
//!   points of each, `points` of them or all of the smaller cloud.
//!
//! Dimension letters: v visual tokens, m embeddings, d their width, 2 dimensions.

use sail_data::{DataSpec, SourceSpec, read_samples};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::answers::whole;
use super::scatter::scatter;
use super::{Context, write};
use crate::batch::to_images;
use crate::config::AffinityPlan;
use crate::error::{Error, Result};
use crate::metrics::{Affinity, Pca, affinity};
use crate::trained::Trained;

/// What was found of one task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AffinityResult {
    /// Of the task.
    pub name: String,
    /// The samples whose images were taken, as `source/shard/key`.
    pub samples: Vec<String>,
    /// Rows of the embedding table.
    pub words: i64,
    /// Of the encoder's features, before the projector.
    pub before: SideResult,
    /// Of what the projector makes of them.
    pub after: SideResult,
}

/// Distances on one side of the projector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SideResult {
    /// How many there are of all images.
    pub visual_tokens: i64,
    /// Pairs that the Wasserstein distance is of.
    pub pairs: i64,
    /// The distances.
    #[serde(flatten)]
    pub distances: Affinity,
    /// The share of the variance that the two components have: of both clouds together, or of each.
    pub explained: Vec<f64>,
}

/// Along which components the clouds are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axes {
    /// The same.
    Shared,
    /// Each along its own.
    Own,
}

/// Two clouds in two dimensions.
struct Seen {
    visual_v2: Tensor,
    words_m2: Tensor,
    explained: Vec<f64>,
}

/// Rows of clouds that count where there must be as many of each.
struct Picks {
    /// Of each, as many as the smaller cloud has: the components are theirs.
    visual: Tensor,
    words: Tensor,
    /// The first so many of them are paired.
    pairs: i64,
}

/// Compares the clouds on both sides of the projector, and draws them.
///
/// # Errors
/// Those of the shards; [`Error::Usage`] when they have too few images.
pub(super) fn measure(context: &Context, task: &AffinityPlan) -> Result<AffinityResult> {
    let trained = whole(context);
    let (samples, features, visual_vd) = tokens(trained, task)?;
    let words = trained.model.config().llm.vocab_size();
    let ids_m = Tensor::f_arange(words, (Kind::Int64, context.device))?;
    let words_md = on_host(&no_grad(|| trained.model.llm().embed(&ids_m)));
    let folder = context.folder(&task.name);
    let side = |name: &str, title: &str, visual: &Tensor, axes| {
        let picks = Picks::new(context, visual, &words_md, task.points)?;
        let seen = see(visual, &words_md, &picks, axes)?;
        write(&folder.join(format!("{name}.svg")), &scatter(title, &seen.visual_v2, &seen.words_m2)?)?;
        compare(&seen, &picks)
    };
    let before = side("before", "before the projector, each along its own components", &features, Axes::Own)?;
    let after = side("after", "after the projector, along shared components", &visual_vd, Axes::Shared)?;
    Ok(AffinityResult { name: task.name.clone(), samples, words, before, after })
}

/// The names of the samples, and their images' tokens before and after the projector, on the host.
fn tokens(trained: &Trained, task: &AffinityPlan) -> Result<(Vec<String>, Tensor, Tensor)> {
    let sources = vec![SourceSpec::new(&task.name, task.shards.clone())];
    let spec = DataSpec::in_order(sources, trained.text.clone(), trained.image.clone());
    let samples = read_samples(&spec, &trained.encoder, Some(task.images))?;
    let with_images = samples.iter().filter(|sample| !sample.images.is_empty()).count();
    if with_images < task.images {
        return Err(Error::usage(
            format!("of the first {} samples of `{}`, {with_images} have images", task.images, task.name),
            "name shards whose samples have images, or ask for fewer with `images`",
        ));
    }
    let (mut before, mut after) = (Vec::new(), Vec::new());
    for sample in &samples {
        let pixels = to_images([&sample.images], trained.device)?;
        no_grad(|| {
            before.push(on_host(&trained.model.encode(&pixels)?.x_td));
            after.push(on_host(&trained.model.image_features(&pixels)?.0));
            Ok::<_, Error>(())
        })?;
    }
    let names = samples.iter().map(|sample| sample.id.to_string()).collect();
    Ok((names, Tensor::f_cat(&before, 0)?, Tensor::f_cat(&after, 0)?))
}

fn on_host(x_nd: &Tensor) -> Tensor {
    x_nd.to_device(Device::Cpu).to_kind(Kind::Double)
}

impl Picks {
    fn new(context: &Context, visual_vd: &Tensor, words_md: &Tensor, points: i64) -> Result<Self> {
        let (v, m) = (visual_vd.size()[0], words_md.size()[0]);
        let equally_many = v.min(m);
        let pick = |name, n| Ok::<_, Error>(context.permutation(name, n)?.f_narrow(0, 0, equally_many)?);
        Ok(Self { visual: pick("visual", v)?, words: pick("words", m)?, pairs: points.min(equally_many) })
    }
}

fn see(visual_vd: &Tensor, words_md: &Tensor, picks: &Picks, axes: Axes) -> Result<Seen> {
    let picked = [visual_vd.f_index_select(0, &picks.visual)?, words_md.f_index_select(0, &picks.words)?];
    let (of_visual, of_words) = match axes {
        Axes::Shared => (Pca::new(&Tensor::f_cat(&picked, 0)?, 2)?, None),
        Axes::Own => (Pca::new(&picked[0], 2)?, Some(Pca::new(&picked[1], 2)?)),
    };
    let mut explained = of_visual.explained.clone();
    explained.extend(of_words.iter().flat_map(|pca| &pca.explained));
    Ok(Seen {
        visual_v2: of_visual.project(visual_vd)?,
        words_m2: of_words.as_ref().unwrap_or(&of_visual).project(words_md)?,
        explained,
    })
}

fn compare(seen: &Seen, picks: &Picks) -> Result<SideResult> {
    let paired = |x_n2: &Tensor, order: &Tensor| x_n2.f_index_select(0, &order.f_narrow(0, 0, picks.pairs)?);
    let visual = paired(&seen.visual_v2, &picks.visual)?;
    let words = paired(&seen.words_m2, &picks.words)?;
    Ok(SideResult {
        visual_tokens: seen.visual_v2.size()[0],
        pairs: picks.pairs,
        distances: affinity(&seen.visual_v2, &seen.words_m2, (&visual, &words))?,
        explained: seen.explained.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::goldens::{golden, matrix};
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    struct Golden {
        words: Vec<Vec<f64>>,
        pick_visual: Vec<i64>,
        pick_words: Vec<i64>,
        pairs: i64,
        /// By the axes.
        sides: BTreeMap<String, Side>,
    }

    /// The visual tokens, the result, and the share of the variance that each component has.
    type Side = (Vec<Vec<f64>>, Affinity, Vec<f64>);

    #[test]
    fn clouds_are_compared_as_by_scikit_learn_and_scipy() {
        let golden: Golden = golden("affinity.json");
        let words = matrix(&golden.words);
        for (name, axes) in [("shared", Axes::Shared), ("own", Axes::Own)] {
            let (visual, expected, explained) = &golden.sides[name];
            let picks = Picks {
                visual: Tensor::from_slice(&golden.pick_visual),
                words: Tensor::from_slice(&golden.pick_words),
                pairs: golden.pairs,
            };
            let found = compare(&see(&matrix(visual), &words, &picks, axes).unwrap(), &picks).unwrap();
            assert_eq!((found.visual_tokens, found.pairs), (visual.len() as i64, golden.pairs));
            let Affinity { nearest, wasserstein, mean } = found.distances;
            let numbers = [nearest, wasserstein, mean].into_iter().chain(found.explained);
            let wanted = [expected.nearest, expected.wasserstein, expected.mean];
            let wanted: Vec<f64> = wanted.into_iter().chain(explained.iter().copied()).collect();
            let numbers: Vec<f64> = numbers.collect();
            assert_eq!(numbers.len(), wanted.len());
            let close = numbers.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-6);
            assert!(close, "{name}: {numbers:?} instead of {wanted:?}");
        }
    }
}
