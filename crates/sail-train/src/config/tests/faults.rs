//! A snapshot of every kind of message.

use super::{STAGE, faults, faults_of};

#[test]
fn unknown_field_suggests_and_hides_what_follows_from_it() {
    insta::assert_snapshot!(faults(&[("projector: {", "projctor: {")]), @r"
    error: `train.projctor`: unknown field
      --> stage.yaml:7
      hint: did you mean `projector`?
    ");
}

#[test]
fn unknown_field_lists_the_known_ones() {
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", "{ steps: 60, zzz: 1 }")]), @r"
    error: `schedule.zzz`: unknown field
      --> stage.yaml:9
      hint: known here: `kind`, `steps`, `tokens`, `warmup`, `decay`, `min_ratio`, `ada_lrs`, `early_stop`
    ");
}

#[test]
fn wrong_types() {
    let edits = [
        ("{ name: demo,", "{ name: 12, device: gpu, precision: bf61,"),
        ("image_px: 112", "image_px: -5"),
        ("vision: frozen", "vision: frosty"),
        ("lr: 1e-3", "lr: fast"),
        ("{ steps: 60 }", "{ steps: 1.5, warmup: some }\noptimizer: { betas: [0.9] }"),
        ("streams: 2", "streams: two\n  mean: [1, 2, 3, 4]\n  template: { kind: chatml }"),
        ("\"caption-*.tar\"", "[a.tar, 5]"),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `run.name`: expected text, found the number `12`
      --> stage.yaml:1
      hint: put it in quotes

    error: `run.device`: unknown device `gpu`, expected `auto`, `cpu`, `cuda` or `cuda:N`
      --> stage.yaml:1

    error: `run.precision`: unknown value `bf61`
      --> stage.yaml:1
      hint: did you mean `bf16`?

    error: `model.vision.image_px`: expected a whole number from 0, found the number `-5`
      --> stage.yaml:3

    error: `train.vision`: expected `frozen` or `{ lr: RATE }`, found `frosty`
      --> stage.yaml:6

    error: `train.projector.lr`: expected a number, found `fast`
      --> stage.yaml:7

    error: `schedule.steps`: expected a whole number from 0, found the number `1.5`
      --> stage.yaml:9

    error: `schedule.warmup`: expected steps like `5`, a share of the stage like `10%` or `2e9 tokens`, found `some`
      --> stage.yaml:9

    error: `optimizer.betas`: expected a list of 2 numbers, found 1 item(s)
      --> stage.yaml:10

    error: `data.streams`: expected a whole number from 0, found `two`
      --> stage.yaml:13

    error: `data.mean`: expected a list of 3 numbers, found 4 item(s)
      --> stage.yaml:14

    error: `data.template`: expected `chatml` or `sail` or `smollm` or `jinja`, found a mapping
      --> stage.yaml:15

    error: `data.sources[0].shards[1]`: expected text, found the number `5`
      --> stage.yaml:17
      hint: put it in quotes
    ");
}

#[test]
fn a_section_that_is_no_mapping() {
    insta::assert_snapshot!(faults(&[("schedule: { steps: 60 }", "schedule: [60]")]), @r"
    error: `schedule`: expected a mapping, found a list
      --> stage.yaml:9
    ");
    insta::assert_snapshot!(faults_of(&[("stage.yaml", "- 1\n")], &[]), @r"
    error: expected a mapping, found a list
      --> stage.yaml:1
    ");
}

#[test]
fn missing_fields_name_the_line_of_their_section() {
    let edits = [
        ("{ steps: 60 }", "{}"),
        (", packs_per_step: 8", ""),
        (", image_px: 112", ""),
        ("    - { name: caption, shards: \"caption-*.tar\" }", "    - {}"),
        ("  llm: frozen\n", "  llm: {}\n"),
        ("vision: frozen\n", "# vision\n"),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `model.vision.image_px`: missing
      --> stage.yaml:3

    error: `train.vision`: missing
      --> stage.yaml:5
      hint: write `vision: frozen` or `vision: { lr: RATE }`

    error: `train.llm.lr`: missing
      --> stage.yaml:8

    error: `schedule.steps`: missing
      --> stage.yaml:9
      hint: give the stage's length, in `steps` or `tokens`

    error: `batch.packs_per_step`: missing
      --> stage.yaml:10

    error: `data.sources[0].name`: missing
      --> stage.yaml:14

    error: `data.sources[0].shards`: missing
      --> stage.yaml:14
    ");
}

#[test]
fn an_empty_file_misses_everything() {
    insta::assert_snapshot!(faults_of(&[("stage.yaml", "")], &[]), @r"
    error: `run.name`: missing
      --> stage.yaml:1

    error: `run.dir`: missing
      --> stage.yaml:1

    error: `model.vision.from`: missing
      --> stage.yaml:1
      hint: name a folder or `hf:org/name` with `from`, or a shape with `random: { model_type: ... }`

    error: `model.vision.image_px`: missing
      --> stage.yaml:1

    error: `model.llm.from`: missing
      --> stage.yaml:1
      hint: name a folder or `hf:org/name` with `from`, or a shape with `random: { model_type: ... }`

    error: `schedule.steps`: missing
      --> stage.yaml:1
      hint: give the stage's length, in `steps` or `tokens`

    error: `train.vision`: missing
      --> stage.yaml:1
      hint: write `vision: frozen` or `vision: { lr: RATE }`

    error: `train.projector`: missing
      --> stage.yaml:1
      hint: write `projector: frozen` or `projector: { lr: RATE }`

    error: `train.llm`: missing
      --> stage.yaml:1
      hint: write `llm: frozen` or `llm: { lr: RATE }`

    error: `batch.tokens_per_pack`: missing
      --> stage.yaml:1

    error: `batch.packs_per_step`: missing
      --> stage.yaml:1

    error: `data.sources`: missing
      --> stage.yaml:1
    ");
}

#[test]
fn faults_of_several_sections_and_kinds_at_once() {
    let edits = [
        ("name: demo", "nmae: demo"),
        ("lr: 1e-3", "lr: 0"),
        ("steps: 60", "steps: 60, steps: 70"),
        ("streams: 2", "streams: 3"),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `run.nmae`: unknown field
      --> stage.yaml:1
      hint: did you mean `name`?

    error: `train.projector.lr`: must be above 0, found 0
      --> stage.yaml:7
      hint: write `frozen` in place of rates to leave a part as it is

    error: `schedule.steps`: given twice, first at line 9
      --> stage.yaml:9

    error: `data.streams`: 3 does not fit `batch.packs_per_step`, 8
      --> stage.yaml:12
      hint: packs are taken from the streams in turn: one of the two numbers must divide the other
    ");
}

#[test]
fn text_that_is_not_yaml() {
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", "{ steps: 60")]), @r"
    error: invalid YAML at column 6: while parsing a flow mapping, did not find expected ',' or '}'
      --> stage.yaml:10
      hint: quote texts that hold braces, brackets, commas or colons
    ");
    insta::assert_snapshot!(faults(&[("  llm: frozen", " llm: frozen")]), @r"
    error: invalid YAML at column 2: while parsing a block mapping, did not find expected key
      --> stage.yaml:8
    ");
}

#[test]
fn yaml_that_is_not_accepted() {
    let edits = [
        ("{ from: weights/vit,", "&vit { from: weights/vit,"),
        ("{ from: weights/llm }", "*vit"),
        ("frozen\nschedule", "!word frozen\nschedule"),
        ("lr: 1e-3", "lr: .nan"),
        ("\"caption-*.tar\" }\n", "\"caption-*.tar\" }\n---\nrun: {}\n"),
    ];
    insta::assert_snapshot!(faults(&edits), @r"
    error: `model.vision`: anchors and aliases cannot be used in a configuration
      --> stage.yaml:3
      hint: write the value out, or share a file with `extends`

    error: `model.llm`: anchors and aliases cannot be used in a configuration
      --> stage.yaml:4
      hint: write the value out, or share a file with `extends`

    error: `train.projector.lr`: `.nan` is not a finite number
      --> stage.yaml:7

    error: `train.llm`: tags cannot be used in a configuration
      --> stage.yaml:8

    error: several documents cannot be used in a configuration
      --> stage.yaml:16
    ");
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    insta::assert_snapshot!(faults(&[("vision: frozen", &format!("vision: {deep}"))]), @r"
    error: invalid YAML at column 42: nested too deeply
      --> stage.yaml:6
    ");
}

#[test]
fn overrides() {
    let files = [("stage.yaml", STAGE)];
    let sets = [
        "train.projctor.lr=1",
        "schedule.steps=many",
        "data.sources[4].weight=1",
        "batch.tokens_per_pack",
        "train..lr=1",
        "run.name=[",
    ];
    insta::assert_snapshot!(faults_of(&files, &sets), @r"
    error: expected `path=value`, as in `train.projector.lr=1e-3`
      --> --set batch.tokens_per_pack

    error: `train..lr` has an empty name in it
      --> --set train..lr=1

    error: `run.name`: invalid YAML at column 1: while parsing a node, did not find expected node content
      --> --set run.name=[

    error: `data.sources[4].weight`: there is no item 4 in a list of 1, counted from 0
      --> --set data.sources[4].weight=1

    error: `train.projctor`: unknown field
      --> --set train.projctor.lr=1
      hint: did you mean `projector`?

    error: `schedule.steps`: expected a whole number from 0, found `many`
      --> --set schedule.steps=many
    ");
    insta::assert_snapshot!(faults_of(&files, &["stages[0].run.dir=x"]), @r"
    error: `stages[0].run.dir`: there is no item 0, because there is no list
      --> --set stages[0].run.dir=x
    ");
}

#[test]
fn places_that_figures_cannot_go_to() {
    let log = "log: { prometheus: nowhere, mlflow: { url: \"ftp://x\", experiment: \"\", flush_secs: 0 } }";
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", &format!("{{ steps: 60 }}\n{log}"))]), @r"
    error: `log.prometheus`: expected an address and a port like `127.0.0.1:9464`, or a port like `9464`, found `nowhere`
      --> stage.yaml:10

    error: `log.mlflow.url`: is no web address, found `ftp://x`
      --> stage.yaml:10
      hint: an MLflow server is needed, like `http://127.0.0.1:5000`; `mlflow server` starts one

    error: `log.mlflow.experiment`: must have from 1 to 500 letters, found ``
      --> stage.yaml:10

    error: `log.mlflow.flush_secs`: must be from 1 to 600, found 0
      --> stage.yaml:10
    ");
    let log = "log: { prometheus: 70000, mlflow: { url: \"http://me:secret@x\" } }";
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", &format!("{{ steps: 60 }}\n{log}"))]), @r"
    error: `log.prometheus`: expected an address and a port like `127.0.0.1:9464`, or a port like `9464`, found the number `70000`
      --> stage.yaml:10

    error: `log.mlflow.url`: must not hold a user or a password, which would be written to the run's folder
      --> stage.yaml:10
      hint: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead
    ");
    // What a query holds would be in the run's folder, and in warnings.
    let log = "log: { mlflow: { url: \"http://x?token=secret\" } }";
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", &format!("{{ steps: 60 }}\n{log}"))]), @r"
    error: `log.mlflow.url`: must be an address without `?` and `#`, of which what follows would be written to the run's folder
      --> stage.yaml:10
      hint: give a token in `MLFLOW_TRACKING_TOKEN`
    ");
    insta::assert_snapshot!(faults(&[("{ steps: 60 }", "{ steps: 60 }\nlog: { mlflow: {} }")]), @r"
    error: `log.mlflow.url`: missing
      --> stage.yaml:10
    ");
}

#[test]
fn extends() {
    let missing = faults_of(&[("stage.yaml", &format!("extends: base.yaml\n{STAGE}"))], &[]);
    insta::assert_snapshot!(missing, @r"
    error: `extends`: `base.yaml` cannot be read: No such file or directory (os error 2)
      --> stage.yaml:1
      hint: is the name right, and the folder that it is seen from? stages, curricula and tasks are YAML files
    ");
    let circle =
        [("stage.yaml", &*format!("extends: other.yaml\n{STAGE}")), ("other.yaml", "extends: stage.yaml")];
    insta::assert_snapshot!(faults_of(&circle, &[]), @r"
    error: `extends`: `stage.yaml` extends itself
      --> other.yaml:1
    ");
    let inherited = [("stage.yaml", "extends: other.yaml\nlog: { every: 0 }\n"), ("other.yaml", STAGE)];
    insta::assert_snapshot!(faults_of(&inherited, &["data.streams=3"]), @r"
    error: `log.every`: must be at least 1, found 0
      --> stage.yaml:2

    error: `data.streams`: 3 does not fit `batch.packs_per_step`, 8
      --> --set data.streams=3
      hint: packs are taken from the streams in turn: one of the two numbers must divide the other
    ");
    insta::assert_snapshot!(faults_of(&[("stage.yaml", &format!("extends: [a]\n{STAGE}"))], &[]), @r"
    error: `extends`: must be the path of one file
      --> stage.yaml:1
    ");
}

#[test]
fn curriculum() {
    let bad = STAGE.replace("lr: 1e-3", "lrr: 1e-3");
    let files = [
        ("all.yaml", "nmae: demo\nstages: [one.yaml, two.yaml, three.yaml, four.yaml]\n"),
        ("one.yaml", STAGE),
        ("two.yaml", &bad),
        ("three.yaml", STAGE),
    ];
    insta::assert_snapshot!(faults_of(&files, &["schedule.stepz=1", "stages[7].run.dir=x"]), @r"
    error: `nmae`: unknown field
      --> all.yaml:1
      hint: did you mean `name`?

    error: `schedule.stepz`: unknown field
      --> --set schedule.stepz=1
      hint: did you mean `steps`?

    error: `train.projector.lrr`: unknown field
      --> two.yaml:7
      hint: did you mean `lr`?

    error: `stages[3]`: `four.yaml` cannot be read: No such file or directory (os error 2)
      --> all.yaml:2
      hint: is the name right, and the folder that it is seen from? stages, curricula and tasks are YAML files

    error: `stages[7].run.dir`: there are 4 stages, from 0
      --> --set stages[7].run.dir=x
    ");
    let same = [("all.yaml", "name: demo\nstages:\n  - one.yaml\n  - one.yaml\n"), ("one.yaml", STAGE)];
    insta::assert_snapshot!(faults_of(&same, &[]), @r"
    error: `stages[1]`: `one.yaml` and `one.yaml` both have `run.dir` runs/demo
      --> all.yaml:4
      hint: every stage needs a folder of its own; `run.root` moves them all together
    ");
    insta::assert_snapshot!(faults_of(&[("all.yaml", "name: demo\nstages: []\n")], &[]), @r"
    error: `stages`: is empty
      --> all.yaml:2
      hint: list stage files, relative to this one
    ");
    insta::assert_snapshot!(faults_of(&[("all.yaml", "name: demo\nstages: [1]\n")], &[]), @r"
    error: `stages[0]`: expected a path, found the number `1`
      --> all.yaml:2
    ");
}
