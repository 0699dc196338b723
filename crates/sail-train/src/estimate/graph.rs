//! A pass over a model of which only shapes are known: what lives at each moment, and what is computed.
//!
//! A [`Shaped`] is a tensor without values; it frees its memory when the last handle goes, as a tensor does. An
//! operation with an input that requires a gradient leaves a node, which keeps what its backward pass needs.
//! [`Graph::backward`] walks the nodes as autograd does: the last first, gradients wait at a node until all have
//! come, and what a node kept goes with it. The operations are in `ops.rs`, the models in `forward.rs`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use super::flops::Flops;
use crate::config::Module;

/// What the model computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// CUDA's kernels, if not those for the CPU.
    pub cuda: bool,
    /// Bytes of an element of the compute dtype: 2 or 4.
    pub compute_bytes: u64,
}

/// Where memory is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    /// Everything before the head.
    Trunk,
    /// Logits of some rows, their softmax, and the gradients made of it.
    Head,
}

/// Bytes in use at a moment of a pass, without parameters and what the optimizer keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Everything before the head.
    pub trunk: u64,
    /// Logits of some rows, their softmax, and the gradients made of it.
    pub head: u64,
}

impl Live {
    /// Of both.
    pub fn total(self) -> u64 {
        self.trunk + self.head
    }

    fn of(&mut self, region: Region) -> &mut u64 {
        match region {
            Region::Trunk => &mut self.trunk,
            Region::Head => &mut self.head,
        }
    }
}

#[derive(Default)]
struct Meter {
    now: Cell<Live>,
    peak: Cell<Live>,
}

/// Memory of a tensor and its views.
pub(super) struct Storage {
    bytes: u64,
    region: Region,
    meter: Rc<Meter>,
}

impl Drop for Storage {
    fn drop(&mut self) {
        let mut now = self.meter.now.get();
        *now.of(self.region) -= self.bytes;
        self.meter.now.set(now);
    }
}

/// A tensor without values. Clones share its memory.
#[derive(Clone)]
pub(super) struct Shaped {
    pub(super) memory: Rc<Storage>,
    pub(super) elements: u64,
    pub(super) element_bytes: u64,
    /// What its gradient goes to; None: it requires none.
    pub(super) node: Option<usize>,
}

impl Shaped {
    /// Whether something upstream is trained.
    pub(super) fn requires_grad(&self) -> bool {
        self.node.is_some()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.elements * self.element_bytes
    }
}

/// A parameter. Its own memory is the optimizer's matter.
#[derive(Clone, Copy)]
pub(super) struct Param {
    pub(super) elements: u64,
    /// Its place among the nodes where it is trained.
    pub(super) leaf: Option<usize>,
}

/// A gradient that a node hands on.
pub(super) struct Edge {
    to: usize,
    bytes: u64,
    gradient: Gradient,
}

/// Where the memory of a gradient comes from.
enum Gradient {
    /// It is taken in the backward pass.
    Fresh,
    /// That of the incoming gradient, which it is or is a view of.
    Incoming,
    /// The same, for a node with several results: it waits for those of the others.
    OfOne,
    /// It was taken in the forward pass, which has made the gradient already.
    Made(Rc<Storage>),
}

/// A new tensor as the gradient of `x`.
pub(super) fn fresh(x: &Shaped) -> Option<Edge> {
    x.node.map(|to| Edge { to, bytes: x.bytes(), gradient: Gradient::Fresh })
}

/// The incoming gradient as that of `x`.
pub(super) fn same(x: &Shaped) -> Option<Edge> {
    x.node.map(|to| Edge { to, bytes: x.bytes(), gradient: Gradient::Incoming })
}

/// The incoming gradient as that of one of several results of a node.
fn of_one(to: usize) -> Edge {
    Edge { to, bytes: 0, gradient: Gradient::OfOne }
}

/// A tensor of the forward pass as the gradient of a node.
pub(super) fn made(to: usize, gradient: &Shaped) -> Edge {
    Edge { to, bytes: gradient.bytes(), gradient: Gradient::Made(Rc::clone(&gradient.memory)) }
}

/// The gradient of a parameter.
pub(super) fn of_param(param: Param, element_bytes: u64) -> Option<Edge> {
    param.leaf.map(|to| Edge { to, bytes: param.elements * element_bytes, gradient: Gradient::Fresh })
}

struct Node {
    kept: Vec<Rc<Storage>>,
    edges: Vec<Edge>,
    /// Bytes that its backward pass takes beside the gradients.
    scratch: u64,
    region: Region,
    /// For a parameter, how many edges lead here: its gradient is whole when all have brought theirs.
    uses: Option<usize>,
}

/// A pass under way.
pub(super) struct Graph {
    pub(super) backend: Backend,
    meter: Rc<Meter>,
    region: Cell<Region>,
    module: Cell<Module>,
    trained: Cell<bool>,
    nodes: RefCell<Vec<Node>>,
    flops: RefCell<BTreeMap<Module, Flops>>,
    recomputed: Cell<u64>,
    used: RefCell<BTreeMap<Module, u64>>,
}

