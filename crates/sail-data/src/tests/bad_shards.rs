//! Archives of every kind: those that are refused, with the place and the reason, and those that look strange and
//! are read. In all of them good samples stand around the strange part.

use crate::error::Error;
use crate::testing::{outcomes_of, tar_header, tar_member, text_sample};

/// Where the strange part begins: behind one good sample of a header and a block.
const AT: u64 = 1024;

fn good(name: &str) -> Vec<u8> {
    tar_member(name.as_bytes(), b'0', text_sample("q", "a").as_bytes())
}

/// A good sample, `middle`, a good sample and the end mark.
fn archive(middle: &[u8]) -> Vec<u8> {
    [&good("first.json"), middle, &good("last.json"), &[0; 1024][..]].concat()
}

fn pax(records: &[u8]) -> Vec<u8> {
    tar_member(b"pax", b'x', records)
}

/// A pax record with its length.
fn record(key: &str, value: &str) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let length = (body + 1..body + 9).find(|&n| n == body + n.to_string().len()).unwrap();
    format!("{length} {key}={value}\n").into_bytes()
}

fn claims(size: &[u8]) -> Vec<u8> {
    tar_header(b"x.json", b'0', size).to_vec()
}

/// Headers that end a shard, and what the message says.
fn refused() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let mut spoilt = good("x.json");
    spoilt[0] = b'y';
    let mut no_sum = good("x.json");
    no_sum[148..156].copy_from_slice(b"zzzzzzzz");
    let [mut binary, mut negative, mut giant] = [[0_u8; 12]; 3];
    (binary[0], binary[4]) = (0x80, 0x10);
    negative.fill(0xff);
    (giant[0], giant[1]) = (0x80, 1);
    vec![
        ("a checksum that is wrong", spoilt, "checksum"),
        ("a checksum that is no number", no_sum, "checksum"),
        ("noise", vec![0xa5; 512], "checksum"),
        ("a header of zeros, which ended the shard without a word", vec![0; 512], "behind it"),
        ("the end mark of another archive", vec![0; 1024], "behind it"),
        ("text", b"once upon a time".repeat(32), "checksum"),
        ("2^60 bytes, in base 256", claims(&binary), "the file ends"),
        ("a negative size", claims(&negative), "impossible size"),
        ("a size above 64 bits", claims(&giant), "impossible size"),
        ("as many bytes as octal can say", claims(b"777777777777"), "the file ends"),
        ("a size that is no number", claims(b"12x4567890\0"), "unreadable size"),
        ("a size with a sign", claims(b"-0000000001\0"), "unreadable size"),
        ("a size with decimal digits", claims(b"00000000089\0"), "unreadable size"),
        ("a size just beyond the file", claims(b"00000010001\0"), "the file ends"),
        ("a sparse file", tar_member(b"x.json", b'S', b"{}"), "sparse"),
        ("a long name beyond the file", tar_header(b"L", b'L', b"77777777777\0").to_vec(), "the file ends"),
        ("a pax size beyond the file", pax(&record("size", "1152921504606846976")), "the file ends"),
        ("a pax size of the largest number", pax(&record("size", "18446744073709551615")), "the file ends"),
        ("a pax size that is no number", pax(&record("size", "many")), "garbled"),
        ("a pax header without records", pax(b"garbage"), "garbled"),
        ("a pax record that is shorter than its length", pax(b"99 path=x\n"), "garbled"),
        ("a pax record that ends inside its length", pax(b"1 path=x\n"), "garbled"),
        ("a pax record of length 0", pax(b"0 path=x\n"), "garbled"),
        ("a pax record of a length above 64 bits", pax(b"99999999999999999999999 path=x\n"), "garbled"),
        ("a pax record without its line end", pax(b"9 path=xy"), "garbled"),
        ("a pax record of a negative length", pax(b"-9 path=x\n"), "garbled"),
    ]
}

#[test]
fn a_header_that_makes_no_sense_refuses_the_shard_by_name_and_place() {
    for (what, middle, expected) in refused() {
        let error = outcomes_of("a.tar", &archive(&middle)).unwrap_err();
        let Error::BrokenShard { shard, offset, detail } = &error else { panic!("{what}: {error}") };
        assert!(shard.ends_with("/a.tar"), "{what}: {shard}");
        // A record about the size concerns the header behind it.
        assert!((AT..=AT + 1024).contains(offset), "{what}: {offset}");
        assert!(detail.contains(expected), "{what}: {detail}");
    }
}

#[test]
fn a_name_longer_than_any_name_refuses_the_shard() {
    for kind in [b'L', b'x'] {
        let middle = tar_member(b"name", kind, &vec![b'n'; (1 << 20) + 1]);
        let error = outcomes_of("a.tar", &archive(&middle)).unwrap_err();
        assert!(matches!(error, Error::BrokenShard { offset: AT, .. }), "{error}");
    }
}

#[test]
fn a_sample_above_the_limit_of_memory_is_refused_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar");
    std::fs::write(&path, [&good("first.json")[..], &claims(b"40000000000\0")].concat()).unwrap();
    // The content is a hole in the file and costs no disk.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(AT + 512 + (4 << 30) + 1024).unwrap();
    let error =
        crate::testing::outcomes(&crate::testing::spec(&[&path.display().to_string()]), 0).unwrap_err();
    assert!(error.to_string().contains("at most"), "{error}");
    assert!(matches!(error, Error::BrokenShard { offset: AT, .. }), "{error}");
}

