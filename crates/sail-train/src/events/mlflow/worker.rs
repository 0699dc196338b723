//! The thread that sends a run to an MLflow server.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::warn;

use super::super::METRICS;
use super::super::record::{Ending, figures};
use super::client::{Client, Failure};
use super::{About, Wishes, key, pairs};
use crate::config::MlflowPlan;
use crate::threads::lock;

const STATE: &str = "mlflow.json";
/// Most metrics, and most parameters, of one request (`mlflow/utils/validation.py`).
const METRICS_AT_ONCE: usize = 1000;
const PARAMS_AT_ONCE: usize = 100;
/// Lines are sent together that are written in this time.
const TOGETHER: Duration = Duration::from_secs(1);
/// How long a run that fails waits at most: it keeps the other ranks waiting.
const FAILED: Duration = Duration::from_secs(5);
/// How long the thread waits after a failure: from, to.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the run's folder says about the run of the server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct State {
    url: String,
    experiment: String,
    /// Of what is trained.
    course: String,
    /// Of MLflow; none until the server has made it.
    run_id: Option<String>,
    artifact_uri: String,
    /// Whether it has the parameters.
    has_params: bool,
    /// The last step that it has, by kind of line.
    sent: BTreeMap<String, u64>,
    has_model: bool,
}

/// What sends.
pub(super) struct Worker {
    run_dir: PathBuf,
    about: About,
    client: Client,
    flush: Duration,
    state: State,
    /// Whether this process has told the server that the run goes on.
    is_running: bool,
    /// What of `metrics.jsonl` was looked at, bytes.
    read_to: u64,
    warned: bool,
}

impl Worker {
    pub(super) fn new(run_dir: &Path, plan: &MlflowPlan, about: About, step: u64) -> Self {
        let fresh = State {
            url: plan.url.clone(),
            experiment: plan.experiment.clone(),
            course: about.course.clone(),
            ..State::default()
        };
        Self {
            state: State::of_run(run_dir, step, fresh),
            run_dir: run_dir.to_owned(),
            client: Client::new(&plan.url),
            flush: Duration::from_secs(plan.flush_secs),
            about,
            is_running: false,
            read_to: 0,
            warned: false,
        }
    }

    /// Sends until the run has ended; what to say about what could not be sent.
    pub(super) fn work(mut self, wishes: &Wishes) -> Option<String> {
        let (mut pause, mut next) = (RETRY.0, Instant::now());
        loop {
            wait(wishes, next);
            if let Some(ending) = self.heed(wishes) {
                return self.end(ending, wishes);
            }
            match self.send(wishes) {
                Ok(()) => (pause, next) = (RETRY.0, Instant::now() + TOGETHER),
                Err(failure) => {
                    self.warn(&failure);
                    // Also where no further record comes for long.
                    lock(&wishes.wish).more = true;
                    next = Instant::now() + pause;
                    pause = (2 * pause).min(RETRY.1);
                }
            }
        }
    }

    /// Does what changes what is to be sent, and says whether the run has ended.
    fn heed(&mut self, wishes: &Wishes) -> Option<Ending> {
        let (back_to, ending) = {
            let mut wish = lock(&wishes.wish);
            wish.more = false;
            (wish.back_to.take(), wish.ending)
        };
        if let Some(step) = back_to {
            self.state.forget_after(step);
            self.read_to = 0;
            // A run that ends before the server has heard of it must not take the steps made anew for told.
            self.save();
        }
        if let (Some(ending), None) = (ending, self.client.deadline) {
            self.client.deadline = Some(Instant::now() + time_to_end(self.flush, ending));
        }
        ending
    }

    /// Sends what is left, for some time.
    fn end(mut self, ending: Ending, wishes: &Wishes) -> Option<String> {
        let until = self.client.deadline.unwrap_or_else(Instant::now);
        let failure = loop {
            match self.send(wishes).and_then(|()| self.close(ending)) {
                Ok(()) => return None,
                Err(Failure::Unreachable(_)) if Instant::now() + RETRY.0 < until => sleep(RETRY.0),
                Err(failure) => break failure,
            }
        };
        let what = if ending == Ending::Finished && self.about.model && !self.state.has_model {
            "its last figures, its end or its model"
        } else {
            "its last figures or its end"
        };
        let later = match ending {
            Ending::Finished => format!("`{METRICS}` has all figures"),
            Ending::Stopped | Ending::Failed => "they are sent when the run resumes".to_owned(),
        };
        let (name, url) = (&self.about.run_name, &self.state.url);
        Some(format!("{name}: the MLflow server at {url} was not told {what}: {failure}; {later}"))
    }

    fn warn(&mut self, failure: &Failure) {
        // At the end it is said what was not sent.
        if !self.warned && self.client.deadline.is_none() {
            let (name, url) = (&self.about.run_name, &self.state.url);
            warn!(
                "{name}: the MLflow server at {url} takes nothing: {failure}; training goes on, and it is tried again"
            );
        }
        self.warned = true;
    }

