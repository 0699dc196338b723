//! The error of this crate, and the exit code each kind means.

use std::path::{Path, PathBuf};

use crate::config::ConfigErrors;

/// What can end a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration file has errors; all of them are listed.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// What was asked for cannot be done with what is there; the message says what to do instead.
    #[error("{message}\n\nhint: {hint}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// Reading training or held-out data failed.
    #[error(transparent)]
    Data(#[from] sail_data::Error),
    /// A model could not be built, read, written or run.
    #[error(transparent)]
    Model(#[from] sail_model::Error),
    /// libtorch reported an error.
    #[error(transparent)]
    Torch(#[from] sail_torch::Error),
    /// The ranks cannot work together, or one of them is gone.
    #[error("{message}\n\nhint: {hint}")]
    Ranks {
        /// What is wrong, and with which rank.
        message: String,
        /// What to do about it.
        hint: String,
    },
    /// The main rank cannot go on, and no rank without it.
    #[error("rank 0: {message}")]
    Elsewhere {
        /// What it says.
        message: String,
        /// Its exit code.
        code: u8,
    },
    /// libtorch reported an error through tch.
    #[error(transparent)]
    Tch(#[from] tch::TchError),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint is incomplete, damaged or does not fit.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A run's folder is not the one any more that the run has begun in.
    #[error(
        "`{}` was removed or replaced while a run trained in it\n\nhint: if it was moved, bring it back, and the same \
         command resumes; what was trained since its newest checkpoint is lost", path.display()
    )]
    FolderGone {
        /// The run's folder.
        path: PathBuf,
    },
    /// The guard has ended the run before a step that would do harm; what was before is saved.
    #[error(
        "{what}\n\nsamples: {samples}\n\nhint: the run is saved as it was before; `{replay}` looks at the step; lower \
         `train.*.lr`, take these samples out, or set `guard.*` to `skip` or `rollback`"
    )]
    Tripped {
        /// The step, and what is wrong with it.
        what: String,
        /// Its samples, as `source/shard/key`.
        samples: String,
        /// The command that makes it again.
        replay: String,
    },
    /// The first step of a stage did not do what its plan says.
    #[error(
        "the first step did not train what it should\n\n{table}\nhint: a trained parameter that nothing reaches may be \
         left out by freezing its module; `guard.self_check: false` trains on regardless"
    )]
    SelfCheck {
        /// What is wrong with which parameter.
        table: String,
    },
    /// The sources have an end, and it comes before the first pack.
    #[error(
        "{name}: the sources hold no sample\n\nhint: look at `data.epochs` and `data.samples`, and at the shards"
    )]
    NoData {
        /// `run.name`.
        name: String,
    },
    /// A plan names something that is not there or does not fit; nothing was trained.
    #[error("{run}: {source}")]
    Preflight {
        /// `run.name`.
        run: String,
        /// What is wrong.
        source: Box<Error>,
    },
    /// The update of a step broke the weights; nothing was saved after it.
    #[error(
        "step {step}: the updated weights are not finite, or far too large; nothing was saved\n\nhint: resume from the checkpoint before, with a lower `train.*.lr`"
    )]
    WeightsNotFinite {
        /// The step.
        step: u64,
    },
    /// The held-out loss is not a number.
    #[error(
        "held-out source `{name}`: the loss is not finite\n\nhint: the weights are broken; go back to an earlier checkpoint and lower `train.*.lr`"
    )]
    HeldOutNotFinite {
        /// The source.
        name: String,
    },
    /// A parameter that the stage freezes changed, or one that no module of the plan has.
    #[error("`{name}` {problem}")]
    FreezePlan {
        /// Full parameter name.
        name: String,
        /// What happened to it.
        problem: &'static str,
    },
    /// An export, read back, is not what was in memory.
    #[error("{}: what was written computes something else than what is in memory: relative difference {difference:e}", path.display())]
    ExportMismatch {
        /// The exported folder.
        path: PathBuf,
        /// Largest difference of features, losses or scores, relative to their size.
        difference: f64,
    },
}

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What to do about what the system said, where that is known and the message does not say it.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        use std::io::ErrorKind as Kind;
        match self {
            Self::Data(sail_data::Error::BrokenShard { .. }) => {
                return Some(
                    "is it a whole tar archive? `sail-data check SHARD` reads all of it; then make it anew, or take it out \
                     of `data.sources`",
                );
            }
            Self::Data(sail_data::Error::NoShards { .. }) => {
                return Some(
                    "patterns are seen from the working folder; `{000..099}` and `*` stand for names",
                );
            }
            Self::Model(sail_model::Error::Memory { .. }) => {
                return Some(
                    "choose a smaller model, or a machine with more memory; `--dry-run` says what a stage takes",
                );
            }
            Self::Data(sail_data::Error::MissingToken { .. }) => {
                return Some(
                    "is it the tokenizer of this language model? `data.image_tokens` names other tokens for images",
                );
            }
            Self::Model(sail_model::Error::File { .. }) => {
                return Some(
                    "name a folder of Hugging Face's layout, with `config.json` and `model.safetensors`",
                );
            }
            Self::Preflight { source, .. } => return source.hint(),
            _ => {}
        }
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        let source = loop {
            match cause?.downcast_ref::<std::io::Error>() {
                Some(source) => break source,
                None => cause = cause?.source(),
            }
        };
        match source.kind() {
            Kind::StorageFull | Kind::QuotaExceeded => Some(
                "make room there, or choose another disk (`run.root`, `--out`); the same command goes on",
            ),
            Kind::NotFound => {
                Some("nothing is there: is the name right, and the folder that the command runs in?")
            }
            Kind::PermissionDenied => Some("whose is it, and may this user read and write there?"),
            Kind::ReadOnlyFilesystem => {
                Some("that file system is mounted read-only; choose another (`run.root`, `--out`)")
            }
            // `ErrorKind` has no name for it.
            _ if source.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) => {
                Some("raise how many files may be open: `ulimit -n 65536`")
            }
            _ => None,
        }
    }

    /// The exit code: 2 for what the user wrote, 1 for what happened afterwards.
    pub fn exit_code(&self) -> u8 {
        match self {
            // Options and layouts that make no sense are the user's as well.
            Self::Model(sail_model::Error::Config { .. } | sail_model::Error::Occupied { .. })
            | Self::Config(_)
            | Self::Usage { .. }
            | Self::Preflight { .. } => 2,
            Self::Elsewhere { code, .. } => *code,
            _ => 1,
        }
    }

    pub(crate) fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    pub(crate) fn ranks(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Ranks { message: message.into(), hint: hint.into() }
    }

    /// For `map_err` on what goes from rank to rank as JSON.
    pub(crate) fn exchange(error: serde_json::Error) -> Self {
        Self::Io { path: "an exchange between ranks".into(), source: error.into() }
    }

    /// The store at which ranks meet cannot be served or reached.
    pub(crate) fn meeting(host: &str, port: u16, error: sail_torch::Error) -> Self {
        let text = error.to_string();
        if text.contains("EADDRINUSE") {
            let message = format!("port {port}, at which the ranks were to meet, is in use on this host");
            return Self::ranks(
                message,
                "set another MASTER_PORT on every rank, or end the process that has it",
            );
        }
        match error {
            sail_torch::Error::Timeout { .. } | sail_torch::Error::Network { .. } => Self::ranks(
                format!("the ranks' store at {host}:{port} cannot be reached: {text}"),
                "check MASTER_ADDR and MASTER_PORT, that rank 0 (or the launcher) runs there, and the firewall between",
            ),
            other => other.into(),
        }
    }

    /// For `map_err` on an IO call: keeps the path that the system's error leaves out.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn checkpoint(path: &Path, reason: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.to_owned(), reason: reason.into() }
    }
}
