//! AdamW over the parameters a stage trains, with fp32 masters.
//!
//! The model's tensors are the *compute copies*. In fp32 a compute copy is its own master; in bf16
//! the master is a separate fp32 tensor, gradients are summed in fp32 over the micro-batches of a
//! step, and the compute copy is cast anew after each update.
//! Built by [`crate::session`] from the freeze plan; knows nothing of files or schedules.

use std::collections::BTreeMap;

use sail_model::params::Params;
use sail_torch::{AdamWOptions, AdamWSlot};
use tch::{Kind, Tensor, no_grad};

use crate::config::{ModulePlan, OptimizerPlan, TrainPlan};
use crate::error::{Error, Result};
use crate::stage;

/// Every trained parameter with its state, in sorted-name order.
pub struct Optimizer {
    slots: BTreeMap<String, Slot>,
    plan: OptimizerPlan,
    steps: u64,
}

struct Slot {
    /// What the model computes with; requires a gradient.
    compute: Tensor,
    /// fp32; the same tensor as `compute` when the model computes in fp32.
    master: Tensor,
    /// Sum over the micro-batches so far, fp32; `None` before the first.
    grad: Option<Tensor>,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// 0-dimensional, the number of updates; the kernel counts it up.
    step: Tensor,
    peak_lr: f64,
    weight_decay: f64,
}

/// One tensor of the optimizer's state, for checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StateKind {
    /// The fp32 parameter.
    Param,
    /// The first moment.
    ExpAvg,
    /// The second moment.
    ExpAvgSq,
}

impl StateKind {
    /// Every kind, in the order checkpoints hold them.
    pub const ALL: [Self; 3] = [Self::Param, Self::ExpAvg, Self::ExpAvgSq];

    /// The name in checkpoint files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Param => "param",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        }
    }
}

impl Optimizer {
    /// Takes over the parameters that `train` does not freeze: makes masters, then turns the compute
    /// copies into `precision`. `params` are fp32 when this is called.
    pub fn new(params: &Params, train: &TrainPlan, plan: OptimizerPlan, precision: Kind) -> Result<Self> {
        let mut slots = BTreeMap::new();
        for (name, compute) in params {
            let mut compute = compute.shallow_clone();
            let master = compute.detach();
            if precision != Kind::Float {
                compute.set_data(&master.to_kind(precision));
            }
            if let ModulePlan::Train { lr, weight_decay } = *train.get(stage::module_of(name)?) {
                compute = compute.set_requires_grad(true);
                let decay = if decays(name, &master.size()) { weight_decay } else { 0.0 };
                slots.insert(
                    name.clone(),
                    Slot {
                        compute,
                        grad: None,
                        exp_avg: master.zeros_like(),
                        exp_avg_sq: master.zeros_like(),
                        step: Tensor::zeros([], (Kind::Float, master.device())),
                        master,
                        peak_lr: lr,
                        weight_decay: decay,
                    },
                );
            }
        }
        Ok(Self { slots, plan, steps: 0 })
    }

    /// Adds the gradients of the last backward pass to the step's sums and clears them.
    ///
    /// A parameter that the batch did not reach has a zero gradient: what a step does is decided by
    /// the configuration, never by the batch.
    pub fn accumulate(&mut self) {
        no_grad(|| {
            for slot in self.slots.values_mut() {
                let fresh = slot.compute.grad();
                if !fresh.defined() {
                    slot.grad.get_or_insert_with(|| slot.master.zeros_like());
                    continue;
                }
                // In fp32 autograd's own buffer is the sum: it adds to `.grad` where there is one.
                if slot.compute.kind() == Kind::Float {
                    // The fused kernels walk memory in order. A copy is made here, not where clipping or the
                    // update reads it, so that both see the same tensor.
                    slot.grad = Some(fresh.contiguous());
                    continue;
                }
                let fresh_f32 = fresh.to_kind(Kind::Float).contiguous();
                match &mut slot.grad {
                    Some(sum) => *sum += &fresh_f32,
                    None => slot.grad = Some(fresh_f32),
                }
                slot.compute.zero_grad();
            }
        });
    }

    /// The global norm of the accumulated gradients, a 0-dimensional tensor; afterwards they are
    /// scaled so that it is at most `clip_norm`, where the plan has one.
    pub fn clip(&self) -> Result<Tensor> {
        let grads: Vec<Tensor> = self.slots.values().map(Slot::accumulated).collect();
        let norm = sail_torch::global_norm(&grads)?;
        if let Some(limit) = self.plan.clip_norm {
            // Without a host read: a norm below the limit gives a factor of 1.
            let factor = (limit / (&norm + 1e-6)).clamp_max(1.0);
            sail_torch::foreach_mul(&grads, &factor)?;
        }
        Ok(norm)
    }