    /// Sends all that the server does not have.
    fn send(&mut self, wishes: &Wishes) -> Result<(), Failure> {
        self.begin()?;
        while let Some((metrics, sent, read_to)) = self.next_metrics() {
            if !metrics.is_empty() {
                for some in metrics.chunks(METRICS_AT_ONCE) {
                    let body = json!({"run_id": self.state.run_id, "metrics": some});
                    self.client.post("runs/log-batch", &body)?;
                }
                self.state.sent.extend(sent);
                self.save();
            }
            self.read_to = read_to;
            // It may have gone back or ended meanwhile.
            self.heed(wishes);
        }
        Ok(())
    }

    /// Makes the run, or goes on with the one that there is.
    fn begin(&mut self) -> Result<(), Failure> {
        if self.is_running {
            return Ok(());
        }
        if let Some(run_id) = &self.state.run_id {
            let goes_on = json!({"run_id": run_id, "status": "RUNNING"});
            match self.client.post("runs/update", &goes_on) {
                // The server has lost it, or somebody has deleted it there.
                Err(Failure::Refused { code, reason })
                    if ["RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"].contains(&code.as_str()) =>
                {
                    warn!(
                        "{}: MLflow's run {run_id} cannot go on ({reason}); another one gets all figures",
                        self.about.run_name
                    );
                    self.state.start_anew();
                    self.read_to = 0;
                }
                other => drop(other?),
            }
        }
        if self.state.run_id.is_none() {
            let experiment = self.experiment()?;
            let body = json!({
                "experiment_id": experiment, "run_name": self.about.run_name, "start_time": now_millis(),
                "tags": pairs(&self.about.tags),
            });
            let made = self.client.post("runs/create", &body)?;
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let info = &made["run"]["info"];
            let run_id = text(&info["run_id"]);
            self.state.run_id = Some(run_id.ok_or_else(|| no_mlflow("runs/create"))?);
            self.state.artifact_uri = text(&info["artifact_uri"]).unwrap_or_default();
            self.save();
        }
        if !self.state.has_params {
            for params in self.about.params.chunks(PARAMS_AT_ONCE) {
                let body = json!({"run_id": self.state.run_id, "params": pairs(params)});
                self.client.post("runs/log-batch", &body)?;
            }
            self.state.has_params = true;
            self.save();
        }
        let body = json!({"run_id": self.state.run_id, "tags": pairs(&self.about.tags)});
        self.client.post("runs/log-batch", &body)?;
        self.is_running = true;
        Ok(())
    }

    fn experiment(&self) -> Result<String, Failure> {
        let name = self.state.experiment.as_str();
        let (found, path) = match self.client.get("experiments/get-by-name", &[("experiment_name", name)]) {
            Ok(found) => (found["experiment"].clone(), "experiments/get-by-name"),
            Err(Failure::Refused { code, .. }) if code == "RESOURCE_DOES_NOT_EXIST" => {
                (self.client.post("experiments/create", &json!({"name": name}))?, "experiments/create")
            }
            Err(failure) => return Err(failure),
        };
        found["experiment_id"].as_str().map(str::to_owned).ok_or_else(|| no_mlflow(path))
    }

    /// Metrics of the next lines, the steps that the server has with them, and the place in the file after them; `None` at
    /// its end.
    fn next_metrics(&self) -> Option<(Vec<Value>, BTreeMap<String, u64>, u64)> {
        let path = self.run_dir.join(METRICS);
        let mut file = BufReader::new(File::open(path).ok()?);
        file.seek(SeekFrom::Start(self.read_to)).ok()?;
        let (mut metrics, mut sent, mut read_to) = (Vec::new(), BTreeMap::new(), self.read_to);
        let mut bytes = Vec::new();
        // A line that is being written is left for the next time.
        while file.read_until(b'\n', &mut bytes).ok()? > 0 && bytes.ends_with(b"\n") {
            let line: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let of_line = self.metrics_of(&line);
            if metrics.len() + of_line.len() > METRICS_AT_ONCE && !metrics.is_empty() {
                break;
            }
            read_to += bytes.len() as u64;
            bytes.clear();
            if !of_line.is_empty() {
                metrics.extend(of_line);
                let kind = line["kind"].as_str().unwrap_or_default().to_owned();
                sent.insert(kind, line["step"].as_u64().unwrap_or_default());
            }
        }
        (read_to > self.read_to).then_some((metrics, sent, read_to))
    }

    /// Those of a line that the server does not have.
    fn metrics_of(&self, line: &Value) -> Vec<Value> {
        let (kind, step) =
            (line["kind"].as_str().unwrap_or_default(), line["step"].as_u64().unwrap_or_default());
        if self.state.sent.get(kind).is_some_and(|sent| step <= *sent) {
            return Vec::new();
        }
        let time = line["time"].as_f64().map_or_else(now_millis, |secs| (1e3 * secs) as u64);
        let metric = |(name, value): (String, f64)| json!({"key": key(&name), "value": value, "timestamp": time, "step": step});
        figures(line).into_iter().map(metric).collect()
    }

