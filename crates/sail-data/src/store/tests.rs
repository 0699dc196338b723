//! Every byte right, every failure an error in time: local files, a faulty web server, memory.

use std::time::{Duration, Instant};

use super::server::{Fault, Server};
use super::*;
use crate::rng::Key;
use crate::spec::CacheSpec;

const BLOCK: usize = 64 << 10;

/// Bytes without a pattern that a wrong offset could hide in.
pub(super) fn noise(length: usize) -> Vec<u8> {
    let key = Key::new(length as u64);
    (0..length.div_ceil(8) as u64).flat_map(|n| key.bits(n).to_le_bytes()).take(length).collect()
}

/// Small blocks, a short silence, three retries.
pub(super) fn spec() -> StoreSpec {
    StoreSpec { retries: 3, timeout_secs: 0.5, read_ahead_bytes: 2 * BLOCK as u64, cache: None }
}

pub(super) fn store() -> Store {
    Store::new(&spec()).unwrap()
}

pub(super) fn cached(dir: &std::path::Path, max_bytes: u64) -> Store {
    let cache = Some(CacheSpec { dir: dir.to_owned(), max_bytes });
    Store::new(&StoreSpec { cache, ..spec() }).unwrap()
}

/// Everything, in steps of an odd length.
pub(super) fn walk(blob: &Blob) -> std::io::Result<Vec<u8>> {
    let (mut bytes, mut step) = (Vec::new(), vec![0; 10_007]);
    loop {
        match blob.read_at(bytes.len() as u64, &mut step)? {
            0 => return Ok(bytes),
            n => bytes.extend_from_slice(&step[..n]),
        }
    }
}

