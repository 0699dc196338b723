//! Collects the faults of one stage, so that all of them are shown at once and none twice.

use std::fmt;
use std::path::PathBuf;

use super::error::{ConfigError, Origin, Problem, hint_for};
use super::path::FieldPath;
use super::tree::Node;

/// The faults found so far and the tree they are in.
pub(super) struct Checker<'t> {
    tree: &'t Node,
    errors: Vec<ConfigError>,
    /// Fields that were cut out or replaced by their default because of a fault.
    reported: Vec<FieldPath>,
}

impl<'t> Checker<'t> {
    /// Starts with the faults that reading the text found.
    pub(super) fn new(tree: &'t Node, errors: Vec<ConfigError>) -> Self {
        let reported =
            errors.iter().map(|error| error.path.clone()).filter(|path| !path.is_empty()).collect();
        Self { tree, errors, reported }
    }

    pub(super) fn tree(&self) -> &'t Node {
        self.tree
    }

    /// Notes that what is at `path` does not stand for what was written, so that nothing more is said about it.
    pub(super) fn mark_reported(&mut self, path: FieldPath) {
        self.reported.push(path);
    }

    /// Adds a fault with the hint its kind has.
    pub(super) fn fault(&mut self, path: FieldPath, problem: Problem) {
        let hint = hint_for(&problem, path.name());
        self.push(path, problem, hint);
    }

    /// The value, or a fault saying that it is missing.
    pub(super) fn required<T>(&mut self, path: &str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.fault(known_path(path), Problem::Missing);
        }
        value
    }

    /// Adds a fault of the value at `path`.
    pub(super) fn invalid(&mut self, path: &str, message: impl Into<String>) {
        self.push(known_path(path), Problem::Invalid(message.into()), None);
    }

    /// The same, with what to do about it.
    pub(super) fn invalid_with_hint(
        &mut self,
        path: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.push(known_path(path), Problem::Invalid(message.into()), Some(hint.into()));
    }

    /// Adds a fault saying "`must`, found `found`" unless `holds`.
    pub(super) fn expect(&mut self, holds: bool, path: &str, must: &str, found: impl fmt::Display) {
        if !holds {
            self.invalid(path, format!("{must}, found {found}"));
        }
    }

    /// The faults, sorted by file and line.
    pub(super) fn into_errors(mut self) -> Vec<ConfigError> {
        self.errors.sort_by_key(|error| match &error.origin {
            Origin::Line { file, line, .. } => (0, file.clone(), *line),
            Origin::CommandLine | Origin::Tasks | Origin::Set(_) => (1, PathBuf::new(), 0),
        });
        self.errors
    }

    fn push(&mut self, path: FieldPath, problem: Problem, hint: Option<String>) {
        if self.reported.iter().any(|reported| reported.contains(&path)) {
            return;
        }
        let origin = self.tree.origin_of(&path).clone();
        self.errors.push(ConfigError { path, origin, problem, hint });
    }
}

/// A path written in this crate.
fn known_path(text: &str) -> FieldPath {
    FieldPath::parse(text).expect("invariant: paths in the code are well formed")
}
