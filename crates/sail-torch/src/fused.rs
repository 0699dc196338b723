//! What the blocks of a transformer repeat, in one operation each: on the CPU in fp32 with one pass over memory.

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::call::{check, outcome, pointers};
use crate::error::Result;
use crate::ffi::{self, RawError};

/// `w * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang and Sennrich 2019, eq. 4), differentiable once in both.
///
/// `x` `[.., d]` and `weight_d` `[d]` of a float type; the result has the shape and type of `x`. Mean and division are
/// fp32. `x` is kept for the backward pass, with one fp32 for each row; in 16 bits on the CPU what libtorch's operators
/// keep.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes or devices do not fit; those of libtorch.
pub fn rms_norm(x: &Tensor, weight_d: &Tensor, eps: f64) -> Result<Tensor> {
    const OP: &str = "rms_norm";
    let (size, width) = (x.size(), weight_d.size());
    check(OP, width.len() == 1 && width[0] > 0 && size.last() == width.first(), || {
        format!("a weight of {width:?} does not fit rows of {size:?}")
    })?;
    check(OP, x.device() == weight_d.device(), || format!("rows are {x:?}, the weight is {weight_d:?}"))?;
    // SAFETY: two live tensors, the second as wide as the first one's rows, and a valid place for one pointer.
    one(OP, |out| unsafe { ffi::sail_rms_norm(x.as_ptr(), weight_d.as_ptr(), eps, out) })
}

/// `silu(gate) * up` (Shazeer 2020, eq. 6), differentiable once in both.
///
/// `gate` and `up` `[.., d]` of one shape, float type and device, as is the result. These two alone are kept for the
/// backward pass.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when they differ, or are scalars; those of libtorch.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    const OP: &str = "swiglu";
    check(OP, is_alike(gate, up) && gate.size() == up.size() && gate.dim() > 0, || {
        format!("the gate is {gate:?}, what it opens {up:?}")
    })?;
    // SAFETY: two live tensors of one shape and type, and a valid place for one pointer.
    one(OP, |out| unsafe { ffi::sail_swiglu(gate.as_ptr(), up.as_ptr(), out) })
}

/// Turns coordinate i of every head together with coordinate i + h/2 by the angle of its row (Su et al. 2021, section
/// 3.4, in Hugging Face's layout), differentiable once in `x_tnh`.
///
/// `x_tnh` `[t, n, h]` with even h; `cos_t1f` and `sin_t1f` `[t, 1, h / 2]`; all of one float type. Nothing of `x_tnh` is
/// kept for the backward pass.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes, types or devices do not fit; those of libtorch.
pub fn rotate(x_tnh: &Tensor, cos_t1f: &Tensor, sin_t1f: &Tensor) -> Result<Tensor> {
    const OP: &str = "rotate";
    let size = x_tnh.size();
    for angles in [cos_t1f, sin_t1f] {
        let fits = size.len() == 3 && size[2] % 2 == 0 && angles.size() == [size[0], 1, size[2] / 2];
        check(OP, fits && is_alike(x_tnh, angles), || format!("heads are {x_tnh:?}, angles {angles:?}"))?;
    }
    // SAFETY: three live tensors of fitting shapes and one type, and a valid place for one pointer.
    one(OP, |out| unsafe { ffi::sail_rotate(x_tnh.as_ptr(), cos_t1f.as_ptr(), sin_t1f.as_ptr(), out) })
}

