//! Segments: what every template writes a conversation as, and how they become ids and labels.
//!
//! Labels are laid down here and nowhere else, while the ids are; nothing is tokenised again and counted. Text
//! between tokens, images and the ends of answers is tokenised as one string, so the ids are those of the whole
//! conversation written out and tokenised at once, but where an answer's first characters would share a token
//! with the header before it.

use std::borrow::Cow;
use std::ops::Range;

use super::Encoded;
use super::vocabulary::Vocabulary;
use crate::error::BadSample;
use crate::sample::IGNORE;
use crate::spec::LossWeight;

/// A piece of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Segment<'a> {
    /// A token of the template.
    Token(i64),
    /// Text, in which no special token is recognised.
    Text(Cow<'a, str>),
    /// The place of the next image.
    Image,
    /// What follows is learnt.
    AnswerStart,
    /// What follows is not.
    AnswerEnd,
}

impl Segment<'_> {
    /// The id, for a token.
    pub(super) fn token(&self) -> Option<i64> {
        match self {
            Self::Token(id) => Some(*id),
            _ => None,
        }
    }
}

/// Ids of the tokens that stand for an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct ImageIds {
    pub(super) start: i64,
    pub(super) context: i64,
    pub(super) end: i64,
}

/// Ids with what is known of them; all ranges are of positions in `ids`, in order and apart from each other.
#[derive(Clone, Debug, Default)]
pub(super) struct Laid {
    pub(super) ids: Vec<i64>,
    /// What is learnt.
    answers: Vec<Range<usize>>,
    /// The images, with their start and end tokens.
    images: Vec<Range<usize>>,
}

impl Laid {
    /// Lays segments down; images have this many visual tokens each.
    ///
    /// # Errors
    /// [`BadSample::ImageCount`] when there are more or fewer places for images, [`BadSample::Text`] for text that
    /// cannot be tokenised.
    pub(super) fn lay(
        segments: &[Segment<'_>],
        visual_tokens: &[usize],
        image: ImageIds,
        vocabulary: &Vocabulary,
    ) -> Result<Self, BadSample> {
        let marks = segments.iter().filter(|&segment| *segment == Segment::Image).count();
        if marks != visual_tokens.len() {
            return Err(BadSample::ImageCount { marks, images: visual_tokens.len() });
        }
        let mut laid = Self::default();
        let mut text = Cow::Borrowed("");
        let mut answer = None;
        for segment in segments {
            if let Segment::Text(more) = segment {
                if text.is_empty() {
                    text = Cow::Borrowed(more.as_ref());
                } else {
                    text.to_mut().push_str(more);
                }
                continue;
            }
            laid.push_text(&std::mem::take(&mut text), vocabulary)?;
            match segment {
                Segment::Token(id) => laid.ids.push(*id),
                Segment::Image => laid.push_image(visual_tokens[laid.images.len()], image),
                Segment::AnswerStart => answer = Some(laid.ids.len()),
                Segment::AnswerEnd => {
                    laid.answers.extend(answer.take().map(|start| start..laid.ids.len()));
                }
                Segment::Text(_) => {}
            }
        }
        laid.push_text(&text, vocabulary)?;
        Ok(laid)
    }

    fn push_text(&mut self, text: &str, vocabulary: &Vocabulary) -> Result<(), BadSample> {
        if !text.is_empty() {
            self.ids.extend(vocabulary.plain(text)?);
        }
        Ok(())
    }

    fn push_image(&mut self, tokens: usize, image: ImageIds) {
        let start = self.ids.len();
        self.ids.push(image.start);
        self.ids.extend(std::iter::repeat_n(image.context, tokens));
        self.ids.push(image.end);
        self.images.push(start..self.ids.len());
    }

    /// Positions of the visual tokens, in the order of the images.
    pub(super) fn image_rows(&self) -> Vec<i64> {
        self.images.iter().flat_map(|image| image.start as i64 + 1..image.end as i64 - 1).collect()
    }

    /// Cuts the end off so that at most `limit` tokens are left, before an image that would not be whole.
    pub(super) fn cut(&mut self, limit: usize) {
        let split = |image: &&Range<usize>| image.start < limit && limit < image.end;
        let end = self.images.iter().find(split).map_or(limit, |image| image.start);
        self.ids.truncate(end);
        self.images.retain(|image| image.end <= end);
        self.answers.retain_mut(|answer| {
            answer.end = answer.end.min(end);
            answer.start < answer.end
        });
    }

    /// The sample with labels; `None` when nothing of it is learnt.
    pub(super) fn label(self, loss_weight: LossWeight) -> Option<Encoded> {
        // Nothing predicts the first token.
        let learnt = || self.answers.iter().cloned().flatten().filter(|&position| position > 0);
        let answer_tokens = learnt().count();
        if answer_tokens == 0 {
            return None;
        }
        let weight = loss_weight.per_token(answer_tokens);
        let mut targets = vec![IGNORE; self.ids.len()];
        let mut weights = vec![0.0; self.ids.len()];
        for position in learnt() {
            targets[position - 1] = self.ids[position];
            weights[position - 1] = weight;
        }
        let (image_rows, images) = (self.image_rows(), self.images.len());
        Some(Encoded { ids: self.ids, targets, weights, image_rows, images })
    }
}
