//! The optimizer alone, and on several ranks, each a thread with a group of its own.

use std::time::Duration;

use sail_torch::{Backend, GroupOptions, Store};
use tch::{Device, Reduction as Mean};

use super::*;
use crate::checkpoint::Piece;
use crate::config::{EmaPlan, Module, ReduceDtype, Strategy};
use crate::freeze::ParamRates;

const RATES: ParamRates = ParamRates { lr: 1e-3, weight_decay: 0.0, betas: [0.9, 0.95], unlock: None };
const PLAN: OptimizerPlan = OptimizerPlan { eps: 1e-8, clip_norm: None, ema: None };
const PARALLEL: ParallelPlan = ParallelPlan {
    strategy: Strategy::Zero1,
    reduce: ReduceDtype::Fp32,
    bucket_mb: 32,
    timeout_secs: 60,
    first_step_timeout_secs: 60,
};

/// The parameters whose names begin so, at these rates.
fn of(params: &Params, prefixes: &[&str], rates: ParamRates) -> RatesByName {
    let is_one = |name: &&String| prefixes.iter().any(|prefix| name.starts_with(prefix));
    params.keys().filter(is_one).map(|name| (name.clone(), rates)).collect()
}

fn params() -> Params {
    let names = ["vision.a", "projector.1.weight", "projector.3.weight"];
    names.map(|name| (name.to_owned(), Tensor::from_slice(&[1f32, 2.0]))).into_iter().collect()
}

fn alone(params: &Params, plan: OptimizerPlan, precision: Kind) -> Optimizer {
    Optimizer::new(
        params,
        Vec::new(),
        &[&of(params, &["projector."], RATES)],
        plan,
        &PARALLEL,
        precision,
        None,
    )
    .unwrap()
}

/// One micro-batch: `loss` builds it from the parameters.
fn pass(optimizer: &Optimizer, (pass, passes): (usize, usize), loss: impl FnOnce() -> Option<Tensor>) {
    optimizer.begin_pass(pass, passes);
    if let Some(loss) = loss() {
        loss.backward();
    }
    optimizer.end_pass().unwrap();
}

fn gradient(optimizer: &Optimizer, name: &str) -> Vec<f32> {
    for bucket in &optimizer.buckets {
        if let Some(entry) = bucket.layout.entries.iter().find(|entry| entry.name == name) {
            let gradients = optimizer.reducer.gradients(bucket.id).unwrap();
            return Vec::try_from(narrow(&gradients, &entry.range).unwrap()).unwrap();
        }
    }
    panic!("{name} is not trained");
}

#[test]
fn micro_batches_add_up_in_both_precisions() {
    for precision in [Kind::Float, Kind::BFloat16] {
        let params = params();
        let mut optimizer = alone(&params, PLAN, precision);
        for (i, factor) in [1.0, 2.0].into_iter().enumerate() {
            // The second parameter is not reached, as the projector by a pack of text.
            pass(&optimizer, (i, 2), || Some((&params["projector.1.weight"] * factor).sum(Kind::Float)));
        }
        assert_eq!(gradient(&optimizer, "projector.1.weight"), [3.0, 3.0]);
        assert_eq!(gradient(&optimizer, "projector.3.weight"), [0.0, 0.0]);
        optimizer.step(&Factors::flat(1.0)).unwrap();
        pass(&optimizer, (0, 1), || None);
        assert_eq!(gradient(&optimizer, "projector.1.weight"), [0.0, 0.0], "a step clears");
        assert!(!params["vision.a"].requires_grad());
        assert_eq!(optimizer.names().count(), 2, "frozen parameters have no state");
        assert_eq!(params["projector.1.weight"].kind(), precision);
    }
}

#[test]
fn bf16_masters_keep_what_the_compute_copy_cannot() {
    let params = params();
    let mut optimizer = alone(&params, PLAN, Kind::BFloat16);
    let name = "projector.1.weight";
    for _ in 0..10 {
        pass(&optimizer, (0, 1), || Some(params[name].sum(Kind::Float)));
        optimizer.step(&Factors::flat(1.0)).unwrap();
    }
    // Ten steps of 1e-3 each; one alone is lost between two neighbouring bf16 numbers at 2.
    let master = optimizer.final_params("projector.").unwrap()[name].double_value(&[1]);
    assert!((master - 1.99).abs() < 1e-4, "{master}");
    assert_eq!(params[name].kind(), Kind::BFloat16);
    assert!((params[name].double_value(&[1]) - 1.99).abs() < 8e-3);
}

