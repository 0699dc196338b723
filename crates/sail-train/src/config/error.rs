//! What is wrong with a configuration: where, what and what to do about it.
//!
//! All faults of a file are collected before any is shown. Made by the other files of this folder; printed by the
//! command line, which exits with code 2.

use std::fmt;
use std::path::PathBuf;

use super::path::FieldPath;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file.
    Line {
        /// The file, as it was named on the command line or by another file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
    },
    /// The command line's `--config FILE`.
    CommandLine,
    /// The command line's `--tasks FILE`.
    Tasks,
    /// An override from the command line: the text after `--set`.
    Set(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line, .. } => write!(f, "{}:{line}", file.display()),
            Self::CommandLine => f.write_str("--config"),
            Self::Tasks => f.write_str("--tasks"),
            Self::Set(text) => write!(f, "--set {text}"),
        }
    }
}

/// The kind of a fault.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// A file cannot be opened or is not UTF-8.
    #[error("`{}` cannot be read: {reason}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The operating system's words.
        reason: String,
    },
    /// The text is not YAML.
    #[error("invalid YAML at column {column}: {reason}")]
    Syntax {
        /// Column, from 1.
        column: usize,
        /// The parser's words.
        reason: String,
    },
    /// YAML that is deliberately not accepted.
    #[error("{what} cannot be used in a configuration")]
    Unsupported {
        /// The construct.
        what: &'static str,
    },
    /// A key occurs twice in one mapping.
    #[error("given twice, first at line {first_line}")]
    Repeated {
        /// Line of the first occurrence, from 1.
        first_line: usize,
    },
    /// No such field.
    #[error("unknown field")]
    UnknownField {
        /// The fields there are.
        known: &'static [&'static str],
    },
    /// A word that is not one of a fixed set.
    #[error("unknown value `{found}`")]
    UnknownValue {
        /// What was written.
        found: String,
        /// The words there are.
        known: &'static [&'static str],
    },
    /// A value of another type.
    #[error("expected {expected}, found {found}")]
    WrongType {
        /// What the field takes.
        expected: String,
        /// What was written.
        found: String,
    },
    /// A field that has no default is not given.
    #[error("missing")]
    Missing,
    /// The value has the right type and makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl Problem {
    /// What to do about it, whatever the field.
    fn usual_hint(&self) -> Option<&'static str> {
        match self {
            Self::Unreadable { .. } => Some(
                "is the name right, and the folder that it is seen from? stages, curricula and tasks are YAML files",
            ),
            Self::Syntax { reason, .. } if reason.contains("tabs") => Some("indent with spaces"),
            Self::Syntax { reason, .. } if reason.contains("flow") => {
                Some("quote texts that hold braces, brackets, commas or colons")
            }
            _ => None,
        }
    }
}

/// One fault of a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigError {
    /// The field, empty where the fault is in no single one.
    pub path: FieldPath,
    /// Where it was written; of a missing field, where its section was.
    pub origin: Origin,
    /// What is wrong.
    pub problem: Problem,
    /// What to do about it, where there is something to say.
    pub hint: Option<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            write!(f, "error: {}", self.problem)?;
        } else {
            write!(f, "error: `{}`: {}", self.path, self.problem)?;
        }
        write!(f, "\n  --> {}", self.origin)?;
        match self.hint.as_deref().or(self.problem.usual_hint()) {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// Every fault of a configuration, at least one.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// The hint that belongs to a problem by its kind; `name` is the last key of its path.
pub(super) fn hint_for(problem: &Problem, name: &str) -> Option<String> {
    match problem {
        Problem::UnknownField { known } => Some(match nearest(name, known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known here: {}", listed(known)),
        }),
        Problem::UnknownValue { found, known } => Some(match nearest(found, known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("expected {}", listed(known)),
        }),
        Problem::WrongType { expected, found } if expected == "text" && found.starts_with("the ") => {
            Some("put it in quotes".to_owned())
        }
        Problem::Unsupported { what: "anchors and aliases" } => {
            Some("write the value out, or share a file with `extends`".to_owned())
        }
        _ => None,
    }
}

/// The known name that `name` is probably a slip of: at most a third of its letters wrong, or one a start of the
/// other.
pub(super) fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let close = |candidate: &str| {
        let distance = strsim::damerau_levenshtein(name, candidate);
        let prefix = name.len() >= 3 && (candidate.starts_with(name) || name.starts_with(candidate));
        (distance * 3 <= candidate.len().max(3) || prefix).then_some(distance)
    };
    known.iter().filter_map(|candidate| Some((close(candidate)?, *candidate))).min().map(|(_, found)| found)
}

fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
