//! What every wrapper shares: checks before a call, and the shim's answer as a result.

use std::ffi::{CStr, CString};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::{Error, Result};
use crate::ffi::{self, RawError};

/// [`Error::Argument`] unless `holds`.
pub(crate) fn check(op: &'static str, holds: bool, reason: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Argument { op, reason: reason() }) }
}

pub(crate) fn pointers<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<*mut C_tensor> {
    tensors.into_iter().map(|tensor| tensor.as_ptr().cast_mut()).collect()
}

/// Text as C takes it.
pub(crate) fn c_string(op: &'static str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Argument { op, reason: format!("`{text:?}` has a NUL in it") })
}

/// Turns the shim's answer into a result, freeing the error.
pub(crate) fn outcome(op: &'static str, error: *mut RawError) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: an error that is not null points at one that lives until it is freed below.
    let RawError { kind, message } = unsafe { error.read() };
    // SAFETY: its message is a NUL-terminated string that lives as long as it.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: the shim allocated the error for this one call and nothing uses it any more.
    unsafe { ffi::sail_error_free(error) };
    Err(match kind {
        ffi::TIMEOUT => Error::Timeout { op, message },
        ffi::NETWORK => Error::Network { op, message },
        _ => Error::Torch { op, message },
    })
}
