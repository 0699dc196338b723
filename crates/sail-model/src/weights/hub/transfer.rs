//! Requests to a hub: the model's description, a file's identity, a file's bytes.
//!
//! Every wait has an end, what broke off goes on where it stopped, and what arrived is compared with what
//! was announced. Knows addresses and files, no cache. Headers as the hub sends them: `x-repo-commit`,
//! `x-linked-etag`, `x-linked-size`, `x-error-code`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body, Proxy};

use super::Limits;
use crate::error::Error;
use crate::weights::file_error;

const REDIRECTS: u32 = 5;
/// Longest description of a model, bytes.
const LONGEST_TEXT: u64 = 64 << 20;
/// An attempt that brought this many bytes counts as none: a long file may break off often.
const WORTH_AN_ATTEMPT: u64 = 1 << 20;

/// Why a request did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer, or not all of it.
    Connection(String),
    /// An answer that is none.
    Status {
        status: u16,
        /// The hub's own word for it, or nothing.
        code: String,
    },
    /// There is no hub at this address.
    Address(String),
    /// What arrived is not what was announced.
    Wrong { what: &'static str, expected: String, found: String },
    /// What was written here could not be.
    File(Error),
}

impl Failure {
    /// Whether another attempt may succeed.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Connection(_) => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..),
            Self::Address(_) | Self::Wrong { .. } | Self::File(_) => false,
        }
    }

    /// In words, for a log.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Connection(reason) | Self::Address(reason) => reason.clone(),
            Self::Status { status, code } => format!("the server answered {status} {code}").trim().to_owned(),
            Self::Wrong { what, expected, found } => {
                format!("{what} {found} arrived, {expected} was announced")
            }
            Self::File(error) => error.to_string(),
        }
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        Self::Connection(error.to_string())
    }
}

/// What a file is, as the server says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Without quotes; can be a file's name.
    pub(super) etag: String,
    pub(super) size_bytes: u64,
}

impl Identity {
    /// The SHA-256 of the content, where the tag is one; those of small files are not.
    fn sha256(&self) -> Option<&str> {
        let is_sha256 = self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_sha256.then_some(&self.etag)
    }
}

/// Sends requests.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    token: Option<String>,
    limits: Limits,
}

impl Client {
    pub(super) fn new(token: Option<String>, limits: Limits, proxy_from_env: bool) -> Self {
        let config = Agent::config_builder()
            .user_agent(concat!("sail/", env!("CARGO_PKG_VERSION")))
            // Lengths are those of the files, not of something packed.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .proxy(Proxy::try_from_env().filter(|_| proxy_from_env))
            .timeout_resolve(Some(limits.connect))
            .timeout_connect(Some(limits.connect))
            .timeout_recv_response(Some(limits.silence))
            .timeout_per_read(Some(limits.silence))
            .timeout_per_write(Some(limits.silence));
        Self { agent: config.build().into(), token, limits }
    }

    /// A text, in at most `attempts` attempts.
    pub(super) fn text(&self, address: &str, attempts: u32) -> Result<String, Failure> {
        self.repeat(attempts, || {
            let mut response = self.get(address, None)?;
            let body = response.body_mut().with_config().limit(LONGEST_TEXT);
            Ok(body.read_to_string()?)
        })
    }

    /// What is at an address.
    pub(super) fn identity(&self, address: &str) -> Result<Identity, Failure> {
        self.repeat(self.limits.attempts, || self.identity_once(address))
    }

