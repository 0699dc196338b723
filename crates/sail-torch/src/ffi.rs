//! The C entry points of `csrc/shim.cpp`. Private: `lib.rs` wraps each in a checked, safe function.

use std::ffi::c_char;

use torch_sys::C_tensor;

unsafe extern "C" {
    pub(crate) fn sail_free(message: *mut c_char);

    pub(crate) fn sail_fused_adamw(
        params: *const *mut C_tensor,
        grads: *const *mut C_tensor,
        exp_avgs: *const *mut C_tensor,
        exp_avg_sqs: *const *mut C_tensor,
        steps: *const *mut C_tensor,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> *mut c_char;

    pub(crate) fn sail_global_norm(
        tensors: *const *mut C_tensor,
        n: usize,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;

    pub(crate) fn sail_varlen_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        cu_seqlens: *const C_tensor,
        longest: i64,
        causal: bool,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;

    pub(crate) fn sail_foreach_mul(
        tensors: *const *mut C_tensor,
        n: usize,
        factor: *mut C_tensor,
    ) -> *mut c_char;
}