    /// One AdamW update at `lr_factor` times each module's peak rate; clears the gradients.
    pub fn step(&mut self, lr_factor: f64) -> Result<()> {
        let mut groups: BTreeMap<(u64, u64), Vec<AdamWSlot>> = BTreeMap::new();
        for slot in self.slots.values() {
            groups.entry((slot.peak_lr.to_bits(), slot.weight_decay.to_bits())).or_default().push(
                AdamWSlot {
                    param: slot.master.shallow_clone(),
                    grad: slot.accumulated(),
                    exp_avg: slot.exp_avg.shallow_clone(),
                    exp_avg_sq: slot.exp_avg_sq.shallow_clone(),
                    step: slot.step.shallow_clone(),
                },
            );
        }
        for ((peak_lr, weight_decay), slots) in groups {
            let options = AdamWOptions {
                lr: f64::from_bits(peak_lr) * lr_factor,
                betas: (self.plan.betas[0], self.plan.betas[1]),
                eps: self.plan.eps,
                weight_decay: f64::from_bits(weight_decay),
            };
            sail_torch::fused_adamw(&slots, options)?;
        }
        self.steps += 1;
        no_grad(|| {
            for slot in self.slots.values_mut() {
                slot.grad = None;
                slot.compute.zero_grad();
                slot.refresh_compute();
            }
        });
        Ok(())
    }

    /// Updates so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Names of the trained parameters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.keys().map(String::as_str)
    }

    /// The fp32 tensor of a trained parameter; `None` for a frozen one.
    pub fn master(&self, name: &str) -> Option<&Tensor> {
        self.slots.get(name).map(|slot| &slot.master)
    }

    /// Every tensor of the state, by name and kind; shared, not copied.
    pub fn state(&self) -> impl Iterator<Item = (&str, StateKind, &Tensor)> {
        self.slots.iter().flat_map(|(name, slot)| {
            StateKind::ALL.into_iter().map(move |kind| (name.as_str(), kind, slot.tensor(kind)))
        })
    }

    /// Puts a checkpoint's state in place of this one. `get` gives each tensor by name and kind.
    ///
    /// # Errors
    /// What `get` reports, and a tensor of another shape.
    pub fn restore(&mut self, steps: u64, get: impl Fn(&str, StateKind) -> Result<Tensor>) -> Result<()> {
        no_grad(|| {
            for (name, slot) in &mut self.slots {
                for kind in StateKind::ALL {
                    let saved = get(name, kind)?;
                    slot.tensor(kind).shallow_clone().f_copy_(&saved)?;
                }
                let _ = slot.step.fill_(steps as f64);
                slot.refresh_compute();
            }
            Ok::<_, Error>(())
        })?;
        self.steps = steps;
        Ok(())
    }
}

impl Slot {
    fn accumulated(&self) -> Tensor {
        self.grad.as_ref().map_or_else(|| self.master.zeros_like(), Tensor::shallow_clone)
    }

    fn tensor(&self, kind: StateKind) -> &Tensor {
        match kind {
            StateKind::Param => &self.master,
            StateKind::ExpAvg => &self.exp_avg,
            StateKind::ExpAvgSq => &self.exp_avg_sq,
        }
    }

    /// After the master changed; in fp32 they are one tensor.
    fn refresh_compute(&mut self) {
        if self.compute.kind() != Kind::Float {
            self.compute.detach().copy_(&self.master);
        }
    }
}

