//! The cache on disk and decompression: whole files only, a bounded size, clear errors.

use std::io::Write;
use std::path::Path;

use super::server::{Fault, Server};
use super::tests::{cached, noise, store, wait_until, walk};
use super::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn files(dir: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(dir).unwrap().map(std::result::Result::unwrap);
    let mut files: Vec<_> = entries
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
        .filter(|(name, _)| name != "lock")
        .collect();
    files.sort();
    files
}

fn total(dir: &Path) -> u64 {
    files(dir).iter().map(|(_, bytes)| bytes).sum()
}

#[test]
fn a_shard_is_fetched_once_for_all_runs() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(300_000);
    let server = Server::new(bytes.clone());
    for _ in 0..3 {
        let blob = cached(dir.path(), 1 << 20).open(&server.url("a.tar")).unwrap();
        assert!(walk(&blob).unwrap() == bytes);
    }
    // Each run looks at the beginning, to see whether the object is still the same.
    let whole = server.requests().iter().filter(|range| range.end == bytes.len()).count();
    assert_eq!(whole, 1, "{:?}", server.requests());
    assert_eq!(total(dir.path()), 300_000);
    let changed = noise(200_000);
    server.replace(changed.clone(), Some("\"two\""));
    let blob = cached(dir.path(), 1 << 20).open(&server.url("a.tar")).unwrap();
    assert!(walk(&blob).unwrap() == changed);
}

#[test]
fn the_shard_used_longest_ago_goes_first() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(100_000);
    let server = Server::new(bytes.clone());
    let store = cached(dir.path(), 350_000);
    std::fs::write(dir.path().join("notes.txt"), "not a shard").unwrap();
    let first = store.open(&server.url("0")).unwrap();
    let open = |name: &str| drop(cached(dir.path(), 350_000).open(&server.url(name)).unwrap());
    let pause = || std::thread::sleep(Duration::from_millis(20));
    for name in ["1", "2", "0", "3", "4"] {
        pause();
        open(name);
        assert!(total(dir.path()) <= 350_000);
    }
    let before = server.requests().len();
    // 1 and 2 have gone; one look each at 0, 3 and 4.
    for name in ["0", "3", "4"] {
        open(name);
    }
    assert_eq!(server.requests().len() - before, 3);
    for name in ["5", "6", "7"] {
        pause();
        open(name);
    }
    assert!(walk(&first).unwrap() == bytes, "an open shard stays readable");
    assert!(dir.path().join("notes.txt").exists());
    let error = cached(dir.path(), 99_999).open(&server.url("0")).unwrap_err();
    assert!(matches!(error, Error::CacheTooSmall { bytes: 100_000, max_bytes: 99_999, .. }), "{error}");
}

#[test]
fn many_openers_share_one_transfer_and_one_limit() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(200_000);
    let server = Server::new(bytes.clone());
    server.always(Fault::Slow);
    // Each with a store of its own, as processes have.
    let openers: Vec<_> = (0..8)
        .map(|n| {
            let (store, url) = (cached(dir.path(), 450_000), server.url(&(n / 4).to_string()));
            std::thread::spawn(move || walk(&store.open(&url).unwrap()).unwrap())
        })
        .collect();
    assert!(openers.into_iter().all(|opener| opener.join().unwrap() == bytes));
    let whole = server.requests().iter().filter(|range| range.end == bytes.len()).count();
    assert_eq!(whole, 2, "{:?}", server.requests());
    // More shards at once than fit: they take turns.
    let openers: Vec<_> = (0..5)
        .map(|n| {
            let (store, url) = (cached(dir.path(), 450_000), server.url(&n.to_string()));
            std::thread::spawn(move || walk(&store.open(&url).unwrap()).unwrap())
        })
        .collect();
    assert!(openers.into_iter().all(|opener| opener.join().unwrap() == bytes));
    assert!(total(dir.path()) <= 450_000);
}

#[test]
fn what_a_killed_process_left_is_written_anew_or_removed() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(100_000);
    let server = Server::new(bytes.clone());
    drop(cached(dir.path(), 150_000).open(&server.url("a")).unwrap());
    let done = dir.path().join(&files(dir.path())[0].0);
    // The same shard, half written with wrong bytes.
    std::fs::rename(&done, done.with_extension("part")).unwrap();
    std::fs::write(done.with_extension("part"), vec![7; 120_000]).unwrap();
    let blob = cached(dir.path(), 150_000).open(&server.url("a")).unwrap();
    assert!(walk(&blob).unwrap() == bytes);
    // Another shard's leftover makes room.
    let other = dir.path().join(format!("{}.part", "0".repeat(64)));
    std::fs::write(&other, vec![7; 120_000]).unwrap();
    drop(cached(dir.path(), 150_000).open(&server.url("b")).unwrap());
    assert!(!other.exists() || total(dir.path()) <= 150_000);
    assert!(total(dir.path()) <= 150_000, "{:?}", files(dir.path()));
}

