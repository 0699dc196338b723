//! Turns to token ids and labels.
//!
//! A template, built in ([`chatml`]) or of the tokenizer's folder ([`jinja`]), writes a conversation as segments;
//! [`segments`] lays them down as ids and labels. Structure (a template's special tokens, the image tokens) is
//! written by id, and no text of a sample can produce it.

mod chatml;
mod environment;
mod folder;
mod jinja;
mod marks;
mod segments;
mod vocabulary;

use std::path::Path;

use self::chatml::{ChatMl, TURN_END, TURN_START};
use self::jinja::Jinja;
use self::segments::{ImageIds, Laid, Segment};
use self::vocabulary::Vocabulary;
use crate::annotation::{Role, Turn, place_marks};
use crate::error::{BadSample, Error, Result};
use crate::sample::Prompt;
use crate::spec::{LossWeight, Template, TextSpec};

/// A `tokenizer.json` with a chat template.
#[derive(Debug)]
pub struct TextEncoder {
    vocabulary: Vocabulary,
    template: Framing,
    loss_weight: LossWeight,
    image: ImageIds,
    structure: StructureTokens,
    stop_ids: Vec<i64>,
}

/// How turns become segments.
#[derive(Debug)]
enum Framing {
    ChatMl(ChatMl),
    Jinja(Box<Jinja>),
}

/// The tokens that only templates and images may write, with their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StructureTokens {
    /// Those of the template; of the built-in ones start and end of a turn.
    pub template: Vec<(String, i64)>,
    /// Start, visual token and end of an image.
    pub image: [(String, i64); 3],
}

impl StructureTokens {
    /// All of them, those of the template first.
    pub fn iter(&self) -> impl Iterator<Item = &(String, i64)> {
        self.template.iter().chain(&self.image)
    }
}

/// A chat template of the tokenizer's folder, for whoever writes such a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JinjaTemplate<'a> {
    /// The template as it was found.
    pub source: &'a str,
    /// What it knows as `bos_token`.
    pub bos_token: Option<&'a str>,
    /// What it knows as `eos_token`.
    pub eos_token: Option<&'a str>,
}

/// The tokens of one sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    /// Token ids `[t]`.
    pub ids: Vec<i64>,
    /// The id to predict from each position `[t]`, [`IGNORE`](crate::IGNORE) where nothing is learnt.
    pub targets: Vec<i64>,
    /// Loss weight of each position `[t]`.
    pub weights: Vec<f32>,
    /// Positions in `ids` that stand for visual tokens, in tile order.
    pub image_rows: Vec<i64>,
    /// How many images these tokens have: the first ones, where the text was cut.
    pub images: usize,
}

