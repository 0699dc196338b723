//! The C entry points of `csrc/`. Private: the other files wrap each in a checked, safe function.

use std::ffi::{c_char, c_int, c_void};

use torch_sys::C_tensor;

/// `sail_error` of `csrc/common.h`.
#[repr(C)]
pub(crate) struct RawError {
    pub(crate) kind: i32,
    pub(crate) message: *mut c_char,
}

/// `kSailTimeout`.
pub(crate) const TIMEOUT: i32 = 1;
/// `kSailNetwork`.
pub(crate) const NETWORK: i32 = 2;

/// `sail_store`.
#[repr(C)]
pub(crate) struct RawStore([u8; 0]);
/// `sail_group`.
#[repr(C)]
pub(crate) struct RawGroup([u8; 0]);
/// `sail_cpu_memory`.
#[repr(C)]
pub(crate) struct RawCpuMemory([u8; 0]);
/// `c10::Event`.
#[repr(C)]
pub(crate) struct RawEvent([u8; 0]);
/// `at::RecordFunction`.
#[repr(C)]
pub(crate) struct RawSpan([u8; 0]);
/// `sail_work`.
#[repr(C)]
pub(crate) struct RawWork([u8; 0]);

/// `sail_grad_sink` of `csrc/sink.h`.
#[repr(C)]
pub(crate) struct RawGradSink {
    pub(crate) data: *mut c_void,
    pub(crate) place:
        extern "C" fn(data: *mut c_void, place: *mut *mut C_tensor, holds: *mut bool) -> *mut RawError,
    pub(crate) placed: extern "C" fn(data: *mut c_void) -> *mut RawError,
    pub(crate) accumulated: extern "C" fn(data: *mut c_void, param: *mut C_tensor) -> *mut RawError,
    pub(crate) drop: extern "C" fn(data: *mut c_void),
}
pub(crate) type HookCall = extern "C" fn(data: *mut c_void, tensor: *mut C_tensor) -> *mut RawError;
pub(crate) type HookDrop = extern "C" fn(data: *mut c_void);

pub(crate) type ComputationCall = extern "C" fn(
    data: *mut c_void,
    inputs: *const *mut C_tensor,
    n: usize,
    sink: *mut c_void,
) -> *mut RawError;
pub(crate) type ComputationDrop = extern "C" fn(data: *mut c_void);
pub(crate) type Give = extern "C" fn(out: *mut c_void, tensor: *mut C_tensor);

