//! What libtorch has and `tch` does not expose, as safe functions.
//!
//! The only crate of the workspace with `unsafe`: every function checks what its C++ counterpart
//! takes for granted, then makes one call. C++ exceptions come back as [`Error`].
//!
//! | | |
//! |---|---|
//! | [`fused_adamw`], [`squared_norms`], [`foreach_mul`] | the update of many parameters in one call |
//! | [`varlen_attention`] | attention over segments, on CUDA |
//! | [`rms_norm`], [`swiglu`], [`rotate`], [`linears`] | what the blocks of a transformer repeat, in one operation each |
//! | [`linear_cross_entropy`] | a head and its loss, the logits of a few rows at a time |
//! | [`recompute`] | a part of the forward pass that is computed again instead of being kept |
//! | [`set_grad_sink`], [`on_gradient`], [`take_grad`] | gradients as they arrive in a backward pass |
//! | [`cpu_memory::measure`] | what libtorch takes on the CPU while something runs |
//! | [`set_device`], [`set_tf32`], [`device_name`], [`has_context`], [`memory_peak`] | the device of a process, and its memory |
//! | [`upload`] | host data to a device, without waiting for it |
//! | [`Moment`] | when a device comes to what was queued |
//! | [`Profiler`], [`span`] | a trace of operations, and names of parts of it |
//! | [`thread_stacks`] | what every thread of this process is in |
//! | [`version`] | of the libtorch that was found when the process started |
//! | [`Store`], [`ProcessGroup`] | rendezvous and collectives (c10d with Gloo or NCCL) |

mod attention;
mod autograd;
mod call;
pub mod cpu_memory;
mod device;
mod error;
mod ffi;
mod fused;
mod group;
mod loss;
mod moment;
mod optim;
mod profiler;
mod recompute;
mod stacks;
mod store;
mod version;

pub use attention::{has_varlen_attention, varlen_attention};
pub use autograd::{GradSink, SinkResult, on_gradient, set_grad_sink, take_grad};
pub use device::{MemoryPeak, device_name, has_context, memory_peak, set_device, set_tf32, upload};
pub use error::{Error, Result};
pub use fused::{linears, rms_norm, rotate, swiglu};
pub use group::{Backend, GroupOptions, ProcessGroup, ReduceOp, Work};
pub use loss::{CrossEntropy, cross_entropy_chunk, linear_cross_entropy};
pub use moment::Moment;
pub use optim::{AdamWOptions, AdamWSlot, foreach_mul, fused_adamw, squared_norms};
pub use profiler::{Profiler, Span, span};
pub use recompute::recompute;
pub use stacks::{ThreadStack, thread_stacks};
pub use store::Store;
pub use version::version;
