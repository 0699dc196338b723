//! Tests that go through several modules, on shards written to temporary folders.

mod bad_samples;
mod images;
mod loading;
mod preprocessing;
mod resuming;
mod shards;
mod templates;
