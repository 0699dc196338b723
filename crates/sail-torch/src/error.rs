//! What a call into libtorch can report.

/// What a call into libtorch can report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The arguments do not fit together; nothing was called.
    #[error("{op}: {reason}")]
    Argument {
        /// The function called.
        op: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// Another process did not do its part in time.
    #[error("{op}: {message}")]
    Timeout {
        /// The function called.
        op: &'static str,
        /// The exception's message.
        message: String,
    },
    /// A connection could not be made, or broke.
    #[error("{op}: {message}")]
    Network {
        /// The function called.
        op: &'static str,
        /// The exception's message.
        message: String,
    },
    /// libtorch threw any other exception.
    #[error("{op}: {message}")]
    Torch {
        /// The function called.
        op: &'static str,
        /// The exception's message.
        message: String,
    },
    /// The operating system refused something.
    #[error("{op}: {message}")]
    System {
        /// The function called.
        op: &'static str,
        /// What it said.
        message: String,
    },
}

impl Error {
    /// Whether other processes or the network are at fault, not this call's arguments.
    pub fn is_distributed(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Network { .. })
    }
}

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;
