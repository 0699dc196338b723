//! The framing of an event file, `TFRecord`: each record is its length (8 bytes, little endian), a checksum of that, the
//! record, and a checksum of it; the checksums are CRC-32C, masked (`tensorflow/core/lib/hash/crc32c.h`).

use std::io::{self, ErrorKind, Read};

/// No record is longer: a length beyond is of a damaged file.
const MOST_BYTES: u64 = 1 << 28;

/// A record in its frame.
pub(super) fn framed(record: &[u8]) -> Vec<u8> {
    let length = (record.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(record.len() + 16);
    bytes.extend(length);
    bytes.extend(masked(&length).to_le_bytes());
    bytes.extend(record);
    bytes.extend(masked(record).to_le_bytes());
    bytes
}

/// The next record; `None` at the end, or where the file is cut off or damaged: nothing after that can be found.
pub(super) fn next(file: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let Some(head) = exactly(file, 12)? else { return Ok(None) };
    let (length, checksum) = head.split_at(8);
    let bytes = u64::from_le_bytes(length.try_into().expect("invariant: 8 bytes"));
    if masked(length).to_le_bytes() != checksum || bytes > MOST_BYTES {
        return Ok(None);
    }
    let Some(mut record) = exactly(file, bytes as usize + 4)? else { return Ok(None) };
    let checksum = record.split_off(bytes as usize);
    Ok((masked(&record).to_le_bytes()[..] == checksum[..]).then_some(record))
}

fn exactly(file: &mut impl Read, length: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; length];
    match file.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| next(&mut bytes).unwrap()).collect()
    }

    /// Check values of CRC-32C: RFC 3720, B.4, and Koopman's catalogue.
    #[test]
    fn checksums_are_masked_crc32c() {
        for (bytes, crc) in [(&[0u8; 32][..], 0x8a91_36aa_u32), (b"123456789", 0xe306_9283)] {
            assert_eq!(masked(bytes), crc.rotate_right(15).wrapping_add(0xa282_ead8));
        }
        assert_eq!(framed(b"one")[..8], [3, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_file_is_read_up_to_where_it_is_cut_or_damaged() {
        let whole = [framed(b"one"), framed(b""), framed(b"three")].concat();
        assert_eq!(records(&whole), [&b"one"[..], b"", b"three"]);
        for cut in 36..whole.len() {
            assert_eq!(records(&whole[..cut]).len(), 2, "{cut}");
        }
        for place in 19..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 0x10;
            let expected = if place < 35 { 1 } else { 2 };
            assert_eq!(records(&damaged).len(), expected, "{place}");
        }
    }
}
