//! Tests that go through several modules, on shards written to temporary folders.

mod bad_samples;
mod images;
mod loading;
mod preprocessing;
mod shards;
mod templates;
mod truncation;
