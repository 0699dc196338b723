//! Gradients as they arrive in a backward pass.

use std::ffi::{CString, c_void};
use std::mem::ManuallyDrop;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::call::{check, outcome};
use crate::error::Result;
use crate::ffi::{self, RawError, RawGradSink};

/// What an error of a sink says; it ends the backward pass.
pub type SinkResult<T> = std::result::Result<T, String>;

/// Called with a gradient; an error ends the backward pass with its message.
type Hook = Box<dyn Fn(Tensor) -> SinkResult<()> + Send + Sync>;

/// Where the gradients of a parameter go, instead of staying in its `grad`. Its functions are called on the thread that
/// runs that part of a backward pass.
///
/// An operation that makes the gradient of a matrix as one product, as [`linears`](crate::linears) does, puts it
/// into its [`place`](Self::place), without memory between; all others hand over what autograd has added up.
pub trait GradSink: Send + Sync {
    /// The tensor, of the shape and type of the parameter and contiguous, to which a gradient is to be added, and whether
    /// it holds something; if not it is written over. None: gradients are to be handed over.
    ///
    /// Only for a parameter that a pass uses once: a gradient that is put there is taken as the whole.
    ///
    /// # Errors
    /// What ends the backward pass.
    fn place(&self) -> SinkResult<Option<(Tensor, bool)>>;

    /// The gradient of this pass is in its place.
    ///
    /// # Errors
    /// What ends the backward pass.
    fn placed(&self) -> SinkResult<()>;

    /// The gradient of this pass was added to that of `param`, see [`take_grad`]; there is none where it was put into its
    /// place.
    ///
    /// # Errors
    /// What ends the backward pass.
    fn accumulated(&self, param: Tensor) -> SinkResult<()>;
}

/// All gradients are handed over.
impl<F: Fn(Tensor) -> SinkResult<()> + Send + Sync> GradSink for F {
    fn place(&self) -> SinkResult<Option<(Tensor, bool)>> {
        Ok(None)
    }

    fn placed(&self) -> SinkResult<()> {
        Err("a sink without places was told that its place is filled".to_owned())
    }

    fn accumulated(&self, param: Tensor) -> SinkResult<()> {
        self(param)
    }
}

type Sink = Box<dyn GradSink>;

/// Has the gradients of `param` go to `sink` in all backward passes (a `register_post_accumulate_grad_hook` of PyTorch,
/// and a place for what needs no accumulation).
///
/// A parameter has one sink: a second one replaces the first. It lives as long as the parameter; it must not hold the
/// parameter itself, which it is given, or neither is ever freed.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) unless `param` is a leaf that requires a gradient.
pub fn set_grad_sink(param: &Tensor, sink: impl GradSink + 'static) -> Result<()> {
    const OP: &str = "set_grad_sink";
    check(OP, param.requires_grad() && param.is_leaf(), || {
        format!("needs a leaf that requires a gradient, got {param:?}")
    })?;
    let sink: Box<Sink> = Box::new(Box::new(sink));
    let raw = RawGradSink { data: Box::into_raw(sink).cast(), place, placed, accumulated, drop: drop_sink };
    // SAFETY: `param` and `raw` live for the call; the functions take its `data`, and the shim gives that to the last of
    // them exactly once, also when it fails.
    outcome(OP, unsafe { ffi::sail_set_grad_sink(param.as_ptr(), &raw const raw) })
}

/// Has `hook` called each time that a backward pass has the whole gradient of `tensor`, with that gradient, just before it
/// goes on through what made the tensor (`register_hook` of PyTorch), on the thread that runs that part of the pass.
///
/// The hook lives as long as the graph. It must not hold the tensor, or neither is ever freed.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for a tensor without a graph, and for a leaf.
pub fn on_gradient(
    tensor: &Tensor,
    hook: impl Fn(Tensor) -> SinkResult<()> + Send + Sync + 'static,
) -> Result<()> {
    const OP: &str = "on_gradient";
    check(OP, tensor.requires_grad() && !tensor.is_leaf(), || {
        format!("needs a tensor that was computed with a graph, got {tensor:?}")
    })?;
    let hook: Box<Hook> = Box::new(Box::new(hook));
    let data = Box::into_raw(hook).cast();
    // SAFETY: `tensor` lives for the call; `data` is what `call_hook` and `drop_hook` take, and the shim gives it to
    // `drop_hook` exactly once, also when it fails.
    let error = unsafe { ffi::sail_on_gradient(tensor.as_ptr(), call_hook, drop_hook, data) };
    outcome(OP, error)
}

