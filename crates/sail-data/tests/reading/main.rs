//! Reading from outside the crate: processes that are killed, servers that fail, buckets.

#![expect(clippy::unwrap_used, reason = "a failure here fails the test")]

mod buckets;
mod kills;
mod servers;
mod support;
