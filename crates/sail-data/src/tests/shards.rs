//! Shards: grouping by key, resuming at any sample, and every way of being broken.

use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::shard::{Extent, RawSample, Shard};
use crate::spec::StoreSpec;
use crate::store::Store;
use crate::testing::tar;

fn write(dir: &Path, bytes: &[u8]) -> String {
    let path = dir.join("a.tar");
    std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
    path.display().to_string()
}

fn open(path: &str) -> Result<Shard> {
    Shard::open(&Store::new(&StoreSpec::default())?, path)
}

fn scan(path: &str) -> Result<Vec<Extent>> {
    let mut scanner = open(path)?.scan(0, 0);
    let mut samples = Vec::new();
    while let Some(sample) = scanner.next_sample()? {
        samples.push(sample);
    }
    Ok(samples)
}

fn archive() -> Vec<u8> {
    tar(&[
        ("__index__/x.json", "no sample"),
        ("d/a.json", "{}"),
        ("d/a.img1.JPG", "first"),
        ("README", "no key"),
        ("d/a.img2.jpg", "second"),
        ("d.x/b.json", "[]"),
        ("a.json", ""),
        (".hidden", "no key either"),
    ])
}

#[test]
fn adjacent_members_with_one_key_are_a_sample() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &archive());
    let samples = scan(&path).unwrap();
    let read: Vec<RawSample> =
        samples.iter().map(|&place| open(&path).unwrap().read(place).unwrap()).collect();
    let keys: Vec<&str> = read.iter().map(|sample| sample.key.as_str()).collect();
    assert_eq!(keys, ["d/a", "d.x/b", "a"]);
    let suffixes: Vec<&str> = read[0].members.iter().map(|member| member.suffix.as_str()).collect();
    assert_eq!(suffixes, ["json", "img1.jpg", "img2.jpg"]);
    assert_eq!(read[0].member("img2.jpg").unwrap().data[..], b"second"[..]);
    assert_eq!((samples[0].offset % 512, samples[0].bytes % 512), (0, 0));
}

#[test]
fn a_scan_goes_on_from_any_sample() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &archive());
    let all = scan(&path).unwrap();
    let mut scanner = open(&path).unwrap().scan(0, 0);
    for (done, _) in all.iter().enumerate() {
        assert_eq!(scanner.ordinal(), done as u64);
        let mut resumed = open(&path).unwrap().scan(scanner.offset(), scanner.ordinal());
        for expected in &all[done..] {
            assert_eq!(resumed.next_sample().unwrap(), Some(*expected));
        }
        assert_eq!(resumed.next_sample().unwrap(), None);
        scanner.next_sample().unwrap();
    }
}

#[test]
fn archives_written_by_the_library_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar").display().to_string();
    let mut writer = webdataset::TarWriter::create(&path).unwrap();
    // A name above 100 bytes needs a record of its own before the member.
    let long_key = format!("{}/{}", "d".repeat(120), "k".repeat(90));
    for key in ["first", &long_key] {
        let mut sample = webdataset::Sample::with_key(key);
        sample.insert("json", "{}".as_bytes().to_vec());
        sample.insert("png", vec![7_u8; 3000]);
        writer.write(&sample).unwrap();
    }
    writer.close().unwrap();
    let samples = scan(&path).unwrap();
    assert_eq!(samples.len(), 2);
    let second = open(&path).unwrap().read(samples[1]).unwrap();
    assert_eq!(second.key, long_key);
    assert_eq!(second.member("png").unwrap().data[..], [7_u8; 3000][..]);
}

#[test]
fn a_truncated_shard_is_an_error_wherever_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let whole = archive();
    let content = whole.len() - 1024;
    for length in [0, 100, 512, 600, 1024, 1500, content - 512, content] {
        let path = write(dir.path(), &whole[..length]);
        let error = scan(&path).unwrap_err();
        let Error::BrokenShard { shard, offset, .. } = &error else { panic!("{length}: {error}") };
        assert_eq!(shard, &path);
        assert!(*offset <= length as u64, "{error}");
    }
    let path = write(dir.path(), &whole[..content + 512]);
    assert_eq!(scan(&path).unwrap().len(), 3, "one zero block is end enough");
}

#[test]
fn what_is_no_tar_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &[b'x'; 2048]);
    let message = scan(&path).unwrap_err().to_string();
    assert!(
        message.contains("a.tar") && message.contains("byte 0") && message.contains("checksum"),
        "{message}"
    );

    let path = write(dir.path(), b"BZh91AY compressed");
    assert!(matches!(scan(&path), Err(Error::CompressedShard { codec: "bzip2", .. })));
    let path = write(dir.path(), b"\x1f\x8b\x08\x00 compressed");
    assert!(matches!(scan(&path), Err(Error::BadCompression { codec: "gzip", .. })));
    assert!(matches!(scan("/no/such.tar"), Err(Error::Io { .. })));

    let mut spoilt = archive();
    spoilt[1024 + 124] = b'9';
    let path = write(dir.path(), &spoilt);
    assert!(matches!(scan(&path), Err(Error::BrokenShard { offset: 1024, .. })));
}

#[test]
fn a_header_that_claims_more_than_the_file_is_an_error_and_costs_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = tar(&[("a.json", "{}")]);
    bytes[124..136].copy_from_slice(b"77777777777\0");
    bytes[148..156].fill(b' ');
    let sum: u32 = bytes[..512].iter().map(|&byte| u32::from(byte)).sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let path = write(dir.path(), &bytes);
    assert!(matches!(scan(&path), Err(Error::BrokenShard { offset: 0, .. })));
}

#[test]
fn a_shard_that_changed_under_a_reference_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), &archive());
    let place = scan(&path).unwrap()[0];
    write(dir.path(), &archive()[..700]);
    assert!(matches!(open(&path).unwrap().read(place), Err(Error::BrokenShard { .. })));
    let wrong = Extent { bytes: place.bytes * 2, ..place };
    write(dir.path(), &archive());
    assert!(matches!(open(&path).unwrap().read(wrong), Err(Error::BrokenShard { .. })));
}
