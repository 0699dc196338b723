//! Fields that may be written in two ways.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};

use super::raw_train::RawRates;
use super::values::{tokens, whole};

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

/// A number of steps, of tokens, or a share of the stage.
#[derive(Clone, Copy, Debug)]
pub(super) enum RawAmount {
    /// `5`, of what the context counts
    Count(u64),
    /// `2e9 tokens`
    Tokens(u64),
    /// `10%`
    Percent(f64),
}

impl<'de> Deserialize<'de> for RawAmount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;

        impl Visitor<'_> for Words {
            type Value = RawAmount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("steps like `5`, a share of the stage like `10%` or `2e9 tokens`")
            }

            fn visit_u64<E: Error>(self, count: u64) -> Result<RawAmount, E> {
                Ok(RawAmount::Count(count))
            }

            fn visit_f64<E: Error>(self, count: f64) -> Result<RawAmount, E> {
                // Large numbers are written as `2e9`.
                let whole = whole(count).ok_or_else(|| E::invalid_value(Unexpected::Float(count), &self))?;
                Ok(RawAmount::Count(whole))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RawAmount, E> {
                let percent = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
                match (percent, tokens(text)) {
                    (Some(percent), _) if percent.is_finite() => Ok(RawAmount::Percent(percent)),
                    (_, Some(count)) => Ok(RawAmount::Tokens(count)),
                    _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(Words)
    }
}

/// One, or a list of them.
#[derive(Debug)]
pub(super) struct RawList<T>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for RawList<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Words<T> {
            type Value = RawList<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text or a list of texts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<RawList<T>, E> {
                T::deserialize(text.into_deserializer()).map(|one| RawList(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<RawList<T>, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element()? {
                    all.push(item);
                }
                Ok(RawList(all))
            }
        }

        deserializer.deserialize_any(Words(PhantomData))
    }
}
