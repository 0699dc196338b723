//! What a rank holds for training under each strategy, without and with a pass.
//!
//! Formulas as in Rajbhandari et al. 2020 (`ZeRO`, arXiv 1910.02054, section 3), for this optimizer: fp32 masters
//! where the compute dtype is another, two fp32 moments, fp32 gradients in flat buckets. Pure: sizes in, bytes
//! out.

use super::graph::Live;
use crate::config::{ReduceDtype, Strategy};
use crate::optim::{UNDER_WAY, UNDER_WAY_ELEMENTS};

/// Bytes of fp32.
const FLOAT: u64 = 4;

/// What a rank holds, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What the model computes with, trained and frozen.
    pub parameters: u64,
    /// fp32 parameters beside those.
    pub masters: u64,
    /// Sums of gradients, and copies of them that travel.
    pub gradients: u64,
    /// Both moments, and moving averages.
    pub moments: u64,
    /// What a pass takes, but for the head.
    pub activations: u64,
    /// Logits of some rows, their softmax, and the gradients made of it.
    pub logits: u64,
}

impl Memory {
    /// Of everything.
    pub fn total(&self) -> u64 {
        let Self { parameters, masters, gradients, moments, activations, logits } = self;
        parameters + masters + gradients + moments + activations + logits
    }
}

/// The parameters of a model, as elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of all frozen ones together.
    pub frozen: u64,
    /// Of each bucket of trained ones, padding included.
    pub buckets: Vec<u64>,
    /// Of those buckets together of which there are moving averages.
    pub averaged: u64,
}

