//! [`Node`] to typed values, through serde, with every fault of the types found in one call.
//!
//! A deserializer of its own, because serde's usual errors are prose: this one keeps the path, the known names and
//! the found value apart. serde stops at the first fault; so the field at fault is cut out of the tree, which is
//! harmless since every field of the file's form has a default or is optional, and reading starts again.

use std::fmt;

use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected,
    Visitor,
};

use super::check::Checker;
use super::error::{Problem, nearest};
use super::path::{FieldPath, Step};
use super::tree::{Content, Node};
use super::values::whole;

/// Reads `T` from the checker's tree; faults go to the checker.
pub(super) fn read<T: for<'de> Deserialize<'de> + Default>(checker: &mut Checker<'_>) -> T {
    let mut tree = checker.tree().clone();
    loop {
        let fault = match T::deserialize(Reader(&tree)) {
            Ok(value) => return value,
            Err(fault) => fault,
        };
        let path = FieldPath(fault.steps.into_iter().rev().collect());
        let pruned = tree.prune(&path);
        if let Problem::UnknownField { known } = &fault.problem
            && let Some(meant) = nearest(path.name(), known)
        {
            checker.mark_reported(path.sibling(meant));
        }
        checker.fault(path, fault.problem);
        let Some(pruned) = pruned else {
            checker.mark_reported(FieldPath::default());
            return T::default();
        };
        checker.mark_reported(pruned);
    }
}

/// A fault and the steps to it, innermost first.
#[derive(Debug)]
struct Fault {
    steps: Vec<Step>,
    problem: Problem,
}

impl Fault {
    fn new(problem: Problem) -> Self {
        Self { steps: Vec::new(), problem }
    }

    fn inside(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.problem.fmt(f)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(Problem::Invalid(message.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(Problem::WrongType {
            expected: expected_words(&expected.to_string()),
            found: found_words(found),
        })
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }

    fn invalid_length(length: usize, expected: &dyn Expected) -> Self {
        Self::new(Problem::WrongType {
            expected: expected_words(&expected.to_string()),
            found: format!("{length} item(s)"),
        })
    }

    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        Self::new(Problem::UnknownValue { found: variant.to_owned(), known })
    }

    fn unknown_field(_: &str, known: &'static [&'static str]) -> Self {
        Self::new(Problem::UnknownField { known })
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(Problem::Missing).inside(Step::Key(field.to_owned()))
    }
}

/// serde's name of a Rust type in the words of somebody who writes YAML.
fn expected_words(expected: &str) -> String {
    match expected {
        "u64" | "usize" | "u32" => "a whole number from 0".to_owned(),
        "f64" | "f32" => "a number".to_owned(),
        "a string" | "string" => "text".to_owned(),
        "path string" => "a path".to_owned(),
        "a boolean" => "`true` or `false`".to_owned(),
        "a sequence" => "a list".to_owned(),
        "an array of length 2" => "a list of 2 numbers".to_owned(),
        "an array of length 3" => "a list of 3 numbers".to_owned(),
        other => other.to_owned(),
    }
}

fn found_words(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Bool(value) => format!("the word `{value}`"),
        Unexpected::Unsigned(value) => format!("the number `{value}`"),
        Unexpected::Signed(value) => format!("the number `{value}`"),
        Unexpected::Float(value) => format!("the number `{value}`"),
        Unexpected::Str(value) => format!("`{value}`"),
        Unexpected::Unit | Unexpected::Option => "nothing".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a mapping".to_owned(),
        other => other.to_string(),
    }
}

/// A value in serde's terms.
fn unexpected(content: &Content) -> Unexpected<'_> {
    match content {
        Content::Null => Unexpected::Unit,
        Content::Bool(value) => Unexpected::Bool(*value),
        Content::Int(value) => Unexpected::Signed(*value),
        Content::Uint(value) => Unexpected::Unsigned(*value),
        Content::Float(value) => Unexpected::Float(*value),
        Content::Text(text) => Unexpected::Str(text),
        Content::List(_) => Unexpected::Seq,
        Content::Map(_) => Unexpected::Map,
    }
}

/// The deserializer of one node.
#[derive(Clone, Copy)]
struct Reader<'n>(&'n Node);

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.0.content {
            Content::Null => visitor.visit_unit(),
            Content::Bool(value) => visitor.visit_bool(*value),
            Content::Int(value) => match u64::try_from(*value) {
                Ok(value) => visitor.visit_u64(value),
                Err(_) => visitor.visit_i64(*value),
            },
            Content::Uint(value) => visitor.visit_u64(*value),
            Content::Float(value) => visitor.visit_f64(*value),
            Content::Text(text) => visitor.visit_str(text),
            Content::List(items) => {
                let mut access = Items { items, next: 0 };
                let value = visitor.visit_seq(&mut access)?;
                if access.next < items.len() {
                    let expected = format!("a list of {} numbers", access.next);
                    let found = format!("{} item(s)", items.len());
                    return Err(Fault::new(Problem::WrongType { expected, found }));
                }
                Ok(value)
            }
            Content::Map(entries) => visitor.visit_map(Entries { entries, next: 0 }),
        }
    }

    /// Large numbers are written as `2e9`.
    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.content {
            Content::Float(value) => match whole(value) {
                Some(value) => visitor.visit_u64(value),
                None => self.deserialize_any(visitor),
            },
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.content {
            Content::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    /// A section without anything in it (`log:`) is a section of defaults.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.0.content {
            Content::Null => visitor.visit_map(Entries { entries: &[], next: 0 }),
            Content::Map(entries) => visitor.visit_map(Entries { entries, next: 0 }),
            other => Err(de::Error::invalid_type(unexpected(other), &visitor)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        if let Content::Text(word) = &self.0.content {
            let word: StrDeserializer<'_, Fault> = word.as_str().into_deserializer();
            return visitor.visit_enum(word);
        }
        let words: Vec<String> = known.iter().map(|word| format!("`{word}`")).collect();
        let found = found_words(unexpected(&self.0.content));
        Err(Fault::new(Problem::WrongType { expected: words.join(" or "), found }))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map identifier ignored_any
    }
}

struct Items<'n> {
    items: &'n [Node],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(node) = self.items.get(self.next) else { return Ok(None) };
        let step = Step::Index(self.next);
        self.next += 1;
        seed.deserialize(Reader(node)).map(Some).map_err(|fault| fault.inside(step))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len() - self.next)
    }
}

struct Entries<'n> {
    entries: &'n [(String, Node)],
    next: usize,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, _)) = self.entries.get(self.next) else { return Ok(None) };
        let name: StrDeserializer<'_, Fault> = key.as_str().into_deserializer();
        seed.deserialize(name).map(Some).map_err(|fault| fault.inside(Step::Key(key.clone())))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let (key, node) = self.entries.get(self.next).expect("invariant: serde asks for a value after a key");
        self.next += 1;
        seed.deserialize(Reader(node)).map_err(|fault| fault.inside(Step::Key(key.clone())))
    }
}
