//! The error of this crate.

use std::path::PathBuf;

/// What can go wrong while a model is described, loaded, saved or fed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two modules asked for one name.
    #[error("parameter `{name}` is built twice")]
    DuplicateParameter {
        /// Full name.
        name: String,
    },
    /// A file lacks a tensor.
    #[error("{}: no tensor `{name}`", path.display())]
    MissingTensor {
        /// The file or folder read.
        path: PathBuf,
        /// Name in the file.
        name: String,
    },
    /// A tensor has another shape than the model needs.
    #[error("{}: tensor `{name}` has shape {found:?}, the model needs {expected:?}", path.display())]
    Shape {
        /// The file or folder read.
        path: PathBuf,
        /// Name in the file.
        name: String,
        /// Shape in the file.
        found: Vec<i64>,
        /// Shape the model needs.
        expected: Vec<i64>,
    },
    /// A file could not be read, written or understood.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The description of a model is incomplete, contradictory or asks for what is not built.
    #[error("{family} config, `{key}`: {reason}")]
    Config {
        /// `model_type`, or what stands in its place.
        family: String,
        /// Key of config.json.
        key: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// Cumulative lengths do not describe the rows they came with.
    #[error("cu_seqlens {cu_seqlens:?} of {rows} rows: {reason}")]
    Segments {
        /// The boundaries given.
        cu_seqlens: Vec<i64>,
        /// Rows to be divided.
        rows: i64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A batch's tensors do not have one entry per token.
    #[error("batch: `{field}` has shape {found:?}, expected {expected:?}")]
    BatchShape {
        /// Field of the batch.
        field: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The shape that the token ids ask for.
        expected: Vec<i64>,
    },
    /// Places for visual tokens and visual tokens differ in number.
    #[error("the text has {rows} image positions, the images give {features} visual tokens")]
    ImageRows {
        /// Image positions in the text.
        rows: i64,
        /// Visual tokens from the projector.
        features: i64,
    },
    /// No module of a [`crate::vlm::Vlm`] has this name.
    #[error("no module `{name}`; modules are `vision`, `projector` and `llm`")]
    UnknownModule {
        /// The name asked for.
        name: String,
    },
    /// There is nothing to export.
    #[error("no `{module}` parameter")]
    MissingParameters {
        /// `vision`, `projector` or `llm`.
        module: &'static str,
    },
    /// libtorch reported an error.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;
