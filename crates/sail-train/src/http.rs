//! A web server for figures: it answers GET and HEAD, one request a connection, and nothing that a client sends or leaves
//! out holds it up or ends the process.
//!
//! Called by `report --serve` and for Prometheus. No bodies are read, no connections kept, and no more than
//! [`MOST_AT_ONCE`] answered at once; a client has [`PATIENCE`] for its request and [`TAKING`] to take the answer.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::threads::spawn;

/// Longest line and headers of a request, bytes.
const LONGEST_HEAD: usize = 16 << 10;
const MOST_HEADERS: usize = 64;
const MOST_AT_ONCE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(5);
const TAKING: Duration = Duration::from_secs(60);
/// How long what a client still sends is thrown away behind its answer.
const LINGERING: Duration = Duration::from_secs(1);

/// What was asked for.
pub(crate) struct Request {
    /// Without what is behind a `?`.
    pub(crate) path: String,
    /// What is behind it.
    pub(crate) query: String,
    headers: Vec<(String, String)>,
}

impl Request {
    /// A header by its name, case-insensitively; None also where it is no text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut named = self.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value.as_str())
    }
}

/// What is answered.
pub(crate) struct Response {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Response {
    /// A body of this type.
    pub(crate) fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let headers = vec![("Content-Type", content_type.to_owned())];
        Self { status, headers, body: body.into() }
    }

    /// A line of text.
    pub(crate) fn text(status: u16, line: &str) -> Self {
        Self::new(status, "text/plain; charset=utf-8", format!("{line}\n"))
    }

    /// The same with one more header, whose value has no line end.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn write(&self, stream: &mut impl Write, with_body: bool) -> io::Result<()> {
        let reason = match self.status {
            200 => "OK",
            304 => "Not Modified",
            400 => "Bad Request",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            _ => "Internal Server Error",
        };
        let length = if self.status == 304 { 0 } else { self.body.len() };
        let own: Vec<String> =
            self.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!(
            "HTTP/1.1 {} {reason}\r\n{}Content-Length: {length}\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nConnection: close\r\n\r\n",
            self.status,
            own.concat()
        );
        stream.write_all(head.as_bytes())?;
        if with_body && length > 0 {
            stream.write_all(&self.body)?;
        }
        stream.flush()
    }
}

type Answer = dyn Fn(&Request) -> Response + Send + Sync;

/// A server, which listens until it is dropped.
pub(crate) struct Server {
    address: SocketAddr,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers whoever comes to `at` from now on; port 0 is any free one.
    ///
    /// # Errors
    /// Where it cannot listen there, or no thread can be started.
    pub(crate) fn begin(
        name: &str,
        at: SocketAddr,
        answer: impl Fn(&Request) -> Response + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(at)?;
        let address = listener.local_addr()?;
        let closing = Arc::new(AtomicBool::new(false));
        let (closed, answer): (_, Arc<Answer>) = (Arc::clone(&closing), Arc::new(answer));
        let thread = spawn(name, move || accept(&listener, &closed, &answer))
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { address, closing, thread: Some(thread) })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        // It waits for a connection, and looks up when there is one.
        let mut own = self.address;
        if own.ip().is_unspecified() {
            own.set_ip(if own.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
        }
        if TcpStream::connect_timeout(&own, PATIENCE).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic in it has ended the process.
            drop(thread.join());
        }
    }
}

fn accept(listener: &TcpListener, closing: &AtomicBool, answer: &Arc<Answer>) {
    let busy = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if closing.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else {
            // No file is left to be opened: others may be closed soon.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        if busy.fetch_add(1, Ordering::Relaxed) >= MOST_AT_ONCE {
            busy.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (answer, done) = (Arc::clone(answer), Arc::clone(&busy));
        let serving = thread::Builder::new().name("sail-http".to_owned()).spawn(move || {
            // A client that has gone, or is too slow, gets no answer.
            drop(serve(stream, &*answer));
            done.fetch_sub(1, Ordering::Relaxed);
        });
        if serving.is_err() {
            busy.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn serve(mut stream: TcpStream, answer: &Answer) -> io::Result<()> {
    let (response, with_body) = match request(&mut stream)? {
        Some((method, request)) if method == "GET" || method == "HEAD" => (answer(&request), method == "GET"),
        Some(_) => (Response::text(405, "only GET is answered"), true),
        None => (Response::text(400, "this is no request, or one with too many headers"), true),
    };
    response.write(&mut Timely { stream: &stream, until: Instant::now() + TAKING }, with_body)?;
    linger(stream)
}

/// A connection that must have taken everything by a time, however slowly its client reads.
struct Timely<'a> {
    stream: &'a TcpStream,
    until: Instant,
}

impl Write for Timely<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        stream.set_write_timeout(Some(left_until(self.until)?))?;
        stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Closes behind the answer. Where bytes are left unread, a system resets the connection at once, and the client may lose
/// an answer that it has not taken yet.
fn linger(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let until = Instant::now() + LINGERING;
    let mut unread = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left_until(until)?))?;
        if stream.read(&mut unread)? == 0 {
            return Ok(());
        }
    }
}

