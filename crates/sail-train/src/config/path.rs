//! Dotted paths of fields, as in `data.sources[0].weight`.

use std::fmt;

/// One step into a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Into a mapping.
    Key(String),
    /// Into a list, from 0.
    Index(usize),
}

/// The way from the root of a configuration to one value; empty for the root itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldPath(pub Vec<Step>);

impl FieldPath {
    /// Reads `data.sources[0].weight`; `data.sources.0.weight` means the same.
    ///
    /// # Errors
    /// Says what is wrong with the text, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut steps = Vec::new();
        for part in text.split('.') {
            let (key, indices) = part.split_once('[').map_or((part, None), |(key, rest)| (key, Some(rest)));
            match key.parse() {
                Ok(index) => steps.push(Step::Index(index)),
                Err(_) if key.is_empty() => return Err(format!("`{text}` has an empty name in it")),
                Err(_) => steps.push(Step::Key(key.to_owned())),
            }
            let Some(indices) = indices else { continue };
            let inner = indices.strip_suffix(']').ok_or_else(|| format!("`{text}` lacks a `]`"))?;
            for index in inner.split("][") {
                let index =
                    index.parse().map_err(|_| format!("`{index}` in `{text}` is not an index from 0"))?;
                steps.push(Step::Index(index));
            }
        }
        Ok(Self(steps))
    }

    /// Whether this is the root.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `self` is `other` or a section around it.
    pub fn contains(&self, other: &Self) -> bool {
        other.0.starts_with(&self.0)
    }

    /// The last key, empty for the root and for list items.
    pub fn name(&self) -> &str {
        match self.0.last() {
            Some(Step::Key(key)) => key,
            Some(Step::Index(_)) | None => "",
        }
    }

    /// A field of this section; `name` may have dots in it.
    pub(super) fn child(&self, name: &str) -> Self {
        let mut steps = self.0.clone();
        steps.push(Step::Key(name.to_owned()));
        Self(steps)
    }

    /// The same section's field of another name.
    pub(super) fn sibling(&self, name: &str) -> Self {
        let mut steps = self.0.clone();
        steps.pop();
        steps.push(Step::Key(name.to_owned()));
        Self(steps)
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Key(key) if position == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
                Step::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}
