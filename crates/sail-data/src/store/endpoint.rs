//! From a URL to the client of its store: one for each bucket, with credentials from the environment.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{HttpClient, HttpConnector, ReqwestConnector};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};

use super::lock;
use super::runtime::runtime;
use super::trouble::without_query;
use crate::error::{Error, Result};

/// A store and the place of an object in it.
pub(super) type Place = (Arc<dyn ObjectStore>, Path);

/// Variables with which the tools of a store name a server of one's own.
const ENDPOINT_VARIABLES: [&str; 6] = [
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AZURE_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "GOOGLE_BASE_URL",
];

/// The clients made so far.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    /// By `scheme://bucket`.
    buckets: Mutex<BTreeMap<String, Arc<dyn ObjectStore>>>,
    /// Shared by all web addresses, so that connections are.
    web: Mutex<Option<HttpClient>>,
}

/// Gives every store the same client.
#[derive(Debug)]
struct Shared(HttpClient);

impl HttpConnector for Shared {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(self.0.clone())
    }
}

/// The parts of `scheme://bucket/key`.
pub(super) struct Address<'a> {
    pub(super) scheme: &'a str,
    pub(super) bucket: &'a str,
    pub(super) key: &'a str,
}

impl<'a> Address<'a> {
    /// `None` for what is no URL, and so a local path.
    pub(super) fn parse(location: &'a str) -> Option<Self> {
        let (scheme, rest) = location.split_once("://")?;
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        Some(Self { scheme, bucket, key })
    }

    /// Whether it is a plain web address, which cannot be listed.
    pub(super) fn is_web(&self) -> bool {
        matches!(self.scheme, "http" | "https")
    }
}

impl Endpoints {
    /// The store and the place in it that a URL names.
    pub(super) fn place(&self, location: &str, address: &Address<'_>) -> Result<Place> {
        let unusable = |error: object_store::Error| unusable(location, &error.to_string());
        // The clients of a store may ask for the runtime when they are made.
        let runtime = runtime()?;
        let _inside = runtime.enter();
        if address.is_web() {
            let connector = Shared(self.web_client().map_err(unusable)?);
            // The whole URL, so that a query (a signature) stays as it is.
            let builder = HttpBuilder::new().with_url(location).with_http_connector(connector);
            let store = builder.with_retry(no_retries()).build().map_err(unusable)?;
            return Ok((Arc::new(store), Path::default()));
        }
        let path = Path::parse(address.key).map_err(|error| unusable(error.into()))?;
        let name = format!("{}://{}", address.scheme, address.bucket);
        let mut buckets = lock(&self.buckets);
        if let Some(store) = buckets.get(&name) {
            return Ok((Arc::clone(store), path));
        }
        let store = connect(location, address.scheme, &format!("{name}/"))?;
        buckets.insert(name, Arc::clone(&store));
        Ok((store, path))
    }

    fn web_client(&self) -> object_store::Result<HttpClient> {
        let mut web = lock(&self.web);
        if let Some(client) = web.as_ref() {
            return Ok(client.clone());
        }
        let client = ReqwestConnector::default().connect(&options(true))?;
        Ok(web.insert(client).clone())
    }
}

fn connect(location: &str, scheme: &str, url: &str) -> Result<Arc<dyn ObjectStore>> {
    let options = options(plain_http_allowed());
    let store: object_store::Result<Arc<dyn ObjectStore>> = match scheme {
        "s3" | "s3a" => {
            let builder = AmazonS3Builder::from_env().with_url(url).with_client_options(options);
            builder.with_retry(no_retries()).build().map(|store| Arc::new(store) as _)
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url).with_client_options(options);
            builder.with_retry(no_retries()).build().map(|store| Arc::new(store) as _)
        }
        "az" | "azure" | "abfs" | "abfss" => {
            let builder = MicrosoftAzureBuilder::from_env().with_url(url).with_client_options(options);
            builder.with_retry(no_retries()).build().map(|store| Arc::new(store) as _)
        }
        _ => {
            let known = "expected a local path, or http, https, s3, gs, az, abfs or abfss";
            return Err(unusable(location, &format!("the scheme `{scheme}` is unknown; {known}")));
        }
    };
    store.map_err(|error| unusable(location, &error.to_string()))
}

/// No limits of its own: `transfer` measures the silence of every request.
fn options(allow_http: bool) -> ClientOptions {
    ClientOptions::new().with_timeout_disabled().with_connect_timeout_disabled().with_allow_http(allow_http)
}

/// Retries are made where the bytes are counted, in `transfer`.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// Whether the environment asks for a server without TLS, such as a local one.
fn plain_http_allowed() -> bool {
    let asked = |name: &str| std::env::var(name).is_ok_and(|value| value.eq_ignore_ascii_case("true"));
    let plain = |name: &str| std::env::var(name).is_ok_and(|value| value.starts_with("http://"));
    ["AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP"].iter().any(|name| asked(name))
        || ENDPOINT_VARIABLES.iter().any(|name| plain(name))
}

fn unusable(location: &str, detail: &str) -> Error {
    Error::BadLocation { location: without_query(location), detail: detail.to_owned() }
}