impl Graph {
    /// Before anything is computed.
    pub(super) fn new(backend: Backend) -> Self {
        Self {
            backend,
            meter: Rc::default(),
            region: Cell::new(Region::Trunk),
            module: Cell::new(Module::Vision),
            trained: Cell::new(false),
            nodes: RefCell::default(),
            flops: RefCell::default(),
            recomputed: Cell::new(0),
            used: RefCell::default(),
        }
    }

    /// What follows belongs to this module.
    pub(super) fn enter(&self, module: Module, trained: bool) {
        self.module.set(module);
        self.trained.set(trained);
    }

    /// What follows is counted here.
    pub(super) fn count_as(&self, region: Region) {
        self.region.set(region);
    }

    /// A parameter of the present module.
    pub(super) fn param(&self, elements: u64) -> Param {
        *self.used.borrow_mut().entry(self.module.get()).or_default() += elements;
        let leaf = self.trained.get().then(|| self.push(vec![], vec![], 0, Some(0)));
        Param { elements, leaf }
    }

    /// A tensor that depends on nothing.
    pub(super) fn input(&self, elements: u64, element_bytes: u64) -> Shaped {
        self.tensor(elements, element_bytes, None)
    }

    /// Memory that is taken and given back at once.
    pub(super) fn scratch(&self, bytes: u64) {
        drop(self.allocate(bytes));
    }

    /// A new tensor that is the result of the node.
    pub(super) fn tensor(&self, elements: u64, element_bytes: u64, node: Option<usize>) -> Shaped {
        Shaped { memory: self.allocate(elements * element_bytes), elements, element_bytes, node }
    }

    /// A node that keeps these tensors; none where no edge leads on.
    pub(super) fn node(
        &self,
        kept: &[&Shaped],
        edges: impl IntoIterator<Item = Option<Edge>>,
        scratch: u64,
    ) -> Option<usize> {
        let edges: Vec<Edge> = edges.into_iter().flatten().collect();
        if edges.is_empty() {
            return None;
        }
        for edge in &edges {
            if let Some(uses) = &mut self.nodes.borrow_mut()[edge.to].uses {
                *uses += 1;
            }
        }
        Some(self.push(kept.iter().map(|x| Rc::clone(&x.memory)).collect(), edges, scratch, None))
    }

    /// What the gradient of one of several results of a node goes to.
    pub(super) fn result_of(&self, node: Option<usize>) -> Option<usize> {
        node.map(|node| self.push(vec![], vec![of_one(node)], 0, None))
    }

    /// Of what `block` computes only the result is kept: the backward pass computes it once more. Operations of the
    /// second time are counted apart.
    pub(super) fn recomputed(&self, x: &Shaped, block: impl Fn(&Self, &Shaped) -> Shaped) -> Shaped {
        let alone = |with_graph: bool| {
            let g = Self::new(self.backend);
            g.enter(self.module.get(), with_graph && self.trained.get());
            let node = (with_graph && x.requires_grad()).then(|| g.push(vec![], vec![], 0, None));
            let y = block(&g, &g.tensor(x.elements, x.element_bytes, node));
            let (size, is_trained) = ((y.elements, y.element_bytes), y.requires_grad());
            // The result is held until the gradients are there.
            let held = y.clone();
            g.backward(y);
            drop(held);
            (g.peak().total(), size, is_trained, g.totals())
        };
        let (without_graph, (elements, element_bytes), ..) = alone(false);
        let (peak, _, is_trained, (flops, used)) = alone(true);
        for (module, flops) in flops {
            // Without a graph the backward pass does not come here.
            if is_trained {
                self.recomputed.set(self.recomputed.get() + flops.forward);
            }
            *self.flops.borrow_mut().entry(module).or_default() += flops;
        }
        for (module, elements) in used {
            *self.used.borrow_mut().entry(module).or_default() += elements;
        }
        let result_bytes = elements * element_bytes;
        self.scratch(without_graph.saturating_sub(x.bytes()));
        // What is trained inside has a graph even where nothing before it is.
        let anchor = is_trained.then(|| Edge {
            to: self.push(vec![], vec![], 0, None),
            bytes: 0,
            gradient: Gradient::Incoming,
        });
        let scratch = peak.saturating_sub(x.bytes() + if x.requires_grad() { x.bytes() } else { 0 });
        let node = self.node(&[x], [anchor, fresh(x)], scratch);
        Shaped { memory: self.allocate(result_bytes), elements, element_bytes, node }
    }

    /// Adds to what the present module computes.
    pub(super) fn count(&self, flops: Flops) {
        *self.flops.borrow_mut().entry(self.module.get()).or_default() += flops;
    }

