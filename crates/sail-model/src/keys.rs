//! What reading a config.json has in common for vision and language models: which keys are refused, and how.
//!
//! Called by `vision` and `llm`.

use std::path::Path;

use crate::error::Error;

/// A key that does not pass, and why.
pub type Refusal = (&'static str, String);

/// What to do with a key that the family does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownKeys {
    /// A published file may say more than is needed.
    Skip,
    /// A person who wrote it meant something by it.
    Refuse,
}

/// Largest width, count or size that is taken for one.
const LARGEST: i64 = 1 << 24;
/// Most blocks.
const MOST_BLOCKS: i64 = 10_000;

/// Checks that widths, counts and sizes are at least 1 and such that products of two are exact.
///
/// # Errors
/// The first key that does not pass.
pub(crate) fn check_sizes(sizes: &[(&'static str, i64)]) -> std::result::Result<(), Refusal> {
    let limit = |key: &str| if key == "num_hidden_layers" { MOST_BLOCKS } else { LARGEST };
    match sizes.iter().find(|(key, size)| !(1..=limit(key)).contains(size)) {
        None => Ok(()),
        Some((key, size)) if *size < 1 => Err((key, format!("must be at least 1, is {size}"))),
        Some((key, size)) => Err((key, format!("must be at most {}, is {size}", limit(key)))),
    }
}

/// Puts the file's name before the error of a key.
pub(crate) fn in_file(path: &Path) -> impl FnOnce(Error) -> Error + '_ {
    move |error| match error {
        Error::Config { .. } => Error::File { path: path.to_owned(), reason: error.to_string() },
        other => other,
    }
}

/// The error of a key of a family's config.json.
pub(crate) fn config_error(family: &str, key: &str, reason: String) -> Error {
    Error::Config { family: family.into(), key: key.into(), reason }
}