/// Several linear maps `x W^T + b` of the same rows, differentiable once in everything: the gradients of `x` are added up
/// by the matrix products themselves.
///
/// `x` `[.., inputs]`; each of `maps` a weight `[outputs, inputs]` and a bias `[outputs]`, all of them with or all
/// without; of one float type. Gives `[.., outputs]` for each. `x` is kept for the backward pass where a weight
/// requires a gradient.
///
/// With `grad_rows_r` `[r]` int64, places in the first dimension of `x` without repetition, only these rows of `x` get
/// their gradient, and the others zero: for rows whose gradient leads to nothing that is trained. Gradients of weights
/// are whole.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes, types or devices do not fit; those of libtorch, in the
/// backward pass for rows that are not there.
pub fn linears<const N: usize>(
    x: &Tensor,
    maps: [(&Tensor, Option<&Tensor>); N],
    grad_rows_r: Option<&Tensor>,
) -> Result<[Tensor; N]> {
    const OP: &str = "linears";
    let size = x.size();
    if let Some(rows) = grad_rows_r {
        let fits = size.len() == 2 && rows.dim() == 1 && rows.kind() == Kind::Int64;
        check(OP, fits && rows.device() == x.device(), || format!("rows {rows:?} of {x:?}"))?;
    }
    for (weight, bias) in maps {
        let shape = weight.size();
        check(OP, shape.len() == 2 && shape.last() == size.last() && is_alike(x, weight), || {
            format!("a weight {weight:?} does not fit rows {x:?}")
        })?;
        check(OP, bias.is_none_or(|bias| bias.size() == shape[..1] && is_alike(x, bias)), || {
            format!("a bias {bias:?} does not fit a weight {weight:?}")
        })?;
    }
    let biases: Vec<&Tensor> = maps.iter().filter_map(|(_, bias)| *bias).collect();
    check(OP, biases.is_empty() || biases.len() == N, || {
        format!("{} of {N} maps have a bias", biases.len())
    })?;
    let weights = maps.iter().map(|(weight, _)| *weight);
    let tensors = pointers([x].into_iter().chain(weights).chain(biases));
    let grad_rows = grad_rows_r.map_or(std::ptr::null(), Tensor::as_ptr);
    let mut out = [std::ptr::null_mut(); N];
    // SAFETY: live tensors of fitting shapes and one type, as many as `tensors` has, and places for `N` pointers.
    let error = unsafe { ffi::sail_linears(tensors.as_ptr(), tensors.len(), N, grad_rows, out.as_mut_ptr()) };
    outcome(OP, error)?;
    // SAFETY: without an error each is a new tensor that nobody else owns.
    Ok(out.map(|out| unsafe { Tensor::from_ptr(out) }))
}

fn is_alike(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == b.kind() && a.device() == b.device()
}

