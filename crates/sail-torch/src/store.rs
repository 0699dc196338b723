//! The key-value store through which processes find each other (`c10d::TCPStore`, the one of torchrun).

use std::ffi::CString;
use std::ptr::NonNull;
use std::time::Duration;

use crate::call::{c_string, outcome};
use crate::error::Result;
use crate::ffi::{self, RawStore};

/// A connection to a store, or the store itself. Its calls may be made from several threads, one after the
/// other: a call that waits keeps the others waiting.
#[derive(Debug)]
pub struct Store {
    raw: NonNull<RawStore>,
    port: u16,
}

// SAFETY: c10d's stores may be used from any thread.
unsafe impl Send for Store {}
// SAFETY: `TCPStore` takes a mutex in each of its calls.
unsafe impl Sync for Store {}

impl Store {
    /// Serves a store on all addresses of this host and connects to it; `port` 0 is any free one.
    ///
    /// # Errors
    /// [`Error::Network`](crate::Error::Network) when the port is in use.
    pub fn serve(port: u16, timeout: Duration) -> Result<Self> {
        Self::new("localhost", port, true, "", timeout)
    }

    /// Connects to the store at `host:port`, trying for `timeout`, which is also how long [`Store::get`] waits.
    /// Keys are kept under `prefix`.
    ///
    /// # Errors
    /// [`Error::Timeout`](crate::Error::Timeout) or [`Error::Network`](crate::Error::Network) when nothing
    /// answers there.
    pub fn connect(host: &str, port: u16, prefix: &str, timeout: Duration) -> Result<Self> {
        Self::new(host, port, false, prefix, timeout)
    }

    fn new(host: &str, port: u16, serve: bool, prefix: &str, timeout: Duration) -> Result<Self> {
        const OP: &str = "TCPStore";
        let (host, prefix) = (c_string(OP, host)?, c_string(OP, prefix)?);
        let (mut raw, mut found_port) = (std::ptr::null_mut(), 0);
        // SAFETY: two NUL-terminated strings that live for the call, and valid places for what it gives.
        let error = unsafe {
            ffi::sail_store_new(
                host.as_ptr(),
                port,
                serve,
                prefix.as_ptr(),
                millis(timeout),
                &raw mut raw,
                &raw mut found_port,
            )
        };
        outcome(OP, error)?;
        Ok(Self { raw: NonNull::new(raw).expect("invariant: given without an error"), port: found_port })
    }

    /// The port it is served at.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets `key`.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        const OP: &str = "TCPStore::set";
        let key = c_string(OP, key)?;
        // SAFETY: a live store, a NUL-terminated string, and `value.len()` bytes.
        let error =
            unsafe { ffi::sail_store_set(self.raw.as_ptr(), key.as_ptr(), value.as_ptr(), value.len()) };
        outcome(OP, error)
    }

    /// The value of `key`, once it is there.
    ///
    /// # Errors
    /// [`Error::Timeout`](crate::Error::Timeout) when it is not set in time.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        const OP: &str = "TCPStore::get";
        let key = c_string(OP, key)?;
        let (mut data, mut len) = (std::ptr::null_mut(), 0);
        // SAFETY: a live store, a NUL-terminated string, and valid places for what it gives.
        let error =
            unsafe { ffi::sail_store_get(self.raw.as_ptr(), key.as_ptr(), &raw mut data, &raw mut len) };
        outcome(OP, error)?;
        // SAFETY: without an error `data` points at `len` bytes.
        let value = unsafe { std::slice::from_raw_parts(data, len) }.to_vec();
        // SAFETY: the buffer was allocated for this call and is not used again.
        unsafe { ffi::sail_bytes_free(data) };
        Ok(value)
    }

    /// Whether `key` is set.
    pub fn has(&self, key: &str) -> Result<bool> {
        const OP: &str = "TCPStore::check";
        let (key, mut there) = (c_string(OP, key)?, false);
        // SAFETY: a live store, a NUL-terminated string, and a valid place for the answer.
        let error = unsafe { ffi::sail_store_check(self.raw.as_ptr(), key.as_ptr(), &raw mut there) };
        outcome(OP, error)?;
        Ok(there)
    }

    /// Adds to the number at `key`, 0 where there is none, and gives the sum.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        const OP: &str = "TCPStore::add";
        let (key, mut sum) = (c_string(OP, key)?, 0);
        // SAFETY: a live store, a NUL-terminated string, and a valid place for the answer.
        let error = unsafe { ffi::sail_store_add(self.raw.as_ptr(), key.as_ptr(), amount, &raw mut sum) };
        outcome(OP, error)?;
        Ok(sum)
    }

    /// Waits until `key` is set.
    ///
    /// # Errors
    /// [`Error::Timeout`](crate::Error::Timeout).
    pub fn wait(&self, key: &str, timeout: Duration) -> Result<()> {
        const OP: &str = "TCPStore::wait";
        let key: CString = c_string(OP, key)?;
        // SAFETY: a live store and a NUL-terminated string.
        let error = unsafe { ffi::sail_store_wait(self.raw.as_ptr(), key.as_ptr(), millis(timeout)) };
        outcome(OP, error)
    }

    pub(crate) fn raw(&self) -> *mut RawStore {
        self.raw.as_ptr()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the pointer is owned by this value alone.
        unsafe { ffi::sail_store_free(self.raw.as_ptr()) };
    }
}

/// At least 1: to c10d 0 means for ever.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    const SHORT: Duration = Duration::from_millis(300);

    #[test]
    fn values_go_from_one_connection_to_another() {
        let server = Store::serve(0, SHORT).unwrap();
        assert_ne!(server.port(), 0);
        let [a, b] =
            ["run", "run"].map(|prefix| Store::connect("localhost", server.port(), prefix, SHORT).unwrap());
        a.set("key", b"va\0lue").unwrap();
        assert_eq!(b.get("key").unwrap(), b"va\0lue");
        assert_eq!((a.add("n", 2).unwrap(), b.add("n", 3).unwrap()), (2, 5));
        assert!(b.has("key").unwrap() && !b.has("other").unwrap());
        assert!(!server.has("key").unwrap(), "keys have their prefix");
        b.wait("key", SHORT).unwrap();
        a.set("empty", b"").unwrap();
        assert_eq!(b.get("empty").unwrap(), b"");
    }

    #[test]
    fn what_is_not_there_in_time_is_a_timeout() {
        let server = Store::serve(0, SHORT).unwrap();
        for error in [server.get("never").unwrap_err(), server.wait("never", SHORT).unwrap_err()] {
            assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        }
        let error = server.set("a\0b", b"").unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error:?}");
    }

    #[test]
    fn a_port_in_use_and_a_port_where_nobody_answers_are_network_errors() {
        let server = Store::serve(0, SHORT).unwrap();
        let error = Store::serve(server.port(), SHORT).unwrap_err();
        assert!(
            matches!(error, Error::Network { .. }) && error.to_string().contains("EADDRINUSE"),
            "{error:?}"
        );
        let port = server.port();
        drop(server);
        let error = Store::connect("localhost", port, "", SHORT).unwrap_err();
        assert!(error.is_distributed(), "{error:?}");
    }
}