fn check(blob: &Blob, bytes: &[u8]) {
    assert_eq!(blob.len(), bytes.len() as u64);
    assert!(walk(blob).unwrap() == bytes);
    for (offset, len) in [(0, 0), (0, 1), (BLOCK - 3, 7), (BLOCK, BLOCK), (5, bytes.len() - 9)] {
        assert!(
            blob.read(offset as u64, len as u64).unwrap() == bytes[offset..offset + len],
            "{offset} {len}"
        );
    }
    let end = bytes.len() as u64;
    assert_eq!(blob.read_at(end, &mut [0; 4]).unwrap(), 0);
    assert_eq!(blob.read_at(end + 1, &mut [0; 4]).unwrap(), 0);
    for (offset, len) in [(end - 1, 2), (end + 1, 0), (u64::MAX, 1)] {
        assert_eq!(blob.read(offset, len).unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn local_and_remote_bytes_are_right() {
    let bytes = noise(5 * BLOCK + 12_345);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar").display().to_string();
    std::fs::write(&path, &bytes).unwrap();
    let store = store();
    check(&store.open(&path).unwrap(), &bytes);
    let server = Server::new(bytes.clone());
    let blob = store.open(&server.url("a.tar?signature=x")).unwrap();
    check(&blob, &bytes);
    assert!(Arc::ptr_eq(&blob, &store.open(blob.location()).unwrap()));
    assert_eq!(store.open(&Server::new(Vec::new()).url("empty.tar")).unwrap().len(), 0);
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo.tar").display().to_string();
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [fifo, dir.path().display().to_string()] {
        let error = store().open(&path).unwrap_err();
        assert!(
            matches!(&error, Error::Io { cause, .. } if cause.to_string().contains("regular")),
            "{error:?}"
        );
    }
}

#[test]
fn a_walk_fetches_every_byte_once_and_ahead() {
    let bytes = noise(9 * BLOCK + 1);
    let server = Server::new(bytes.clone());
    let store = store();
    let blob = store.open(&server.url("a.tar")).unwrap();
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let blob = Arc::clone(&blob);
            std::thread::spawn(move || walk(&blob).unwrap())
        })
        .collect();
    assert!(readers.into_iter().all(|reader| reader.join().unwrap() == bytes));
    assert!(blob.read(3, 8 * BLOCK as u64).unwrap() == bytes[3..3 + 8 * BLOCK]);
    let mut requests = server.requests();
    requests.sort_by_key(|range| range.start);
    assert_eq!(requests.len(), 10, "{requests:?}");
    assert!(requests.iter().map(|range| range.start).eq((0..10).map(|n| n * BLOCK)), "{requests:?}");

    // The first step of a walk is enough to have the next blocks fetched.
    let server = Server::new(bytes);
    let blob = store.open(&server.url("a.tar")).unwrap();
    blob.read_at(0, &mut [0]).unwrap();
    wait_until(|| server.requests().len() == 3);
}

#[test]
fn a_sample_that_is_not_in_memory_is_fetched_alone() {
    let bytes = noise(9 * BLOCK);
    let server = Server::new(bytes.clone());
    let blob = store().open(&server.url("a.tar")).unwrap();
    let at = 5 * BLOCK - 10;
    assert!(blob.read(at as u64, 30).unwrap() == bytes[at..at + 30]);
    assert_eq!(server.requests().last(), Some(&(at..at + 30)));
    // Partly in memory: the end of the first block and the beginning of the second.
    assert!(blob.read(BLOCK as u64 - 5, 12).unwrap() == bytes[BLOCK - 5..BLOCK + 7]);
    assert_eq!(server.requests().last(), Some(&(BLOCK..BLOCK + 7)));
}

#[test]
fn memory_is_bounded() {
    let bytes = noise(40 * BLOCK);
    let server = Server::new(bytes.clone());
    let mut blocks = Blocks::new(2 * BLOCK as u64);
    blocks.limit(8 * BLOCK as u64);
    let mut store = store();
    Arc::get_mut(&mut store.inner).unwrap().blocks = Arc::new(blocks);
    let blob = store.open(&server.url("a.tar")).unwrap();
    for _ in 0..2 {
        assert!(walk(&blob).unwrap() == bytes);
        assert!(store.inner.blocks.held_bytes() <= 11 * BLOCK as u64, "{}", store.inner.blocks.held_bytes());
    }
    drop((lock(&store.inner.kept).clear(), blob));
    assert_eq!(store.inner.blocks.held_bytes(), 0);
}

#[test]
fn broken_transfers_go_on_where_they_stopped() {
    let bytes = noise(4 * BLOCK);
    let faults = [
        Fault::Cut(1000),
        Fault::Status(503),
        Fault::HangUp,
        Fault::Cut(0),
        Fault::Cut(BLOCK / 2),
        Fault::Stall(77),
        Fault::Slow,
        Fault::Status(500),
        Fault::Cut(BLOCK - 1),
        Fault::Status(429),
    ];
    for cache in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let store = if cache { cached(dir.path(), 1 << 30) } else { store() };
        let server = Server::new(bytes.clone());
        server.order(&faults);
        let blob = store.open(&server.url("a.tar")).unwrap();
        assert!(walk(&blob).unwrap() == bytes);
        let asked: Vec<usize> = server.requests().iter().map(|range| range.start).collect();
        assert_eq!(asked[..3], [0, 1000, 1000], "{asked:?}");
        assert!(asked.len() >= 10, "{asked:?}");
    }
}

