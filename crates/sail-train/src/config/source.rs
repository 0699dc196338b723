//! Text to [`Node`]: YAML files, the files they extend, and the values of `--set`.
//!
//! One YAML document, core-schema scalars, no anchors, no tags. Knows nothing about the fields.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput};

use super::error::{ConfigError, Origin, Problem, hint_for};
use super::path::{FieldPath, Step};
use super::tree::{Content, Node};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 32;

/// Where a file is named: the field, and where that was written.
pub(super) type NamedAt = (FieldPath, Origin);

/// Reads a file and what it `extends`; faults are added to `errors`.
/// `None` when the file or one it builds on could not be read.
pub(super) fn read_file(path: &Path, named_at: NamedAt, errors: &mut Vec<ConfigError>) -> Option<Node> {
    read_chain(path, named_at, &mut Vec::new(), errors)
}

/// `chain` holds the files that extend this one.
fn read_chain(
    path: &Path,
    named_at: NamedAt,
    chain: &mut Vec<PathBuf>,
    errors: &mut Vec<ConfigError>,
) -> Option<Node> {
    let identity = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if chain.contains(&identity) {
        let problem = Problem::Invalid(format!("`{}` extends itself", path.display()));
        errors.push(fault(named_at.0, named_at.1, problem));
        return None;
    }
    chain.push(identity);
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            let problem = Problem::Unreadable { file: path.to_owned(), reason: error.to_string() };
            errors.push(fault(named_at.0, named_at.1, problem));
            return None;
        }
    };
    let mut root = parse(&text, |line, column| Origin::Line { file: path.to_owned(), line, column }, errors)?;
    let Some(extends) = root.take("extends") else { return Some(root) };
    let at = FieldPath(vec![Step::Key("extends".to_owned())]);
    let Content::Text(base) = &extends.content else {
        errors.push(fault(at, extends.origin, Problem::Invalid("must be the path of one file".to_owned())));
        return None;
    };
    let mut below = read_chain(&sibling(path, base), (at, extends.origin), chain, errors)?;
    below.overlay(root);
    Some(below)
}

/// A path that is written in `file`, relative to the folder of it.
pub(super) fn sibling(file: &Path, written: impl AsRef<Path>) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(written)
}

/// Reads one `--set path=value`; the value is YAML.
///
/// # Errors
/// The faults of the text.
pub(super) fn read_set(text: &str) -> Result<(FieldPath, Node), Vec<ConfigError>> {
    let origin = Origin::Set(text.to_owned());
    let invalid = |reason: String| {
        vec![fault(FieldPath::default(), Origin::Set(text.to_owned()), Problem::Invalid(reason))]
    };
    let (path, value) = text
        .split_once('=')
        .ok_or_else(|| invalid("expected `path=value`, as in `train.projector.lr=1e-3`".to_owned()))?;
    let path = FieldPath::parse(path.trim()).map_err(invalid)?;
    let mut errors = Vec::new();
    let node = parse(value, |_, _| origin.clone(), &mut errors);
    match node {
        Some(node) if errors.is_empty() => Ok((path, node)),
        _ => {
            for error in &mut errors {
                error.path = path.clone();
            }
            Err(errors)
        }
    }
}

fn fault(path: FieldPath, origin: Origin, problem: Problem) -> ConfigError {
    let hint = hint_for(&problem, path.name());
    ConfigError { path, origin, problem, hint }
}

/// Reads one YAML document; an empty text is null. `None` when the text is not YAML.
fn parse(text: &str, origin: impl Fn(usize, usize) -> Origin, errors: &mut Vec<ConfigError>) -> Option<Node> {
    let mut builder =
        Builder { parser: Parser::new_from_str(text), origin, errors, path: FieldPath::default() };
    match builder.document() {
        Ok(node) => Some(node),
        Err(stop) => {
            let mark = stop.marker();
            let problem = Problem::Syntax { column: mark.col() + 1, reason: stop.info().to_owned() };
            let at = (builder.origin)(mark.line(), mark.col() + 1);
            builder.errors.push(fault(FieldPath::default(), at, problem));
            None
        }
    }
}

/// Turns the parser's events into a tree. Faults that leave the rest readable are noted and passed over.
struct Builder<'t, 'e, F> {
    parser: Parser<'t, StrInput<'t>>,
    origin: F,
    errors: &'e mut Vec<ConfigError>,
    path: FieldPath,
}

