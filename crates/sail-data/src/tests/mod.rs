//! Tests that go through several modules, on shards written to temporary folders.

mod bad_samples;
mod images;
mod jinja;
mod loading;
mod preprocessing;
mod shards;
mod template_goldens;
mod templates;
mod truncation;
