//! Random changes of bytes, for `fuzz`.

use proptest::prelude::*;
use proptest::sample::Index;

/// No change makes more of it.
const MOST_BYTES: usize = 1 << 20;

/// One change at one place.
#[derive(Clone, Debug)]
pub(super) enum Edit {
    Set(u8),
    Flip(u8),
    Insert(Vec<u8>),
    Token(Index),
    Remove(usize),
    /// Some bytes from elsewhere, in this place.
    Copy(Index, usize),
    Repeat(usize, usize),
    Cut,
}

pub(super) type Edits = Vec<(Index, Edit)>;

/// A few changes anywhere.
pub(super) fn edits() -> impl Strategy<Value = Edits> {
    let edit = prop_oneof![
        4 => any::<u8>().prop_map(Edit::Set),
        4 => (0..8_u8).prop_map(|bit| Edit::Flip(1 << bit)),
        2 => prop::collection::vec(any::<u8>(), 1..8).prop_map(Edit::Insert),
        6 => any::<Index>().prop_map(Edit::Token),
        2 => (1..600_usize).prop_map(Edit::Remove),
        2 => (any::<Index>(), 1..600_usize).prop_map(|(from, n)| Edit::Copy(from, n)),
        1 => (1..40_usize, 2..2000_usize).prop_map(|(n, times)| Edit::Repeat(n, times)),
        1 => Just(Edit::Cut),
    ];
    prop::collection::vec((any::<Index>(), edit), 1..8)
}

/// The bytes with these changes, some of them pieces that mean something in the format.
pub(super) fn apply(base: &[u8], edits: &Edits, tokens: &[&[u8]]) -> Vec<u8> {
    let mut bytes = base.to_vec();
    for (at, edit) in edits {
        if bytes.is_empty() || bytes.len() > MOST_BYTES {
            break;
        }
        let at = at.index(bytes.len());
        let here = |n: usize| at..(at + n).min(bytes.len());
        match edit {
            Edit::Set(byte) => bytes[at] = *byte,
            Edit::Flip(bit) => bytes[at] ^= bit,
            Edit::Insert(piece) => drop(bytes.splice(at..at, piece.iter().copied())),
            Edit::Token(which) => {
                let token = tokens[which.index(tokens.len())];
                let range = here(token.len());
                bytes.splice(range, token.iter().copied());
            }
            Edit::Remove(n) => drop(bytes.drain(here(*n))),
            Edit::Copy(from, n) => {
                let from = from.index(bytes.len());
                let piece = bytes[from..(from + n).min(bytes.len())].to_vec();
                let range = here(piece.len());
                bytes.splice(range, piece);
            }
            Edit::Repeat(n, times) => {
                let piece = bytes[here(*n)].repeat(*times);
                bytes.splice(at..at, piece);
            }
            Edit::Cut => bytes.truncate(at),
        }
    }
    bytes
}
