//! Every layout from shard to turns, and what each refuses.

use image::ImageFormat;
use serde_json::{Value, json};

use crate::annotation::{Role, Turn};
use crate::error::BadSample;
use crate::spec::{DataSpec, Layout, PageChoice, SourceSpec};
use crate::testing::{Outcome, encode, gradient, outcomes, png, spec, tar};

type Members = Vec<(&'static str, Vec<u8>)>;

fn picture() -> Vec<u8> {
    png(&gradient(8, 8))
}

fn text(json: &Value) -> Vec<u8> {
    json.to_string().into_bytes()
}

/// What becomes of a sample `k` with these members, by suffix.
fn outcome_with(members: Members, epoch: u32, adjust: impl Fn(&mut DataSpec)) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar");
    let members: Vec<_> = members.into_iter().map(|(suffix, data)| (format!("d/k.{suffix}"), data)).collect();
    std::fs::write(&path, tar(&members)).unwrap();
    let mut spec = spec(&[&path.display().to_string()]);
    spec.tokens_per_pack = 2000;
    adjust(&mut spec);
    outcomes(&spec, epoch).unwrap().remove(0).1
}

fn outcome(layout: Layout, members: Members) -> Outcome {
    outcome_with(members, 0, |spec| spec.sources[0].layout = layout)
}

fn turns(outcome: Outcome) -> Vec<(Role, String)> {
    outcome.unwrap().turns.into_iter().map(|Turn { role, text }| (role, text)).collect()
}

fn user(text: &str) -> (Role, String) {
    (Role::User, text.into())
}

fn assistant(text: &str) -> (Role, String) {
    (Role::Assistant, text.into())
}

fn reason(outcome: Outcome) -> &'static str {
    outcome.map_or_else(|cause| cause.reason(), |sample| panic!("it is good: {:?}", sample.turns))
}

#[test]
fn a_caption_answers_a_question() {
    let default = [user("<image>\nDescribe this image."), assistant("A cat.")];
    let downloaded =
        json!({"caption": "A cat.", "status": "success", "url": "u", "error_message": null, "width": 8});
    for members in [
        vec![("jpg", picture()), ("txt", b"A cat.\n".to_vec())],
        vec![("jpg", picture()), ("txt", "\u{feff}A cat.".as_bytes().to_vec())],
        vec![("jpg", picture()), ("json", text(&downloaded))],
        vec![("jpg", picture()), ("txt", b" ".to_vec()), ("json", text(&downloaded))],
        vec![("webp", picture()), ("txt", b"A cat.".to_vec()), ("json", text(&json!({"caption": "other"})))],
    ] {
        assert_eq!(turns(outcome(Layout::Captions, members)), default);
    }
}

#[test]
fn what_is_no_image_with_a_caption_has_a_reason() {
    let failed = json!({"caption": "x", "status": "failed_to_download", "error_message": "404"});
    let cases: Vec<(&str, Members)> = vec![
        ("not_downloaded", vec![("json", text(&failed))]),
        ("not_downloaded", vec![("jpg", picture()), ("txt", b"x".to_vec()), ("json", text(&failed))]),
        ("no_image", vec![("txt", b"x".to_vec())]),
        ("no_image", vec![("json", text(&json!({"caption": "x", "status": "success"})))]),
        ("no_annotation", vec![("jpg", picture())]),
        ("no_annotation", vec![("jpg", picture()), ("json", text(&json!({"caption": null})))]),
        ("no_answer", vec![("jpg", picture()), ("txt", b" \n".to_vec())]),
        ("no_answer", vec![("jpg", picture()), ("json", text(&json!({"caption": ""})))]),
        ("bad_json", vec![("jpg", picture()), ("json", text(&json!({"caption": 7})))]),
        ("bad_json", vec![("jpg", picture()), ("json", text(&json!(["x"])))]),
        ("bad_text", vec![("jpg", picture()), ("txt", b"\xff\xfe".to_vec())]),
        ("bad_image", vec![("jpg", vec![]), ("txt", b"x".to_vec())]),
    ];
    for (expected, members) in cases {
        let shown = format!("{:?}", members.iter().map(|(suffix, _)| suffix).collect::<Vec<_>>());
        assert_eq!(reason(outcome(Layout::Captions, members)), expected, "{shown}");
    }
}

