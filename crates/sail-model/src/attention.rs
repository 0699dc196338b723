//! Attention over packed sequences: rows of many sequences one after the other, each row seeing
//! only its own sequence.
//!
//! On CUDA in a 16-bit type this is the variable-length flash kernel. Elsewhere neighbouring segments of one
//! length go through libtorch's fused attention as one batch, so that neither memory nor time grows with
//! the square of the pack, and tiles of one size cost one call. Not a module: no parameters, no rotation. Called by the blocks of the language and the vision models.
//!
//! Dimension letters: t rows of the pack, n query heads, m key and value heads, h head width, c
//! rows held by a cache, b segments of one length l.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Where each sequence of a pack ends, and which rows need a gradient. Never empty, and no sequence is.
#[derive(Debug)]
pub struct Segments {
    lengths: Vec<i64>,
    grad_rows_r: Option<Tensor>,
    /// Cumulative lengths as the CUDA kernel takes them, made once for all blocks of a forward.
    cu_seqlens: OnceCell<Tensor>,
}

impl Segments {
    /// From cumulative lengths `[0, l0, l0 + l1, ..]`, which must end at `rows`.
    ///
    /// # Errors
    /// [`Error::Segments`] when they do not begin at 0, do not increase, or end elsewhere.
    pub fn new(cu_seqlens: &[i64], rows: i64) -> Result<Self> {
        let wrong = |reason| Err(Error::Segments { cu_seqlens: cu_seqlens.to_vec(), rows, reason });
        let lengths: Vec<i64> = cu_seqlens.windows(2).map(|pair| pair[1] - pair[0]).collect();
        match (cu_seqlens.first(), cu_seqlens.last()) {
            (Some(first), _) if *first != 0 => wrong("they must begin at 0"),
            _ if lengths.is_empty() => wrong("there must be at least one segment"),
            _ if lengths.iter().any(|length| *length < 1) => wrong("they must increase"),
            (_, Some(last)) if *last != rows => wrong("they must end at the number of rows"),
            _ => Ok(Self { lengths, grad_rows_r: None, cu_seqlens: OnceCell::new() }),
        }
    }

    /// Sequences of these lengths, one after the other.
    ///
    /// # Errors
    /// [`Error::Segments`] when there is none, or one is empty.
    pub fn of_lengths(lengths: Vec<i64>) -> Result<Self> {
        if !lengths.is_empty() && lengths.iter().all(|length| *length > 0) {
            return Ok(Self { lengths, grad_rows_r: None, cu_seqlens: OnceCell::new() });
        }
        let mut cu_seqlens = vec![0];
        for length in lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length);
        }
        Self::new(&cu_seqlens, cu_seqlens[cu_seqlens.len() - 1])
    }

    /// One sequence of `rows` rows.
    ///
    /// # Errors
    /// [`Error::Segments`] when `rows` is not positive.
    pub fn single(rows: i64) -> Result<Self> {
        Self::new(&[0, rows], rows)
    }

    /// Says that gradients of rows `[r]` int64 alone lead to something that is trained. The others' need not be computed.
    #[must_use]
    pub fn with_grad_rows(self, grad_rows_r: Tensor) -> Self {
        Self { grad_rows_r: Some(grad_rows_r), ..self }
    }

    /// Rows `[r]` int64 whose gradients lead to something that is trained; None: they may all.
    pub fn grad_rows(&self) -> Option<&Tensor> {
        self.grad_rows_r.as_ref()
    }

    /// Boundaries `[segments + 1]` int32 on `device`.
    fn cu_seqlens(&self, device: Device) -> &Tensor {
        self.cu_seqlens.get_or_init(|| {
            let mut ends = vec![0];
            for length in &self.lengths {
                ends.push(ends[ends.len() - 1] + *length as i32);
            }
            sail_torch::upload(&ends, device).unwrap_or_else(|error| panic!("{error}"))
        })
    }

    /// Length of each sequence.
    pub fn lengths(&self) -> &[i64] {
        &self.lengths
    }
}

impl Clone for Segments {
    fn clone(&self) -> Self {
        let grad_rows_r = self.grad_rows_r.as_ref().map(Tensor::shallow_clone);
        Self { lengths: self.lengths.clone(), grad_rows_r, cu_seqlens: OnceCell::new() }
    }
}

