//! What Prometheus reads of a run while it goes on, in its text format (version 0.0.4), over HTTP.
//!
//! A thread of its own answers, from the figures of the last records: a scrape waits for no step and no step for a scrape.
//! It ends with the stage; the next one of a curriculum listens at the same place.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::record::{Ending, Record, Sink};
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::http::{Request, Response, Server};
use crate::threads::lock;

/// Text format and character set, which a scraper is told.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How long the place may be taken, as it is for a moment after a stage before.
const PATIENCE: Duration = Duration::from_secs(1);

/// The server of a run.
pub(super) struct Prometheus {
    state: Arc<Mutex<State>>,
    /// Until it is closed.
    server: Option<Server>,
}

impl Prometheus {
    /// Listens from now on, for the run of this name that is the stage of this number.
    ///
    /// # Errors
    /// [`Error::Usage`] where it cannot listen there.
    pub(super) fn start(listen: Listen, run: &str, stage: usize) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::new(run, stage)));
        let server = begin(listen, &state).map_err(|error| {
            Error::usage(
                format!("`log.prometheus`: cannot listen at `{}`: {error}", listen.0),
                "choose another port, or leave the field out; another run may have this one",
            )
        })?;
        Ok(Self { state, server: Some(server) })
    }
}

fn begin(Listen(address): Listen, state: &Arc<Mutex<State>>) -> io::Result<Server> {
    let started = Instant::now();
    loop {
        let shown = Arc::clone(state);
        match Server::begin("sail-prometheus", address, move |request| answer(request, &shown)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && started.elapsed() < PATIENCE => {
                sleep(PATIENCE / 20);
            }
            begun => return begun,
        }
    }
}

impl Sink for Prometheus {
    fn record(&mut self, record: &Record) {
        lock(&self.state).add(&record.line);
    }

    fn back_to(&mut self, step: u64) {
        lock(&self.state).back_to(step);
    }

    fn close(&mut self, _ending: Ending) {
        self.server = None;
    }
}

fn answer(request: &Request, state: &Mutex<State>) -> Response {
    if request.path != "/metrics" {
        return Response::text(404, "the figures are at /metrics");
    }
    // A copy, so that the run need not wait for the text.
    let state = lock(state).clone();
    Response::new(200, CONTENT_TYPE, state.text())
}

/// What is known of a run.
#[derive(Clone, Debug)]
struct State {
    labels: String,
    step: u64,
    /// The last line of each kind; an empty object before.
    train: Value,
    eval: Value,
    checkpoint: Value,
    /// Sums over all lines since the process began with the stage, by their place in a line of `metrics.jsonl`.
    sums: BTreeMap<&'static str, f64>,
    sums_by: BTreeMap<(&'static str, String), f64>,
    steps: u64,
    checkpoints: u64,
}

/// Numbers of a step that add up: of the line's field, name, and what it is.
const SUMS: [(&str, &str, &str); 6] = [
    ("samples", "samples_total", "Samples trained on."),
    ("tokens", "tokens_total", "Tokens trained on, visual ones included."),
    ("answer_tokens", "answer_tokens_total", "Tokens of answers trained on."),
    ("step_secs", "step_seconds_total", "Time in steps."),
    ("data_wait_secs", "data_wait_seconds_total", "Time in steps in which the slowest rank waited for data."),
    ("sent_bytes", "sent_bytes_total", "Bytes that each rank sent to the others."),
];

/// The same by a label: of the line's field, label, name, and what it is.
const SUMS_BY: [(&str, &str, &str, &str); 2] = [
    ("parts_secs", "part", "step_part_seconds_total", "Time of rank 0 in each part of its steps."),
    ("flops", "module", "flops_total", "Operations of forward and backward passes, by module."),
];

/// Numbers of the last step: of the line's field, name, and what it is.
const GAUGES: [(&str, &str, &str); 5] = [
    ("loss", "loss", "Mean training loss of the last step, nats per unit of loss weight."),
    ("grad_norm", "grad_norm", "Global norm of the gradients of the last step before clipping."),
    ("tokens_per_sec", "tokens_per_second", "Tokens a second in the last step."),
    ("mfu", "mfu_ratio", "Model FLOPs utilisation of the last step."),
    ("peak_memory_bytes", "peak_memory_bytes", "The most memory that tensors of rank 0 have held."),
];

impl State {
    fn new(run: &str, stage: usize) -> Self {
        let empty = || Value::Object(serde_json::Map::new());
        Self {
            labels: format!("run=\"{}\",stage=\"{stage}\"", escaped(run)),
            step: 0,
            train: empty(),
            eval: empty(),
            checkpoint: empty(),
            sums: BTreeMap::new(),
            sums_by: BTreeMap::new(),
            steps: 0,
            checkpoints: 0,
        }
    }