#[test]
fn every_cut_of_a_shard_is_noticed() {
    let whole = archive(&[pax(&record("path", "long.json")), good("x.json")].concat());
    let end = whole.len() - 1024;
    let cuts = (0..end).step_by(37).chain([1, 511, 512, 1023, 1024, 1025, end - 1, end]);
    for length in cuts {
        let error = outcomes_of("a.tar", &whole[..length]).unwrap_err();
        assert!(
            matches!(&error, Error::BrokenShard { offset, .. } if *offset <= length as u64),
            "{length}: {error}"
        );
    }
    assert_eq!(outcomes_of("a.tar", &whole[..end + 512]).unwrap().len(), 3, "one zero block is end enough");
    let error = outcomes_of("a.tar", &whole[..end + 100]).unwrap_err();
    assert!(error.to_string().contains("ends after 100 bytes"), "{error}");
}

/// Strange members that are read or passed over, and the keys of the shard's samples.
fn accepted() -> Vec<(&'static str, Vec<u8>, Vec<&'static str>)> {
    let between = |key: &'static str| vec!["first", key, "last"];
    let around = || vec!["first", "last"];
    let renamed = |name: &str| [pax(&record("path", name)), good("short.json")].concat();
    let long = |name: &[u8]| [tar_member(b"././@LongLink", b'L', name), good("short.json")].concat();
    let mut two = record("mtime", "1.5");
    two.extend(record("path", "d/x.json"));
    let exact = record("size", &text_sample("q", "a").len().to_string());
    vec![
        ("a GNU long name", long(b"d/x.json\0"), between("d/x")),
        ("a GNU long name without its end", long(b"d/x.json"), between("d/x")),
        ("an empty long name", long(b"\0"), around()),
        ("a pax path", renamed("d/x.json"), between("d/x")),
        ("a pax path behind another record", [pax(&two), good("s.json")].concat(), between("d/x")),
        ("a pax path with a zero byte", renamed("d\0/x.json"), between("d\0/x")),
        ("a pax size", [pax(&exact), good("x.json")].concat(), between("x")),
        (
            "a global pax header",
            [tar_member(b"g", b'g', &record("path", "y.json")), good("x.json")].concat(),
            between("x"),
        ),
        (
            "a global header of garbage",
            [tar_member(b"g", b'g', b"garbage"), good("x.json")].concat(),
            between("x"),
        ),
        ("a name that climbs out", good("../x.json"), between("../x")),
        ("an absolute name", good("/etc/x.json"), between("/etc/x")),
        ("a name that ends at a zero byte", good("x.json\0.txt"), between("x")),
        ("an empty name", good(""), around()),
        ("a name of dots", good("..."), around()),
        ("a hidden file", good(".x.json"), around()),
        ("a name without a suffix", good("README"), around()),
        ("metadata", good("__index__/x.json"), around()),
        (
            "a name that is no UTF-8",
            tar_member(b"\xff.json", b'0', text_sample("q", "a").as_bytes()),
            between("\u{fffd}"),
        ),
        ("a folder", tar_header(b"d/", b'5', b"00000000000\0").to_vec(), around()),
        ("a folder that claims a size", tar_header(b"x.json", b'5', b"00000010000\0").to_vec(), around()),
        ("a symbolic link", tar_header(b"x.json", b'2', b"00000000000\0").to_vec(), around()),
        ("a hard link that claims a size", tar_header(b"x.json", b'1', b"00000010000\0").to_vec(), around()),
        ("a device", tar_header(b"x.json", b'3', b"00000000000\0").to_vec(), around()),
        ("a pipe", tar_header(b"x.json", b'6', b"00000000000\0").to_vec(), around()),
        ("a member of an unknown kind", tar_member(b"x.json", b'V', b"label"), around()),
        (
            "a link with a long name",
            [tar_member(b"L", b'L', b"y.json"), tar_header(b"l", b'2', b"").to_vec()].concat(),
            around(),
        ),
        ("the old mark of a file", tar_member(b"x.json", 0, text_sample("q", "a").as_bytes()), between("x")),
        ("a contiguous file", tar_member(b"x.json", b'7', text_sample("q", "a").as_bytes()), between("x")),
        ("a key that came before", good("first.json"), vec!["first", "last"]),
    ]
}

#[test]
fn strange_members_are_read_or_passed_over_and_their_neighbours_survive() {
    for (what, middle, expected) in accepted() {
        let outcomes =
            outcomes_of("a.tar", &archive(&middle)).unwrap_or_else(|error| panic!("{what}: {error}"));
        let keys: Vec<&str> = outcomes.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, expected, "{what}");
        let twice = what == "a key that came before";
        for (key, outcome) in &outcomes {
            let reason = outcome.as_ref().err().map(crate::error::BadSample::reason);
            assert_eq!(reason, (twice && key == "first").then_some("duplicate_member"), "{what}: {key}");
        }
    }
}

#[test]
fn one_key_in_two_places_is_two_samples() {
    let bytes = [good("x.json"), good("y.json"), good("x.json"), vec![0; 1024]].concat();
    let keys: Vec<String> = outcomes_of("a.tar", &bytes).unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["x", "y", "x"]);
}

#[test]
fn whole_json_documents_are_refused_with_a_way_out() {
    let error = outcomes_of("a.json", b"[]").unwrap_err();
    assert!(matches!(&error, Error::WholeJson { .. }), "{error}");
    assert!(error.to_string().contains("sail-data pack"), "{error}");
}
