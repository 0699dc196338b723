//! Keys and values of the rows a decoder has seen, for generation.
//!
//! Only for use without a graph: rows are written in place. Called by the decoder's attention.
//!
//! Dimension letters: m key and value heads, c rows there is room for, h head width, t new rows.

use tch::{Device, Kind, Tensor};

/// Keys and values of one sequence in all blocks of a decoder. Its room doubles when it is full.
pub struct KvCache {
    layers: Vec<LayerCache>,
}

/// Keys and values of one sequence in one block.
pub(super) struct LayerCache {
    k_1mch: Tensor,
    v_1mch: Tensor,
    rows: i64,
}

impl KvCache {
    /// An empty cache with room for `rows` rows.
    pub(super) fn new(layers: i64, kv_heads: i64, head_dim: i64, rows: i64, kind: (Kind, Device)) -> Self {
        let room = || Tensor::empty([1, kv_heads, rows.max(1), head_dim], kind);
        let layer = |_| LayerCache { k_1mch: room(), v_1mch: room(), rows: 0 };
        Self { layers: (0..layers).map(layer).collect() }
    }

    /// Rows seen so far, which is the position of the next one.
    pub fn rows(&self) -> i64 {
        self.layers.first().map_or(0, |layer| layer.rows)
    }
}

/// One block's parts of the caches of several sequences.
pub(super) struct LayerCaches<'a> {
    pub(super) caches: &'a mut [KvCache],
    pub(super) layer: usize,
}

impl LayerCaches<'_> {
    /// The parts, in the order of the sequences.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut LayerCache> {
        self.caches.iter_mut().map(|cache| &mut cache.layers[self.layer])
    }
}

impl LayerCache {
    /// Adds `k_tmh` and `v_tmh` `[t, m, h]`, and gives all keys and values `[1, m, rows, h]`.
    pub(super) fn append(&mut self, k_tmh: &Tensor, v_tmh: &Tensor) -> (Tensor, Tensor) {
        let (start, new) = (self.rows, k_tmh.size()[0]);
        self.rows += new;
        let held = |room: &mut Tensor, x_tmh: &Tensor, rows: i64| {
            if rows > room.size()[2] {
                let [_, heads, old, head_dim] = room.size()[..] else {
                    unreachable!("room has four dimensions")
                };
                let wider =
                    room.new_empty([1, heads, rows.max(2 * old), head_dim], (room.kind(), room.device()));
                wider.narrow(2, 0, start).copy_(&room.narrow(2, 0, start));
                *room = wider;
            }
            room.narrow(2, start, new).copy_(&x_tmh.transpose(0, 1).unsqueeze(0));
            room.narrow(2, 0, rows)
        };
        let rows = self.rows;
        (held(&mut self.k_1mch, k_tmh, rows), held(&mut self.v_1mch, v_tmh, rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_growth() {
        let mut cache = KvCache::new(2, 3, 4, 2, (Kind::Float, Device::Cpu));
        let all = Tensor::arange(7 * 3 * 4, (Kind::Float, Device::Cpu)).reshape([7, 3, 4]);
        for (start, rows) in [(0, 2), (2, 1), (3, 4)] {
            for layer in &mut cache.layers {
                let k_tmh = all.narrow(0, start, rows);
                let (k, v) = layer.append(&k_tmh, &(&k_tmh + 0.5));
                let expected = all.narrow(0, 0, start + rows).transpose(0, 1).unsqueeze(0);
                assert!(k.equal(&expected));
                assert!(v.equal(&(expected + 0.5)));
            }
        }
        assert_eq!(cache.rows(), 7);
    }
}
