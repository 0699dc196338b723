//! The experiments in `configs/`: each differs from what it is compared with in the values that name it.

use std::path::Path;

use super::super::{Plan, load};

/// The stages of a configuration of the project.
fn plans(file: &str) -> Vec<Plan> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(file);
    load(&path, &[]).unwrap().plans().into_iter().cloned().collect()
}

fn stage(file: &str) -> Plan {
    let mut plans = plans(file);
    assert_eq!(plans.len(), 1, "{file}");
    plans.remove(0)
}

/// Every value in which two stages differ; the name and the folder of a run always do.
fn differences(one: &str, other: &str) -> Vec<String> {
    let mut paths: Vec<String> = stage(one).diff(&stage(other)).into_iter().map(|found| found.path).collect();
    for always in ["run.dir", "run.name"] {
        let index = paths.iter().position(|path| path == always);
        paths.remove(index.unwrap_or_else(|| panic!("{one} and {other} have the same {always}")));
    }
    paths
}

#[test]
fn ablations_differ_in_what_they_leave_out() {
    // The warm-up is a share of the steps.
    let longer = ["data.samples", "init.from", "schedule.steps", "schedule.warmup"];
    let start = ["init.from"];
    let projector_and_llm = [
        "export.vit",
        "train.vision",
        "train.vision.betas[0]",
        "train.vision.betas[1]",
        "train.vision.layer_decay",
        "train.vision.lr",
        "train.vision.weight_decay",
    ];
    let cases: [(&str, &str, &[&str]); 5] = [
        ("ablation/direct-cotraining.yaml", "sailvit-large/stage3.yaml", &longer),
        ("ablation/without-stage1/stage2.yaml", "sailvit-large/stage2.yaml", &longer),
        ("ablation/without-stage1/stage3.yaml", "sailvit-large/stage3.yaml", &start),
        ("ablation/without-stage2.yaml", "sailvit-large/stage3.yaml", &longer),
        ("ablation/projector-and-llm.yaml", "ablation/without-stage2.yaml", &projector_and_llm),
    ];
    for (ablation, whole, named) in cases {
        assert_eq!(differences(ablation, whole), named, "{ablation}, {whole}");
    }
}

#[test]
fn other_recipes_differ_in_models_images_and_packs() {
    for number in 1..=3 {
        let large = format!("sailvit-large/stage{number}.yaml");
        let of = |recipe: &str| differences(&format!("{recipe}/stage{number}.yaml"), &large);
        let init: &[&str] = if number == 1 { &[] } else { &["init.from"] };
        assert_eq!(of("sailvit-huge"), [init, &["model.llm.from", "model.vision.from"]].concat());
        let batch = ["batch.packs_per_step", "batch.tokens_per_pack"];
        let frames: &[&str] = if number == 2 { &["data.max_frames"] } else { &[] };
        assert_eq!(of("moe"), [&batch, frames, init, &["model.llm.from"]].concat());
        let images = ["data.any_resolution", "data.tiling", "init.from"];
        let anyres = of("anyres");
        assert!(anyres.iter().all(|path| images.iter().any(|part| path.starts_with(part))), "{anyres:?}");
    }
    let progressive = differences("sailvit-large/stage3-progressive.yaml", "sailvit-large/stage3.yaml");
    assert!(progressive.iter().all(|path| path.starts_with("train.")), "{progressive:?}");
}

/// The number of samples is what ablations have in common, so that it is none of what they compare.
#[test]
fn every_curriculum_sees_as_many_samples() {
    const SAMPLES: u64 = 58_500_000;
    /// Samples of a step: stage 1 has 1,920, the others 512.
    const BATCHES: [u64; 2] = [1920, 512];
    let warm_up = "sailvit-large/stage1.yaml";
    for files in [
        &["sailvit-large/curriculum.yaml"][..],
        &["sailvit-huge/curriculum.yaml"],
        &["anyres/curriculum.yaml"],
        &["moe/curriculum.yaml"],
        &["ablation/direct-cotraining.yaml"],
        &["ablation/without-stage1/curriculum.yaml"],
        &[warm_up, "ablation/without-stage2.yaml"],
        &[warm_up, "ablation/projector-and-llm.yaml"],
    ] {
        let stages: Vec<Plan> = files.iter().flat_map(|file| plans(file)).collect();
        let samples = |plan: &Plan| plan.data.samples.unwrap();
        assert_eq!(stages.iter().map(samples).sum::<u64>(), SAMPLES, "{files:?}");
        for plan in &stages {
            let steps = BATCHES.map(|batch| (samples(plan) + batch / 2) / batch);
            assert!(steps.contains(&plan.schedule.length.count()), "{}", plan.run.name);
        }
    }
}
