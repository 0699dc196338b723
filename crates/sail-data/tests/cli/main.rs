//! The built `sail-data`, run as a user runs it.

mod packing;
mod reading;
mod support;
mod usage;