#[test]
fn a_failed_transfer_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(noise(200_000));
    server.order(&[Fault::None]).always(Fault::Cut(0));
    let error = cached(dir.path(), 1 << 20).open(&server.url("a")).unwrap_err();
    assert!(matches!(error, Error::Store { attempts: 4, .. }), "{error:?}");
    assert_eq!(files(dir.path()), []);
}

#[test]
fn compressed_shards_have_the_bytes_of_plain_ones() {
    let bytes = noise(300_000);
    let (head, tail) = bytes.split_at(123_456);
    let packed =
        [gzip(&bytes), [gzip(head), gzip(tail)].concat(), zstd(&bytes), [zstd(head), zstd(tail)].concat()];
    let dir = tempfile::tempdir().unwrap();
    for (n, packed) in packed.into_iter().enumerate() {
        // The name says nothing.
        let path = dir.path().join(format!("{n}.tar")).display().to_string();
        std::fs::write(&path, &packed).unwrap();
        let server = Server::new(packed);
        for location in [path, server.url("a.tar")] {
            let cache = tempfile::tempdir().unwrap();
            for store in [store(), cached(cache.path(), 1 << 20), cached(cache.path(), 1 << 20)] {
                server.order(&[Fault::Cut(70), Fault::None, Fault::Cut(50)]);
                let blob = store.open(&location).unwrap();
                assert!(walk(&blob).unwrap() == bytes, "{location}");
                assert_eq!(blob.read(123_450, 11).unwrap(), bytes[123_450..123_461]);
            }
            assert_eq!(files(cache.path()).len(), 1);
            assert_eq!(total(cache.path()), 300_000);
        }
    }
}

#[test]
fn damaged_compression_names_the_shard() {
    let bytes = noise(300_000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar.gz").display().to_string();
    for packed in [gzip(&bytes), zstd(&bytes)] {
        let mut flipped = packed.clone();
        flipped[packed.len() - 3] ^= 1;
        let mut damaged = vec![packed[..packed.len() - 1].to_vec(), packed[..packed.len() / 2].to_vec()];
        if packed[0] == 0x1f {
            damaged.push(flipped);
            damaged.push([packed.clone(), b"garbage".to_vec()].concat());
        }
        for damaged in damaged {
            std::fs::write(&path, &damaged).unwrap();
            let cache = tempfile::tempdir().unwrap();
            for store in [store(), cached(cache.path(), 1 << 20)] {
                let error = store.open(&path).unwrap_err();
                assert!(matches!(error, Error::BadCompression { .. }), "{error:?}");
                assert!(error.to_string().contains(&path), "{error}");
            }
            assert_eq!(files(cache.path()), []);
        }
    }
    std::fs::write(&path, b"BZh91AY").unwrap();
    assert!(matches!(store().open(&path), Err(Error::CompressedShard { codec: "bzip2", .. })));
}

#[test]
fn a_decompression_bomb_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let cache = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar.gz").display().to_string();
    for packed in [gzip(&vec![0; 50 << 20]), zstd(&vec![0; 50 << 20])] {
        std::fs::write(&path, packed).unwrap();
        let error = cached(cache.path(), 10 << 20).open(&path).unwrap_err();
        assert!(matches!(error, Error::TooLargeUnpacked { limit, .. } if limit == 10 << 20), "{error}");
        assert_eq!(files(cache.path()), []);
    }
}

#[test]
fn a_server_that_breaks_a_compressed_shard_off_is_not_called_corrupt() {
    let server = Server::new(gzip(&noise(300_000)));
    server.order(&[Fault::None]).always(Fault::HangUp);
    let error = store().open(&server.url("a.tar.gz")).unwrap_err();
    assert!(matches!(error, Error::Store { attempts: 4, .. }), "{error:?}");
}

#[test]
fn only_so_many_blobs_are_kept() {
    let server = Server::new(noise(10));
    let store = store();
    for n in 0..KEPT_BLOBS + 5 {
        store.open(&server.url(&n.to_string())).unwrap();
    }
    let before = server.requests().len();
    store.open(&server.url("6")).unwrap();
    assert_eq!(server.requests().len(), before);
    store.open(&server.url("0")).unwrap();
    wait_until(|| server.requests().len() == before + 1);
}
