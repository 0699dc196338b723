//! The operations of the models over shapes: each allocates, keeps and counts what libtorch's does.
//!
//! What an operation keeps for its backward pass is libtorch 2.11's (`derivatives.yaml`): a linear map its input
//! only where its weight is trained, a product each factor only where the other requires a gradient, an
//! activation its input always. Called by `forward.rs`.

use sail_torch::cross_entropy_chunk;

use super::flops::{Flops, Wanted, causal_pairs, full_pairs};
use super::graph::{Edge, Graph, Param, Shaped, fresh, made, of_param, same};

/// Bytes of fp32.
pub(super) const FLOAT: u64 = 4;
/// Bytes of int64.
pub(super) const LONG: u64 = 8;

/// Rows of packed sequences, each seeing its own only.
pub(super) struct Sequences {
    /// Rows of each sequence.
    pub(super) lengths: Vec<u64>,
    /// A row sees itself and those before it, if not all.
    pub(super) causal: bool,
}

/// Heads of an attention.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    /// Of the queries.
    pub(super) queries: u64,
    /// Of keys and values.
    pub(super) keys: u64,
    /// Width of each.
    pub(super) width: u64,
}

impl Graph {
    /// `[rows, inputs]` -> `[rows, outputs]`.
    pub(super) fn linear(&self, x: &Shaped, weight: Param, outputs: u64) -> Shaped {
        let inputs = weight.elements / outputs;
        let rows = x.elements / inputs;
        let wanted = Wanted { inputs: x.requires_grad(), weights: weight.leaf.is_some() };
        self.count(Flops::linear(rows, inputs, outputs, wanted));
        let kept = wanted.weights.then_some(x);
        let bytes = self.backend.compute_bytes;
        self.result((rows * outputs, bytes), kept.as_slice(), [fresh(x), of_param(weight, bytes)], 0)
    }

    /// `nn::Linear::forward_together`: maps of the same rows, each a weight and its outputs.
    pub(super) fn linears<const N: usize>(&self, x: &Shaped, maps: [(Param, u64); N]) -> [Shaped; N] {
        let bytes = self.backend.compute_bytes;
        let rows = |(weight, outputs): (Param, u64)| x.elements / (weight.elements / outputs);
        for (weight, outputs) in maps {
            let wanted = Wanted { inputs: x.requires_grad(), weights: weight.leaf.is_some() };
            self.count(Flops::linear(rows((weight, outputs)), weight.elements / outputs, outputs, wanted));
        }
        let kept = maps.iter().any(|(weight, _)| weight.leaf.is_some()).then_some(x);
        let of_weights = maps.map(|(weight, _)| of_param(weight, bytes));
        // Where nothing here is trained only some rows need a gradient: theirs are taken out, and their sum put back.
        let widest = maps.iter().map(|map| rows(*map) * map.1 * bytes).max().unwrap_or(0);
        let scratch = if kept.is_none() { widest + x.bytes() } else { 0 };
        let node = self.node(kept.as_slice(), [fresh(x)].into_iter().chain(of_weights), scratch);
        maps.map(|map| self.tensor(rows(map) * map.1, bytes, self.result_of(node)))
    }

    /// Rows that each belong to one of many matrices, which `weights` are together: `[rows, inputs]` ->
    /// `[rows, outputs]`. In the backward pass the matrices' gradients, and the rows', are joined by a copy.
    pub(super) fn experts(&self, x: &Shaped, weights: Param, (inputs, outputs): (u64, u64)) -> Shaped {
        let rows = x.elements / inputs;
        let wanted = Wanted { inputs: x.requires_grad(), weights: weights.leaf.is_some() };
        self.count(Flops::linear(rows, inputs, outputs, wanted));
        let kept = wanted.weights.then_some(x);
        let bytes = self.backend.compute_bytes;
        let of_weights = if wanted.weights { weights.elements * bytes } else { 0 };
        let edges = [fresh(x), of_param(weights, bytes)];
        self.result((rows * outputs, bytes), kept.as_slice(), edges, of_weights + x.bytes())
    }

    /// Pixels of patches that do not overlap -> `[patches, width]`.
    pub(super) fn patches(&self, pixels: &Shaped, weight: Param, width: u64) -> Shaped {
        let pixels = self.cast(pixels, self.backend.compute_bytes);
        self.linear(&pixels, weight, width)
    }

    /// `a + b`.
    pub(super) fn add(&self, a: &Shaped, b: &Shaped) -> Shaped {
        self.result((a.elements, a.element_bytes), &[], [same(a), same(b)], 0)
    }

    /// `x + p`, the parameter repeated.
    pub(super) fn add_param(&self, x: &Shaped, param: Param) -> Shaped {
        let edges = [same(x), of_param(param, x.element_bytes)];
        self.result((x.elements, x.element_bytes), &[], edges, 0)
    }

