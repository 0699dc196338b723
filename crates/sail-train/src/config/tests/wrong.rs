//! One slip at a time, and what is said of it: `snapshots/` has every message.

use std::fmt::Write;
use std::panic::catch_unwind;

use super::{STAGE, edited, faults_of};

/// A piece of [`STAGE`] and what stands there instead.
const SLIPS: [(&str, &str); 76] = [
    // Names.
    ("run: {", "runs: {"),
    ("dir: runs/demo", "dir: runs/demo, sed: 1"),
    ("projector: {", "projecter: {"),
    ("image_px", "image_size"),
    ("packs_per_step", "packs_per_steps"),
    ("streams: 2", "stream: 2"),
    ("shards:", "shard:"),
    ("lr: 1e-3", "learning_rate: 1e-3"),
    ("lr: 1e-3", "lr: 1e-3, wd: 0.1"),
    ("schedule:", "scheduler:"),
    ("llm: frozen", "llm: Frozen"),
    ("llm: frozen", "llm: freeze"),
    ("{ steps: 60 }", "{ steps: 60, kind: cosin }"),
    ("streams: 2", "streams: 2\n  template: chat_ml"),
    ("streams: 2", "streams: 2\n  too_long: cut"),
    ("{ steps: 60 }", "{ steps: 60 }\nparallel: { strategy: zero3 }"),
    ("{ steps: 60 }", "{ steps: 60 }\nguard: { spike: retry }"),
    ("{ steps: 60 }", "{ steps: 60 }\nexport: { vit: onnx }"),
    // Types.
    ("lr: 1e-3", "lr: [1e-3]"),
    ("lr: 1e-3", "lr: 1e-3x"),
    ("lr: 1e-3", "lr: true"),
    ("lr: 1e-3", "lr: .nan"),
    ("lr: 1e-3", "lr: 1e400"),
    ("{ steps: 60 }", "{ steps: -60 }"),
    ("{ steps: 60 }", "{ steps: 6.5e1, tokens: 1.5 }"),
    ("{ steps: 60 }", "{ steps: 99999999999999999999 }"),
    ("{ steps: 60 }", "{ steps: '60' }"),
    ("{ steps: 60 }", "60"),
    ("image_px: 112", "image_px: [112, 112]"),
    ("streams: 2", "streams: two"),
    ("\"caption-*.tar\"", "{ path: caption.tar }"),
    ("name: caption,", "name: 7,"),
    ("vision: frozen", "vision: 0"),
    ("vision: frozen", "vision: [frozen]"),
    ("{ steps: 60 }", "{ steps: 60, warmup: 10 % of it }"),
    // Missing.
    ("name: demo, ", ""),
    ("{ steps: 60 }", "{ kind: constant }"),
    ("tokens_per_pack: 512, ", ""),
    ("vision: frozen\n", "\n"),
    ("lr: 1e-3", ""),
    (", shards: \"caption-*.tar\"", ""),
    ("from: weights/vit, ", ""),
    // Contradictions and impossible sizes.
    ("{ steps: 60 }", "{ steps: 60, tokens: 1000 }"),
    ("{ steps: 60 }", "{ steps: 60, warmup: 61 }"),
    ("{ steps: 60 }", "{ steps: 60, warmup: 101% }"),
    ("{ steps: 60 }", "{ steps: 60, warmup: 1000 tokens }"),
    ("{ steps: 60 }", "{ steps: 60, decay: 10% }"),
    ("{ steps: 60 }", "{ steps: 60, kind: wsd, warmup: 50%, decay: 60% }"),
    ("{ steps: 60 }", "{ steps: 60, ada_lrs: { window: 2 } }"),
    ("{ steps: 60 }", "{ steps: 60, ada_lrs: { alpha: 6, beta: 4 } }"),
    ("{ steps: 60 }", "{ steps: 60, ada_lrs: { lambda: 1 } }"),
    ("{ steps: 60 }", "{ steps: 60, kind: inverse_sqrt, warmup: 0 }"),
    ("{ steps: 60 }", "{ steps: 0 }"),
    ("lr: 1e-3", "lr: 0"),
    ("lr: 1e-3", "lr: -1e-3"),
    ("lr: 1e-3", "lr: 1e-3, layer_decay: 0.9"),
    ("vision: frozen", "vision: { lr: 1e-4, layer_decay: 1.1 }"),
    ("vision: frozen", "vision: { lr: 1e-4, betas: [0.9, 1.0] }"),
    ("projector: { lr: 1e-3 }", "projector: frozen"),
    ("image_px: 112", "image_px: 0"),
    ("packs_per_step: 8", "packs_per_step: 3"),
    ("tokens_per_pack: 512", "tokens_per_pack: 1"),
    ("from: weights/llm", "from: \"hf:Qwen\""),
    ("from: weights/llm", "from: weights/llm, random: { model_type: qwen3 }"),
    ("from: weights/vit", "random: { model_type: vit }"),
    // Rules and unlock points.
    ("llm: frozen", "llm: frozen\n  rules: [{ match: vit, train: frozen }]"),
    ("llm: frozen", "llm: frozen\n  rules: [{ match: \"vision.blocks[5..2]\", train: { lr: 1e-3 } }]"),
    ("llm: frozen", "llm: frozen\n  rules: [{ match: \"projector.blocks[0]\", train: frozen }]"),
    ("llm: frozen", "llm: frozen\n  rules: [{ match: vision }]"),
    ("llm: frozen", "llm: frozen\n  unfreeze: [{ match: llm, lr: 1e-3 }]"),
    ("llm: frozen", "llm: frozen\n  unfreeze: [{ at: 0, match: llm, lr: 1e-3 }]"),
    ("llm: frozen", "llm: frozen\n  unfreeze: [{ at: 100%, match: llm, lr: 1e-3 }]"),
    ("llm: frozen", "llm: frozen\n  unfreeze: [{ at: soon, match: llm, lr: 1e-3 }]"),
    ("llm: frozen", "llm: frozen\n  unfreeze: [{ at: 5, match: [], lr: 1e-3 }]"),
    ("llm: frozen", "llm: frozen\n  unfreeze: { at: 5, match: llm, lr: 1e-3 }"),
    (
        "{ steps: 60 }",
        "{ steps: 60 }\neval: { sources: [{ name: a, shards: a.tar, sampling_weights: w.safetensors }] }",
    ),
];

