//! Models from a Hugging Face hub, in the cache that Hugging Face tools share.
//!
//! Names, addresses and the cache's folders are the crate `hf-hub`'s; transfers are made here
//! (`transfer.rs`), because the crate's own have no timeouts and check nothing. Of a model only what is
//! wanted is fetched, see [`Wanted`]; never a pickle. What the cache has is not fetched again.
//!
//! Called through [`ModelRef`] by the trainer, once a run's check and once when its model is built.

mod cache;
mod reference;
mod transfer;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;

pub use reference::ModelRef;

use self::cache::{Cached, is_commit, shards};
use self::transfer::{Client, Failure};
use super::{CONFIG, INDEX, SINGLE, TOKENIZER, read_json};
use crate::error::{Error, Result};

const MAIN: &str = "main";
/// Small files that come with the weights where they are there.
const BESIDE_WEIGHTS: [&str; 11] = [
    TOKENIZER,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
];
/// Endings of pickled weights, which can run code when they are read.
const PICKLES: [&str; 4] = [".bin", ".pt", ".pth", ".ckpt"];

/// Which of a model's files are wanted, besides its `config.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// `tokenizer.json`; it is an error if there is none.
    pub tokenizer: bool,
    /// `model.safetensors`, or its index and the shards that it names, and small files beside them; it is an
    /// error if there are no weights.
    pub weights: bool,
}

/// How long to wait, and how often to try.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest look-up of a name, and longest set-up of a connection. Default: 10 s each.
    pub connect: Duration,
    /// Longest silence of a server that is connected. Default: 30 s.
    pub silence: Duration,
    /// Attempts in a row that bring nothing before it is an error. Default: 3.
    pub attempts: u32,
    /// Pause after the first such attempt; it doubles with each. Default: 1 s.
    pub pause: Duration,
}

impl Default for Limits {
    /// A refused connection is an error after 3 s, a host that does not answer after at most 65 s, one that
    /// falls silent after at most 95 s.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            attempts: 3,
            pause: Duration::from_secs(1),
        }
    }
}

/// A hub, and the cache for what it has.
#[derive(Clone)]
pub struct Hub {
    /// Address; `None`: the one that `hf-hub` knows.
    pub endpoint: Option<String>,
    /// Folder with `models--org--name` in it.
    pub cache: PathBuf,
    /// Sent to this hub and to no other server.
    pub token: Option<String>,
    /// Whether only the cache is asked.
    pub offline: bool,
    /// Whether `HTTPS_PROXY`, `NO_PROXY` and their like are followed.
    pub proxy_from_env: bool,
    /// Waiting and retrying.
    pub limits: Limits,
}

