//! The text side of an exported model: tokenizer, chat template, and the keys of config.json that say how
//! turns and images are written.

use std::path::Path;

use sail_data::{ImageTokens, LossWeight, Template, TextSpec};
use sail_model::weights::{Folder, read_json};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Mllm;
use crate::error::{Error, Result};

const CHAT_TEMPLATE: &str = include_str!("../../remote_code/chat_template.jinja");
/// What pads a batch, where the tokenizer has it.
const END_OF_TEXT: &str = "<|endoftext|>";

/// Keys of config.json: SAIL-VL's `template`, and what other models fix in their code.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TextKeys {
    #[serde(default = "chatml")]
    template: String,
    /// Empty: the template's own.
    #[serde(default)]
    system_message: String,
    #[serde(default = "image_start")]
    image_start_token: String,
    #[serde(default = "image_context")]
    image_context_token: String,
    #[serde(default = "image_end")]
    image_end_token: String,
}

fn chatml() -> String {
    "chatml".into()
}

fn image_start() -> String {
    "<img>".into()
}

fn image_context() -> String {
    "<IMG_CONTEXT>".into()
}

fn image_end() -> String {
    "</img>".into()
}

impl TextKeys {
    /// What a specification is written as.
    pub(super) fn of(text: &TextSpec) -> Self {
        let system_message = system_prompt(text);
        let template = match text.template {
            Template::Smollm if !system_message.is_empty() => "smollm",
            // Without a system prompt the two are the same.
            Template::Chatml | Template::Smollm => "chatml",
            Template::Sail => "univl-chat",
            Template::Jinja => "jinja",
        };
        let ImageTokens { start, context, end } = text.image_tokens.clone();
        Self {
            template: template.into(),
            system_message,
            image_start_token: start,
            image_context_token: context,
            image_end_token: end,
        }
    }

    /// As members of a JSON object.
    pub(super) fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("invariant: the keys are text")
    }

    /// The specification that is written in `file`.
    ///
    /// # Errors
    /// For a template that is not known.
    pub(super) fn spec(self, file: &Path) -> Result<TextSpec> {
        let template = match self.template.as_str() {
            "chatml" => Template::Chatml,
            "smollm" => Template::Smollm,
            "sail" | "univl-chat" => Template::Sail,
            other => {
                let known = "chatml, smollm, sail and univl-chat";
                let reason = format!("`template` {other} is not known; known are {known}");
                return Err(sail_model::Error::File { path: file.to_owned(), reason }.into());
            }
        };
        Ok(TextSpec {
            template,
            template_file: None,
            system: (!self.system_message.is_empty()).then_some(self.system_message),
            image_tokens: ImageTokens {
                start: self.image_start_token,
                context: self.image_context_token,
                end: self.image_end_token,
            },
            loss_weight: LossWeight::Token,
        })
    }
}

/// Adds `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`. The chat
/// template writes an image as `image_mark`.
///
/// # Errors
/// When the `tokenizer.json` cannot be read.
pub(super) fn add_files(folder: Folder, mllm: &Mllm, image_mark: &str) -> Result<Folder> {
    let mut tokenizer = read_json(mllm.tokenizer)?;
    let structure = mllm.encoder.structure_tokens();
    for (token, id) in structure.iter() {
        mark_special(&mut tokenizer, token, *id);
    }
    let [(start, _), (context, _), (end, _)] = &structure.image;
    let added = tokenizer["added_tokens"].as_array();
    let pad = added.and_then(|tokens| tokens.iter().find(|token| token["content"] == END_OF_TEXT));
    let pad_id = pad.and_then(|token| token["id"].as_i64()).unwrap_or(mllm.encoder.end_of_turn());
    let turn_end =
        structure.iter().find(|(_, id)| *id == mllm.encoder.end_of_turn()).map(|(token, _)| token.as_str());
    let jinja = mllm.encoder.jinja();
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": jinja.and_then(|template| template.eos_token).or(turn_end),
        "pad_token": if pad.is_some() { Some(END_OF_TEXT) } else { turn_end },
        "additional_special_tokens": structure.iter().map(|(token, _)| token).collect::<Vec<_>>(),
        // As `InternVLProcessor` asks for them; there are no videos.
        "extra_special_tokens": {
            "start_image_token": start, "context_image_token": context, "end_image_token": end,
            "video_token": context,
        },
        "model_max_length": mllm.config.llm.decoder().max_position_embeddings,
        "clean_up_tokenization_spaces": false,
    });
    if let Some(bos) = jinja.and_then(|template| template.bos_token) {
        config["bos_token"] = bos.into();
    }
    let generation = json!({
        "do_sample": false, "max_new_tokens": 512,
        "eos_token_id": mllm.encoder.stop_ids(), "pad_token_id": pad_id,
    });
    Ok(folder
        .json("tokenizer.json", &tokenizer)
        .json("tokenizer_config.json", &config)
        .json("generation_config.json", &generation)
        .file(
            "chat_template.jinja",
            match jinja {
                Some(template) => with_system(template.source, mllm.text.system.as_deref()),
                None => chat_template(mllm.text, image_mark),
            },
        ))
}

/// The tokenizer's own template, with this system prompt for conversations that begin without one.
fn with_system(template: &str, system: Option<&str>) -> String {
    let Some(system) = system else { return template.to_owned() };
    let system = json!([{"role": "system", "content": system}]);
    // Jinja takes one newline after the tag away, so the template begins as it did.
    format!(
        "{{%- if messages[0].role != 'system' -%}}{{%- set messages = {system} + messages -%}}{{%- endif %}}\n{template}"
    )
}

/// # Errors
/// [`Error::Usage`] for a Jinja template: it is written for text alone, and the layouts of whole models have
/// images in theirs.
pub(super) fn refuse_jinja(text: &TextSpec) -> Result<()> {
    if text.template == Template::Jinja {
        return Err(Error::usage(
            "a whole model cannot be exported with the tokenizer's own chat template (`data.template: jinja`)",
            "the layouts of whole models write images in their chat template; train with `chatml`, `smollm` or \
             `sail`, or export the language model alone with `--what llm`",
        ));
    }
    Ok(())
}

/// The template with this system prompt, separator and image mark, in the dialect of transformers.
fn chat_template(text: &TextSpec, image_mark: &str) -> String {
    let system = system_prompt(text);
    let separator = text.template.separator();
    let quoted = |text: &str| Value::from(text).to_string();
    CHAT_TEMPLATE
        .replace("@SYSTEM@", &quoted(&system))
        .replace("@SEPARATOR@", &quoted(separator))
        .replace("@IMAGE@", &quoted(image_mark))
}

/// What the system says before the first question; empty: nothing.
fn system_prompt(text: &TextSpec) -> String {
    let default = || text.template.default_system().unwrap_or_default().to_owned();
    text.system.clone().unwrap_or_else(default)
}

/// Makes a token one that no text can produce, as it is in training.
fn mark_special(tokenizer: &mut Value, token: &str, id: i64) {
    let Some(added) = tokenizer["added_tokens"].as_array_mut() else {
        tokenizer["added_tokens"] = json!([]);
        return mark_special(tokenizer, token, id);
    };
    if let Some(entry) = added.iter_mut().find(|entry| entry["content"] == token) {
        entry["special"] = true.into();
        return;
    }
    added.push(json!({
        "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    }));
    added.sort_by_key(|entry| entry["id"].as_i64());
}