#[test]
fn questions_are_chosen_by_the_key_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar");
    let members: Vec<_> = (0..64)
        .flat_map(|n| [(format!("{n}.png"), picture()), (format!("{n}.txt"), b"x".to_vec())])
        .collect();
    std::fs::write(&path, tar(&members)).unwrap();
    let mut spec = spec(&[&path.display().to_string()]);
    spec.sources[0].layout = Layout::Captions;
    spec.sources[0].questions = ["What?", "<image> Who?", "Where?"].map(str::to_owned).to_vec();
    let asked = |spec: &DataSpec, epoch| -> Vec<String> {
        let samples = outcomes(spec, epoch).unwrap().into_iter().map(|(_, outcome)| outcome.unwrap());
        samples.map(|sample| sample.turns[0].text.clone()).collect()
    };
    let first = asked(&spec, 0);
    for question in ["<image>\nWhat?", "<image> Who?", "<image>\nWhere?"] {
        assert!(first.iter().filter(|text| *text == question).count() > 10, "{first:?}");
    }
    spec.seed = 99;
    assert_eq!(asked(&spec, 5), first, "neither the seed nor the epoch plays a part");
}

fn document(pages: &Value) -> Members {
    vec![
        ("tif", picture()),
        ("pdf", b"%PDF".to_vec()),
        ("json", text(&json!({"pages": pages}))),
        ("ocr", vec![]),
    ]
}

#[test]
fn a_page_is_read() {
    let first = document(&json!([{"text": ["Dear Sir,", "", "Yours"], "bbox": [[0.0, 0.1, 0.2, 0.3]]}]));
    let expected = [user("<image>\nRead the text on this page."), assistant("Dear Sir,\n\nYours")];
    assert_eq!(turns(outcome(Layout::Pages, first)), expected);
    let with_default = SourceSpec { layout: Layout::Pages, ..SourceSpec::new("x", vec![]) };
    assert_eq!(with_default.page, PageChoice::First);

    let cases = [
        (json!([]), "no_answer"),
        (json!([{"text": ["", " "]}, {"text": []}, {"text": null}]), "no_answer"),
        (json!([{"bbox": []}]), "bad_json"),
        (json!({"text": []}), "bad_json"),
    ];
    for (pages, expected) in cases {
        assert_eq!(reason(outcome(Layout::Pages, document(&pages))), expected, "{pages}");
    }
    let no_image = vec![("json", text(&json!({"pages": [{"text": ["x"]}]}))), ("pdf", vec![])];
    assert_eq!(reason(outcome(Layout::Pages, no_image)), "no_image");
    assert_eq!(reason(outcome(Layout::Pages, vec![("tif", picture())])), "no_annotation");
}

