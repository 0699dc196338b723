//! Named parameters, and the builder through which every module gets its tensors.
//!
//! Not an optimizer's or a trainer's view: nothing here knows what is frozen, where it is sharded
//! or which rank holds it. Called by every module's constructor, by `weights` and by the trainer.
//!
//! Tensors are shared: the clone a module holds and the one in [`Params`] are the same
//! `TensorImpl`, so `requires_grad_`, `set_data` and in-place updates on one are seen by the other.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::rc::Rc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Kind, Tensor};

use crate::blocks::Listener;
use crate::error::{Error, Result};

/// Parameters by full name (`vision.…`, `projector.…`, `llm.…`), in sorted order.
pub type Params = BTreeMap<String, Tensor>;

/// How a parameter that no file gives starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Every element this value.
    Constant(f32),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Normal with mean 0 and this standard deviation, redrawn outside two deviations.
    TruncNormal(f64),
}

/// Gives the tensors of one module under construction, by the name the module itself uses.
pub trait TensorSource {
    /// Fills `target`, a contiguous tensor of any float type and on any device, with the parameter `name`.
    ///
    /// A source may put off reporting that it lacks a tensor until [`TensorSource::finish`], so that
    /// all that is wrong is reported together.
    ///
    /// # Errors
    /// When the source cannot give the tensor.
    fn fill(&self, name: &str, target: &Tensor, init: Init) -> Result<()>;

    /// A new tensor for a parameter, which [`TensorSource::fill`] then fills.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn allocate(&self, shape: &[i64], to: (Kind, Device)) -> Result<Tensor> {
        Ok(Tensor::f_empty(shape, to)?)
    }

    /// Called when the module is complete.
    ///
    /// # Errors
    /// Everything that did not fit, together.
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// The parameter `name` as a new fp32 tensor on the CPU.
    ///
    /// # Errors
    /// As [`TensorSource::fill`].
    fn tensor(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let target = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
        self.fill(name, &target, init)?;
        Ok(target)
    }
}

/// Tensors in memory, by the names of the module itself.
impl TensorSource for Params {
    fn fill(&self, name: &str, target: &Tensor, _init: Init) -> Result<()> {
        let missing = || Error::MissingTensor { path: "the model in memory".into(), name: name.to_owned() };
        target.shallow_clone().f_copy_(self.get(name).ok_or_else(missing)?)?;
        Ok(())
    }
}

/// No values and no memory: for the names and shapes of a model of any size. All elements of a parameter are
/// one, so that nothing can be computed with them.
pub struct ShapesOnly;

impl TensorSource for ShapesOnly {
    fn fill(&self, _name: &str, _target: &Tensor, _init: Init) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, shape: &[i64], to: (Kind, Device)) -> Result<Tensor> {
        Ok(Tensor::f_zeros(vec![1; shape.len()], to)?.f_expand(shape, false)?)
    }
}

/// Most elements that a source holds beside the tensor it fills.
pub(crate) const CHUNK: i64 = 1 << 20;

/// Random initialisation. Each tensor has its own generator, seeded by the run's seed and the
/// tensor's full name, so that values do not depend on the order of construction.
pub struct RandomSource {
    seed: u64,
    module: String,
}

impl RandomSource {
    /// For a module (`vision`, `projector`, `llm`) of a run with this seed.
    pub fn new(seed: u64, module: impl Into<String>) -> Self {
        Self { seed, module: module.into() }
    }

    /// Normal values with mean 0, redrawn outside `bound` deviations.
    fn normal(&self, name: &str, target: &Tensor, std: f64, bound: f64) -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ fnv1a(&format!("{}.{name}", self.module)));
        let mut draw = || loop {
            let z: f64 = StandardNormal.sample(&mut rng);
            if z.abs() <= bound {
                return (z * std) as f32;
            }
        };
        for mut chunk in target.f_view(-1)?.split(CHUNK, 0) {
            let values: Vec<f32> = (0..chunk.numel()).map(|_| draw()).collect();
            chunk.f_copy_(&Tensor::from_slice(&values))?;
        }
        Ok(())
    }
}