/// Norms, biases, scales and embedding tables are not decayed.
fn decays(name: &str, shape: &[i64]) -> bool {
    shape.len() >= 2
        && !name.contains("embed_tokens")
        && !name.contains("position_embedding")
        && !name.contains("cls_token")
        && !name.contains("mask_token")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAIN: TrainPlan = TrainPlan {
        vision: ModulePlan::Frozen,
        projector: ModulePlan::Train { lr: 1e-3, weight_decay: 0.0 },
        llm: ModulePlan::Frozen,
    };
    const PLAN: OptimizerPlan = OptimizerPlan { betas: [0.9, 0.95], eps: 1e-8, clip_norm: None };

    fn params() -> Params {
        let names = ["vision.a", "projector.1.weight", "projector.3.weight"];
        names.map(|name| (name.to_owned(), Tensor::from_slice(&[1f32, 2.0]))).into_iter().collect()
    }

    fn gradient(optimizer: &Optimizer, name: &str) -> Vec<f32> {
        Vec::try_from(optimizer.slots[name].accumulated()).unwrap()
    }

    #[test]
    fn only_matrices_and_kernels_decay() {
        assert!(decays("llm.model.layers.0.mlp.up_proj.weight", &[8, 4]));
        assert!(decays("vision.embeddings.patch_embeddings.projection.weight", &[8, 3, 14, 14]));
        assert!(!decays("projector.1.bias", &[8]));
        assert!(!decays("llm.model.embed_tokens.weight", &[8, 4]));
        assert!(!decays("vision.embeddings.position_embedding.weight", &[16, 4]));
        assert!(!decays("vision.embeddings.position_embeddings", &[1, 17, 4]));
    }

    #[test]
    fn micro_batches_add_up_in_both_precisions() {
        for precision in [Kind::Float, Kind::BFloat16] {
            let params = params();
            let mut optimizer = Optimizer::new(&params, &TRAIN, PLAN, precision).unwrap();
            for factor in [1.0, 2.0] {
                // The second parameter is not reached, as the projector by a pack of text.
                (&params["projector.1.weight"] * factor).sum(Kind::Float).backward();
                optimizer.accumulate();
            }
            assert_eq!(gradient(&optimizer, "projector.1.weight"), [3.0, 3.0]);
            assert_eq!(gradient(&optimizer, "projector.3.weight"), [0.0, 0.0]);
            optimizer.step(1.0).unwrap();
            assert_eq!(gradient(&optimizer, "projector.1.weight"), [0.0, 0.0], "a step clears");
            assert!(!params["vision.a"].requires_grad());
            assert_eq!(optimizer.names().count(), 2, "frozen parameters have no state");
        }
    }

    #[test]
    fn bf16_masters_keep_what_the_compute_copy_cannot() {
        let params = params();
        let mut optimizer = Optimizer::new(&params, &TRAIN, PLAN, Kind::BFloat16).unwrap();
        let name = "projector.1.weight";
        for _ in 0..10 {
            params[name].sum(Kind::Float).backward();
            optimizer.accumulate();
            optimizer.step(1.0).unwrap();
        }
        // Ten steps of 1e-3 each; one alone is lost between two neighbouring bf16 numbers at 2.
        let master = optimizer.master(name).unwrap().double_value(&[1]);
        assert!((master - 1.99).abs() < 1e-4, "{master}");
        assert_eq!(params[name].kind(), Kind::BFloat16);
        assert!((params[name].double_value(&[1]) - 1.99).abs() < 8e-3);
    }

    #[test]
    fn clipping_scales_to_the_limit_and_reports_the_norm_before() {
        let params = params();
        let plan = OptimizerPlan { clip_norm: Some(1.0), ..PLAN };
        let mut optimizer = Optimizer::new(&params, &TRAIN, plan, Kind::Float).unwrap();
        let weights = Tensor::from_slice(&[3f32, 4.0]);
        (&params["projector.3.weight"] * weights).sum(Kind::Float).backward();
        optimizer.accumulate();
        let norm = optimizer.clip().unwrap().double_value(&[]);
        assert!((norm - 5.0).abs() < 1e-6);
        let clipped = gradient(&optimizer, "projector.3.weight");
        assert!((clipped[0] - 0.6).abs() < 1e-5 && (clipped[1] - 0.8).abs() < 1e-5, "{clipped:?}");
    }

    /// A gradient in another memory layout than its parameter's is clipped before it is used.
    #[test]
    fn clipping_reaches_transposed_gradients() {
        let params: Params =
            [("projector.1.weight".to_owned(), Tensor::zeros([2, 2], (Kind::Float, tch::Device::Cpu)))]
                .into();
        let plan = OptimizerPlan { clip_norm: Some(1.0), ..PLAN };
        let mut optimizer = Optimizer::new(&params, &TRAIN, plan, Kind::Float).unwrap();
        let transposed = Tensor::from_slice(&[0f32, 3.0, 4.0, 0.0]).reshape([2, 2]).transpose(0, 1);
        for slot in optimizer.slots.values_mut() {
            (&slot.compute * 1.0).sum(Kind::Float).backward();
            slot.compute.grad().set_data(&transposed);
        }
        optimizer.accumulate();
        let _ = optimizer.clip().unwrap();
        let norm = sail_torch::global_norm(&[optimizer.slots["projector.1.weight"].accumulated()]).unwrap();
        assert!((norm.double_value(&[]) - 1.0).abs() < 1e-5);
        optimizer.step(1.0).unwrap();
    }
}