    /// Follows redirects that stay on the server; one that leads to where the bytes are does not say what
    /// they are, the server's own answer does.
    fn identity_once(&self, address: &str) -> Result<Identity, Failure> {
        let (mut etag, mut size_bytes, mut address) = (None, None, address.to_owned());
        for _ in 0..=REDIRECTS {
            let request = self.agent.head(&address).config();
            let request = request.max_redirects(0).max_redirects_will_error(false).build();
            let response = match &self.token {
                Some(token) => request.header("Authorization", format!("Bearer {token}")).call()?,
                None => request.call()?,
            };
            let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
            let redirected = response.status().is_redirection();
            let own = |name: &str| header(name).filter(|_| !redirected);
            etag = etag.or_else(|| header("x-linked-etag")).or_else(|| own(ETAG.as_str()));
            size_bytes =
                size_bytes.or_else(|| header("x-linked-size")).or_else(|| own(CONTENT_LENGTH.as_str()));
            match header(LOCATION.as_str()).filter(|_| redirected) {
                Some(location) if location.starts_with('/') => address = on_server(&address, &location)?,
                Some(_) => break,
                None => {
                    accepted(response)?;
                    break;
                }
            }
        }
        let missing = |what| Failure::Connection(format!("the server did not say the {what} of the file"));
        let etag = etag.ok_or_else(|| missing("etag"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        let is_name = !etag.is_empty() && etag.len() <= 128;
        if !is_name || !etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
            return Err(Failure::Connection(format!("the server's etag `{etag}` is none")));
        }
        let size_bytes =
            size_bytes.and_then(|size| size.trim().parse().ok()).ok_or_else(|| missing("size"))?;
        Ok(Identity { etag, size_bytes })
    }

    /// Downloads a file to `path`, going on from what is there, and checks it. What turns out wrong is
    /// removed and fetched once more from the start.
    pub(super) fn download(&self, address: &str, identity: &Identity, path: &Path) -> Result<(), Failure> {
        for last in [false, true] {
            let checked = self.complete(address, identity, path).and_then(|()| check(path, identity));
            match checked {
                Err(wrong @ Failure::Wrong { .. }) => {
                    fs::remove_file(path).map_err(|error| Failure::File(file_error(path)(error)))?;
                    if last {
                        return Err(wrong);
                    }
                    tracing::warn!("{address}: {}; fetching it again", wrong.reason());
                }
                other => return other,
            }
        }
        Ok(())
    }

    /// Appends until the file has its size.
    fn complete(&self, address: &str, identity: &Identity, path: &Path) -> Result<(), Failure> {
        let io = |error: io::Error| Failure::File(file_error(path)(error));
        let mut file = File::options().create(true).append(true).open(path).map_err(io)?;
        let (mut failures, mut furthest) = (0, file.metadata().map_err(io)?.len());
        loop {
            let start = file.metadata().map_err(io)?.len();
            if start >= identity.size_bytes {
                return Ok(());
            }
            let outcome = self.append(address, identity.size_bytes, &mut file, start, path);
            let end = file.metadata().map_err(io)?.len();
            let failure = match outcome {
                Err(failure) if failure.may_pass() => failure,
                Err(failure) => return Err(failure),
                Ok(()) if end >= identity.size_bytes => return Ok(()),
                Ok(()) => Failure::Connection(format!("closed after {end} of {} bytes", identity.size_bytes)),
            };
            failures = if end >= furthest + WORTH_AN_ATTEMPT { 0 } else { failures + 1 };
            furthest = furthest.max(end);
            if failures >= self.limits.attempts {
                return Err(failure);
            }
            tracing::warn!("{address}: {}; going on from byte {end}", failure.reason());
            sleep(self.pause(failures));
        }
    }

    /// One request's worth of bytes after the first `start`; a server that sends all again starts the file anew.
    fn append(
        &self,
        address: &str,
        size_bytes: u64,
        file: &mut File,
        mut start: u64,
        path: &Path,
    ) -> Result<(), Failure> {
        let io = |error: io::Error| Failure::File(file_error(path)(error));
        let response = match self.get(address, (start > 0).then_some(start)) {
            Err(Failure::Status { status: 416, .. }) => {
                let (expected, found) = (format!("{size_bytes} bytes"), format!("{start} bytes"));
                return Err(Failure::Wrong { what: "size:", expected, found });
            }
            response => response?,
        };
        let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
        if response.status() != 206 {
            file.set_len(0).map_err(io)?;
            start = 0;
        } else if !range.is_some_and(|range| range.starts_with(&format!("bytes {start}-"))) {
            return Err(Failure::Connection("the server sent another part than was asked for".to_owned()));
        }
        // One byte more than there should be shows a file that is too long.
        let mut body = response.into_body().into_reader().take(size_bytes + 1 - start);
        let mut buffer = vec![0; 1 << 16];
        loop {
            match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => io::Write::write_all(file, &buffer[..read]).map_err(io)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Connection(error.to_string())),
            }
        }
    }

    /// A successful answer, from `start` bytes on.
    fn get(&self, address: &str, start: Option<u64>) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(address).config().max_redirects(REDIRECTS).build();
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some(start) = start {
            request = request.header("Range", format!("bytes={start}-"));
        }
        accepted(request.call()?)
    }

    fn repeat<T>(&self, attempts: u32, call: impl Fn() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut failures = 0;
        loop {
            match call() {
                Err(failure) if failure.may_pass() && failures + 1 < attempts => failures += 1,
                outcome => return outcome,
            }
            sleep(self.pause(failures));
        }
    }

    /// Doubles with every failure in a row.
    fn pause(&self, failures: u32) -> Duration {
        self.limits.pause * (1 << failures.saturating_sub(1).min(5))
    }
}

fn accepted(response: Response<Body>) -> Result<Response<Body>, Failure> {
    if response.status().is_success() {
        return Ok(response);
    }
    let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok()).unwrap_or_default();
    Err(Failure::Status { status: response.status().as_u16(), code: code.to_owned() })
}

/// The address that a redirect without a host stands for.
fn on_server(address: &str, location: &str) -> Result<String, Failure> {
    let wrong = || Failure::Connection(format!("a redirect to `{location}` leads nowhere"));
    let mut parts = address.parse::<Uri>().map_err(|_| wrong())?.into_parts();
    parts.path_and_query = Some(location.parse().map_err(|_| wrong())?);
    Uri::from_parts(parts).map(|uri| uri.to_string()).map_err(|_| wrong())
}

fn check(path: &Path, identity: &Identity) -> Result<(), Failure> {
    let io = |error: io::Error| Failure::File(file_error(path)(error));
    let found = fs::metadata(path).map_err(io)?.len();
    if found != identity.size_bytes {
        let expected = format!("{} bytes", identity.size_bytes);
        // Nothing after the first byte too many was read.
        let found = if found > identity.size_bytes { "more".to_owned() } else { format!("{found} bytes") };
        return Err(Failure::Wrong { what: "size:", expected, found });
    }
    let Some(expected) = identity.sha256() else { return Ok(()) };
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path).map_err(io)?, &mut Hashing(&mut hash)).map_err(io)?;
    let found = hash.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    if found.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    Err(Failure::Wrong { what: "SHA-256", expected: expected.to_owned(), found })
}

/// A digest as something to write to.
struct Hashing<'a>(&'a mut Sha256);

impl io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
