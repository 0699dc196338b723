//! Marks in the text that a Jinja template writes: which of it are messages, and which is the template's.
//!
//! A template gives one string. So messages are put into it between characters that Unicode reserves for such use
//! inside programs (noncharacters, never in text that is exchanged), and are found again in what comes out. That the
//! marks change nothing is checked by rendering without them as well, see [`super::jinja`].

use crate::annotation::Role;
use crate::annotation::Turn;

const USER: char = '\u{fdd0}';
const ANSWER: char = '\u{fdd1}';
const OTHER: char = '\u{fdd2}';
const END: char = '\u{fdd3}';
pub(super) const GENERATION_START: char = '\u{fdd4}';
pub(super) const GENERATION_END: char = '\u{fdd5}';

/// Whose words a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaker {
    /// The user's, in which images stand.
    User,
    /// The assistant's, to be learnt.
    Answer,
    /// The system's, and answers that say nothing.
    Other,
}

/// A piece of a rendered conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// The template's own text.
    Frame(&'a str),
    /// A message.
    Message(Speaker, &'a str),
    /// A `{% generation %}` block begins.
    GenerationStart,
    /// It ends.
    GenerationEnd,
}

/// Where the marks of a message stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Around all of it.
    Outside,
    /// Inside its white space at both ends, which then belongs to the template and can be trimmed by it.
    InsideSpace,
}

/// Whether the text has a character that could be taken for a mark.
pub(super) fn has_marks(text: &str) -> bool {
    text.contains(|c| (USER..=GENERATION_END).contains(&c))
}

/// Without the marks of messages.
pub(super) fn without_marks(text: &str) -> String {
    text.replace(|c| (USER..=END).contains(&c), "")
}

/// The text of a turn between its marks.
pub(super) fn marked(turn: &Turn, place: Place) -> String {
    let mark = match turn.role {
        Role::User => USER,
        Role::Assistant if turn.is_answer() => ANSWER,
        Role::System | Role::Assistant => OTHER,
    };
    let text = turn.text.as_str();
    let core = match place {
        Place::Outside => text,
        Place::InsideSpace => text.trim(),
    };
    let before = match place {
        Place::Outside => 0,
        Place::InsideSpace => text.len() - text.trim_start().len(),
    };
    let (before, after) = (&text[..before], &text[before + core.len()..]);
    format!("{before}{mark}{core}{END}{after}")
}

/// Takes a rendered text apart; `None` when its marks are not in pairs.
pub(super) fn pieces(text: &str) -> Option<Vec<Piece<'_>>> {
    let mut out = Vec::new();
    let mut message = None;
    let mut inside_generation = false;
    let mut start = 0;
    for (at, mark) in text.char_indices().filter(|&(_, c)| (USER..=GENERATION_END).contains(&c)) {
        let piece = &text[start..at];
        start = at + mark.len_utf8();
        match message.take() {
            Some(speaker) if mark == END => out.push(Piece::Message(speaker, piece)),
            Some(_) => return None,
            None => out.push(Piece::Frame(piece)),
        }
        match mark {
            USER => message = Some(Speaker::User),
            ANSWER => message = Some(Speaker::Answer),
            OTHER => message = Some(Speaker::Other),
            GENERATION_START if !inside_generation => inside_generation = true,
            GENERATION_END if inside_generation => inside_generation = false,
            END if matches!(out.last(), Some(Piece::Message(..))) => {}
            _ => return None,
        }
        match mark {
            GENERATION_START => out.push(Piece::GenerationStart),
            GENERATION_END => out.push(Piece::GenerationEnd),
            _ => {}
        }
    }
    out.push(Piece::Frame(&text[start..]));
    (message.is_none() && !inside_generation).then_some(out)
}
