//! The check after the first step with which something is trained, at the start of a stage or after an unlock point:
//! what is trained has a gradient and changed, what is frozen did not.
//!
//! A parameter that a plan trains and nothing reaches would cost memory and time for a whole run unnoticed.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::config::Module;
use crate::error::{Error, Result};
use crate::optim::StateKind;
use crate::schedule::Factors;
use crate::session::Session;
use crate::stage::{fingerprint, module_of};
use crate::step::Step;

/// Rows of the table that are shown.
const SHOWN: usize = 20;
/// A change smaller than this share of a value may be lost in rounding.
const ROUNDING: f64 = 1.0 / (1 << 22) as f64;

/// A part of a trained parameter, before the update.
struct Before {
    name: String,
    /// Largest gradient, absolute.
    grad: f64,
    /// Largest value, absolute.
    value: f64,
    print: i64,
}

/// What all ranks' parts of a parameter say together.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Seen {
    grad: f64,
    value: f64,
    changed: bool,
}

/// How trained parameters were before the first update.
pub(crate) struct FirstStep(Vec<Before>);

impl FirstStep {
    /// Looks at this rank's part of what was never updated, between the gradients and the update.
    pub(crate) fn before(session: &Session) -> Result<Self> {
        let masters = session.optimizer.state()?.into_iter().filter(|piece| piece.kind == StateKind::Param);
        let gradients = session.optimizer.gradients()?;
        let updates = session.optimizer.updates();
        let is_new = |name: &str| updates.of(name) == 0;
        let look =
            |(master, (name, _, gradient)): (crate::optim::StatePiece<'_>, (&str, _, Tensor))| Before {
                name: name.to_owned(),
                grad: largest(&gradient),
                value: largest(&master.tensor),
                print: fingerprint(&master.tensor),
            };
        Ok(Self(masters.zip(gradients).filter(|(master, _)| is_new(master.name)).map(look).collect()))
    }

    /// Compares with after the update with these factors, together with all ranks.
    pub(crate) fn check(self, session: &Session, step: &Step, factors: &Factors) -> Result<()> {
        session.frozen_check().check()?;
        let masters = session.optimizer.state()?.into_iter().filter(|piece| piece.kind == StateKind::Param);
        let updates = session.optimizer.updates();
        let masters = masters.filter(|piece| updates.of(piece.name) == 1);
        let mut own: BTreeMap<String, Seen> = BTreeMap::new();
        for (before, master) in self.0.into_iter().zip(masters) {
            own.entry(before.name).or_default().add(&Seen {
                grad: before.grad,
                value: before.value,
                changed: fingerprint(&master.tensor) != before.print,
            });
        }
        let mut all: BTreeMap<String, Seen> = BTreeMap::new();
        for (name, seen) in session.world.gather(&own)?.into_iter().flatten() {
            all.entry(name).or_default().add(&seen);
        }
        let eps = session.plan.optimizer.eps;
        let unused = session.model.without_gradient();
        let mut faults = Vec::new();
        for (name, seen) in &all {
            let module = module_of(name)?;
            let lr = session.freeze.rates(name).map_or(0.0, |rates| rates.lr_at(factors));
            let reached = is_reached(name, module, step) && !unused.contains(name);
            faults.extend(seen.fault(reached, lr, eps).map(|fault| (name, fault)));
        }
        if faults.is_empty() { Ok(()) } else { Err(Error::SelfCheck { table: table(&faults) }) }
    }
}

impl Seen {
    fn add(&mut self, part: &Self) {
        self.grad = self.grad.max(part.grad);
        self.value = self.value.max(part.value);
        self.changed |= part.changed;
    }

    /// What is wrong with a parameter that the batch has `reached`, after an update at `lr`.
    fn fault(&self, reached: bool, lr: f64, eps: f64) -> Option<&'static str> {
        if self.grad == 0.0 {
            return reached.then_some("has no gradient");
        }
        // AdamW's first update moves by lr * g / (|g| + eps).
        let moves = lr * self.grad / (self.grad + eps);
        (!self.changed && moves > self.value * ROUNDING).then_some("has a gradient and did not change")
    }
}

/// Whether the batch of a step must have reached a parameter: text reaches no encoder, and not every expert gets a
/// token.
fn is_reached(name: &str, module: Module, step: &Step) -> bool {
    (module == Module::Llm || step.all.visual_tokens > 0) && !name.contains(".experts.")
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().to_kind(Kind::Double).double_value(&[])
}

fn table(faults: &[(&String, &str)]) -> String {
    let mut text = String::new();
    for (name, fault) in faults.iter().take(SHOWN) {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name:<60} {fault}");
    }
    if faults.len() > SHOWN {
        let _ = writeln!(text, "  and {} more", faults.len() - SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_fault() {
        let seen = |grad, value, changed| Seen { grad, value, changed };
        let (none, same) = (Some("has no gradient"), Some("has a gradient and did not change"));
        for (seen, reached, lr, expected) in [
            (seen(0.1, 1.0, true), true, 1e-3, None),
            (seen(0.0, 1.0, false), true, 1e-3, none),
            (seen(0.0, 1.0, false), false, 1e-3, None),
            (seen(0.1, 1.0, false), true, 1e-3, same),
            // A rate at the start of a long warm-up is lost beside a value of 1, but not beside 0.
            (seen(0.1, 1.0, false), true, 1e-8, None),
            (seen(0.1, 0.0, false), true, 1e-8, same),
        ] {
            assert_eq!(seen.fault(reached, lr, 1e-8), expected, "{seen:?} {reached} {lr}");
        }
    }

    #[test]
    fn a_long_table_is_cut() {
        let names: Vec<String> = (0..25).map(|i| format!("llm.{i}")).collect();
        let faults: Vec<(&String, &str)> = names.iter().map(|name| (name, "has no gradient")).collect();
        let text = table(&faults);
        assert!(text.contains("llm.19") && !text.contains("llm.20") && text.contains("and 5 more"), "{text}");
    }
}