impl Sizes {
    /// Of all buckets.
    pub fn trained(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// What a rank of `world` holds while a pass takes `pass`.
    pub fn memory(
        &self,
        (strategy, reduce): (Strategy, ReduceDtype),
        world: u64,
        compute_bytes: u64,
        pass: Live,
    ) -> Memory {
        let trained = self.trained();
        let part = trained / world;
        let shared_by = if strategy == Strategy::Ddp { 1 } else { world };
        let owned = trained / shared_by;
        let mut gradients = FLOAT * if strategy == Strategy::Zero2 && world > 1 { part } else { trained };
        if world > 1 {
            let narrow = if reduce == ReduceDtype::Bf16 { 2 } else { 0 };
            let under_way = self.largest(UNDER_WAY).max(trained.min(UNDER_WAY_ELEMENTS as u64));
            // Under `zero2` the bucket that fills is whole as well.
            let whole =
                if strategy == Strategy::Zero2 { trained.min(under_way + self.largest(1)) } else { 0 };
            gradients += FLOAT * whole + narrow * under_way;
        }
        Memory {
            parameters: compute_bytes * (self.frozen + trained),
            masters: if compute_bytes == FLOAT { 0 } else { FLOAT * owned },
            gradients,
            moments: FLOAT * (2 * owned + self.averaged / shared_by),
            activations: pass.trunk,
            logits: pass.head,
        }
    }

    /// Elements of the `count` largest buckets.
    fn largest(&self, count: usize) -> u64 {
        let mut sizes = self.buckets.clone();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.iter().take(count).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sail_model::params::Params;
    use sail_torch::{Backend, GroupOptions, ProcessGroup, Store};
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::config::{EmaPlan, Module, OptimizerPlan, ParallelPlan};
    use crate::freeze::ParamRates;
    use crate::optim::layout::Layout;
    use crate::optim::{HeldBytes, Optimizer, layout};

    const SIZES: fn() -> Sizes = || Sizes { frozen: 1000, buckets: vec![400, 800, 400, 400], averaged: 0 };

    fn memory(strategy: Strategy, reduce: ReduceDtype, world: u64, compute_bytes: u64) -> Memory {
        SIZES().memory((strategy, reduce), world, compute_bytes, Live { trunk: 7, head: 5 })
    }

    #[test]
    fn bf16_has_masters_beside_the_parameters() {
        let ddp = memory(Strategy::Ddp, ReduceDtype::Fp32, 4, 2);
        let expected = Memory {
            parameters: 6000,
            masters: 8000,
            gradients: 8000,
            moments: 16_000,
            activations: 7,
            logits: 5,
        };
        assert_eq!(ddp, expected);
        let zero1 = memory(Strategy::Zero1, ReduceDtype::Fp32, 4, 2);
        assert_eq!(zero1, Memory { masters: 2000, moments: 4000, ..ddp });
        // A quarter, and all buckets, since they are small.
        let zero2 = memory(Strategy::Zero2, ReduceDtype::Fp32, 4, 2);
        assert_eq!(zero2, Memory { gradients: 2000 + 4 * 2000, ..zero1 });
        assert_eq!(zero2.total(), 6000 + 2000 + 10_000 + 4000 + 12);
        let large = Sizes { frozen: 0, buckets: vec![8 << 20; 100], averaged: 0 };
        let pass = Live::default();
        let zero2 = large.memory((Strategy::Zero2, ReduceDtype::Fp32), 100, 2, pass);
        assert_eq!(
            zero2.gradients,
            4 * ((8 + 32 + 8) << 20),
            "a part, what is under way, and one that fills"
        );
    }

    #[test]
    fn in_fp32_the_parameters_are_the_masters() {
        let ddp = memory(Strategy::Ddp, ReduceDtype::Fp32, 1, 4);
        assert_eq!((ddp.parameters, ddp.masters, ddp.gradients), (12_000, 0, 8000));
        for strategy in Strategy::ALL {
            assert_eq!(memory(strategy, ReduceDtype::Bf16, 1, 4), ddp, "alone, {strategy:?} shares nothing");
        }
    }

    #[test]
    fn gradients_that_travel_in_bf16_are_copies() {
        let gradients = |strategy| memory(strategy, ReduceDtype::Bf16, 4, 2).gradients;
        assert_eq!(Strategy::ALL.map(gradients), [8000 + 2 * 2000, 8000 + 2 * 2000, 10_000 + 2 * 2000]);
    }

    const SHAPES: [(&str, [i64; 2]); 3] =
        [("llm.layers.0.w", [600, 500]), ("llm.layers.1.w", [77, 30]), ("projector.w", [30, 20])];

    /// What a rank of two holds after a pass that reached every parameter.
    fn held(parallel: &ParallelPlan, precision: Kind, rank: usize, port: u16) -> HeldBytes {
        let timeout = std::time::Duration::from_secs(30);
        let store = Store::connect("127.0.0.1", port, "memory", timeout).unwrap();
        let (name, address) = ("g".to_owned(), Some("127.0.0.1".to_owned()));
        let options = GroupOptions { name, backend: Backend::Gloo, rank, size: 2, timeout, address };
        let group = Arc::new(ProcessGroup::join(&store, options).unwrap());
        let ones = |shape: [i64; 2]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
        let params: Params = SHAPES.map(|(name, shape)| (name.to_owned(), ones(shape))).into();
        let rates = ParamRates { lr: 1e-3, weight_decay: 0.0, betas: [0.9, 0.95], unlock: None };
        let trained = params.keys().map(|name| (name.clone(), rates)).collect();
        let ema = Some(EmaPlan { decay: 0.9, modules: [Module::Llm].into() });
        let plan = OptimizerPlan { eps: 1e-8, clip_norm: None, ema };
        let optimizer =
            Optimizer::new(&params, Vec::new(), &[&trained], plan, parallel, precision, Some(group)).unwrap();
        optimizer.begin_pass(0, 1);
        let sums: Vec<Tensor> = params.values().map(|param| param.sum(Kind::Float)).collect();
        Tensor::stack(&sums, 0).sum(Kind::Float).backward();
        optimizer.end_pass().unwrap();
        optimizer.held_bytes()
    }

    #[test]
    fn the_optimizer_holds_what_is_estimated() {
        for strategy in Strategy::ALL {
            for (precision, compute_bytes) in [(Kind::Float, 4), (Kind::BFloat16, 2)] {
                let reduce = ReduceDtype::Fp32;
                let (timeout_secs, first_step_timeout_secs) = (30, 30);
                let parallel =
                    ParallelPlan { strategy, reduce, bucket_mb: 1, timeout_secs, first_step_timeout_secs };
                let server = Store::serve(0, std::time::Duration::from_secs(30)).unwrap();
                let port = server.port();
                let found = std::thread::scope(|scope| {
                    let parallel = &parallel;
                    let ranks = [0, 1].map(|rank| scope.spawn(move || held(parallel, precision, rank, port)));
                    ranks.map(|rank| rank.join().unwrap())
                });
                let shapes = SHAPES.map(|(name, shape)| (name, shape.to_vec()));
                let buckets = layout::cut(shapes, &[], parallel.bucket_elements(), 2).unwrap();
                assert_eq!(buckets.len(), 3);
                let numel = |bucket: &Layout| bucket.numel as u64;
                let averaged =
                    buckets.iter().filter(|bucket| bucket.module() == Module::Llm).map(numel).sum();
                let sizes = Sizes { frozen: 0, buckets: buckets.iter().map(numel).collect(), averaged };
                let memory = sizes.memory((strategy, reduce), 2, compute_bytes, Live::default());
                // Whole buckets exist only during a pass.
                let passing = if strategy == Strategy::Zero2 { FLOAT * sizes.trained() } else { 0 };
                let gradients = (memory.gradients - passing) as usize;
                let averages =
                    (FLOAT * if strategy == Strategy::Ddp { averaged } else { averaged / 2 }) as usize;
                let (masters, moments) = (memory.masters as usize, memory.moments as usize - averages);
                let held = HeldBytes { masters, moments, averages, gradients };
                assert_eq!(found, [held; 2], "{strategy:?} {precision:?}");
            }
        }
    }
}
