//! `hf:` references against a server that answers as a hub does: what is fetched, what is kept, what is
//! refused.

#![allow(clippy::unwrap_used, reason = "a test")]

mod server;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use sail_model::weights::{Hub, Limits, ModelRef, Wanted};
use serde_json::json;
use server::{COMMIT, Faults, Server, sha256};
use tempfile::TempDir;

const ALL: Wanted = Wanted { tokenizer: true, weights: true };
const CHECK: Wanted = Wanted { tokenizer: true, weights: false };
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A server, and a cache that is empty at first.
struct Place {
    server: Server,
    dir: TempDir,
    hub: Hub,
}

impl Place {
    fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let (server, dir) = (Server::start(files), TempDir::new().unwrap());
        let hub = hub(&server.endpoint, dir.path());
        Self { server, dir, hub }
    }

    fn fetch(&self, reference: &str, wanted: Wanted) -> sail_model::Result<PathBuf> {
        reference.parse::<ModelRef>().unwrap().fetch_from(&self.hub, wanted)
    }

    fn error(&self, reference: &str, wanted: Wanted) -> String {
        self.fetch(reference, wanted).unwrap_err().to_string()
    }

    fn offline(&self) -> Self {
        let hub = Hub { offline: true, ..self.hub.clone() };
        Self { server: Server::start(&[]), dir: TempDir::new().unwrap(), hub }
    }

    fn blobs(&self) -> Vec<String> {
        names(&self.dir.path().join("models--org--name/blobs"))
    }
}

fn hub(endpoint: &str, cache: &Path) -> Hub {
    Hub {
        endpoint: Some(endpoint.to_owned()),
        cache: cache.to_owned(),
        token: None,
        offline: false,
        proxy_from_env: false,
        limits: Limits {
            connect: Duration::from_secs(1),
            silence: Duration::from_millis(500),
            attempts: 3,
            pause: Duration::from_millis(10),
        },
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|index| (index % 251) as u8).collect()
}

fn model() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("README.md", b"not wanted".to_vec()),
        ("config.json", b"{\"model_type\": \"llama\"}".to_vec()),
        ("generation_config.json", b"{}".to_vec()),
        (WEIGHTS, weights()),
        ("pytorch_model.bin", b"a pickle".to_vec()),
        ("tokenizer.json", b"{\"model\": 1}".to_vec()),
    ]
}

fn sharded() -> Vec<(&'static str, Vec<u8>)> {
    let map = json!({ "a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors" });
    vec![
        ("1.safetensors", b"first".to_vec()),
        ("2.safetensors", b"second".to_vec()),
        ("3.safetensors", b"of nothing".to_vec()),
        ("config.json", b"{}".to_vec()),
        (INDEX, json!({ "weight_map": map }).to_string().into_bytes()),
    ]
}

#[test]
fn a_model_is_fetched_once_into_the_shared_layout() {
    let place = Place::new(&model());
    let folder = place.fetch("hf:org/name", ALL).unwrap();
    let root = place.dir.path().join("models--org--name");
    assert_eq!(folder, root.join("snapshots").join(COMMIT));
    assert_eq!(names(&folder), ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json"]);
    assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), weights());
    let link = fs::read_link(folder.join(WEIGHTS)).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(&weights())));
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let requests = place.server.requests();
    assert!(!requests.iter().any(|request| request.contains("README") || request.contains(".bin")));

    assert_eq!(place.fetch("hf:org/name", ALL).unwrap(), folder);
    assert_eq!(place.server.requests(), ["GET /api/models/org/name/revision/main"]);
}

#[test]
fn a_check_fetches_only_small_files() {
    let place = Place::new(&model());
    let folder = place.fetch("hf:org/name", CHECK).unwrap();
    assert_eq!(names(&folder), ["config.json", "tokenizer.json"]);
    let folder = place.fetch("hf:org/name", ALL).unwrap();
    assert!(folder.join(WEIGHTS).is_file());
}

#[test]
fn a_folder_is_itself() {
    let place = Place::new(&[]);
    assert_eq!(place.fetch("weights/llm", ALL).unwrap(), Path::new("weights/llm"));
    assert!(place.server.requests().is_empty());
}

#[test]
fn a_pinned_commit_that_is_there_needs_no_network() {
    let mut place = Place::new(&model());
    let pinned = format!("hf:org/name@{COMMIT}");
    let folder = place.fetch(&pinned, ALL).unwrap();
    assert!(!place.dir.path().join("models--org--name/refs").exists());
    place.server.requests();
    place.hub.endpoint = Some("http://127.0.0.1:1".to_owned());
    assert_eq!(place.fetch(&pinned, ALL).unwrap(), folder);
    assert!(place.server.requests().is_empty());
}

