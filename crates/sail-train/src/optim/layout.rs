//! How trained parameters lie in flat buckets, and which part of a bucket belongs to which rank.
//!
//! Pure: names and shapes in, places out. Every rank computes the same layout from the configuration, so a
//! bucket is one collective whatever the batch holds. Called by the optimizer, and by the estimate of what a
//! stage needs.

use std::cmp::Ordering;
use std::ops::Range;

use crate::config::Module;
use crate::error::Result;
use crate::stage::module_of;

/// Elements that each parameter's place and each rank's part are a multiple of, so that kernels find the
/// alignment that they like: 128 bytes in bf16.
pub const ALIGN: i64 = 64;

/// A parameter in a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Full parameter name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its elements in the bucket.
    pub range: Range<i64>,
}

/// Parameters one after the other. What no entry covers is zero and stays so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// In the order of their places.
    pub entries: Vec<Entry>,
    /// Length, a multiple of [`ALIGN`] times the number of ranks.
    pub numel: i64,
    key: Key,
}

/// What buckets never mix, in the order in which a forward pass needs them: modules, and in each what lies
/// outside the blocks before what lies in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    module: Module,
    in_block: bool,
}

impl Layout {
    /// The part of the bucket that `rank` of `world` owns.
    pub fn shard(&self, rank: usize, world: usize) -> Range<i64> {
        let part = self.numel / world as i64;
        rank as i64 * part..(rank as i64 + 1) * part
    }

    /// What `part` of the bucket holds of each entry: the entry's index, and the elements in the bucket.
    pub fn pieces(&self, part: &Range<i64>) -> impl Iterator<Item = (usize, Range<i64>)> {
        self.entries.iter().enumerate().filter_map(move |(index, entry)| {
            let common = entry.range.start.max(part.start)..entry.range.end.min(part.end);
            (common.start < common.end).then_some((index, common))
        })
    }

    /// The module whose parameters it holds.
    pub fn module(&self) -> Module {
        self.key.module
    }

    /// Whether it holds parameters of blocks; otherwise what a forward pass may need from its beginning.
    pub fn is_in_blocks(&self) -> bool {
        self.key.in_block
    }

    /// The order in which a forward pass needs buckets.
    pub fn cmp_forward(&self, other: &Self) -> Ordering {
        let first = |layout: &Self| layout.entries[0].name.clone();
        self.key.cmp(&other.key).then_with(|| natural_order(&first(self), &first(other)))
    }
}

/// Cuts parameters into buckets of at most `limit` elements for `world` ranks, in the order in which a forward
/// pass needs them. One that is larger has a bucket of its own. `blocks` says how the names of each block's
/// parameters begin.
///
/// # Errors
/// [`Error::FreezePlan`](crate::Error::FreezePlan) for a name outside the modules.
pub fn cut<'a>(
    params: impl IntoIterator<Item = (&'a str, Vec<i64>)>,
    blocks: &[String],
    limit: i64,
    world: usize,
) -> Result<Vec<Layout>> {
    let keyed = params.into_iter().map(|(name, shape)| {
        let in_block = blocks.iter().any(|block| name.starts_with(block.as_str()));
        Ok((Key { module: module_of(name)?, in_block }, name, shape))
    });
    let mut params = keyed.collect::<Result<Vec<_>>>()?;
    params.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| natural_order(a.1, b.1)));
    let mut buckets: Vec<Layout> = Vec::new();
    for (key, name, shape) in params {
        let numel: i64 = shape.iter().product();
        let fits = |bucket: &Layout| bucket.key == key && round_up(bucket.numel, ALIGN) + numel <= limit;
        if !buckets.last().is_some_and(fits) {
            buckets.push(Layout { entries: Vec::new(), numel: 0, key });
        }
        let bucket = buckets.last_mut().expect("invariant: one was pushed where there was none");
        let start = round_up(bucket.numel, ALIGN);
        bucket.entries.push(Entry { name: name.to_owned(), shape, range: start..start + numel });
        bucket.numel = start + numel;
    }
    for bucket in &mut buckets {
        bucket.numel = round_up(bucket.numel, ALIGN * world as i64);
    }
    Ok(buckets)
}

