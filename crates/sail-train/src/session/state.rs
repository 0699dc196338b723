//! The state of a session: copied for checkpoints and ways back, and put back.

use std::collections::BTreeSet;

use sail_data::Position;
use sail_model::params::Params;
use sail_torch::span;
use tch::{Kind, Tensor};

use super::Session;
use crate::checkpoint::{Piece, RunState, Snapshot};
use crate::config::Module;
use crate::error::Result;
use crate::stage::{FrozenCheck, module_of};

impl Session {
    /// This rank's part of the state of this moment, copied into the memory of `old` tensors where that fits. Every
    /// rank makes the same call.
    ///
    /// # Errors
    /// Those of libtorch and of c10d.
    pub fn snapshot(&self, old: Vec<Tensor>) -> Result<Snapshot> {
        let _span = span("snapshot");
        self.optimizer.settle()?;
        let trained: BTreeSet<&str> = self.optimizer.names().collect();
        let mut frozen = Vec::new();
        let mut turn = 0;
        for (name, tensor) in self.model.params() {
            if trained.contains(name.as_str()) || self.untouched.contains_key(&module_of(name)?) {
                continue;
            }
            // What is frozen and stored is the same everywhere: the ranks write it in turn.
            if turn % self.world.size() == self.world.rank() {
                frozen.push(Piece::frozen(name, self.exact.get(name).unwrap_or(tensor)));
            }
            turn += 1;
        }
        let positions = self.world.gather(&self.loader.position())?;
        Ok(Snapshot {
            state: RunState {
                step: self.step,
                totals: self.totals,
                data: Position::merge(positions)?,
                unlocked: self.unlocked.clone(),
                updates: self.optimizer.updates().clone(),
                ada_lrs: self.ada_lrs.clone(),
                guard: self.guard.clone(),
                held_out: self.held_out.clone(),
                lineage: self.lineage.clone(),
                plan: self.plan.clone(),
            },
            trained: Piece::copies(self.optimizer.state()?, old)?,
            frozen,
            untouched: self.untouched.clone(),
            frozen_check: self.frozen_check(),
        })
    }

    /// The check that what is frozen is as it was when the session was built.
    pub(crate) fn frozen_check(&self) -> FrozenCheck {
        self.started_from.frozen_check(self.model.params(), &self.optimizer.names().collect())
    }

    /// What is exported of a module, in fp32 by full name: moving averages where there are some, masters of what else is
    /// trained. Every rank makes the same call.
    pub fn final_params(&self, module: Module) -> Result<Params> {
        let prefix = format!("{module}.");
        let mut exact = self.optimizer.final_params(&prefix)?;
        for (name, compute) in self.model.params().iter().filter(|(name, _)| name.starts_with(&prefix)) {
            if !exact.contains_key(name) {
                let frozen = self.exact.get(name);
                let value = frozen.map_or_else(|| compute.to_kind(Kind::Float), Tensor::shallow_clone);
                exact.insert(name.clone(), value);
            }
        }
        Ok(exact)
    }

    /// Puts weights, moments and counters back to a snapshot of this run; the data goes on from where it is.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn roll_back(&mut self, to: &Snapshot) -> Result<()> {
        let state = &to.state;
        self.put_back(to)?;
        self.ada_lrs.clone_from(&state.ada_lrs);
        self.guard = std::mem::take(&mut self.guard).back_to(&state.guard);
        self.held_out.retain(|step, _| *step <= state.step);
        Ok(())
    }

    pub(super) fn put_back(&mut self, to: &Snapshot) -> Result<()> {
        self.world.doing(self.step + 1, "going back");
        let state = &to.state;
        self.measured = None;
        self.optimizer
            .put_back(state.updates.clone(), |name, kind, elements| to.elements(name, kind, elements))?;
        (self.step, self.totals) = (state.step, state.totals);
        Ok(())
    }

    /// Takes the data of the step that is being made back, for a snapshot from which it will be made again.
    pub fn give_back(&self, snapshot: Snapshot) -> Result<Snapshot> {
        let positions = self.world.gather(&self.before)?;
        let state = RunState { data: Position::merge(positions)?, ..snapshot.state };
        Ok(Snapshot { state, ..snapshot })
    }
}
