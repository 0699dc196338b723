//! A plan as text, as a hash, and compared with another one.
//!
//! Checkpoints store a plan and its hash; resuming compares them and says what differs.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::plan::Plan;

/// One value in which two plans differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Dotted path, as in a configuration file.
    pub path: String,
    /// The value in the first plan; `None` where it has none.
    pub old: Option<Value>,
    /// The value in the second plan; `None` where it has none.
    pub new: Option<Value>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<Value>| value.as_ref().map_or("not given".to_owned(), Value::to_string);
        write!(f, "`{}`: {} -> {}", self.path, shown(&self.old), shown(&self.new))
    }
}

impl Plan {
    /// The plan as a configuration file; loading it gives the same plan.
    pub fn to_yaml(&self) -> String {
        serde_yaml::to_string(self).expect("invariant: a plan has only text keys and finite numbers")
    }

    /// SHA-256 of the plan as JSON with sorted keys, in lower-case hexadecimal.
    pub fn hash(&self) -> String {
        let mut value = self.to_json();
        value.sort_all_objects();
        hex(&Sha256::digest(value.to_string().as_bytes()))
    }

    /// Every value by its path, and what reads it: what two ranks must have alike to work together.
    pub fn fields(&self) -> BTreeMap<String, String> {
        let mut values = BTreeMap::new();
        flatten(String::new(), self.to_json(), &mut values);
        values.into_iter().map(|(path, value)| (path, value.to_string())).collect()
    }

    /// What is different in `other`, sorted by path; empty when the plans are equal.
    pub fn diff(&self, other: &Self) -> Vec<Difference> {
        let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
        flatten(String::new(), self.to_json(), &mut old);
        flatten(String::new(), other.to_json(), &mut new);
        let mut paths: Vec<&String> = old.keys().chain(new.keys()).collect();
        paths.sort();
        paths.dedup();
        let pairs = paths.into_iter().map(|path| (path, old.get(path).cloned(), new.get(path).cloned()));
        pairs
            .filter(|(_, old, new)| old != new)
            .map(|(path, old, new)| Difference { path: path.clone(), old, new })
            .collect()
    }

    fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("invariant: a plan has only text keys and finite numbers")
    }
}

/// In lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("invariant: writing to a String cannot fail");
        text
    })
}

/// Lists the leaves under a path. Empty lists and mappings are leaves.
fn flatten(path: String, value: Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            for (key, inner) in entries {
                let path = if path.is_empty() { key } else { format!("{path}.{key}") };
                flatten(path, inner, leaves);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, inner) in items.into_iter().enumerate() {
                flatten(format!("{path}[{index}]"), inner, leaves);
            }
        }
        leaf => {
            leaves.insert(path, leaf);
        }
    }
}
