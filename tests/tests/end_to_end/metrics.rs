//! What TensorBoard, Prometheus and MLflow are told of a run is what `metrics.jsonl` says, whatever happens to the run.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use serde_json::Value;

use crate::exports::python;
use crate::guards;
use crate::processes::{Job, all_end, free_port, signal, steps};

const EVAL: &str = "eval={samples: 4, generate: 2, max_new_tokens: 4, every: 3, sources: [{name: caption, \
                    shards: data/demo/caption-heldout-*.tar}, {name: text, shards: data/demo/text-heldout-*.tar}]}";

fn check_tensorboard(job: &Job) {
    python("tests/reference/check_tensorboard.py", &[&job.run_dir().display().to_string()]);
}

/// Killed between two checkpoints, it goes on, on two ranks that share everything.
#[test]
fn tensorboard_reads_each_step_once_after_a_kill() {
    let job = Job::new(&[
        "train={vision: {lr: 1e-4}, projector: {lr: 1e-3}, llm: {lr: 1e-4}}",
        "schedule.steps=9",
        "checkpoint={every: 3, keep_last: 9}",
        "log.every=2",
        "parallel.strategy=zero2",
        EVAL,
    ]);
    let mut killed = [job.start("killed", job.alone())];
    job.wait_for_step(5, &mut killed);
    drop(killed);
    job.run(job.launch(2), 0);
    check_tensorboard(&job);
}

#[test]
fn tensorboard_forgets_steps_that_a_run_goes_back_from() {
    let job = guards::job(&[guards::GARBAGE.0], &["guard.spike=rollback", "log.every=1"]);
    job.run(job.alone(), 0);
    let trips = fs::read_to_string(job.run_dir().join("trips.jsonl")).unwrap();
    assert!(trips.contains("rollback"), "{trips}");
    check_tensorboard(&job);
}

/// It is not written where it is not wanted, and made of what there is where it is wanted later.
#[test]
fn tensorboard_can_be_switched_on_later() {
    let mut job = Job::new(&["schedule.steps=4", "log={every: 1, tensorboard: false}", EVAL]);
    let mut half = job.alone();
    half.args(["--stop-at", "2"]);
    job.run(half, 3);
    assert!(!job.run_dir().join("tensorboard").exists());
    job.set(&["log.tensorboard=true", "log.every=3"]);
    job.run(job.alone(), 0);
    check_tensorboard(&job);
}

fn scrape(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, page) = answer.split_once("\r\n\r\n")?;
    assert!(head.contains(" 200 ") && head.contains("text/plain; version=0.0.4"), "{head}");
    Some(page.to_owned())
}

#[test]
fn prometheus_scrapes_a_run_while_it_trains() {
    let port = free_port();
    let job = Job::new(&["schedule.steps=100000", EVAL, &format!("log.prometheus={port}")]);
    let mut running = [job.start("running", job.launch(2))];
    job.wait_for_step(3, &mut running);
    let page = scrape(port).expect("it answers");
    let file = job.dir.path().join("page.txt");
    fs::write(&file, page).unwrap();
    python(
        "tests/reference/check_prometheus.py",
        &[&file.display().to_string(), &job.run_dir().display().to_string()],
    );
    // One that says nothing, and one that announces more than it sends, hold nothing up.
    let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut half = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(half, "GET /metrics HTTP/1.1\r\nContent-Length: 5000\r\n\r\n").unwrap();
    let now = steps(&job.run_dir()).len() as u64;
    job.wait_for_step(now + 3, &mut running);
    signal("TERM", running[0].pid());
    all_end(&mut running, Instant::now(), std::time::Duration::from_secs(60));
    assert_eq!(running[0].code(), 3, "{}", running[0].said());
    assert!(scrape(port).is_none(), "it ends with the run");
}

#[test]
fn a_port_that_is_taken_is_told_before_the_first_step() {
    let taken = TcpListener::bind(("127.0.0.1", free_port())).unwrap();
    let address = taken.local_addr().unwrap();
    let job = Job::new(&["schedule.steps=2", &format!("log.prometheus={address}")]);
    for command in [job.alone(), job.launch(2)] {
        let said = job.run(command, 2);
        assert!(said.contains(&format!("`log.prometheus`: cannot listen at `{address}`")), "{said}");
        assert!(said.contains("hint: choose another port"), "{said}");
        assert!(steps(&job.run_dir()).is_empty());
    }
}