    /// The backward pass from `loss`.
    pub(super) fn backward(&self, loss: Shaped) {
        let Some(root) = loss.node else { return };
        drop(loss);
        let mut nodes = self.nodes.take();
        let mut gradients: Vec<Option<Rc<Storage>>> = nodes.iter().map(|_| None).collect();
        let mut of_others: Vec<Vec<Rc<Storage>>> = nodes.iter().map(|_| vec![]).collect();
        gradients[root] = Some(self.allocate(4));
        for index in (0..nodes.len()).rev() {
            let Some(incoming) = gradients[index].take() else { continue };
            self.region.set(nodes[index].region);
            let edges = std::mem::take(&mut nodes[index].edges);
            let kept = std::mem::take(&mut nodes[index].kept);
            let working = self.allocate(nodes[index].scratch);
            let gradient_of = |edge: &Edge| match &edge.gradient {
                Gradient::Fresh => self.allocate(edge.bytes),
                Gradient::Incoming | Gradient::OfOne => Rc::clone(&incoming),
                Gradient::Made(gradient) => Rc::clone(gradient),
            };
            let outgoing: Vec<Rc<Storage>> = edges.iter().map(gradient_of).collect();
            drop((working, kept, incoming, std::mem::take(&mut of_others[index])));
            for (edge, gradient) in edges.iter().zip(outgoing) {
                if let (Gradient::OfOne, Some(_)) = (&edge.gradient, &gradients[edge.to]) {
                    of_others[edge.to].push(gradient);
                    continue;
                }
                let sum = match gradients[edge.to].take() {
                    None => gradient,
                    // In place where nobody else holds it.
                    Some(waiting) if Rc::strong_count(&waiting) == 1 => waiting,
                    Some(_) => self.allocate(edge.bytes),
                };
                let is_whole = nodes[edge.to].uses.as_mut().is_some_and(|uses| {
                    *uses -= 1;
                    *uses == 0
                });
                // A parameter's gradient is added to the optimizer's own memory.
                gradients[edge.to] = (!is_whole).then_some(sum);
            }
        }
    }

    /// What is in use.
    #[cfg(test)]
    pub(super) fn live(&self) -> Live {
        self.meter.now.get()
    }

    /// What was in use when most was.
    pub(super) fn peak(&self) -> Live {
        self.meter.peak.get()
    }

    /// Operations that the backward pass computes again.
    pub(super) fn recomputed_flops(&self) -> u64 {
        self.recomputed.get()
    }

    /// Operations, and elements of the parameters that took part, by module.
    pub(super) fn totals(self) -> (BTreeMap<Module, Flops>, BTreeMap<Module, u64>) {
        (self.flops.into_inner(), self.used.into_inner())
    }

    fn push(&self, kept: Vec<Rc<Storage>>, edges: Vec<Edge>, scratch: u64, uses: Option<usize>) -> usize {
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(Node { kept, edges, scratch, region: self.region.get(), uses });
        nodes.len() - 1
    }

    fn allocate(&self, bytes: u64) -> Rc<Storage> {
        let region = self.region.get();
        let mut now = self.meter.now.get();
        *now.of(region) += bytes;
        self.meter.now.set(now);
        if now.total() > self.meter.peak.get().total() {
            self.meter.peak.set(now);
        }
        Rc::new(Storage { bytes, region, meter: Rc::clone(&self.meter) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Backend = Backend { cuda: false, compute_bytes: 4 };

    /// `loss = sum(w2 (w1 x))` of 10 rows of width 3.
    fn two_maps(trained: [bool; 2]) -> Live {
        let g = Graph::new(CPU);
        let x = g.input(30, 4);
        let y = {
            g.enter(Module::Vision, trained[0]);
            let h = g.linear(&x, g.param(9), 3);
            g.enter(Module::Llm, trained[1]);
            g.linear(&h, g.param(9), 3)
        };
        drop(x);
        g.backward(y);
        g.peak()
    }

    #[test]
    fn what_nobody_needs_is_freed() {
        // x, h and y in the forward pass, of 120 bytes each; nothing afterwards.
        assert_eq!(two_maps([false, false]).total(), 3 * 120);
        // x and h are kept; then the loss's gradient, that of h and that of a weight come.
        assert_eq!(two_maps([true, true]).total(), 2 * 120 + 4 + 120 + 36);
        // x goes with the forward pass; h is kept, and nothing but the last weight has a gradient.
        assert_eq!(two_maps([false, true]).total(), 3 * 120);
        // Nothing is kept for a map whose weight is frozen, but gradients pass through it.
        assert_eq!(two_maps([true, false]).total(), 3 * 120);
    }

    #[test]
    fn a_parameter_used_twice_holds_its_gradient_until_both_are_there() {
        let g = Graph::new(CPU);
        g.enter(Module::Llm, true);
        let table = g.param(1000);
        let x = g.embedding(table, 1, 10);
        let y = g.linear(&x, table, 100);
        drop(x);
        g.backward(y);
        // The head's gradient waits while the embedding's comes; both are 4000 bytes.
        assert!((8000..8600).contains(&g.peak().total()), "{:?}", g.peak());
    }
}