/// Products put their gradients into the bucket: over micro-batches they add up, in 16 bits they are handed over.
#[test]
fn products_add_up_in_both_precisions() {
    for precision in [Kind::Float, Kind::BFloat16] {
        let weight = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).reshape([2, 2]);
        let params = Params::from([("projector.w".to_owned(), weight)]);
        let optimizer = alone(&params, PLAN, precision);
        let rows = Tensor::from_slice(&[1f32, 2.0]).reshape([1, 2]).to_kind(precision);
        let product = || sail_torch::linears(&rows, [(&params["projector.w"], None)], None).unwrap();
        for (i, factor) in [1.0, 2.0].into_iter().enumerate() {
            pass(&optimizer, (i, 2), || Some((&product()[0] * factor).sum(Kind::Float)));
        }
        assert_eq!(gradient(&optimizer, "projector.w"), [3.0, 6.0, 3.0, 6.0], "{precision:?}");
    }
}

/// A gradient that is in its place is taken as the whole.
#[test]
fn a_matrix_that_a_pass_uses_twice_is_refused() {
    let params = Params::from([("projector.w".to_owned(), Tensor::ones([2, 2], (Kind::Float, Device::Cpu)))]);
    let optimizer = alone(&params, PLAN, Kind::Float);
    let rows = Tensor::ones([1, 2], (Kind::Float, Device::Cpu));
    let product = |x: &Tensor| sail_torch::linears(x, [(&params["projector.w"], None)], None).unwrap();
    optimizer.begin_pass(0, 1);
    let error = optimizer.backward(&product(&product(&rows)[0])[0].sum(Kind::Float)).unwrap_err().to_string();
    assert!(error.contains("a second gradient of `projector.w`"), "{error}");
}

#[test]
fn clipping_scales_to_the_limit() {
    let params = params();
    let optimizer = alone(&params, OptimizerPlan { clip_norm: Some(1.0), ..PLAN }, Kind::Float);
    let weights = Tensor::from_slice(&[3f32, 4.0]);
    pass(&optimizer, (0, 1), || Some((&params["projector.3.weight"] * weights).sum(Kind::Float)));
    let norm = optimizer.squared_norms().unwrap().sum(Kind::Double).sqrt();
    assert!((norm.double_value(&[]) - 5.0).abs() < 1e-6);
    optimizer.clip(&norm).unwrap();
    let clipped = gradient(&optimizer, "projector.3.weight");
    assert!((clipped[0] - 0.6).abs() < 1e-5 && (clipped[1] - 0.8).abs() < 1e-5, "{clipped:?}");
}

/// A gradient in another memory layout than its parameter's lands at the right places.
#[test]
fn transposed_gradients_land_where_they_belong() {
    let name = "projector.1.weight";
    let params: Params = [(name.to_owned(), Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)))].into();
    let optimizer = alone(&params, PLAN, Kind::Float);
    let weights = Tensor::from_slice(&[0f32, 3.0, 4.0, 0.0]).reshape([2, 2]);
    pass(&optimizer, (0, 1), || Some((params[name].transpose(0, 1) * weights).sum(Kind::Float)));
    assert_eq!(gradient(&optimizer, name), [0.0, 4.0, 3.0, 0.0]);
}

/// A model of two linear layers with names of blocks, and a table that only some batches reach.
fn small_model() -> (Params, Vec<String>) {
    let seeded = |i: i64, shape: &[i64]| {
        let numel: i64 = shape.iter().product();
        (Tensor::arange(numel, (Kind::Float, Device::Cpu)) * 0.37 + i).sin().reshape(shape) * 0.3
    };
    let shapes: [(&str, &[i64]); 5] = [
        ("llm.embed", &[7, 5]),
        ("llm.layers.0.w", &[9, 5]),
        ("llm.layers.1.w", &[3, 9]),
        ("llm.layers.1.b", &[3]),
        ("projector.w", &[5, 4]),
    ];
    let params =
        shapes.iter().enumerate().map(|(i, (name, shape))| ((*name).to_owned(), seeded(i as i64, shape)));
    (params.collect(), ["llm.layers.0.", "llm.layers.1."].map(str::to_owned).into())
}

