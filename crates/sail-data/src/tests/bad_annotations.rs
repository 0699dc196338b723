//! Annotations of every kind of damage: each is skipped for its reason, and the samples around it are read. Those
//! that only look strange are read, too.

use crate::error::BadSample;
use crate::testing::{outcomes_of, tar, text_sample};

/// Annotations that cannot be understood, and the reason.
fn bad_annotations() -> Vec<(&'static str, Vec<u8>)> {
    let of = |turns: &str| format!("{{\"conversations\": {turns}}}").into_bytes();
    let deep = "[".repeat(100_000);
    let mut broken_text = text_sample("q", "a?").into_bytes();
    let at = broken_text.iter().position(|&byte| byte == b'?').unwrap();
    broken_text[at] = 0xff;
    vec![
        ("bad_json", of("[")),
        ("bad_json", "\u{feff}{}".into()),
        ("bad_json", vec![]),
        ("bad_json", vec![0; 40]),
        ("bad_json", broken_text),
        ("bad_json", of("NaN")),
        ("bad_json", of("null")),
        ("bad_json", of("7")),
        ("bad_json", of("1e400")),
        ("bad_json", of("[null]")),
        ("bad_json", of(&deep)),
        ("bad_json", deep.clone().into_bytes()),
        ("bad_json", format!("{{\"image\": {deep}").into_bytes()),
        ("bad_json", format!("{{\"messages\": [{{\"role\": \"user\", \"content\": {deep}").into_bytes()),
        ("bad_json", of(r#"[{"from": "human", "value": 7}]"#)),
        ("bad_json", of(r#"[{"from": "human", "value": null}]"#)),
        ("bad_json", of(r#"[{"from": null, "value": "x"}]"#)),
        ("bad_json", of(r#"[{"from": "gpt", "from": "human", "value": "x"}]"#)),
        ("bad_json", of(r#"[], "conversations": []"#)),
        ("bad_json", of(r#"[{"from": "gpt", "value": "\ud800"}]"#)),
        ("bad_json", of("[{\"from\": \"gpt\", \"value\": \"\n\"}]")),
        ("bad_json", of(r#"[{"from": "gpt", "value": "x"}]} trailing {"#)),
        ("bad_json", b"'conversations': []".to_vec()),
        ("bad_json", br#"{"messages": [{"role": "assistant", "content": null}]}"#.to_vec()),
        ("no_answer", of("[]")),
        ("no_answer", of(r#"[{"from": "system", "value": "x"}]"#)),
        ("no_answer", of(r#"[{"from": "human", "value": "x"}]"#)),
        ("no_answer", of(r#"[{"from": "gpt", "value": " \t"}]"#)),
        ("no_answer", br#"{"messages": [{"role": "assistant", "content": []}]}"#.to_vec()),
        ("bad_turns", of(r#"[{"from": "", "value": "x"}]"#)),
        ("bad_turns", of(r#"[{"from": "gpt", "value": "x"}, {"from": "system", "value": "x"}]"#)),
        ("image_count", of(r#"[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]"#)),
        ("video_count", of(r#"[{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}]"#)),
        (
            "unknown_image",
            of(r#"[{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}], "image": "/etc/passwd""#),
        ),
        (
            "unknown_image",
            of(r#"[{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}], "image": "../a.png""#),
        ),
    ]
}

/// Annotations that look strange and are fine.
fn strange_annotations() -> Vec<Vec<u8>> {
    let with = |field: &str| text_sample("q", "a").replacen('{', &format!("{{{field}, "), 1).into_bytes();
    let deep = format!("\"deep\": {}{}", "[".repeat(100_000), "]".repeat(100_000));
    vec![
        with("\"id\": 7"),
        with("\"id\": null"),
        with("\"id\": {\"a\": [1]}"),
        with("\"score\": 1e400"),
        with(&format!("\"number\": {}", "9".repeat(100_000))),
        with("\"twice\": 1, \"twice\": 2"),
        with(&deep),
        format!("\u{feff}{}", text_sample("q", "a")).into_bytes(),
        format!(" \r\n{}\n", text_sample("q", "a")).into_bytes(),
        text_sample("q", "<|im_end|>").into_bytes(),
        text_sample("<|im_start|>system\n<img>", "</img><IMG_CONTEXT>").into_bytes(),
        text_sample("\0\u{202e}\u{fffd}", "\0").into_bytes(),
        text_sample("", "a").into_bytes(),
        text_sample("q", "<image>").into_bytes(),
    ]
}

#[test]
fn every_annotation_that_cannot_be_understood_has_its_reason_and_its_neighbours_survive() {
    let bad = bad_annotations();
    let sample = |(index, json): (usize, &Vec<u8>)| {
        [
            [(format!("before{index}.json"), text_sample("q", "a").into_bytes())],
            [(format!("bad{index}.json"), json.clone())],
        ]
    };
    let members: Vec<_> = bad.iter().map(|(_, json)| json).enumerate().flat_map(sample).flatten().collect();
    let found = outcomes_of("a.tar", &tar(&members)).unwrap();
    assert_eq!(found.len(), 2 * bad.len());
    for (pair, (reason, json)) in found.chunks(2).zip(&bad) {
        assert!(pair[0].1.is_ok());
        let shown = String::from_utf8_lossy(&json[..json.len().min(100)]);
        assert_eq!(pair[1].1.as_ref().map_err(BadSample::reason).err(), Some(*reason), "{shown}");
    }
}

#[test]
fn strange_annotations_are_read() {
    for json in strange_annotations() {
        let found = outcomes_of("a.tar", &tar(&[("a.json", &json)])).unwrap().remove(0).1;
        let shown = String::from_utf8_lossy(&json[..json.len().min(100)]);
        assert!(found.is_ok(), "{shown}: {}", found.unwrap_err());
    }
}

#[test]
fn ten_megabytes_of_text_are_too_long_and_harm_nobody() {
    let text = text_sample("q", &"word ".repeat(2 << 20));
    let members = [("a.json", text_sample("q", "a")), ("b.json", text), ("c.json", text_sample("q", "a"))];
    let found = outcomes_of("a.tar", &tar(&members)).unwrap();
    let reasons: Vec<_> =
        found.iter().map(|(_, outcome)| outcome.as_ref().err().map(BadSample::reason)).collect();
    assert_eq!(reasons, [None, Some("too_long"), None]);
}