    /// `a * b`, which is repeated where it has fewer elements.
    pub(super) fn mul(&self, a: &Shaped, b: &Shaped) -> Shaped {
        let kept: Vec<&Shaped> = [(b, a.requires_grad()), (a, b.requires_grad())]
            .into_iter()
            .filter_map(|(x, is)| is.then_some(x))
            .collect();
        let scratch = if b.elements < a.elements && b.requires_grad() { a.bytes() } else { 0 };
        self.result((a.elements, a.element_bytes), &kept, [fresh(a), fresh(b)], scratch)
    }

    /// `x * p`, the parameter repeated.
    pub(super) fn mul_param(&self, x: &Shaped, param: Param) -> Shaped {
        let is_trained = param.leaf.is_some();
        let kept = is_trained.then_some(x);
        // The parameter's gradient is a product of full size before it is summed over the rows.
        let scratch = if is_trained { x.bytes() } else { 0 };
        let edges = [fresh(x), of_param(param, x.element_bytes)];
        self.result((x.elements, x.element_bytes), kept.as_slice(), edges, scratch)
    }

    /// An activation.
    pub(super) fn activation(&self, x: &Shaped) -> Shaped {
        self.result((x.elements, x.element_bytes), &[x], [fresh(x)], 0)
    }

    /// A softmax over rows, in fp32.
    pub(super) fn softmax(&self, x: &Shaped) -> Shaped {
        self.keeping_result(x.elements, [fresh(x)])
    }

    /// `sail_torch::rms_norm`; in 16 bits on the CPU composed of libtorch's operators: fp32 inside, then cast back and
    /// multiplied by the weight.
    pub(super) fn rms_norm(&self, x: &Shaped, width: u64) -> Shaped {
        let weight = self.param(width);
        let roots = || self.input(x.elements / width, FLOAT);
        if self.is_fused() || self.backend.cuda {
            let edges = [fresh(x), of_param(weight, x.element_bytes)];
            return self.result((x.elements, x.element_bytes), &[x, &roots()], edges, 0);
        }
        let normed = {
            let wide = self.cast(x, FLOAT);
            // Composed of a square, a mean, a root and a product.
            self.scratch(wide.bytes());
            self.result((x.elements, FLOAT), &[&wide, &roots()], [fresh(&wide)], 2 * wide.bytes())
        };
        self.mul_param(&self.cast(&normed, x.element_bytes), weight)
    }

    /// `sail_torch::swiglu`: `silu(gate) * up`.
    pub(super) fn swiglu(&self, gate: &Shaped, up: &Shaped) -> Shaped {
        let scratch = if self.is_fused() { 0 } else { gate.bytes() };
        let edges = [fresh(gate), fresh(up)];
        self.result((gate.elements, gate.element_bytes), &[gate, up], edges, scratch)
    }

    /// Whether norms, gates and rotations pass over memory once.
    fn is_fused(&self) -> bool {
        !self.backend.cuda && self.backend.compute_bytes == FLOAT
    }

    /// Layer norm; its bias is as small as its weight and not counted.
    pub(super) fn layer_norm(&self, x: &Shaped, width: u64) -> Shaped {
        let means_and_deviations = self.input(2 * (x.elements / width), FLOAT);
        let edges = [fresh(x), of_param(self.param(width), x.element_bytes)];
        self.result((x.elements, x.element_bytes), &[x, &means_and_deviations], edges, 0)
    }

    /// The same elements in another type; the tensor itself where it has that type.
    pub(super) fn cast(&self, x: &Shaped, element_bytes: u64) -> Shaped {
        if x.element_bytes == element_bytes {
            return x.clone();
        }
        self.result((x.elements, element_bytes), &[], [fresh(x)], 0)
    }

    /// Some of the elements, in any order, perhaps several times.
    pub(super) fn gather(&self, x: &Shaped, elements: u64) -> Shaped {
        self.result((elements, x.element_bytes), &[], [fresh(x)], 0)
    }

    /// A copy in another layout.
    pub(super) fn copy(&self, x: &Shaped) -> Shaped {
        self.result((x.elements, x.element_bytes), &[], [same(x)], 0)
    }

    /// Sums to fewer elements.
    pub(super) fn sum(&self, x: &Shaped, elements: u64) -> Shaped {
        self.result((elements, x.element_bytes), &[], [same(x)], 0)
    }

    /// Two halves, which are views; their gradients are joined by a copy.
    pub(super) fn halves(&self, x: &Shaped) -> [Shaped; 2] {
        let node = self.node(&[], [fresh(x)], 0);
        let half = Shaped { node, elements: x.elements / 2, ..x.clone() };
        [half.clone(), half]
    }

