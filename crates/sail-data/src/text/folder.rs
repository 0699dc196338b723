//! What lies beside a `tokenizer.json`: its `tokenizer_config.json` and the chat template, found as transformers
//! finds them.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// The parts of `tokenizer_config.json` that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    pad_token: Option<Token>,
    unk_token: Option<Token>,
    additional_special_tokens: Vec<Token>,
    added_tokens_decoder: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
    template: String,
}

/// A token by its text, or with its attributes.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Full { content: String },
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Full { content: text } => text,
        }
    }
}

impl TokenizerConfig {
    /// Reads the file beside the tokenizer; all is empty where there is none.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] for one that cannot be understood, [`Error::Io`] for one that cannot be read.
    pub(super) fn beside(tokenizer_json: &Path) -> Result<Self> {
        let path = tokenizer_json.with_file_name(CONFIG);
        if path.exists() { Self::read(&path) } else { Ok(Self::default()) }
    }

    fn read(path: &Path) -> Result<Self> {
        serde_json::from_str(&read(path)?).map_err(|e| error(path, e.to_string()))
    }

    pub(super) fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_ref().map(Token::text)
    }

    pub(super) fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_ref().map(Token::text)
    }

    /// Every token that the file calls special.
    pub(super) fn special_tokens(&self) -> impl Iterator<Item = &str> {
        let named = [&self.bos_token, &self.eos_token, &self.pad_token, &self.unk_token];
        let named = named.into_iter().flatten().chain(&self.additional_special_tokens).map(Token::text);
        let added = self.added_tokens_decoder.values().filter(|token| token["special"] == true);
        named.chain(added.filter_map(|token| token["content"].as_str()))
    }

    /// The template called `default`, where there are several.
    fn template(self, path: &Path) -> Result<Option<String>> {
        match self.chat_template {
            None => Ok(None),
            Some(Templates::One(template)) => Ok(Some(template)),
            Some(Templates::Named(list)) => {
                let names: Vec<String> = list.iter().map(|named| format!("`{}`", named.name)).collect();
                let default = list.into_iter().find(|named| named.name == "default");
                let none = || {
                    error(
                        path,
                        format!("`chat_template` has none called `default`, but {}", names.join(", ")),
                    )
                };
                default.map(|named| Some(named.template)).ok_or_else(none)
            }
        }
    }
}

/// The chat template and the file that holds it: `file` where it is given (a `.json` has it as `chat_template`),
/// else `chat_template.jinja` beside the tokenizer, else the one in `tokenizer_config.json`.
///
/// # Errors
/// [`Error::ChatTemplate`] and [`Error::Io`].
pub(super) fn chat_template(tokenizer_json: &Path, file: Option<&Path>) -> Result<(PathBuf, String)> {
    let beside = tokenizer_json.with_file_name(TEMPLATE);
    let path = match file {
        Some(file) => file.to_path_buf(),
        None if beside.exists() => beside,
        None => tokenizer_json.with_file_name(CONFIG),
    };
    let template = if path.extension().is_none_or(|extension| extension != "json") {
        Some(read(&path)?)
    } else if path.exists() || file.is_some() {
        TokenizerConfig::read(&path)?.template(&path)?
    } else {
        None
    };
    match template {
        Some(template) => Ok((path, template)),
        None => Err(error(
            &path,
            format!(
                "there is none, neither here as `chat_template` nor in a `{TEMPLATE}`\n\nhint: choose `chatml`, `smollm` or `sail` as `template`, put a `{TEMPLATE}` beside the tokenizer, or name one as `template_file`"
            ),
        )),
    }
}

pub(super) fn error(path: &Path, detail: impl Into<String>) -> Error {
    Error::ChatTemplate { path: path.to_path_buf(), detail: detail.into() }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|cause| Error::Io { path: path.to_path_buf(), cause })
}
