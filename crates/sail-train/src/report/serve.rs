//! The page about runs from a server of its own, drawn anew in the browser while they train.
//!
//! Called by `sail-train report --serve`. Whoever reaches the address reads the page: on the loopback interface the users
//! of this machine, elsewhere those who know a token. What it answers with is made from the runs' folders each time.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant, UNIX_EPOCH};

use rand::random;
use sha2::{Digest, Sha256};
use tracing::warn;

use super::{DEPTH, Report, find_runs, page};
use crate::config::Listen;
use crate::error::{Error, Result};
use crate::events::{METRICS, TRIPS};
use crate::http::{Request, Response, Server};
use crate::resume::PLAN;
use crate::threads::lock;
use crate::train_loop::SUMMARY;
use crate::world::host_name;

/// Seconds from an answer to an open page to its next question for newer figures.
const REFRESH_SECS: u64 = 5;
/// Runs are not read again before so many times what reading them took has passed: the machine has to train them.
const REST: u32 = 10;

/// A server of the page about some folders, which answers from when it is made until it is dropped.
pub struct Serving {
    server: Server,
    /// Asked for where others than the users of this machine may come.
    token: Option<String>,
}

impl Serving {
    /// Reads `dirs` once, so that what is wrong with them is told at the start, and begins to answer.
    ///
    /// # Errors
    /// Those of [`super::report`] for the folders; [`Error::Usage`] for an address that is in use or not of this machine.
    pub fn begin(dirs: &[PathBuf], at: Listen) -> Result<Self> {
        Report::of(dirs)?;
        let token = (!at.0.ip().is_loopback()).then(|| format!("{:032x}", random::<u128>()));
        let (dirs, asked, kept) = (dirs.to_vec(), token.clone(), Mutex::new(None));
        let server = Server::begin("sail-report", at.0, move |request| {
            answer(request, &dirs, asked.as_deref(), &kept)
        });
        let server = server.map_err(|error| {
            Error::usage(
                format!("cannot serve at {}: {error}", at.0),
                "name another port, as in `--serve=8266`, or an address of this machine",
            )
        })?;
        Ok(Self { server, token })
    }

    /// What to open in a browser.
    pub fn url(&self) -> String {
        let address = self.server.address();
        // All addresses of this machine are none that others could open.
        let host = if address.ip().is_unspecified() {
            format!("{}:{}", host_name(), address.port())
        } else {
            address.to_string()
        };
        let token = self.token.as_ref().map_or_else(String::new, |token| format!("?token={token}"));
        format!("http://{host}/{token}")
    }
}

/// What was read last, for all open pages.
struct Kept {
    tag: Option<String>,
    read_at: Instant,
    took: Duration,
    page: String,
    data: Vec<u8>,
}

impl Kept {
    fn read(dirs: &[PathBuf], tag: Option<String>) -> Result<Self> {
        let read_at = Instant::now();
        let report = Report { refresh_secs: Some(REFRESH_SECS), ..Report::of(dirs)? };
        let data = serde_json::to_vec(&report).expect("invariant: text, numbers and lists");
        Ok(Self { tag, read_at, took: read_at.elapsed(), page: page(&report), data })
    }

    /// Whether it is what would be read now, or reading it again so soon would take too much of the machine's time.
    fn will_do(&self, tag: Option<&String>, age: Duration) -> bool {
        let rest = (REST * self.took).saturating_sub(Duration::from_secs(REFRESH_SECS));
        (tag.is_some() && tag == self.tag.as_ref()) || age < rest
    }
}

