//! The headers of a tar archive: ustar, GNU long names and pax records, read from bytes that may be anything.
//!
//! [`next_file`] finds the next regular file from a place in the archive on; it reads headers and never a payload.
//! Links, devices and folders are passed over.

use std::io::{Error as IoError, ErrorKind};

use crate::store::Blob;

pub(super) const BLOCK: u64 = 512;

/// Most bytes of a record that gives a name; a longer one is no name.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// Bytes that can be read at any place.
pub(super) trait Readable {
    /// How many there are.
    fn size(&self) -> u64;
    /// Fills `buf` from `at` on.
    fn fill(&self, at: u64, buf: &mut [u8]) -> std::io::Result<()>;
}

impl Readable for Blob {
    fn size(&self) -> u64 {
        self.len()
    }

    fn fill(&self, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.read_exact_at(at, buf)
    }
}

impl Readable for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn fill(&self, at: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let there = self.get(at as usize..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(there.ok_or_else(|| IoError::from(ErrorKind::UnexpectedEof))?);
        Ok(())
    }
}

/// A regular file in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) name: String,
    /// Where its header begins, or the record before it that gives its name.
    pub(super) start: u64,
    /// Where its content begins.
    pub(super) data: u64,
    /// Bytes of content.
    pub(super) size: u64,
    /// Where its padding ends and the next header begins.
    pub(super) end: u64,
}

/// What stands at a place of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    File(File),
    /// The zero block that ends an archive, and where it begins.
    EndMark(u64),
    /// The bytes end where a header could begin.
    EndOfBytes,
}

/// Why the archive cannot be read on.
#[derive(Debug)]
pub(super) enum Failure {
    /// The bytes cannot be read.
    Io(IoError),
    /// They are not those of an archive, at this place.
    Broken { at: u64, detail: String },
}

/// What the records before a header say about it.
#[derive(Debug, Default)]
struct Extension {
    name: Option<String>,
    size: Option<u64>,
}

/// The next regular file at or behind `at`, where a header begins.
pub(super) fn next_file<B: Readable + ?Sized>(bytes: &B, mut at: u64) -> Result<Found, Failure> {
    let mut start = at;
    let mut extension = Extension::default();
    loop {
        let broken = |detail: String| Failure::Broken { at, detail };
        let left = bytes.size().saturating_sub(at);
        if left == 0 {
            return Ok(Found::EndOfBytes);
        }
        if left < BLOCK {
            return Err(broken(format!("the file ends after {left} bytes of a header of {BLOCK}")));
        }
        let mut header = [0; BLOCK as usize];
        bytes.fill(at, &mut header).map_err(Failure::Io)?;
        if header.iter().all(|&byte| byte == 0) {
            return Ok(Found::EndMark(at));
        }
        check_sum(&header).map_err(broken)?;
        let kind = header[156];
        let regular = matches!(kind, b'0' | 0 | b'7');
        let size = content_bytes(&header, extension.size.filter(|_| regular)).map_err(broken)?;
        let data = at + BLOCK;
        let end = size.checked_next_multiple_of(BLOCK).and_then(|padded| data.checked_add(padded));
        let end = end.filter(|&end| end <= bytes.size()).ok_or_else(|| {
            let there = bytes.size() - data;
            broken(format!("a member of {size} bytes begins, and the file ends after {there}"))
        })?;
        if regular {
            let name = extension.name.take().unwrap_or_else(|| header_name(&header));
            return Ok(Found::File(File { name, start, data, size, end }));
        }
        match kind {
            b'L' => extension.name = Some(text(&record(bytes, data, size).map_err(|e| e.at(at))?)),
            b'x' | b'X' => {
                let record = record(bytes, data, size).map_err(|e| e.at(at))?;
                extension.read_pax(&record).map_err(broken)?;
            }
            b'K' | b'g' => {}
            _ => {
                extension = Extension::default();
                start = end;
            }
        }
        at = end;
    }
}

impl Failure {
    fn at(self, place: u64) -> Self {
        match self {
            Self::Broken { detail, .. } => Self::Broken { at: place, detail },
            Self::Io(_) => self,
        }
    }
}

