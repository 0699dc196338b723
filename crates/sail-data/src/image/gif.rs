//! How many pictures a GIF file has, by walking its blocks without decoding any.

/// The specification of GIF, version 89a: a screen descriptor, then blocks up to a trailer.
///
/// # Errors
/// Says what is wrong with the structure.
pub(super) fn frame_count(bytes: &[u8]) -> Result<usize, String> {
    walk_gif(bytes).ok_or_else(|| "the file is truncated: it has no trailer".into())
}

fn walk_gif(bytes: &[u8]) -> Option<usize> {
    let table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let mut at = 13 + table(*bytes.get(10)?);
    let mut frames = 0;
    loop {
        match *bytes.get(at)? {
            // An extension: its label, then sub-blocks.
            0x21 => at += 2,
            // A picture: place and size, its colour table, the code size, then sub-blocks.
            0x2c => {
                at += 11 + table(*bytes.get(at + 9)?);
                frames += 1;
            }
            0x3b => return Some(frames),
            // Zeros between blocks, which some writers leave.
            _ => {
                at += 1;
                continue;
            }
        }
        loop {
            let length = usize::from(*bytes.get(at)?);
            at += 1 + length;
            if length == 0 {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_counted_up_to_the_trailer() {
        let picture = [0x2c, 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 2, 0x4c, 1, 0];
        let extension = [0x21, 0xf9, 4, 0, 0, 0, 0, 0];
        let header = [&b"GIF89a"[..], &[1, 0, 1, 0, 0x80, 0, 0], &[0; 6]].concat();
        let gif = [&header[..], &extension, &picture, &[0], &extension, &picture, &[0x3b, 9, 9]].concat();
        assert_eq!(frame_count(&gif), Ok(2));
        for length in 0..gif.len() - 2 {
            assert!(frame_count(&gif[..length]).is_err(), "{length}");
        }
    }
}