/// The tensor that `call` puts into its place.
fn one(op: &'static str, call: impl FnOnce(*mut *mut C_tensor) -> *mut RawError) -> Result<Tensor> {
    let mut out: *mut C_tensor = std::ptr::null_mut();
    outcome(op, call(&raw mut out))?;
    check(op, !out.is_null(), || "there is no result".to_owned())?;
    // SAFETY: without an error `out` is a new tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::Error;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    /// Rows and widths of one thread and of several, with and without a rest.
    const SIZES: [(i64, i64); 5] = [(0, 8), (1, 3), (7, 50), (300, 128), (500, 576)];

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, FLOAT).set_requires_grad(true)
    }

    /// The largest difference, as a part of the largest of `b`.
    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!((a.size(), a.kind()), (b.size(), b.kind()));
        let largest = |x: &Tensor| if x.numel() == 0 { 0.0 } else { x.abs().max().double_value(&[]) };
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        largest(&(&a - &b)) / largest(&b).max(1e-30)
    }

    /// Results and gradients of two ways to compute the same.
    fn assert_same(
        inputs: &[&Tensor],
        tolerance: f64,
        made: impl Fn() -> Vec<Tensor>,
        expected: impl Fn() -> Vec<Tensor>,
    ) {
        tch::manual_seed(11);
        let (made, expected) = (made(), expected());
        let mut sums = [Tensor::zeros([], FLOAT), Tensor::zeros([], FLOAT)];
        for (made, expected) in made.iter().zip(&expected) {
            let off = distance(made, expected);
            assert!(off <= tolerance, "results differ by {off:.1e}");
            let probe = Tensor::randn(made.size(), FLOAT);
            for (sum, x) in sums.iter_mut().zip([made, expected]) {
                *sum = &*sum + (x.to_kind(Kind::Float) * &probe).sum(Kind::Float);
            }
        }
        let grads = sums.map(|sum| Tensor::run_backward(&[sum], inputs, false, false));
        for (i, (made, expected)) in grads[0].iter().zip(&grads[1]).enumerate() {
            let off = distance(made, expected);
            assert!(off <= tolerance, "gradients of input {i} differ by {off:.1e}");
        }
    }

    fn plain_norm(x: &Tensor, w: &Tensor) -> Tensor {
        let exact = x.to_kind(Kind::Double);
        let mean = exact.square().mean_dim([-1i64].as_slice(), true, Kind::Double);
        (exact / (mean + 1e-5).sqrt() * w.to_kind(Kind::Double)).to_kind(x.kind())
    }

    #[test]
    fn rms_norm_is_its_formula() {
        for (rows, d) in SIZES {
            let (x, w) = (random(&[rows, d]), random(&[d]));
            let made = || vec![rms_norm(&x, &w, 1e-5).unwrap()];
            assert_same(&[&x, &w], 2e-6, made, || vec![plain_norm(&x, &w)]);
        }
        // Heads, of rows that do not follow each other in memory.
        let (x, w) = (random(&[4, 9, 16]), random(&[16]));
        let turned = || x.transpose(0, 1);
        let made = || vec![rms_norm(&turned(), &w, 1e-5).unwrap()];
        assert_same(&[&x, &w], 2e-6, made, || vec![plain_norm(&turned(), &w)]);
    }

    #[test]
    fn what_is_frozen_gets_no_gradient() {
        let (x, w) = (random(&[40, 32]), random(&[32]));
        for (x, w) in [(x.detach(), w.shallow_clone()), (x.shallow_clone(), w.detach())] {
            let trained = if x.requires_grad() { &x } else { &w };
            let made = || vec![rms_norm(&x, &w, 1e-5).unwrap()];
            assert_same(&[trained], 2e-6, made, || vec![plain_norm(&x, &w)]);
        }
        let weights = [random(&[8, 32]), random(&[4, 32])];
        let pair = |x: &Tensor| linears(x, [(&weights[0], None), (&weights[1], None)], None).unwrap().into();
        let plain = |x: &Tensor| weights.each_ref().map(|w| x.linear(w, None::<&Tensor>)).into();
        let rows = x.detach();
        assert_same(&[&weights[0], &weights[1]], 1e-6, || pair(&rows), || plain(&rows));
        let weights = weights.each_ref().map(Tensor::detach);
        let pair = || linears(&x, [(&weights[0], None), (&weights[1], None)], None).unwrap().into();
        assert_same(&[&x], 1e-6, pair, || weights.each_ref().map(|w| x.linear(w, None::<&Tensor>)).into());
    }

    /// The sum over rows of a weight's gradient must not depend on how many threads there are.
    #[test]
    fn the_number_of_threads_changes_no_gradient() {
        let (x, w) = (random(&[3000, 64]), random(&[64]));
        let probe = Tensor::randn([3000, 64], FLOAT);
        let threads = tch::get_num_threads();
        let [one, two] = [1, 2].map(|threads| {
            tch::set_num_threads(threads);
            let y = rms_norm(&x, &w, 1e-5).unwrap();
            Tensor::run_backward(&[(y * &probe).sum(Kind::Float)], &[&x, &w], false, false)
        });
        tch::set_num_threads(threads);
        assert_eq!(one, two);
    }

    #[test]
    fn swiglu_is_its_formula() {
        let plain = |gate: &Tensor, up: &Tensor| vec![gate.silu() * up];
        for (rows, d) in SIZES {
            let (gate, up) = (random(&[rows, d]), random(&[rows, d]));
            let made = || vec![swiglu(&gate, &up).unwrap()];
            assert_same(&[&gate, &up], 2e-6, made, || plain(&gate, &up));
        }
        // Halves of one matrix.
        let both = random(&[33, 100]);
        let halves = || both.chunk(2, -1);
        let made = || vec![swiglu(&halves()[0], &halves()[1]).unwrap()];
        assert_same(&[&both], 2e-6, made, || plain(&halves()[0], &halves()[1]));
    }

    /// Where the exponential would run over, and where nothing is a number.
    #[test]
    fn gates_of_any_size() {
        let gate = Tensor::from_slice(&[
            -1e30f32, -200.0, -88.5, -87.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 87.0, 88.5, 1e30,
        ])
        .set_requires_grad(true);
        let up = Tensor::ones([12], FLOAT);
        let (made, plain) = (swiglu(&gate, &up).unwrap(), gate.silu());
        let assert_close = |a: &Tensor, b: &Tensor| {
            let values = |x: &Tensor| Vec::<f32>::try_from(x).unwrap();
            assert!(a.allclose(b, 1e-6, 1e-30, false), "{:?} {:?}", values(a), values(b));
        };
        assert_close(&made.detach(), &plain.detach());
        let grad = |y: &Tensor| Tensor::run_backward(&[y.sum(Kind::Float)], &[&gate], false, false).remove(0);
        assert_close(&grad(&made), &grad(&plain));
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let gate = Tensor::from_slice(&[broken, 1.0]);
            let made = swiglu(&gate, &Tensor::ones([2], FLOAT)).unwrap();
            let plain = gate.silu();
            assert!(made.allclose(&plain, 1e-6, 0.0, true), "{broken}: {}", made.double_value(&[0]));
        }
    }

    #[test]
    fn rotate_is_its_formula_and_turns_back() {
        let plain = |x: &Tensor, cos: &Tensor, sin: &Tensor| {
            let halves = x.chunk(2, -1);
            let (low, high) = (&halves[0], &halves[1]);
            Tensor::cat(&[low * cos - high * sin, high * cos + low * sin], -1)
        };
        for (t, n, h) in [(0, 2, 4), (1, 1, 2), (9, 3, 20), (400, 9, 64)] {
            let angles = Tensor::randn([t, 1, h / 2], FLOAT);
            let (cos, sin) = (angles.cos(), angles.sin());
            let x = random(&[t, n, h]);
            let made = || vec![rotate(&x, &cos, &sin).unwrap()];
            assert_same(&[&x], 1e-6, made, || vec![plain(&x, &cos, &sin)]);
            // A part of wider rows.
            let wide = random(&[t, n + 2, h]);
            let part = || wide.narrow(1, 1, n);
            let made = || vec![rotate(&part(), &cos, &sin).unwrap()];
            assert_same(&[&wide], 1e-6, made, || vec![plain(&part(), &cos, &sin)]);
        }
    }

    #[test]
    fn linears_are_those_of_each() {
        for shape in [&[0, 24][..], &[5, 24], &[3, 40, 24]] {
            for has_biases in [false, true] {
                let x = random(shape);
                let weights = [random(&[24, 24]), random(&[8, 24]), random(&[7, 24])];
                let biases = [24, 8, 7].map(|outputs| random(&[outputs]));
                let bias = |i: usize| has_biases.then_some(&biases[i]);
                let made = || linears(&x, [0, 1, 2].map(|i| (&weights[i], bias(i))), None).unwrap().into();
                let plain = || [0, 1, 2].map(|i| x.linear(&weights[i], bias(i))).into();
                let mut inputs = vec![&x];
                inputs.extend(&weights);
                if has_biases {
                    inputs.extend(&biases);
                }
                assert_same(&inputs, 2e-6, made, plain);
            }
        }
    }

    /// Rows whose gradient is needed have it whole, of all maps.
    #[test]
    fn only_some_rows_have_a_gradient() {
        let (x, a, b) = (random(&[9, 6]), random(&[4, 6]), random(&[3, 6]));
        let rows = Tensor::from_slice(&[1i64, 2, 7]);
        let probes = [Tensor::randn([9, 4], FLOAT), Tensor::randn([9, 3], FLOAT)];
        let grads = |grad_rows| {
            let ys = linears(&x, [(&a, None), (&b, None)], grad_rows).unwrap();
            let parts = [0, 1].map(|i| (&ys[i] * &probes[i]).sum(Kind::Float));
            Tensor::run_backward(&parts, &[&x, &a, &b], false, false)
        };
        let (found, whole) = (grads(Some(&rows)), grads(None));
        let expected = whole[0].zeros_like().index_copy(0, &rows, &whole[0].index_select(0, &rows));
        assert!(distance(&found[0], &expected) < 1e-6);
        assert!(distance(&found[1], &whole[1]) < 1e-6 && distance(&found[2], &whole[2]) < 1e-6);
    }

    /// The step of a generation, in shapes that vectors and pieces divide and that they do not.
    #[test]
    fn one_row_without_a_graph_is_as_one_of_many() {
        for (width, outputs) in [(576, [576, 192, 3]), (37, [1, 6, 7]), (1, [5, 4, 2]), (64, [4000, 1, 9])] {
            let x = random(&[1, width]);
            let maps = outputs.map(|outputs| (random(&[outputs, width]), random(&[outputs])));
            let two = Tensor::cat(&[&x, &x], 0);
            for has_bias in [true, false] {
                let all = maps.each_ref().map(|(weight, bias)| (weight, has_bias.then_some(bias)));
                let made = |x: &Tensor| tch::no_grad(|| linears(x, all, None).unwrap());
                let found = made(&x);
                for shape in [vec![width], vec![1, 1, width]] {
                    let [y, ..] = made(&x.view(&shape[..]));
                    assert!(y.dim() == shape.len() && y.flatten(0, -1).equal(&found[0].flatten(0, -1)));
                }
                for (found, expected) in found.iter().zip(linears(&two, all, None).unwrap()) {
                    assert!(!found.requires_grad() && found.size() == [1, expected.size()[1]]);
                    // An output alone may come to nearly nothing: what is added up there does not.
                    let size = (width as f64).sqrt() + 1.0;
                    let expected = expected.narrow(0, 0, 1);
                    assert!((found - expected).abs().max().double_value(&[]) < 1e-6 * size);
                }
            }
        }
    }

    /// One that nothing comes of has no part in the gradients.
    #[test]
    fn a_map_that_is_not_used_adds_nothing() {
        let (x, a, b) = (random(&[5, 6]), random(&[4, 6]), random(&[3, 6]));
        let [used, _] = linears(&x, [(&a, None), (&b, None)], None).unwrap();
        let probe = Tensor::randn([5, 4], FLOAT);
        let found = Tensor::run_backward(&[(used * &probe).sum(Kind::Float)], &[&x, &a], false, false);
        let plain = (x.linear(&a, None::<&Tensor>) * probe).sum(Kind::Float);
        let expected = Tensor::run_backward(&[plain], &[&x, &a], false, false);
        for (found, expected) in found.iter().zip(&expected) {
            assert!(distance(found, expected) < 1e-6);
        }
    }

    #[test]
    fn sixteen_bits_are_computed_in_their_type() {
        let bf16 = (Kind::BFloat16, Device::Cpu);
        let half = |shape: &[i64]| Tensor::randn(shape, bf16).set_requires_grad(true);
        let (x, w, up) = (half(&[30, 64]), half(&[64]), half(&[30, 64]));
        assert_same(&[&x, &w], 2e-2, || vec![rms_norm(&x, &w, 1e-5).unwrap()], || vec![plain_norm(&x, &w)]);
        assert_same(&[&x, &up], 2e-2, || vec![swiglu(&x, &up).unwrap()], || vec![x.silu() * &up]);
        let (a, b) = (half(&[16, 64]), half(&[8, 64]));
        let together = || linears(&x, [(&a, None), (&b, None)], None).unwrap().into();
        let plain = || vec![x.linear(&a, None::<&Tensor>), x.linear(&b, None::<&Tensor>)];
        assert_same(&[&x, &a, &b], 2e-2, together, plain);
        let (heads, angles) = (half(&[30, 2, 32]), Tensor::randn([30, 1, 16], FLOAT));
        let (cos, sin) = (angles.cos().to_kind(bf16.0), angles.sin().to_kind(bf16.0));
        let wide = |x: &Tensor| x.to_kind(Kind::Float);
        let exact = || vec![rotate(&wide(&heads), &wide(&cos), &wide(&sin)).unwrap().to_kind(bf16.0)];
        assert_same(&[&heads], 2e-2, || vec![rotate(&heads, &cos, &sin).unwrap()], exact);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = Tensor::randn([3, 2, 8], FLOAT);
        let [narrow, wide] = [4, 8].map(|d| Tensor::randn([3, 1, d], FLOAT));
        let matrix = |outputs, inputs| Tensor::randn([outputs, inputs], FLOAT);
        let half = x.to_kind(Kind::BFloat16);
        let (good, bad) = (matrix(2, 8), matrix(2, 7));
        for error in [
            rms_norm(&x, &matrix(1, 8), 1e-5).unwrap_err(),
            rms_norm(&x, &Tensor::ones([7], FLOAT), 1e-5).unwrap_err(),
            swiglu(&x, &half).unwrap_err(),
            swiglu(&x, &narrow).unwrap_err(),
            rotate(&x, &wide, &wide).unwrap_err(),
            rotate(&half, &narrow, &narrow).unwrap_err(),
            rotate(&x.narrow(2, 0, 7), &narrow, &narrow).unwrap_err(),
            linears(&x, [(&good, None), (&bad, None)], None).unwrap_err(),
            linears(&half, [(&good, None)], None).unwrap_err(),
            linears(&x, [(&good, None)], Some(&Tensor::from_slice(&[0i64]))).unwrap_err(),
            linears(&x.flatten(0, 1), [(&good, None)], Some(&Tensor::from_slice(&[0f32]))).unwrap_err(),
            linears(&x, [(&good, Some(&Tensor::ones([2], FLOAT))), (&good, None)], None).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Argument { .. }), "{error}");
        }
    }

    /// Loops compiled for a processor by its name were not taken on those that came after it.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn loops_are_those_for_the_vectors_of_this_processor() {
        // (1 + e)^2 - 1, of which a product that is rounded by itself loses e^2.
        let e = 2f32.powi(-12);
        let (x, weight) = (Tensor::from_slice(&[1.0, 1.0 + e]), Tensor::from_slice(&[-1.0, 1.0 + e]));
        let [found] =
            tch::no_grad(|| linears(&x.view([1, 2]), [(&weight.view([1, 2]), None)], None)).unwrap();
        let lost = if is_x86_feature_detected!("fma") { 0.0 } else { e * e };
        let found = f32::try_from(found.view([])).unwrap();
        let expected = 2.0 * e + e * e - lost;
        // Other compilers than GCC are given no such versions.
        assert_eq!(found.to_bits(), expected.to_bits(), "{found} for {expected}");
    }
}
