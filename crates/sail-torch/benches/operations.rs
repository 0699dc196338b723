//! On the CPU, `cargo bench -p sail-torch`: what blocks repeat, beside the same composed of libtorch's operators, the loss,
//! beside that of all logits, and an optimizer step.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sail_torch::{
    AdamWOptions, AdamWSlot, foreach_mul, fused_adamw, linear_cross_entropy, linears, rms_norm, rotate,
    squared_norms, swiglu,
};
use tch::{Device, Kind, Reduction, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// Head and loss with their gradients: 256 rows of 256 against 49,152 tokens.
fn loss(criterion: &mut Criterion) {
    let (rows, width, vocab) = (256, 256, 49_152);
    tch::manual_seed(7);
    let x_rd = Tensor::randn([rows, width], FLOAT).set_requires_grad(true);
    let head_vd = (Tensor::randn([vocab, width], FLOAT) * 0.02).set_requires_grad(true);
    let targets_r = Tensor::randint(vocab, [rows], (Kind::Int64, Device::Cpu));
    let weights_r = Tensor::rand([rows], FLOAT);
    let in_one = || {
        let made = linear_cross_entropy(&x_rd, &head_vd, &targets_r, &weights_r);
        made.expect("the shapes fit").sum
    };
    let plain = || {
        let log_probs_rv = x_rd.linear(&head_vd, None::<&Tensor>).log_softmax(-1, Kind::Float);
        let losses_r = log_probs_rv.g_nll_loss(&targets_r, None::<&Tensor>, Reduction::None, -100);
        (losses_r * &weights_r).sum(Kind::Float)
    };
    let mut group = criterion.benchmark_group("loss and gradients");
    group.sample_size(20).throughput(Throughput::Elements(rows as u64));
    let sums: [(&str, &dyn Fn() -> Tensor); 2] = [("linear_cross_entropy", &in_one), ("all logits", &plain)];
    for (name, sum) in sums {
        group.bench_function(name, |bencher| {
            bencher.iter(|| Tensor::run_backward(&[sum()], &[&x_rd, &head_vd], false, false));
        });
    }
}

/// What a decoder of width 576 repeats over 512 rows, with its gradients, in one operation and composed.
fn blocks(criterion: &mut Criterion) {
    tch::manual_seed(7);
    let random = |shape: &[i64]| Tensor::randn(shape, FLOAT).set_requires_grad(true);
    let (x_td, weight_d, heads_tnh) = (random(&[512, 576]), random(&[576]), random(&[512, 9, 64]));
    let (gate, up) = (random(&[512, 1536]), random(&[512, 1536]));
    let angles = Tensor::randn([512, 1, 32], FLOAT);
    let (cos, sin) = (angles.cos(), angles.sin());
    let maps = [random(&[576, 576]), random(&[192, 576]), random(&[192, 576])];
    let mut group = criterion.benchmark_group("blocks");
    let mut pair =
        |name: &str, inputs: &[&Tensor], made: &dyn Fn() -> Tensor, composed: &dyn Fn() -> Tensor| {
            for (way, compute) in [("in one", made), ("composed", composed)] {
                group.bench_function(format!("{name}, {way}"), |bencher| {
                    bencher
                        .iter(|| Tensor::run_backward(&[compute().sum(Kind::Float)], inputs, false, false));
                });
            }
        };
    pair("rms_norm", &[&x_td, &weight_d], &|| rms_norm(&x_td, &weight_d, 1e-5).expect("they fit"), &|| {
        x_td.rms_norm([576], None::<&Tensor>, 1e-5) * &weight_d
    });
    pair("swiglu", &[&gate, &up], &|| swiglu(&gate, &up).expect("they fit"), &|| gate.silu() * &up);
    pair("rotate", &[&heads_tnh], &|| rotate(&heads_tnh, &cos, &sin).expect("they fit"), &|| {
        let halves = heads_tnh.chunk(2, -1);
        let (low, high) = (&halves[0], &halves[1]);
        Tensor::cat(&[low * &cos - high * &sin, high * &cos + low * &sin], -1)
    });
    let inputs = [&x_td, &maps[0], &maps[1], &maps[2]];
    let together = || {
        let made = linears(&x_td, maps.each_ref().map(|map| (map, None)), None).expect("they fit");
        Tensor::cat(&made, 1)
    };
    pair("linears", &inputs, &together, &|| {
        Tensor::cat(&maps.each_ref().map(|map| x_td.linear(map, None::<&Tensor>)), 1)
    });
}

/// Norm, clipping and update of 10M parameters in 400 tensors of several sizes, as a transformer has them.
fn optimizer_step(criterion: &mut Criterion) {
    let shapes: [&[i64]; 4] = [&[256, 256], &[256], &[128, 256], &[1]];
    let slots: Vec<AdamWSlot> = shapes.iter().cycle().take(400).map(|shape| slot(shape)).collect();
    let parameters: usize = slots.iter().map(|slot| slot.param.numel()).sum();
    let grads: Vec<Tensor> = slots.iter().map(|slot| slot.grad.shallow_clone()).collect();
    let options = AdamWOptions { lr: 1e-4, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.05 };
    let mut group = criterion.benchmark_group("optimizer step");
    group.throughput(Throughput::Elements(parameters as u64));
    group.bench_function("fused_adamw", |bencher| {
        bencher.iter(|| fused_adamw(&slots, options).expect("the slots fit"));
    });
    // A factor of 1 does the same work and leaves the gradients as they are.
    let factor = Tensor::from(1f32);
    group.bench_function("norm and clipping", |bencher| {
        bencher.iter(|| {
            let norms = squared_norms(&grads).expect("all are on the CPU");
            foreach_mul(&grads, &factor).expect("all are on the CPU");
            norms.sum(Kind::Double).sqrt()
        });
    });
}

fn slot(shape: &[i64]) -> AdamWSlot {
    let param = Tensor::randn(shape, FLOAT);
    AdamWSlot {
        grad: Tensor::randn(shape, FLOAT),
        exp_avg: param.zeros_like(),
        exp_avg_sq: param.zeros_like(),
        step: Tensor::from(0f32),
        param,
    }
}

criterion_group!(benches, blocks, loss, optimizer_step);
criterion_main!(benches);
