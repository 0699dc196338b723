//! Answers of a model, scored: generated ones against what the data says, and given ones by their likelihood.
//!
//! Both ask the first question of each sample. What is known of a sample is a line of JSON, so that a measurement that was
//! killed goes on with the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sail_data::{DataSpec, LossWeight, Role, Sample, SourceSpec, TextEncoder, Turn, for_each_sample};
use serde::{Deserialize, Serialize};
use tracing::info;

use super::lines::Lines;
use super::{Context, Opened};
use crate::batch::Feed;
use crate::config::{ChoicePlan, GenerationPlan, SamplesPlan};
use crate::error::{Error, Result};
use crate::eval::answer;
use crate::metrics::{anls, char_errors, cider_d, exact_match, vqa_accuracy, words};
use crate::score::answer_logprobs;
use crate::trained::Trained;

/// Samples after which is said how far it is.
const TELL_EVERY: usize = 100;

/// What was found of generated answers; shares are in `[0, 1]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerationResult {
    /// Of the task.
    pub name: String,
    /// Samples answered.
    pub samples: usize,
    /// Share of answers that are one of the truths.
    pub exact_match: f64,
    /// Mean VQA accuracy.
    pub vqa_accuracy: f64,
    /// Mean normalised Levenshtein similarity.
    pub anls: f64,
    /// CIDEr-D over the data set.
    pub cider_d: f64,
    /// Edits over characters of all truths.
    pub character_error_rate: f64,
}

/// What was found of given answers; shares are in `[0, 1]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChoiceResult {
    /// Of the task.
    pub name: String,
    /// Samples asked.
    pub samples: usize,
    /// Share of samples whose truth is likelier than the other choices.
    pub accuracy: f64,
    /// The same where a choice's log-likelihood is divided by its tokens.
    pub accuracy_per_token: f64,
    /// What always giving the commonest truth would reach.
    pub commonest: f64,
}

/// A generated answer.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    sample: String,
    question: String,
    truths: Vec<String>,
    said: String,
}

/// The log-likelihoods of the choices, in their order.
#[derive(Debug, Serialize, Deserialize)]
struct Chosen {
    sample: String,
    question: String,
    truth: usize,
    logprobs: Vec<f64>,
    tokens: Vec<usize>,
}

/// What a line of a file of references says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    key: String,
    truths: Vec<String>,
}

/// Has every sample's first question answered, and scores the answers.
///
/// # Errors
/// Those of the shards and of running the model; [`Error::Usage`] for a sample without references where there are some.
pub(super) fn generate(context: &Context, task: &GenerationPlan) -> Result<GenerationResult> {
    let trained = whole(context);
    let references = task.references.as_deref().map(read_references).transpose()?;
    let path = context.folder(&task.name).join("answers.jsonl");
    let (mut answers, mut lines) = Lines::open::<Answer>(&path)?;
    let known: Vec<String> = answers.iter().map(|line| line.sample.clone()).collect();
    // `source/shard/key`
    let mut keys: BTreeSet<String> =
        known.iter().filter_map(|sample| sample.splitn(3, '/').nth(2)).map(str::to_owned).collect();
    each_new(trained, &task.name, &task.samples, &known, |sample| {
        if references.is_some() && !keys.insert(sample.id.key.clone()) {
            return Err(Error::usage(
                format!("`{}` has the key of another sample of `{}`", sample.id, task.name),
                "`references` know samples by their keys alone: make a task of each shard, or leave `references` out",
            ));
        }
        let references = match &references {
            None => None,
            Some(references) => Some(references.get(&sample.id.key).cloned().ok_or_else(|| {
                Error::usage(
                    format!("`{}` has no line in the references of `{}`", sample.id, task.name),
                    "write `{\"key\": \"…\", \"truths\": [\"…\"]}` for each sample, or leave `references` out",
                )
            })?),
        };
        let (truth, said) = answer(feed(trained), &trained.encoder, &sample, task.max_new_tokens)?;
        let truths = references.unwrap_or_else(|| vec![truth]);
        let question = sample.question().to_owned();
        let line = Answer { sample: sample.id.to_string(), question, truths, said };
        lines.add(&line)?;
        answers.push(line);
        Ok(())
    })?;
    Ok(score(&task.name, &answers))
}

fn score(name: &str, answers: &[Answer]) -> GenerationResult {
    let mean = |of: &dyn Fn(&str, &[String]) -> f64| {
        answers.iter().map(|line| of(&line.said, &line.truths)).sum::<f64>() / answers.len() as f64
    };
    let captions: Vec<_> = answers
        .iter()
        .map(|line| (words(&line.said), line.truths.iter().map(|truth| words(truth)).collect::<Vec<_>>()))
        .collect();
    let errors = answers.iter().map(|line| char_errors(&line.said, &line.truths));
    let (errors, length) = errors.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    GenerationResult {
        name: name.to_owned(),
        samples: answers.len(),
        exact_match: mean(&|answer, truths| f64::from(u8::from(exact_match(answer, truths)))),
        vqa_accuracy: mean(&vqa_accuracy),
        anls: mean(&anls),
        cider_d: cider_d(&captions).iter().sum::<f64>() / answers.len() as f64,
        character_error_rate: errors as f64 / length.max(1) as f64,
    }
}

