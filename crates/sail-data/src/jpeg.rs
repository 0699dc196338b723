//! Whether a JPEG file is complete.
//!
//! Decoders fill what is missing of a truncated JPEG with gray and say nothing, so the end marker has to be
//! looked for. The segments are walked, because a thumbnail inside the metadata has an end marker of its own.

const START_OF_SCAN: u8 = 0xda;
const END_OF_IMAGE: u8 = 0xd9;

/// Whether the end marker is reached from the beginning of `bytes`, which are those of a JPEG file.
pub(crate) fn is_complete(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(marker) = next_marker(bytes, &mut at) {
        match marker {
            END_OF_IMAGE => return true,
            // Restart markers and other markers without a length.
            0x01 | 0xd0..=0xd8 => {}
            _ => {
                let Some(length) = bytes.get(at..at + 2) else { return false };
                at += usize::from(u16::from_be_bytes([length[0], length[1]]));
                if marker == START_OF_SCAN && at >= bytes.len() {
                    return false;
                }
            }
        }
    }
    false
}

/// The next marker's code, with `at` moved behind it. Data between markers is passed over: in coded data an
/// 0xff is always followed by 0x00.
fn next_marker(bytes: &[u8], at: &mut usize) -> Option<u8> {
    loop {
        *at += bytes.get(*at..)?.iter().position(|&byte| byte == 0xff)? + 1;
        let code = *bytes.get(*at)?;
        // Any number of 0xff may stand before a marker.
        if code != 0x00 && code != 0xff {
            *at += 1;
            return Some(code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gradient, jpeg};

    #[test]
    fn every_truncation_is_noticed() {
        let bytes = jpeg(&gradient(40, 30));
        assert!(is_complete(&bytes));
        for length in 2..bytes.len() - 1 {
            assert!(!is_complete(&bytes[..length]), "{length} of {}", bytes.len());
        }
        assert!(is_complete(&[&bytes[..], b"trailing"].concat()));
    }

    #[test]
    fn the_end_marker_of_a_thumbnail_does_not_count() {
        let bytes = jpeg(&gradient(40, 30));
        let thumbnail = [0xff, 0xe1, 0x00, 0x06, 0xff, 0xd8, 0xff, 0xd9];
        let with_thumbnail = [&bytes[..2], &thumbnail, &bytes[2..]].concat();
        assert!(is_complete(&with_thumbnail));
        assert!(!is_complete(&with_thumbnail[..with_thumbnail.len() - 2]));
    }
}
