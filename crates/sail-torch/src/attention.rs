//! Attention over segments of different lengths.

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::call::{check, outcome};
use crate::error::{Error, Result};
use crate::ffi;

/// Whether [`varlen_attention`] takes queries of this type, device and head width. The kernel itself needs a
/// GPU of compute capability 8.0 (Ampere) or newer, as bf16 does to be fast.
pub fn has_varlen_attention(q_tnh: &Tensor) -> bool {
    let head_dim = q_tnh.size().last().copied().unwrap_or(0);
    q_tnh.device().is_cuda()
        && matches!(q_tnh.kind(), Kind::Half | Kind::BFloat16)
        && head_dim % 8 == 0
        && (8..=256).contains(&head_dim)
}

/// `softmax(q k^T / sqrt(h)) v` within segments (`at::_flash_attention_forward`; Dao, arXiv 2307.08691),
/// differentiable in all three.
///
/// `q_tnh` `[t, n, h]`, `k_tmh` and `v_tmh` `[t, m, h]` with m dividing n, of one 16-bit float type on one
/// CUDA device; `cu_seqlens` `[segments + 1]` int32 there, from 0 to t; `longest` is the longest segment.
///
/// # Errors
/// [`Error::Argument`] when kinds, shapes or devices do not fit.
pub fn varlen_attention(
    q_tnh: &Tensor,
    k_tmh: &Tensor,
    v_tmh: &Tensor,
    cu_seqlens: &Tensor,
    longest: i64,
    causal: bool,
) -> Result<Tensor> {
    const OP: &str = "varlen_attention";
    check(OP, has_varlen_attention(q_tnh), || {
        format!("needs 16-bit floats on CUDA and a head width that 8 divides, up to 256; got {q_tnh:?}")
    })?;
    let ([t, n, h], [_, m, _]) = (three(OP, q_tnh)?, three(OP, k_tmh)?);
    for tensor in [k_tmh, v_tmh] {
        check(OP, three(OP, tensor)? == [t, m, h] && m > 0 && n % m == 0, || {
            format!("keys and values of shape {:?} do not fit queries of {:?}", tensor.size(), q_tnh.size())
        })?;
        check(OP, tensor.kind() == q_tnh.kind() && tensor.device() == q_tnh.device(), || {
            format!("queries are {q_tnh:?}, keys or values {tensor:?}")
        })?;
    }
    let ends = cu_seqlens.size();
    check(OP, ends.len() == 1 && ends[0] > 1 && (1..=t).contains(&longest), || {
        format!("`cu_seqlens` has shape {ends:?}, the longest of {t} rows is {longest}")
    })?;
    check(OP, cu_seqlens.kind() == Kind::Int && cu_seqlens.device() == q_tnh.device(), || {
        format!("`cu_seqlens` must be int32 where the queries are, is {cu_seqlens:?}")
    })?;
    let mut out: *mut C_tensor = std::ptr::null_mut();
    // SAFETY: four live tensors of the kinds, shapes and device that the kernel asks for, as checked above,
    // and `out` is a valid place for one pointer.
    let message = unsafe {
        ffi::sail_varlen_attention(
            q_tnh.as_ptr(),
            k_tmh.as_ptr(),
            v_tmh.as_ptr(),
            cu_seqlens.as_ptr(),
            longest,
            causal,
            &raw mut out,
        )
    };
    outcome(OP, message)?;
    // SAFETY: without a message `out` is a new tensor that nobody else owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

fn three(op: &'static str, tensor: &Tensor) -> Result<[i64; 3]> {
    let size = tensor.size();
    <[i64; 3]>::try_from(&size[..])
        .map_err(|_| Error::Argument { op, reason: format!("needs three dimensions, got {size:?}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel against libtorch's own attention, segment by segment; nothing to run without CUDA.
    #[test]
    fn varlen_attention_is_that_of_each_segment() {
        let kind = (Kind::BFloat16, tch::Device::cuda_if_available());
        let [q, k, v] = [4, 2, 2].map(|heads| Tensor::randn([10, heads, 16], kind).set_requires_grad(true));
        let cu = Tensor::from_slice(&[0i32, 3, 10]).to_device(kind.1);
        if !kind.1.is_cuda() {
            let error = varlen_attention(&q, &k, &v, &cu, 7, true).unwrap_err().to_string();
            assert!(error.contains("on CUDA"), "{error}");
            return;
        }
        let out = varlen_attention(&q, &k, &v, &cu, 7, true).unwrap();
        let alone = [(0, 3), (3, 7)].map(|(start, length)| {
            let part = |x: &Tensor| x.narrow(0, start, length).transpose(0, 1).unsqueeze(0);
            let none = None::<&Tensor>;
            let (q, k, v) = (part(&q), part(&k), part(&v));
            let out = Tensor::scaled_dot_product_attention(&q, &k, &v, none, 0.0, true, None, true);
            out.squeeze_dim(0).transpose(0, 1)
        });
        let expected = Tensor::cat(&alone, 0);
        let gradients = |y: &Tensor| {
            Tensor::run_backward(
                &[y.to_kind(Kind::Float).square().sum(Kind::Float)],
                &[&q, &k, &v],
                true,
                false,
            )
        };
        let close = |a: &Tensor, b: &Tensor| {
            a.to_kind(Kind::Float).allclose(&b.to_kind(Kind::Float), 2e-2, 2e-2, false)
        };
        assert!(close(&out, &expected));
        for (found, expected) in gradients(&out).iter().zip(gradients(&expected)) {
            assert!(close(found, &expected));
        }
    }
}
