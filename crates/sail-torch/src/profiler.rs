//! What a thread does in libtorch, operation by operation, as a trace that `chrome://tracing` and Perfetto show; and
//! spans that give parts of it a name.

use std::ffi::CString;
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use tch::Device;

use crate::call::outcome;
use crate::error::{Error, Result};
use crate::ffi::{self, RawSpan};

/// Belongs to the thread that made it.
type OneThread = PhantomData<*const ()>;

/// Records what the thread that began it does, with the backward passes that it starts, until it is saved or dropped.
#[derive(Debug)]
pub struct Profiler {
    is_over: bool,
    _thread: OneThread,
}

impl Profiler {
    /// Begins to record operations on the CPU, and kernels where `device` is a CUDA device.
    ///
    /// # Errors
    /// [`Error::Torch`] while another one records on this thread.
    pub fn begin(device: Device) -> Result<Self> {
        // SAFETY: no pointer is given.
        outcome("Profiler::begin", unsafe { ffi::sail_profiler_begin(device.is_cuda()) })?;
        Ok(Self { is_over: false, _thread: PhantomData })
    }

    /// Ends, and writes a trace in the format of Chrome to `path`, over what is there. libtorch does not say whether it
    /// could write: look at what it wrote.
    ///
    /// # Errors
    /// [`Error::Argument`] for a path with a NUL in it; those of libtorch.
    pub fn save(mut self, path: &Path) -> Result<()> {
        const OP: &str = "Profiler::save";
        let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Argument {
            op: OP,
            reason: format!("`{}` has a NUL in it", path.display()),
        })?;
        self.is_over = true;
        // SAFETY: a NUL-terminated string, and this is the thread that began, since `self` cannot leave it.
        outcome(OP, unsafe { ffi::sail_profiler_end(path.as_ptr()) })
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        if !self.is_over {
            // SAFETY: null asks for no file, and this is the thread that began, since `self` cannot leave it.
            let error = unsafe { ffi::sail_profiler_end(std::ptr::null()) };
            // What was recorded is not wanted.
            drop(outcome("Profiler::drop", error));
        }
    }
}

/// A part of what a thread does, until it is dropped; see [`span`].
#[derive(Debug)]
#[must_use = "the span ends where this is dropped"]
pub struct Span {
    raw: *mut RawSpan,
    _thread: OneThread,
}

/// Gives what this thread does from here on a name in the trace of a [`Profiler`]; costs next to nothing where none
/// records.
pub fn span(name: &str) -> Span {
    // SAFETY: a live string of this length, which is copied.
    let raw = unsafe { ffi::sail_span_begin(name.as_ptr().cast(), name.len()) };
    Span { raw, _thread: PhantomData }
}

impl Drop for Span {
    fn drop(&mut self) {
        // SAFETY: null or a span that nobody else ends, on the thread that began it, since `self` cannot leave it.
        unsafe { ffi::sail_span_end(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn a_trace_has_operations_of_both_passes_and_spans() {
        let path = std::env::temp_dir().join(format!("sail-torch-trace-{}.json", std::process::id()));
        let work = || {
            let _span = span("a part of it");
            let x = Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            x.matmul(&x).sum(Kind::Float).backward();
        };
        drop(Profiler::begin(Device::Cpu).unwrap());
        work();
        let profiler = Profiler::begin(Device::Cpu).unwrap();
        assert!(Profiler::begin(Device::Cpu).is_err(), "one at a time");
        work();
        profiler.save(&path).unwrap();
        work();
        let trace = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(trace.matches("\"a part of it\"").count(), 1, "what was recorded, and no more");
        for name in ["\"aten::mm\"", "MmBackward0"] {
            assert!(trace.contains(name), "{name} in {trace}");
        }
    }
}