impl<'t, F: Fn(usize, usize) -> Origin> Builder<'t, '_, F> {
    fn next(&mut self) -> Result<(Event<'t>, Span), ScanError> {
        self.parser.next_event().unwrap_or_else(|| {
            let start = saphyr_parser::Marker::default();
            Ok((Event::StreamEnd, Span::empty(start)))
        })
    }

    fn at(&self, span: Span) -> Origin {
        (self.origin)(span.start.line(), span.start.col() + 1)
    }

    fn note(&mut self, span: Span, problem: Problem) {
        let error = fault(self.path.clone(), self.at(span), problem);
        self.errors.push(error);
    }

    fn document(&mut self) -> Result<Node, ScanError> {
        let mut root: Option<Node> = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => {
                    let empty = || Node { origin: (self.origin)(1, 1), content: Content::Null };
                    return Ok(root.unwrap_or_else(empty));
                }
                Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
                other if root.is_none() => root = Some(self.node(other, span, 0)?),
                other => {
                    self.note(span, Problem::Unsupported { what: "several documents" });
                    self.node(other, span, 0)?;
                }
            }
        }
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, ScanError> {
        if depth > MAX_DEPTH {
            return Err(ScanError::new_str(span.start, "nested too deeply"));
        }
        let (Event::Scalar(_, _, anchor, ref tag)
        | Event::SequenceStart(anchor, ref tag)
        | Event::MappingStart(anchor, ref tag)) = event
        else {
            self.note(span, Problem::Unsupported { what: "anchors and aliases" });
            return Ok(Node { origin: self.at(span), content: Content::Null });
        };
        if anchor > 0 {
            self.note(span, Problem::Unsupported { what: "anchors and aliases" });
        }
        if tag.is_some() {
            self.note(span, Problem::Unsupported { what: "tags" });
        }
        let content = match event {
            Event::Scalar(text, ScalarStyle::Plain, ..) => self.plain(&text, span),
            Event::Scalar(text, ..) => Content::Text(text.into_owned()),
            Event::SequenceStart(..) => self.list(depth)?,
            _ => self.map(depth)?,
        };
        Ok(Node { origin: self.at(span), content })
    }

    fn list(&mut self, depth: usize) -> Result<Content, ScanError> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(Content::List(items));
            }
            self.path.0.push(Step::Index(items.len()));
            items.push(self.node(event, span, depth + 1)?);
            self.path.0.pop();
        }
    }

    fn map(&mut self, depth: usize) -> Result<Content, ScanError> {
        let mut entries = Vec::new();
        let mut lines: HashMap<String, usize> = HashMap::new();
        loop {
            let (event, key_span) = self.next()?;
            if event == Event::MappingEnd {
                return Ok(Content::Map(entries));
            }
            let Event::Scalar(key, ..) = event else {
                return Err(ScanError::new_str(key_span.start, "a key must be a plain name"));
            };
            let key = key.into_owned();
            self.path.0.push(Step::Key(key.clone()));
            let (event, span) = self.next()?;
            let mut value = self.node(event, span, depth + 1)?;
            value.origin = self.at(key_span);
            if let Some(&first_line) = lines.get(&key) {
                self.note(key_span, Problem::Repeated { first_line });
            } else {
                lines.insert(key.clone(), key_span.start.line());
                entries.push((key, value));
            }
            self.path.0.pop();
        }
    }

    /// A scalar without quotes, by the rules of YAML 1.2's core schema (section 10.3.2), where `0x` and `0o` are text.
    fn plain(&mut self, text: &str, span: Span) -> Content {
        match text {
            "" | "~" | "null" | "Null" | "NULL" => return Content::Null,
            "true" | "True" | "TRUE" => return Content::Bool(true),
            "false" | "False" | "FALSE" => return Content::Bool(false),
            _ => {}
        }
        let float_word = text.trim_start_matches(['+', '-']).to_ascii_lowercase();
        let looks_like_number = text.contains(|letter: char| letter.is_ascii_digit())
            && text.chars().all(|letter| letter.is_ascii_digit() || "+-.eE".contains(letter));
        if let Ok(int) = text.parse::<i64>() {
            Content::Int(int)
        } else if let Ok(uint) = text.parse::<u64>() {
            Content::Uint(uint)
        } else if float_word == ".inf" || float_word == ".nan" {
            self.note(span, Problem::Invalid(format!("`{text}` is not a finite number")));
            Content::Null
        } else {
            match text.parse::<f64>() {
                Ok(float) if looks_like_number && float.is_finite() => Content::Float(float),
                _ => Content::Text(text.to_owned()),
            }
        }
    }
}