/// Which rows of its own sequence a row sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// Itself and those before it.
    Causal,
    /// All of them.
    Full,
}

/// `softmax(q k^T / sqrt(h)) v` within each segment (Vaswani et al. 2017, section 3.2.1).
///
/// `q_tnh` `[t, n, h]`, `k_tmh` and `v_tmh` `[t, m, h]` with m dividing n: query head i reads key
/// head i / (n / m). Gives `[t, n, h]`. Differentiable in all three. The softmax is fp32 inside.
pub fn packed_attention(
    q_tnh: &Tensor,
    k_tmh: &Tensor,
    v_tmh: &Tensor,
    segments: &Segments,
    visibility: Visibility,
) -> Tensor {
    let causal = visibility == Visibility::Causal;
    if segments.lengths.len() > 1 && sail_torch::has_varlen_attention(q_tnh) {
        let longest = segments.lengths.iter().copied().max().unwrap_or(0);
        let cu_seqlens = segments.cu_seqlens(q_tnh.device());
        return sail_torch::varlen_attention(q_tnh, k_tmh, v_tmh, cu_seqlens, longest, causal)
            .unwrap_or_else(|error| panic!("{error}"));
    }
    let batches: Vec<&[i64]> = segments.lengths().chunk_by(|a, b| a == b).collect();
    let rows: Vec<i64> = batches.iter().map(|lengths| lengths.iter().sum()).collect();
    // One split, so that backward is one concatenation and not a padded sum per segment.
    let split = |x: &Tensor| x.split_with_sizes(&rows[..], 0);
    let parts = split(q_tnh).into_iter().zip(split(k_tmh)).zip(split(v_tmh));
    let outputs: Vec<Tensor> = (parts.zip(&batches))
        .map(|(((q, k), v), lengths)| {
            let heads_first = |x: &Tensor| x.unflatten(0, [lengths.len() as i64, lengths[0]]).transpose(1, 2);
            let out_bnlh = fused(&heads_first(&q), &heads_first(&k), &heads_first(&v), None, causal);
            out_bnlh.transpose(1, 2).flatten(0, 1)
        })
        .collect();
    concatenated(outputs)
}

/// Parts `[t, ..]` one after the other, without a copy where there is one only.
pub(crate) fn concatenated(mut parts: Vec<Tensor>) -> Tensor {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) }
}

/// Causal attention of the last `t` rows of one sequence to all its `c` rows.
///
/// `q_tnh` `[t, n, h]`, `k_1mch` and `v_1mch` `[1, m, c, h]`, c at least t. Gives `[t, n, h]`.
pub fn cached_attention(q_tnh: &Tensor, k_1mch: &Tensor, v_1mch: &Tensor) -> Tensor {
    let (rows, held) = (q_tnh.size()[0], k_1mch.size()[2]);
    if rows == 1 {
        // The queries that share a head of keys are as many rows that see all of them.
        let q_1mgh = q_tnh.reshape([1, k_1mch.size()[1], -1, q_tnh.size()[2]]);
        return fused(&q_1mgh, k_1mch, v_1mch, None, false).reshape_as(q_tnh);
    }
    let q_1nth = q_tnh.transpose(0, 1).unsqueeze(0);
    // libtorch's own causal flag aligns the first rows of q and k, not the last.
    let visible =
        (rows < held).then(|| Tensor::ones([rows, held], (Kind::Bool, q_tnh.device())).tril(held - rows));
    let out = fused(&q_1nth, k_1mch, v_1mch, visible.as_ref(), rows == held);
    out.squeeze_dim(0).transpose(0, 1)
}

