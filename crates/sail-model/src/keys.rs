//! What reading a config.json has in common for vision and language models: which keys are refused, and how.
//!
//! Called by `vision` and `llm`.

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

/// The error of a key of a family's config.json.
pub(crate) fn config_error(family: &str, key: &str, reason: String) -> Error {
    Error::Config { family: family.into(), key: key.into(), reason }
}