/// The loss of micro-batch `i`: every third one has no "image", so it does not reach the projector.
fn loss_of(params: &Params, i: usize, on_block: &dyn Fn(&str)) -> Tensor {
    let text = params["llm.embed"].get((i % 7) as i64).unsqueeze(0);
    let image = Tensor::from_slice(&[1.0, i as f32, -1.0, 0.5]).to_kind(text.kind()).unsqueeze(0);
    let has_image = !i.is_multiple_of(3);
    let x = if has_image { text + image.matmul(&params["projector.w"].tr()) } else { text };
    on_block("llm.layers.0.");
    let x = x.matmul(&params["llm.layers.0.w"].tr()).tanh();
    on_block("llm.layers.1.");
    let y = x.matmul(&params["llm.layers.1.w"].tr()) + &params["llm.layers.1.b"];
    y.mse_loss(&(y.zeros_like() + 1.0), Mean::Sum)
}

const FASTER: ParamRates = ParamRates { lr: 1e-2, weight_decay: 0.1, ..RATES };

struct Run {
    /// Ranks of the group; 0 is a process without one.
    world: usize,
    parallel: ParallelPlan,
    precision: Kind,
    /// The step after which the projector, frozen until then, is trained.
    unlock: Option<usize>,
}

const STEPS: usize = 6;
const BATCHES: usize = 12;

impl Run {
    /// Losses and gradient norms of the steps, and the final parameters.
    fn go(&self) -> (Vec<f64>, Params) {
        let server = Store::serve(0, Duration::from_secs(30)).unwrap();
        let port = server.port();
        let mut results = std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..self.world.max(1))
                .map(|rank| scope.spawn(move || self.rank(rank, (self.world > 0).then_some(port))))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        });
        let first = results.remove(0);
        for other in &results {
            assert!(first.0 == other.0, "ranks see the same losses");
            assert!(
                first.1.iter().all(|(name, value)| value.equal(&other.1[name])),
                "and have the same weights"
            );
        }
        first
    }

    fn join(&self, rank: usize, port: u16) -> Arc<ProcessGroup> {
        let timeout = Duration::from_secs(30);
        let store = Store::connect("127.0.0.1", port, "optim", timeout).unwrap();
        let (name, backend, address) = ("g".to_owned(), Backend::Gloo, Some("127.0.0.1".to_owned()));
        let options = GroupOptions { name, backend, rank, size: self.world, timeout, address };
        Arc::new(ProcessGroup::join(&store, options).unwrap())
    }

    /// All of a step but the update: its loss, and the norm of the gradient of each parameter, which are clipped. The norms
    /// tell a sum from a mean, which AdamW's update does not.
    fn accumulate(
        &self,
        optimizer: &Optimizer,
        params: &Params,
        (step, rank): (usize, usize),
        on_block: &dyn Fn(&str),
    ) -> Vec<f64> {
        let world = self.world.max(1);
        let passes = BATCHES / world;
        let total = Tensor::zeros([1], (Kind::Double, Device::Cpu));
        for pass in 0..passes {
            optimizer.begin_pass(pass, passes);
            let i = step * BATCHES + pass * world + rank;
            let loss = loss_of(params, i, on_block) / BATCHES as f64;
            loss.backward();
            let _ = total.get(0).g_add_(&loss.detach());
            optimizer.end_pass().unwrap();
        }
        let total = Tensor::cat(&[total, optimizer.squared_norms().unwrap()], 0);
        if let Some(group) = &optimizer.reduction.group {
            group.all_reduce(&total, sail_torch::ReduceOp::Sum).unwrap().wait().unwrap();
        }
        let squared = total.narrow(0, 1, total.size()[0] - 1);
        optimizer.clip(&squared.sum(Kind::Double).sqrt()).unwrap();
        [vec![total.double_value(&[0])], Vec::<f64>::try_from(squared.sqrt()).unwrap()].concat()
    }

    fn rank(&self, rank: usize, port: Option<u16>) -> (Vec<f64>, Params) {
        let group = port.map(|port| self.join(rank, port));
        let (params, blocks) = small_model();
        let prefixes = if self.unlock.is_some() { &["llm."][..] } else { &["llm.", "projector."] };
        let trained = of(&params, prefixes, FASTER);
        let plan = OptimizerPlan { clip_norm: Some(0.5), ..PLAN };
        let mut optimizer =
            Optimizer::new(&params, blocks, &[&trained], plan, &self.parallel, self.precision, group)
                .unwrap();
        // Small enough for several buckets.
        assert!(optimizer.buckets.len() >= 2);
        let on_block = optimizer.on_block();
        let mut losses = Vec::new();
        for step in 0..STEPS {
            losses.extend(self.accumulate(&optimizer, &params, (step, rank), &on_block));
            optimizer.step(&Factors::flat(1.0)).unwrap();
            if self.unlock == Some(step) {
                let freed = of(&params, &["projector."], FASTER);
                optimizer.take_over(&params, &Params::new(), &freed).unwrap();
            }
        }
        optimizer.settle().unwrap();
        let mut last = optimizer.final_params("").unwrap();
        for (name, param) in &params {
            last.entry(name.clone()).or_insert_with(|| param.to_kind(Kind::Float));
        }
        (losses, last)
    }
}

