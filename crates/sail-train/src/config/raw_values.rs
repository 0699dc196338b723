//! Fields that may be written in two ways.

use std::fmt;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Unexpected, Visitor};

use super::raw::RawRates;

/// `frozen`, or rates.
#[derive(Debug)]
pub(super) enum RawModule {
    /// The word.
    Frozen,
    /// `{ lr, weight_decay }`
    Train(RawRates),
}

impl<'de> Deserialize<'de> for RawModule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl<'de> Visitor<'de> for Words {
            type Value = RawModule;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`frozen` or `{ lr: RATE }`")
            }

            fn visit_str<E: Error>(self, word: &str) -> Result<RawModule, E> {
                match word {
                    "frozen" => Ok(RawModule::Frozen),
                    _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawModule, A::Error> {
                RawRates::deserialize(MapAccessDeserializer::new(map)).map(RawModule::Train)
            }
        }

        deserializer.deserialize_any(Words)
    }
}

/// A number of steps, or a share of them.
#[derive(Clone, Copy, Debug)]
pub(super) enum RawWarmup {
    /// `5`
    Steps(u64),
    /// `10%`
    Percent(f64),
}

impl<'de> Deserialize<'de> for RawWarmup {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl Visitor<'_> for Words {
            type Value = RawWarmup;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("steps like `5` or a share of them like `10%`")
            }

            fn visit_u64<E: Error>(self, steps: u64) -> Result<RawWarmup, E> {
                Ok(RawWarmup::Steps(steps))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RawWarmup, E> {
                let percent = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
                match percent {
                    Some(percent) if percent.is_finite() => Ok(RawWarmup::Percent(percent)),
                    _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(Words)
    }
}

/// One path, or a list of them.
#[derive(Debug)]
pub(super) struct RawShards(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for RawShards {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl<'de> Visitor<'de> for Words {
            type Value = RawShards;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path or a list of paths")
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<RawShards, E> {
                Ok(RawShards(vec![path.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<RawShards, A::Error> {
                let mut paths = Vec::new();
                while let Some(path) = items.next_element()? {
                    paths.push(path);
                }
                Ok(RawShards(paths))
            }
        }

        deserializer.deserialize_any(Words)
    }
}
