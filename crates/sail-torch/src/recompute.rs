//! Parts of the forward pass that are computed again in the backward pass instead of being kept.

use std::any::Any;
use std::ffi::{CString, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use tch::Tensor;
use torch_sys::C_tensor;

use crate::call::{outcome, pointers};
use crate::error::Result;
use crate::ffi::{self, RawError};

type Computation = Box<dyn Fn(&[Tensor]) -> Vec<Tensor> + Send>;

/// `run(inputs)`, of which only the inputs are kept: the backward pass computes it once more (Chen et al.,
/// arXiv 1604.06174; PyTorch's `torch.utils.checkpoint` with `use_reentrant`).
///
/// Gradients of the inputs and of the parameters that `run` reads are those of a plain call, and hooks on parameters
/// are called as in one. `trains` says whether any of those parameters requires a gradient. `run` must compute the
/// same each time, and each result must be a new tensor; it may be called on the threads of a backward pass.
///
/// # Errors
/// Those of libtorch; a panic in `run`, by its message. In the backward pass both end that pass.
pub fn recompute(
    inputs: &[&Tensor],
    trains: bool,
    run: impl Fn(&[Tensor]) -> Vec<Tensor> + Send + 'static,
) -> Result<Vec<Tensor>> {
    const OP: &str = "recompute";
    let run: Box<Computation> = Box::new(Box::new(run));
    let data = Box::into_raw(run).cast();
    let inputs = pointers(inputs.iter().copied());
    let mut results: Vec<Tensor> = Vec::new();
    // SAFETY: live tensors; `data` is what `call` and `drop_computation` take, and the shim gives it to the latter
    // exactly once, also when it fails; `results` is what `give` takes, and outlives the call.
    let error = unsafe {
        ffi::sail_recompute(
            inputs.as_ptr(),
            inputs.len(),
            trains,
            call,
            drop_computation,
            data,
            give,
            (&raw mut results).cast(),
        )
    };
    outcome(OP, error)?;
    Ok(results)
}

extern "C" fn call(
    data: *mut c_void,
    inputs: *const *mut C_tensor,
    n: usize,
    sink: *mut c_void,
) -> *mut RawError {
    // SAFETY: `data` is the box of `recompute`, which lives until `drop_computation`.
    let run = unsafe { &*data.cast::<Computation>() };
    // SAFETY: the shim gives `n` pointers that live for this call.
    let inputs = unsafe { slice::from_raw_parts(inputs, n) };
    let made = catch_unwind(AssertUnwindSafe(|| {
        let inputs: Vec<Tensor> = inputs.iter().map(|input| clone_of(*input)).collect();
        run(&inputs)
    }));
    match made {
        Ok(results) => {
            for result in &results {
                // SAFETY: `sink` is of this call, and the shim copies the handle of a live tensor.
                unsafe { ffi::sail_push(sink, result.as_ptr()) };
            }
            std::ptr::null_mut()
        }
        Err(panic) => {
            let message = CString::new(message_of(&*panic).replace('\0', " ")).unwrap_or_default();
            // SAFETY: a NUL-terminated string that the shim copies.
            unsafe { ffi::sail_error_new(message.as_ptr()) }
        }
    }
}

fn clone_of(tensor: *mut C_tensor) -> Tensor {
    // SAFETY: a live tensor of the shim's, of which this makes another handle.
    unsafe { Tensor::clone_from_ptr(tensor) }
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a message")
}

extern "C" fn give(out: *mut c_void, tensor: *mut C_tensor) {
    // SAFETY: the list of `recompute`, which nobody else uses during its call.
    let results = unsafe { &mut *out.cast::<Vec<Tensor>>() };
    // SAFETY: a new tensor that nobody else owns.
    results.push(unsafe { Tensor::from_ptr(tensor) });
}

extern "C" fn drop_computation(data: *mut c_void) {
    // SAFETY: `data` is the box of `recompute`, given back once and used no more.
    drop(unsafe { Box::from_raw(data.cast::<Computation>()) });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::{Device, Kind};

    use super::*;
    use crate::{set_grad_sink, take_grad};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn weight() -> Tensor {
        Tensor::randn([4, 4], FLOAT).set_requires_grad(true)
    }

    /// Two results, the second not differentiable.
    fn layer(x: &Tensor, w: &Tensor) -> Vec<Tensor> {
        let y = x.matmul(w).silu();
        let largest = y.detach().argmax(1, false);
        vec![y, largest]
    }

    fn recomputed(x: &Tensor, w: &Tensor, calls: &Arc<AtomicUsize>) -> Tensor {
        let (weight, calls) = (w.shallow_clone(), Arc::clone(calls));
        let results = recompute(&[x], w.requires_grad(), move |inputs| {
            calls.fetch_add(1, Ordering::Relaxed);
            layer(&inputs[0], &weight)
        });
        results.unwrap().swap_remove(0)
    }

    #[test]
    fn gradients_are_those_of_a_plain_call() {
        // The weight and the input are trained, or one of them: also what is first in a model, whose input is not.
        for (trains_x, trains_w) in [(true, true), (false, true), (true, false)] {
            let x = Tensor::randn([3, 4], FLOAT).set_requires_grad(trains_x);
            let w = weight().detach().set_requires_grad(trains_w);
            let calls = Arc::new(AtomicUsize::new(0));
            let wanted: Vec<&Tensor> = [&x, &w].into_iter().filter(|tensor| tensor.requires_grad()).collect();
            let plain = layer(&layer(&x, &w)[0], &w)[0].square().sum(Kind::Float);
            plain.backward();
            let take = || wanted.iter().map(|tensor| take_grad(tensor).unwrap().unwrap()).collect::<Vec<_>>();
            let expected = take();
            let loss = recomputed(&recomputed(&x, &w, &calls), &w, &calls).square().sum(Kind::Float);
            assert_eq!(loss.double_value(&[]).to_bits(), plain.double_value(&[]).to_bits());
            assert_eq!(calls.load(Ordering::Relaxed), 2);
            loss.backward();
            assert_eq!(calls.load(Ordering::Relaxed), 4, "each was computed once more");
            for (found, expected) in take().iter().zip(&expected) {
                assert!(found.allclose(expected, 1e-6, 1e-7, false), "{trains_x} {trains_w}");
            }
            drop(loss);
            assert_eq!(Arc::strong_count(&calls), 1, "what a computation captured goes with the graph");
        }
    }

    #[test]
    fn nothing_is_kept_without_a_graph() {
        let (x, w, calls) = (Tensor::randn([3, 4], FLOAT), weight(), Arc::default());
        let y = tch::no_grad(|| recomputed(&x, &w, &calls));
        assert!(!y.requires_grad());
        let frozen = recomputed(&x, &w.detach(), &calls);
        assert!(!frozen.requires_grad());
        assert_eq!(Arc::strong_count(&calls), 1);
    }

    /// The last gradient, of 128 MiB, comes when the 16 inputs that were kept, of 4 MiB each, are gone.
    #[test]
    fn what_is_kept_goes_as_the_backward_pass_comes_to_it() {
        let (large, layers) = (1 << 25, 16);
        let start = Tensor::ones([large], FLOAT).set_requires_grad(true);
        let w = Tensor::from_slice(&[1.5f32]).set_requires_grad(true);
        let pass = || {
            let mut x = start.narrow(0, 0, large / 32).view([-1, 4]);
            for _ in 0..layers {
                let w = w.shallow_clone();
                x = recompute(&[&x], true, move |inputs| vec![&inputs[0] * &w]).unwrap().remove(0);
            }
            x.sum(Kind::Float).backward();
        };
        pass();
        let ((), usage) = crate::cpu_memory::measure(pass).unwrap();
        assert!((128 << 20..144 << 20).contains(&usage.peak_bytes), "{usage:?}");
    }

    #[test]
    fn hooks_on_parameters_are_called() {
        let (x, w) = (Tensor::randn([3, 4], FLOAT), weight());
        let seen = Arc::new(AtomicUsize::new(0));
        let of_hook = Arc::clone(&seen);
        set_grad_sink(&w, move |param: Tensor| {
            of_hook.fetch_add(1, Ordering::Relaxed);
            take_grad(&param).map_err(|error| error.to_string())?.map(drop).ok_or_else(|| "none".into())
        })
        .unwrap();
        recomputed(&x, &w, &Arc::default()).sum(Kind::Float).backward();
        assert_eq!(seen.load(Ordering::Relaxed), 1);
        assert!(take_grad(&w).unwrap().is_none());
    }

    #[test]
    fn a_panic_is_an_error_in_both_passes() {
        let x = Tensor::ones([1], FLOAT).set_requires_grad(true);
        let error = recompute(&[&x], true, |_| panic!("no such block")).unwrap_err().to_string();
        assert!(error.contains("no such block"), "{error}");
        let calls = AtomicUsize::new(0);
        let late = move |inputs: &[Tensor]| {
            assert!(calls.fetch_add(1, Ordering::Relaxed) == 0, "not again");
            vec![&inputs[0] * 2.0]
        };
        let y = recompute(&[&x], true, late).unwrap().remove(0);
        let error = y.sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("not again"), "{error}");
    }
}