/// The gradient of `param`, which has none afterwards.
pub fn take_grad(param: &Tensor) -> Result<Option<Tensor>> {
    const OP: &str = "take_grad";
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: `param` is a live tensor, and `out` a valid place for one pointer.
    let error = unsafe { ffi::sail_take_grad(param.as_ptr().cast_mut(), &raw mut out) };
    outcome(OP, error)?;
    if out.is_null() {
        return Ok(None);
    }
    // SAFETY: without an error `out` is a tensor that nobody else owns.
    Ok(Some(unsafe { Tensor::from_ptr(out) }))
}

/// The sink behind the pointer that [`set_grad_sink`] has given away.
fn sink<'a>(data: *mut c_void) -> &'a Sink {
    // SAFETY: `data` is the box of `set_grad_sink`, which lives until `drop_sink`; calls share it.
    unsafe { &*data.cast::<Sink>() }
}

fn reported(result: SinkResult<()>) -> *mut RawError {
    let Err(message) = result else { return std::ptr::null_mut() };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a NUL-terminated string that the shim copies.
    unsafe { ffi::sail_error_new(message.as_ptr()) }
}

extern "C" fn place(data: *mut c_void, out: *mut *mut C_tensor, holds: *mut bool) -> *mut RawError {
    let (place, is_held) = match sink(data).place() {
        Ok(Some(found)) => found,
        Ok(None) => return std::ptr::null_mut(),
        Err(message) => return reported(Err(message)),
    };
    // The shim owns this handle.
    let place = ManuallyDrop::new(place);
    // SAFETY: a valid place for one pointer.
    unsafe { out.write(place.as_ptr().cast_mut()) };
    // SAFETY: a valid place for one flag.
    unsafe { holds.write(is_held) };
    std::ptr::null_mut()
}

extern "C" fn placed(data: *mut c_void) -> *mut RawError {
    reported(sink(data).placed())
}

extern "C" fn accumulated(data: *mut c_void, param: *mut C_tensor) -> *mut RawError {
    // SAFETY: the shim gives this call a reference of its own.
    let param = unsafe { Tensor::from_ptr(param) };
    reported(sink(data).accumulated(param))
}

extern "C" fn drop_sink(data: *mut c_void) {
    // SAFETY: `data` is the box of `set_grad_sink`, given back once and used no more.
    drop(unsafe { Box::from_raw(data.cast::<Sink>()) });
}

extern "C" fn call_hook(data: *mut c_void, gradient: *mut C_tensor) -> *mut RawError {
    // SAFETY: `data` is the box of `on_gradient`, which lives until `drop_hook`; calls share it.
    let hook = unsafe { &*data.cast::<Hook>() };
    // SAFETY: the shim gives this call a reference of its own.
    let gradient = unsafe { Tensor::from_ptr(gradient) };
    reported(hook(gradient))
}

