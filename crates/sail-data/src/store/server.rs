//! A small web server for tests, with one object and faults to order.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::lock;

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fault {
    /// Nothing.
    None,
    /// This status and no content.
    Status(u16),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Silence after so many bytes of the body.
    Stall(usize),
    /// The whole object, with status 200.
    WholeObject,
    /// The range that begins one byte later, labelled so.
    OtherRange,
    /// More bytes than the range has, in chunks without a length.
    Overlong,
    /// The connection ends before any answer.
    HangUp,
    /// The body in small pieces with pauses.
    Slow,
}

#[derive(Debug)]
struct Object {
    bytes: Arc<Vec<u8>>,
    tag: Option<String>,
    faults: VecDeque<Fault>,
    /// For every request once `faults` is used up.
    forever: Fault,
    requests: Vec<Range<usize>>,
}

/// Serves until the process ends.
#[derive(Clone, Debug)]
pub(super) struct Server {
    address: String,
    object: Arc<Mutex<Object>>,
}

impl Server {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let object = Arc::new(Mutex::new(Object {
            bytes: Arc::new(bytes),
            tag: Some("\"one\"".into()),
            faults: VecDeque::new(),
            forever: Fault::None,
            requests: Vec::new(),
        }));
        let shared = Arc::clone(&object);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let object = Arc::clone(&shared);
                // A client that has gone is no matter.
                std::thread::spawn(move || drop(answer(stream, &object)));
            }
        });
        Self { address, object }
    }

    pub(super) fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }

    pub(super) fn order(&self, faults: &[Fault]) -> &Self {
        lock(&self.object).faults.extend(faults);
        self
    }

    pub(super) fn always(&self, fault: Fault) -> &Self {
        lock(&self.object).forever = fault;
        self
    }

    pub(super) fn replace(&self, bytes: Vec<u8>, tag: Option<&str>) {
        let mut object = lock(&self.object);
        object.bytes = Arc::new(bytes);
        object.tag = tag.map(str::to_owned);
    }

    /// The ranges asked for so far.
    pub(super) fn requests(&self) -> Vec<Range<usize>> {
        lock(&self.object).requests.clone()
    }
}

fn answer(stream: TcpStream, object: &Mutex<Object>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut range, mut if_match, mut line) = (None, None, String::new());
    while reader.read_line(&mut line)? > 2 {
        if let Some((name, value)) = line.split_once(':') {
            match name.to_ascii_lowercase().as_str() {
                "range" => range = parse_range(value.trim()),
                "if-match" => if_match = Some(value.trim().to_owned()),
                _ => {}
            }
        }
        line.clear();
    }
    let (bytes, tag, fault) = {
        let mut object = lock(object);
        let range = range.clone().unwrap_or(0..object.bytes.len());
        let end = range.end.min(object.bytes.len());
        object.requests.push(range.start..end);
        let fault = object.faults.pop_front().unwrap_or(object.forever);
        (Arc::clone(&object.bytes), object.tag.clone(), fault)
    };
    if if_match.is_some() && if_match != tag {
        return status(stream, 412);
    }
    let Some(range) = range.filter(|_| fault != Fault::WholeObject) else {
        return send(stream, fault, "200 OK", &tag_line(tag.as_deref()), &bytes);
    };
    if range.start >= bytes.len() {
        return status(stream, 416);
    }
    let start = range.start + usize::from(fault == Fault::OtherRange);
    let end = range.end.min(bytes.len());
    let lines =
        format!("Content-Range: bytes {start}-{}/{}\r\n{}", end - 1, bytes.len(), tag_line(tag.as_deref()));
    send(stream, fault, "206 Partial Content", &lines, &bytes[start..end])
}

fn parse_range(value: &str) -> Option<Range<usize>> {
    let (start, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some(start.parse().ok()?..last.parse::<usize>().ok()? + 1)
}

fn tag_line(tag: Option<&str>) -> String {
    tag.map_or_else(String::new, |tag| format!("ETag: {tag}\r\n"))
}

fn status(mut stream: TcpStream, code: u16) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {code} Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

fn send(mut stream: TcpStream, fault: Fault, first: &str, lines: &str, body: &[u8]) -> std::io::Result<()> {
    match fault {
        Fault::Status(code) => return status(stream, code),
        Fault::HangUp => return Ok(()),
        _ => {}
    }
    let length =
        if fault == Fault::Overlong { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    write!(stream, "HTTP/1.1 {first}\r\n{length}{lines}Connection: close\r\n\r\n")?;
    match fault {
        Fault::Cut(n) => stream.write_all(&body[..n.min(body.len())]),
        Fault::Stall(n) => {
            stream.write_all(&body[..n.min(body.len())])?;
            std::thread::sleep(Duration::from_secs(20));
            Ok(())
        }
        Fault::Overlong => {
            stream.write_all(body)?;
            stream.write_all(b"more")
        }
        Fault::Slow => {
            for piece in body.chunks(body.len().div_ceil(8).max(1)) {
                stream.write_all(piece)?;
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
        _ => stream.write_all(body),
    }
}
