//! Staged training of vision encoders inside a multimodal LLM.
//!
//! | to find | open |
//! |---|---|
//! | the train loop | [`train_loop::run_stage`] |
//! | what a configuration may say | [`config`] |
//! | where a process stands among all | [`world`] |
//! | the command that starts them | [`launch`] |
//! | where weights, data and optimizer come together | [`session`] |
//! | where a stage's weights come from | `origin` |
//! | the processes that train together | [`world`] |
//! | what is trained when, and at which rate | [`freeze`], [`schedule`] |
//! | the search for a learning rate | [`ada_lrs`] |
//! | freezing and its proof | [`stage`], [`optim`] |
//! | what is said of a step that takes too long | `watchdog` |
//! | where the time of a step goes | `clock`, `profile` |
//! | how a stage begins or goes on | [`resume`] |
//! | what a checkpoint is | [`checkpoint`] |
//! | who may stop a run | [`stopping`] |
//! | what is done about harmful steps | [`guard`], `first_step`, [`replay`] |
//! | what saves a frozen vision encoder its work | [`feature_cache`] |
//! | the held-out measures | [`eval`] |
//! | exported folders | [`export`] |
//! | a trained model in use | [`trained`], [`generate`], [`score`], [`embed`] |
//! | the page about runs | [`report`] |
//! | what a machine lacks | [`doctor`] |
//! | stages in a row | [`curriculum`] |
//! | what stages take on machines that are not here | [`estimate`] |

pub mod ada_lrs;
pub mod batch;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod config;
pub mod curriculum;
mod device;
pub mod doctor;
pub mod embed;
pub mod error;
pub mod estimate;
pub mod eval;
pub mod events;
pub mod export;
pub mod feature_cache;
mod first_step;
pub mod freeze;
pub mod generate;
pub mod guard;
pub mod launch;
pub mod lineage;
pub mod lock;
pub mod optim;
mod origin;
pub mod output;
mod pictures;
mod profile;
mod program;
pub mod replay;
pub mod report;
pub mod resume;
pub mod schedule;
pub mod score;
pub mod session;
pub mod stage;
pub mod step;
pub mod stopping;
mod threads;
pub mod train_loop;
pub mod trained;
mod watchdog;
pub mod world;

pub use error::{Error, Result};
