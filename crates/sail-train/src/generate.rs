//! Answers to questions about images, as they are generated: `sail-train generate`.

use std::path::PathBuf;

use sail_data::load_image;
use sail_model::generate::GenerateOptions;
use sail_model::vlm::{Prompt, Visual};

use crate::batch::to_images;
use crate::error::{Error, Result};
use crate::trained::Trained;

/// A question and how it is to be answered.
#[derive(Debug)]
pub struct Question<'a> {
    /// The images, in the order of the `<image>` marks; a question without marks gets them in front.
    pub images: &'a [PathBuf],
    /// What is asked.
    pub prompt: &'a str,
    /// Length and sampling. The end of the turn ends every answer.
    pub options: GenerateOptions,
    /// Texts that end the answer; they are not part of it.
    pub stop: &'a [String],
}

/// An answer.
#[derive(Debug, serde::Serialize)]
pub struct Answer {
    /// The generated token ids, the one that ended the answer included.
    pub ids: Vec<i64>,
    /// Their text up to the first stop string.
    pub text: String,
}

/// Answers a question. `show` gets the text piece by piece while it is generated.
///
/// # Errors
/// When an image cannot be read, marks and images differ in number, or the options make no sense.
pub fn answer(trained: &Trained, question: &Question, show: &mut dyn FnMut(&str)) -> Result<Answer> {
    if question.stop.iter().any(String::is_empty) {
        return Err(Error::usage("`--stop` is empty", "give the text that ends the answer, or leave it out"));
    }
    let mut images = Vec::with_capacity(question.images.len());
    for image in question.images {
        images.push(load_image(image, &trained.image)?);
    }
    let visual_tokens: Vec<usize> = images.iter().map(|images| trained.image.visual_tokens(images)).collect();
    let prompt = trained.encoder.prompt(question.prompt, &visual_tokens)?;
    let prompt = Prompt {
        ids: prompt.ids,
        images: Visual::Pixels(to_images(&images, trained.device)?),
        image_rows: prompt.image_rows,
    };
    let mut options = question.options.clone();
    options.stop_ids.extend(trained.encoder.stop_ids());

    let (mut ids, mut shown) = (Vec::new(), String::new());
    let mut failed = None;
    let mut on_token = |_: usize, id: i64| {
        ids.push(id);
        match trained.encoder.decode(&ids) {
            Ok(text) => {
                let (visible, ended) = visible(&text, question.stop);
                if let Some(new) = visible.strip_prefix(shown.as_str()).filter(|new| !new.is_empty()) {
                    show(new);
                    visible.clone_into(&mut shown);
                }
                !ended
            }
            Err(error) => {
                failed = Some(error);
                false
            }
        }
    };
    let answers = trained.model.generate(&[prompt], &options, &mut on_token)?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let ids = answers.into_iter().next().unwrap_or_default();
    let text = trained.encoder.decode(&ids)?;
    let end = question.stop.iter().filter_map(|stop| text.find(stop.as_str())).min().unwrap_or(text.len());
    if let Some(rest) = text[..end].strip_prefix(shown.as_str()).filter(|rest| !rest.is_empty()) {
        show(rest);
    }
    Ok(Answer { ids, text: text[..end].to_owned() })
}

/// What may be shown of a text that goes on: no half character, nothing that may be the beginning of a
/// stop string; and whether one is complete.
fn visible<'t>(text: &'t str, stop: &[String]) -> (&'t str, bool) {
    if let Some(end) = stop.iter().filter_map(|stop| text.find(stop.as_str())).min() {
        return (&text[..end], true);
    }
    let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
    let begins_a_stop = |start: &usize| stop.iter().any(|stop| stop.starts_with(&whole[*start..]));
    let starts = whole.char_indices().map(|(start, _)| start);
    (&whole[..starts.into_iter().find(begins_a_stop).unwrap_or(whole.len())], false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_is_shown() {
        let stop = ["END".to_owned(), "\n\n".to_owned()];
        let cases = [
            ("a cat", "a cat", false),
            ("a cat EN", "a cat ", false),
            ("a cat ENDS", "a cat ", true),
            ("a\n", "a", false),
            ("a\nb", "a\nb", false),
            ("a\n\nEND", "a", true),
            ("caf\u{fffd}", "caf", false),
            ("", "", false),
        ];
        for (text, expected, ended) in cases {
            assert_eq!(visible(text, &stop), (expected, ended), "{text:?}");
        }
        assert_eq!(visible("a END", &[]), ("a END", false));
    }
}