#[test]
fn tags_and_pull_requests_are_revisions() {
    let place = Place::new(&model());
    for revision in ["v1", "refs/pr/1"] {
        place.fetch(&format!("hf:org/name@{revision}"), ALL).unwrap();
        let noted = place.dir.path().join("models--org--name/refs").join(revision);
        assert_eq!(fs::read_to_string(noted).unwrap(), COMMIT);
        let downloads = place.server.requests().iter().filter(|request| request.contains("/cdn/")).count();
        assert_eq!(downloads, usize::from(revision == "v1"));
    }
    let message = place.error("hf:org/name@v2", ALL);
    assert!(
        message.contains("the model no such revision") && message.contains("hf:org/name@v2"),
        "{message}"
    );
}

#[test]
fn an_index_brings_exactly_its_shards() {
    let place = Place::new(&sharded());
    let folder = place.fetch("hf:org/name", Wanted { weights: true, tokenizer: false }).unwrap();
    assert_eq!(names(&folder), ["1.safetensors", "2.safetensors", "config.json", INDEX]);
    assert_eq!(fs::read(folder.join("2.safetensors")).unwrap(), b"second");

    let mut files = sharded();
    files.retain(|(name, _)| *name != "2.safetensors");
    let message = Place::new(&files).error("hf:org/name", Wanted { weights: true, tokenizer: false });
    assert!(message.contains("has no `2.safetensors`"), "{message}");
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let place = Place::new(&model());
    place.server.set(Faults { drops: 1, ..Faults::default() });
    let folder = place.fetch("hf:org/name", ALL).unwrap();
    assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), weights());
    let requests = place.server.requests();
    let resumed = format!("GET /cdn/{WEIGHTS}?signed=1 from {}", weights().len() / 2);
    assert!(requests.contains(&resumed), "{requests:?}");
}

#[test]
fn what_broke_off_is_not_complete_and_the_next_call_goes_on() {
    let place = Place::new(&model());
    place.server.set(Faults { drops: 3, ..Faults::default() });
    let message = place.error("hf:org/name", ALL);
    assert!(message.contains(WEIGHTS) && message.contains("goes on where it stopped"), "{message}");
    let folder = place.dir.path().join("models--org--name/snapshots").join(COMMIT);
    assert!(!names(&folder).contains(&WEIGHTS.to_owned()));
    let message = place.offline().error("hf:org/name", ALL);
    assert!(message.contains("HF_HUB_OFFLINE is set"), "{message}");
    let part = place.dir.path().join(format!("models--org--name/blobs/{}.incomplete", sha256(&weights())));
    let got = fs::metadata(part).unwrap().len();
    assert!(got > 0 && got < weights().len() as u64);

    place.server.set(Faults::default());
    place.server.requests();
    let folder = place.fetch("hf:org/name", ALL).unwrap();
    assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), weights());
    assert!(place.server.requests().contains(&format!("GET /cdn/{WEIGHTS}?signed=1 from {got}")));
    assert!(place.blobs().iter().all(|name| !name.ends_with(".incomplete")));
}

#[test]
fn a_server_without_ranges_sends_all_again() {
    let place = Place::new(&model());
    place.server.set(Faults { drops: 2, no_ranges: true, ..Faults::default() });
    let folder = place.fetch("hf:org/name", ALL).unwrap();
    assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), weights());
}

#[test]
fn wrong_bytes_are_fetched_once_more_and_then_refused() {
    let place = Place::new(&model());
    place.server.set(Faults { wrong: 1, ..Faults::default() });
    let folder = place.fetch("hf:org/name", ALL).unwrap();
    assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), weights());

    let place = Place::new(&model());
    place.server.set(Faults { wrong: 2, ..Faults::default() });
    let message = place.error("hf:org/name", ALL);
    let mut wrong = weights();
    wrong[0] ^= 1;
    for part in [WEIGHTS, &sha256(&weights()), &sha256(&wrong)] {
        assert!(message.contains(part), "{message}");
    }
    let tag = sha256(&weights());
    assert!(!place.blobs().iter().any(|name| name.starts_with(&tag)), "{:?}", place.blobs());
}

#[test]
fn a_stale_part_that_does_not_fit_is_thrown_away() {
    for stale in [vec![7; 1000], vec![7; weights().len()], vec![7; weights().len() + 5]] {
        let place = Place::new(&model());
        let blobs = place.dir.path().join("models--org--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", sha256(&weights()))), stale).unwrap();
        let folder = place.fetch("hf:org/name", ALL).unwrap();
        assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), weights());
    }
}

