//! Gradients as they arrive in a backward pass.

use std::ffi::{CString, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::call::{check, outcome};
use crate::error::Result;
use crate::ffi::{self, RawError};

/// Called with a parameter whose gradient is complete, or with a gradient; an error ends the backward pass with its message.
type Hook = Box<dyn Fn(Tensor) -> std::result::Result<(), String> + Send + Sync>;

/// Has `hook` called each time that a backward pass has added to the gradient of `param`
/// (`register_post_accumulate_grad_hook` of PyTorch), on the thread that runs that part of the pass.
///
/// A parameter has one such hook: a second one replaces the first. It lives as long as the parameter; it must
/// not hold the parameter itself, which it is given, or neither is ever freed.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) unless `param` is a leaf that requires a gradient.
pub fn on_accumulated(
    param: &Tensor,
    hook: impl Fn(Tensor) -> std::result::Result<(), String> + Send + Sync + 'static,
) -> Result<()> {
    const OP: &str = "on_accumulated";
    check(OP, param.requires_grad() && param.is_leaf(), || {
        format!("needs a leaf that requires a gradient, got {param:?}")
    })?;
    let hook: Box<Hook> = Box::new(Box::new(hook));
    let data = Box::into_raw(hook).cast();
    // SAFETY: `param` lives for the call; `data` is what `call_hook` and `drop_hook` take, and the shim gives
    // it to `drop_hook` exactly once, also when it fails.
    let error =
        unsafe { ffi::sail_set_post_accumulate_grad_hook(param.as_ptr(), call_hook, drop_hook, data) };
    outcome(OP, error)
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
    hook: impl Fn(Tensor) -> std::result::Result<(), String> + Send + Sync + 'static,
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

extern "C" fn call_hook(data: *mut c_void, tensor: *mut C_tensor) -> *mut RawError {
    // SAFETY: `data` is the box that was given with this function, which lives until `drop_hook`; calls share it.
    let hook = unsafe { &*data.cast::<Hook>() };
    // SAFETY: the shim gives this call a reference of its own.
    let tensor = unsafe { Tensor::from_ptr(tensor) };
    match hook(tensor) {
        Ok(()) => std::ptr::null_mut(),
        Err(message) => {
            let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
            // SAFETY: a NUL-terminated string that the shim copies.
            unsafe { ffi::sail_error_new(message.as_ptr()) }
        }
    }
}

extern "C" fn drop_hook(data: *mut c_void) {
    // SAFETY: `data` is the box that was given with this function, given back once and used no more.
    drop(unsafe { Box::from_raw(data.cast::<Hook>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tch::Kind;

    use super::*;

    #[test]
    fn a_hook_sees_each_gradient_once_and_can_take_it() {
        let param = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let of_hook = Arc::clone(&seen);
        on_accumulated(&param, move |param| {
            let grad = take_grad(&param).map_err(|error| error.to_string())?.ok_or("no gradient")?;
            of_hook
                .lock()
                .map_err(|_| "poisoned")?
                .push(Vec::<f32>::try_from(grad).map_err(|e| e.to_string())?);
            Ok(())
        })
        .unwrap();
        for factor in [1.0, 2.0] {
            // Used twice, as a tied embedding is: its gradient still comes once.
            (&param * factor + &param).sum(Kind::Float).backward();
        }
        assert_eq!(*seen.lock().unwrap(), [[2.0, 2.0], [3.0, 3.0]]);
        assert!(take_grad(&param).unwrap().is_none());
        drop(param);
        assert_eq!(Arc::strong_count(&seen), 1, "the hook goes with its parameter");
    }

    #[test]
    fn a_gradient_is_seen_on_its_way() {
        let x = Tensor::from_slice(&[1f32, 2.0]).set_requires_grad(true);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let inner = &x * 2.0;
        let (of_hook, param) = (Arc::clone(&seen), Mutex::new(x.shallow_clone()));
        on_gradient(&inner, move |gradient| {
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
    fn a_hook_that_fails_ends_the_backward_pass() {
        let param = Tensor::from_slice(&[1f32]).set_requires_grad(true);
        on_accumulated(&param, |_| Err("bucket 3 is gone".to_owned())).unwrap();
        let error = param.sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("bucket 3 is gone"), "{error}");
    }

    #[test]
    fn only_leaves_that_require_a_gradient_take_a_hook() {
        let frozen = Tensor::from_slice(&[1f32]);
        assert!(on_accumulated(&frozen, |_| Ok(())).is_err());
        let inner = frozen.set_requires_grad(true) * 2.0;
        assert!(on_accumulated(&inner, |_| Ok(())).is_err());
    }
}
