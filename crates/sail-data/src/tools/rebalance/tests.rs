//! Weights worked by hand, and that threads change nothing.

use super::*;
use crate::spec::{Layout, PageChoice, SourceSpec};
use crate::testing::{tar, text_sample};
use crate::tools::access::find_shards;
use crate::tools::walk::Silent;

/// Shards of text samples with these answers; the answer `BAD` stands for an annotation that is no JSON.
fn source(dir: &std::path::Path, shards: &[&[&str]]) -> Source {
    let annotation =
        |answer: &str| if answer == "BAD" { "{".into() } else { text_sample("a photo of?", answer) };
    let write = |(shard, answers): (usize, &&[&str])| {
        let members: Vec<(String, String)> =
            answers.iter().enumerate().map(|(n, answer)| (format!("{n}.json"), annotation(answer))).collect();
        let path = dir.join(format!("{shard}.tar"));
        std::fs::write(&path, tar(&members)).unwrap();
        path.display().to_string()
    };
    find_shards(SourceSpec::new("captions", shards.iter().enumerate().map(write).collect())).unwrap()
}

fn weights(source: &Source, n: usize, threshold: f64) -> Vec<Vec<f32>> {
    let rebalanced = rebalance(source, options(n, threshold), &Silent).unwrap();
    source.shards.iter().map(|shard| rebalanced.weights[shard].clone()).collect()
}

fn options(n: usize, threshold: f64) -> Options {
    Options { n, threshold, memory_bytes: 1 << 20 }
}

fn assert_near(found: &[Vec<f32>], expected: &[&[f64]]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(*expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}

#[test]
fn a_corpus_worked_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let shards: [&[&str]; 2] = [
        &["A photo of cats.", "a photo, of dogs and dogs and dogs", "BAD"],
        &["Red fish", "A photo of", "[photo]"],
    ];
    let source = source(dir.path(), &shards);
    // Of 5 texts 3 have `a photo` and `photo of`; a threshold of 1 in 5 leaves all other pairs alone.
    let common = (0.2_f64 / 0.6).sqrt();
    let expected: [&[f64]; 2] =
        [&[(2.0 * common + 1.0) / 3.0, (2.0 * common + 3.0) / 5.0, 1.0], &[1.0, common, 1.0]];
    assert_near(&weights(&source, 2, 0.2), &expected);
    // Of single words `photo` is in 4 texts, `a` and `of` in 3.
    let (three, four) = ((0.2_f64 / 0.6).sqrt(), (0.2_f64 / 0.8).sqrt());
    let expected: [&[f64]; 2] = [
        &[(2.0 * three + four + 1.0) / 4.0, (2.0 * three + four + 2.0) / 5.0, 1.0],
        &[1.0, (2.0 * three + four) / 3.0, four],
    ];
    assert_near(&weights(&source, 1, 0.2), &expected);
}

#[test]
fn the_report_tells_what_changes() {
    let dir = tempfile::tempdir().unwrap();
    let shards: [&[&str]; 1] =
        [&["A photo of cats.", "a photo of dogs", "BAD", "Red fish", "A photo of", "a blue whale"]];
    let rebalanced = rebalance(&source(dir.path(), &shards), options(2, 0.2), &Silent).unwrap();
    insta::assert_snapshot!(report(&rebalanced.summary), @r"
    6 samples, 1 of them without a text (bad_json 1)
    an epoch keeps about 5 (83.6 %); the lowest weight is 0.577

    2 2-grams in more than 20.0 % of the samples:
      54.5 % of all 2-grams before, 47.6 % after
      an entropy of 1.00 bits before, 1.00 bits after

       before     after  most frequent 2-grams, in a share of the samples
       60.0 %    50.2 %  a photo
       60.0 %    50.2 %  photo of
    ");
    let none = rebalance(&source(dir.path(), &[&["a", "b"]]), options(2, 0.5), &Silent).unwrap();
    insta::assert_snapshot!(report(&none.summary), @r"
    2 samples
    an epoch keeps about 2 (100.0 %); the lowest weight is 1.000

    no 2-gram is in more than 50.0 % of the samples
    ");
}

#[test]
fn threads_do_not_change_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let answers: Vec<String> = (0..400)
        .map(|n| format!("The image shows a {} with {} things of kind {n}", ["cat", "dog"][n % 2], n % 7))
        .collect();
    let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
    let source = source(dir.path(), &[&answers[..150], &answers[150..]]);
    let file = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        // A sketch in which many n-grams share their counters.
        let options = Options { n: 3, threshold: 0.5, memory_bytes: 8 << 10 };
        let rebalanced = pool.install(|| rebalance(&source, options, &Silent)).unwrap();
        (rebalanced.to_bytes(&source).unwrap(), format!("{:?}", rebalanced.summary))
    };
    let alone = file(1);
    for threads in [2, 5] {
        assert!(file(threads) == alone, "{threads} threads");
    }
}