#[test]
fn what_the_hub_refuses_says_why() {
    let mut place = Place::new(&model());
    let message = place.error("hf:org/other", ALL);
    assert!(message.contains("`hf:org/other`: the hub has no such model"), "{message}");
    for (status, code) in [(401, "RepoNotFound"), (403, "GatedRepo")] {
        place.server.set(Faults { status: Some((status, code)), ..Faults::default() });
        let message = place.error("hf:org/name", ALL);
        assert!(
            message.contains(&format!("{status} {code}")) && message.contains("set HF_TOKEN"),
            "{message}"
        );
    }
    place.server.set(Faults { file_status: Some(403), ..Faults::default() });
    let message = place.error("hf:org/name", ALL);
    assert!(message.contains("tokenizer.json") || message.contains("config.json"), "{message}");
    assert!(message.contains("403 GatedRepo") && message.contains("set HF_TOKEN"), "{message}");
    place.hub.token = Some("secret".to_owned());
    let message = place.error("hf:org/name", ALL);
    assert!(message.contains("this token") && !message.contains("secret"), "{message}");
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let mut place = Place::new(&model());
    place.hub.token = Some("secret".to_owned());
    place.fetch("hf:org/name", ALL).unwrap();
    let requests = place.server.requests();
    let (elsewhere, to_the_hub): (Vec<&String>, Vec<&String>) =
        requests.iter().partition(|request| request.contains("/cdn/"));
    assert!(elsewhere.len() == 1 && elsewhere.iter().all(|request| !request.contains("secret")));
    assert!(to_the_hub.iter().all(|request| request.ends_with(" Bearer secret")));
}

#[test]
fn pickles_are_never_fetched() {
    let mut files = model();
    files.retain(|(name, _)| *name != WEIGHTS);
    let place = Place::new(&files);
    let message = place.error("hf:org/name", ALL);
    assert!(message.contains("pytorch_model.bin") && message.contains("safetensors are needed"), "{message}");
    assert!(!place.server.requests().iter().any(|request| request.contains(".bin")));
    files.retain(|(name, _)| *name != "pytorch_model.bin");
    let message = Place::new(&files).error("hf:org/name", ALL);
    assert!(message.contains("has neither `model.safetensors` nor"), "{message}");
    files.retain(|(name, _)| *name != "tokenizer.json");
    let message = Place::new(&files).error("hf:org/name", CHECK);
    assert!(message.contains("has no `tokenizer.json`"), "{message}");
}

#[test]
fn offline_takes_what_the_cache_has() {
    let place = Place::new(&model());
    let message = place.offline().error("hf:org/name", CHECK);
    assert!(message.contains("HF_HUB_OFFLINE is set, and the cache lacks"), "{message}");
    assert!(place.server.requests().is_empty());
    let folder = place.fetch("hf:org/name", CHECK).unwrap();
    assert_eq!(place.offline().fetch("hf:org/name", CHECK).unwrap(), folder);
    assert!(place.offline().fetch("hf:org/name", ALL).is_err());
    place.fetch("hf:org/name", ALL).unwrap();
    place.server.requests();
    assert_eq!(place.offline().fetch("hf:org/name", ALL).unwrap(), folder);
    assert_eq!(place.offline().fetch(&format!("hf:org/name@{COMMIT}"), ALL).unwrap(), folder);
    assert!(place.server.requests().is_empty());
}

#[test]
fn an_unreachable_hub_is_an_error_soon_unless_the_cache_has_it() {
    let mut place = Place::new(&model());
    // A port that nothing listens on.
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    place.hub.endpoint = Some(format!("http://{refused}"));
    let started = Instant::now();
    let message = place.error("hf:org/name", ALL);
    assert!(message.contains("check the network, HF_ENDPOINT"), "{message}");
    place.hub.endpoint = Some("nonsense".to_owned());
    assert!(place.fetch("hf:org/name", ALL).is_err());
    assert!(started.elapsed() < Duration::from_secs(10));

    place.hub.endpoint = Some(place.server.endpoint.clone());
    let folder = place.fetch("hf:org/name", ALL).unwrap();
    place.hub.endpoint = Some(format!("http://{refused}"));
    assert_eq!(place.fetch("hf:org/name", ALL).unwrap(), folder);
}

#[test]
fn a_silent_hub_is_an_error_soon() {
    let place = Place::new(&model());
    place.server.set(Faults { silent: true, ..Faults::default() });
    let started = Instant::now();
    let message = place.error("hf:org/name", ALL);
    assert!(message.contains("timeout"), "{message}");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[test]
fn what_is_no_hub_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // The whole request: what is unread when the connection closes would reset it.
            let lines = BufReader::new(&stream).lines().map_while(Result::ok);
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>").unwrap();
        }
    });
    let dir = TempDir::new().unwrap();
    let message = hub(&endpoint, dir.path()).fetch("org/name", None, ALL).unwrap_err().to_string();
    assert!(message.contains("does not answer as a hub does"), "{message}");
}

#[test]
fn several_at_once_fetch_a_file_once() {
    let place = Place::new(&model());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| place.fetch("hf:org/name", ALL).unwrap());
        }
    });
    let downloads = place.server.requests().iter().filter(|request| request.contains("/cdn/")).count();
    assert_eq!(downloads, 1);
}
