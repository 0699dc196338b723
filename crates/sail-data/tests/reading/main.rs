//! Reading from outside the crate: processes that are killed, and servers that fail.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

mod kills;
mod servers;
mod support;
