//! What `--version` says of a program: its release and the commit that it was built from.

pub use git_version::git_version;

/// The commit that the calling crate is built from, eight digits, with `-dirty` where files of the tree differ from it. What
/// the variable `SAIL_COMMIT` holds during the build is taken instead, for builds of a copy without its `.git`.
///
/// For a `main.rs` alone: cargo compiles whatever holds it again after each commit.
#[macro_export]
macro_rules! commit {
    () => {
        match option_env!("SAIL_COMMIT") {
            Some(commit) if !commit.is_empty() => commit,
            _ => $crate::cli::version::git_version!(
                // No tags, whose names come and go.
                args = ["--always", "--exclude=*", "--abbrev=8", "--dirty=-dirty"],
                fallback = "built outside of git"
            ),
        }
    };
}

/// The release of the workspace with the commit of a program.
pub fn version(commit: &str) -> String {
    format!("{} ({commit})", env!("CARGO_PKG_VERSION"))
}