    /// The run has ended.
    fn close(&mut self, ending: Ending) -> Result<(), Failure> {
        if ending == Ending::Finished && self.about.model && !self.state.has_model {
            self.send_model()?;
            self.state.has_model = true;
            self.save();
        }
        let status = match ending {
            Ending::Finished => "FINISHED",
            Ending::Stopped => "KILLED",
            Ending::Failed => "FAILED",
        };
        let body = json!({"run_id": self.state.run_id, "status": status, "end_time": now_millis()});
        self.client.post("runs/update", &body).map(drop)
    }

    /// Sends the exported encoder through the server to where it keeps artifacts.
    fn send_model(&self) -> Result<(), Failure> {
        let uri = &self.state.artifact_uri;
        let place = uri.strip_prefix("mlflow-artifacts:").map(|rest| match rest.strip_prefix("//") {
            // With the server's own name.
            Some(named) => named.split_once('/').map_or("", |(_, path)| path),
            None => rest.trim_start_matches('/'),
        });
        let Some(place) = place else {
            let reason = format!(
                "it keeps artifacts at {uri}, and takes none for that (`mlflow server --serve-artifacts`)"
            );
            return Err(Failure::Refused { code: String::new(), reason });
        };
        let folder = self.run_dir.join("export/vit");
        let unread = |path: &Path, error: std::io::Error| Failure::Refused {
            code: String::new(),
            reason: format!("{}: {error}", path.display()),
        };
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|error| unread(&folder, error))? {
            names.push(entry.map_err(|error| unread(&folder, error))?.file_name());
        }
        names.sort();
        for name in names {
            let path = folder.join(&name);
            let file = File::open(&path).map_err(|error| unread(&path, error))?;
            let to = format!("{}/model/{}", place.trim_end_matches('/'), name.to_string_lossy());
            self.client.put_artifact(&to, &file)?;
        }
        Ok(())
    }

    /// Writes down how far it has come. Where that fails, some lines are sent once more after a restart.
    fn save(&self) {
        let path = self.run_dir.join(STATE);
        let text = serde_json::to_vec_pretty(&self.state).expect("invariant: texts and numbers");
        let temporary = path.with_extension("tmp");
        if let Err(error) = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path)) {
            warn!("{}: {error}", path.display());
        }
    }
}

impl State {
    /// What the run's folder has, or `fresh`, where that is of another server or run.
    fn of_run(run_dir: &Path, step: u64, fresh: Self) -> Self {
        let path = run_dir.join(STATE);
        let known = match fs::read(&path) {
            Ok(text) => serde_json::from_slice::<Self>(&text).map_err(|error| error.to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => return fresh,
            Err(error) => Err(error.to_string()),
        };
        let known = match known {
            Ok(known) => known,
            Err(error) => {
                warn!("{}: {error}; MLflow gets another run for this one", path.display());
                return fresh;
            }
        };
        let is_same = known.url == fresh.url && known.experiment == fresh.experiment;
        let same_course = known.course == fresh.course;
        match (is_same, same_course, step) {
            // A run that begins anew has none of the steps that the server knows.
            (false, ..) | (_, _, 0) => fresh,
            // The same steps are made again where it goes on from an older one: the server has them.
            (true, true, _) => known,
            (true, false, _) => {
                let mut known = Self { course: fresh.course, ..known };
                known.forget_after(step);
                known
            }
        }
    }

    /// Steps after this one are made anew, and are others.
    fn forget_after(&mut self, step: u64) {
        self.sent.values_mut().for_each(|sent| *sent = step.min(*sent));
    }

    fn start_anew(&mut self) {
        let Self { url, experiment, course, .. } = std::mem::take(self);
        *self = Self { url, experiment, course, ..Self::default() };
    }
}

/// How long the server may take for the end of a run.
pub(super) fn time_to_end(flush: Duration, ending: Ending) -> Duration {
    if ending == Ending::Failed { flush.min(FAILED) } else { flush }
}

/// Waits for something to do, and until `next` unless the run ends before.
fn wait(wishes: &Wishes, next: Instant) {
    let mut wish = lock(&wishes.wish);
    loop {
        let left = next.saturating_duration_since(Instant::now());
        if wish.ending.is_some() || (left.is_zero() && (wish.more || wish.back_to.is_some())) {
            return;
        }
        // Once it is time, there is nothing to look for but a wish.
        let pause = if left.is_zero() { RETRY.1 } else { left };
        let waited = wishes.changed.wait_timeout(wish, pause);
        wish = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn no_mlflow(path: &str) -> Failure {
    let reason = format!("its answer to `{path}` is none of an MLflow server");
    Failure::Refused { code: String::new(), reason }
}

fn now_millis() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
