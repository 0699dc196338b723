//! Shards in an S3 bucket, served by moto on loopback, give the packs of the local files.
//!
//! Credentials and the endpoint come from the environment, which a process must not change for itself: the
//! test starts its own binary again, with the variables set.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use sail_data::{CacheSpec, DataSpec, Loader, LoaderOptions, SourceSpec, StoreSpec};

use crate::support::{demo_spec, encoder, line, root};

const PACKS: usize = 12;
/// Set for the second process only.
const AS_CHILD: &str = "SAIL_TEST_BUCKET";

fn spec(shards: &[String], cache: Option<CacheSpec>) -> DataSpec {
    let sources = vec![SourceSpec::new("demo", shards.to_vec())];
    // Small enough that reading ahead matters.
    let store = StoreSpec { read_ahead_bytes: 256 << 10, cache, ..StoreSpec::default() };
    DataSpec { sources, store, ..demo_spec("", 2) }
}

fn packs(shards: &[String], cache: Option<CacheSpec>) -> Vec<String> {
    let mut loader = Loader::new(&spec(shards, cache), encoder(), LoaderOptions::alone(2), None).unwrap();
    (0..PACKS).map(|_| line(&loader.next_pack().unwrap())).collect()
}

fn patterns(folder: &str) -> Vec<String> {
    ["caption-train-*.tar", "ocr-train-{000000..000001}.tar"].map(|name| format!("{folder}/{name}")).to_vec()
}

/// The server, ended with the test.
struct Moto {
    process: Child,
    port: u16,
}

impl Moto {
    fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Command::new(root().join(".venv/bin/python"))
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
            .spawn()
            .expect("scripts/setup.sh --reference has made .venv");
        let mut moto = Self { process, port };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = moto.process.try_wait().unwrap();
            assert!(ended.is_none(), "moto ended ({ended:?}); ./scripts/setup.sh --reference installs it");
            assert!(begun.elapsed() < Duration::from_secs(60), "moto does not answer");
            std::thread::sleep(Duration::from_millis(100));
        }
        moto
    }

    fn put(&self, path: &str, body: &[u8]) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let credential = "Credential=test/20260101/us-east-1/s3/aws4_request";
        let head = format!(
            "PUT {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Length: {}\r\nContent-Type: application/x-tar\r\n\
             Authorization: AWS4-HMAC-SHA256 {credential}, SignedHeaders=host, Signature=0\r\nConnection: close\r\n\r\n",
            self.port,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[test]
fn a_bucket_gives_the_packs_of_the_local_shards() {
    if let Ok(bucket) = std::env::var(AS_CHILD) {
        return compare_with_local(&bucket);
    }
    let moto = Moto::start();
    moto.put("/shards", b"");
    for entry in std::fs::read_dir(root().join("data/demo")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "tar") {
            let name = path.file_name().unwrap().to_str().unwrap();
            moto.put(&format!("/shards/demo/{name}"), &std::fs::read(&path).unwrap());
        }
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "buckets::a_bucket_gives_the_packs_of_the_local_shards", "--nocapture"])
        .env(AS_CHILD, "s3://shards/demo")
        .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", moto.port))
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test")
        .env("AWS_REGION", "us-east-1")
        .status()
        .unwrap();
    assert!(child.success());
}

fn compare_with_local(bucket: &str) {
    let local = packs(&patterns(root().join("data/demo").to_str().unwrap()), None);
    assert_eq!(packs(&patterns(bucket), None), local);
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let cache = CacheSpec { dir: dir.path().to_owned(), max_bytes: 1 << 30 };
        assert_eq!(packs(&patterns(bucket), Some(cache)), local);
    }
    let absent = spec(&[format!("{bucket}/none-*.tar")], None);
    let error = sail_data::check_sources(&absent).unwrap_err().to_string();
    assert!(error.contains("none-*.tar") && error.contains("matches no file"), "{error}");
}
