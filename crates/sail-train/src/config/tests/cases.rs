//! Files with one slip each. `wrong.rs` has what is said of them; the tests of the command run it on them.

/// The shortest stage there is, with the line numbers that the snapshots name.
pub(crate) const STAGE: &str = r#"run: { name: demo, dir: runs/demo }
model:
  vision: { from: weights/vit, image_px: 112 }
  llm: { from: weights/llm }
train:
  vision: frozen
  projector: { lr: 1e-3 }
  llm: frozen
schedule: { steps: 60 }
batch: { tokens_per_pack: 512, packs_per_step: 8 }
data:
  streams: 2
  sources:
    - { name: caption, shards: "caption-*.tar" }
"#;

/// [`STAGE`] with pieces of text replaced.
pub(crate) fn edited(edits: &[(&str, &str)]) -> String {
    edits.iter().fold(STAGE.to_owned(), |text, (old, new)| {
        assert!(text.contains(old), "`{old}` is not in the stage");
        text.replace(old, new)
    })
}

/// A piece of [`STAGE`] and what stands there instead.
const SLIPS: [(&str, &str); 91] = [
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
    ("streams: 2", "streams: 2\n  feature_cache: { dir: features, max_gb: 5 }"),
    ("streams: 2", "streams: 2\n  feature_cache: features"),
    // Missing.
    ("name: demo, ", ""),
    ("{ steps: 60 }", "{ kind: constant }"),
    ("tokens_per_pack: 512, ", ""),
    ("vision: frozen\n", "\n"),
    ("lr: 1e-3", ""),
    (", shards: \"caption-*.tar\"", ""),
    ("from: weights/vit, ", ""),
    ("streams: 2", "streams: 2\n  feature_cache: {}"),
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
    ("tokens_per_pack: 512", "recompute: { llm: every 1 }, tokens_per_pack: 512"),
    ("tokens_per_pack: 512", "recompute: { vision: 3 }, tokens_per_pack: 512"),
    ("tokens_per_pack: 512", "recompute: block, tokens_per_pack: 512"),
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
    ("{ steps: 60 }", "{ steps: 60 }\noptimizer: { ema: {} }"),
    ("{ steps: 60 }", "{ steps: 60 }\noptimizer: { ema: { decay: 1, modules: projector } }"),
    ("{ steps: 60 }", "{ steps: 60 }\noptimizer: { ema: { modules: [projector, vision] } }"),
    ("{ steps: 60 }", "{ steps: 60 }\noptimizer: { ema: { modules: [projectr] } }"),
    ("{ steps: 60 }", "{ steps: 60 }\noptimizer: { ema: { modules: [] } }"),
    ("{ steps: 60 }", "{ steps: 60, early_stop: {} }"),
    ("{ steps: 60 }", "{ steps: 60, early_stop: { patience: 0, min_delta: -1 } }"),
    ("{ steps: 60 }", "{ steps: 60, early_stop: { patience: 3 } }"),
    (
        "{ steps: 60 }",
        "{ steps: 60, early_stop: { patience: 3 } }\neval: { every: 20, sources: [{ name: a, shards: a.tar }] }",
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

/// What slipped, and the file's text.
pub(crate) fn wrong_files() -> Vec<(String, String)> {
    let slips = SLIPS.iter().map(|(old, new)| (format!("{old}  =>  {new}"), STAGE.replacen(old, new, 1)));
    let texts = texts().into_iter().map(|text| (text.lines().take(2).collect::<Vec<_>>().join(" | "), text));
    slips.chain(texts).collect()
}
