//! What may be written where a model is wanted: a folder, or `hf:org/name[@revision]`.
//!
//! Text only; what a reference of the second kind stands for is fetched by [`super::Hub`].

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Hub, Wanted};
use crate::error::Result;

const PREFIX: &str = "hf:";
const FORM: &str = "write `hf:org/name` or `hf:org/name@revision`";
/// Longest `org/name` that the hub gives.
const LONGEST: usize = 96;

/// A model's folder, or its name on a Hugging Face hub. Printed, and written to files, as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ModelRef {
    /// A folder on this machine.
    Folder(PathBuf),
    /// `hf:org/name[@revision]`
    Hub {
        /// `org/name`
        repo: String,
        /// A branch, tag or commit; `None`: the branch `main`.
        revision: Option<String>,
    },
}

impl ModelRef {
    /// The folder with the wanted files: a folder's own path, unchecked; what a hub holds is fetched into the
    /// cache first, with the settings of the environment.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn fetch(&self, wanted: Wanted) -> Result<PathBuf> {
        match self {
            Self::Folder(folder) => Ok(folder.clone()),
            Self::Hub { .. } => self.fetch_from(&Hub::from_env()?, wanted),
        }
    }

    /// The same with settings of one's own.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn fetch_from(&self, hub: &Hub, wanted: Wanted) -> Result<PathBuf> {
        match self {
            Self::Folder(folder) => Ok(folder.clone()),
            Self::Hub { repo, revision } => hub.fetch(repo, revision.as_deref(), wanted),
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => folder.display().fmt(f),
            Self::Hub { repo, revision: None } => write!(f, "{PREFIX}{repo}"),
            Self::Hub { repo, revision: Some(revision) } => write!(f, "{PREFIX}{repo}@{revision}"),
        }
    }
}

impl FromStr for ModelRef {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let Some(name) = text.strip_prefix(PREFIX) else { return Ok(Self::Folder(text.into())) };
        let fail = |problem: &str| Err(format!("`{text}`: {problem}; {FORM}"));
        let (repo, revision) = match name.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (name, None),
        };
        match repo.split_once('/') {
            None | Some(("", _) | (_, "")) => return fail("names no `org/name`"),
            Some((_, name)) if name.contains('/') => {
                return fail("has more than one `/` before the revision");
            }
            Some((org, name)) if !(is_name(org) && is_name(name)) || repo.len() > LONGEST => {
                return fail("no model has such a name: letters, digits, `-`, `_` and `.` can be in it");
            }
            Some(_) => {}
        }
        match revision {
            Some("") => fail("has no revision after `@`"),
            Some(revision) if !is_revision(revision) => fail("the revision is no branch, tag or commit"),
            _ => Ok(Self::Hub { repo: repo.to_owned(), revision: revision.map(str::to_owned) }),
        }
    }
}

impl TryFrom<String> for ModelRef {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<ModelRef> for String {
    fn from(reference: ModelRef) -> Self {
        reference.to_string()
    }
}

fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// The hub's rule for each half of a name; no such name leads out of a folder.
fn is_name(name: &str) -> bool {
    let at_the_ends = |c| name.starts_with(c) || name.ends_with(c);
    is_plain(name) && !at_the_ends('-') && !at_the_ends('.') && !name.contains("--") && !name.contains("..")
}

/// Narrower than git's own rule: no part leads out of a folder or needs escaping in an address.
fn is_revision(revision: &str) -> bool {
    revision.split('/').all(|part| is_plain(part) && !part.is_empty() && !part.starts_with(['.', '-']))
        && !revision.contains("..")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn references_are_read_and_printed_alike() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let cases = [
            ("weights/llm", None),
            ("/abs/hf:x", None),
            ("./hf:org/name", None),
            ("org/name", None),
            ("hf:org/name", Some(("org/name", None))),
            ("hf:Org-1/na.me_2@v1.0", Some(("Org-1/na.me_2", Some("v1.0")))),
            ("hf:org/name@refs/pr/1", Some(("org/name", Some("refs/pr/1")))),
            (&format!("hf:org/name@{commit}"), Some(("org/name", Some(commit)))),
        ];
        for (text, expected) in cases {
            let expected = match expected {
                None => ModelRef::Folder(text.into()),
                Some((repo, revision)) => {
                    ModelRef::Hub { repo: repo.to_owned(), revision: revision.map(str::to_owned) }
                }
            };
            let read: ModelRef = serde_json::from_value(json!(text)).unwrap();
            assert_eq!(read, expected);
            assert_eq!(serde_json::to_value(&read).unwrap(), json!(text));
        }
    }

    #[test]
    fn malformed_references_say_what_is_right() {
        let long = format!("hf:org/{}", "x".repeat(96));
        let cases = [
            ("hf:", "names no `org/name`"),
            ("hf:name", "names no `org/name`"),
            ("hf:/name", "names no `org/name`"),
            ("hf:org/", "names no `org/name`"),
            ("hf:@main", "names no `org/name`"),
            ("hf:org/name/x", "more than one `/`"),
            ("hf:org/na me", "no model has such a name"),
            ("hf:../name", "no model has such a name"),
            ("hf:org/a--b", "no model has such a name"),
            ("hf:org/-b", "no model has such a name"),
            ("hf:org/name?x", "no model has such a name"),
            (&long, "no model has such a name"),
            ("hf:org/name@", "no revision after `@`"),
            ("hf:org/name@../x", "is no branch, tag or commit"),
            ("hf:org/name@a//b", "is no branch, tag or commit"),
            ("hf:org/name@a@b", "is no branch, tag or commit"),
            ("hf:org/name@a b", "is no branch, tag or commit"),
        ];
        for (text, expected) in cases {
            let message = text.parse::<ModelRef>().unwrap_err();
            assert!(message.contains(expected) && message.ends_with(FORM), "{text}: {message}");
        }
    }
}