/// Measures how likely each choice is as the first answer of each sample, whose own answer must be one of them.
///
/// # Errors
/// Those of the shards and of running the model; [`Error::Usage`] for an answer that is no choice.
pub(super) fn choose(context: &Context, task: &ChoicePlan) -> Result<ChoiceResult> {
    let trained = whole(context);
    let path = context.folder(&task.name).join("choices.jsonl");
    let (mut all, mut lines) = Lines::open::<Chosen>(&path)?;
    let known: Vec<String> = all.iter().map(|line| line.sample.clone()).collect();
    each_new(trained, &task.name, &task.samples, &known, |sample| {
        let own = sample.prompt().truth;
        let is_own = |choice: &String| exact_match(&own, std::slice::from_ref(choice));
        let truth = task.choices.iter().position(is_own).ok_or_else(|| {
            Error::usage(
                format!(
                    "`{}` is answered by `{}`, which is none of the choices of `{}`",
                    sample.id,
                    own.trim(),
                    task.name
                ),
                "list every answer of the shards in `choices`, or name shards whose answers are among them",
            )
        })?;
        let options: Vec<Sample> = task
            .choices
            .iter()
            .map(|choice| with_answer(&sample, choice, &trained.encoder))
            .collect::<Result<_>>()?;
        let of_choices = answer_logprobs(trained, &options)?;
        let tokens = of_choices.iter().map(Vec::len).collect();
        let logprobs: Vec<f64> = of_choices.iter().map(|logprobs| logprobs.iter().sum()).collect();
        if logprobs.iter().any(|logprob| !logprob.is_finite()) {
            return Err(Error::usage(
                format!("`{}`: the model's likelihoods of `{}` are not finite", task.name, sample.id),
                "are the weights broken? look at the losses of the run that made them",
            ));
        }
        let question = sample.question().to_owned();
        let line = Chosen { sample: sample.id.to_string(), question, truth, logprobs, tokens };
        lines.add(&line)?;
        all.push(line);
        Ok(())
    })?;
    Ok(rate(&task.name, &all, task.choices.len()))
}

fn rate(name: &str, all: &[Chosen], choices: usize) -> ChoiceResult {
    let share = |right: usize| right as f64 / all.len() as f64;
    let best = |scores: Vec<f64>| {
        let better = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
        (1..scores.len()).fold(0, better)
    };
    let by_sum = |line: &&Chosen| best(line.logprobs.clone()) == line.truth;
    let by_token = |line: &&Chosen| {
        let scores = line.logprobs.iter().zip(&line.tokens).map(|(sum, tokens)| sum / *tokens as f64);
        best(scores.collect()) == line.truth
    };
    let count = |choice: usize| all.iter().filter(|line| line.truth == choice).count();
    ChoiceResult {
        name: name.to_owned(),
        samples: all.len(),
        accuracy: share(all.iter().filter(by_sum).count()),
        accuracy_per_token: share(all.iter().filter(by_token).count()),
        commonest: share((0..choices).map(count).max().unwrap_or(0)),
    }
}

/// A sample up to its first answer, with another text there.
fn with_answer(sample: &Sample, answer: &str, encoder: &TextEncoder) -> Result<Sample> {
    let place = sample.turns.iter().position(Turn::is_answer);
    let place = place.expect("invariant: a sample without an answer is none");
    let mut turns = sample.turns[..=place].to_vec();
    answer.clone_into(&mut turns[place].text);
    let asked = sample.prompt();
    let users = turns.iter().filter(|turn| turn.role == Role::User);
    let marks: usize = users.map(|turn| turn.text.matches("<image>").count()).sum();
    let visual_tokens = match (marks, asked.prompt.image_rows.len()) {
        (0, _) => vec![],
        (1, tokens) => vec![tokens],
        (marks, _) => {
            return Err(Error::usage(
                format!("the question of `{}` has {marks} images", sample.id),
                "choices are measured for questions with one image, or none",
            ));
        }
    };
    Ok(sample.with_turns(turns, (&visual_tokens, asked.images), encoder)?)
}

/// Every sample after those that are `known`, which must be the first ones.
fn each_new(
    trained: &Trained,
    name: &str,
    samples: &SamplesPlan,
    known: &[String],
    mut visit: impl FnMut(Sample) -> Result<()>,
) -> Result<()> {
    let spec = spec(trained, name, samples);
    let mut seen = 0;
    if !known.is_empty() {
        info!("`{name}`: {} samples are done already", known.len());
    }
    let other = |found: &str| {
        Error::usage(
            format!("`{name}` was measured on other samples before: {found}"),
            "the shards have changed; remove the task's folder, or name another one for `--out`",
        )
    };
    for_each_sample(&spec, &trained.encoder, samples.most, |sample| {
        seen += 1;
        match known.get(seen - 1) {
            Some(known) if *known == sample.id.to_string() => return Ok(()),
            Some(known) => return Err(other(&format!("`{known}` then, `{}` now", sample.id))),
            None => {}
        }
        visit(sample)?;
        if seen.is_multiple_of(TELL_EVERY) {
            info!("`{name}`: {seen} samples");
        }
        Ok(())
    })?;
    if seen < known.len() {
        return Err(other(&format!("there were {}, and are {seen}", known.len())));
    }
    Ok(())
}