/// The time until then.
///
/// # Errors
/// Where it is over.
fn left_until(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// The head of a request with its method; None where it is none.
fn request(stream: &mut TcpStream) -> io::Result<Option<(String, Request)>> {
    let until = Instant::now() + PATIENCE;
    let mut head = Vec::new();
    let mut some = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left_until(until)?))?;
        let count = stream.read(&mut some)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend(&some[..count]);
        let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(&head) {
            Ok(httparse::Status::Complete(_)) => {
                let (path, query) = parsed
                    .path
                    .unwrap_or_default()
                    .split_once('?')
                    .unwrap_or((parsed.path.unwrap_or_default(), ""));
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
                let headers = parsed.headers.iter();
                let headers =
                    headers.filter_map(|header| Some((header.name.to_owned(), text(header.value)?)));
                let request =
                    Request { path: path.to_owned(), query: query.to_owned(), headers: headers.collect() };
                return Ok(Some((parsed.method.unwrap_or_default().to_owned(), request)));
            }
            Ok(httparse::Status::Partial) if head.len() < LONGEST_HEAD => {}
            _ => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        Server::begin("test", (Ipv4Addr::LOCALHOST, 0).into(), |request| {
            Response::text(200, &format!("{} {} {:?}", request.path, request.query, request.header("host")))
        })
        .unwrap()
    }

    fn asked(server: &Server, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn requests_are_answered_once_each() {
        let server = server();
        let answer = asked(&server, b"GET /a?b=c HTTP/1.1\r\nHOST: here\r\n\r\n");
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("Connection: close\r\n"),
            "{answer}"
        );
        assert!(answer.ends_with("\r\n\r\n/a b=c Some(\"here\")\n"), "{answer}");
        let head = asked(&server, b"HEAD / HTTP/1.0\r\n\r\n");
        assert!(head.ends_with("\r\n\r\n") && head.contains("Content-Length: 8\r\n"), "{head}");
        assert!(asked(&server, b"POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(asked(&server, b"nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
        let endless = [&b"GET / HTTP/1.1\r\nA: "[..], &[b'a'; LONGEST_HEAD]].concat();
        assert!(asked(&server, &endless).starts_with("HTTP/1.1 400"));
    }

    /// A connection closed with bytes unread is reset, and the answer on its way was lost.
    #[test]
    fn an_answer_reaches_a_client_that_sent_too_much() {
        let server = server();
        let letters = vec![b'a'; 4 * LONGEST_HEAD];
        let endless = [b"GET / HTTP/1.1\r\nA: ", &*letters].concat();
        let body = [b"GET / HTTP/1.1\r\nContent-Length: 65536\r\n\r\n", &*letters].concat();
        for _ in 0..50 {
            assert!(asked(&server, &endless).starts_with("HTTP/1.1 400"));
            assert!(asked(&server, &body).starts_with("HTTP/1.1 200"));
        }
    }

    /// A client that took a little of its answer now and then kept its server's thread.
    #[test]
    fn an_answer_must_be_taken_in_time() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let slow = thread::spawn(move || {
            let mut some = [0; 4096];
            while (&client).read(&mut some).is_ok_and(|count| count > 0) {
                thread::sleep(Duration::from_millis(50));
            }
        });
        let started = Instant::now();
        let until = started + Duration::from_millis(500);
        let taken = Timely { stream: &stream, until }.write_all(&vec![0; 64 << 20]);
        assert!(taken.is_err() && started.elapsed() < Duration::from_secs(5), "{taken:?}");
        drop(stream);
        slow.join().unwrap();
    }

    /// A request that announced a body it did not send kept its server's thread, and a length beyond all memory ended the
    /// process.
    #[test]
    fn announced_bodies_and_silent_clients_hold_nothing_up() {
        let server = server();
        let address = server.address();
        let mut kept = Vec::new();
        for length in ["5000", "18446744073709551615", "-1"] {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "GET / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            kept.push(stream);
        }
        kept.extend((0..3).map(|_| TcpStream::connect(address).unwrap()));
        assert!(asked(&server, b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
        let started = Instant::now();
        drop(server);
        assert!(started.elapsed() < PATIENCE, "it waited for a client");
        assert!(TcpListener::bind(address).is_ok(), "the port is free");
    }
}