/// `[b, n, t, h]` and `[b, m, c, h]` -> `[b, n, t, h]`.
fn fused(q: &Tensor, k: &Tensor, v: &Tensor, visible: Option<&Tensor>, causal: bool) -> Tensor {
    let grouped = q.size()[1] != k.size()[1];
    Tensor::scaled_dot_product_attention(q, k, v, visible, 0.0, causal, None, grouped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Init, RandomSource, TensorSource};

    fn random(name: &str, shape: &[i64]) -> Tensor {
        let source = RandomSource::new(1, "test");
        source.tensor(name, shape, Init::Normal(1.0)).unwrap().set_requires_grad(true)
    }

    /// The formula with one mask over the whole pack, which the code under test must not build.
    fn masked(q: &Tensor, k: &Tensor, v: &Tensor, cu: &[i64], causal: bool) -> Tensor {
        let rows = q.size()[0];
        let visible = Tensor::zeros([rows, rows], (Kind::Bool, Device::Cpu));
        for pair in cu.windows(2) {
            let length = pair[1] - pair[0];
            let block = Tensor::ones([length, length], (Kind::Bool, Device::Cpu));
            let block = if causal { block.tril(0) } else { block };
            visible.narrow(0, pair[0], length).narrow(1, pair[0], length).copy_(&block);
        }
        let repeats = q.size()[1] / k.size()[1];
        let [k, v] = [k, v].map(|x| x.repeat_interleave_self_int(repeats, 1, None));
        let scores = Tensor::einsum("tnh,snh->nts", &[q, &k], None::<&[i64]>) / (q.size()[2] as f64).sqrt();
        let scores = scores.masked_fill(&visible.logical_not(), f64::NEG_INFINITY);
        Tensor::einsum("nts,snh->tnh", &[&scores.softmax(-1, Kind::Float), &v], None::<&[i64]>)
    }

    #[test]
    fn segments_do_not_see_each_other() {
        let cu = [0, 2, 4, 5, 10];
        for (heads, visibility) in
            [(4, Visibility::Causal), (2, Visibility::Causal), (1, Visibility::Full), (4, Visibility::Full)]
        {
            let inputs =
                [random("q", &[10, 4, 8]), random("k", &[10, heads, 8]), random("v", &[10, heads, 8])];
            let [q, k, v] = &inputs;
            let segments = Segments::new(&cu, 10).unwrap();
            let out = packed_attention(q, k, v, &segments, visibility);
            let expected = masked(q, k, v, &cu, visibility == Visibility::Causal);
            assert_eq!(out.size(), [10, 4, 8]);
            assert!(out.allclose(&expected, 1e-5, 1e-6, false));
            let probe = random("probe", &[10, 4, 8]).detach();
            let grads =
                |y: &Tensor| Tensor::run_backward(&[(y * &probe).sum(Kind::Float)], &inputs, true, false);
            for (grad, expected) in grads(&out).iter().zip(grads(&expected)) {
                assert!(grad.allclose(&expected, 1e-4, 1e-5, false));
            }
        }
    }

    #[test]
    fn cached_rows_give_what_the_whole_sequence_gives() {
        let (q, k, v) = (random("q", &[9, 4, 8]), random("k", &[9, 2, 8]), random("v", &[9, 2, 8]));
        let whole = packed_attention(&q, &k, &v, &Segments::single(9).unwrap(), Visibility::Causal);
        for (start, rows) in [(0, 9), (0, 4), (4, 3), (8, 1), (0, 1)] {
            let held = |x: &Tensor| x.narrow(0, 0, start + rows).transpose(0, 1).unsqueeze(0);
            let out = cached_attention(&q.narrow(0, start, rows), &held(&k), &held(&v));
            assert!(out.allclose(&whole.narrow(0, start, rows), 1e-5, 1e-6, false), "{start} {rows}");
        }
    }

    #[test]
    fn boundaries_are_checked() {
        assert_eq!(Segments::new(&[0, 2, 5], 5).unwrap().lengths(), [2, 3]);
        assert_eq!(Segments::of_lengths(vec![2, 3]).unwrap().lengths(), [2, 3]);
        assert!(Segments::of_lengths(vec![]).is_err() && Segments::of_lengths(vec![2, 0]).is_err());
        let cases: [(&[i64], i64, &str); 6] = [
            (&[1, 5], 5, "begin at 0"),
            (&[0], 0, "at least one"),
            (&[], 0, "at least one"),
            (&[0, 3, 3, 5], 5, "must increase"),
            (&[0, 4, 2, 5], 5, "must increase"),
            (&[0, 2, 4], 5, "end at the number of rows"),
        ];
        for (cu_seqlens, rows, expected) in cases {
            let message = Segments::new(cu_seqlens, rows).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
