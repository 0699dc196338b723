//! Tests that go through several modules, on shards written to temporary folders.

mod bad_annotations;
mod bad_images;
mod bad_samples;
mod bad_shards;
mod edits;
mod figures;
mod fuzz;
mod image_goldens;
mod images;
mod jinja;
mod json_lines;
mod layouts;
mod loading;
mod preprocessing;
mod resuming;
mod sampling;
mod shards;
mod template_goldens;
mod templates;
mod truncation;
