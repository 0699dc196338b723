//! Turns to token ids and labels.
//!
//! Every message is tokenised on its own and labels are laid down while it is appended; nothing is ever
//! tokenised again and counted. Structure (`<|im_start|>`, `<|im_end|>`, the image tokens) is written by id,
//! and no text of a sample can produce it.

use std::path::{Path, PathBuf};

use tokenizers::{AddedToken, Tokenizer};

use crate::annotation::{IMAGE_MARK, Role, Turn, place_marks};
use crate::error::{BadSample, Error, Result};
use crate::sample::{IGNORE, Prompt};
use crate::spec::{LossWeight, Template, TextSpec};

const TURN_START: &str = "<|im_start|>";
const TURN_END: &str = "<|im_end|>";

/// A `tokenizer.json` with a chat template.
#[derive(Debug)]
pub struct TextEncoder {
    tokenizer: Tokenizer,
    template: Template,
    system: Option<String>,
    loss_weight: LossWeight,
    structure: Structure,
    separator: Vec<i64>,
    assistant_header: Vec<i64>,
}

/// Ids of the tokens that only the template may write.
#[derive(Clone, Copy, Debug)]
struct Structure {
    turn_start: i64,
    turn_end: i64,
    image_start: i64,
    image_context: i64,
    image_end: i64,
}

/// The tokens of one sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    /// Token ids `[t]`.
    pub ids: Vec<i64>,
    /// The id to predict from each position `[t]`, [`IGNORE`] where nothing is learnt.
    pub targets: Vec<i64>,
    /// Loss weight of each position `[t]`.
    pub weights: Vec<f32>,
    /// Positions in `ids` that stand for visual tokens, in tile order.
    pub image_rows: Vec<i64>,
}

impl TextEncoder {
    /// Loads a `tokenizer.json`. Truncation and padding set in the file are switched off.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the file cannot be used, [`Error::MissingToken`] when it lacks a token that
    /// the template or the images need.
    pub fn new(tokenizer_json: &Path, spec: &TextSpec) -> Result<Self> {
        let path = tokenizer_json;
        let failed = |detail: tokenizers::Error| Error::Tokenizer {
            path: path.to_path_buf(),
            detail: detail.to_string(),
        };
        let mut tokenizer = Tokenizer::from_file(path).map_err(failed)?;
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        let structure = Structure::find(&tokenizer, path, spec)?;
        // A tokenizer may list a structure token as an ordinary added token; only special ones are ignored
        // in the text of samples.
        let names = structure_names(spec);
        tokenizer.add_special_tokens(names.map(|(name, _)| AddedToken::from(name, true))).map_err(failed)?;
        tokenizer.set_encode_special_tokens(true);
        if Structure::find(&tokenizer, path, spec)?.ids() != structure.ids() {
            let detail = "its added tokens contradict its vocabulary".to_owned();
            return Err(Error::Tokenizer { path: path.to_path_buf(), detail });
        }
        let mut encoder = Self {
            tokenizer,
            template: spec.template,
            system: spec.system.clone(),
            loss_weight: spec.loss_weight,
            structure,
            separator: Vec::new(),
            assistant_header: Vec::new(),
        };
        let unusable =
            |cause: BadSample| Error::Tokenizer { path: path.to_path_buf(), detail: cause.to_string() };
        encoder.separator = encoder.plain(spec.template.separator()).map_err(unusable)?;
        encoder.assistant_header = encoder.plain("assistant\n").map_err(unusable)?;
        Ok(encoder)
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
        self.tokenizer.decode(&ids, true).map_err(|e| unusable(e.to_string()))
    }

    /// The name of a token in the vocabulary, where bytes of text have stand-ins; `None` for an unknown id.
    pub(crate) fn token_name(&self, id: i64) -> Option<String> {
        self.tokenizer.id_to_token(u32::try_from(id).ok()?)
    }

