//! Chat templates in Jinja, as tokenizers carry them: a rendered conversation as segments.
//!
//! Special tokens are recognised in what the template writes and nowhere else. What is learnt is what stands in the
//! template's `{% generation %}` blocks; a template without any has the assistant's texts learnt, each with the
//! special token that follows it and the white space between them.

use super::environment::{Message, Renderer};
use super::folder::{TokenizerConfig, chat_template, error};
use super::marks::{Piece, Place, Speaker, has_marks, marked, pieces, without_marks};
use super::segments::{ImageIds, Segment};
use super::vocabulary::{Special, Vocabulary};
use crate::annotation::{IMAGE_MARK, Role, Turn};
use crate::error::{BadSample, Error, Result};
use crate::spec::TextSpec;

/// A template and the tokens that it may write.
#[derive(Debug)]
pub(super) struct Jinja {
    pub(super) source: String,
    pub(super) renderer: Renderer,
    specials: Vec<Special>,
    image: ImageIds,
    /// For conversations that begin without one.
    system: Option<Turn>,
    /// What ends an answer, then the tokenizer's own end token where that is another.
    pub(super) stop_ids: Vec<i64>,
    /// The special tokens that it wrote in a conversation of four turns.
    pub(super) written: Vec<i64>,
}

impl Jinja {
    /// Finds and tries the template of this tokenizer.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] when there is none, it cannot be compiled, or it does not write a simple conversation
    /// whose answers end with a special token.
    pub(super) fn load(
        tokenizer_json: &std::path::Path,
        spec: &TextSpec,
        vocabulary: &mut Vocabulary,
        image: ImageIds,
    ) -> Result<Self> {
        let config = TokenizerConfig::beside(tokenizer_json)?;
        let (path, source) = chat_template(tokenizer_json, spec.template_file.as_deref())?;
        if has_marks(&source) {
            return Err(error(&path, "it has a character between U+FDD0 and U+FDD5"));
        }
        if spec.system.as_deref() == Some("") {
            let (field, found) = ("text.system".to_owned(), "\"\"".to_owned());
            let expected =
                "a system prompt or none with a Jinja template, which itself says what is written without";
            return Err(Error::InvalidSpec { field, found, expected });
        }
        vocabulary.make_special(config.special_tokens())?;
        let renderer = Renderer::new(&source, config.bos_token(), config.eos_token());
        let system = spec.system.clone().map(|text| Turn { role: Role::System, text });
        let mut jinja = Self {
            source,
            renderer: renderer.map_err(|detail| error(&path, detail))?,
            specials: vocabulary.specials(),
            image,
            system,
            stop_ids: Vec::new(),
            written: Vec::new(),
        };
        let segments = jinja.probe().map_err(|cause| error(&path, cause.to_string()))?;
        let Some(end) = end_of_answer(&segments) else {
            let detail = "no special token of the tokenizer follows an answer, so an answer would not end";
            return Err(error(&path, detail));
        };
        jinja.written = segments.iter().filter_map(Segment::token).collect();
        jinja.written.sort_unstable();
        jinja.written.dedup();
        let eos = config.eos_token().and_then(|token| vocabulary.id(token)).filter(|&eos| eos != end);
        jinja.stop_ids = [end].into_iter().chain(eos).collect();
        Ok(jinja)
    }

    /// A conversation of four turns, and a prompt, which every template should know how to write; some insist on a
    /// system prompt.
    fn probe(&self) -> std::result::Result<Vec<Segment<'static>>, BadSample> {
        let turn = |role, text: &str| Turn { role, text: text.to_owned() };
        let turns = [
            turn(Role::System, "a"),
            turn(Role::User, "b"),
            turn(Role::Assistant, "c"),
            turn(Role::User, "d"),
            turn(Role::Assistant, "e"),
        ];
        self.segments(&turns[1..2], true).or_else(|_| self.segments(&turns[..2], true))?;
        self.segments(&turns[1..], false).or_else(|_| self.segments(&turns, false))
    }

    /// The whole conversation; with `ask`, also the header of an answer to come.
    ///
    /// # Errors
    /// [`BadSample::Template`] when the template refuses the turns, [`BadSample::Text`] when it changes their text.
    pub(super) fn segments(
        &self,
        turns: &[Turn],
        ask: bool,
    ) -> std::result::Result<Vec<Segment<'static>>, BadSample> {
        let own = turns.first().is_some_and(|turn| turn.role == Role::System);
        let turns: Vec<&Turn> = self.system.iter().filter(|_| !own).chain(turns).collect();
        if turns.iter().any(|turn| has_marks(&turn.text)) {
            return Err(bad_text("it has a character between U+FDD0 and U+FDD5"));
        }
        let render = |text: &dyn Fn(&Turn) -> String| {
            let message = |turn: &&Turn| Message { role: turn.role.name(), content: text(turn) };
            let messages: Vec<Message> = turns.iter().map(message).collect();
            self.renderer.render(&messages, ask)
        };
        let plain = render(&|turn| turn.text.clone()).map_err(|detail| BadSample::Template { detail })?;
        for place in [Place::Outside, Place::InsideSpace] {
            let Ok(text) = render(&|turn| marked(turn, place)) else { continue };
            if without_marks(&text) == plain
                && let Some(pieces) = pieces(&text)
            {
                return Writer::new(&self.specials, self.image, self.renderer.has_generation).write(&pieces);
            }
        }
        Err(bad_text("the chat template rewrites message texts"))
    }
}

