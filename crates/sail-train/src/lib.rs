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
//! | tasks that measure a checkpoint or an encoder | [`tasks`] |
//! | what is computed of answers and features | [`metrics`] |
//! | exported folders | [`export`] |
//! | a trained model in use | [`trained`], [`generate`], [`score`], [`embed`] |
//! | the page about runs | [`report`] |
//! | what a machine lacks | [`doctor`] |
//! | stages in a row | [`curriculum`] |
//! | what stages take on machines that are not here | [`estimate`] |
//!
//! A step of a stage, as the train loop makes it (`examples/train_steps.rs` makes some, and looks at what the guard says):
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//!
//! use sail_train::config::{Config, load};
//! use sail_train::session::Session;
//! use sail_train::world::World;
//!
//! # fn main() -> Result<(), sail_train::Error> {
//! let Config::Stage(plan) = load(Path::new("configs/tiny/stage1.yaml"), &["schedule.steps=5".into()])? else {
//!     panic!("a stage, and no curriculum");
//! };
//! let mut session = Session::build(&plan, &Arc::new(World::alone()), None)?;
//! while let Some(step) = session.next_step()?.filter(|_| !session.is_done()) {
//!     let loss = session.accumulate(&step)?;
//!     let verdict = session.agree(&loss, false, true)?;
//!     let factors = session.factors(&step);
//!     session.update(&step, &factors)?;
//!     session.advance(&step)?;
//!     println!("step {}: loss {}", session.step, verdict.loss);
//! }
//! # Ok(())
//! # }
//! ```

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
mod http;
pub mod launch;
pub mod lineage;
pub mod lock;
pub mod metrics;
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
pub mod tasks;
mod threads;
pub mod train_loop;
pub mod trained;
mod watchdog;
pub mod world;

pub use error::{Error, Result};