impl Hub {
    /// As the environment says, by the names and in the order of `huggingface_hub`: `HF_ENDPOINT`;
    /// `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME` and `HOME` for the cache; `HF_TOKEN`, `HF_TOKEN_PATH` and
    /// the file `token` in `HF_HOME`; `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// [`Error::File`] when nothing says where the cache is.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let folder = |name: &str| get(name).map(PathBuf::from);
        let text = |name: &str| get(name).and_then(|value| value.into_string().ok());
        let home = folder("HF_HOME")
            .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(folder("HOME")?.join(".cache/huggingface")));
        let cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home.as_ref()?.join("hub")));
        let no_cache = || Error::File {
            path: "HF_HUB_CACHE".into(),
            reason: "no folder for models: set this variable, HF_HOME or HOME".to_owned(),
        };
        let token_file = folder("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        // A token that cannot be read is none: most models need none.
        let stored = || std::fs::read_to_string(token_file?).ok();
        let token = text("HF_TOKEN").or_else(stored).map(|token| token.trim().to_owned());
        let is_on = |value: String| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on");
        Ok(Self {
            endpoint: text("HF_ENDPOINT"),
            cache: cache.ok_or_else(no_cache)?,
            token: token.filter(|token| !token.is_empty()),
            offline: text("HF_HUB_OFFLINE").is_some_and(is_on),
            proxy_from_env: true,
            limits: Limits::default(),
        })
    }

    /// The folder, in the cache, with the wanted files of a model; what is not there is fetched. A branch or
    /// tag is looked up each time, a commit that is there already needs no network. Where the hub does not
    /// answer, what the cache has for the revision is taken, with a warning.
    ///
    /// # Errors
    /// [`Error::Hub`] says what is not there, not allowed, not reachable or not as announced;
    /// [`Error::File`] names a file or folder of the cache that cannot be written.
    pub fn fetch(&self, repo: &str, revision: Option<&str>, wanted: Wanted) -> Result<PathBuf> {
        let reference = ModelRef::Hub { repo: repo.to_owned(), revision: revision.map(str::to_owned) };
        let revision = revision.unwrap_or(MAIN);
        let cache = Cache::new(self.cache.clone());
        let names = Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned());
        let cached = Cached::new(&cache, &names);
        let complete = cached.complete(revision, wanted);
        let fail = |reason: String, hint: &str| Error::Hub {
            model: reference.to_string(),
            reason,
            hint: hint.to_owned(),
        };
        if self.offline {
            return complete.ok_or_else(|| {
                let folder = cached.folder().display();
                fail(
                    format!("HF_HUB_OFFLINE is set, and the cache lacks files of it in `{folder}`"),
                    "fetch it once without HF_HUB_OFFLINE, or name a folder",
                )
            });
        }
        if let Some(folder) = complete.as_ref().filter(|_| is_commit(revision)) {
            return Ok(folder.clone());
        }
        let api = self.api(&cache, names).map_err(|reason| fail(reason, "see HF_ENDPOINT"))?;
        let client = Client::new(self.token.clone(), self.limits, self.proxy_from_env);
        let attempts = if complete.is_some() { 1 } else { self.limits.attempts };
        let description = match (self.describe(&api, &client, attempts), complete) {
            (Ok(description), _) => description,
            (Err(failure), Some(folder)) if failure.may_pass() => {
                tracing::warn!("`{reference}`: {}; taking `{}`", failure.reason(), folder.display());
                return Ok(folder);
            }
            (Err(failure), _) => return Err(self.error(&reference, None, failure)),
        };
        let fetch = Fetch { hub: self, reference, repo, description, cached, cache, client };
        let folder = fetch.files(wanted)?;
        if !is_commit(revision) {
            fetch.cached.set_commit(revision, &fetch.description.commit)?;
        }
        Ok(folder)
    }

    /// Addresses of a model's files and description.
    fn api(&self, cache: &Cache, names: Repo) -> std::result::Result<ApiRepo, String> {
        let mut builder = ApiBuilder::from_cache(cache.clone());
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        Ok(builder.build().map_err(|error| error.to_string())?.repo(names))
    }

    /// The commit that a revision is, and the names of its files.
    fn describe(
        &self,
        api: &ApiRepo,
        client: &Client,
        attempts: u32,
    ) -> std::result::Result<Description, Failure> {
        let request = api.info_request();
        let no_address = || {
            let endpoint = self.endpoint.as_deref().unwrap_or_default();
            Failure::Address(format!("HF_ENDPOINT `{endpoint}` is no address"))
        };
        let address = request.uri_ref().ok_or_else(no_address)?.to_string();
        let text = client.text(&address, attempts)?;
        Description::read(&text)
            .ok_or_else(|| Failure::Address(format!("`{address}` does not answer as a hub does")))
    }

    /// The error for a request about a model, or about one of its files.
    fn error(&self, reference: &ModelRef, file: Option<&str>, failure: Failure) -> Error {
        let about = file.map_or_else(String::new, |file| format!("`{file}`: "));
        let hint = match &failure {
            Failure::File(_) => None,
            Failure::Status { status: 401 | 403, .. } if self.token.is_some() => Some(
                "check the name, and that this token (HF_TOKEN) may read it; gated models ask on their page",
            ),
            Failure::Status { status: 401 | 403, .. } => Some(
                "check the name; if the model is private or gated, ask for access on its page and set HF_TOKEN",
            ),
            Failure::Status { status: 404, .. } => Some("check the name, the revision and HF_ENDPOINT"),
            Failure::Status { .. } => Some("try again later"),
            Failure::Address(_) => Some("unset HF_ENDPOINT, or give it the address of a hub"),
            Failure::Wrong { .. } => Some("try again; if it stays, the server or a proxy changes files"),
            Failure::Connection(_) => Some(
                "check the network, HF_ENDPOINT and HTTPS_PROXY; the same command goes on where it stopped; \
                 HF_HUB_OFFLINE=1 uses the cache alone",
            ),
        };
        let reason = match failure {
            Failure::File(error) => return error,
            Failure::Status { status: 404, .. } if file.is_none() => {
                "the hub has no such model, or the model no such revision (404)".to_owned()
            }
            failure => format!("{about}{}", failure.reason()),
        };
        Error::Hub { model: reference.to_string(), reason, hint: hint.unwrap_or_default().to_owned() }
    }
}

impl std::fmt::Debug for Hub {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

/// A revision of a model, as the hub describes it.
#[derive(Debug)]
struct Description {
    commit: String,
    files: Vec<String>,
}

impl Description {
    fn read(text: &str) -> Option<Self> {
        let json: Value = serde_json::from_str(text).ok()?;
        let commit = json.get("sha")?.as_str().filter(|commit| is_commit(commit))?.to_owned();
        let siblings = json.get("siblings")?.as_array()?;
        let files = siblings.iter().filter_map(|file| Some(file.get("rfilename")?.as_str()?.to_owned()));
        Some(Self { commit, files: files.collect() })
    }

    fn has(&self, file: &str) -> bool {
        self.files.iter().any(|name| name == file)
    }
}

/// One model being fetched.
struct Fetch<'a> {
    hub: &'a Hub,
    reference: ModelRef,
    repo: &'a str,
    description: Description,
    cached: Cached,
    cache: Cache,
    client: Client,
}

