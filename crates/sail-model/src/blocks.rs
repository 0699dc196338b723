//! The transformer blocks of a module, who is told that one or a whole module is about to compute, and which are
//! computed twice.
//!
//! A block is the unit in which a trainer moves parameters and keeps activations: it may bring a block's weights just
//! before they are used, and have a block computed again in the backward pass instead of keeping what it computed.
//! The models only say which block comes next; what that leads to is not known here.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sail_torch::{on_gradient, recompute};
use tch::Tensor;

use crate::error::Result;
use crate::params::Builder;

type Callback = Box<dyn Fn(&str) + Send>;
type OnModule = Arc<dyn Fn(&str) + Send + Sync>;

/// Who is told about blocks and modules, and which blocks are recomputed; nobody and none at first. Clones share it.
#[derive(Clone, Default)]
pub struct Listener(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    blocks: Vec<String>,
    callback: Option<Callback>,
    on_module: Option<OnModule>,
    recomputed: BTreeSet<String>,
}

impl Listener {
    /// How the names of each block's parameters begin, with a trailing dot, in the order of construction.
    pub fn blocks(&self) -> Vec<String> {
        self.lock().blocks.clone()
    }

    /// Has `callback` called, in place of an earlier one, with one of [`Listener::blocks`] before that computes.
    pub fn set(&self, callback: impl Fn(&str) + Send + 'static) {
        self.lock().callback = Some(Box::new(callback));
    }

    /// Has `callback` called, in place of an earlier one, with one of [`crate::vlm::MODULES`] before that computes, and
    /// before it computes gradients: in a backward pass when the gradient of what it gave is there, on the thread that
    /// computes that.
    pub fn set_on_module(&self, callback: impl Fn(&str) + Send + Sync + 'static) {
        self.lock().on_module = Some(Arc::new(callback));
    }

    /// Tells that a module is about to compute.
    pub(crate) fn enter_module(&self, module: &str) {
        let on_module = self.lock().on_module.clone();
        if let Some(callback) = on_module {
            callback(module);
        }
    }

    /// Tells the same in the backward pass, when the gradient of `output`, the module's result, is there.
    pub(crate) fn enter_module_backward(&self, module: &'static str, output: &Tensor) -> Result<()> {
        let on_module = self.lock().on_module.clone();
        match on_module {
            Some(callback) if output.requires_grad() => Ok(on_gradient(output, move |_| {
                callback(module);
                Ok(())
            })?),
            _ => Ok(()),
        }
    }

    /// Has these of [`Listener::blocks`], and no others, computed again in a backward pass: of what they compute in the
    /// forward pass only their results are kept.
    pub fn set_recomputed(&self, blocks: BTreeSet<String>) {
        self.lock().recomputed = blocks;
    }

    fn recomputes(&self, block: &str) -> bool {
        self.lock().recomputed.contains(block)
    }

    fn tell(&self, block: &str) {
        if let Some(callback) = &self.lock().callback {
            callback(block);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listener").field(&self.blocks()).finish()
    }
}

/// Blocks in the order in which they compute.
pub(crate) struct Blocks<B> {
    blocks: Vec<Named<B>>,
    listener: Listener,
}

struct Named<B> {
    name: String,
    params: Vec<Tensor>,
    /// Shared with the graphs that will compute it again.
    block: Shared<B>,
}

/// What a graph holds as well: used by one thread at a time, that of the forward or that of the backward pass.
struct Shared<T>(Arc<Mutex<T>>);

impl<T> Shared<T> {
    fn new(value: T) -> Self {
        Self(Arc::new(Mutex::new(value)))
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<B: Send + 'static> Blocks<B> {
    /// `count` blocks, number i made from `layers.sub(i)`.
    pub(crate) fn new(
        layers: &Builder,
        count: i64,
        make: impl Fn(i64, &Builder) -> Result<B>,
    ) -> Result<Self> {
        let listener = layers.listener();
        let block = |i| {
            let builder = layers.sub(i);
            let name = builder.full_prefix();
            listener.lock().blocks.push(name.clone());
            let block = Shared::new(make(i, &builder)?);
            Ok(Named { name, params: builder.params_here(), block })
        };
        Ok(Self { blocks: (0..count).map(block).collect::<Result<_>>()?, listener })
    }

    /// One block after the other; the listener is told of each before it is given out.
    pub(crate) fn iter(&self) -> impl Iterator<Item = MutexGuard<'_, B>> {
        self.blocks.iter().map(|Named { name, block, .. }| {
            self.listener.tell(name);
            block.lock()
        })
    }

    /// `x` through all blocks. `step` makes of a block's rows those of the next one, first among its results; the
    /// others are given back, by block. A block that is to be recomputed keeps its rows alone, and with all of them
    /// the `context`, until the backward pass calls `step` once more.
    ///
    /// # Panics
    /// As tch's operators, when libtorch reports an error.
    pub(crate) fn forward<C: Send + 'static>(
        &self,
        x: &Tensor,
        context: C,
        step: fn(&B, &Tensor, &C) -> Vec<Tensor>,
    ) -> (Tensor, Vec<Vec<Tensor>>) {
        let context = Shared::new(context);
        let mut x = x.shallow_clone();
        let mut beside = Vec::with_capacity(self.blocks.len());
        for Named { name, params, block } in &self.blocks {
            self.listener.tell(name);
            let mut results = if self.listener.recomputes(name) {
                let (block, context) = (block.clone(), context.clone());
                let trains = params.iter().any(Tensor::requires_grad);
                recompute(&[&x], trains, move |rows| step(&block.lock(), &rows[0], &context.lock()))
                    .unwrap_or_else(|error| panic!("{error}"))
            } else {
                step(&block.lock(), &x, &context.lock())
            };
            let others = results.split_off(1);
            x = results.remove(0);
            beside.push(others);
        }
        (x, beside)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use tch::{Device, Kind};

    use super::*;
    use crate::params::{Init, Params, RandomSource};

    #[test]
    fn each_block_is_told_before_it_is_given_out() {
        let source = RandomSource::new(0, "llm");
        let params = Rc::new(RefCell::new(Params::new()));
        let builder = Builder::new(params.clone(), "llm", &source, (Kind::Float, Device::Cpu));
        let layers = builder.sub("model").sub("layers");
        let blocks = Blocks::new(&layers, 2, |_, block| block.param("weight", &[1], Init::Ones)).unwrap();
        assert_eq!(blocks.iter().count(), 2, "nobody need listen");
        let (tell, told) = std::sync::mpsc::channel();
        builder.listener().set(move |name| tell.send(name.to_owned()).unwrap());
        let mut iter = blocks.iter();
        drop(iter.next().unwrap());
        assert_eq!(told.try_iter().collect::<Vec<_>>(), ["llm.model.layers.0."]);
        drop(iter.next().unwrap());
        assert_eq!(told.try_iter().collect::<Vec<_>>(), ["llm.model.layers.1."]);
        let names = builder.listener().blocks();
        assert!(params.borrow().keys().all(|name| names.iter().any(|block| name.starts_with(block))));
    }
}
