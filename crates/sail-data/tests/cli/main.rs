//! The built `sail-data`, run as a user runs it.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod packing;
mod reading;
mod support;
mod usage;