fn answer(request: &Request, dirs: &[PathBuf], token: Option<&str>, kept: &Mutex<Option<Kept>>) -> Response {
    if let Some((status, line)) = refusal(request, token) {
        return Response::text(status, line);
    }
    let is_page = request.path == "/";
    if !is_page && request.path != "/data.json" {
        return Response::text(404, "there is one page here, `/`");
    }
    // Who else asks meanwhile waits for what is being read.
    let kept = &mut *lock(kept);
    let tag = tag_of(dirs);
    let known = kept.take().filter(|known| known.will_do(tag.as_ref(), known.read_at.elapsed()));
    let known = match known.map_or_else(|| Kept::read(dirs, tag), Ok) {
        Ok(known) => kept.insert(known),
        Err(error) => {
            warn!("{error}");
            return Response::text(500, &error.to_string());
        }
    };
    let Kept { tag, page, data, .. } = known;
    if !is_page && tag.is_some() && request.header("If-None-Match") == tag.as_deref() {
        return Response::text(304, "");
    }
    let answer = if is_page { html(page) } else { Response::new(200, "application/json", data.as_slice()) };
    match tag {
        Some(tag) => answer.with("ETag", tag.as_str()),
        None => answer,
    }
}

/// What the runs' files are like, without reading them: it changes with what a page shows. None where they cannot be looked
/// at, which reading them will tell.
fn tag_of(dirs: &[PathBuf]) -> Option<String> {
    let mut runs = Vec::new();
    dirs.iter().try_for_each(|dir| find_runs(dir, DEPTH, &mut runs)).ok()?;
    let mut sum = crc32fast::Hasher::new();
    for run in runs {
        // A checkpoint that is made or removed changes its folder.
        for path in [run.clone(), run.join(METRICS), run.join(SUMMARY), run.join(PLAN), run.join(TRIPS)] {
            let about = fs::metadata(&path).ok();
            let changed = about.as_ref().and_then(|about| about.modified().ok());
            let since = changed.and_then(|changed| changed.duration_since(UNIX_EPOCH).ok());
            let (size, since) = (about.map(|about| about.len()), since.unwrap_or_default().as_nanos());
            sum.update(format!("{} {size:?} {since}\n", path.display()).as_bytes());
        }
    }
    Some(format!("\"{:08x}\"", sum.finalize()))
}

/// Why the one who asks gets nothing.
fn refusal(request: &Request, token: Option<&str>) -> Option<(u16, &'static str)> {
    let Some(token) = token else {
        // A site elsewhere may give its name this machine's address, and read in a reader's browser what is served here.
        let is_here = request.header("Host").is_some_and(is_local_name);
        let refused = "this page is for localhost and 127.0.0.1; `--serve=HOST:PORT` serves it to others";
        return (!is_here).then_some((403, refused));
    };
    let given = request.query.split('&').find_map(|part| part.strip_prefix("token="));
    let refused = "open the address that `sail-train report --serve` has printed, with its token";
    (!given.is_some_and(|given| same(given, token))).then_some((401, refused))
}

fn html(page: &str) -> Response {
    // It fetches from here alone. What texts of data sets it holds are data to its script, which makes text nodes of them.
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'";
    Response::new(200, "text/html; charset=utf-8", page).with("Content-Security-Policy", policy)
}

/// Compared by digest, so that how long it takes says nothing of the token.
fn same(a: &str, b: &str) -> bool {
    Sha256::digest(a) == Sha256::digest(b)
}

