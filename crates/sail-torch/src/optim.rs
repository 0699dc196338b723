//! AdamW and the multi-tensor operations around it.

use tch::Kind;
use tch::Tensor;
use torch_sys::C_tensor;

use crate::call::{check, outcome, pointers};
use crate::error::Result;
use crate::ffi;

/// One parameter and what AdamW keeps of it. All four tensors of the parameter's shape are fp32,
/// contiguous and on one device; `step` is a 0-dimensional fp32 tensor there, counting the updates so far.
#[derive(Debug)]
pub struct AdamWSlot {
    /// Updated in place.
    pub param: Tensor,
    /// Mean gradient of the global step.
    pub grad: Tensor,
    /// First moment, updated in place.
    pub exp_avg: Tensor,
    /// Second moment, updated in place.
    pub exp_avg_sq: Tensor,
    /// Increased by one.
    pub step: Tensor,
}

/// The figures of AdamW that a group of parameters shares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// One AdamW update of all slots (`at::_fused_adamw_`; Loshchilov and Hutter, arXiv 1711.05101).
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when kinds, shapes, layouts or devices do not fit.
pub fn fused_adamw(slots: &[AdamWSlot], options: AdamWOptions) -> Result<()> {
    const OP: &str = "fused_adamw";
    for slot in slots {
        let (size, device) = (slot.param.size(), slot.param.device());
        for (name, tensor) in
            [("grad", &slot.grad), ("exp_avg", &slot.exp_avg), ("exp_avg_sq", &slot.exp_avg_sq)]
        {
            check(OP, tensor.size() == size, || {
                format!("`{name}` has shape {:?}, its parameter {size:?}", tensor.size())
            })?;
        }
        check(OP, slot.step.size().is_empty(), || "`step` must be 0-dimensional".to_owned())?;
        for tensor in [&slot.param, &slot.grad, &slot.exp_avg, &slot.exp_avg_sq, &slot.step] {
            check(OP, tensor.is_contiguous(), || format!("needs contiguous tensors, got {tensor:?}"))?;
            check(OP, tensor.kind() == Kind::Float && tensor.device() == device, || {
                format!("needs fp32 on {device:?}, got {:?} on {:?}", tensor.kind(), tensor.device())
            })?;
        }
    }
    if slots.is_empty() {
        return Ok(());
    }
    let column = |field: fn(&AdamWSlot) -> &Tensor| pointers(slots.iter().map(field));
    let params = column(|slot| &slot.param);
    let grads = column(|slot| &slot.grad);
    let exp_avgs = column(|slot| &slot.exp_avg);
    let exp_avg_sqs = column(|slot| &slot.exp_avg_sq);
    let steps = column(|slot| &slot.step);
    // SAFETY: the five arrays hold `slots.len()` pointers to tensors that `slots` keeps alive for
    // the call, of the kinds, shapes, layout and devices that `_fused_adamw_` needs, as checked above.
    let message = unsafe {
        ffi::sail_fused_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            steps.as_ptr(),
            slots.len(),
            options.lr,
            options.betas.0,
            options.betas.1,
            options.weight_decay,
            options.eps,
        )
    };
    outcome(OP, message)
}

