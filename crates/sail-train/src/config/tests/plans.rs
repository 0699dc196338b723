//! Good files: defaults, derived values, inheritance, overrides, round trips, and the files the project ships.

use std::path::{Path, PathBuf};

use sail_model::projector::{ProjectorConfig, ProjectorKind};
use sail_model::weights::ModelRef;

use super::super::{
    Amount, Config, CurriculumPlan, EarlyStopPlan, Listen, ModelSource, Module, ModulePlan, Plan, Rates,
    VisualShape, load,
};
use super::{STAGE, edited, load_files, plan};

fn shipped(name: &str, sets: &[&str]) -> CurriculumPlan {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(name).join("curriculum.yaml");
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    match load(&path, &sets) {
        Ok(Config::Curriculum(curriculum)) => curriculum,
        Ok(Config::Stage(_)) => panic!("{} is a stage", path.display()),
        Err(errors) => panic!("{errors}"),
    }
}

/// As rates are where a file says no more than `lr`.
fn trained(lr: f64) -> ModulePlan {
    ModulePlan::Train(Rates { lr, weight_decay: 0.0, betas: [0.9, 0.95], layer_decay: 1.0 })
}

/// A number was taken for tokens where the stage's length is in tokens.
#[test]
fn a_number_at_an_unlock_point_is_of_steps() {
    let unlock = "llm: frozen\n  unfreeze: [{ at: 7, match: llm, lr: 1e-3, warmup: 10% }]";
    let text = STAGE.replace("steps: 60", "tokens: 5000").replace("llm: frozen", unlock);
    let first = plan(&text, &[]);
    let point = &first.train.unfreeze[0];
    assert_eq!((point.at, point.warmup), (Amount::Steps(7), Amount::Tokens(500)));
    assert_eq!(plan(&first.to_yaml(), &[]), first);
}

#[test]
fn large_numbers_may_be_written_short() {
    let plan = plan(&STAGE.replace("steps: 60", "tokens: 121e9, warmup: 2e9 tokens"), &[]);
    assert_eq!(
        (plan.schedule.length, plan.schedule.warmup),
        (Amount::Tokens(121_000_000_000), 2_000_000_000)
    );
}

#[test]
fn defaults_and_derived_values() {
    let plan = plan(STAGE, &[]);
    assert_eq!(plan.run.seed, 42);
    assert_eq!(plan.run.dir, PathBuf::from("runs/demo"));
    assert_eq!(plan.model.llm.tokenizer, Some(PathBuf::from("weights/llm/tokenizer.json")));
    assert_eq!(plan.schedule.warmup, 2, "3% of 60");
    assert_eq!(plan.optimizer.clip_norm, Some(1.0));
    assert_eq!(plan.train.get(Module::Projector), &trained(1e-3));
    assert_eq!(plan.train.iter().map(|(module, _)| module).collect::<Vec<_>>(), Module::ALL);
    assert!(plan.init.is_none() && plan.eval.is_none() && plan.export.is_none());
}

#[test]
fn models_may_be_on_a_hub() {
    let text = edited(&[
        ("from: weights/vit", "from: hf:org/vit@v1.0"),
        ("{ from: weights/llm }", "{ from: \"hf:org/llm\" }"),
    ]);
    let resolved = plan(&text, &[]);
    let revision = Some("v1.0".to_owned());
    let vit = ModelRef::Hub { repo: "org/vit".to_owned(), revision };
    assert_eq!(resolved.model.vision.source, ModelSource::From(vit));
    assert_eq!(resolved.model.llm.tokenizer, None);
    let written = resolved.to_yaml();
    assert!(
        written.contains("from: hf:org/vit@v1.0\n") && written.contains("from: hf:org/llm\n"),
        "{written}"
    );
    assert_eq!(plan(&written, &[]), resolved);
    let own = plan(&text, &["model.llm.tokenizer=own.json"]);
    assert_eq!(own.model.llm.tokenizer, Some(PathBuf::from("own.json")));
}

#[test]
fn data_spec_takes_the_tokens_of_a_tile() {
    let plan = plan(STAGE, &["run.seed=7"]);
    let shape = VisualShape { tokens_per_tile: 16, unit_px: 28 };
    let spec = plan.data_spec(shape);
    assert_eq!((spec.image.tile_px, spec.image.tokens_per_tile, spec.seed), (112, 16, 7));
    assert_eq!(plan.eval_spec(shape), None);
    assert_eq!(spec.sources[0].sampling_weights, None);
    let weighed = self::plan(STAGE, &["data.sources[0].sampling_weights=w.safetensors"]).data_spec(shape);
    assert_eq!(weighed.sources[0].sampling_weights, Some(PathBuf::from("w.safetensors")));
}

