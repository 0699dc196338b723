//! A small HTTP server that answers as a Hugging Face hub does, and fails on demand.
//!
//! Small files come from an address that the first answer redirects to on the same server; large ones
//! (here: `.safetensors`) from `/cdn`, with their SHA-256 in `x-linked-etag`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;
use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong, until it is changed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// Status and `x-error-code` of every answer about the model.
    pub(crate) status: Option<(u16, &'static str)>,
    /// The same for a file's content.
    pub(crate) file_status: Option<u16>,
    /// How many of the next downloads from `/cdn` break off half-way.
    pub(crate) drops: usize,
    /// How many of the next ones have a wrong byte.
    pub(crate) wrong: usize,
    /// Whether `Range` is not understood.
    pub(crate) no_ranges: bool,
    /// Whether connections are accepted and nothing is answered.
    pub(crate) silent: bool,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    faults: Faults,
    requests: Vec<String>,
}

pub(crate) struct Server {
    pub(crate) endpoint: String,
    state: Arc<Mutex<State>>,
}

struct Request {
    method: String,
    path: String,
    range: Option<usize>,
    authorization: Option<String>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body that are sent before the connection is closed.
    sent: usize,
}

impl Answer {
    fn new(status: u16, body: Vec<u8>) -> Self {
        Self { status, headers: Vec::new(), sent: body.len(), body }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl Server {
    pub(crate) fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, faults: Faults::default(), requests: Vec::new() }));
        let shared = Arc::clone(&state);
        let own = endpoint.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (state, own) = (Arc::clone(&shared), own.clone());
                thread::spawn(move || serve(&stream.unwrap(), &state, &own));
            }
        });
        Self { endpoint, state }
    }

    pub(crate) fn set(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    /// Requests since the last call, as `METHOD path`, with the start of the range where one was asked for.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn serve(stream: &TcpStream, state: &Mutex<State>, endpoint: &str) {
    let mut reader = BufReader::new(stream);
    while let Some(request) = read(&mut reader) {
        let silent = state.lock().unwrap().faults.silent;
        if silent {
            thread::sleep(std::time::Duration::from_secs(60));
            return;
        }
        let answer = answer(&request, &mut state.lock().unwrap(), endpoint);
        let first = format!("HTTP/1.1 {} X\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
        let headers = answer.headers.iter();
        let text = headers.fold(first, |text, (name, value)| text + name + ": " + value + "\r\n");
        let mut writer = stream;
        let sent: &[u8] = if request.method == "HEAD" { &[] } else { &answer.body[..answer.sent] };
        let written = writer.write_all((text + "\r\n").as_bytes()).and_then(|()| writer.write_all(sent));
        if written.is_err() || answer.sent < answer.body.len() {
            return;
        }
    }
}

fn read(reader: &mut BufReader<&TcpStream>) -> Option<Request> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut words = lines.first()?.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let header = |name: &str| {
        let line = lines.iter().find(|line| line.to_lowercase().starts_with(&format!("{name}:")))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let range = header("range").map(|range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
    Some(Request { method, path, range, authorization: header("authorization") })
}

fn answer(request: &Request, state: &mut State, endpoint: &str) -> Answer {
    let range = request.range.map_or_else(String::new, |start| format!(" from {start}"));
    let token = request.authorization.as_ref().map_or_else(String::new, |token| format!(" {token}"));
    state.requests.push(format!("{} {}{range}{token}", request.method, request.path));
    let path = request.path.split('?').next().unwrap_or_default();
    if let Some((status, code)) = state.faults.status {
        return Answer::new(status, Vec::new()).with("X-Error-Code", code);
    }
    let revisions: [&str; 4] = ["main", "v1", "refs%2Fpr%2F1", COMMIT];
    if let Some(revision) = path.strip_prefix("/api/models/org/name/revision/") {
        if !revisions.contains(&revision) {
            return Answer::new(404, Vec::new()).with("X-Error-Code", "RevisionNotFound");
        }
        let siblings: Vec<_> = state.files.keys().map(|name| json!({ "rfilename": name })).collect();
        return Answer::new(
            200,
            json!({ "id": "org/name", "sha": COMMIT, "siblings": siblings }).to_string().into_bytes(),
        );
    }
    if let Some(name) = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/")) {
        return resolve(name, state, endpoint);
    }
    if let Some(name) = path.strip_prefix("/api/resolve-cache/") {
        let bytes = state.files[name].clone();
        let etag = format!("\"{}\"", &sha256(&bytes)[..40]);
        return Answer::new(200, bytes).with("ETag", etag).with("X-Repo-Commit", COMMIT);
    }
    if let Some(name) = path.strip_prefix("/cdn/") {
        return content(name, request.range, state);
    }
    Answer::new(404, Vec::new()).with("X-Error-Code", "RepoNotFound")
}

fn resolve(name: &str, state: &State, endpoint: &str) -> Answer {
    if let Some(status) = state.faults.file_status {
        return Answer::new(status, Vec::new()).with("X-Error-Code", "GatedRepo");
    }
    let Some(bytes) = state.files.get(name) else {
        return Answer::new(404, Vec::new()).with("X-Error-Code", "EntryNotFound");
    };
    let is_large = std::path::Path::new(name).extension().is_some_and(|ending| ending == "safetensors");
    let moved = if is_large {
        // Another host by name, so that what is meant for the hub alone does not arrive.
        let location = format!("{}/cdn/{name}?signed=1", endpoint.replace("127.0.0.1", "localhost"));
        Answer::new(302, b"see there".to_vec())
            .with("Location", location)
            .with("X-Linked-ETag", format!("\"{}\"", sha256(bytes)))
            .with("ETag", "\"of-the-redirect\"")
    } else {
        // The hub's tag of a small file is not its SHA-256.
        Answer::new(307, b"see there".to_vec())
            .with("Location", format!("/api/resolve-cache/{name}"))
            .with("X-Linked-ETag", format!("\"{}\"", &sha256(bytes)[..40]))
    };
    moved.with("X-Linked-Size", bytes.len().to_string()).with("X-Repo-Commit", COMMIT)
}

fn content(name: &str, range: Option<usize>, state: &mut State) -> Answer {
    let mut bytes = state.files[name].clone();
    if state.faults.wrong > 0 {
        state.faults.wrong -= 1;
        bytes[0] ^= 1;
    }
    let total = bytes.len();
    let mut answer = match range.filter(|_| !state.faults.no_ranges) {
        Some(start) => Answer::new(206, bytes.split_off(start))
            .with("Content-Range", format!("bytes {start}-{}/{total}", total - 1)),
        None => Answer::new(200, bytes),
    };
    if state.faults.drops > 0 {
        state.faults.drops -= 1;
        answer.sent = answer.body.len() / 2;
    }
    answer.with("ETag", "\"of-the-cdn\"")
}