#[test]
fn a_failing_server_is_one_clear_error_in_time() {
    let silence = Duration::from_millis(500);
    for (fault, part, longest) in [
        (Fault::Status(503), "503", Duration::from_secs(3)),
        (Fault::HangUp, "", Duration::from_secs(3)),
        (Fault::Stall(0), "no answer within 500ms", 4 * silence + Duration::from_secs(3)),
        (Fault::Cut(0), "", Duration::from_secs(3)),
    ] {
        let server = Server::new(noise(100));
        server.always(fault);
        let begun = Instant::now();
        let error = store().open(&server.url("a.tar?signature=secret")).unwrap_err();
        assert!(begun.elapsed() < longest, "{fault:?}: {:?}", begun.elapsed());
        let message = error.to_string();
        assert!(matches!(error, Error::Store { attempts: 4, .. }), "{fault:?}: {error:?}");
        assert!(message.contains(&server.url("a.tar")) && message.contains("hint: "), "{message}");
        assert!(message.contains(part) && !message.contains("secret"), "{fault:?}: {message}");
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let message = store().open(&format!("http://127.0.0.1:{port}/a.tar")).unwrap_err().to_string();
    assert!(message.contains("attempt 4") && message.contains("refused"), "{message}");
}

#[test]
fn what_another_try_cannot_mend_fails_at_once() {
    for (fault, part) in [
        (Fault::Status(403), "access is denied"),
        (Fault::WholeObject, "ignores ranges"),
        (Fault::OtherRange, "Requested"),
        (Fault::Overlong, ""),
    ] {
        let server = Server::new(noise(3 * BLOCK));
        server.always(fault);
        let error = store().open(&server.url("a.tar")).unwrap_err();
        assert!(matches!(error, Error::Store { attempts: 1, .. }), "{fault:?}: {error:?}");
        assert!(error.to_string().contains(part), "{fault:?}: {error}");
        assert_eq!(server.requests().len(), 1, "{fault:?}");
    }
    let server = Server::new(noise(10));
    server.always(Fault::Status(404));
    let error = store().open(&server.url("a.tar")).unwrap_err();
    assert!(matches!(error, Error::NoObject { .. }), "{error:?}");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_failure_later_on_reaches_every_waiting_reader() {
    let bytes = noise(9 * BLOCK);
    let server = Server::new(bytes.clone());
    let store = store();
    let blob = store.open(&server.url("a.tar")).unwrap();
    server.always(Fault::Status(500));
    let at = 2 * BLOCK as u64;
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let blob = Arc::clone(&blob);
            std::thread::spawn(move || blob.read_at(at, &mut [0]).unwrap_err().to_string())
        })
        .collect();
    for reader in readers {
        let message = reader.join().unwrap();
        assert!(message.contains("attempt 4") && message.contains("500"), "{message}");
    }
    server.always(Fault::None);
    assert!(walk(&blob).unwrap() == bytes, "it is not given up for good");
}

#[test]
fn a_changed_object_is_an_error() {
    let bytes = noise(9 * BLOCK);
    for (length, tag) in [(9, Some("\"two\"")), (8, Some("\"one\"")), (9, None), (9, Some("W/\"one\""))] {
        let server = Server::new(bytes.clone());
        let blob = store().open(&server.url("a.tar")).unwrap();
        server.replace(noise(length * BLOCK), tag);
        let message = walk(&blob).unwrap_err().to_string();
        assert!(message.contains("has changed while"), "{message}");
    }
    // Without tags, the size tells.
    let server = Server::new(Vec::new());
    server.replace(bytes, None);
    let blob = store().open(&server.url("a.tar")).unwrap();
    server.replace(noise(7 * BLOCK), None);
    assert!(walk(&blob).unwrap_err().to_string().contains("has changed while"));
}

#[test]
fn patterns_are_expanded_and_must_match() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for name in ["b-1.tar", "b-0.tar", "a-2.tar", "a-1.tar"] {
        std::fs::write(at(name), "").unwrap();
    }
    let store = store();
    let find = |pattern: &str| store.find("demo", pattern);
    assert_eq!(find(&at("{b,a}-*.tar")).unwrap(), ["b-0.tar", "b-1.tar", "a-1.tar", "a-2.tar"].map(at));
    let missing = find(&at("b-{0..2}.tar")).unwrap_err();
    assert!(matches!(&missing, Error::NoShards { missing, .. } if *missing == at("b-2.tar")), "{missing}");
    assert_eq!(find("http://h/{0..1}.tar?x=*").unwrap(), ["http://h/0.tar?x=*", "http://h/1.tar?x=*"]);
    assert_eq!(find("s3://b/{0..1}.tar").unwrap(), ["s3://b/0.tar", "s3://b/1.tar"]);
    for pattern in ["http://h/*.tar", "[.tar", "s3://b/[.tar"] {
        assert!(matches!(find(pattern), Err(Error::Pattern { .. })), "{pattern}");
    }
    let unknown = store.open("ftp://h/a.tar").unwrap_err();
    assert!(unknown.to_string().contains("`ftp` is unknown"), "{unknown}");
}

pub(super) fn wait_until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it never happens");
        std::thread::sleep(Duration::from_millis(5));
    }
}
