//! A web server that drops connections and answers slowly gives the same packs as the files themselves; one that
//! cannot be reached ends in an error that says so.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sail_data::{CacheSpec, DataSpec, Loader, LoaderOptions, StoreSpec};

use crate::support::{demo_spec, encoder, line, root};

/// Serves the demo shards on loopback. Of the requests one in three is cut off in the middle, one in five is
/// slow, one in seven is answered with 503; `requests` counts them.
fn serve() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&requests);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let number = counter.fetch_add(1, Ordering::Relaxed);
            // A client that went away is no concern of the server's.
            std::thread::spawn(move || drop(answer(stream.unwrap(), number)));
        }
    });
    (url, requests)
}

fn answer(mut stream: TcpStream, number: usize) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let mut range = None;
    for header in lines {
        let header = header?.to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("range: bytes=") {
            range = value.split_once('-').map(|(from, to)| (from.to_owned(), to.to_owned()));
        }
    }
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if number % 7 == 3 {
        return stream.write_all(b"HTTP/1.1 503 busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    let Ok(mut file) = std::fs::File::open(root().join("data/demo").join(path.trim_start_matches('/')))
    else {
        return stream.write_all(b"HTTP/1.1 404 not found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let size = file.metadata()?.len();
    let (from, to) = range.map_or((0, size - 1), |(from, to)| {
        (from.parse().unwrap(), to.parse().unwrap_or(size - 1).min(size - 1))
    });
    let length = to + 1 - from;
    let status = if length == size { "200 OK" } else { "206 Partial Content" };
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {length}\r\ncontent-range: bytes {from}-{to}/{size}\r\n\
         etag: \"{size}\"\r\naccept-ranges: bytes\r\nconnection: close\r\n\r\n"
    )?;
    if method == "HEAD" {
        return Ok(());
    }
    let mut body = vec![0; length as usize];
    file.seek(SeekFrom::Start(from))?;
    file.read_exact(&mut body)?;
    if number % 5 == 2 {
        std::thread::sleep(Duration::from_millis(120));
    }
    let sent = if number % 3 == 1 { body.len() / 2 } else { body.len() };
    stream.write_all(&body[..sent])
}

fn lines(spec: &DataSpec, packs: usize) -> Vec<String> {
    let mut loader = Loader::new(spec, encoder(), LoaderOptions::alone(2), None).unwrap();
    (0..packs).map(|_| line(&loader.next_pack().unwrap())).collect()
}

fn remote(url: &str, cache: Option<PathBuf>) -> DataSpec {
    let cache = cache.map(|dir| CacheSpec { dir, max_bytes: 64 << 20 });
    let store = StoreSpec { retries: 8, timeout_secs: 5.0, read_ahead_bytes: 256 << 10, cache };
    DataSpec { store, ..demo_spec(url, 2) }
}

#[test]
fn a_failing_server_gives_the_same_samples() {
    let once = |spec: DataSpec| DataSpec { length: sail_data::Length::Epochs(1), ..spec };
    let local = lines(&once(demo_spec(&root().join("data/demo").display().to_string(), 2)), 60);
    let (url, requests) = serve();
    let streamed = lines(&once(remote(&url, None)), 60);
    assert_eq!(streamed, local);
    assert!(requests.load(Ordering::Relaxed) > 20, "the server was hardly asked");
    let folder = tempfile::tempdir().unwrap();
    let cached = lines(&once(remote(&url, Some(folder.path().into()))), 60);
    assert_eq!(cached, streamed);
    let before = requests.load(Ordering::Relaxed);
    assert_eq!(lines(&once(remote(&url, Some(folder.path().into()))), 60), streamed);
    let again = requests.load(Ordering::Relaxed) - before;
    assert!(again <= 7 * 9, "{again} requests for 7 shards that are in the cache");
}

#[test]
fn an_unreachable_server_is_an_error_that_says_so() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let store = StoreSpec { retries: 2, timeout_secs: 2.0, ..StoreSpec::default() };
    let spec = DataSpec { store, ..demo_spec(&format!("http://{closed}"), 2) };
    let started = Instant::now();
    let error = Loader::new(&spec, encoder(), LoaderOptions::alone(1), None)
        .and_then(|mut loader| loader.next_pack().map(drop))
        .unwrap_err()
        .to_string();
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    for part in [closed.to_string().as_str(), "attempt 3", "hint:"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}
