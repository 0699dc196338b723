//! How far two clouds of points are apart: the three measures of feature affinity of SAILViT (arXiv 2507.01643,
//! Table 7).
//!
//! The paper names them and gives no formulas. Here they are, for points in any number of dimensions and Euclidean
//! distances: the mean over the first cloud of the distance to the nearest point of the second; the Wasserstein
//! distance of order 1, exactly; and the mean of the distances of all pairs.
//!
//! Dimension letters: n points of the first cloud, m of the second, k dimensions.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::assignment::assign;
use crate::error::{Error, Result};

/// Distances that are in memory together.
const MOST_AT_ONCE: i64 = 1 << 24;
/// Without the trick by a matrix product, which loses digits where points are close.
const EXACTLY: i64 = 2;

/// The three distances between two clouds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Affinity {
    /// As [`nearest_distance`].
    pub nearest: f64,
    /// As [`wasserstein`].
    pub wasserstein: f64,
    /// As [`mean_distance`].
    pub mean: f64,
}

/// All three, the Wasserstein distance of as many points from each, which are given.
///
/// # Errors
/// Those of libtorch, and as [`wasserstein`].
pub fn affinity(a_nk: &Tensor, b_mk: &Tensor, equally_many: (&Tensor, &Tensor)) -> Result<Affinity> {
    Ok(Affinity {
        nearest: nearest_distance(a_nk, b_mk)?,
        wasserstein: wasserstein(equally_many.0, equally_many.1)?,
        mean: mean_distance(a_nk, b_mk)?,
    })
}

/// Mean over the points of the first cloud of the distance to the nearest point of the second.
///
/// # Errors
/// Those of libtorch, for points of different widths.
pub fn nearest_distance(a_nk: &Tensor, b_mk: &Tensor) -> Result<f64> {
    let sum = sum_over_parts(a_nk, b_mk, |distances_nm| {
        Ok(distances_nm.f_amin([-1].as_slice(), false)?.f_sum(Kind::Double)?)
    })?;
    Ok(sum / a_nk.size()[0] as f64)
}

/// Mean of the distances between each point of the one and each point of the other cloud.
///
/// # Errors
/// Those of libtorch, for points of different widths.
pub fn mean_distance(a_nk: &Tensor, b_mk: &Tensor) -> Result<f64> {
    let sum = sum_over_parts(a_nk, b_mk, |distances_nm| Ok(distances_nm.f_sum(Kind::Double)?))?;
    Ok(sum / (a_nk.size()[0] * b_mk.size()[0]) as f64)
}

fn sum_over_parts(a_nk: &Tensor, b_mk: &Tensor, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<f64> {
    let (a_nk, b_mk) = (a_nk.to_kind(Kind::Double), b_mk.to_kind(Kind::Double));
    let rows = (MOST_AT_ONCE / b_mk.size()[0].max(1)).max(1);
    let mut sum = 0.0;
    for part_nk in a_nk.f_split(rows, 0)? {
        let distances_nm = Tensor::f_cdist(&part_nk, &b_mk, 2.0, EXACTLY)?;
        sum += of(&distances_nm)?.f_double_value(&[])?;
    }
    Ok(sum)
}

/// The Wasserstein distance of order 1 between two clouds of equally many points, each of the same weight: the mean
/// distance in the cheapest pairing, which is the exact optimum, not an approximation by slices or entropy. It takes
/// up to n³ steps; some thousand points are seconds.
///
/// # Errors
/// [`Error::Usage`] for clouds of different or no size and for points that are not finite; those of libtorch.
pub fn wasserstein(a_nk: &Tensor, b_nk: &Tensor) -> Result<f64> {
    let (n, m) = (a_nk.size()[0], b_nk.size()[0]);
    if n != m || n == 0 {
        return Err(Error::usage(
            format!("a cloud of {n} and one of {m} points cannot be paired"),
            "take as many points of each, at least one",
        ));
    }
    let distances_nn =
        Tensor::f_cdist(&a_nk.to_kind(Kind::Double), &b_nk.to_kind(Kind::Double), 2.0, EXACTLY)?;
    if !distances_nn.sum(Kind::Double).double_value(&[]).is_finite() {
        return Err(Error::usage("a feature is not finite", "look at the weights of the model"));
    }
    let n = n as usize;
    let distances = Vec::<f64>::try_from(distances_nn.f_flatten(0, 1)?)?;
    let pairs = assign(&distances, n);
    Ok(pairs.iter().enumerate().map(|(row, column)| distances[row * n + column]).sum::<f64>() / n as f64)
}