#[test]
fn projectors_without_a_shuffle_merge_nothing() {
    let projector = |set: &str| plan(STAGE, &[set]).model.projector;
    let [shuffle, mlp] = ["model.projector.merge=4", "model.projector.kind=mlp"].map(projector);
    assert_eq!(shuffle, ProjectorConfig { kind: ProjectorKind::PixelShuffle, merge: 4 });
    assert_eq!(mlp, ProjectorConfig { kind: ProjectorKind::Mlp, merge: 1 });
}

#[test]
fn two_ways_of_writing() {
    let text = edited(&[
        ("{ steps: 60 }", "{ steps: 60, warmup: 5 }\noptimizer: { clip_norm: null }\nlog:"),
        ("\"caption-*.tar\"", "[a.tar, b.tar]"),
    ]);
    let plan = plan(&text, &["schedule.warmup=25%", "run.device=cuda:1"]);
    assert_eq!(plan.schedule.warmup, 15);
    assert_eq!(plan.run.device.to_string(), "cuda:1");
    assert_eq!(plan.optimizer.clip_norm, None);
    assert_eq!(plan.log.every, 10, "an empty section has its defaults");
    assert_eq!(plan.data.sources[0].shards, ["a.tar", "b.tar"]);
}

#[test]
fn overrides_beat_the_file_and_reach_into_lists() {
    let plan = plan(
        STAGE,
        &["train.llm.lr=1e-5", "data.sources[0].weight=3", "train.projector=frozen", "init.from=x"],
    );
    assert_eq!(plan.train.llm, trained(1e-5));
    assert_eq!(plan.train.projector, ModulePlan::Frozen);
    assert!((plan.data.sources[0].weight - 3.0).abs() < f64::EPSILON);
    assert_eq!(plan.init.map(|init| init.from), Some(PathBuf::from("x")));
}

#[test]
fn root_goes_in_front_of_relative_folders_only() {
    let moved = plan(STAGE, &["run.root=/tmp/x", "init.from=runs/a"]);
    assert_eq!(moved.run.dir, PathBuf::from("/tmp/x/runs/demo"));
    assert_eq!(moved.init.map(|init| init.from), Some(PathBuf::from("/tmp/x/runs/a")));
    let fixed = plan(STAGE, &["run.root=/tmp/x", "run.dir=/elsewhere"]);
    assert_eq!(fixed.run.dir, PathBuf::from("/elsewhere"));
}

#[test]
fn extends_merges_mappings_and_replaces_lists() {
    let child = "extends: base.yaml\nrun: { name: child }\ntrain: { vision: { lr: 1e-5 } }\n\
                 data: { sources: [{ name: ocr, shards: ocr.tar }] }\n";
    let config = load_files(&[("child.yaml", child), ("base.yaml", STAGE)], &[]).unwrap();
    let Config::Stage(plan) = config else { panic!("a curriculum") };
    assert_eq!((plan.run.name.as_str(), plan.run.dir.as_path()), ("child", Path::new("runs/demo")));
    assert_eq!(plan.train.vision, trained(1e-5));
    assert_eq!(plan.data.streams, 2);
    assert_eq!(plan.data.sources.iter().map(|source| source.name.as_str()).collect::<Vec<_>>(), ["ocr"]);
}

#[test]
fn shipped_files_load_and_survive_text() {
    for name in ["demo", "tiny"] {
        let curriculum = shipped(name, &[]);
        assert_eq!(curriculum.name, name);
        assert_eq!(curriculum.stages.len(), 3);
        for (_, stage) in &curriculum.stages {
            let json = serde_json::to_string(stage).unwrap();
            assert_eq!(&serde_json::from_str::<Plan>(&json).unwrap(), stage, "through JSON");
            assert_eq!(&plan(&stage.to_yaml(), &[]), stage, "through a configuration file");
        }
        let trained = |index: usize| {
            let plan: &Plan = &curriculum.stages[index].1;
            plan.train
                .iter()
                .filter(|(_, module)| module.is_trained())
                .map(|(module, _)| module)
                .collect::<Vec<_>>()
        };
        assert_eq!(trained(0), [Module::Projector]);
        assert_eq!(trained(1), [Module::Vision, Module::Projector]);
        assert_eq!(trained(2), Module::ALL);
    }
}

#[test]
fn stages_of_a_curriculum_take_overrides() {
    let sets = ["run.root=/tmp/x", "schedule.steps=9", "stages[1].schedule.steps=3"];
    let stages = shipped("tiny", &sets).stages;
    assert_eq!(stages.iter().map(|(_, plan)| plan.schedule.length.count()).collect::<Vec<_>>(), [9, 3, 9]);
    let init = stages[1].1.init.as_ref().map(|init| init.from.as_path());
    assert_eq!(init, Some(stages[0].1.run.dir.as_path()));
    assert!(stages.iter().all(|(_, plan)| plan.run.dir.starts_with("/tmp/x")));
}

