//! The JSON Schema of a configuration file, for editors: from the same types and comments that reading goes by.
//!
//! What types alone say: names, words, kinds of values. Values that do not fit together are [`super::load`]'s matter.

use std::borrow::Cow;
use std::fmt;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use serde_json::{Value, json};

use super::raw::{RawCurriculum, RawRun};
use super::raw_train::RawRates;
use super::raw_values::{RawAmount, RawList, RawModule};
use super::select::Selector;
use super::values::Module;

/// The schema of stage and curriculum files (JSON Schema, draft 2020-12).
pub fn schema() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let stage = generator.subschema_for::<RawRun>();
    let curriculum = generator.subschema_for::<RawCurriculum>();
    let mut defs = generator.take_definitions(true);
    for properties in defs.values_mut().filter_map(|form| form.get_mut("properties")?.as_object_mut()) {
        for section in properties.values_mut().filter(|property| property.get("$ref").is_some()) {
            // A section without anything in it, or one that takes back what a file inherits.
            let form = section.as_object_mut().and_then(|section| section.remove("$ref"));
            section["anyOf"] = json!([{ "$ref": form }, { "type": "null" }]);
        }
    }
    for form in ["RawRun", "RawCurriculum"] {
        if let Some(properties) = defs.get_mut(form).and_then(|form| form.get_mut("properties")) {
            properties["extends"] = json!({
                "type": "string",
                "description": "A file whose values come first, relative to this one; mappings are merged key by key.",
            });
        }
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A stage or a curriculum of sail-train",
        "type": "object",
        "if": { "required": ["stages"] },
        "then": curriculum,
        "else": stage,
        "$defs": defs,
    })
}

/// The words of a type that is read from one of them.
pub(super) fn words<'de, T: Deserialize<'de>>(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "enum": variants::<T>() })
}

/// The same, where there may be none.
pub(super) fn words_or_null<'de, T: Deserialize<'de>>(_: &mut SchemaGenerator) -> Schema {
    let words = variants::<T>().iter().map(|word| json!(word)).chain([Value::Null]);
    json_schema!({ "enum": words.collect::<Vec<_>>() })
}

/// What serde expects for an enum.
fn variants<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    match T::deserialize(Asked) {
        Err(Answer(Some(variants))) => variants,
        _ => unreachable!("invariant: used for enums of words alone"),
    }
}

/// A deserializer that gives no value and remembers which words it was asked for.
struct Asked;

#[derive(Debug)]
struct Answer(Option<&'static [&'static str]>);

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no value")
    }
}

impl std::error::Error for Answer {}

impl de::Error for Answer {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self(None)
    }
}

impl<'de> Deserializer<'de> for Asked {
    type Error = Answer;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Answer> {
        Err(Answer(None))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Answer> {
        Err(Answer(Some(variants)))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl JsonSchema for Module {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Module".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        words::<Self>(generator)
    }
}

impl JsonSchema for Selector {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Selector".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": r"^(vision|projector|llm)(\..+)?$" })
    }
}

impl JsonSchema for RawModule {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "RawModule".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let rates = generator.subschema_for::<RawRates>();
        json_schema!({ "anyOf": [{ "const": "frozen" }, rates] })
    }
}

impl JsonSchema for RawAmount {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "RawAmount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let text = r"^([0-9][0-9_]*\s*tokens|[0-9]+(\.[0-9]+)?([eE][+]?[0-9]+)?\s*(tokens|%))$";
        json_schema!({ "anyOf": [{ "type": "integer", "minimum": 0 }, { "type": "string", "pattern": text }] })
    }
}

impl<T: JsonSchema> JsonSchema for RawList<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("RawList_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = generator.subschema_for::<T>();
        json_schema!({ "anyOf": [one, { "type": "array", "items": one }] })
    }
}
