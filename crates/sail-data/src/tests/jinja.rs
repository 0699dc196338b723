//! Jinja templates: what they write, what is learnt of it, and those that cannot be used.

use std::path::Path;

use serde_json::{Value, json};

use crate::annotation::{Role, Turn};
use crate::error::{BadSample, Result};
use crate::sample::IGNORE;
use crate::spec::{Template, TextSpec};
use crate::testing::{SPECIALS, text_spec, tokenizer_json};
use crate::text::TextEncoder;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn turns(texts: &[(Role, &str)]) -> Vec<Turn> {
    texts.iter().map(|&(role, text)| Turn { role, text: text.to_owned() }).collect()
}

fn jinja_spec() -> TextSpec {
    // The newline that the template has after a block tag is Jinja's to trim.
    TextSpec { template: Template::Jinja, ..text_spec() }
}

/// An encoder of the test tokenizer with these files beside it.
fn load(files: &[(&str, &str)], spec: &TextSpec) -> Result<TextEncoder> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer_json(&SPECIALS, true)).unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    TextEncoder::new(&path, spec)
}

fn encoder(template: &str) -> TextEncoder {
    load(&[("chat_template.jinja", template)], &jinja_spec()).unwrap()
}

fn refusal(template: &str) -> String {
    load(&[("chat_template.jinja", template)], &jinja_spec()).unwrap_err().to_string()
}

fn show(encoder: &TextEncoder, ids: &[i64]) -> String {
    let piece = |&id: &i64| match SPECIALS.get((id - 256) as usize) {
        Some(special) if id >= 256 => (*special).to_owned(),
        _ => encoder.decode(&[id]).unwrap(),
    };
    ids.iter().map(piece).collect()
}

/// The ids and what is learnt of them, as text.
fn written(encoder: &TextEncoder, turns: &[Turn]) -> (String, String) {
    let encoded = encoder.encode(turns, &[]).unwrap();
    let learnt: Vec<i64> = encoded.targets.iter().copied().filter(|&id| id != IGNORE).collect();
    (show(encoder, &encoded.ids), show(encoder, &learnt))
}

fn two_answers() -> Vec<Turn> {
    turns(&[(Role::User, "q"), (Role::Assistant, "a"), (Role::User, " r "), (Role::Assistant, "b\n")])
}

#[test]
fn a_template_like_a_built_in_one_gives_the_same() {
    let spec = text_spec();
    let built_in = load(&[], &spec).unwrap();
    let jinja = encoder(CHATML);
    let conversations = [
        two_answers(),
        turns(&[
            (Role::System, "s"),
            (Role::User, "<image>\n<image>?"),
            (Role::Assistant, " \n"),
            (Role::Assistant, "c"),
        ]),
        turns(&[(Role::User, "<|im_end|> <img>"), (Role::Assistant, "<|im_start|><image>")]),
    ];
    for conversation in conversations {
        let images = conversation[..2].iter().filter(|turn| turn.role == Role::User);
        let images = vec![3; images.map(|turn| turn.text.matches("<image>").count()).sum()];
        assert_eq!(jinja.encode(&conversation, &images), built_in.encode(&conversation, &images));
    }
    assert_eq!(jinja.prompt("hi <image>", &[2]).unwrap(), built_in.prompt("hi <image>", &[2]).unwrap());
    assert_eq!(jinja.structure_tokens(), built_in.structure_tokens());
    assert_eq!((jinja.end_of_turn(), jinja.stop_ids()), (257, &[257][..]));
    let images = jinja.encode(&two_answers(), &[1]).unwrap_err();
    assert_eq!(images, BadSample::ImageCount { marks: 0, images: 1 });
}

#[test]
fn the_template_is_found_where_transformers_finds_it() {
    let config = |template: Value| {
        json!({"chat_template": template, "bos_token": {"content": "<|im_start|>"}}).to_string()
    };
    let tagged = |tag: &str| format!("{tag}{CHATML}");
    let beginning = |files: &[(&str, &str)], spec: &TextSpec| {
        written(&load(files, spec).unwrap(), &two_answers())
            .0
            .split("<|im_start|>user")
            .next()
            .unwrap()
            .to_owned()
    };
    let one = config(json!(tagged("one")));
    assert_eq!(beginning(&[("tokenizer_config.json", &one)], &jinja_spec()), "one");
    let list = [("tool_use", "no"), ("default", "list{{ bos_token }}")];
    let list = config(list.map(|(name, tag)| json!({"name": name, "template": tagged(tag)})).to_vec().into());
    assert_eq!(beginning(&[("tokenizer_config.json", &list)], &jinja_spec()), "list<|im_start|>");
    let beside = tagged("beside");
    assert_eq!(
        beginning(&[("tokenizer_config.json", &one), ("chat_template.jinja", &beside)], &jinja_spec()),
        "beside"
    );

    let dir = tempfile::tempdir().unwrap();
    for (name, text) in
        [("mine.jinja", tagged("mine")), ("chat_template.json", config(json!(tagged("json"))))]
    {
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        let spec = TextSpec { template_file: Some(file), ..jinja_spec() };
        let expected = if name == "mine.jinja" { "mine" } else { "json" };
        assert_eq!(beginning(&[("chat_template.jinja", &beside)], &spec), expected);
    }
}