#[test]
fn the_page_is_the_first_with_text_or_another_each_epoch() {
    let raw = |pages: &Value| {
        crate::testing::raw_sample("k", &[("json", &text(&json!({"pages": pages}))), ("tif", b"")])
    };
    let empty_first = json!([{"text": []}, {"text": "one string"}, {"text": ["third"]}]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.tar");
    std::fs::write(&path, "").unwrap();
    let mut spec = spec(&[&path.display().to_string()]);
    spec.sources[0].layout = Layout::Pages;
    let read = |spec: &DataSpec, epoch| {
        let source = crate::source::Source::open_all(spec).unwrap().remove(0);
        let context = crate::layout::Context::new(&source, epoch);
        let conversation = crate::layout::read(&raw(&empty_first), context).unwrap();
        (conversation.images[0].frame, conversation.turns[1].text.clone())
    };
    assert_eq!(read(&spec, 3), (1, "one string".into()));
    spec.sources[0].page = PageChoice::Random;
    let pages: Vec<usize> = (0..40).map(|epoch| read(&spec, epoch).0).collect();
    assert_eq!(pages, (0..40).map(|epoch| read(&spec, epoch).0).collect::<Vec<_>>());
    assert!((10..30).contains(&pages.iter().filter(|&&page| page == 1).count()), "{pages:?}");
    assert!(!pages.contains(&0), "it has no text");
}

fn interleaved(images: &Value, texts: &Value) -> Outcome {
    let json = text(&json!({"images": images, "texts": texts}));
    outcome(Layout::Interleaved, vec![("json", json), ("a.png", picture()), ("b.png", picture())])
}

#[test]
fn images_and_texts_take_turns() {
    assert_eq!(
        turns(interleaved(&json!([null, "a.png", null]), &json!(["Intro", null, "About it"]))),
        [user("Intro\n<image>"), assistant("About it")]
    );
    assert_eq!(
        turns(interleaved(&json!(["a.png", "b.png", null, null]), &json!([null, null, "One", "Two"]))),
        [user("<image>\n<image>"), assistant("One\n\nTwo")]
    );
    let long = interleaved(
        &json!([null, null, "a.png", null, "b.png", null, "a.png", "b.png"]),
        &json!(["A", "B", null, "C", null, "D", null, null]),
    );
    assert_eq!(long.as_ref().unwrap().images.len(), 2, "what nothing follows is left out");
    assert_eq!(turns(long), [user("A\n\nB\n<image>"), assistant("C"), user("<image>"), assistant("D")]);

    let cases = [
        (json!(["a.png"]), json!([null, "x"]), "bad_json"),
        (json!(["a.png", null]), json!(["both", "x"]), "bad_json"),
        (json!([null, null]), json!([null, "x"]), "bad_json"),
        (json!("a.png"), json!(["x"]), "bad_json"),
        (json!([7, null]), json!([null, "x"]), "bad_json"),
        (json!([null]), json!(["only text"]), "no_answer"),
        (json!(["a.png"]), json!([null]), "no_answer"),
        (json!([]), json!([]), "no_answer"),
        (json!(["z.png", null]), json!([null, "x"]), "unknown_image"),
        (json!([null, "a.png", null]), json!(["a <image> tag", null, "x"]), "image_count"),
    ];
    for (images, texts, expected) in cases {
        assert_eq!(reason(interleaved(&images, &texts)), expected, "{images} {texts}");
    }
}

fn video(annotation: &Value, question: &str) -> Outcome {
    let mut json = json!({"conversations": [
        {"from": "human", "value": question}, {"from": "gpt", "value": "It rains."}]});
    json.as_object_mut().unwrap().extend(annotation.as_object().unwrap().clone());
    let wide = || encode(&gradient(40, 8).into(), ImageFormat::Png);
    let mut members = vec![("json", text(&json)), ("still.png", wide())];
    members.extend(["1.png", "2.png", "3.png", "4.png", "5.png"].map(|frame| (frame, wide())));
    outcome_with(members, 0, |spec| spec.image.max_frames = 3)
}

#[test]
fn a_video_is_its_frames_each_one_tile() {
    let frames = json!({"video": ["1.png", "2.png", "3.png", "4.png", "5.png"]});
    let three = "Frame-1: <image>\nFrame-2: <image>\nFrame-3: <image>";
    for (question, expected) in [
        ("<video>\nWhat happens?", format!("{three}\nWhat happens?")),
        ("What happens?", format!("{three}\nWhat happens?")),
        ("See: <video> What?", format!("See: {three}\n What?")),
    ] {
        let sample = video(&frames, question).unwrap();
        assert_eq!(sample.images.len(), 3, "wide frames are not tiled");
        assert_eq!(sample.turns[0].text, expected);
    }
    let mixed = json!({"video": ["1.png", "2.png"], "image": "still.png"});
    let sample = video(&mixed, "<image> then <video>").unwrap();
    assert_eq!(sample.turns[0].text, "<image> then Frame-1: <image>\nFrame-2: <image>");
    assert_eq!(sample.images.len(), 5 + 2, "the still image is tiled as the only one");

    let whole = video(&json!({"video": "still.png"}), "<video>").unwrap();
    assert_eq!((whole.turns[0].text.as_str(), whole.images.len()), ("Frame-1: <image>", 1));

    let cases = [
        (frames.clone(), "<video> <video>", "video_count"),
        (json!({"image": ""}), "<video>", "video_count"),
        (json!({"video": ["1.png", "9.png"]}), "<video>", "unknown_image"),
        (json!({"video": "clip.mp4"}), "<video>", "unknown_image"),
        (json!({"video": 7}), "<video>", "bad_json"),
        (frames, "<video> <image>", "image_count"),
    ];
    for (annotation, question, expected) in cases {
        assert_eq!(reason(video(&annotation, question)), expected, "{annotation} {question}");
    }
}

#[test]
fn videos_inside_messages_stand_where_they_are_said() {
    let json = json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "First "}, {"type": "video", "video": ["1.png", "2.png"]},
                                     {"type": "text", "text": "\nthen "}, {"type": "image", "image": "3.png"}]},
        {"role": "assistant", "content": "Yes."}]});
    let members =
        vec![("json", text(&json)), ("1.png", picture()), ("2.png", picture()), ("3.png", picture())];
    let sample = outcome(Layout::Conversations, members).unwrap();
    assert_eq!(sample.turns[0].text, "First Frame-1: <image>\nFrame-2: <image>\nthen <image>");
    let missing = BadSample::VideoCount { marks: 1, videos: 0 };
    let json = json!({"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "A"}]});
    assert_eq!(outcome(Layout::Conversations, vec![("json", text(&json))]).unwrap_err(), missing);
}