    fn add(&mut self, line: &Value) {
        match line["kind"].as_str() {
            Some("train") => {
                self.step = line["step"].as_u64().unwrap_or(self.step);
                self.steps += 1;
                for (field, ..) in SUMS {
                    *self.sums.entry(field).or_default() += line[field].as_f64().unwrap_or(0.0);
                }
                for (field, ..) in SUMS_BY {
                    for (key, value) in line[field].as_object().into_iter().flatten() {
                        *self.sums_by.entry((field, key.clone())).or_default() +=
                            value.as_f64().unwrap_or(0.0);
                    }
                }
                self.train = line.clone();
            }
            Some("eval") => self.eval = line.clone(),
            Some("checkpoint") => {
                self.checkpoints += 1;
                self.checkpoint = line.clone();
            }
            _ => {}
        }
    }

    /// Figures of steps that are forgotten are not shown; what was done for them was done.
    fn back_to(&mut self, step: u64) {
        self.step = step;
        for line in [&mut self.train, &mut self.eval] {
            if line["step"].as_u64().is_some_and(|of| of > step) {
                *line = Value::Object(serde_json::Map::new());
            }
        }
    }

    fn text(&self) -> String {
        let mut page = Page { text: String::new(), labels: &self.labels };
        page.family("info", "gauge", "Version of the program, always 1.");
        page.sample("info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        page.one("step", "gauge", "Steps of the stage that count.", self.step as f64);
        page.one(
            "steps_total",
            "counter",
            "Steps that this process made and kept, also those that it went back from later.",
            self.steps as f64,
        );
        for (field, name, help) in SUMS {
            page.one(name, "counter", help, self.sums.get(field).copied().unwrap_or(0.0));
        }
        for (field, label, name, help) in SUMS_BY {
            page.family(name, "counter", help);
            for ((_, key), sum) in
                self.sums_by.range((field, String::new())..).take_while(|((of, _), _)| *of == field)
            {
                page.sample(name, &[(label, key)], *sum);
            }
        }
        for (field, name, help) in GAUGES {
            if let Some(value) = self.train[field].as_f64() {
                page.one(name, "gauge", help, value);
            }
        }
        self.rates(&mut page);
        self.held_out(&mut page);
        page.one(
            "checkpoints_total",
            "counter",
            "Checkpoints made by this process.",
            self.checkpoints as f64,
        );
        for (field, name, help) in [
            ("step", "checkpoint_step", "Step of the newest checkpoint of this process."),
            ("secs", "checkpoint_seconds", "How long it took to write the newest checkpoint."),
            ("bytes", "checkpoint_bytes", "Size of the newest checkpoint."),
        ] {
            if let Some(value) = self.checkpoint[field].as_f64() {
                page.one(name, "gauge", help, value);
            }
        }
        page.text
    }

    fn rates(&self, page: &mut Page<'_>) {
        page.family("learning_rate", "gauge", "Learning rate of the last step, by part of the model.");
        for (part, rate) in self.train["lr"].as_object().into_iter().flatten() {
            let module = part.split(['.', '[']).next().unwrap_or_default();
            if let Some(rate) = rate.as_f64() {
                page.sample("learning_rate", &[("module", module), ("part", part)], rate);
            }
        }
    }

    fn held_out(&self, page: &mut Page<'_>) {
        let Some(step) = self.eval["step"].as_f64() else { return };
        page.one("eval_step", "gauge", "Step of the last held-out evaluation.", step);
        page.family(
            "eval_loss",
            "gauge",
            "Mean held-out loss by source, nats a token: of all samples, and of those whose images can be exchanged with the true and a shuffled one.",
        );
        let sources = self.eval["report"]["sources"].as_object();
        for (source, losses) in sources.into_iter().flatten() {
            let images = &losses["images"];
            for (image, loss) in [
                ("all", &losses["loss"]),
                ("true", &images["true_image"]),
                ("shuffled", &images["shuffled_image"]),
            ] {
                if let Some(loss) = loss.as_f64() {
                    page.sample("eval_loss", &[("source", source), ("image", image)], loss);
                }
            }
        }
    }
}

/// A page that is being written.
struct Page<'a> {
    text: String,
    labels: &'a str,
}

impl Page<'_> {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(&format!("# HELP sail_train_{name} {help}\n# TYPE sail_train_{name} {kind}"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels = labels.iter().fold(self.labels.to_owned(), |mut all, (label, value)| {
            write!(all, ",{label}=\"{}\"", escaped(value))
                .expect("invariant: writing to a String cannot fail");
            all
        });
        self.line(&format!("sail_train_{name}{{{labels}}} {value}"));
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }
}