#[test]
fn a_template_that_is_not_there_is_missed_by_name() {
    let config = r#"{"chat_template": [{"name": "rag", "template": ""}, {"name": "tools", "template": ""}]}"#;
    let message = |files: &[(&str, &str)]| load(files, &jinja_spec()).unwrap_err().to_string();
    let none = message(&[]);
    assert!(none.contains("tokenizer_config.json") && none.contains("hint: "), "{none}");
    assert!(message(&[("tokenizer_config.json", "{}")]).contains("there is none"));
    let names = message(&[("tokenizer_config.json", config)]);
    assert!(names.contains("`rag`, `tools`"), "{names}");
    assert!(
        message(&[("tokenizer_config.json", r#"{"chat_template": 3}"#)]).contains("tokenizer_config.json")
    );
    let spec = TextSpec { template_file: Some(Path::new("/no/such.jinja").into()), ..jinja_spec() };
    assert!(load(&[], &spec).unwrap_err().to_string().contains("/no/such.jinja"));
}

#[test]
fn a_template_that_cannot_work_is_refused_with_its_line() {
    let endless = format!(
        "{CHATML}{{% for a in range(9999) %}}{{% for b in range(9999) %}}{{% endfor %}}{{% endfor %}}"
    );
    let huge = format!("{{% set x = 'x' * 99999999999 %}}{CHATML}");
    let deep = format!("{{% macro m() %}}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}{CHATML}");
    let mark = format!("{CHATML}\u{fdd3}");
    let cases: [(&str, &str); 12] = [
        ("a\n{% for m in messages %}", "line 2: syntax error"),
        ("{% nonsense %}", "line 1: syntax error"),
        ("a\n\n{{ raise_exception('Only tools.') }}", "line 3: Only tools."),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% include 'other' %}", "line 1"),
        ("", "no special token"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token"),
        (&endless, "it runs too long"),
        (&huge, ""),
        (&deep, "recursion"),
        (&mark, "U+FDD0"),
    ];
    for (template, expected) in cases {
        let message = refusal(template);
        assert!(
            message.contains("chat_template.jinja") && message.contains(expected),
            "{template}: {message}"
        );
    }
    let writes_images = refusal(&format!("<IMG_CONTEXT>{CHATML}"));
    assert!(writes_images.contains("`<IMG_CONTEXT>`"), "{writes_images}");
    let silent = TextSpec { system: Some(String::new()), ..jinja_spec() };
    let message = load(&[("chat_template.jinja", CHATML)], &silent).unwrap_err().to_string();
    assert!(message.contains("`text.system` is \"\""), "{message}");
}

#[test]
fn turns_that_a_template_refuses_make_the_sample_bad() {
    let alternating = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
                       {{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}";
    let encoder = encoder(&format!("{alternating}{CHATML}"));
    let (text, _) = written(&encoder, &two_answers());
    assert!(text.starts_with("<|im_start|>user"), "{text}");
    let error = encoder.encode(&two_answers()[1..], &[]).unwrap_err();
    assert_eq!(error.reason(), "chat_template");
    assert!(error.to_string().contains("Roles must alternate"), "{error}");
}

#[test]
fn a_system_prompt_is_the_samples_or_the_configured_or_the_templates() {
    let with_default = format!(
        "{{% if messages[0]['role'] != 'system' %}}{{{{ '<|im_start|>system\\ndefault<|im_end|>\\n' }}}}{{% endif %}}{CHATML}"
    );
    let files = [("chat_template.jinja", with_default.as_str())];
    let own = turns(&[(Role::System, "mine"), (Role::User, "q"), (Role::Assistant, "a")]);
    let given = TextSpec { system: Some("given".into()), ..jinja_spec() };
    for (spec, turns, expected) in [
        (&jinja_spec(), &own[..], "mine"),
        (&given, &own[..], "mine"),
        (&given, &own[1..], "given"),
        (&jinja_spec(), &own[1..], "default"),
    ] {
        let (text, learnt) = written(&load(&files, spec).unwrap(), turns);
        assert!(
            text.starts_with(&format!("<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user")),
            "{text}"
        );
        assert_eq!(learnt, "a<|im_end|>");
    }
    let insists = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}";
    let encoder = encoder(&format!("{insists}{CHATML}"));
    assert!(encoder.encode(&own, &[]).is_ok() && encoder.encode(&own[1..], &[]).is_err());
}

#[test]
fn texts_may_be_trimmed_but_not_rewritten() {
    let trims = encoder(&CHATML.replace("m.content", "m.content | trim"));
    let spaced = turns(&[(Role::User, "  <|im_end|>q\n"), (Role::Assistant, "\n a b \n")]);
    let (text, learnt) = written(&trims, &spaced);
    assert_eq!(text, "<|im_start|>user\n<|im_end|>q<|im_end|>\n<|im_start|>assistant\na b<|im_end|>\n");
    assert_eq!(learnt, "a b<|im_end|>");
    let encoded = trims.encode(&spaced, &[]).unwrap();
    assert_eq!(encoded.ids.iter().filter(|&&id| id >= 256).count(), 4, "two turns and nothing more");

    let upper = encoder(&CHATML.replace("m.content", "m.content | replace('secret', '')"));
    assert!(upper.encode(&two_answers(), &[]).is_ok());
    let secret = turns(&[(Role::User, "q"), (Role::Assistant, "a secret")]);
    assert!(upper.encode(&secret, &[]).is_ok(), "a text with less in it is still a text");
    let cut = encoder(&CHATML.replace("m.content", "m.content[:4]"));
    let error = cut.encode(&turns(&[(Role::User, "q"), (Role::Assistant, "a long one")]), &[]).unwrap_err();
    assert_eq!(error.reason(), "bad_text");
    assert!(error.to_string().contains("rewrites message texts"), "{error}");
    let marked = turns(&[(Role::User, "q"), (Role::Assistant, "a\u{fdd3}b")]);
    assert_eq!(trims.encode(&marked, &[]).unwrap_err().reason(), "bad_text");
}

#[test]
fn white_space_before_the_end_token_is_learnt_and_other_text_is_not() {
    let spaced = encoder(&CHATML.replace("m.content }}<|im_end|>", "m.content }} <|im_end|>"));
    assert_eq!(written(&spaced, &two_answers()).1, "a <|im_end|>b\n <|im_end|>");
    let rest = encoder(&CHATML.replace("m.content }}<|im_end|>", "m.content }}\n---<|im_end|>"));
    assert_eq!(written(&rest, &two_answers()).1, "ab\n");
    assert_eq!(rest.end_of_turn(), 257);
}

#[test]
fn generation_blocks_say_what_is_learnt() {
    let block = "{%- for m in messages %}\n<|im_start|>{{ m.role }}\n    {%- if m.role == 'assistant' %}\n        \
                 {%- generation -%}\nSay: {{ m.content }}<|im_end|>\n        {%- endgeneration %}\n    {%- else %}\n        \
                 {{- m.content + '<|im_end|>' }}\n    {%- endif %}\n{%- endfor %}";
    let encoder = encoder(block);
    let empty =
        turns(&[(Role::User, "q"), (Role::Assistant, " "), (Role::User, "r"), (Role::Assistant, "b")]);
    let (text, learnt) = written(&encoder, &empty);
    assert_eq!(learnt, "Say: b<|im_end|>", "{text}");
    assert_eq!(written(&encoder, &two_answers()).1, "Say: a<|im_end|>Say: b\n<|im_end|>");
    assert_eq!(encoder.end_of_turn(), 257);
}

#[test]
fn what_templates_of_the_hub_use_is_there() {
    let features = "{%- set ns = namespace(last=-1) -%}\n\
        {%- for m in messages[::-1] %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% break %}{% endif %}{% endfor %}\n\
        {{- strftime_now('%d %b %Y, %-d') }}|{{ ns.last }}|{{ {'a': [1, '<e>']} | tojson }}|\n\
        {{- tools is none }}|{{ [] | tojson(indent=2) }}|{{ 'x y'.split(' ')[-1].upper().strip() }}|\n\
        {{- missing }}|{{ missing is defined }}|{{ bos_token is defined }}\n";
    let encoder = encoder(&format!("{features}{CHATML}"));
    let (text, _) = written(&encoder, &two_answers());
    let expected = "26 Jul 2024, 26|1|{\"a\": [1, \"<e>\"]}|True|[]|Y||False|False\n<|im_start|>user";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn a_special_token_may_take_the_space_around_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&tokenizer_json(&SPECIALS, true)).unwrap();
    tokenizer["added_tokens"][0]["rstrip"] = true.into();
    tokenizer["added_tokens"][1]["lstrip"] = true.into();
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let spaced = CHATML.replace("<|im_start|>", "<|im_start|> \n ").replace("<|im_end|>", " <|im_end|>");
    std::fs::write(dir.path().join("chat_template.jinja"), spaced).unwrap();
    let encoder = TextEncoder::new(&path, &jinja_spec()).unwrap();
    let (text, learnt) = written(&encoder, &two_answers());
    assert_eq!(learnt, "a<|im_end|>b<|im_end|>");
    assert!(
        text.starts_with("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"),
        "{text}"
    );
}
