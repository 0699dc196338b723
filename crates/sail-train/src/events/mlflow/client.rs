//! Requests to an MLflow server (its REST interface 2.0), and what their failures mean.

use std::env;
use std::fmt;
use std::fs::File;
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, Proxy};

/// How long the server may say nothing.
const SILENCE: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(5);
/// How long a request may take; that of a file until the deadline.
const REQUEST: Duration = Duration::from_secs(20);
const LONGEST_ANSWER: u64 = 1 << 20;

/// Why something was not taken by the server.
#[derive(Debug)]
pub(super) enum Failure {
    /// It may take it later.
    Unreachable(String),
    /// It does not take it, and would not the next time.
    Refused {
        /// `RESOURCE_DOES_NOT_EXIST` and the like; empty where it gives none.
        code: String,
        reason: String,
    },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(reason) | Self::Refused { reason, .. } => f.write_str(reason),
        }
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        Self::Unreachable(error.to_string())
    }
}

/// Sends requests.
pub(super) struct Client {
    agent: Agent,
    url: String,
    authorization: Option<String>,
    /// When the run waits for nothing more.
    pub(super) deadline: Option<Instant>,
}

impl Client {
    /// Of the server at `url`. Who asks is in the environment, in MLflow's own variables.
    pub(super) fn new(url: &str) -> Self {
        let config = Agent::config_builder()
            .user_agent(concat!("sail/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .proxy(Proxy::try_from_env())
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE));
        Self {
            agent: config.build().into(),
            url: url.to_owned(),
            authorization: authorization(),
            deadline: None,
        }
    }

    /// Asks for something, with parameters of the address.
    pub(super) fn get(&self, what: &str, query: &[(&str, &str)]) -> Result<Value, Failure> {
        let request = self.agent.get(self.address(what)).query_pairs(query.iter().copied());
        let request =
            request.config().timeout_global(Some(self.left()?.unwrap_or(REQUEST).min(REQUEST))).build();
        taken(match &self.authorization {
            Some(authorization) => request.header("Authorization", authorization).call()?,
            None => request.call()?,
        })
    }

    /// Sends JSON.
    pub(super) fn post(&self, what: &str, body: &Value) -> Result<Value, Failure> {
        let request = self.agent.post(self.address(what)).content_type("application/json");
        let request =
            request.config().timeout_global(Some(self.left()?.unwrap_or(REQUEST).min(REQUEST))).build();
        let body = body.to_string();
        taken(match &self.authorization {
            Some(authorization) => request.header("Authorization", authorization).send(body)?,
            None => request.send(body)?,
        })
    }

    /// Sends a file to the server's store of artifacts, under this path of it.
    pub(super) fn put_artifact(&self, path: &str, file: &File) -> Result<(), Failure> {
        let address = format!("{}/api/2.0/mlflow-artifacts/artifacts/{path}", self.url);
        let request = self.agent.put(address).content_type("application/octet-stream");
        let request = request.config().timeout_global(self.left()?).build();
        let answer = match &self.authorization {
            Some(authorization) => request.header("Authorization", authorization).send(file)?,
            None => request.send(file)?,
        };
        taken(answer).map(drop)
    }

    fn left(&self) -> Result<Option<Duration>, Failure> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(Failure::Unreachable("there was no time left for it".to_owned()));
        }
        Ok(left)
    }

    fn address(&self, what: &str) -> String {
        format!("{}/api/2.0/mlflow/{what}", self.url)
    }
}

/// What is in an answer that says yes.
fn taken(mut answer: Response<Body>) -> Result<Value, Failure> {
    let status = answer.status();
    let text = answer.body_mut().with_config().limit(LONGEST_ANSWER).lossy_utf8(true).read_to_string()?;
    let said: Value = serde_json::from_str(&text).unwrap_or_else(|_| json!({}));
    if status.is_success() {
        return Ok(said);
    }
    let message = said["message"].as_str().unwrap_or("").lines().next().unwrap_or_default();
    let reason = format!("it answers {status}{}{message}", if message.is_empty() { "" } else { ": " });
    if status.is_server_error() || [408, 429].contains(&status.as_u16()) {
        return Err(Failure::Unreachable(reason));
    }
    let reason = match status.as_u16() {
        401 | 403 => {
            format!(
                "{reason}; are MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, right?"
            )
        }
        _ => reason,
    };
    Err(Failure::Refused { code: said["error_code"].as_str().unwrap_or_default().to_owned(), reason })
}

/// What MLflow's own clients send for its variables.
fn authorization() -> Option<String> {
    let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(token) = variable("MLFLOW_TRACKING_TOKEN") {
        return Some(format!("Bearer {token}"));
    }
    let (user, password) = (variable("MLFLOW_TRACKING_USERNAME")?, variable("MLFLOW_TRACKING_PASSWORD")?);
    Some(format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))))
}