/// Training is the same, told once, and ends in time.
#[test]
fn a_dead_mlflow_server_holds_nothing_up() {
    let silent = TcpListener::bind(("127.0.0.1", free_port())).unwrap();
    let (dead, mute) = (free_port(), silent.local_addr().unwrap().port());
    let plain = Job::new(&["schedule.steps=6"]);
    plain.run(plain.alone(), 0);
    for port in [dead, mute] {
        let url = format!("http://127.0.0.1:{port}");
        let job = Job::new(&["schedule.steps=6", &format!("log.mlflow={{url: {url}, flush_secs: 2}}")]);
        let started = Instant::now();
        let said = job.run(job.alone(), 0);
        assert!(started.elapsed().as_secs() < 55, "{:?}", started.elapsed());
        assert!(said.matches("takes nothing").count() <= 1, "{said}");
        assert_eq!(said.matches(&format!("the MLflow server at {url} was not told")).count(), 1, "{said}");
        crate::processes::assert_same("with a dead server", &plain, &job);
    }
}

/// What the server was not told while it was away it is told when the run resumes, in one run of MLflow.
#[test]
fn what_mlflow_missed_it_is_told_later() {
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let log = format!("log.mlflow={{url: \"{url}\", flush_secs: 10}}");
    let job = Job::new(&["schedule.steps=6", "checkpoint.every=2", &log]);
    let mut half = job.alone();
    half.args(["--stop-at", "3", "--set", "log.mlflow.flush_secs=1"]);
    job.run(half, 3);
    let server = server::Recorded::start(port);
    job.run(job.alone(), 0);
    let told = server.stop();
    let runs = told.iter().filter(|(path, _)| path.ends_with("/runs/create")).count();
    assert_eq!(runs, 1, "{told:?}");
    let metrics = told.iter().filter_map(|(_, body)| body["metrics"].as_array()).flatten();
    let losses: Vec<(Option<u64>, Option<f64>)> = metrics
        .filter(|metric| metric["key"] == "train/loss")
        .map(|metric| (metric["step"].as_u64(), metric["value"].as_f64()))
        .collect();
    let recorded: Vec<_> =
        steps(&job.run_dir()).iter().map(|line| (line["step"].as_u64(), line["loss"].as_f64())).collect();
    assert_eq!((losses.len(), losses), (6, recorded));
    let params = told.iter().filter_map(|(_, body)| body["params"].as_array()).flatten();
    let rate = params.filter(|param| param["key"] == "train.projector.lr").count();
    assert_eq!(rate, 1);
    let ends: Vec<&Value> =
        told.iter().map(|(_, body)| &body["status"]).filter(|it| it.is_string()).collect();
    assert_eq!(ends.last().and_then(|end| end.as_str()), Some("FINISHED"));
    let state = fs::read_to_string(job.run_dir().join("mlflow.json")).unwrap();
    assert!(state.contains("\"run_id\": \"r1\""), "{state}");
}

/// A server that takes what MLflow's clients say, and keeps it. What a real one does with it is checked by
/// `scripts/check_mlflow.sh`.
mod server {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::{JoinHandle, spawn};

    use serde_json::{Value, json};

    pub(super) struct Recorded {
        port: u16,
        told: Receiver<(String, Value)>,
        thread: JoinHandle<()>,
    }

    impl Recorded {
        pub(super) fn start(port: u16) -> Self {
            let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
            let (sender, told) = channel();
            let thread = spawn(move || {
                for stream in listener.incoming() {
                    if !answer(stream.unwrap(), &sender) {
                        return;
                    }
                }
            });
            Self { port, told, thread }
        }

        pub(super) fn stop(self) -> Vec<(String, Value)> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
            write!(stream, "STOP / HTTP/1.1\r\n\r\n").unwrap();
            self.thread.join().unwrap();
            self.told.iter().collect()
        }
    }

    /// One request of a connection; false where it asks to stop.
    fn answer(mut stream: TcpStream, told: &Sender<(String, Value)>) -> bool {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut first, mut length) = (String::new(), 0);
        reader.read_line(&mut first).unwrap();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if header.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        if first.starts_with("STOP") {
            return false;
        }
        let path = first.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let said = if path.contains("get-by-name") {
            json!({"experiment": {"experiment_id": "1"}})
        } else if path.ends_with("/runs/create") {
            json!({"run": {"info": {"run_id": "r1", "artifact_uri": "mlflow-artifacts:/1/r1/artifacts"}}})
        } else {
            json!({})
        }
        .to_string();
        told.send((path, serde_json::from_slice(&body).unwrap_or_default())).unwrap();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{said}",
            said.len()
        )
        .unwrap();
        true
    }
}
