//! Messages of configurations that can be read and make no sense.

use super::faults;

#[test]
fn values_that_make_no_sense() {
    let edits = [
        ("name: demo, dir: runs/demo", "name: \"\", dir: \"\""),
        ("image_px: 112 }", "image_px: 0 }\n  projector: { merge: 0 }"),
        ("lr: 1e-3", "lr: -1, weight_decay: -0.1"),
        (
            "{ steps: 60 }",
            "{ steps: 10, warmup: 11, min_ratio: 2 }\noptimizer: { betas: [0.9, 1], eps: 0, clip_norm: 0 }\n\
             checkpoint: { every: 0, keep_last: 0 }\nlog: { every: 0 }\n\
             eval: { every: 0, samples: 0, max_new_tokens: 0, sources: [] }",
        ),
        (
            "tokens_per_pack: 512, packs_per_step: 8",
            "tokens_per_pack: 1, packs_per_step: 0, vision_images: 0",
        ),
        (
            "streams: 2",
            "streams: 0\n  threads: 0\n  shuffle_buffer: 0\n  pack_buffer: 0\n  max_error_rate: 5\n  \
             max_pixels: 0\n  std: [0.2, 0, 0.2]\n  image_tokens: { start: \"\", end: <IMG_CONTEXT> }\n  \
             tiling: { min: 4, max: 2 }",
        ),
        ("\"caption-*.tar\" }", "[], weight: 0 }\n    - { name: caption, shards: \"\" }"),
    ];
    insta::assert_snapshot!(faults(&edits), @r#"
    error: `run.name`: must not be empty
      --> stage.yaml:1

    error: `run.dir`: must not be empty
      --> stage.yaml:1

    error: `model.vision.image_px`: must be from 1 to 16384, found 0
      --> stage.yaml:3

    error: `model.projector.merge`: must be at least 1, is 0
      --> stage.yaml:4

    error: `train.projector.lr`: must be above 0, found -1
      --> stage.yaml:8
      hint: write `frozen` in place of rates to leave a part as it is

    error: `train.projector.weight_decay`: must not be negative, found -0.1
      --> stage.yaml:8

    error: `schedule.min_ratio`: must be from 0 to 1, found 2
      --> stage.yaml:10

    error: `schedule.warmup`: must not be more than `schedule.steps`, 10, found 11
      --> stage.yaml:10

    error: `optimizer.betas[1]`: must be from 0 to below 1, found 1
      --> stage.yaml:11

    error: `optimizer.eps`: must be above 0, found 0
      --> stage.yaml:11

    error: `optimizer.clip_norm`: must be above 0, found 0
      --> stage.yaml:11
      hint: write `clip_norm: null` for no clipping

    error: `checkpoint.every`: must be at least 1, found 0
      --> stage.yaml:12
      hint: leave it out for a checkpoint only at the end

    error: `checkpoint.keep_last`: must be at least 1, found 0
      --> stage.yaml:12

    error: `log.every`: must be at least 1, found 0
      --> stage.yaml:13

    error: `eval.every`: must be at least 1, found 0
      --> stage.yaml:14
      hint: leave it out to evaluate only at the start and the end

    error: `eval.samples`: must be at least 1, found 0
      --> stage.yaml:14

    error: `eval.max_new_tokens`: must be at least 1, found 0
      --> stage.yaml:14

    error: `eval.sources`: is empty
      --> stage.yaml:14
      hint: add a source: `- { name: NAME, shards: "PATH-*.tar" }`

    error: `batch.tokens_per_pack`: must be from 2 to 16777216, found 1
      --> stage.yaml:15

    error: `batch.packs_per_step`: must be at least 1, found 0
      --> stage.yaml:15

    error: `batch.vision_images`: must be at least 1, found 0
      --> stage.yaml:15

    error: `data.streams`: must be at least 1, found 0
      --> stage.yaml:17

    error: `data.threads`: must be at least 1, found 0
      --> stage.yaml:18

    error: `data.shuffle_buffer`: must be at least 1, found 0
      --> stage.yaml:19

    error: `data.pack_buffer`: must be at least 1, found 0
      --> stage.yaml:20

    error: `data.max_error_rate`: must be from 0 to below 1, found 5
      --> stage.yaml:21

    error: `data.max_pixels`: must be at least 1, found 0
      --> stage.yaml:22

    error: `data.std[1]`: must be above 0, found 0
      --> stage.yaml:23

    error: `data.image_tokens.start`: must not be empty
      --> stage.yaml:24

    error: `data.image_tokens`: `start`, `context` and `end` must be three different tokens
      --> stage.yaml:24

    error: `data.tiling.max`: must be at least `data.tiling.min`, 4, found 2
      --> stage.yaml:25

    error: `data.sources[0].weight`: must be above 0, found 0
      --> stage.yaml:27
      hint: leave the source out instead

    error: `data.sources[0].shards`: must name at least one path, none of them empty
      --> stage.yaml:27

    error: `data.sources[1].shards`: must name at least one path, none of them empty
      --> stage.yaml:28

    error: `data.sources[1].name`: another source is named `caption`
      --> stage.yaml:28
    "#);
}

#[test]
fn a_watchdog_that_would_end_every_run() {
    let edits =
        [("{ steps: 60 }", "{ steps: 60 }\nwatchdog:\n  factor: 0.5\n  least_secs: 0\n  limit_secs: 700000")];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `watchdog.factor`: must be from 1 to 1000000, found 0.5
      --> stage.yaml:11

    error: `watchdog.least_secs`: must be from 1 to 604800, a week, found 0
      --> stage.yaml:12

    error: `watchdog.limit_secs`: must be from 1 to 604800, a week, found 700000
      --> stage.yaml:13
    ");
    let edits = [("{ steps: 60 }", "{ steps: 60 }\nwatchdog: { least_secs: 60, limit_secs: 60, every: 5 }")];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `watchdog.every`: unknown field
      --> stage.yaml:10
      hint: known here: `factor`, `least_secs`, `limit_secs`

    error: `watchdog.limit_secs`: must be more than `watchdog.least_secs`, 60, found 60
      --> stage.yaml:10
    ");
    let edits = [("{ steps: 60 }", "{ steps: 60 }\nwatchdog: { factor: 1e7, limit_secs: 0 }")];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `watchdog.factor`: must be from 1 to 1000000, found 10000000
      --> stage.yaml:10

    error: `watchdog.limit_secs`: must be from 1 to 604800, a week, found 0
      --> stage.yaml:10
    ");
}

#[test]
fn model_sources() {
    let edits = [("from: weights/vit", "from: weights/vit, random: {}"), ("{ from: weights/llm }", "{}")];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `model.vision`: has both `from` and `random`
      --> stage.yaml:3
      hint: keep one; `from: null` takes back an inherited one

    error: `model.llm.from`: missing
      --> stage.yaml:4
      hint: name a folder or `hf:org/name` with `from`, or a shape with `random: { model_type: ... }`
    ");
    let edits = [
        ("from: weights/vit", "random: { hidden_size: 8 }"),
        ("{ from: weights/llm }", "{ random: { model_type: qwen3 } }"),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `model.vision.random`: must be a mapping with a `model_type`
      --> stage.yaml:3
      hint: write the keys of the family's own `config.json`

    error: `model.llm.tokenizer`: missing
      --> stage.yaml:4
      hint: `random` weights bring no tokenizer: name a `tokenizer.json`
    ");
}

#[test]
fn references_to_a_hub() {
    let edits =
        [("from: weights/vit", "from: \"hf:vit\""), ("{ from: weights/llm }", "{ from: hf:org/llm@../x }")];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `model.vision.from`: `hf:vit`: names no `org/name`; write `hf:org/name` or `hf:org/name@revision`
      --> stage.yaml:3

    error: `model.llm.from`: `hf:org/llm@../x`: the revision is no branch, tag or commit; write `hf:org/name` or `hf:org/name@revision`
      --> stage.yaml:4
    ");
}

#[test]
fn random_keys_are_named_with_their_lines() {
    let edits = [
        (
            "from: weights/vit",
            "random: {\n    model_type: dinov2,\n    hiden_size: 8,\n    num_attention_heads: 5,\n    drop_path_rate: 0.1 }",
        ),
        ("{ from: weights/llm }", "{ tokenizer: t.json, random: { model_type: gpt2 } }"),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `model.vision.random.hiden_size`: this family has no such key
      --> stage.yaml:5

    error: `model.vision.random.num_attention_heads`: 5 does not divide the width 768
      --> stage.yaml:6

    error: `model.vision.random.drop_path_rate`: only 0 is supported, is 0.1
      --> stage.yaml:7

    error: `model.llm.random.model_type`: language models are `llama`, `qwen2`, `qwen3`, `qwen3_moe`, found `gpt2`
      --> stage.yaml:8
    ");
}

#[test]
fn nothing_to_train_and_a_run_that_starts_from_itself() {
    insta::assert_snapshot!(faults(&[("{ lr: 1e-3 }", "frozen"), ("data:", "init: { from: ./runs/demo }\ndata:")]), @r"
    error: `train`: every module is frozen, so there is nothing to train
      --> stage.yaml:5
      hint: give at least one module a rate, as in `projector: { lr: 1e-3 }`; unlock points come after the first step

    error: `init.from`: is this run's own folder, `run.dir`
      --> stage.yaml:11
    ");
}

#[test]
fn warmup_percent() {
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", "{ steps: 60, warmup: 120% }")]), @r"
    error: `schedule.warmup`: must be from 0% to 100%, found 120%
      --> stage.yaml:9
    ");
}

#[test]
fn guards_and_times_that_make_no_sense() {
    let edits = [
        ("name: demo,", "name: demo, time_limit_secs: 300,"),
        (
            "{ steps: 60 }",
            "{ steps: 60 }\nguard: { spike_z: 0, window: 1 }\n\
             checkpoint: { keep_every: 0, keep_best: 0, timeout_secs: 0 }\neval: { every: 5, sources: [] }",
        ),
    ];
    insta::assert_snapshot!(faults(&edits), @r#"
    error: `run.time_limit_secs`: must be more than `run.time_margin_secs`, 300, found 300
      --> stage.yaml:1

    error: `guard.spike_z`: must be above 0, found 0
      --> stage.yaml:10

    error: `guard.window`: must be from 2 to 100000, found 1
      --> stage.yaml:10

    error: `checkpoint.keep_every`: must be at least 1, found 0
      --> stage.yaml:11
      hint: leave it out to keep none for their step

    error: `checkpoint.keep_best`: must be at least 1, found 0
      --> stage.yaml:11

    error: `checkpoint.timeout_secs`: must be at least 1, found 0
      --> stage.yaml:11

    error: `eval.sources`: is empty
      --> stage.yaml:12
      hint: add a source: `- { name: NAME, shards: "PATH-*.tar" }`
    "#);
    let edits = [
        ("name: demo,", "name: demo, time_limit_secs: soon, time_margin_secs: -1,"),
        (
            "{ steps: 60 }",
            "{ steps: 60 }\nguard: { not_finite: skipp, spike: ignore, max_trips: -1, self_check: 1, windw: 5 }\n\
             checkpoint: { keep_every: often, max_failures: 1.5 }",
        ),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `run.time_limit_secs`: expected a whole number from 0, found `soon`
      --> stage.yaml:1

    error: `run.time_margin_secs`: expected a whole number from 0, found the number `-1`
      --> stage.yaml:1

    error: `guard.not_finite`: unknown value `skipp`
      --> stage.yaml:10
      hint: did you mean `skip`?

    error: `guard.spike`: unknown value `ignore`
      --> stage.yaml:10
      hint: expected `skip`, `stop`, `rollback`

    error: `guard.max_trips`: expected a whole number from 0, found the number `-1`
      --> stage.yaml:10

    error: `guard.self_check`: expected `true` or `false`, found the number `1`
      --> stage.yaml:10

    error: `guard.windw`: unknown field
      --> stage.yaml:10
      hint: did you mean `window`?

    error: `checkpoint.keep_every`: expected a whole number from 0, found `often`
      --> stage.yaml:11

    error: `checkpoint.max_failures`: expected a whole number from 0, found the number `1.5`
      --> stage.yaml:11
    ");
}

/// The best are kept by held-out losses, of which a run without evaluations has none; and only saved steps are kept.
#[test]
fn checkpoints_that_can_never_be_kept() {
    let keep = "{ steps: 60 }\ncheckpoint: { every: 10, keep_best: 2, keep_every: 25 }";
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", keep)]), @r"
    error: `checkpoint.keep_every`: is not a multiple of `checkpoint.every`, found 25
      --> stage.yaml:10
      hint: only steps that are saved can be kept

    error: `checkpoint.keep_best`: needs held-out losses of steps that are saved
      --> stage.yaml:10
      hint: give `checkpoint.every` and `eval.every`, one a multiple of the other
    ");
}

#[test]
fn features_that_change_are_not_kept() {
    let cache = "streams: 2\n  feature_cache: { dir: \"\", max_bytes: 0 }";
    let reencode = format!("{cache}\n  reencode: {{}}");
    for (edits, reencodes) in [
        (("vision: frozen", "vision: { lr: 1e-4 }"), false),
        (("llm: frozen", "llm: frozen\n  rules: [{ match: \"vision.*norm*\", train: { lr: 1e-4 } }]"), false),
        (
            (
                "llm: frozen",
                "llm: frozen\n  unfreeze: [{ at: 50%, match: \"vision.blocks[5..]\", lr: 1e-4 }]",
            ),
            false,
        ),
        (("lr: 1e-3", "lr: 2e-3"), true),
    ] {
        let data = if reencodes { &reencode } else { cache };
        let said = faults(&[edits, ("streams: 2", data)]);
        let trains = "error: `data.feature_cache`: the vision encoder trains in this stage";
        let differs =
            "error: `data.feature_cache`: `data.reencode` gives an image other pixels in each epoch";
        assert_eq!((said.contains(trains), said.contains(differs)), (!reencodes, reencodes), "{said}");
    }
    let edits = [("vision: frozen", "vision: { lr: 1e-4 }"), ("streams: 2", reencode.as_str())];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `data.feature_cache`: the vision encoder trains in this stage, and its features change with it
      --> stage.yaml:13
      hint: leave it out, or freeze `train.vision` and all of it in `train.rules` and `train.unfreeze`

    error: `data.feature_cache`: `data.reencode` gives an image other pixels in each epoch
      --> stage.yaml:13
      hint: leave one of them out

    error: `data.feature_cache.dir`: must not be empty
      --> stage.yaml:13

    error: `data.feature_cache.max_bytes`: must be at least 1, found 0
      --> stage.yaml:13
    ");
    // None of the images is another one.
    let never = "streams: 2\n  feature_cache: { dir: x, max_bytes: 9 }\n  reencode: { probability: 0 }";
    super::plan(&super::edited(&[("streams: 2", never)]), &[]);
}

/// A run went into the root of the file system, and a plan for packs that no machine has ended in an abort.
#[test]
fn values_that_no_machine_has() {
    let edits = [
        ("name: demo, dir: runs/demo", "name: demo, dir: /"),
        ("tokens_per_pack: 512", "tokens_per_pack: 1000000000000"),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `run.dir`: must be a folder of its own
      --> stage.yaml:1

    error: `batch.tokens_per_pack`: must be from 2 to 16777216, found 1000000000000
      --> stage.yaml:10
    ");
}
