//! The machines: how fast they compute, and how long collectives take between them.
//!
//! A collective is latency plus bytes over bandwidth (Thakur et al. 2005, "Optimization of collective
//! communication operations in MPICH"), with the steps, latencies and efficiency of NCCL's own model of rings
//! and trees (`src/graph/tuning.cc`, protocol LL128). Nothing here was measured on a cluster.

/// A step of a ring between two GPUs of a node, seconds.
const RING_STEP_IN_NODE: f64 = 1.9e-6;
/// A step of a ring between two nodes, seconds.
const RING_STEP_BETWEEN_NODES: f64 = 4.0e-6;
/// A step of a tree between two GPUs of a node, seconds.
const TREE_STEP_IN_NODE: f64 = 1.2e-6;
/// A step of a tree between two nodes, seconds.
const TREE_STEP_BETWEEN_NODES: f64 = 8.5e-6;
/// Share of a ring's bandwidth that a tree has.
const TREE_BANDWIDTH: f64 = 0.9;

/// GPUs, each a rank, and the links between them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cluster {
    /// GPUs of all nodes, at least 1.
    pub world: u64,
    /// GPUs of a node, at least 1.
    pub node_gpus: u64,
    /// What a node sends to others, through all its network cards, bytes a second.
    pub node_bytes_per_sec: f64,
    /// What a GPU sends to others of its node, bytes a second.
    pub gpu_bytes_per_sec: f64,
    /// What a GPU computes at most in the compute dtype, operations a second.
    pub peak_flops: f64,
    /// Share of it that training reaches.
    pub mfu: f64,
}

/// What ranks do together with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// Every rank gets the sum.
    AllReduce,
    /// Every rank gets its part of the sum.
    ReduceScatter,
    /// Every rank gets the parts of all.
    AllGather,
}

/// How long something takes, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Time {
    /// All of it.
    pub secs: f64,
    /// What of it does not depend on the number of bytes.
    pub latency_secs: f64,
}

impl std::ops::Add for Time {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { secs: self.secs + other.secs, latency_secs: self.latency_secs + other.latency_secs }
    }
}

impl std::iter::Sum for Time {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| sum + one)
    }
}

impl std::ops::Mul<f64> for Time {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { secs: self.secs * factor, latency_secs: self.latency_secs * factor }
    }
}

impl Collective {
    /// Bytes that each of `world` ranks sends for a buffer of `bytes`, by a ring: the least possible.
    pub fn sent_bytes(self, bytes: u64, world: u64) -> f64 {
        let once = bytes as f64 * (world - 1) as f64 / world as f64;
        if self == Self::AllReduce { 2.0 * once } else { once }
    }
}

impl Cluster {
    /// Nodes, the last perhaps not full.
    pub fn nodes(&self) -> u64 {
        self.world.div_ceil(self.node_gpus)
    }

    /// How long `collective` takes for a buffer of `bytes`.
    pub fn time(&self, collective: Collective, bytes: u64) -> Time {
        let ring = self.ring(bytes);
        if collective != Collective::AllReduce {
            return ring;
        }
        // NCCL takes the faster of a reduce-scatter with an all-gather, and a tree up and down.
        let (twice, tree) = (ring * 2.0, self.tree(bytes));
        if twice.secs <= tree.secs { twice } else { tree }
    }

    /// Once around: every rank sends one part after the other.
    fn ring(&self, bytes: u64) -> Time {
        let steps_between = (self.nodes() - 1) as f64;
        let steps_inside = (self.world - 1) as f64 - steps_between;
        let latency_secs = steps_inside * RING_STEP_IN_NODE + steps_between * RING_STEP_BETWEEN_NODES;
        let sent = Collective::ReduceScatter.sent_bytes(bytes, self.world);
        Time { secs: latency_secs + sent / self.bandwidth(), latency_secs }
    }

    fn tree(&self, bytes: u64) -> Time {
        let inside = (self.node_gpus.min(self.world) - 1) as f64;
        let between = (self.nodes() as f64).log2().ceil();
        let latency_secs = 2.0 * (inside * TREE_STEP_IN_NODE + between * TREE_STEP_BETWEEN_NODES);
        let sent = if self.world == 1 { 0.0 } else { 2.0 * bytes as f64 };
        Time { secs: latency_secs + sent / (TREE_BANDWIDTH * self.bandwidth()), latency_secs }
    }

    /// What the narrowest part of a ring carries: rings run through every link inside a node, and together
    /// through all network cards of a node.
    fn bandwidth(&self) -> f64 {
        match (self.nodes(), self.node_gpus) {
            (1, _) => self.gpu_bytes_per_sec,
            (_, 1) => self.node_bytes_per_sec,
            _ => self.gpu_bytes_per_sec.min(self.node_bytes_per_sec),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(world: u64) -> Cluster {
        Cluster {
            world,
            node_gpus: 8,
            node_bytes_per_sec: 100e9,
            gpu_bytes_per_sec: 400e9,
            peak_flops: 1e15,
            mfu: 0.4,
        }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * b.abs().max(1e-9)
    }

    #[test]
    fn each_rank_sends_all_parts_but_one() {
        assert!(close(Collective::ReduceScatter.sent_bytes(1000, 4), 750.0));
        assert!(close(Collective::AllReduce.sent_bytes(1000, 4), 1500.0));
        assert!(close(Collective::AllGather.sent_bytes(1000, 1), 0.0));
    }

    #[test]
    fn the_narrowest_link_decides() {
        let gib = 1 << 30;
        // 7 steps within a node at 400 GB/s.
        let inside = cluster(8).time(Collective::AllGather, gib);
        assert!(close(inside.latency_secs, 7.0 * 1.9e-6));
        assert!(close(inside.secs - inside.latency_secs, gib as f64 * 7.0 / 8.0 / 400e9));
        // 15 steps, one of them between two nodes, at 100 GB/s.
        let between = cluster(16).time(Collective::ReduceScatter, gib);
        assert!(close(between.latency_secs, 14.0 * 1.9e-6 + 4.0e-6));
        assert!(close(between.secs - between.latency_secs, gib as f64 * 15.0 / 16.0 / 100e9));
        assert_eq!(cluster(1).time(Collective::AllReduce, gib), Time::default());
    }

    #[test]
    fn small_sums_go_by_a_tree_and_large_ones_by_a_ring() {
        let cluster = cluster(1024);
        let small = cluster.time(Collective::AllReduce, 1 << 20);
        assert!(close(small.latency_secs, 2.0 * (7.0 * 1.2e-6 + 7.0 * 8.5e-6)));
        let large = cluster.time(Collective::AllReduce, 1 << 34);
        assert!(close(large.secs, 2.0 * cluster.time(Collective::AllGather, 1 << 34).secs));
    }
}
