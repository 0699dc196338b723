//! `--profile N`: traces of N whole steps, of every rank its own, while training goes on as it does without.
//!
//! They lie in the run's folder, and need no checkpoint: what cannot be recorded or written is a warning. Driven by
//! the train loop. docs/profiling.md says what is in them.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sail_torch::{Profiler, Span};
use tracing::warn;

use crate::error::{Error, Result};
use crate::events::Console;
use crate::output::replace;
use crate::session::Session;

/// Steps that a process makes before those that are profiled: the first ones also take memory, choose kernels and
/// check themselves.
const WARM_UP: u64 = 3;
/// In a run's folder.
const FOLDER: &str = "profile";

/// The traces of a stage.
pub(crate) struct Profile {
    /// Steps that are asked for.
    wanted: u64,
    /// Steps that have begun in this process.
    begun: u64,
    /// Of the first of them.
    running: Option<(Profiler, u64)>,
    console: Console,
}

impl Profile {
    /// Of so many steps; of none without a number.
    pub(crate) fn new(steps: Option<u64>, console: &Console) -> Self {
        Self { wanted: steps.unwrap_or(0), begun: 0, running: None, console: console.clone() }
    }

    /// To be called as a step begins: its span in the trace, which ends the step where it is dropped.
    pub(crate) fn begin_step(&mut self, session: &Session) -> Span {
        let number = session.step + 1;
        if self.wanted > 0 && self.begun == WARM_UP {
            match Profiler::begin(session.device) {
                Ok(profiler) => self.running = Some((profiler, number)),
                Err(error) => warn!("no step can be profiled: {error}"),
            }
        } else if self.begun == WARM_UP + self.wanted {
            self.write(session);
        }
        self.begun += 1;
        // As tools for PyTorch's traces look for it.
        sail_torch::span(&format!("ProfilerStep#{number}"))
    }

    /// To be called when no step follows: writes the trace of those that were made.
    pub(crate) fn end(&mut self, session: &Session) {
        if self.running.is_some() {
            self.write(session);
        } else if (1..=WARM_UP).contains(&self.begun) && self.wanted > 0 {
            let (name, begun) = (&session.plan.run.name, self.begun);
            self.console.line(format!(
                "{name}: no step was profiled: {begun} were made, and the first {WARM_UP} are not profiled"
            ));
        }
    }

    fn write(&mut self, session: &Session) {
        let Some((profiler, first)) = self.running.take() else { return };
        let (run, world) = (&session.plan.run, &session.world);
        let path = run.dir.join(FOLDER).join(format!("step-{first:08}-rank-{:05}.json", world.rank()));
        if let Err(error) = write(profiler, &path) {
            warn!("{error}; training goes on without this trace");
            return;
        }
        let steps = match self.begun - WARM_UP {
            1 => format!("step {first}"),
            count => format!("steps {first} to {}", first + count - 1),
        };
        let ranks = if world.size() > 1 { ", and one of each other rank beside it" } else { "" };
        self.console.line(format!(
            "{}: the trace of {steps} is in {}{ranks}; open it in chrome://tracing or https://ui.perfetto.dev",
            run.name,
            path.display()
        ));
    }
}

fn write(profiler: Profiler, path: &Path) -> Result<()> {
    let folder = path.parent().map_or_else(PathBuf::new, Path::to_owned);
    // Not its parents: a run's folder that was removed stays so.
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(Error::io(&folder)(error)),
        _ if !folder.is_dir() => return Err(Error::io(&folder)(ErrorKind::NotADirectory.into())),
        _ => {}
    }
    replace(path, |partial| {
        profiler.save(partial)?;
        check_whole(partial).map_err(Error::io(partial))
    })
}

/// libtorch does not tell when a disk is full: the end of a trace says that all of it was written.
fn check_whole(path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            std::io::Error::other("libtorch has written nothing: the disk is full, or may not be written")
        }
        _ => error,
    })?;
    let length = file.metadata()?.len();
    let mut end = String::new();
    file.seek(SeekFrom::Start(length.saturating_sub(8)))?;
    file.read_to_string(&mut end)?;
    if end.trim_end().ends_with('}') { file.sync_all() } else { Err(ErrorKind::WriteZero.into()) }
}