/// The way to the model.
pub(super) fn feed(trained: &Trained) -> Feed<'_> {
    Feed { model: &trained.model, device: trained.device, cache: None }
}

/// The samples of a task, in the order of their shards.
pub(super) fn spec(trained: &Trained, name: &str, samples: &SamplesPlan) -> DataSpec {
    let source = SourceSpec { layout: samples.layout, ..SourceSpec::new(name, samples.shards.clone()) };
    let mut spec = DataSpec::in_order(vec![source], trained.text.clone(), trained.image.clone());
    spec.text.loss_weight = LossWeight::Token;
    spec
}

/// The model of a task that needs all of it.
pub(super) fn whole<'a>(context: &'a Context) -> &'a Trained {
    match context.subject {
        Opened::Whole(trained) => trained,
        Opened::Vit { .. } => unreachable!("invariant: refused before anything was opened"),
    }
}

/// Truths by the key of a sample.
fn read_references(path: &Path) -> Result<BTreeMap<String, Vec<String>>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mut all = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let at = format!("{}:{number}", path.display());
        let hint = "each line is `{\"key\": \"…\", \"truths\": [\"…\"]}`, with at least one truth";
        let Reference { key, truths } =
            serde_json::from_str(line).map_err(|error| Error::usage(format!("{at}: {error}"), hint))?;
        if truths.is_empty() {
            return Err(Error::usage(format!("{at}: `{key}` has no truth"), hint));
        }
        if all.insert(key.clone(), truths).is_some() {
            return Err(Error::usage(format!("{at}: `{key}` is there twice"), "leave one of the lines out"));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_choice_is_the_answer_with_and_without_regard_to_its_length() {
        let line = |truth, logprobs: [f64; 3], tokens: [usize; 3]| Chosen {
            sample: String::new(),
            question: String::new(),
            truth,
            logprobs: logprobs.to_vec(),
            tokens: tokens.to_vec(),
        };
        let all = [
            line(1, [-3.0, -2.0, -2.5], [1, 1, 1]),
            line(2, [-3.0, -4.0, -6.0], [1, 2, 4]),
            line(1, [-1.0, -1.0, -5.0], [2, 2, 2]),
            line(1, [-4.0, -3.0, -9.0], [3, 2, 3]),
            line(0, [-3.0, -2.0, -9.0], [3, 1, 3]),
        ];
        let found = rate("x", &all, 3);
        // By the sum the first and the fourth are right, by the mean the first, the second and the fifth.
        assert_eq!(found.samples, 5);
        assert!((found.accuracy - 0.4).abs() < 1e-12, "{found:?}");
        assert!((found.accuracy_per_token - 0.6).abs() < 1e-12, "{found:?}");
        assert!((found.commonest - 0.6).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn answers_are_scored_together() {
        let line = |answer: &str, truth: &str| Answer {
            sample: String::new(),
            question: String::new(),
            truths: vec![truth.to_owned()],
            said: answer.to_owned(),
        };
        let found = score("x", &[line("A cat", "a cat"), line("the dgo", "dog"), line("The cat", "a cat")]);
        // An article makes no difference to VQA accuracy alone.
        let expected = [1.0 / 3.0, 2.0 / 3.0, (1.0 + 4.0 / 7.0) / 3.0, (1.0 + 6.0 + 3.0) / 13.0];
        let made = [found.exact_match, found.vqa_accuracy, found.anls, found.character_error_rate];
        assert!(
            made.iter().zip(expected).all(|(made, expected)| (made - expected).abs() < 1e-12),
            "{found:?}"
        );
        assert!(found.cider_d > 0.0);
    }

    #[test]
    fn references_that_say_nothing_are_named_by_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("references.jsonl");
        let message = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_references(&path).unwrap_err().to_string()
        };
        let good = "{\"key\": \"a\", \"truths\": [\"x\", \"y\"]}\n";
        assert!(
            message(&format!("{good}\n{{\"key\": \"b\"}}"))
                .contains("references.jsonl:3: missing field `truths`")
        );
        assert!(message("{\"key\": \"b\", \"truths\": []}").contains("references.jsonl:1: `b` has no truth"));
        assert!(message(&good.repeat(2)).contains("references.jsonl:2: `a` is there twice"));
        std::fs::write(&path, good).unwrap();
        assert_eq!(read_references(&path).unwrap()["a"], ["x", "y"]);
    }
}
