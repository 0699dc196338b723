//! Jinja as transformers sets it up for chat templates, and bounded: no template reads a file, and none runs for
//! long or writes without end. What differs from transformers is said at [`STRFTIME_DAY`] and [`Renderer::render`].

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};

use super::marks::{GENERATION_END, GENERATION_START};

/// Instructions of one rendering, and pieces of 64 bytes that it makes: about 128 MB and a fraction of a second.
/// A conversation of 100 turns takes some ten thousand.
const FUEL: u64 = 2_000_000;
const RECURSION: usize = 100;
const NAME: &str = "chat_template";
const GENERATION_FILTER: &str = "generation_block";
/// What `strftime_now` sees, the day on which templates that know no day fall back (Llama 3). What a stream gives
/// depends on its data and nothing else, least of all on the day of the run.
const STRFTIME_DAY: [(char, &str); 14] = [
    ('Y', "2024"),
    ('y', "24"),
    ('m', "07"),
    ('d', "26"),
    ('e', "26"),
    ('j', "208"),
    ('B', "July"),
    ('b', "Jul"),
    ('A', "Friday"),
    ('a', "Fri"),
    ('H', "00"),
    ('M', "00"),
    ('S', "00"),
    ('%', "%"),
];

/// A compiled template.
#[derive(Debug)]
pub(super) struct Renderer {
    environment: Environment<'static>,
    pub(super) bos_token: Option<String>,
    pub(super) eos_token: Option<String>,
    /// Whether it says itself with `{% generation %}` what is learnt.
    pub(super) has_generation: bool,
}

/// A message as templates see it.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) role: &'static str,
    pub(super) content: String,
}

impl Message {
    fn value(&self) -> Value {
        context! { role => self.role, content => self.content.as_str() }
    }
}

impl Renderer {
    /// # Errors
    /// What is wrong with the template, with its line.
    pub(super) fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| describe(&e))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_filter(GENERATION_FILTER, |body: String| {
            format!("{GENERATION_START}{body}{GENERATION_END}")
        });
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        let (source, has_generation) = without_generation_tags(source);
        environment.add_template_owned(NAME, source).map_err(|e| describe(&e))?;
        let owned = |token: Option<&str>| token.map(str::to_owned);
        Ok(Self { environment, bos_token: owned(bos), eos_token: owned(eos), has_generation })
    }

    /// The conversation as text; with `ask`, also the header of an answer to come.
    ///
    /// Templates of models that can reason are told with `enable_thinking` not to: answers come without reasoning.
    ///
    /// # Errors
    /// What the template says, with its line.
    pub(super) fn render(&self, messages: &[Message], ask: bool) -> Result<String, String> {
        let or_undefined = |token: &Option<String>| token.as_ref().map_or(Value::UNDEFINED, Value::from);
        let template = self.environment.get_template(NAME).map_err(|e| describe(&e))?;
        let context = context! {
            messages => messages.iter().map(Message::value).collect::<Vec<Value>>(),
            add_generation_prompt => ask,
            tools => (),
            documents => (),
            enable_thinking => false,
            bos_token => or_undefined(&self.bos_token),
            eos_token => or_undefined(&self.eos_token),
        };
        template.render(context).map_err(|e| describe(&e))
    }
}

fn describe(error: &Error) -> String {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("{line}it runs too long"),
        // The words of `raise_exception` stand for themselves.
        (ErrorKind::InvalidOperation, Some(detail)) => format!("{line}{detail}"),
        (kind, Some(detail)) => format!("{line}{kind}: {detail}"),
        (kind, None) => format!("{line}{kind}"),
    }
}

/// `{% generation %}` blocks as blocks of a filter, which are the same to Jinja's white space rules.
fn without_generation_tags(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let tag = &rest[at + 2..];
        let head = tag.len() - tag.trim_start_matches(['-', '+']).trim_start().len();
        let word_end = tag[head..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let word = &tag[head..head + word_end.unwrap_or(0)];
        let closes = tag[head + word.len()..].trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        let replacement = match word {
            "generation" if closes => format!("filter {GENERATION_FILTER}"),
            "endgeneration" if closes => "endfilter".to_owned(),
            _ => word.to_owned(),
        };
        found |= replacement != word;
        out.push_str(&rest[..at + 2 + head]);
        out.push_str(&replacement);
        rest = &tag[head + word.len()..];
    }
    out.push_str(rest);
    (out, found)
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next().unwrap_or_default();
        // `%-d`: without the leading zero.
        let (bare, directive) =
            if directive == '-' { (true, chars.next().unwrap_or_default()) } else { (false, directive) };
        let value = STRFTIME_DAY.iter().find(|(name, _)| *name == directive).map(|(_, value)| *value);
        let unknown =
            || Error::new(ErrorKind::InvalidOperation, format!("`strftime_now` has no `%{directive}`"));
        let value = value.ok_or_else(unknown)?;
        out.push_str(if bare { value.strip_prefix('0').unwrap_or(value) } else { value });
    }
    Ok(out)
}

/// As Python's `json.dumps` with `ensure_ascii=False`: a space after `,` and `:`, nothing escaped for HTML.
#[expect(clippy::needless_pass_by_value, reason = "filters get their options by value")]
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if ascii == Some(true) {
        return Err(failed(&"`tojson` cannot escape what is not ASCII"));
    }
    let mut bytes = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
    };
    written.map_err(|e| failed(&e))?;
    String::from_utf8(bytes).map_err(|e| failed(&e))
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
