//! A configuration before it has types: mappings, lists and scalars, each with the place it was written at.
//!
//! Files, `extends` and `--set` are merged in this form, so that every later fault can name its line.

use super::error::Origin;
use super::path::{FieldPath, Step};

/// A value and where it was written; for the value of a key, where the key was.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) content: Content,
}

/// What YAML's core schema can say.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Null,
    Bool(bool),
    Int(i64),
    /// Above `i64::MAX`.
    Uint(u64),
    /// Always finite.
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// In the order written; keys are unique.
    Map(Vec<(String, Node)>),
}

impl Node {
    /// The value of a key, where this is a mapping that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    fn get_mut(&mut self, key: &str) -> Option<&mut Self> {
        match &mut self.content {
            Content::Map(entries) => value_of(entries, key),
            _ => None,
        }
    }

    /// Takes a key out of a mapping.
    pub(super) fn take(&mut self, key: &str) -> Option<Self> {
        let Content::Map(entries) = &mut self.content else { return None };
        let position = entries.iter().position(|(name, _)| name == key)?;
        Some(entries.remove(position).1)
    }

    /// Where the value at `path` was written, or else the nearest section around it.
    pub(super) fn origin_of(&self, path: &FieldPath) -> &Origin {
        let mut node = self;
        for step in &path.0 {
            let inner = match (step, &node.content) {
                (Step::Key(key), _) => node.get(key),
                (Step::Index(index), Content::List(items)) => items.get(*index),
                (Step::Index(_), _) => None,
            };
            match inner {
                Some(inner) => node = inner,
                None => break,
            }
        }
        &node.origin
    }

    /// Lays `over` on top: mappings are merged key by key, everything else is replaced.
    pub(super) fn overlay(&mut self, over: Self) {
        let is_map = matches!(self.content, Content::Map(_));
        match over.content {
            Content::Map(entries) if is_map => {
                self.origin = over.origin;
                for (key, node) in entries {
                    match self.get_mut(&key) {
                        Some(below) => below.overlay(node),
                        None => self.insert(key, node),
                    }
                }
            }
            content => *self = Self { origin: over.origin, content },
        }
    }

    /// Puts a value at a path, making the mappings on the way to it. A word or a list in the way of a key gives way.
    ///
    /// # Errors
    /// In words, where the path leads through a list that has no such item; nothing is changed then.
    pub(super) fn set(&mut self, steps: &[Step], value: Self) -> Result<(), String> {
        match steps {
            [] => *self = value,
            [Step::Key(key), rest @ ..] => {
                if let Some(inner) = self.get_mut(key) {
                    return inner.set(rest, value);
                }
                let mut inner = Self { origin: value.origin.clone(), content: Content::Null };
                inner.set(rest, value)?;
                if !matches!(self.content, Content::Map(_)) {
                    self.content = Content::Map(Vec::new());
                }
                self.insert(key.clone(), inner);
            }
            [Step::Index(index), rest @ ..] => {
                let Content::List(items) = &mut self.content else {
                    return Err(format!("there is no item {index}, because there is no list"));
                };
                let count = items.len();
                let none = || format!("there is no item {index} in a list of {count}, counted from 0");
                items.get_mut(*index).ok_or_else(none)?.set(rest, value)?;
            }
        }
        Ok(())
    }

    /// Removes the value at `path` or, where that is inside a list, the list: the items that are left would move.
    /// Returns what was removed; `None` when there is no mapping around it.
    pub(super) fn prune(&mut self, path: &FieldPath) -> Option<FieldPath> {
        let steps = &path.0;
        let keep = steps.iter().rposition(|step| matches!(step, Step::Key(_)))? + 1;
        let (Step::Key(key), around) = steps[..keep].split_last()? else { return None };
        let mut node = self;
        for step in around {
            node = match (step, &mut node.content) {
                (Step::Index(index), Content::List(items)) => items.get_mut(*index)?,
                (Step::Key(key), Content::Map(entries)) => value_of(entries, key)?,
                _ => return None,
            };
        }
        node.take(key).map(|_| FieldPath(steps[..keep].to_vec()))
    }

    fn insert(&mut self, key: String, node: Self) {
        if let Content::Map(entries) = &mut self.content {
            entries.push((key, node));
        }
    }
}

fn value_of<'n>(entries: &'n mut [(String, Node)], key: &str) -> Option<&'n mut Node> {
    entries.iter_mut().find(|(name, _)| name == key).map(|(_, node)| node)
}
