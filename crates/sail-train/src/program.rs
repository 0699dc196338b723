//! What this program is: its release, the commit that it was built from and the torch that it runs with. Printed by
//! `--version`, and kept in checkpoints.

use std::sync::OnceLock;

/// What a `main.rs` has said.
static COMMIT: OnceLock<&str> = OnceLock::new();

/// Says what the running program is built from, before anything asks; the first word counts.
pub(crate) fn built_from(commit: &'static str) {
    COMMIT.get_or_init(|| commit);
}

/// The release, and the commit where a program has said it: a library cannot know.
pub(crate) fn version() -> String {
    COMMIT.get().map_or_else(
        || env!("CARGO_PKG_VERSION").to_owned(),
        |commit| sail_data::cli::version::version(commit),
    )
}

/// That of the libtorch which is loaded, on a line of its own.
pub(crate) fn with_torch() -> String {
    format!("{}\ntorch {}", version(), sail_torch::version())
}