/// A label's value as the text format has it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};

    use serde_json::json;

    use super::*;

    fn line(step: u64) -> Record {
        json!({
            "kind": "train", "step": step, "loss": 2.5, "tokens": 100, "step_secs": 0.5, "mfu": null,
            "lr": {"vision.blocks[0..2]": 1e-3}, "flops": {"llm": 7},
        })
        .into()
    }

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "{request} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn a_scrape_has_the_last_step_and_the_sums() {
        let listen = Listen("127.0.0.1:0".parse().unwrap());
        let mut server = Prometheus::start(listen, "a \"run\"", 2).unwrap();
        let address = server.server.as_ref().unwrap().address();
        server.record(&line(1));
        server.record(&line(2));
        // A connection that says nothing is in nobody's way.
        let silent = TcpStream::connect(address).unwrap();
        let page = ask(address, "GET /metrics");
        let own = "run=\"a \\\"run\\\"\",stage=\"2\"";
        for expected in [
            format!("sail_train_step{{{own}}} 2\n"),
            format!("sail_train_tokens_total{{{own}}} 200\n"),
            format!("sail_train_loss{{{own}}} 2.5\n"),
            format!(
                "sail_train_learning_rate{{{own},module=\"vision\",part=\"vision.blocks[0..2]\"}} 0.001\n"
            ),
            format!("sail_train_flops_total{{{own},module=\"llm\"}} 14\n"),
            "# TYPE sail_train_tokens_total counter\n".to_owned(),
        ] {
            assert!(page.contains(&expected), "{expected}\n{page}");
        }
        assert!(!page.contains("mfu"), "what is not known is not there");
        server.back_to(1);
        let back = ask(address, "GET /metrics");
        assert!(
            back.contains(&format!("sail_train_step{{{own}}} 1\n")) && !back.contains("sail_train_loss{"),
            "{back}"
        );
        assert!(ask(address, "GET /").contains("404") && ask(address, "POST /metrics").contains("405"));
        // The port is taken as long as it runs, and free afterwards.
        let error = Prometheus::start(Listen(address), "other", 1).map(drop).unwrap_err().to_string();
        assert!(error.contains("cannot listen") && error.contains("hint: choose another port"), "{error}");
        drop(silent);
        server.close(Ending::Finished);
        let started = Instant::now();
        while TcpStream::connect(address).is_ok() {
            assert!(started.elapsed() < Duration::from_secs(20), "it has not ended");
        }
    }
}