impl TensorSource for RandomSource {
    fn fill(&self, name: &str, target: &Tensor, init: Init) -> Result<()> {
        let mut constant = target.shallow_clone();
        match init {
            Init::Zeros => drop(constant.f_zero_()?),
            Init::Ones => drop(constant.f_fill_(1.0)?),
            Init::Constant(value) => drop(constant.f_fill_(f64::from(value))?),
            Init::Normal(std) => self.normal(name, target, std, f64::INFINITY)?,
            Init::TruncNormal(std) => self.normal(name, target, std, 2.0)?,
        }
        Ok(())
    }
}

/// 64-bit FNV-1a: stable across platforms and releases, unlike the standard hasher.
fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Hands a module its parameters and records them under their full names.
#[derive(Clone)]
pub struct Builder<'a> {
    params: Rc<RefCell<Params>>,
    source: &'a dyn TensorSource,
    to: (Kind, Device),
    /// `vision`, `projector` or `llm`.
    module: String,
    /// Path inside the module, with a trailing dot unless empty.
    prefix: String,
    listener: Listener,
}

impl<'a> Builder<'a> {
    /// A builder for the module named `module`, adding to `params`.
    pub fn new(
        params: Rc<RefCell<Params>>,
        module: impl Into<String>,
        source: &'a dyn TensorSource,
        to: (Kind, Device),
    ) -> Self {
        let listener = Listener::default();
        Self { params, source, to, module: module.into(), prefix: String::new(), listener }
    }

    /// The builder whose blocks tell this listener.
    #[must_use]
    pub fn listened_by(self, listener: &Listener) -> Self {
        Self { listener: listener.clone(), ..self }
    }

    pub(crate) fn listener(&self) -> Listener {
        self.listener.clone()
    }

    /// How the full names of the parameters here begin, with a trailing dot.
    pub(crate) fn full_prefix(&self) -> String {
        format!("{}.{}", self.module, self.prefix)
    }

    /// The parameters that were taken here and below so far.
    pub(crate) fn params_here(&self) -> Vec<Tensor> {
        let (params, prefix) = (self.params.borrow(), self.full_prefix());
        let here = params.iter().filter(|(name, _)| name.starts_with(&prefix));
        here.map(|(_, param)| param.shallow_clone()).collect()
    }

    /// The builder one level down: `b.sub("layers").sub(3)`.
    #[must_use]
    pub fn sub(&self, name: impl Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..self.clone() }
    }

    /// The parameter `name` here, of the builder's type and on its device, requiring no gradient.
    ///
    /// # Errors
    /// What the source reports, and [`Error::DuplicateParameter`].
    pub fn param(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let local = format!("{}{name}", self.prefix);
        let no_memory = |_| Error::Memory { name: local.clone(), shape: shape.to_vec() };
        let tensor = self.source.allocate(shape, self.to).map_err(no_memory)?;
        tch::no_grad(|| self.source.fill(&local, &tensor, init))?;
        let full = format!("{}.{local}", self.module);
        match self.params.borrow_mut().insert(full.clone(), tensor.shallow_clone()) {
            None => Ok(tensor),
            Some(_) => Err(Error::DuplicateParameter { name: full }),
        }
    }

    /// To be called when the module is complete: the source reports what did not fit.
    ///
    /// # Errors
    /// As [`TensorSource::finish`].
    pub fn finish(&self) -> Result<()> {
        self.source.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_values_depend_on_seed_and_name_alone() {
        let draw = |seed, name: &str| {
            let source = RandomSource::new(seed, "vision");
            source.tensor(name, &[64], Init::TruncNormal(0.02)).unwrap()
        };
        assert!(draw(1, "a").equal(&draw(1, "a")));
        assert!(!draw(1, "a").equal(&draw(1, "b")));
        assert!(!draw(1, "a").equal(&draw(2, "a")));
        assert!(draw(1, "a").abs().max().double_value(&[]) <= 0.04);
    }

    #[test]
    fn names_are_full_and_tensors_shared() {
        let params = Rc::new(RefCell::new(Params::new()));
        let source = RandomSource::new(0, "llm");
        let builder = Builder::new(params.clone(), "llm", &source, (Kind::Float, Device::Cpu));
        let mut held = builder.sub("layers").sub(0).param("weight", &[2, 3], Init::Ones).unwrap();
        let _ = held.fill_(5.0);
        let sum = params.borrow()["llm.layers.0.weight"].sum(Kind::Float).double_value(&[]);
        assert!((sum - 30.0).abs() < 1e-9);
        assert!(builder.sub("layers").sub(0).param("weight", &[2, 3], Init::Ones).is_err());
    }
}
