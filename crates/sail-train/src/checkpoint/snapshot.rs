//! The state of a run at one step, in host memory.
//!
//! Taken by the session between two steps. A checkpoint is written from it while training goes on, and a run can be
//! put back to it.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor, no_grad};

use super::{RunState, Untouched};
use crate::config::Module;
use crate::error::{Error, Result};
use crate::optim::{StateKind, StatePiece};
use crate::stage::FrozenCheck;

/// A tensor to be stored, or a part of one.
pub struct Piece {
    /// Full parameter name.
    pub name: String,
    /// Which of its tensors.
    pub kind: StateKind,
    /// Of the whole tensor.
    pub shape: Vec<i64>,
    /// Elements of the flattened tensor that this is.
    pub elements: Range<i64>,
    /// These, flat. Training does not change them.
    pub tensor: Tensor,
}

/// What a checkpoint holds: everything but tensors, and this rank's part of these.
pub struct Snapshot {
    /// Step, counters, data position and plan.
    pub state: RunState,
    /// This rank's part of what is trained.
    pub trained: Vec<Piece>,
    /// This rank's part of what is frozen and has to be stored.
    pub frozen: Vec<Piece>,
    /// Modules that are named instead of stored.
    pub untouched: BTreeMap<Module, Untouched>,
    /// What must not have changed.
    pub frozen_check: FrozenCheck,
}

impl Piece {
    /// A frozen parameter: shared, since nothing changes it.
    pub fn frozen(name: &str, tensor: &Tensor) -> Self {
        Self {
            name: name.to_owned(),
            kind: StateKind::Param,
            shape: tensor.size(),
            elements: 0..tensor.numel() as i64,
            // A handle of its own: the model's may get other memory when the parameter is unlocked.
            tensor: tensor.detach().reshape([-1]),
        }
    }

    /// Copies of what is trained, in the memory of `old` tensors where these are as large: touching new memory takes
    /// longer than copying.
    ///
    /// # Errors
    /// Those of libtorch, when memory runs out.
    pub fn copies(state: Vec<StatePiece<'_>>, old: Vec<Tensor>) -> Result<Vec<Self>> {
        let mut old = old.into_iter();
        let copy = |StatePiece { name, kind, shape, elements, tensor }| {
            let fits = |old: &Tensor| old.numel() == tensor.numel();
            let mut memory = match old.next().filter(fits) {
                Some(memory) => memory,
                None => host_memory(tensor.numel() as i64, tensor.device())?,
            };
            no_grad(|| memory.f_copy_(&tensor))?;
            Ok(Self { name: name.to_owned(), kind, shape: shape.to_vec(), elements, tensor: memory })
        };
        state.into_iter().map(copy).collect()
    }
}

/// Memory of the host for a copy of so many fp32 values; pinned where they come from a GPU.
pub(super) fn host_memory(numel: i64, from: Device) -> Result<Tensor> {
    let memory = Tensor::f_empty([numel], (Kind::Float, Device::Cpu))?;
    Ok(match from {
        Device::Cuda(_) => memory.f_pin_memory(from)?,
        _ => memory,
    })
}

impl Snapshot {
    /// Handles of all its tensors, in file order.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        let handle = |piece: &Piece| Piece {
            name: piece.name.clone(),
            kind: piece.kind,
            shape: piece.shape.clone(),
            elements: piece.elements.clone(),
            tensor: piece.tensor.shallow_clone(),
        };
        self.frozen.iter().chain(&self.trained).map(handle).collect()
    }

    /// A part of a trained tensor, flat.
    ///
    /// # Errors
    /// When this rank's part does not hold it.
    pub fn elements(&self, name: &str, kind: StateKind, elements: Range<i64>) -> Result<Tensor> {
        let holds = |piece: &&Piece| {
            piece.kind == kind
                && piece.elements.start <= elements.start
                && elements.end <= piece.elements.end
                && piece.name == name
        };
        let piece = self.trained.iter().find(holds).ok_or_else(|| Error::FreezePlan {
            name: name.to_owned(),
            problem: "was not trained when the snapshot was taken that the run goes back to",
        })?;
        let start = elements.start - piece.elements.start;
        Ok(piece.tensor.f_narrow(0, start, elements.end - elements.start)?)
    }
}
