//! The built-in templates: `ChatML` and its relatives, which differ in the separator and the default system prompt.

use std::borrow::Cow;

use super::segments::Segment;
use crate::annotation::{IMAGE_MARK, Role, Turn};
use crate::spec::TextSpec;

pub(super) const TURN_START: &str = "<|im_start|>";
pub(super) const TURN_END: &str = "<|im_end|>";

/// `<|im_start|>role\n...<|im_end|>` and a separator.
#[derive(Debug)]
pub(super) struct ChatMl {
    pub(super) turn_start: i64,
    pub(super) turn_end: i64,
    separator: &'static str,
    /// For conversations that begin without one.
    system: Option<Turn>,
}

impl ChatMl {
    pub(super) fn new(spec: &TextSpec, [turn_start, turn_end]: [i64; 2]) -> Self {
        let system =
            spec.system.as_deref().or(spec.template.default_system()).filter(|text| !text.is_empty());
        let system = system.map(|text| Turn { role: Role::System, text: text.to_owned() });
        Self { turn_start, turn_end, separator: spec.template.separator(), system }
    }

    /// The whole conversation; with `ask`, also the header of an answer to come.
    pub(super) fn segments<'a>(&'a self, turns: &'a [Turn], ask: bool) -> Vec<Segment<'a>> {
        let mut out = Vec::new();
        let own = turns.first().is_some_and(|turn| turn.role == Role::System);
        for turn in self.system.iter().filter(|_| !own).chain(turns) {
            self.push(&mut out, turn);
        }
        if ask {
            self.push_header(&mut out, Role::Assistant);
        }
        out
    }

    fn push_header(&self, out: &mut Vec<Segment<'_>>, role: Role) {
        out.extend([Segment::Token(self.turn_start), Segment::Text(format!("{}\n", role.name()).into())]);
    }

    fn push<'a>(&self, out: &mut Vec<Segment<'a>>, turn: &'a Turn) {
        self.push_header(out, turn.role);
        let text = Segment::Text(Cow::Borrowed(turn.text.as_str()));
        let end = Segment::Token(self.turn_end);
        match turn.role {
            Role::User => {
                for (index, piece) in turn.text.split(IMAGE_MARK).enumerate() {
                    out.extend((index > 0).then_some(Segment::Image));
                    out.push(Segment::Text(Cow::Borrowed(piece)));
                }
                out.push(end);
            }
            Role::Assistant if turn.is_answer() => {
                out.extend([Segment::AnswerStart, text, end, Segment::AnswerEnd]);
            }
            Role::System | Role::Assistant => out.extend([text, end]),
        }
        out.push(Segment::Text(Cow::Borrowed(self.separator)));
    }
}