#[test]
fn a_configuration_prints_one_document_per_stage() {
    let config = Config::Curriculum(shipped("tiny", &[]));
    assert_eq!(config.plans().len(), 3);
    let text = config.to_yaml();
    let documents: Vec<&str> = text.split("---\n").skip(1).collect();
    assert_eq!(documents.len(), 3);
    for (document, expected) in documents.into_iter().zip(config.plans()) {
        assert!(document.starts_with("# ") && document.contains("/tiny/stage"));
        assert_eq!(&plan(document, &[]), expected);
    }
}

#[test]
fn differences_and_hash() {
    let old = plan(STAGE, &[]);
    let new = plan(STAGE, &["train.llm.lr=1e-5", "schedule.steps=30", "checkpoint.every=5"]);
    assert_eq!(old.diff(&old), []);
    let lines: Vec<String> = old.diff(&new).iter().map(ToString::to_string).collect();
    insta::assert_snapshot!(lines.join("\n"), @r#"
    `checkpoint.every`: not given -> 5
    `schedule.steps`: 60 -> 30
    `schedule.warmup`: 2 -> 1
    `train.llm`: "frozen" -> not given
    `train.llm.betas[0]`: not given -> 0.9
    `train.llm.betas[1]`: not given -> 0.95
    `train.llm.layer_decay`: not given -> 1.0
    `train.llm.lr`: not given -> 0.00001
    `train.llm.weight_decay`: not given -> 0.0
    "#);
    assert_eq!(old.hash(), plan(STAGE, &[]).hash());
    assert_ne!(old.hash(), new.hash());
    assert_eq!(old.hash().len(), 64);
}

#[test]
fn hash_ignores_the_order_of_keys() {
    let random = |keys: &str| edited(&[("from: weights/vit", keys)]);
    let one = plan(&random("random: { model_type: dinov2, hidden_size: 12, num_attention_heads: 2 }"), &[]);
    let other = plan(&random("random: { num_attention_heads: 2, hidden_size: 12, model_type: dinov2 }"), &[]);
    assert_eq!(one, other);
    assert_eq!(one.hash(), other.hash());
}

#[test]
fn awkward_text_survives_a_written_plan() {
    let words = [
        "12",
        "+5",
        "1e3",
        ".5",
        "5.",
        "-.inf",
        ".NaN",
        "0x1F",
        "true",
        "False",
        "null",
        "~",
        "yes",
        "a: b",
        "# no",
        "- x",
        "&a",
        "*a",
        "!t",
        "a\nb",
        " pad ",
        "'quoted\"",
        "%x",
        "ä",
        "{a}",
        "[a]",
        "---",
        "tab\tbed",
        "1e999",
        "e5",
        "12-3",
    ];
    let mut old = plan(STAGE, &[]);
    for word in words {
        word.clone_into(&mut old.run.name);
        old.data.system = Some(word.to_owned());
        assert_eq!(plan(&old.to_yaml(), &[]), old, "`{word}` as\n{}", old.to_yaml());
    }
}

#[test]
fn a_stage_ends_early_once_nothing_lower_is_measured() {
    let reached = |patience, min_delta, losses: &[f64]| {
        EarlyStopPlan { patience, min_delta }.is_reached(losses.iter().copied())
    };
    assert!(!reached(1, 0.0, &[]) && !reached(1, 0.0, &[5.0]));
    assert!(!reached(2, 0.0, &[5.0, 5.1]) && reached(2, 0.0, &[5.0, 5.1, 5.2]));
    // A new lowest loss begins the count anew; a tie is none.
    assert!(!reached(2, 0.0, &[5.0, 5.1, 4.9, 5.0]) && reached(2, 0.0, &[5.0, 5.1, 4.9, 4.9, 5.0]));
    // A slow fall that adds up to the difference counts once it has.
    assert!(!reached(2, 0.1, &[5.0, 4.95, 4.89, 4.85]) && reached(2, 0.1, &[5.0, 4.95, 4.91]));
}

#[test]
fn figures_go_to_tensorboard_and_where_else_they_are_wanted() {
    let log =
        |log: &str| plan(&STAGE.replace("{ steps: 60 }", &format!("{{ steps: 60 }}\nlog: {log}")), &[]).log;
    let usual = log("{}");
    assert!(usual.tensorboard && usual.prometheus.is_none() && usual.mlflow.is_none());
    // A port alone is one of this machine.
    for (text, expected) in [
        ("9464", "127.0.0.1:9464"),
        ("\"9464\"", "127.0.0.1:9464"),
        ("\"0.0.0.0:80\"", "0.0.0.0:80"),
        ("\"[::1]:80\"", "[::1]:80"),
    ] {
        let Listen(address) = log(&format!("{{ prometheus: {text} }}")).prometheus.unwrap();
        assert_eq!(address.to_string(), expected);
    }
    let mlflow = log("{ mlflow: { url: \"http://x:5000/path/\" } }").mlflow.unwrap();
    assert_eq!((mlflow.url.as_str(), mlflow.experiment.as_str()), ("http://x:5000/path", "sail"));
    assert_eq!((mlflow.flush_secs, mlflow.model), (60, true));
}
