//! The transformer blocks of a module, and who is told that one is about to compute.
//!
//! A block is the unit in which a trainer moves parameters: it may bring a block's weights just before they are
//! used. The models only say which block comes next; what that leads to is not known here.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::params::Builder;

type Callback = Box<dyn Fn(&str) + Send>;

/// Who is told about blocks; nobody at first. Clones share it.
#[derive(Clone, Default)]
pub struct Listener(Arc<Mutex<Told>>);

#[derive(Default)]
struct Told {
    blocks: Vec<String>,
    callback: Option<Callback>,
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

    fn tell(&self, block: &str) {
        if let Some(callback) = &self.lock().callback {
            callback(block);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Told> {
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
    blocks: Vec<(String, B)>,
    listener: Listener,
}

impl<B> Blocks<B> {
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
            Ok((name, make(i, &builder)?))
        };
        Ok(Self { blocks: (0..count).map(block).collect::<Result<_>>()?, listener })
    }

    /// One block after the other; the listener is told of each before it is given out.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &B> {
        self.blocks.iter().map(|(name, block)| {
            self.listener.tell(name);
            block
        })
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
        iter.next().unwrap();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), ["llm.model.layers.0."]);
        iter.next().unwrap();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), ["llm.model.layers.1."]);
        let names = builder.listener().blocks();
        assert!(params.borrow().keys().all(|name| names.iter().any(|block| name.starts_with(block))));
    }
}