fn round_up(value: i64, multiple: i64) -> i64 {
    (value + multiple - 1) / multiple * multiple
}

/// Sorted by name, with numbers between dots compared as numbers: layer 2 comes before layer 10.
fn natural_order(a: &str, b: &str) -> Ordering {
    let part = |(a, b): (&str, &str)| match (a.parse::<u64>(), b.parse::<u64>()) {
        (Ok(a), Ok(b)) => a.cmp(&b),
        (Ok(_), Err(_)) => Ordering::Less,
        (Err(_), Ok(_)) => Ordering::Greater,
        (Err(_), Err(_)) => a.cmp(b),
    };
    let parts = a.split('.').zip(b.split('.')).map(part);
    parts.fold(Ordering::Equal, Ordering::then).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(buckets: &[Layout]) -> Vec<Vec<&str>> {
        buckets.iter().map(|b| b.entries.iter().map(|entry| entry.name.as_str()).collect()).collect()
    }

    #[test]
    fn buckets_follow_the_forward_pass_and_never_mix_modules_or_blocks() {
        let blocks = ["llm.layers.2.", "llm.layers.10.", "vision.layers.0."].map(str::to_owned);
        let params = [
            "llm.norm",
            "llm.layers.10.w",
            "llm.embed",
            "projector.w",
            "vision.layers.0.w",
            "llm.layers.2.w",
            "llm.layers.2.b",
        ];
        let shaped = params.map(|name| (name, vec![10, 10]));
        let buckets = cut(shaped, &blocks, 1 << 20, 2).unwrap();
        assert_eq!(
            names(&buckets),
            [
                vec!["vision.layers.0.w"],
                vec!["projector.w"],
                vec!["llm.embed", "llm.norm"],
                vec!["llm.layers.2.b", "llm.layers.2.w", "llm.layers.10.w"],
            ]
        );
        assert_eq!(buckets[3].entries[1].range, 128..228);
        assert_eq!((buckets[3].numel, buckets[3].shard(1, 2)), (384, 192..384));
        assert!(buckets.is_sorted_by(|a, b| a.cmp_forward(b).is_lt()));
        assert!(cut([("head.w", vec![1])], &blocks, 1, 1).is_err());
    }

    #[test]
    fn a_large_parameter_has_a_bucket_of_its_own() {
        let params = [("llm.a", vec![10]), ("llm.b", vec![1000]), ("llm.c", vec![10]), ("llm.d", vec![10])];
        let buckets = cut(params, &[], 100, 1).unwrap();
        assert_eq!(names(&buckets), [vec!["llm.a"], vec!["llm.b"], vec!["llm.c", "llm.d"]]);
    }

    proptest! {
        /// Every element of every parameter belongs to exactly one rank.
        #[test]
        fn shards_cover_every_parameter_once(
            sizes in prop::collection::vec(1i64..3000, 1..40),
            limit in 1i64..5000,
            world in 1usize..9,
        ) {
            let names: Vec<String> = (0..sizes.len()).map(|i| format!("llm.layers.{i}.w")).collect();
            let params = names.iter().zip(&sizes).map(|(name, size)| (name.as_str(), vec![*size]));
            let buckets = cut(params, &[], limit, world).unwrap();
            let mut covered = std::collections::BTreeMap::<&str, i64>::new();
            for bucket in &buckets {
                prop_assert!(bucket.numel % (ALIGN * world as i64) == 0);
                prop_assert!(bucket.entries.len() == 1 || bucket.entries.last().unwrap().range.end <= limit);
                prop_assert!(bucket.entries.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start));
                let mut end = 0;
                for rank in 0..world {
                    let shard = bucket.shard(rank, world);
                    prop_assert_eq!(shard.start, end);
                    end = shard.end;
                    for (index, piece) in bucket.pieces(&shard) {
                        let entry = &bucket.entries[index];
                        prop_assert!(entry.range.start <= piece.start && piece.end <= entry.range.end);
                        *covered.entry(&entry.name).or_default() += piece.end - piece.start;
                    }
                }
                prop_assert_eq!(end, bucket.numel);
            }
            for (name, size) in names.iter().zip(&sizes) {
                prop_assert_eq!(covered[name.as_str()], *size);
            }
        }
    }
}
