//! The check after a stage's first step: nothing to find in any family, and what it finds where something is wrong.

use std::fs;

use crate::processes::{Job, steps};

const ALL: &str = "train={vision: {lr: 2e-4, weight_decay: 0.01}, projector: {lr: 5e-4}, llm: {lr: 2e-4}}";
const DINOV2: &str = "model_type: dinov2, hidden_size: 64, num_attention_heads: 2, mlp_ratio: 2, num_hidden_layers: 2, \
                      image_size: 112, patch_size: 14";

fn job(sets: &[&str]) -> Job {
    let mut job = Job::new(&[ALL, "schedule.steps=1", "checkpoint.every=null", "parallel.timeout_secs=60"]);
    job.set(sets);
    job
}

fn passes(sets: &[&str], ranks: &[usize]) {
    for &ranks in ranks {
        let job = job(sets);
        job.run(if ranks == 1 { job.alone() } else { job.launch(ranks) }, 0);
        assert_eq!(steps(&job.run_dir()).len(), 1);
    }
}

#[test]
fn every_family_passes() {
    let vit = "hidden_size: 64, num_attention_heads: 2, num_hidden_layers: 2, intermediate_size: 96, image_size: 112, \
               patch_size: 14";
    let llm = "vocab_size: 2048, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2, \
               intermediate_size: 96, num_hidden_layers: 2";
    let encoders = [
        DINOV2.to_owned(),
        format!("model_type: internvl_vision, attention_bias: true, use_mask_token: true, {vit}"),
        format!("model_type: siglip_vision_model, {vit}"),
        format!("model_type: aimv2_vision_model, qkv_bias: true, mlp_bias: true, {vit}"),
    ];
    let experts = "num_experts: 16, num_experts_per_tok: 1, moe_intermediate_size: 32, head_dim: 16, \
                   decoder_sparse_step: 2, router_aux_loss_coef: 0.01, norm_topk_prob: true";
    let decoders = [
        format!("model_type: llama, tie_word_embeddings: false, {llm}"),
        format!("model_type: qwen2, {llm}"),
        format!("model_type: qwen3, tie_word_embeddings: true, head_dim: 16, {llm}"),
        format!("model_type: qwen3_moe, {experts}, {llm}"),
    ];
    for (index, (encoder, decoder)) in encoders.iter().zip(&decoders).enumerate() {
        // Parts of parameters, where there are the most kinds of them.
        let ranks: &[usize] = if index == 3 { &[1, 2] } else { &[1] };
        let sets = [format!("model.vision.random={{{encoder}}}"), format!("model.llm.random={{{decoder}}}")];
        passes(&[&sets[0][..], &sets[1]], ranks);
    }
}

/// Text reaches no encoder, and a rank may have nothing else; the rate at the head of a long warm-up changes little.
#[test]
fn what_a_batch_does_not_reach_is_no_fault() {
    passes(&[r#"data.sources=[{name: text, shards: "data/demo/text-train-*.tar"}]"#], &[1, 2]);

    let sources = r#"data.sources=[{name: caption, shards: "data/demo/caption-train-*.tar"},
        {name: text, shards: "data/demo/text-train-*.tar", weight: 2.0}]"#;
    let sets = [sources, "data.balance=off", "batch.tokens_per_pack=64", "run.seed=5"];
    let one = job(&sets);
    one.run(one.launch(2), 0);
    let packing = &steps(&one.run_dir())[0]["packing"];
    assert!(packing["visual_imbalance"] == 1.0, "one of two packs has all images: {packing}");

    let slow = job(&["schedule.steps=1000000", "schedule.warmup=1000000"]);
    let mut command = slow.alone();
    command.args(["--stop-at", "1"]);
    slow.run(command, 3);
}

/// With scales of 0 at the ends of its branches, nothing inside a block of the encoder is reached.
#[test]
fn what_should_be_reached_and_is_not_ends_the_run() {
    let scales = format!("model.vision.random={{layerscale_value: 0.0, {DINOV2}}}");
    for ranks in [1, 2] {
        let mut job = job(&[&scales, "schedule.steps=2"]);
        let command = |job: &Job| if ranks == 1 { job.alone() } else { job.launch(ranks) };
        let said = job.run(command(&job), 1);
        assert!(
            said.contains("the first step did not train what it should") && said.contains("hint:"),
            "{said}"
        );
        for part in ["vision.encoder.layer.0.mlp.fc1.weight", "has no gradient", " more"] {
            assert!(said.contains(part), "`{part}` in {said}");
        }
        assert!(!said.contains("layer_scale1") && !said.contains("mask_token"), "{said}");
        let folder = fs::read_dir(job.run_dir()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(!folder.into_iter().any(|name| name.to_string_lossy().starts_with("step-")));
        job.set(&["guard.self_check=false"]);
        job.run(command(&job), 0);
    }
}