extern "C" fn drop_hook(data: *mut c_void) {
    // SAFETY: `data` is the box of `on_gradient`, given back once and used no more.
    drop(unsafe { Box::from_raw(data.cast::<Hook>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use tch::{Device, Kind};

    use super::*;
    use crate::linears;

    /// What came, and the place where a gradient may be put.
    #[derive(Clone, Default)]
    struct Notes(Arc<Mutex<Vec<Vec<f32>>>>, Option<Arc<Mutex<(Tensor, bool)>>>);

    fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    impl Notes {
        fn with_place(place: Tensor) -> Self {
            Self(Arc::default(), Some(Arc::new(Mutex::new((place, false)))))
        }

        fn came(&self) -> Vec<Vec<f32>> {
            locked(&self.0).clone()
        }
    }

    impl GradSink for Notes {
        fn place(&self) -> SinkResult<Option<(Tensor, bool)>> {
            Ok(self.1.as_ref().map(|place| {
                let (place, holds) = &*locked(place);
                (place.shallow_clone(), *holds)
            }))
        }

        fn placed(&self) -> SinkResult<()> {
            locked(self.1.as_ref().ok_or("there is no place")?).1 = true;
            Ok(())
        }

        fn accumulated(&self, param: Tensor) -> SinkResult<()> {
            // None where it was put into its place.
            let Some(grad) = take_grad(&param).map_err(|error| error.to_string())? else { return Ok(()) };
            locked(&self.0)
                .push(Vec::<f32>::try_from(grad.flatten(0, -1)).map_err(|error| error.to_string())?);
            Ok(())
        }
    }

    #[test]
    fn a_sink_sees_each_gradient_once_and_can_take_it() {
        let param = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let notes = Notes::default();
        set_grad_sink(&param, notes.clone()).unwrap();
        for factor in [1.0, 2.0] {
            // Used twice, as a tied embedding is: its gradient still comes once.
            (&param * factor + &param).sum(Kind::Float).backward();
        }
        assert_eq!(notes.came(), [[2.0, 2.0], [3.0, 3.0]]);
        assert!(take_grad(&param).unwrap().is_none());
        drop(param);
        assert_eq!(Arc::strong_count(&notes.0), 1, "the sink goes with its parameter");
    }

    /// Of three passes the first writes over what lies there; nothing comes by the other way, but for what is no
    /// product.
    #[test]
    fn products_are_put_into_their_place() {
        let float = (Kind::Float, Device::Cpu);
        let place = Tensor::full([2, 3], 7.0, float);
        let weight = Tensor::randn([2, 3], float).set_requires_grad(true);
        let bias = Tensor::zeros([2], float).set_requires_grad(true);
        let notes = Notes::with_place(place.shallow_clone());
        let of_bias = Notes::with_place(Tensor::full([2], 7.0, float));
        set_grad_sink(&weight, notes.clone()).unwrap();
        set_grad_sink(&bias, of_bias.clone()).unwrap();
        let (x, probe) = (Tensor::randn([5, 3], float), Tensor::randn([5, 2], float));
        for passes in 1..=3 {
            let [y] = linears(&x, [(&weight, Some(&bias))], None).unwrap();
            (y * &probe).sum(Kind::Float).backward();
            let expected = probe.tr().matmul(&x) * f64::from(passes);
            assert!(place.allclose(&expected, 1e-5, 1e-6, false), "after {passes}");
        }
        assert!(take_grad(&weight).unwrap().is_none() && notes.came().is_empty());
        assert_eq!(of_bias.came().len(), 3);
    }

    struct Failing;

    impl GradSink for Failing {
        fn place(&self) -> SinkResult<Option<(Tensor, bool)>> {
            Err("bucket 4 is gone".to_owned())
        }

        fn placed(&self) -> SinkResult<()> {
            Ok(())
        }

        fn accumulated(&self, _: Tensor) -> SinkResult<()> {
            Err("bucket 3 is gone".to_owned())
        }
    }

    #[test]
    fn a_sink_that_fails_ends_the_backward_pass() {
        let param = Tensor::ones([1, 1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        set_grad_sink(&param, Failing).unwrap();
        let message = |loss: Tensor| loss.f_backward().unwrap_err().to_string();
        assert!(message(param.sum(Kind::Float)).contains("bucket 3 is gone"));
        let [y] = linears(&param.detach(), [(&param, None)], None).unwrap();
        assert!(message(y.sum(Kind::Float)).contains("bucket 4 is gone"));
    }

    #[test]
    fn a_gradient_is_seen_on_its_way() {
        let x = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let inner = &x * 2.0;
        let (of_hook, param) = (Arc::clone(&seen), Mutex::new(x.shallow_clone()));
        on_gradient(&inner, move |gradient: Tensor| {
            let param = param.lock().map_err(|_| "poisoned")?;
            let before = take_grad(&param).map_err(|error| error.to_string())?.is_none();
            let values = Vec::<f32>::try_from(gradient).map_err(|error| error.to_string())?;
            of_hook.lock().map_err(|_| "poisoned")?.push((before, values));
            Ok(())
        })
        .unwrap();
        // Used twice: the gradient comes once it is whole.
        (&inner * 3.0 + &inner).sum(Kind::Float).backward();
        assert_eq!(*seen.lock().unwrap(), [(true, vec![4.0, 4.0])]);
        assert_eq!(Vec::<f32>::try_from(take_grad(&x).unwrap().unwrap()).unwrap(), [8.0, 8.0]);
        drop(inner);
        assert_eq!(Arc::strong_count(&seen), 1, "the hook goes with the graph");
        assert!(on_gradient(&x, |_| Ok(())).is_err() && on_gradient(&x.detach(), |_| Ok(())).is_err());
        let failing = &x * 2.0;
        on_gradient(&failing, |_| Err("no such module".to_owned())).unwrap();
        let error = failing.sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("no such module"), "{error}");
    }

    #[test]
    fn only_leaves_that_require_a_gradient_have_a_sink() {
        let frozen = Tensor::from_slice(&[1f32]);
        assert!(set_grad_sink(&frozen, Failing).is_err());
        let inner = frozen.set_requires_grad(true) * 2.0;
        assert!(set_grad_sink(&inner, Failing).is_err());
    }
}