fn assert_close(
    (figures, params): &(Vec<f64>, Params),
    expected: &(Vec<f64>, Params),
    (limit, figures_limit): (f64, f64),
    what: &str,
) {
    for (found, expected) in figures.iter().zip(&expected.0) {
        assert!(
            (found - expected).abs() <= figures_limit * expected.abs(),
            "{what}: loss or norm {found}, alone {expected}"
        );
    }
    for (name, value) in params {
        let difference = (value - &expected.1[name]).abs().max().double_value(&[]);
        assert!(difference <= limit, "{what}: {name} differs by {difference:e}");
    }
}

/// Updated parameters are waited for when the forward pass comes to them, not before.
#[test]
fn a_block_waits_for_its_own_parameters() {
    let parallel = ParallelPlan { bucket_mb: 0, ..PARALLEL };
    let run = Run { world: 2, parallel, precision: Kind::Float, unlock: None };
    let server = Store::serve(0, Duration::from_secs(30)).unwrap();
    let port = server.port();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let run = &run;
            scope.spawn(move || {
                let (params, blocks) = small_model();
                let trained = of(&params, &["projector.", "llm."], FASTER);
                let group = Some(run.join(rank, port));
                let mut optimizer =
                    Optimizer::new(&params, blocks, &[&trained], PLAN, &run.parallel, Kind::Float, group)
                        .unwrap();
                let on_block = optimizer.on_block();
                pass(&optimizer, (0, 1), || Some(loss_of(&params, rank + 1, &on_block)));
                optimizer.step(&Factors::flat(1.0)).unwrap();
                let pending = || optimizer.gathers.pending();
                assert_eq!(pending().len(), params.len(), "all have left");
                optimizer.begin_pass(0, 1);
                assert_eq!(pending(), ["llm.layers.0.w", "llm.layers.1.b", "llm.layers.1.w"]);
                on_block("llm.layers.0.");
                assert_eq!(pending(), ["llm.layers.1.b", "llm.layers.1.w"]);
                on_block("llm.layers.1.");
                assert!(pending().is_empty());
                optimizer.end_pass().unwrap();
            });
        }
    });
}