impl TextEncoder {
    /// Loads a `tokenizer.json`. Truncation and padding set in the file are switched off.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the file cannot be used, [`Error::MissingToken`] when it lacks a token that
    /// the template or the images need, [`Error::ChatTemplate`] when it has no Jinja template that can be used.
    pub fn new(tokenizer_json: &Path, spec: &TextSpec) -> Result<Self> {
        let mut vocabulary = Vocabulary::load(tokenizer_json)?;
        let tokens = &spec.image_tokens;
        let [start, context, end] = vocabulary.reserve([
            (&tokens.start, "the start of an image"),
            (&tokens.context, "a visual token"),
            (&tokens.end, "the end of an image"),
        ])?;
        let image = ImageIds { start, context, end };
        let (template, written, stop_ids) = if spec.template == Template::Jinja {
            let jinja = Jinja::load(tokenizer_json, spec, &mut vocabulary, image)?;
            let (written, stop_ids) = (jinja.written.clone(), jinja.stop_ids.clone());
            vocabulary.reserve_ids(written.iter().chain(&stop_ids).copied());
            (Framing::Jinja(Box::new(jinja)), written, stop_ids)
        } else {
            let tokens = [(TURN_START, "the start of a turn"), (TURN_END, "the end of a turn")];
            let turns = vocabulary.reserve(tokens)?;
            (Framing::ChatMl(ChatMl::new(spec, turns)), turns.to_vec(), vec![turns[1]])
        };
        let named = |id| (vocabulary.token(id), id);
        let structure = StructureTokens {
            template: written.into_iter().map(named).collect(),
            image: [start, context, end].map(named),
        };
        Ok(Self { vocabulary, template, loss_weight: spec.loss_weight, image, structure, stop_ids })
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// [`Error::Unusable`] when an id is negative or the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let unusable = |detail: String| Error::Unusable {
            what: format!("token ids {ids:?}"),
            cause: BadSample::Text { detail },
        };
        let ids: Vec<u32> = ids
            .iter()
            .map(|&id| u32::try_from(id).map_err(|_| unusable(format!("{id} is not a token id"))))
            .collect::<Result<_>>()?;
        self.vocabulary.tokenizer().decode(&ids, true).map_err(|e| unusable(e.to_string()))
    }

    /// The name of a token in the vocabulary, where bytes of text have stand-ins; `None` for an unknown id.
    pub(crate) fn token_name(&self, id: i64) -> Option<String> {
        self.vocabulary.tokenizer().id_to_token(u32::try_from(id).ok()?)
    }

    /// The id that ends an answer, such as that of `<|im_end|>`.
    pub fn end_of_turn(&self) -> i64 {
        self.stop_ids[0]
    }

    /// The ids at which generation stops: [`TextEncoder::end_of_turn`] and, where the template belongs to the
    /// tokenizer, the tokenizer's own end token.
    pub fn stop_ids(&self) -> &[i64] {
        &self.stop_ids
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.tokenizer().get_vocab_size(true)
    }

    /// The tokens that no text of a sample can produce.
    pub fn structure_tokens(&self) -> &StructureTokens {
        &self.structure
    }

    /// The template in Jinja; `None` for a built-in one.
    pub fn jinja(&self) -> Option<JinjaTemplate<'_>> {
        match &self.template {
            Framing::ChatMl(_) => None,
            Framing::Jinja(jinja) => Some(JinjaTemplate {
                source: &jinja.source,
                bos_token: jinja.renderer.bos_token.as_deref(),
                eos_token: jinja.renderer.eos_token.as_deref(),
            }),
        }
    }

    /// The id that stands for a visual token.
    pub fn image_context_id(&self) -> i64 {
        self.image.context
    }

    /// Ids and labels of a conversation whose images have this many visual tokens each.
    ///
    /// Learnt are the answers that have any text, each with the token that ends it. The marks in the user's turns
    /// must be as many as the images.
    ///
    /// # Errors
    /// [`BadSample::ImageCount`], [`BadSample::NoAnswer`], [`BadSample::Text`] and [`BadSample::Template`].
    pub fn encode(&self, turns: &[Turn], visual_tokens: &[usize]) -> std::result::Result<Encoded, BadSample> {
        self.lay(turns, visual_tokens, false)?.label(self.loss_weight).ok_or(BadSample::NoAnswer)
    }

    /// As [`TextEncoder::encode`], but cut to at most `limit` tokens.
    ///
    /// The sample ends at `limit`, or before the image that this would split; images that follow are gone with
    /// their places ([`Encoded::images`] says how many are left). An answer that is cut is learnt up to the cut
    /// and gets no end token. Loss weights are those of the answer tokens that are left.
    ///
    /// # Errors
    /// Those of [`TextEncoder::encode`], and [`BadSample::TooLong`] when nothing is left to learn.
    pub fn encode_within(
        &self,
        turns: &[Turn],
        visual_tokens: &[usize],
        limit: usize,
    ) -> std::result::Result<Encoded, BadSample> {
        let mut laid = self.lay(turns, visual_tokens, false)?;
        let tokens = laid.ids.len();
        if tokens <= limit {
            return laid.label(self.loss_weight).ok_or(BadSample::NoAnswer);
        }
        laid.cut(limit);
        laid.label(self.loss_weight).ok_or(BadSample::TooLong { tokens, limit })
    }

    /// The prompt for one question about images, ending with the assistant's header.
    ///
    /// A question without `<image>` gets one mark per image at its head.
    ///
    /// # Errors
    /// [`Error::Unusable`] when the marks in the question are not as many as the images.
    pub fn prompt(&self, question: &str, visual_tokens: &[usize]) -> Result<Prompt> {
        let build = || {
            let mut turns = [Turn { role: Role::User, text: question.to_owned() }];
            place_marks(&mut turns, visual_tokens.len())?;
            let laid = self.lay(&turns, visual_tokens, true)?;
            Ok(Prompt { image_rows: laid.image_rows(), ids: laid.ids })
        };
        build().map_err(|cause| Error::Unusable { what: question.to_owned(), cause })
    }

    /// With `ask`, the conversation ends with the header of an answer to come.
    fn lay(
        &self,
        turns: &[Turn],
        visual_tokens: &[usize],
        ask: bool,
    ) -> std::result::Result<Laid, BadSample> {
        let segments: Vec<Segment<'_>> = match &self.template {
            Framing::ChatMl(template) => template.segments(turns, ask),
            Framing::Jinja(template) => template.segments(turns, ask)?,
        };
        Laid::lay(&segments, visual_tokens, self.image, &self.vocabulary)
    }
}