unsafe extern "C" {
    /// Of libtorch's own C interface (`torch/csrc/inductor/aoti_torch/c/shim.h`).
    pub(crate) safe fn aoti_torch_abi_version() -> u64;

    pub(crate) fn sail_error_free(error: *mut RawError);
    pub(crate) fn sail_error_new(message: *const c_char) -> *mut RawError;

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
    ) -> *mut RawError;

    pub(crate) fn sail_squared_norms(
        tensors: *const *mut C_tensor,
        n: usize,
        out: *mut *mut C_tensor,
    ) -> *mut RawError;

    pub(crate) fn sail_foreach_mul(
        tensors: *const *mut C_tensor,
        n: usize,
        factor: *mut C_tensor,
    ) -> *mut RawError;

    pub(crate) fn sail_varlen_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        cu_seqlens: *const C_tensor,
        longest: i64,
        causal: bool,
        out: *mut *mut C_tensor,
    ) -> *mut RawError;

    pub(crate) fn sail_linear_cross_entropy(
        x: *const C_tensor,
        weight: *const C_tensor,
        targets: *const C_tensor,
        weights: *const C_tensor,
        chunk: i64,
        sum: *mut *mut C_tensor,
        losses: *mut *mut C_tensor,
    ) -> *mut RawError;

    pub(crate) fn sail_rms_norm(
        x: *const C_tensor,
        weight: *const C_tensor,
        eps: f64,
        out: *mut *mut C_tensor,
    ) -> *mut RawError;
    pub(crate) fn sail_swiglu(
        gate: *const C_tensor,
        up: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut RawError;
    pub(crate) fn sail_rotate(
        x: *const C_tensor,
        cos: *const C_tensor,
        sin: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut RawError;
    pub(crate) fn sail_linears(
        tensors: *const *mut C_tensor,
        n: usize,
        count: usize,
        grad_rows: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut RawError;

    pub(crate) fn sail_recompute(
        inputs: *const *mut C_tensor,
        n: usize,
        trains: bool,
        call: ComputationCall,
        drop: ComputationDrop,
        data: *mut c_void,
        give: Give,
        out: *mut c_void,
    ) -> *mut RawError;
    pub(crate) fn sail_push(sink: *mut c_void, tensor: *const C_tensor);

    pub(crate) fn sail_set_grad_sink(param: *const C_tensor, sink: *const RawGradSink) -> *mut RawError;
    pub(crate) fn sail_on_gradient(
        tensor: *const C_tensor,
        call: HookCall,
        drop: HookDrop,
        data: *mut c_void,
    ) -> *mut RawError;
    pub(crate) fn sail_take_grad(param: *mut C_tensor, out: *mut *mut C_tensor) -> *mut RawError;

    pub(crate) fn sail_cpu_memory_begin(out: *mut *mut RawCpuMemory) -> *mut RawError;
    pub(crate) fn sail_cpu_memory_end(watching: *mut RawCpuMemory, current: *mut i64, peak: *mut i64);
    pub(crate) fn sail_stacks_begin(out: *mut c_int) -> *mut RawError;
    pub(crate) fn sail_stack_of(
        signal: c_int,
        tid: c_int,
        patience_ms: i64,
        addresses: *mut *mut c_void,
        room: usize,
        count: *mut usize,
    ) -> *mut RawError;
    pub(crate) fn sail_demangled(name: *const c_char) -> *mut c_char;
    pub(crate) fn sail_text_free(text: *mut c_char);
    pub(crate) fn sail_file_of(address: *const c_void) -> *const c_char;

    pub(crate) fn sail_set_device(device: c_int) -> *mut RawError;
    pub(crate) fn sail_set_tf32(allowed: bool) -> *mut RawError;
    pub(crate) fn sail_has_context(device: c_int, there: *mut bool) -> *mut RawError;
    pub(crate) fn sail_memory_peak(device: c_int, allocated: *mut i64, reserved: *mut i64) -> *mut RawError;

    pub(crate) fn sail_device_name(device: c_int, name: *mut c_char, room: usize) -> *mut RawError;
    pub(crate) fn sail_upload(device: c_int, host: *const C_tensor, out: *mut *mut C_tensor)
    -> *mut RawError;
    pub(crate) fn sail_event_record(device: c_int, out: *mut *mut RawEvent) -> *mut RawError;
    pub(crate) fn sail_event_elapsed(
        from: *const RawEvent,
        to: *const RawEvent,
        millis: *mut f64,
    ) -> *mut RawError;
    pub(crate) fn sail_event_free(event: *mut RawEvent);

    pub(crate) fn sail_profiler_begin(cuda: bool) -> *mut RawError;
    pub(crate) fn sail_profiler_end(path: *const c_char) -> *mut RawError;
    pub(crate) fn sail_span_begin(name: *const c_char, length: usize) -> *mut RawSpan;
    pub(crate) fn sail_span_end(span: *mut RawSpan);

    pub(crate) fn sail_bytes_free(data: *mut u8);
    pub(crate) fn sail_store_new(
        host: *const c_char,
        port: u16,
        serve: bool,
        prefix: *const c_char,
        timeout_ms: i64,
        out: *mut *mut RawStore,
        found_port: *mut u16,
    ) -> *mut RawError;
    pub(crate) fn sail_store_free(store: *mut RawStore);
    pub(crate) fn sail_store_set(
        store: *mut RawStore,
        key: *const c_char,
        data: *const u8,
        len: usize,
    ) -> *mut RawError;
    pub(crate) fn sail_store_get(
        store: *mut RawStore,
        key: *const c_char,
        data: *mut *mut u8,
        len: *mut usize,
    ) -> *mut RawError;
    pub(crate) fn sail_store_check(
        store: *mut RawStore,
        key: *const c_char,
        there: *mut bool,
    ) -> *mut RawError;
    pub(crate) fn sail_store_add(
        store: *mut RawStore,
        key: *const c_char,
        amount: i64,
        sum: *mut i64,
    ) -> *mut RawError;
    pub(crate) fn sail_store_wait(store: *mut RawStore, key: *const c_char, timeout_ms: i64)
    -> *mut RawError;

    pub(crate) fn sail_gloo_new(
        store: *mut RawStore,
        name: *const c_char,
        rank: c_int,
        size: c_int,
        timeout_ms: i64,
        address: *const c_char,
        out: *mut *mut RawGroup,
    ) -> *mut RawError;
    pub(crate) fn sail_nccl_new(
        store: *mut RawStore,
        name: *const c_char,
        rank: c_int,
        size: c_int,
        timeout_ms: i64,
        device: c_int,
        out: *mut *mut RawGroup,
    ) -> *mut RawError;
    pub(crate) fn sail_group_free(group: *mut RawGroup);
    pub(crate) fn sail_group_shut_down(group: *mut RawGroup) -> *mut RawError;
    pub(crate) fn sail_group_set_timeout(group: *mut RawGroup, timeout_ms: i64) -> *mut RawError;
    pub(crate) fn sail_all_reduce(
        group: *mut RawGroup,
        tensor: *const C_tensor,
        op: u8,
        out: *mut *mut RawWork,
    ) -> *mut RawError;
    pub(crate) fn sail_broadcast(
        group: *mut RawGroup,
        tensor: *const C_tensor,
        root: i64,
        out: *mut *mut RawWork,
    ) -> *mut RawError;
    pub(crate) fn sail_reduce_scatter(
        group: *mut RawGroup,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut RawWork,
    ) -> *mut RawError;
    pub(crate) fn sail_all_to_all(
        group: *mut RawGroup,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut RawWork,
    ) -> *mut RawError;
    pub(crate) fn sail_all_gather(
        group: *mut RawGroup,
        output: *const C_tensor,
        input: *const C_tensor,
        out: *mut *mut RawWork,
    ) -> *mut RawError;
    pub(crate) fn sail_barrier(group: *mut RawGroup, out: *mut *mut RawWork) -> *mut RawError;
    pub(crate) fn sail_work_wait(work: *mut RawWork) -> *mut RawError;
    pub(crate) fn sail_work_free(work: *mut RawWork);
}
