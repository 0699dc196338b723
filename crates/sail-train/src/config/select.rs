//! Parts of a model by name, as `train.rules` and `train.unfreeze` write them.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use glob::Pattern;
use serde::{Deserialize, Serialize};

use super::values::Module;

/// A part of the model: a module (`llm`), some of its blocks (`vision.blocks[12..24]`, `llm.blocks[20..]`,
/// `llm.blocks[0]`), or its parameters whose full name is like a pattern (`vision.*.norm.*`; `*` stands for any
/// characters).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selector {
    text: String,
    /// What it is a part of.
    pub module: Module,
    part: Part,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    All,
    /// From 0; open where the end is `usize::MAX`.
    Blocks(Range<usize>),
    Names(Pattern),
}

impl Selector {
    /// Whether it names a parameter of `module` that lies in `block`, if in one.
    pub fn matches(&self, name: &str, module: Module, block: Option<usize>) -> bool {
        module == self.module
            && match &self.part {
                Part::All => true,
                Part::Blocks(range) => block.is_some_and(|block| range.contains(&block)),
                Part::Names(pattern) => pattern.matches(name),
            }
    }

    /// The first block that it names and a module with so many does not have.
    pub fn missing_block(&self, blocks: usize) -> Option<usize> {
        let Part::Blocks(range) = &self.part else { return None };
        let last = if range.end == usize::MAX { range.start } else { range.end - 1 };
        (last >= blocks).then_some(range.start.max(blocks))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, rest) = text.split_once('.').map_or((text, None), |(word, rest)| (word, Some(rest)));
        let module = Module::ALL.into_iter().find(|module| module.name() == word);
        let module = module.ok_or_else(|| {
            format!("`{text}` does not begin with `vision`, `projector` or `llm` and a dot")
        })?;
        let blocks = rest.and_then(|rest| rest.strip_prefix("blocks["));
        let part = match (rest, blocks) {
            (None, _) => Part::All,
            (Some(_), Some(_)) if module == Module::Projector => {
                return Err(format!("`{text}`: the projector has no blocks"));
            }
            (Some(_), Some(range)) => Part::Blocks(blocks_of(text, range)?),
            (Some(""), None) => return Err(format!("`{text}` ends with a dot")),
            (Some(_), None) => {
                let pattern = Pattern::new(text).map_err(|error| format!("`{text}`: {}", error.msg))?;
                Part::Names(pattern)
            }
        };
        Ok(Self { text: text.to_owned(), module, part })
    }
}

/// `12..24]`, `12..]`, `..24]` or `12]`.
fn blocks_of(text: &str, range: &str) -> Result<Range<usize>, String> {
    let malformed = || format!("`{text}`: blocks are written `blocks[0..12]`, `blocks[12..]` or `blocks[3]`");
    let inner = range.strip_suffix(']').ok_or_else(malformed)?;
    let number = |text: &str, empty| match text {
        "" => Ok(empty),
        text => text.parse::<usize>().map_err(|_| malformed()),
    };
    let range = if let Some((start, end)) = inner.split_once("..") {
        number(start, 0)?..number(end, usize::MAX)?
    } else {
        let block = inner.parse::<usize>().ok().filter(|block| *block < usize::MAX).ok_or_else(malformed)?;
        block..block + 1
    };
    if range.is_empty() { Err(format!("`{text}` names no block")) } else { Ok(range) }
}

impl TryFrom<String> for Selector {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(text: &str) -> Selector {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_matched() {
        let norm = "vision.encoder.layers.3.norm1.weight";
        for (text, expected) in [
            ("vision", true),
            ("llm", false),
            ("vision.blocks[3]", true),
            ("vision.blocks[..4]", true),
            ("vision.blocks[4..]", false),
            ("vision.blocks[0..3]", false),
            ("llm.blocks[3]", false),
            ("vision.*norm*", true),
            ("vision.encoder.layers.3.*", true),
            ("vision.encoder.layers.?.norm?.weight", true),
            ("vision.norm", false),
        ] {
            assert_eq!(selector(text).matches(norm, Module::Vision, Some(3)), expected, "{text}");
            assert_eq!(selector(text).to_string(), text);
        }
        assert!(!selector("vision.blocks[..]").matches("vision.embeddings.x", Module::Vision, None));
    }

    #[test]
    fn blocks_that_are_not_there() {
        let missing = |text: &str| selector(text).missing_block(12);
        assert_eq!([missing("llm.blocks[..12]"), missing("llm.blocks[11..]"), missing("llm")], [None; 3]);
        assert_eq!(missing("llm.blocks[10..14]"), Some(12));
        assert_eq!(missing("llm.blocks[20..]"), Some(20));
        assert_eq!(missing("llm.blocks[12]"), Some(12));
    }

    #[test]
    fn what_is_no_part_of_a_model() {
        for (text, said) in [
            ("", "does not begin with"),
            ("vit.blocks[0]", "does not begin with"),
            ("llm.", "ends with a dot"),
            ("llm.blocks[3..3]", "names no block"),
            ("llm.blocks[5..2]", "names no block"),
            ("llm.blocks[a]", "blocks are written"),
            ("llm.blocks[1", "blocks are written"),
            ("llm.blocks[-1]", "blocks are written"),
            ("llm.blocks[1].mlp", "blocks are written"),
            ("projector.blocks[0]", "has no blocks"),
            ("llm.[a", "invalid range pattern"),
        ] {
            let error = text.parse::<Selector>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
