//! A `tokenizer.json` in which the text of samples cannot write structure. It knows no template; what a template
//! writes by id is reserved here, so that no text gives such an id.

use std::path::{Path, PathBuf};

use tokenizers::{AddedToken, Tokenizer};

use crate::error::{BadSample, Error, Result};

/// A tokenizer and the ids that only templates and images may write.
#[derive(Debug)]
pub(super) struct Vocabulary {
    path: PathBuf,
    tokenizer: Tokenizer,
    reserved: Vec<i64>,
}

/// A token that is recognised where a template writes it.
#[derive(Clone, Debug)]
pub(super) struct Special {
    pub(super) id: i64,
    pub(super) text: String,
    /// It takes the white space before it.
    pub(super) lstrip: bool,
    /// It takes the white space after it.
    pub(super) rstrip: bool,
}

impl Vocabulary {
    /// Loads the file. Truncation and padding set in it are switched off.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the file cannot be used.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let failed = |e: tokenizers::Error| Error::Tokenizer { path: path.into(), detail: e.to_string() };
        let mut tokenizer = Tokenizer::from_file(path).map_err(failed)?;
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(true);
        Ok(Self { path: path.into(), tokenizer, reserved: Vec::new() })
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub(super) fn error(&self, detail: impl Into<String>) -> Error {
        Error::Tokenizer { path: self.path.clone(), detail: detail.into() }
    }

    /// The id of each token, which from now on no text gives.
    ///
    /// # Errors
    /// [`Error::MissingToken`] when the tokenizer lacks one, [`Error::Tokenizer`] when it contradicts itself.
    pub(super) fn reserve<const N: usize>(&mut self, tokens: [(&str, &'static str); N]) -> Result<[i64; N]> {
        let mut ids = [0; N];
        for ((token, purpose), id) in tokens.into_iter().zip(&mut ids) {
            let missing =
                || Error::MissingToken { path: self.path.clone(), token: token.to_owned(), purpose };
            *id = self.id(token).ok_or_else(missing)?;
        }
        self.make_special(tokens.map(|(token, _)| token))?;
        if tokens.map(|(token, _)| self.id(token)) != ids.map(Some) {
            return Err(self.error("its added tokens contradict its vocabulary"));
        }
        self.reserved.extend(ids);
        Ok(ids)
    }

    /// Reserves ids that are special already.
    pub(super) fn reserve_ids(&mut self, ids: impl IntoIterator<Item = i64>) {
        self.reserved.extend(ids);
    }

    /// Makes these tokens special: a tokenizer may list one as an ordinary added token or an ordinary word, and only
    /// special ones are ignored in the text of samples. Those that it does not have are left out.
    pub(super) fn make_special<'a>(&mut self, tokens: impl IntoIterator<Item = &'a str>) -> Result<()> {
        let listed = self.tokenizer.get_added_tokens_decoder();
        let special = |token: &str| {
            let id = self.tokenizer.token_to_id(token)?;
            let added = listed.get(&id).cloned().unwrap_or_else(|| AddedToken::from(token, true));
            Some(added.special(true))
        };
        let tokens: Vec<AddedToken> = tokens.into_iter().filter_map(special).collect();
        self.tokenizer.add_special_tokens(tokens).map_err(|e| self.error(e.to_string()))?;
        Ok(())
    }

    /// All special tokens, the longest first.
    pub(super) fn specials(&self) -> Vec<Special> {
        let mut specials: Vec<Special> = self
            .tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, AddedToken { content, lstrip, rstrip, .. })| Special {
                id: i64::from(id),
                text: content,
                lstrip,
                rstrip,
            })
            .collect();
        specials.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then_with(|| a.text.cmp(&b.text)));
        specials
    }

    pub(super) fn id(&self, token: &str) -> Option<i64> {
        self.tokenizer.token_to_id(token).map(i64::from)
    }

    pub(super) fn token(&self, id: i64) -> String {
        u32::try_from(id).ok().and_then(|id| self.tokenizer.id_to_token(id)).unwrap_or_default()
    }

    /// Ids of plain text, in which no special token is recognised.
    pub(super) fn plain(&self, text: &str) -> std::result::Result<Vec<i64>, BadSample> {
        let encoding =
            self.tokenizer.encode_fast(text, false).map_err(|e| BadSample::Text { detail: e.to_string() })?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        // A model (not only the added tokens) may know such a token as an ordinary word.
        match ids.iter().find(|id| self.reserved.contains(id)) {
            Some(id) => Err(BadSample::Text { detail: format!("it contains the structure token {id}") }),
            None => Ok(ids),
        }
    }
}
