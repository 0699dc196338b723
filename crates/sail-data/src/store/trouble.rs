//! What can go wrong with one request, what is worth another try, and how long to wait before it.

use std::time::Duration;

use crate::error::{Error, Result};

/// Most characters of a server's answer in a message.
const DETAIL_CHARS: usize = 400;

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How much is endured from a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    pub(super) retries: usize,
    pub(super) silence: Duration,
}

/// Why one request did not give all its bytes.
#[derive(Debug)]
pub(super) enum Trouble {
    Store(object_store::Error),
    Silent(Duration),
    /// The body ended too early.
    Short {
        missing: u64,
    },
    /// More bytes than asked for: their place cannot be trusted.
    Overlong,
    /// Another object stands there now.
    Changed(String),
    /// Nobody waits for the bytes any more.
    Abandoned,
}

/// The result of one request.
pub(super) type Outcome<T> = std::result::Result<T, Trouble>;

impl From<object_store::Error> for Trouble {
    fn from(error: object_store::Error) -> Self {
        Self::Store(error)
    }
}

/// Bytes of an answer that make it worth asking again.
const LEAST_PROGRESS_BYTES: u64 = 1024;

/// The failures in a row of one transfer.
#[derive(Debug)]
pub(super) struct Tries {
    location: String,
    patience: Patience,
    failures: usize,
}

impl Tries {
    pub(super) fn new(location: &str, patience: Patience) -> Self {
        Self { location: location.to_owned(), patience, failures: 0 }
    }

    /// Bytes have arrived: the count begins anew. A server that trickles would be insisted on for ever, so a few
    /// bytes before the next failure do not count.
    pub(super) fn progressed(&mut self, bytes: u64) {
        if bytes >= LEAST_PROGRESS_BYTES {
            self.failures = 0;
        }
    }

    /// Waits before the next try.
    ///
    /// # Errors
    /// [`Error::Changed`] and [`Error::Store`] when another try is useless, or one too many.
    pub(super) async fn failed(&mut self, trouble: Trouble) -> Result<()> {
        self.failures += 1;
        let location = without_query(&self.location);
        let (detail, hint, again) = match trouble {
            Trouble::Changed(detail) => return Err(Error::Changed { location, detail }),
            Trouble::Store(object_store::Error::Precondition { .. }) => {
                let detail = "the server says that it is another object now".to_owned();
                return Err(Error::Changed { location, detail });
            }
            Trouble::Store(object_store::Error::NotFound { .. }) => return Err(Error::NoObject { location }),
            Trouble::Store(error) => describe(&error),
            Trouble::Silent(silence) => {
                (format!("no answer within {silence:?}"), "check the network, or raise `timeout_secs`", true)
            }
            Trouble::Short { missing } => {
                (format!("the answer ended {missing} bytes too early"), UNREACHABLE, true)
            }
            Trouble::Overlong => ("the answer has more bytes than were asked for".into(), NO_RANGES, false),
            Trouble::Abandoned => ("the reader has gone".into(), UNREACHABLE, false),
        };
        if !again || self.failures > self.patience.retries {
            return Err(Error::Store { location, attempts: self.failures, detail, hint });
        }
        let doublings = (self.failures - 1).min(16) as u32;
        let wait = FIRST_WAIT.saturating_mul(1 << doublings).min(LONGEST_WAIT);
        tracing::warn!("`{location}`: {detail}; trying again in {wait:?}");
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

const UNREACHABLE: &str =
    "check the address, the network and the server; `retries` and `timeout_secs` say how long to insist";
const NO_RANGES: &str = "the server must answer ranged requests (status 206); use another one, or copy the shards to a local folder";
const DENIED: &str = "set the credentials in the environment as the tools of that store do, such as AWS_ACCESS_KEY_ID; for a public S3 bucket set AWS_SKIP_SIGNATURE=true";

/// The cause in words, a hint, and whether another try makes sense.
fn describe(error: &object_store::Error) -> (String, &'static str, bool) {
    use object_store::Error as Cause;
    let detail = innermost(error);
    match error {
        Cause::PermissionDenied { .. } | Cause::Unauthenticated { .. } => {
            (format!("access is denied: {detail}"), DENIED, false)
        }
        Cause::NotSupported { .. } | Cause::NotImplemented { .. } => {
            (format!("the server ignores ranges: {detail}"), NO_RANGES, false)
        }
        Cause::InvalidPath { .. } => (detail, "check the name", false),
        _ if detail.contains("status code: 416") || detail.contains("416 Range Not Satisfiable") => (
            "the object is shorter than the bytes asked for".into(),
            "has it been replaced or cut off?",
            false,
        ),
        // Says that a range was asked for and everything came, or another range.
        _ if ["non-partial", "Content-Range", "Content-Length", "Requested"]
            .iter()
            .any(|part| detail.contains(part)) =>
        {
            (detail, NO_RANGES, false)
        }
        _ if detail.contains("169.254.169.254") => (detail, DENIED, true),
        _ => (detail, UNREACHABLE, true),
    }
}

/// The first and the last message below the layers that repeat the URL, which may hold a signature.
fn innermost(error: &object_store::Error) -> String {
    let mut messages: Vec<String> = Vec::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = cause {
        let message = error.to_string();
        if !message.contains("Error performing") {
            messages.push(message);
        }
        cause = error.source();
    }
    let mut detail = messages.first().cloned().unwrap_or_else(|| without_query(&error.to_string()));
    if let Some(last) = messages.last().filter(|last| !detail.contains(last.as_str())) {
        detail = format!("{detail}: {last}");
    }
    let detail: String = detail.split_whitespace().collect::<Vec<_>>().join(" ");
    detail.chars().take(DETAIL_CHARS).collect()
}

/// A URL without what follows `?`: that may be a signature.
pub(super) fn without_query(location: &str) -> String {
    location.split('?').next().unwrap_or_default().to_owned()
}