impl Fetch<'_> {
    /// Every wanted file; the snapshot's folder.
    fn files(&self, wanted: Wanted) -> Result<PathBuf> {
        if wanted.weights {
            let small = BESIDE_WEIGHTS.iter().filter(|file| self.description.has(file));
            small.copied().try_for_each(|file| self.file(file))?;
        }
        if wanted.tokenizer {
            self.required(TOKENIZER, "name a `tokenizer.json` of your own")?;
        }
        self.required(CONFIG, "choose a model for `transformers`")?;
        if wanted.weights {
            self.weights()?;
        }
        Ok(self.cached.snapshot(&self.description.commit))
    }

    fn weights(&self) -> Result<()> {
        if self.description.has(SINGLE) {
            return self.file(SINGLE);
        }
        if self.description.has(INDEX) {
            self.file(INDEX)?;
            let index = self.cached.snapshot(&self.description.commit).join(INDEX);
            let files = shards(&read_json(&index)?).ok_or_else(|| {
                self.fail(
                    format!("`{INDEX}` names no safetensors files beside it"),
                    "choose another revision",
                )
            })?;
            return files.iter().try_for_each(|file| self.required(file, "choose another revision"));
        }
        let is_pickle = |file: &&String| PICKLES.iter().any(|ending| file.ends_with(ending));
        let reason = match self.description.files.iter().find(is_pickle) {
            Some(pickle) => format!("has its weights only as `{pickle}`, and safetensors are needed"),
            None => format!("has neither `{SINGLE}` nor `{INDEX}`"),
        };
        Err(self
            .fail(reason, "choose a revision with safetensors, or convert the weights and name the folder"))
    }

    fn required(&self, file: &str, hint: &str) -> Result<()> {
        if self.description.has(file) {
            return self.file(file);
        }
        Err(self.fail(format!("has no `{file}`"), hint))
    }

    /// One file, unless the snapshot has it.
    fn file(&self, file: &str) -> Result<()> {
        let commit = &self.description.commit;
        if self.cached.snapshot(commit).join(file).is_file() {
            return Ok(());
        }
        let fail = |failure| self.hub.error(&self.reference, Some(file), failure);
        // By its commit: a branch may move between two files.
        let names = Repo::with_revision(self.repo.to_owned(), RepoType::Model, commit.clone());
        let api = self.hub.api(&self.cache, names).map_err(|reason| fail(Failure::Address(reason)))?;
        let address = api.url(file);
        let identity = self.client.identity(&address).map_err(fail)?;
        let _lock = self.cached.lock(&identity.etag)?;
        let blob = self.cached.blob(&identity.etag);
        if !std::fs::metadata(&blob).is_ok_and(|blob| blob.len() == identity.size_bytes) {
            tracing::info!("fetching `{file}` of `{}`, {}", self.reference, megabytes(identity.size_bytes));
            let incomplete = self.cached.incomplete(&identity.etag);
            self.client.download(&address, &identity, &incomplete).map_err(fail)?;
            self.cached.finish(&identity.etag)?;
        }
        self.cached.link(&identity.etag, commit, Path::new(file))
    }

    fn fail(&self, reason: String, hint: &str) -> Error {
        Error::Hub { model: self.reference.to_string(), reason, hint: hint.to_owned() }
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        Hub::from_variables(get).unwrap()
    }

    #[test]
    fn the_environment_says_where_the_cache_is() {
        let cases: [(&[(&str, &str)], &str); 4] = [
            (&[("HOME", "/h")], "/h/.cache/huggingface/hub"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")], "/f/hub"),
            (&[("HOME", "/h"), ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")], "/c"),
        ];
        for (variables, expected) in cases {
            assert_eq!(hub(variables).cache, Path::new(expected), "{variables:?}");
        }
        let message = Hub::from_variables(|_| None).unwrap_err().to_string();
        assert!(message.contains("HF_HUB_CACHE"), "{message}");
    }

    #[test]
    fn the_environment_says_how_to_ask() {
        let dir = tempfile::TempDir::new().unwrap();
        std::fs::write(dir.path().join("token"), "stored\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let plain = hub(&[("HF_HOME", home)]);
        assert_eq!((plain.endpoint, plain.token.as_deref(), plain.offline), (None, Some("stored"), false));
        let set = [
            ("HF_HOME", home),
            ("HF_TOKEN", "given"),
            ("HF_HUB_OFFLINE", "1"),
            ("HF_ENDPOINT", "http://localhost:1/"),
        ];
        let set = hub(&set);
        assert_eq!((set.token.as_deref(), set.offline), (Some("given"), true));
        assert_eq!(set.endpoint.as_deref(), Some("http://localhost:1/"));
        assert!(!format!("{set:?}").contains("given"));
        assert_eq!(hub(&[("HOME", "/nowhere"), ("HF_HUB_OFFLINE", "0")]).token, None);
    }
}
