//! What makes a command fail.

use std::path::{Path, PathBuf};

use crate::error::{BadSample, Error};

/// Result of a command's fallible operations.
pub(crate) type Result<T> = std::result::Result<T, ToolError>;

/// A failure of a command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolError {
    /// From the rest of the crate.
    #[error(transparent)]
    Data(#[from] Error),
    /// Arguments that make no sense together.
    #[error("{message}\n\nhint: {hint}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// The verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: std::io::Error,
    },
    /// A specification file is malformed.
    #[error("cannot read the specification `{}`: {detail}\n\nhint: it has the keys `tokenizer` and `data`", path.display())]
    SpecFile {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        detail: String,
    },
    /// An input of `pack` is neither a JSON array nor JSON lines.
    #[error("`{}` is broken at byte {offset}: {detail}", path.display())]
    BrokenJson {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        detail: String,
    },
    /// A folder begun with other inputs or options.
    #[error("`{}` was begun from other data: {detail}\n\nhint: give an empty `--out`, or go on with what it was begun with", out.display())]
    Changed {
        /// The folder.
        out: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A finished shard is not as it was written.
    #[error("the finished shard `{}` {detail}\n\nhint: pack into an empty folder again", shard.display())]
    Damaged {
        /// The shard.
        shard: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// Something else lies in the output folder.
    #[error("`{}` would be overwritten\n\nhint: give an empty `--out` or another `--prefix`", path.display())]
    Occupied {
        /// The file in the way.
        path: PathBuf,
    },
    /// Another process packs into the same folder.
    #[error("another process packs into `{}`", out.display())]
    Locked {
        /// The folder.
        out: PathBuf,
    },
    /// A bad sample, with `--strict`.
    #[error("{place}: {cause}\n\nhint: without `--strict` it is skipped and listed in `rejected.jsonl`")]
    Strict {
        /// Input and number of the sample.
        place: String,
        /// Why it is bad.
        cause: BadSample,
    },
    /// No sample has the key or number asked for.
    #[error("there is no sample {wanted}; {searched}")]
    NoSample {
        /// The key or number.
        wanted: String,
        /// Where it was sought.
        searched: String,
    },
    /// The sample asked for is bad.
    #[error("the sample `{key}` of `{shard}` cannot be used ({}): {cause}", cause.reason())]
    Unusable {
        /// Its shard.
        shard: String,
        /// Its key.
        key: String,
        /// Why.
        cause: BadSample,
    },
}

impl ToolError {
    /// For `map_err`: what was tried with which file.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |cause| Self::Io { action, path: path.to_path_buf(), cause }
    }

    /// Arguments that make no sense together.
    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    /// 1 failed, 2 bad usage.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. }
            | Self::SpecFile { .. }
            | Self::Data(
                Error::InvalidSpec { .. }
                | Error::Pattern { .. }
                | Error::NoShards { .. }
                | Error::DuplicateShard { .. }
                | Error::MissingToken { .. }
                | Error::Tokenizer { .. },
            ) => 2,
            _ => 1,
        }
    }
}

/// An error's message, with what lies behind it where the message does not say so itself.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !message.contains(&text) {
            // A hint stays at the end.
            match message.split_once("\n\nhint: ") {
                Some((head, hint)) => message = format!("{head}: {text}\n\nhint: {hint}"),
                None => message = format!("{message}: {text}"),
            }
        }
        cause = inner.source();
    }
    message
}
