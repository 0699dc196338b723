//! The processes that train together.

mod place;
mod slurm;

pub use place::{Place, Rendezvous, Starter};