/// Texts that are no configuration at all.
fn texts() -> Vec<String> {
    let laughs = (1..40).fold("a0: &a0 [x, x]\n".to_owned(), |text, level| {
        let below = level - 1;
        text + &format!("a{level}: &a{level} [*a{below}, *a{below}, *a{below}]\n")
    });
    vec![
        edited(&[("model:\n  vision", "model:\n\tvision")]),
        edited(&[("{ steps: 60 }", "{ steps: 60")]),
        edited(&[("schedule:", "run: { name: again }\nschedule:")]),
        edited(&[("{ steps: 60 }", "&length { steps: 60 }")]),
        edited(&[("llm: frozen", "llm: *what")]),
        edited(&[("llm: frozen", "llm: !!str frozen")]),
        format!("{STAGE}---\n{STAGE}"),
        "\u{feff}just words\n".to_owned(),
        "- a\n- b\n".to_owned(),
        "? [a, b]\n: c\n".to_owned(),
        format!("run: {}1{}\n", "[".repeat(5000), "]".repeat(5000)),
        laughs,
        "extends: stage.yaml\n".to_owned(),
        "extends: gone.yaml\n".to_owned(),
        "extends: [a.yaml]\n".to_owned(),
        "stages: []\n".to_owned(),
        "name: all\nstages: [gone.yaml]\n".to_owned(),
        "name: all\nstages: [stage.yaml]\n".to_owned(),
    ]
}

#[test]
fn every_slip_has_its_message() {
    let mut said = String::new();
    let slips = SLIPS.iter().map(|(old, new)| (format!("{old}  =>  {new}"), STAGE.replacen(old, new, 1)));
    let texts = texts().into_iter().map(|text| (text.lines().take(2).collect::<Vec<_>>().join(" | "), text));
    for (what, text) in slips.chain(texts) {
        assert_ne!(text, STAGE, "{what}");
        let found = catch_unwind(|| faults_of(&[("stage.yaml", &text)], &[]));
        let found = found.unwrap_or_else(|_| panic!("{what}: no faults, or a panic"));
        // One slip has few consequences; what follows from a missing half of the file is cut.
        let shown: Vec<&str> = found.trim_end().lines().take(12).collect();
        let what: String = what.chars().take(100).collect();
        // Writing to a string does not fail.
        let _ = writeln!(said, "#### {}\n{}\n", what.replace('\n', "\\n"), shown.join("\n"));
    }
    insta::assert_snapshot!("messages", said);
}
