//! The run as an MLflow server keeps it: what it is as parameters and tags, every figure of `metrics.jsonl`, and the exported
//! encoder as an artifact.
//!
//! A thread of its own reads `metrics.jsonl` and sends what the server does not have yet. So nothing is lost, nothing piles
//! up in memory and no step waits, whether the server is slow, gone or back again. How far it has come is in `mlflow.json`
//! in the run's folder: a run that resumes goes on with the same one of MLflow, where it stopped to send.

mod client;
mod worker;

use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tracing::warn;

use self::worker::{Worker, time_to_end};
use super::METRICS;
use super::record::{Ending, Record, Sink};
use crate::config::{MlflowPlan, Plan};
use crate::error::Result;
use crate::program;
use crate::resume::course;
use crate::threads::{lock, spawn};

/// Longest values and keys that MLflow takes (`mlflow/utils/validation.py`).
const LONGEST_PARAM: usize = 6000;
const LONGEST_TAG: usize = 8000;
const LONGEST_KEY: usize = 250;

/// The way to the server.
pub(super) struct Mlflow {
    wishes: Arc<Wishes>,
    url: String,
    flush: Duration,
    /// What the thread says at its end of what the server was not told; None once it was heard.
    ended: Option<Receiver<Option<String>>>,
}

/// What the thread is to do.
#[derive(Default)]
struct Wishes {
    wish: Mutex<Wish>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Wish {
    /// `metrics.jsonl` has more lines.
    more: bool,
    /// It has lost those after this step.
    back_to: Option<u64>,
    ending: Option<Ending>,
}

/// What the server is told about a run once.
struct About {
    run_name: String,
    /// Of what is trained, whatever is told and kept of it.
    course: String,
    params: Vec<(String, String)>,
    tags: Vec<(String, String)>,
    /// The exported encoder, where the server is to have it.
    model: bool,
}

impl Mlflow {
    /// Of the run of `plan`, which goes on from `step`. `lineage` says where its weights come from.
    pub(super) fn start(plan: &Plan, mlflow: &MlflowPlan, step: u64, lineage: &Value) -> Result<Self> {
        let about = About::new(plan, mlflow, lineage);
        let worker = Worker::new(&plan.run.dir, mlflow, about, step);
        let wishes = Arc::new(Wishes::default());
        let heard = Arc::clone(&wishes);
        let (end, ended) = mpsc::channel();
        spawn("sail-mlflow", move || {
            // Nobody listens any more where a request has outlasted the time for the end.
            drop(end.send(worker.work(&heard)));
        })?;
        let (url, flush) = (mlflow.url.clone(), Duration::from_secs(mlflow.flush_secs));
        Ok(Self { wishes, url, flush, ended: Some(ended) })
    }

    fn wish(&self, change: impl FnOnce(&mut Wish)) {
        change(&mut lock(&self.wishes.wish));
        self.wishes.changed.notify_one();
    }
}

impl Sink for Mlflow {
    fn record(&mut self, _record: &Record) {
        self.wish(|wish| wish.more = true);
    }

    fn back_to(&mut self, step: u64) {
        self.wish(|wish| wish.back_to = Some(wish.back_to.map_or(step, |before| before.min(step))));
    }

    fn close(&mut self, ending: Ending) {
        self.wish(|wish| wish.ending = Some(ending));
        let Some(ended) = self.ended.take() else { return };
        // A second more, to hear that there was no time left.
        match ended.recv_timeout(time_to_end(self.flush, ending) + Duration::from_secs(1)) {
            Ok(None) => {}
            Ok(Some(unsent)) => warn!("{unsent}"),
            Err(_) => warn!(
                "the MLflow server at {} was not told the end of the run: it did not answer in time; `{METRICS}` has all \
                 figures, and a run that resumes sends what is missing",
                self.url
            ),
        }
    }
}

impl Drop for Mlflow {
    fn drop(&mut self) {
        self.close(Ending::Failed);
    }
}

impl About {
    fn new(plan: &Plan, mlflow: &MlflowPlan, lineage: &Value) -> Self {
        let params = plan.fields().into_iter().map(|(path, value)| {
            // Text is without its quotes.
            let value = serde_json::from_str::<String>(&value).unwrap_or(value);
            (key(&path.replace('[', ".").replace(']', "")), cut(&value, LONGEST_PARAM))
        });
        let tags = [
            ("mlflow.source.name", "sail-train".to_owned()),
            ("mlflow.source.type", "JOB".to_owned()),
            ("sail.version", program::version()),
            ("sail.plan_hash", plan.hash()),
            ("sail.lineage", cut(&lineage.to_string(), LONGEST_TAG)),
        ];
        Self {
            run_name: plan.run.name.clone(),
            course: course(plan),
            params: params.collect(),
            tags: tags.map(|(key, value)| (key.to_owned(), value)).into(),
            model: mlflow.model && plan.export.is_some(),
        }
    }
}

/// A key that MLflow takes: of letters, digits, and `_-. /:`, at most [`LONGEST_KEY`] long.
fn key(name: &str) -> String {
    let letter = |letter: char| {
        if letter.is_ascii_alphanumeric() || "_-. /:".contains(letter) { letter } else { '_' }
    };
    cut(&name.chars().map(letter).collect::<String>(), LONGEST_KEY)
}

/// The beginning of a text, of at most so many bytes.
fn cut(text: &str, longest: usize) -> String {
    let end = (0..=longest.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text[..end].to_owned()
}

fn pairs(pairs: &[(String, String)]) -> Value {
    pairs.iter().map(|(key, value)| json!({"key": key, "value": value})).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_fit_the_server() {
        assert_eq!(key("train/lr/vision.blocks[0..2]"), "train/lr/vision.blocks_0..2_");
        assert_eq!(key("eval/\u{e9}t\u{e9}/loss"), "eval/_t_/loss");
        assert_eq!(key(&"a".repeat(300)).len(), 250);
        assert_eq!(cut("\u{e9}\u{e9}", 3), "\u{e9}");
        assert_eq!(cut("abc", 3), "abc");
    }
}
