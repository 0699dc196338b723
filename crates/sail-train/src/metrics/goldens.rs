//! All of this folder against reference implementations, on the goldens that `tests/goldens/make_metrics.py` makes.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tch::{Kind, Tensor};

use super::*;

/// Largest difference, absolute; scores are of the size of 1 to 10.
const LIMIT: f64 = 1e-6;

#[derive(Deserialize)]
struct Answers {
    answer: String,
    truths: Vec<String>,
    vqa: f64,
    anls: f64,
    errors: usize,
    length: usize,
    cider: f64,
    tokens: Vec<String>,
    references: Vec<Vec<String>>,
}

#[derive(Deserialize)]
struct Normalised {
    answer: String,
    normalised: String,
}

#[derive(Deserialize)]
struct Neighbours {
    train: Vec<Vec<f64>>,
    classes: Vec<i64>,
    queries: Vec<Vec<f64>>,
    uniform: Vec<i64>,
    weighted: Vec<i64>,
    k: i64,
    temperature: f64,
}

#[derive(Deserialize)]
struct Clouds {
    points: Vec<Vec<f64>>,
    explained: Vec<f64>,
    projected: Vec<Vec<f64>>,
    a: Vec<Vec<f64>>,
    b: Vec<Vec<f64>>,
    same_size: Vec<Vec<f64>>,
    nearest: f64,
    mean: f64,
    wasserstein: f64,
    pot: f64,
}

/// What a file of tests/goldens/metrics holds.
pub(crate) fn golden<T: DeserializeOwned>(name: &str) -> T {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/metrics");
    let text = std::fs::read(folder.join(name)).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Rows as a matrix.
pub(crate) fn matrix(rows: &[Vec<f64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).reshape([rows.len() as i64, -1])
}

fn close(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() <= LIMIT, "{what}: {found} instead of {expected}");
}

#[test]
fn answers_are_scored_as_by_the_references() {
    let answers: Vec<Answers> = golden("answers.json");
    assert!(answers.len() >= 200);
    let (mut partly, mut agreed) = (0, 0);
    for (i, sample) in answers.iter().enumerate() {
        let what = format!("{i}: {:?} of {:?}", sample.answer, sample.truths);
        let vqa = vqa_accuracy(&sample.answer, &sample.truths);
        partly += usize::from(vqa > 0.0 && vqa < 1.0);
        agreed += usize::from(sample.truths.iter().all(|truth| *truth == sample.truths[0]));
        close(vqa, sample.vqa, &what);
        close(anls(&sample.answer, &sample.truths), sample.anls, &what);
        let first = &sample.truths[..1];
        assert_eq!(char_errors(&sample.answer, first), (sample.errors, sample.length), "{what}");
    }
    assert!(partly > 20, "only {partly} answers are partly right");
    assert!(
        agreed > 20,
        "only {agreed} samples have truths that are all the same, which are compared as they are written"
    );
    let captions: Vec<_> =
        answers.iter().map(|sample| (sample.tokens.clone(), sample.references.clone())).collect();
    for (i, (score, sample)) in cider_d(&captions).into_iter().zip(&answers).enumerate() {
        close(score, sample.cider, &format!("{i}: {:?}", sample.tokens));
    }
    assert!(answers.iter().any(|sample| sample.cider > 1.0));
}

#[test]
fn answers_are_normalised_as_in_the_challenge() {
    let answers: Vec<Normalised> = golden("normalised.json");
    assert!(answers.len() >= 200);
    for Normalised { answer, normalised } in answers {
        assert_eq!(normalised_answer(&answer), normalised, "{answer:?}");
    }
}

#[test]
fn neighbours_vote_as_in_scikit_learn() {
    let golden: Neighbours = golden("neighbours.json");
    let train = (&matrix(&golden.train), &Tensor::from_slice(&golden.classes));
    let classes = golden.classes.iter().max().unwrap() + 1;
    let queries = matrix(&golden.queries);
    assert_ne!(golden.uniform, golden.weighted);
    for (temperature, expected) in [(None, golden.uniform), (Some(golden.temperature), golden.weighted)] {
        let vote = Vote { neighbours: golden.k, temperature };
        let found = classify(&queries, train, classes, vote).unwrap();
        assert_eq!(Vec::<i64>::try_from(found).unwrap(), expected, "{vote:?}");
    }
    // More neighbours than there are samples: the commonest class.
    let all = Vote { neighbours: 10_000, temperature: None };
    let count = |class| golden.classes.iter().filter(|other| **other == class).count();
    let commonest = (0..classes).rev().max_by_key(|class| count(*class)).unwrap();
    let found = classify(&queries, train, classes, all).unwrap();
    assert!(Vec::<i64>::try_from(found).unwrap().into_iter().all(|class| class == commonest));
}

#[test]
fn clouds_are_as_far_apart_as_in_scipy_and_pot() {
    let golden: Clouds = golden("clouds.json");
    let points = matrix(&golden.points);
    let pca = Pca::new(&points, 2).unwrap();
    for (found, expected) in pca.explained.iter().zip(&golden.explained) {
        close(*found, *expected, "explained variance");
    }
    let difference = (pca.project(&points).unwrap() - matrix(&golden.projected)).abs().max();
    close(difference.double_value(&[]), 0.0, "projected points");
    let (a, b, same_size) = (matrix(&golden.a), matrix(&golden.b), matrix(&golden.same_size));
    assert_ne!(a.size(), b.size());
    let found = affinity(&a, &b, (&a, &same_size)).unwrap();
    close(found.nearest, golden.nearest, "nearest");
    close(found.mean, golden.mean, "mean");
    close(found.wasserstein, golden.wasserstein, "SciPy's assignment");
    close(found.wasserstein, golden.pot, "POT's optimal transport");
    close(wasserstein(&a, &a).unwrap(), 0.0, "of a cloud and itself");
}

#[test]
fn clouds_that_cannot_be_compared_are_refused() {
    let cloud = |n: i64| Tensor::zeros([n, 2], (Kind::Double, tch::Device::Cpu));
    let message = |result: crate::Result<f64>| result.unwrap_err().to_string();
    assert!(message(wasserstein(&cloud(3), &cloud(4))).contains("of 3 and one of 4 points"));
    assert!(message(wasserstein(&cloud(0), &cloud(0))).contains("hint:"));
    assert!(message(wasserstein(&(cloud(2) / 0.0), &cloud(2))).contains("not finite"));
    assert!(Pca::new(&cloud(2), 2).unwrap_err().to_string().contains("2 points of 2 dimensions"));
}
