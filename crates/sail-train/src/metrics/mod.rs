//! What is computed of answers, features and clouds of points: pure functions, each of a published definition.
//!
//! They know no model, no data set and no file; the tasks of `sail-train eval --tasks` call them. Each agrees with a
//! reference implementation on the goldens of `tests/goldens/make_metrics.py`, but for exact match, which has none, and the
//! words that CIDEr-D is given.
//!
//! | to find | open |
//! |---|---|
//! | exact match, ANLS, character error rate | `text` |
//! | VQA accuracy and its normalisation of answers | `vqa` |
//! | CIDEr-D | `cider` |
//! | classes by the nearest neighbours | `neighbours` |
//! | principal components | `pca` |
//! | how far two clouds of points are apart | `cloud`, `assignment` |

mod assignment;
mod cider;
mod cloud;
#[cfg(test)]
pub(crate) mod goldens;
mod neighbours;
mod pca;
mod text;
mod vqa;

pub use assignment::assign;
pub use cider::{cider_d, words};
pub use cloud::{Affinity, affinity, mean_distance, nearest_distance, wasserstein};
pub use neighbours::{Vote, classify};
pub use pca::Pca;
pub(crate) use text::folded;
pub use text::{anls, char_errors, exact_match};
pub use vqa::{normalised_answer, vqa_accuracy};