    /// Rows of a table.
    pub(super) fn embedding(&self, table: Param, rows: u64, width: u64) -> Shaped {
        let bytes = self.backend.compute_bytes;
        let ids = self.input(rows, LONG);
        self.result((rows * width, bytes), &[&ids], [of_param(table, bytes)], 0)
    }

    /// `x` with some of its rows replaced.
    pub(super) fn index_copy(&self, x: &Shaped, rows: &Shaped) -> Shaped {
        self.result((x.elements, x.element_bytes), &[rows], [fresh(x), fresh(rows)], 0)
    }

    /// `sail_torch::rotate`: queries or keys turned by `angles`, cosines and sines.
    pub(super) fn rotate(&self, x: &Shaped, angles: &Shaped) -> Shaped {
        // Elsewhere four products of half the size and two sums, as the backward pass has them.
        let scratch = if self.is_fused() { 0 } else { 2 * x.bytes() };
        self.scratch(scratch);
        self.result((x.elements, x.element_bytes), &[angles], [fresh(x)], scratch)
    }

    /// `softmax(q k^T) v` within sequences, as `attention::packed_attention`.
    pub(super) fn attention(&self, [q, k, v]: [&Shaped; 3], heads: Heads, sequences: &Sequences) -> Shaped {
        let Heads { queries, keys, width } = heads;
        let rows = q.elements / (queries * width);
        let wants_inputs = [q, k, v].iter().any(|x| x.requires_grad());
        let pairs = if sequences.causal { causal_pairs } else { full_pairs };
        self.count(Flops::attention(pairs(&sequences.lengths), queries * width, wants_inputs));
        let sums = self.input(rows * queries, FLOAT);
        let out = self.input(q.elements, q.element_bytes);
        let is_flash = self.backend.cuda && self.backend.compute_bytes == 2;
        // Neighbours of one length are one call; the results of several calls are joined by a copy.
        let is_joined = !is_flash && sequences.lengths.chunk_by(|a, b| a == b).count() > 1;
        let scratch = if is_flash {
            // Sums of the queries' gradients in fp32; gradients of keys and values for every query head.
            let of_heads = if queries == keys { 0 } else { 2 * q.bytes() };
            rows * queries * (width + 1) * FLOAT + of_heads
        } else if is_joined {
            q.bytes() + k.bytes() + v.bytes()
        } else {
            0
        };
        let node = self.node(&[q, k, v, &out, &sums], [fresh(q), fresh(k), fresh(v)], scratch);
        let out = Shaped { node, ..out };
        if is_joined { self.copy(&out) } else { out }
    }

    /// `sail_torch::linear_cross_entropy`: the head and its loss, whose forward pass makes the gradients.
    pub(super) fn linear_cross_entropy(&self, x: &Shaped, head: Param, vocab: u64) -> Shaped {
        let inputs = head.elements / vocab;
        let rows = x.elements / inputs;
        let wanted = Wanted { inputs: x.requires_grad(), weights: head.leaf.is_some() };
        self.count(Flops::linear(rows, inputs, vocab, wanted));
        let of_x = x.node.map(|to| (to, self.input(x.elements, x.element_bytes)));
        let of_head = head.leaf.map(|to| (to, self.input(head.elements, FLOAT)));
        let chunk = cross_entropy_chunk(rows as i64, vocab as i64, self.backend.cuda) as u64;
        let is_single = x.element_bytes == FLOAT;
        // Logits and their softmax; in 16 bits also the logits in fp32 and the product that is added to a gradient.
        let widened = if is_single { 0 } else { chunk * vocab * FLOAT };
        let added = if is_single || !wanted.weights { 0 } else { head.elements * x.element_bytes };
        self.scratch(chunk * vocab * (x.element_bytes + FLOAT) + widened.max(added));
        let edge = |(to, gradient): &(usize, Shaped)| made(*to, gradient);
        let of_x = of_x.as_ref().map(edge);
        match &of_head {
            Some((_, sum)) if !is_single => {
                // Cast to the head's type in the backward pass.
                self.result((1, FLOAT), &[sum], [of_x, of_param(head, x.element_bytes)], 0)
            }
            _ => self.result((1, FLOAT), &[], [of_x, of_head.as_ref().map(edge)], 0),
        }
    }

    /// An fp32 result that its own backward pass needs.
    fn keeping_result(&self, elements: u64, edges: [Option<Edge>; 1]) -> Shaped {
        let result = self.input(elements, FLOAT);
        Shaped { node: self.node(&[&result], edges, 0), ..result }
    }

    /// A result in memory of its own.
    fn result(
        &self,
        (elements, element_bytes): (u64, u64),
        kept: &[&Shaped],
        edges: impl IntoIterator<Item = Option<Edge>>,
        scratch: u64,
    ) -> Shaped {
        self.tensor(elements, element_bytes, self.node(kept, edges, scratch))
    }
}
