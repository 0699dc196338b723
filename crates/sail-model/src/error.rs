//! The error of this crate.

use std::fmt;
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
    /// The weights of a file or folder and the model do not fit together.
    #[error("{}: the weights do not fit the model{misfits}", path.display())]
    Weights {
        /// The file or folder read.
        path: PathBuf,
        /// Every tensor that does not fit.
        misfits: Misfits,
    },
    /// There is not enough memory for a parameter.
    #[error("no memory for parameter `{name}` of shape {shape:?}")]
    Memory {
        /// Name inside the module.
        name: String,
        /// Its shape.
        shape: Vec<i64>,
    },
    /// Two layouts of one model contradict each other.
    #[error("tensor `{name}` cannot be put together: its pieces leave a gap or overlap")]
    Layout {
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
    /// A folder to write a model to has something else in it.
    #[error(
        "`{}` is not empty and no model folder, so it is not replaced\n\nhint: name a new folder, or remove this one",
        path.display()
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// A model could not be fetched from a hub.
    #[error("`{model}`: {reason}\n\nhint: {hint}")]
    Hub {
        /// The reference, as written.
        model: String,
        /// What went wrong, with the file where it is about one.
        reason: String,
        /// What to do about it.
        hint: String,
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
    #[error("{sample}: the text has {rows} image positions, its images give {features} visual tokens")]
    ImageRows {
        /// The sample.
        sample: String,
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
    /// libtorch reported an error.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    /// libtorch refused a call that tch does not have.
    #[error(transparent)]
    SailTorch(#[from] sail_torch::Error),
}

/// Tensors that keep weights and a model from fitting together, by their names in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Misfits {
    /// The model needs them and they are not there.
    pub missing: Vec<String>,
    /// Name, shape in the file, shape that the model needs.
    pub shapes: Vec<(String, Vec<i64>, Vec<i64>)>,
    /// They are there and the model has no place for them.
    pub unexpected: Vec<String>,
}

impl fmt::Display for Misfits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.missing.is_empty() {
            write!(f, "\n  missing ({}): {}", self.missing.len(), self.missing.join(" "))?;
        }
        if !self.shapes.is_empty() {
            write!(f, "\n  of another shape ({}):", self.shapes.len())?;
            for (name, found, expected) in &self.shapes {
                write!(f, "\n    {name} has shape {found:?}, the model needs {expected:?}")?;
            }
        }
        if !self.unexpected.is_empty() {
            let names = self.unexpected.join(" ");
            write!(f, "\n  the model has no place for ({}): {names}", self.unexpected.len())?;
        }
        Ok(())
    }
}

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;