    /// The id of `<|im_end|>`, at which generation stops.
    pub fn end_of_turn(&self) -> i64 {
        self.structure.turn_end
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The tokens that only the template may write, with their ids: start and end of a turn, then start,
    /// visual token and end of an image. `spec` is the one that the encoder was made with.
    pub fn structure_tokens(&self, spec: &TextSpec) -> [(String, i64); 5] {
        let (names, ids) = (structure_names(spec), self.structure.ids());
        std::array::from_fn(|i| (names[i].0.clone(), ids[i]))
    }

    /// The id that stands for a visual token.
    pub fn image_context_id(&self) -> i64 {
        self.structure.image_context
    }

    /// Tokens and labels of a conversation.
    ///
    /// `visual_tokens` gives those of each image, in the order of the `<image>` marks.
    /// Labels: the text of every answer and the `<|im_end|>` that ends it, nothing else.
    ///
    /// # Errors
    /// [`BadSample::ImageCount`] when marks and images differ, [`BadSample::Text`] when text cannot be
    /// tokenised, [`BadSample::NoAnswer`] when nothing would be learnt.
    pub fn encode(&self, turns: &[Turn], visual_tokens: &[usize]) -> std::result::Result<Encoded, BadSample> {
        let mut out = Encoded::default();
        let mut answers = Vec::new();
        let mut blocks = visual_tokens.iter().copied();
        if turns.first().is_none_or(|turn| turn.role != Role::System) {
            self.append_default_system(&mut out)?;
        }
        for turn in turns {
            match turn.role {
                Role::System => self.append_message(&mut out, Role::System, &turn.text)?,
                Role::User => self.append_user(&mut out, &turn.text, &mut blocks)?,
                Role::Assistant => {
                    out.ids.push(self.structure.turn_start);
                    out.ids.extend(&self.assistant_header);
                    let start = out.ids.len();
                    out.ids.extend(self.plain(&turn.text)?);
                    out.ids.push(self.structure.turn_end);
                    if turn.is_answer() {
                        answers.push(start..out.ids.len());
                    }
                    out.ids.extend(&self.separator);
                }
            }
        }
        let unused = blocks.count();
        if unused > 0 {
            let images = visual_tokens.len();
            return Err(BadSample::ImageCount { marks: images - unused, images });
        }
        let answer_tokens = answers.iter().map(ExactSizeIterator::len).sum();
        if answer_tokens == 0 {
            return Err(BadSample::NoAnswer);
        }
        let weight = self.loss_weight.per_token(answer_tokens);
        out.targets = vec![IGNORE; out.ids.len()];
        out.weights = vec![0.0; out.ids.len()];
        for position in answers.into_iter().flatten() {
            // The header stands before every answer, so there is always a position before.
            out.targets[position - 1] = out.ids[position];
            out.weights[position - 1] = weight;
        }
        Ok(out)
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
            let mut out = Encoded::default();
            self.append_default_system(&mut out)?;
            let mut blocks = visual_tokens.iter().copied();
            self.append_user(&mut out, &turns[0].text, &mut blocks)?;
            out.ids.push(self.structure.turn_start);
            out.ids.extend(&self.assistant_header);
            Ok(Prompt { ids: out.ids, image_rows: out.image_rows })
        };
        build().map_err(|cause| Error::Unusable { what: question.to_owned(), cause })
    }

    fn append_default_system(&self, out: &mut Encoded) -> std::result::Result<(), BadSample> {
        match self.system.as_deref().or(self.template.default_system()) {
            Some(system) if !system.is_empty() => self.append_message(out, Role::System, system),
            _ => Ok(()),
        }
    }

    fn append_message(
        &self,
        out: &mut Encoded,
        role: Role,
        text: &str,
    ) -> std::result::Result<(), BadSample> {
        out.ids.push(self.structure.turn_start);
        out.ids.extend(self.plain(&format!("{}\n{text}", role.name()))?);
        out.ids.push(self.structure.turn_end);
        out.ids.extend(&self.separator);
        Ok(())
    }

    /// A user's turn; each mark takes the next block of visual tokens.
    fn append_user(
        &self,
        out: &mut Encoded,
        text: &str,
        blocks: &mut impl Iterator<Item = usize>,
    ) -> std::result::Result<(), BadSample> {
        out.ids.push(self.structure.turn_start);
        let text = format!("user\n{text}");
        for (index, piece) in text.split(IMAGE_MARK).enumerate() {
            if index > 0 {
                let tokens = blocks.next().ok_or(BadSample::ImageCount {
                    marks: text.matches(IMAGE_MARK).count(),
                    images: index - 1,
                })?;
                out.ids.push(self.structure.image_start);
                let first = out.ids.len() as i64;
                out.image_rows.extend(first..first + tokens as i64);
                out.ids.extend(std::iter::repeat_n(self.structure.image_context, tokens));
                out.ids.push(self.structure.image_end);
            }
            out.ids.extend(self.plain(piece)?);
        }
        out.ids.push(self.structure.turn_end);
        out.ids.extend(&self.separator);
        Ok(())
    }

    /// Ids of plain text, in which no special token is recognised.
    fn plain(&self, text: &str) -> std::result::Result<Vec<i64>, BadSample> {
        let encoding =
            self.tokenizer.encode_fast(text, false).map_err(|e| BadSample::Text { detail: e.to_string() })?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        let structure = self.structure.ids();
        // A model (not only the added tokens) may know such a token as an ordinary word.
        if let Some(id) = ids.iter().find(|id| structure.contains(id)) {
            return Err(BadSample::Text { detail: format!("it contains the structure token {id}") });
        }
        Ok(ids)
    }
}

/// Every structure token, in the order of [`Structure::ids`], and what it is needed for.
fn structure_names(spec: &TextSpec) -> [(String, &'static str); 5] {
    [
        (TURN_START.to_owned(), "the start of a turn"),
        (TURN_END.to_owned(), "the end of a turn"),
        (spec.image_tokens.start.clone(), "the start of an image"),
        (spec.image_tokens.context.clone(), "a visual token"),
        (spec.image_tokens.end.clone(), "the end of an image"),
    ]
}

impl Structure {
    fn find(tokenizer: &Tokenizer, path: &Path, spec: &TextSpec) -> Result<Self> {
        let id = |(token, purpose): (String, &'static str)| match tokenizer.token_to_id(&token) {
            Some(id) => Ok(i64::from(id)),
            None => Err(Error::MissingToken { path: PathBuf::from(path), token, purpose }),
        };
        let [turn_start, turn_end, image_start, image_context, image_end] = structure_names(spec);
        Ok(Self {
            turn_start: id(turn_start)?,
            turn_end: id(turn_end)?,
            image_start: id(image_start)?,
            image_context: id(image_context)?,
            image_end: id(image_end)?,
        })
    }

    fn ids(self) -> [i64; 5] {
        [self.turn_start, self.turn_end, self.image_start, self.image_context, self.image_end]
    }
}