/// Whether a `Host` names this machine's loopback interface.
fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::super::tests::{STEP, run_in};
    use super::*;

    #[test]
    fn names_of_this_machine_alone_are_local() {
        for local in ["localhost", "LocalHost:8265", "127.0.0.1", "127.1.2.3:80", "[::1]:80", "[::1]"] {
            assert!(is_local_name(local), "{local}");
        }
        for other in ["", "example.org", "localhost.example.org:80", "10.0.0.1:80", "127.0.0.1.example.org"] {
            assert!(!is_local_name(other), "{other}");
        }
    }

    #[test]
    fn what_took_long_to_read_is_not_read_again_at_once() {
        let of = |took| Kept {
            tag: Some("a".to_owned()),
            read_at: Instant::now(),
            took: Duration::from_secs_f64(took),
            page: String::new(),
            data: Vec::new(),
        };
        let (same, other) = ("a".to_owned(), "b".to_owned());
        let after = Duration::from_secs(6);
        assert!(of(0.1).will_do(Some(&same), after) && !of(0.1).will_do(Some(&other), after));
        assert!(of(2.0).will_do(Some(&other), after) && !of(2.0).will_do(Some(&other), 3 * after));
        assert!(!of(0.1).will_do(None, after), "files that cannot be looked at may be any");
    }

    fn asked(serving: &Serving, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(("127.0.0.1", serving.server.address().port())).unwrap();
        write!(stream, "{request}Connection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer)
    }

    #[test]
    fn a_page_follows_its_run() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path(), &format!("{STEP}\n"));
        let dirs = [dir.path().to_owned()];
        let serving = Serving::begin(&dirs, "0".parse().unwrap()).unwrap();
        assert!(serving.url().starts_with("http://127.0.0.1:") && !serving.url().contains("token"));
        let local = |path: &str, more: &str| {
            asked(&serving, &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}"))
        };
        let (status, page) = local("/", "");
        assert!(
            status == 200 && page.contains("\"refresh_secs\":5") && page.contains("Content-Security-Policy"),
            "{page}"
        );
        let (status, first) = local("/data.json", "");
        let tag = first.lines().find_map(|line| line.strip_prefix("ETag: ")).unwrap().to_owned();
        assert_eq!(status, 200);
        let again = || local("/data.json", &format!("If-None-Match: {tag}\r\n"));
        assert_eq!(again().0, 304);
        let more = STEP.replace("\"step\":1", "\"step\":2");
        fs::write(dir.path().join("metrics.jsonl"), format!("{STEP}\n{more}\n")).unwrap();
        let (status, later) = again();
        assert!(status == 200 && later.contains("\"steps\":2"), "{later}");

        // A name that somebody else has given this machine's address.
        assert_eq!(asked(&serving, "GET / HTTP/1.1\r\nHost: example.org\r\n").0, 403);
        assert_eq!(asked(&serving, "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n").0, 405);
        assert_eq!(local("/../Cargo.toml", "").0, 404);
        // What is wrong with a run by now is told, and the next question answered.
        fs::write(dir.path().join("metrics.jsonl"), "nonsense\n").unwrap();
        let (status, wrong) = local("/data.json", "");
        assert!(status == 500 && wrong.contains("metrics.jsonl:1"), "{wrong}");
        let taken = Serving::begin(&dirs, Listen(serving.server.address()));
        assert!(taken.is_err());
        fs::write(dir.path().join("metrics.jsonl"), "").unwrap();
        assert_eq!(local("/", "").0, 200);
        let taken = Serving::begin(&dirs, Listen(serving.server.address()));
        let message = taken.err().unwrap().to_string();
        assert!(
            message.contains("cannot serve at 127.0.0.1") && message.contains("--serve=8266"),
            "{message}"
        );
    }

    #[test]
    fn others_need_the_token() {
        let dir = tempfile::tempdir().unwrap();
        run_in(dir.path(), "");
        let serving = Serving::begin(&[dir.path().to_owned()], "0.0.0.0:0".parse().unwrap()).unwrap();
        let url = serving.url();
        let (_, token) = url.split_once("?token=").unwrap();
        assert_eq!(token.len(), 32);
        assert!(!url.contains("0.0.0.0"), "others cannot open that: {url}");
        let status = |path: &str| asked(&serving, &format!("GET {path} HTTP/1.1\r\nHost: node01\r\n")).0;
        assert_eq!(status(&format!("/?token={token}")), 200);
        assert_eq!(status(&format!("/data.json?token={token}")), 200);
        for wrong in ["/", "/?token=", "/?token=0", "/data.json", "/none"] {
            assert_eq!(status(wrong), 401, "{wrong}");
        }
    }
}