fn bad_text(detail: &str) -> BadSample {
    BadSample::Text { detail: detail.to_owned() }
}

/// The token that ends the last answer: its last, or the one after it.
fn end_of_answer(segments: &[Segment<'_>]) -> Option<i64> {
    let end = segments.iter().rposition(|segment| *segment == Segment::AnswerEnd)?;
    let last = segments[..end].last().and_then(Segment::token);
    last.or_else(|| segments[end..].iter().find_map(Segment::token))
}

/// Turns pieces into segments.
struct Writer<'a> {
    specials: &'a [Special],
    image: ImageIds,
    /// Whether generation blocks say what is learnt.
    by_blocks: bool,
    out: Vec<Segment<'static>>,
    /// Where the answer whose end token has not come yet ends without one.
    answer_end: Option<usize>,
    /// Where the open generation block begins, and whether it has an answer.
    block: Option<(usize, bool)>,
    /// The last token takes the white space after it.
    trims: bool,
}

impl<'a> Writer<'a> {
    fn new(specials: &'a [Special], image: ImageIds, by_blocks: bool) -> Self {
        Self { specials, image, by_blocks, out: Vec::new(), answer_end: None, block: None, trims: false }
    }

    fn write(mut self, pieces: &[Piece<'_>]) -> std::result::Result<Vec<Segment<'static>>, BadSample> {
        for piece in pieces {
            match *piece {
                Piece::Frame(text) => self.frame(text)?,
                Piece::Message(speaker, text) => self.message(speaker, text),
                Piece::GenerationStart => self.block = Some((self.out.len(), false)),
                Piece::GenerationEnd => {
                    if let Some((start, true)) = self.block.take() {
                        self.out.insert(start, Segment::AnswerStart);
                        self.out.push(Segment::AnswerEnd);
                    }
                }
            }
        }
        self.close_answer();
        Ok(self.out)
    }

    fn message(&mut self, speaker: Speaker, text: &str) {
        self.close_answer();
        match speaker {
            Speaker::Other => self.text(text),
            Speaker::User => {
                for (index, piece) in text.split(IMAGE_MARK).enumerate() {
                    if index > 0 {
                        self.trims = false;
                        self.out.push(Segment::Image);
                    }
                    self.text(piece);
                }
            }
            Speaker::Answer if self.by_blocks => {
                if let Some((_, has_answer)) = &mut self.block {
                    *has_answer = true;
                }
                self.text(text);
            }
            Speaker::Answer => {
                self.out.push(Segment::AnswerStart);
                self.text(text);
                self.answer_end = Some(self.out.len());
            }
        }
    }

    /// Text of the template, in which special tokens are recognised.
    fn frame(&mut self, mut text: &str) -> std::result::Result<(), BadSample> {
        let specials = self.specials;
        while let Some((at, special)) = first_special(text, specials) {
            let ImageIds { start, context, end } = self.image;
            if [start, context, end].contains(&special.id) {
                return Err(BadSample::Template { detail: format!("it writes `{}` itself", special.text) });
            }
            self.frame_text(&text[..at]);
            if special.lstrip {
                self.trim_back();
            }
            self.out.push(Segment::Token(special.id));
            self.trims = special.rstrip;
            if self.answer_end.take().is_some() {
                self.out.push(Segment::AnswerEnd);
            }
            text = &text[at + special.text.len()..];
        }
        self.frame_text(text);
        Ok(())
    }

    fn frame_text(&mut self, text: &str) {
        if !text.trim().is_empty() {
            self.close_answer();
        }
        self.text(text);
    }

    fn text(&mut self, text: &str) {
        let text = if self.trims { text.trim_start() } else { text };
        if !text.is_empty() {
            self.trims = false;
            self.out.push(Segment::Text(text.to_owned().into()));
        }
    }

    /// Takes white space off the end of what is written.
    fn trim_back(&mut self) {
        for segment in self.out.iter_mut().rev() {
            let Segment::Text(text) = segment else { break };
            let end = text.trim_end().len();
            text.to_mut().truncate(end);
            if end > 0 {
                break;
            }
        }
    }

    /// No token ends the open answer: it ends with its text.
    fn close_answer(&mut self) {
        if let Some(end) = self.answer_end.take() {
            self.out.insert(end, Segment::AnswerEnd);
        }
    }
}

/// The first special token in a text, of those at one place the longest.
fn first_special<'a>(text: &str, specials: &'a [Special]) -> Option<(usize, &'a Special)> {
    text.char_indices().find_map(|(at, _)| {
        let here = |special: &&Special| text[at..].starts_with(&special.text);
        specials.iter().find(here).map(|special| (at, special))
    })
}