/// A rank keeps its part: of masters and moments under `zero1`, of the gradients too under `zero2`.
#[test]
fn ranks_keep_their_part_of_the_state() {
    let held = |world, strategy| {
        let parallel = ParallelPlan { strategy, ..PARALLEL };
        let server = Store::serve(0, Duration::from_secs(30)).unwrap();
        let run = Run { world, parallel, precision: Kind::BFloat16, unlock: None };
        let port = server.port();
        std::thread::scope(|scope| {
            let run = &run;
            let ranks: Vec<_> = (0..world)
                .map(|rank| {
                    scope.spawn(move || {
                        let group = (world > 1).then(|| run.join(rank, port));
                        let (params, blocks) = small_model();
                        let trained = of(&params, &["projector.", "llm."], FASTER);
                        let bf16 = Kind::BFloat16;
                        let optimizer =
                            Optimizer::new(&params, blocks, &[&trained], PLAN, &run.parallel, bf16, group)
                                .unwrap();
                        for i in 0..2 {
                            pass(&optimizer, (i, 2), || Some(loss_of(&params, i + 1, &|_| ())));
                        }
                        let buckets: i64 = optimizer.buckets.iter().map(|bucket| bucket.layout.numel).sum();
                        (optimizer.held_bytes(), buckets as usize)
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        })
    };
    for strategy in Strategy::ALL {
        for world in [1, 2, 4] {
            for (held, numel) in held(world, strategy) {
                let part = if strategy == Strategy::Ddp { numel } else { numel / world };
                assert_eq!((held.masters, held.moments), (4 * part, 8 * part), "{strategy:?} {world}");
                let gradients = if strategy == Strategy::Zero2 { numel / world } else { numel };
                assert_eq!(held.gradients, 4 * gradients, "{strategy:?} {world}");
            }
        }
    }
}

/// However many ranks share the micro-batches, and whatever they share of the state, the steps are those of one
/// process; also where some ranks have no image, and where a module is unlocked on the way. In 16 bits the gradients of
/// ranks are rounded before they cancel each other, which shows most in the norm of a parameter of three numbers; a mean for
/// a sum would be off by the number of ranks.
#[test]
fn every_strategy_and_world_makes_the_steps_of_one_process() {
    for unlock in [None, Some(2)] {
        let alone = Run { world: 0, parallel: PARALLEL, precision: Kind::Float, unlock }.go();
        for strategy in Strategy::ALL {
            for world in [1, 2, 3, 4] {
                for (reduce, limits) in [(ReduceDtype::Fp32, (1e-5, 1e-5)), (ReduceDtype::Bf16, (2e-2, 0.1))]
                {
                    let parallel = ParallelPlan { strategy, reduce, ..PARALLEL };
                    let run = Run { world, parallel, precision: Kind::Float, unlock };
                    let what = format!("{strategy:?} {world} {reduce:?} {unlock:?}");
                    assert_close(&run.go(), &alone, limits, &what);
                }
            }
        }
    }
}

#[test]
fn masters_of_bf16_are_shared_as_well() {
    let alone = Run { world: 0, parallel: PARALLEL, precision: Kind::BFloat16, unlock: None };
    let expected = alone.go();
    for strategy in Strategy::ALL {
        let parallel = ParallelPlan { strategy, ..PARALLEL };
        let run = Run { world: 2, parallel, precision: Kind::BFloat16, unlock: None };
        assert_close(&run.go(), &expected, (2e-2, 0.1), &format!("{strategy:?}"));
    }
}

/// The values of a kind by name, on one rank alone or under `ddp`.
fn values(optimizer: &Optimizer, kind: StateKind) -> Vec<(String, Tensor)> {
    let state = optimizer.state().unwrap().into_iter().filter(|piece| piece.kind == kind);
    state.map(|piece| (piece.name.to_owned(), piece.tensor.to_kind(Kind::Double))).collect()
}

#[test]
fn averages_follow_the_parameters() {
    for precision in [Kind::Float, Kind::BFloat16] {
        let params = params();
        let ema = EmaPlan { decay: 0.5, modules: [Module::Projector].into() };
        let mut optimizer = alone(&params, OptimizerPlan { ema: Some(ema), ..PLAN }, precision);
        let mut expected = values(&optimizer, StateKind::Param);
        for updates in 1..=12 {
            let loss = || Some(params["projector.1.weight"].square().sum(Kind::Float));
            pass(&optimizer, (0, 1), loss);
            optimizer.step(&Factors::flat(30.0)).unwrap();
            // (1 + 8) / (10 + 8) is the first that is not below 0.5.
            let decay =
                if updates < 8 { (1.0 + f64::from(updates)) / (10.0 + f64::from(updates)) } else { 0.5 };
            for ((_, average), (_, value)) in expected.iter_mut().zip(values(&optimizer, StateKind::Param)) {
                *average = &*average * decay + value * (1.0 - decay);
            }
        }
        let exported = optimizer.final_params("projector.").unwrap();
        for ((name, average), (_, found)) in expected.iter().zip(values(&optimizer, StateKind::Ema)) {
            assert!((average - &found).abs().max().double_value(&[]) < 1e-6, "{name}");
            assert!(exported[name].to_kind(Kind::Double).equal(&found), "{name}");
        }
        let computes = || params["projector.1.weight"].detach().copy();
        let trained = computes();
        let averaged = optimizer.with_averages(|| Ok(computes())).unwrap();
        assert!(averaged.equal(&exported["projector.1.weight"].to_kind(precision)));
        assert!(!averaged.equal(&trained) && computes().equal(&trained), "and trains on as before");
        let error = optimizer.with_averages(|| Err::<(), _>(crate::Error::usage("no", "no")));
        assert!(error.is_err() && computes().equal(&trained));
    }
}

/// What is frozen is its own average, and one that is unlocked begins with its value.
#[test]
fn every_strategy_has_the_same_averages() {
    let averages = |world: usize, strategy, precision| -> Params {
        let run = Run { world, parallel: ParallelPlan { strategy, ..PARALLEL }, precision, unlock: Some(2) };
        let server = Store::serve(0, Duration::from_secs(30)).unwrap();
        let port = server.port();
        std::thread::scope(|scope| {
            let run = &run;
            let on_rank = move |rank| {
                let (params, blocks) = small_model();
                let group = (world > 1).then(|| run.join(rank, port));
                let ema = Some(EmaPlan { decay: 0.8, modules: [Module::Llm, Module::Projector].into() });
                let (plan, trained) = (OptimizerPlan { ema, ..PLAN }, of(&params, &["llm."], FASTER));
                let mut optimizer =
                    Optimizer::new(&params, blocks, &[&trained], plan, &run.parallel, run.precision, group)
                        .unwrap();
                let on_block = optimizer.on_block();
                for step in 0..4 {
                    if run.unlock == Some(step) {
                        let freed = of(&params, &["projector."], FASTER);
                        optimizer.take_over(&params, &Params::new(), &freed).unwrap();
                    }
                    run.accumulate(&optimizer, &params, (step, rank), &on_block);
                    optimizer.step(&Factors::flat(1.0)).unwrap();
                }
                let averages = optimizer.final_params("").unwrap();
                let computed = || params.iter().map(|(name, param)| (name.clone(), param.detach().copy()));
                let trained: Params = computed().collect();
                let averaged: Params = optimizer.with_averages(|| Ok(computed().collect())).unwrap();
                for (name, average) in &averages {
                    assert!(averaged[name].equal(&average.to_kind(run.precision)), "{name}");
                    assert!(!averaged[name].equal(&trained[name]), "{name}");
                    assert!(params[name].equal(&trained[name]), "{name}");
                }
                averages
            };
            let ranks: Vec<_> = (0..world).map(|rank| scope.spawn(move || on_rank(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).next_back().unwrap()
        })
    };
    for precision in [Kind::Float, Kind::BFloat16] {
        let expected = averages(2, Strategy::Ddp, precision);
        assert_eq!(expected.len(), 5);
        for strategy in [Strategy::Zero1, Strategy::Zero2] {
            for (name, average) in averages(2, strategy, precision) {
                let difference = (average - &expected[&name]).abs().max().double_value(&[]);
                assert!(difference < 1e-6, "{strategy:?} {precision:?} {name}: {difference}");
            }
        }
    }
}

/// Bits of everything that an update changes on this rank, and what the model computes with.
fn state_of(
    optimizer: &Optimizer,
    params: &Params,
) -> (Updates, Vec<(String, StateKind, Tensor)>, Vec<Tensor>) {
    optimizer.settle().unwrap();
    let piece = |piece: StatePiece<'_>| (piece.name.to_owned(), piece.kind, piece.tensor.copy());
    let state = optimizer.state().unwrap().into_iter().map(piece).collect();
    (optimizer.updates().clone(), state, params.values().map(|param| param.detach().copy()).collect())
}

/// Put back to a snapshot after steps that broke everything, weights, moments and counts are what they were, and the
/// same steps lead to the same state, bit for bit; also where a module was unlocked on the way.
#[test]
fn what_is_put_back_is_as_it_was() {
    for precision in [Kind::Float, Kind::BFloat16] {
        for (world, strategy) in
            [(0, Strategy::Zero1), (2, Strategy::Ddp), (2, Strategy::Zero1), (2, Strategy::Zero2)]
        {
            let parallel = ParallelPlan { strategy, ..PARALLEL };
            let run = Run { world, parallel, precision, unlock: Some(1) };
            let server = Store::serve(0, Duration::from_secs(30)).unwrap();
            let port = server.port();
            std::thread::scope(|scope| {
                for rank in 0..world.max(1) {
                    let run = &run;
                    scope.spawn(move || put_back_on(run, rank, (world > 0).then_some(port)));
                }
            });
        }
    }
}

fn put_back_on(run: &Run, rank: usize, port: Option<u16>) {
    let what = format!("{:?} {:?}, rank {rank} of {}", run.parallel.strategy, run.precision, run.world);
    let (params, blocks) = small_model();
    let trained = of(&params, &["llm."], FASTER);
    let ema = Some(EmaPlan { decay: 0.9, modules: [Module::Llm].into() });
    let plan = OptimizerPlan { clip_norm: Some(0.5), ema, ..PLAN };
    let group = port.map(|port| run.join(rank, port));
    let mut optimizer =
        Optimizer::new(&params, blocks, &[&trained], plan, &run.parallel, run.precision, group).unwrap();
    let on_block = optimizer.on_block();
    let go = |optimizer: &mut Optimizer, steps: Range<usize>, lr_factor: f64| {
        for step in steps {
            run.accumulate(optimizer, &params, (step, rank), &on_block);
            optimizer.step(&Factors::flat(lr_factor)).unwrap();
        }
    };
    go(&mut optimizer, 0..2, 1.0);
    optimizer.take_over(&params, &Params::new(), &of(&params, &["projector."], FASTER)).unwrap();
    go(&mut optimizer, 2..4, 1.0);
    optimizer.settle().unwrap();
    let pieces = Piece::copies(optimizer.state().unwrap(), Vec::new()).unwrap();
    let then = state_of(&optimizer, &params);
    assert_eq!((then.0.all, then.0.of("projector.w")), (4, 2), "{what}");
    go(&mut optimizer, 4..6, 1.0);
    let later = state_of(&optimizer, &params);
    assert_ne!(later, then, "{what}");

    go(&mut optimizer, 6..8, 1e38);
    // A step that is not made, and is forgotten with the others.
    let found = run.accumulate(&optimizer, &params, (8, rank), &on_block);
    assert!(found[1..].iter().any(|norm| norm.is_nan()), "{what}: the weights are broken");
    let get = |name: &str, kind, elements: Range<i64>| {
        let holds = |piece: &&Piece| {
            piece.name == name
                && piece.kind == kind
                && piece.elements.start <= elements.start
                && elements.end <= piece.elements.end
        };
        let piece = pieces.iter().find(holds).expect("a rank asks for its own part");
        let start = elements.start - piece.elements.start;
        Ok(piece.tensor.narrow(0, start, elements.end - elements.start))
    };
    optimizer.put_back(then.0.clone(), get).unwrap();
    assert_eq!(state_of(&optimizer, &params), then, "{what}");
    // Nor one whose loss is not a number, which leaves no trace.
    pass(&optimizer, (0, 1), || Some(loss_of(&params, 1, &on_block) * f64::NAN));
    optimizer.clip(&Tensor::from(f64::NAN)).unwrap();
    optimizer.discard();
    go(&mut optimizer, 4..6, 1.0);
    assert_eq!(state_of(&optimizer, &params), later, "{what}");
}
