//! Classes of features by those of the training features that are nearest to them.
//!
//! Dimension letters: n samples, m training samples, d width, k neighbours, c classes.

use tch::{Kind, Tensor};

use crate::error::Result;

/// Similarities that are in memory together.
const MOST_AT_ONCE: i64 = 1 << 24;

/// How the neighbours vote.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Vote {
    /// How many of them, at most as many as there are training samples.
    pub neighbours: i64,
    /// Each counts e to the power of its cosine over this (Wu et al. 2018, arXiv 1805.01978, as DINO's evaluation has
    /// it); `None`: all count the same.
    pub temperature: Option<f64>,
}

/// The class `[n]` of each of `queries_nd` that the nearest of `train_md` by the cosine vote for; the lowest one of
/// several with as many votes. `classes_m` has those of the training features, from 0 to below `classes`.
///
/// # Errors
/// Those of libtorch.
pub fn classify(
    queries_nd: &Tensor,
    (train_md, classes_m): (&Tensor, &Tensor),
    classes: i64,
    vote: Vote,
) -> Result<Tensor> {
    let train_dm = unit(train_md)?.f_transpose(0, 1)?;
    let m = train_dm.size()[1];
    let chosen = queries_nd.f_split((MOST_AT_ONCE / m.max(1)).max(1), 0)?;
    let chosen = chosen.iter().map(|queries_nd| {
        let cosines_nm = unit(queries_nd)?.f_matmul(&train_dm)?;
        let (cosines_nk, places_nk) = cosines_nm.f_topk(vote.neighbours.min(m), -1, true, true)?;
        let weights_nk = match vote.temperature {
            // Over the nearest one's, so that no temperature makes a vote infinite.
            Some(temperature) => {
                let nearest_n1 = cosines_nk.f_narrow(-1, 0, 1)?;
                ((cosines_nk - nearest_n1) / temperature).f_exp()?
            }
            None => cosines_nk.ones_like(),
        };
        let classes_nk = classes_m.f_index_select(0, &places_nk.f_flatten(0, 1)?)?.f_view_as(&places_nk)?;
        let votes_nc = Tensor::f_zeros([queries_nd.size()[0], classes], (Kind::Double, weights_nk.device()))?;
        Ok(votes_nc.f_scatter_add(1, &classes_nk, &weights_nk)?.f_argmax(-1, false)?)
    });
    Ok(Tensor::f_cat(&chosen.collect::<Result<Vec<_>>>()?, 0)?)
}

/// Rows of length 1, in double precision.
fn unit(x_nd: &Tensor) -> Result<Tensor> {
    let x_nd = x_nd.to_kind(Kind::Double);
    let norms_n = x_nd.f_square()?.f_sum_dim_intlist([-1].as_slice(), true, Kind::Double)?.f_sqrt()?;
    Ok(x_nd / norms_n.f_clamp_min(f64::MIN_POSITIVE)?)
}
