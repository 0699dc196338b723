//! The head of a language model and its loss in one.

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::call::{check, outcome};
use crate::error::Result;
use crate::ffi;

/// What [`linear_cross_entropy`] gives.
#[derive(Debug)]
pub struct CrossEntropy {
    /// Sum over the rows of weight times cross-entropy: 0-dimensional, fp32, differentiable once in rows and head.
    pub sum: Tensor,
    /// Cross-entropy of each row without its weight, `[r]` fp32; not differentiable.
    pub losses_r: Tensor,
}

/// Logits that are held at a time, on the CPU and on CUDA.
const LOGITS: [i64; 2] = [1 << 24, 1 << 26];

/// Rows whose logits [`linear_cross_entropy`] holds at a time: few enough that these are a small part of memory, but at
/// least 64, so that a matrix product is fast.
pub fn cross_entropy_chunk(rows: i64, vocab: i64, cuda: bool) -> i64 {
    rows.min((LOGITS[usize::from(cuda)] / vocab).max(64)).max(1)
}

/// Cross-entropy of `softmax(x W^T)`, without ever holding the logits of all rows: those of a few rows are made, give
/// their losses and, where a gradient is wanted, their part of it, and are gone (the order of Liger Kernel's fused
/// linear cross-entropy, arXiv 2410.10989, section 3.2).
///
/// `x_rd` `[r, d]` and `weight_vd` `[v, d]` of one float type; `targets_r` `[r]` int64, each in `0..v`; `weights_r`
/// `[r]` fp32. Softmax, losses and the sums over rows are fp32. Memory is that of the logits of
/// [`cross_entropy_chunk`] rows and of their softmax, in 16 bits also of these logits in fp32 or of one product of the size
/// of `weight_vd`, and of the gradients; that of `weight_vd` is summed in fp32.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when kinds, shapes or devices do not fit; those of libtorch, as for a
/// target that is no token.
pub fn linear_cross_entropy(
    x_rd: &Tensor,
    weight_vd: &Tensor,
    targets_r: &Tensor,
    weights_r: &Tensor,
) -> Result<CrossEntropy> {
    const OP: &str = "linear_cross_entropy";
    let (x, weight) = (x_rd.size(), weight_vd.size());
    check(OP, x.len() == 2 && weight.len() == 2 && x[1] == weight[1] && weight[0] > 0, || {
        format!("rows of shape {x:?} do not fit a head of {weight:?}")
    })?;
    check(OP, x_rd.kind() == weight_vd.kind() && x_rd.device() == weight_vd.device(), || {
        format!("rows are {x_rd:?}, the head is {weight_vd:?}")
    })?;
    for (tensor, kind) in [(targets_r, Kind::Int64), (weights_r, Kind::Float)] {
        let fits = tensor.size() == x[..1] && tensor.kind() == kind && tensor.device() == x_rd.device();
        check(OP, fits, || format!("needs [{}] {kind:?} for rows {x_rd:?}, got {tensor:?}", x[0]))?;
    }
    let mut sum: *mut C_tensor = std::ptr::null_mut();
    let mut losses_r: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: four live tensors, and two valid places for one pointer each.
    let error = unsafe {
        ffi::sail_linear_cross_entropy(
            x_rd.as_ptr(),
            weight_vd.as_ptr(),
            targets_r.as_ptr(),
            weights_r.as_ptr(),
            cross_entropy_chunk(x[0], weight[0], x_rd.device().is_cuda()),
            &raw mut sum,
            &raw mut losses_r,
        )
    };
    outcome(OP, error)?;
    // SAFETY: without an error `sum` is a new tensor that nobody else owns.
    let sum = unsafe { Tensor::from_ptr(sum) };
    // SAFETY: as for `sum`.
    let losses_r = unsafe { Tensor::from_ptr(losses_r) };
    Ok(CrossEntropy { sum, losses_r })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Reduction};

    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Rows, head, targets and weights; more rows than one chunk has.
    fn example(rows: i64, vocab: i64) -> [Tensor; 4] {
        tch::manual_seed(7);
        let weights = Tensor::rand([rows], FLOAT);
        [
            Tensor::randn([rows, 16], FLOAT).set_requires_grad(true),
            Tensor::randn([vocab, 16], FLOAT).set_requires_grad(true),
            Tensor::randint(vocab, [rows], (Kind::Int64, Device::Cpu)),
            weights,
        ]
    }

    fn plain([x, w, targets, weights]: &[Tensor; 4]) -> (Tensor, Tensor) {
        let logits = x.linear(w, None::<&Tensor>).to_kind(Kind::Float);
        let losses = logits.cross_entropy_loss(targets, None::<&Tensor>, Reduction::None, -100, 0.0);
        ((&losses * weights).sum(Kind::Float), losses)
    }

    fn is_close(a: &Tensor, b: &Tensor, tolerance: f64) -> bool {
        let difference = (a - b).norm().double_value(&[]);
        difference <= tolerance * b.norm().double_value(&[])
    }

    /// Values and gradients, also of a frozen head, of rows that train nothing, and times a factor.
    #[test]
    fn chunks_give_what_all_logits_give() {
        // 64 rows a chunk: one, three and a part, none.
        for rows in [1, 200, 0] {
            let example = example(rows, 1 << 18);
            let (sum, losses) = plain(&example);
            let made = {
                let [x, w, targets, weights] = &example;
                linear_cross_entropy(x, w, targets, weights).unwrap()
            };
            assert!(is_close(&made.sum, &sum, 1e-6) && is_close(&made.losses_r, &losses, 1e-6), "{rows}");
            assert!(!made.losses_r.requires_grad());
            let inputs = [&example[0], &example[1]];
            let expected = Tensor::run_backward(&[sum * 0.25], &inputs, false, false);
            let found = Tensor::run_backward(&[made.sum * 0.25], &inputs, false, false);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(is_close(found, expected, 1e-5), "{rows}");
            }
            for (trained, frozen) in [(0, 1), (1, 0)] {
                let mut example = example.each_ref().map(Tensor::shallow_clone);
                example[frozen] = example[frozen].detach();
                let [x, w, targets, weights] = &example;
                let made = linear_cross_entropy(x, w, targets, weights).unwrap();
                let found = Tensor::run_backward(&[made.sum * 0.25], &[&example[trained]], false, false);
                assert!(is_close(&found[0], &expected[trained], 1e-5), "{rows} rows, {trained} trained");
            }
        }
    }

    /// One target in all rows, whose row of the head sums up as many terms: in 16 bits that would stop growing.
    #[test]
    fn sixteen_bits_are_summed_in_thirty_two() {
        let rows = 64 * 40;
        let half = |x: &Tensor| x.to_kind(Kind::BFloat16);
        let [x, w, _, _] = example(rows, 1 << 18).map(|x| x.detach());
        let (x, w) = (half(&(x.abs() + 0.5)), half(&(w * 0.01)));
        let (targets, weights) =
            (Tensor::zeros([rows], (Kind::Int64, Device::Cpu)), Tensor::ones([rows], FLOAT));
        let trained = w.shallow_clone().set_requires_grad(true);
        let made = linear_cross_entropy(&x, &trained, &targets, &weights).unwrap();
        let found = Tensor::run_backward(&[made.sum], &[&trained], false, false).remove(0);
        assert_eq!(found.kind(), Kind::BFloat16);
        // Nearly all of a row's probability is elsewhere: the target's gradient is minus the sum of the rows.
        let expected = -x.to_kind(Kind::Float).sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        assert!(is_close(&found.get(0).to_kind(Kind::Float), &expected, 3e-3));
    }

    #[test]
    fn nothing_is_held_without_gradients_and_a_graph_serves_once() {
        let example = example(5, 11);
        let [x, w, targets, weights] = &example;
        let without = tch::no_grad(|| linear_cross_entropy(x, w, targets, weights)).unwrap();
        assert!(!without.sum.requires_grad());
        let made = linear_cross_entropy(x, w, targets, weights).unwrap();
        assert!(without.sum.allclose(&made.sum, 0.0, 0.0, false));
        let backward = |keep| Tensor::f_run_backward(&[&made.sum], &[x], keep, false);
        backward(true).unwrap();
        assert!(backward(true).unwrap_err().to_string().contains("goes backward once"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let example = example(5, 11);
        let refused = |change: &dyn Fn(&mut [Tensor; 4])| {
            let mut example = example.each_ref().map(Tensor::shallow_clone);
            change(&mut example);
            let [x, w, targets, weights] = &example;
            linear_cross_entropy(x, w, targets, weights).unwrap_err().to_string()
        };
        assert!(refused(&|e| e[1] = Tensor::ones([11, 8], FLOAT)).contains("do not fit a head"));
        assert!(refused(&|e| e[1] = e[1].to_kind(Kind::BFloat16)).contains("the head is"));
        assert!(refused(&|e| e[2] = e[2].to_kind(Kind::Int)).contains("needs [5] Int64"));
        assert!(refused(&|e| e[3] = Tensor::ones([4], FLOAT)).contains("needs [5] Float"));
        assert!(refused(&|e| e[2] = &e[2] + 11).contains("out of bounds"));
    }
}
