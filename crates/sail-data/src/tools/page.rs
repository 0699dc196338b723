//! A page of HTML that needs nothing but itself: no network, light and dark, readable on a phone.

use std::fmt::Write;

const STYLE: &str = include_str!("page.css");

/// The whole document around `body`.
pub(crate) fn document(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>{title}</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
}

/// Text as HTML, also inside a quoted attribute. Control characters become visible.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(character),
            _ => push_visible(&mut out, character),
        }
    }
    out
}

/// Text for a terminal: what a sample says must not steer it.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => out.push('\n'),
            _ => push_visible(&mut out, character),
        }
    }
    out
}

/// As [`printable`], on one line.
pub(crate) fn one_line(text: &str) -> String {
    printable(text).replace('\n', " ")
}

fn push_visible(out: &mut String, character: char) {
    // Besides control characters, those that turn the direction of the text around them.
    let turns =
        matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if character.is_control() || turns {
        let _ = write!(out, "\\u{{{:x}}}", u32::from(character));
    } else {
        out.push(character);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_samples_cannot_leave_its_place() {
        assert_eq!(escape("<a b='\"'>&\n\u{1b}"), "&lt;a b=&#39;&quot;&#39;&gt;&amp;\n\\u{1b}");
        assert_eq!(printable("\u{1b}[31mred\u{202e}\n"), "\\u{1b}[31mred\\u{202e}\n");
        assert_eq!(one_line("a\nb"), "a b");
        let page = document("<x>", "<p>body</p>\n");
        assert!(page.contains("<title>&lt;x&gt;</title>") && page.ends_with("</html>\n"));
        assert!(!page.contains("http"), "it must not ask the network for anything");
    }
}
