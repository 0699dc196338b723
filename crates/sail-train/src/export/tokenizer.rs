//! The tokenizer of an exported model, with what transformers needs to use it.

use sail_data::TextSpec;
use sail_model::weights::{Folder, read_json};
use serde_json::{Value, json};

use super::Mllm;
use crate::error::Result;

const CHAT_TEMPLATE: &str = include_str!("../../remote_code/chat_template.jinja");
/// What pads a batch, where the tokenizer has it.
const END_OF_TEXT: &str = "<|endoftext|>";

/// Adds `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.
///
/// # Errors
/// When the `tokenizer.json` cannot be read.
pub(super) fn add_files(folder: Folder, mllm: &Mllm) -> Result<Folder> {
    let mut tokenizer = read_json(mllm.tokenizer)?;
    let structure = mllm.encoder.structure_tokens(mllm.text);
    for (token, id) in &structure {
        mark_special(&mut tokenizer, token, *id);
    }
    let added = tokenizer["added_tokens"].as_array();
    let pad = added.and_then(|tokens| tokens.iter().find(|token| token["content"] == END_OF_TEXT));
    let pad_id = pad.and_then(|token| token["id"].as_i64()).unwrap_or(mllm.encoder.end_of_turn());
    let pad = if pad.is_some() { END_OF_TEXT } else { "<|im_end|>" };
    let [_, _, start, context, end] = &structure[..] else { unreachable!("there are five structure tokens") };
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": pad,
        "additional_special_tokens": structure.iter().map(|(token, _)| token).collect::<Vec<_>>(),
        // As `InternVLProcessor` asks for them; there are no videos.
        "extra_special_tokens": {
            "start_image_token": start.0, "context_image_token": context.0, "end_image_token": end.0,
            "video_token": context.0,
        },
        "model_max_length": mllm.config.llm.decoder().max_position_embeddings,
        "clean_up_tokenization_spaces": false,
        "chat_template": chat_template(mllm.text),
    });
    let generation = json!({
        "do_sample": false, "max_new_tokens": 512,
        "eos_token_id": [mllm.encoder.end_of_turn()], "pad_token_id": pad_id,
    });
    Ok(folder
        .json("tokenizer.json", &tokenizer)
        .json("tokenizer_config.json", &config)
        .json("generation_config.json", &generation))
}

/// The template with this system prompt and separator, in the dialect of transformers.
fn chat_template(text: &TextSpec) -> String {
    let system = system_prompt(text);
    let separator = text.template.separator();
    let quoted = |text: &str| Value::from(text).to_string();
    CHAT_TEMPLATE.replace("@SYSTEM@", &quoted(&system)).replace("@SEPARATOR@", &quoted(separator))
}

/// What the system says before the first question; empty: nothing.
pub(super) fn system_prompt(text: &TextSpec) -> String {
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
