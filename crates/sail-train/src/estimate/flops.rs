//! Floating point operations of a forward and a backward pass, a multiplication and an addition counted as two.
//!
//! Only matrix products count, as is the custom: linear maps, the patch convolution and the two products of
//! attention. Norms, activations, rotations, the softmax and the optimizer are left out; nothing is counted
//! twice that an implementation computes again. Formulas after Kaplan et al. 2020 (arXiv 2001.08361, section
//! 2.1) and Chowdhery et al. 2022 (arXiv 2204.02311, appendix B), but per operation instead of per parameter,
//! so that frozen modules, tied tables and experts come out right. Called by the graph of shapes.

use std::ops::AddAssign;

/// What a part of a pass computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flops {
    /// The forward pass.
    pub forward: u64,
    /// Gradients of inputs, which go on to what lies upstream.
    pub backward_inputs: u64,
    /// Gradients of weights.
    pub backward_weights: u64,
}

/// Which gradients an operation has to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Of its input: something upstream is trained.
    pub inputs: bool,
    /// Of its weight: it is trained.
    pub weights: bool,
}

impl Flops {
    /// `[rows, inputs]` times a weight `[outputs, inputs]`. Each gradient is one product of the same size.
    pub fn linear(rows: u64, inputs: u64, outputs: u64, wanted: Wanted) -> Self {
        let forward = 2 * rows * inputs * outputs;
        Self {
            forward,
            backward_inputs: if wanted.inputs { forward } else { 0 },
            backward_weights: if wanted.weights { forward } else { 0 },
        }
    }

    /// `softmax(q k^T) v` over `pairs` pairs of a query and a key that it sees, see [`full_pairs`] and
    /// [`causal_pairs`]; `width` is that of the queries of all heads. Two products forward, four backward.
    pub fn attention(pairs: u64, width: u64, wants_inputs: bool) -> Self {
        let forward = 2 * 2 * pairs * width;
        let backward_inputs = if wants_inputs { 2 * forward } else { 0 };
        Self { forward, backward_inputs, backward_weights: 0 }
    }

    /// Of the backward pass.
    pub fn backward(&self) -> u64 {
        self.backward_inputs + self.backward_weights
    }

    /// Of both passes.
    pub fn total(&self) -> u64 {
        self.forward + self.backward()
    }
}

impl AddAssign for Flops {
    fn add_assign(&mut self, other: Self) {
        self.forward += other.forward;
        self.backward_inputs += other.backward_inputs;
        self.backward_weights += other.backward_weights;
    }
}

/// Pairs within sequences of these lengths where every row sees all rows of its own.
pub fn full_pairs(lengths: &[u64]) -> u64 {
    lengths.iter().map(|length| length * length).sum()
}

/// Pairs within sequences of these lengths where a row sees itself and those before it.
pub fn causal_pairs(lengths: &[u64]) -> u64 {
    lengths.iter().map(|length| length * (length + 1) / 2).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_map_has_a_product_for_each_gradient() {
        let flops = |inputs, weights| Flops::linear(3, 4, 5, Wanted { inputs, weights });
        let all = Flops { forward: 120, backward_inputs: 120, backward_weights: 120 };
        assert_eq!(flops(true, true), all);
        assert_eq!(flops(true, false), Flops { backward_weights: 0, ..all });
        assert_eq!(flops(false, true), Flops { backward_inputs: 0, ..all });
        assert_eq!(flops(false, false).total(), 120);
    }

    #[test]
    fn attention_counts_what_is_seen() {
        assert_eq!((full_pairs(&[3, 2]), causal_pairs(&[3, 2])), (13, 9));
        // Three rows that see each other, width 8: 9 scores of 8 products each, and as many for the values.
        let flops = Flops::attention(9, 8, true);
        assert_eq!((flops.forward, flops.backward()), (288, 576));
        assert_eq!(Flops::attention(9, 8, false).total(), 288);
    }
}