/// The squared 2-norm of each tensor, in one pass over all of them: a 1-dimensional fp64 tensor on their device, in their
/// order.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for an empty list or tensors on several devices.
pub fn squared_norms(tensors: &[Tensor]) -> Result<Tensor> {
    const OP: &str = "squared_norms";
    one_device(OP, tensors)?;
    let list = pointers(tensors);
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: `list` holds `tensors.len()` live tensors, and `out` is a valid place for one pointer.
    let message = unsafe { ffi::sail_squared_norms(list.as_ptr(), list.len(), &raw mut out) };
    outcome(OP, message)?;
    // SAFETY: without a message `out` is a new tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Multiplies every tensor in place by `factor`, a 0-dimensional tensor on their device.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for an empty list or tensors on several devices.
pub fn foreach_mul(tensors: &[Tensor], factor: &Tensor) -> Result<()> {
    const OP: &str = "foreach_mul";
    one_device(OP, tensors)?;
    check(OP, factor.size().is_empty() && factor.device() == tensors[0].device(), || {
        format!("`factor` has shape {:?} on {:?}", factor.size(), factor.device())
    })?;
    let list = pointers(tensors);
    // SAFETY: `list` holds `tensors.len()` live tensors and `factor` is one more, on the same device.
    let message = unsafe { ffi::sail_foreach_mul(list.as_ptr(), list.len(), factor.as_ptr().cast_mut()) };
    outcome(OP, message)
}

fn one_device(op: &'static str, tensors: &[Tensor]) -> Result<()> {
    let first = tensors.first().map(Tensor::device);
    check(op, first.is_some(), || "needs at least one tensor".to_owned())?;
    check(op, tensors.iter().all(|t| Some(t.device()) == first), || {
        "tensors lie on different devices".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn slot(values: &[f32], grads: &[f32]) -> AdamWSlot {
        let param = Tensor::from_slice(values);
        AdamWSlot {
            grad: Tensor::from_slice(grads),
            exp_avg: param.zeros_like(),
            exp_avg_sq: param.zeros_like(),
            step: Tensor::from(0f32),
            param,
        }
    }

    #[test]
    fn adamw_follows_the_paper() {
        let options = AdamWOptions { lr: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.5 };
        let slots = [slot(&[1.0, -2.0], &[0.3, -0.4])];
        for _ in 0..3 {
            fused_adamw(&slots, options).unwrap();
        }
        let expected = [(1.0f64, 0.3f64), (-2.0, -0.4)].map(|(mut p, g)| {
            let (mut m, mut v) = (0.0, 0.0);
            for t in 1..=3 {
                m = 0.9 * m + 0.1 * g;
                v = 0.99 * v + 0.01 * g * g;
                let (m_hat, v_hat) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.99f64.powi(t)));
                p -= 0.1 * 0.5 * p;
                p -= 0.1 * m_hat / (v_hat.sqrt() + 1e-8);
            }
            p
        });
        for (i, expected) in expected.into_iter().enumerate() {
            let got = slots[0].param.double_value(&[i as i64]);
            assert!((got - expected).abs() < 1e-5, "{got} is not {expected}");
        }
        assert!((slots[0].step.double_value(&[]) - 3.0).abs() < 1e-9);
    }

    #[test]
    fn arguments_are_checked_before_the_call() {
        let mut wrong = slot(&[1.0, 2.0], &[0.0, 0.0]);
        wrong.grad = Tensor::from_slice(&[1f32]);
        let options = AdamWOptions { lr: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.0 };
        let error = fused_adamw(&[wrong], options).unwrap_err().to_string();
        assert!(error.contains("`grad` has shape [1]"), "{error}");
        let mut wrong = slot(&[1.0], &[0.0]);
        wrong.param = wrong.param.to_kind(Kind::BFloat16);
        assert!(fused_adamw(&[wrong], options).is_err());
        let mut wrong = slot(&[1.0, 2.0, 3.0, 4.0], &[0.0; 4]);
        for tensor in [&mut wrong.grad, &mut wrong.exp_avg, &mut wrong.exp_avg_sq] {
            *tensor = tensor.reshape([2, 2]);
        }
        wrong.param = wrong.param.reshape([2, 2]).transpose(0, 1);
        let error = fused_adamw(&[wrong], options).unwrap_err().to_string();
        assert!(error.contains("contiguous"), "{error}");
        assert!(squared_norms(&[]).is_err());
    }

    #[test]
    fn norm_and_scale_cover_all_tensors() {
        let tensors = [Tensor::from_slice(&[3f32, 0.0]), Tensor::from_slice(&[[0f32], [4.0]].concat())];
        let each = Vec::<f64>::try_from(squared_norms(&tensors).unwrap()).unwrap();
        assert!((each[0] - 9.0).abs() < 1e-6 && (each[1] - 16.0).abs() < 1e-6, "{each:?}");
        foreach_mul(&tensors, &Tensor::from(0.5f32)).unwrap();
        let norm = squared_norms(&tensors).unwrap().sum(Kind::Double).sqrt();
        assert!((norm.double_value(&[]) - 2.5).abs() < 1e-6);
    }

    /// The norm of a large table was wrong by a thousandth, and with it the clipping of every step.
    #[test]
    fn the_norm_of_millions_is_exact() {
        let table = Tensor::randn([1 << 24], (Kind::Float, tch::Device::Cpu));
        let expected = table.to_kind(Kind::Double).norm().double_value(&[]);
        let each = squared_norms(&[table.narrow(0, 0, 2), table.view([1 << 12, 1 << 12])]).unwrap();
        assert_eq!((each.size(), each.kind()), (vec![2], Kind::Double));
        let found = each.double_value(&[1]).sqrt();
        assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
    }

    #[test]
    fn exceptions_become_errors() {
        let string = Tensor::from_slice(&[1i64, 2]);
        let error = squared_norms(&[string]).unwrap_err();
        assert!(matches!(error, Error::Torch { op: "squared_norms", .. }), "{error}");
    }
}