fn record<B: Readable + ?Sized>(bytes: &B, at: u64, size: u64) -> Result<Vec<u8>, Failure> {
    if size > MAX_RECORD_BYTES {
        return Err(Failure::Broken { at, detail: format!("a name has {size} bytes") });
    }
    let mut record = vec![0; size as usize];
    bytes.fill(at, &mut record).map_err(Failure::Io)?;
    Ok(record)
}

impl Extension {
    /// Reads pax records, `<length> <key>=<value>\n`, where the length is that of the whole record.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), String> {
        let garbled = || "a pax header is garbled".to_owned();
        while !records.is_empty() {
            let space = records.iter().position(|&byte| byte == b' ').ok_or_else(garbled)?;
            let length: usize = std::str::from_utf8(&records[..space])
                .ok()
                .and_then(|n| n.parse().ok())
                .ok_or_else(garbled)?;
            let body = records.get(space + 1..length).and_then(|body| body.strip_suffix(b"\n"));
            let body = body.ok_or_else(garbled)?;
            if let Some(path) = body.strip_prefix(b"path=") {
                self.name = Some(String::from_utf8_lossy(path).into_owned());
            } else if let Some(size) = body.strip_prefix(b"size=") {
                let size = std::str::from_utf8(size).ok().and_then(|n| n.parse().ok());
                self.size = Some(size.ok_or_else(garbled)?);
            }
            records = &records[length..];
        }
        Ok(())
    }
}

/// The checksum counts the bytes as unsigned, in old archives as signed, and its own field as spaces.
pub(super) fn check_sum(header: &[u8]) -> Result<(), String> {
    let stored = octal(&header[148..156]).ok_or("a header has an unreadable checksum")?;
    let bytes =
        || header.iter().enumerate().map(|(i, &byte)| if (148..156).contains(&i) { b' ' } else { byte });
    let unsigned: u64 = bytes().map(u64::from).sum();
    let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
    if stored == unsigned || i64::try_from(stored) == Ok(signed) {
        return Ok(());
    }
    Err(format!("a header's checksum is {stored} and should be {unsigned}; is it a tar file?"))
}

/// Bytes of content behind a header: `given` by a record before it, or by its own size field.
fn content_bytes(header: &[u8], given: Option<u64>) -> Result<u64, String> {
    let declared = parse_size(&header[124..136])?;
    match header[156] {
        // Links, devices, folders and pipes have no content, whatever their size field says.
        b'1'..=b'6' => Ok(0),
        b'S' => Err("sparse files are not supported".into()),
        _ => Ok(given.unwrap_or(declared)),
    }
}

/// The size field: octal digits, or base 256 when the top bit is set.
fn parse_size(field: &[u8]) -> Result<u64, String> {
    if field[0] & 0x80 == 0 {
        return octal(field).ok_or_else(|| "a header has an unreadable size".to_owned());
    }
    let high = std::iter::once(field[0] & 0x7f).chain(field[1..field.len() - 8].iter().copied());
    if high.clone().any(|byte| byte != 0) {
        return Err("a header has an impossible size".into());
    }
    Ok(field[field.len() - 8..].iter().fold(0, |size, &byte| (size << 8) | u64::from(byte)))
}

/// Octal digits, padded with spaces or ended by a zero byte; none are 0.
fn octal(field: &[u8]) -> Option<u64> {
    let digits = field.split(|&byte| byte == 0).next()?.trim_ascii();
    digits.iter().try_fold(0_u64, |number, &digit| match digit {
        b'0'..=b'7' => number.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// The name in the header, with the prefix that ustar keeps apart.
fn header_name(header: &[u8]) -> String {
    let name = text(&header[..100]);
    // GNU's own format has other fields in the place of the prefix.
    let prefix = if &header[257..263] == b"ustar\0" { text(&header[345..500]) } else { String::new() };
    if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
}

/// Text up to the first zero byte. What is no UTF-8 in it is replaced: a name tells samples apart, nothing more.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}
