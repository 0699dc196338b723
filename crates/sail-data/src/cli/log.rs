//! What of the log is asked for by `SAIL_LOG`, the variable of all programs.

use tracing_subscriber::filter::EnvFilter;

/// A `SAIL_LOG` that is no filter.
#[derive(Debug, thiserror::Error)]
#[error("{what}\n\nhint: {hint}")]
pub struct NoFilter {
    /// What it is instead.
    pub what: String,
    /// What to do about it.
    pub hint: &'static str,
}

/// The filter that the variable names; none where it is not set, or empty.
///
/// # Errors
/// [`NoFilter`].
pub fn filter_from_env() -> Result<Option<EnvFilter>, NoFilter> {
    let Some(wished) = std::env::var_os("SAIL_LOG").filter(|wished| !wished.is_empty()) else {
        return Ok(None);
    };
    let wished = wished.to_string_lossy();
    EnvFilter::try_new(&wished).map(Some).map_err(|error| NoFilter {
        what: format!("`SAIL_LOG` is `{wished}`: {error}"),
        hint: "write levels by target, as in `SAIL_LOG=info,sail_data=debug`, or unset it",
    })
}