#[test]
fn boilerplate_weighs_less_than_what_is_rare() {
    let dir = tempfile::tempdir().unwrap();
    let rare = |n: usize| format!("{n} {} {} {}", n * 7, n * 11, n * 13);
    let answers: Vec<String> = (0..200)
        .map(|n| match n % 4 {
            0 => rare(n),
            1 => format!("the image features {}", rare(n)),
            _ => "the image features a large tree".to_owned(),
        })
        .collect();
    let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
    let weights = weights(&source(dir.path(), &[&answers]), 3, 0.01).remove(0);
    for sample in weights.chunks(4) {
        assert!((sample[0] - 1.0).abs() < 1e-6 && sample[1] < 0.9 && sample[2] < 0.2, "{sample:?}");
        assert!(sample[2] > 0.0 && sample[2].to_bits() == sample[3].to_bits());
    }
}

#[test]
fn what_cannot_be_weighed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |answers: &[&str], threshold| {
        rebalance(&source(dir.path(), &[answers]), options(4, threshold), &Silent).unwrap_err().to_string()
    };
    insta::assert_snapshot!(
        refused(&["BAD", "BAD"], 0.5),
        @"source `captions`: none of its 2 samples can be used; the commonest reason is `bad_json`"
    );
    insta::assert_snapshot!(refused(&["a", "b", "BAD"], 0.4), @r"
    a threshold of 0.4 is less than one of 2 samples

    hint: give a higher `--threshold`, or n-grams that occur once would count as frequent
    ");
    insta::assert_snapshot!(refused(&[], 0.5), @"source `captions`: none of its 1 shards holds a sample");
    let broken = source(dir.path(), &[&["a", "b"]]);
    let whole = std::fs::read(&broken.shards[0]).unwrap();
    std::fs::write(&broken.shards[0], &whole[..whole.len() - 1536]).unwrap();
    let error = rebalance(&broken, options(4, 0.5), &Silent).unwrap_err().to_string();
    assert!(error.contains("0.tar` is broken at byte "), "{error}");
}

#[test]
fn a_sketch_too_small_for_the_threshold_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let answers: Vec<String> = (0..100).map(|n| format!("the cat number {n} is {}", n * 7)).collect();
    let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
    let source = source(dir.path(), &[&answers]);
    let with = |memory_bytes, threshold| {
        rebalance(&source, Options { n: 2, threshold, memory_bytes }, &Silent).map_err(|error| {
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        })
    };
    insta::assert_snapshot!(with(LEAST_MEMORY_BYTES, 0.2).unwrap_err(), @r"
    in 16 bytes of memory 100.0 % of the counts are too high by more than a tenth of the threshold (0.2)

    hint: `--memory 1MiB` is enough, and a higher `--threshold` needs less
    ");
    assert!(with(1 << 10, 0.2).is_err());
    // The memory that a refusal names is enough, and gives what much more of it gives.
    let (enough, plenty) = (with(1 << 20, 0.2).unwrap(), with(8 << 20, 0.2).unwrap());
    assert_eq!(enough.weights, plenty.weights);
    assert!(with(8 << 10, 0.02).is_err() && with(8 << 10, 0.9).is_ok(), "a higher threshold needs less");
}

#[test]
fn a_source_of_random_pages_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = source(dir.path(), &[&["a", "b"]]);
    (source.spec.layout, source.spec.page) = (Layout::Pages, PageChoice::Random);
    let error = rebalance(&source, options(2, 0.5), &Silent).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    insta::assert_snapshot!(error, @r"
    source `captions` takes a random page of each document, another each epoch

    hint: a weight belongs to one text: give the source `page: first`
    ");
}
