//! Attention and recomputation on the CPU: `cargo bench -p sail-model`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sail_model::attention::{Segments, Visibility, packed_attention};
use sail_model::blocks::Listener;
use sail_model::llm::{Llm, LlmConfig};
use sail_model::params::{Builder, Params, RandomSource};
use sail_torch::take_grad;
use serde_json::json;
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
/// Of the samples of a pack.
const LENGTHS: [i64; 7] = [61, 344, 17, 130, 208, 129, 135];

/// Attention over a pack and its gradients: each sample by itself, and all under one mask.
fn attention(criterion: &mut Criterion) {
    let (heads, width, rows) = (9, 64, LENGTHS.iter().sum::<i64>());
    tch::manual_seed(7);
    let inputs: [Tensor; 3] =
        std::array::from_fn(|_| Tensor::randn([rows, heads, width], FLOAT).set_requires_grad(true));
    let [q_tnh, k_tnh, v_tnh] = &inputs;
    let segments = Segments::of_lengths(LENGTHS.to_vec()).expect("none is empty");
    let visible_tt = visible(rows);
    let packed = || packed_attention(q_tnh, k_tnh, v_tnh, &segments, Visibility::Causal);
    let masked = || {
        let [q_1nth, k_1nth, v_1nth] = [q_tnh, k_tnh, v_tnh].map(|x| x.transpose(0, 1).unsqueeze(0));
        let mask = Some(&visible_tt);
        Tensor::scaled_dot_product_attention(&q_1nth, &k_1nth, &v_1nth, mask, 0.0, false, None, false)
    };
    let mut group = criterion.benchmark_group("attention and gradients");
    group.throughput(Throughput::Elements(rows as u64));
    let outputs: [(&str, &dyn Fn() -> Tensor); 2] = [("segments", &packed), ("one mask", &masked)];
    for (name, output) in outputs {
        group.bench_function(name, |bencher| {
            bencher.iter(|| Tensor::run_backward(&[output().sum(Kind::Float)], &inputs, false, false));
        });
    }
}

/// `[t, t]`: which rows of a pack each row sees.
fn visible(rows: i64) -> Tensor {
    let visible = Tensor::zeros([rows, rows], (Kind::Bool, Device::Cpu));
    let mut start = 0;
    for length in LENGTHS {
        let own = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).tril(0);
        visible.narrow(0, start, length).narrow(1, start, length).copy_(&own);
        start += length;
    }
    visible
}

/// A pack through a block of a language model and back, its activations kept or computed again.
fn recompute(criterion: &mut Criterion) {
    let (llm, params, listener) = block();
    let rows = LENGTHS.iter().sum::<i64>();
    let segments = Segments::of_lengths(LENGTHS.to_vec()).expect("none is empty");
    let positions: Vec<i64> = LENGTHS.iter().flat_map(|&length| 0..length).collect();
    let positions_t = Tensor::from_slice(&positions);
    let x_td = Tensor::randn([rows, llm.config().hidden_size()], FLOAT).set_requires_grad(true);
    let trained: Vec<&Tensor> = params.values().chain([&x_td]).collect();
    let mut group = criterion.benchmark_group("a block and its gradients");
    group.sample_size(20).throughput(Throughput::Elements(rows as u64));
    let blocks: BTreeSet<String> = listener.blocks().into_iter().collect();
    for (name, recomputed) in [("kept", BTreeSet::new()), ("recomputed", blocks)] {
        listener.set_recomputed(recomputed);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                llm.trunk(&x_td, &positions_t, &segments, None).x_td.sum(Kind::Float).backward();
                // Otherwise the next ones would be added to them.
                trained.iter().map(|tensor| take_grad(tensor).expect("it is a leaf")).collect::<Vec<_>>()
            });
        });
    }
}

/// One block of the size of SmolLM2-135M's, all of it trained, with its parameters and who can have it recomputed.
fn block() -> (Llm, Params, Listener) {
    let config = LlmConfig::from_keys(&json!({
        "model_type": "llama", "vocab_size": 256, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
    }));
    let config = config.expect("the keys are those of a llama");
    let (params, listener) = (Rc::new(RefCell::new(Params::new())), Listener::default());
    let source = RandomSource::new(7, "llm");
    let builder = Builder::new(params.clone(), "llm", &source, FLOAT).listened_by(&listener);
    let llm = Llm::new(&config, &builder).expect("random weights fit");
    drop(builder);
    let params = params.take();
    for param in params.values() {
        let _ = param.set_requires_grad(true);
    }
    (llm, params, listener)
}

criterion_group!(benches, attention, recompute);
criterion_main!(benches);
