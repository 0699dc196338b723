//! The loss on held-out answers: with each sample's own images, with another's, and without any; and perplexity, which on
//! text alone tells what a language model has forgotten.

use serde::{Deserialize, Serialize};

use super::Context;
use super::answers::{feed, spec, whole};
use crate::config::{EvalPlan, LossPlan};
use crate::error::Result;
use crate::eval::{Evaluator, Losses};
use crate::world::World;

/// What was found of one task; losses are nats a token of the answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossResult {
    /// Of the task.
    pub name: String,
    /// With the true images, and with others.
    #[serde(flatten)]
    pub losses: Losses,
    /// Of the samples whose images could be exchanged, without images, which their questions then do not mention.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_image: Option<f64>,
    /// e to the power of the loss with the true images.
    pub perplexity: f64,
}

/// Measures a model.
///
/// # Errors
/// As [`Evaluator::run`], and those of the shards.
pub(super) fn measure(context: &Context, task: &LossPlan) -> Result<LossResult> {
    let trained = whole(context);
    let mut spec = spec(trained, &task.name, &task.samples);
    spec.tokens_per_pack = task.tokens_per_pack;
    let samples = task.samples.most.unwrap_or(usize::MAX);
    let plan = EvalPlan { every: None, samples, generate: 0, max_new_tokens: 1, sources: Vec::new() };
    let evaluator = Evaluator::new(spec, &plan, &trained.encoder)?;
    let (feed, world) = (feed(trained), World::alone());
    let losses = evaluator.run(feed, &trained.encoder, &world)?.total;
    let no_image = evaluator.loss_without_images(feed, &trained.encoder, &world)?;
    Ok(LossResult { name: task.name.clone(), perplexity: losses.loss.exp(), losses, no_image })
}
