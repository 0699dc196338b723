//! Which candidates share a pack: a pure function of their lengths.

/// Indices of the candidates that go into a pack of at most `budget` tokens, in ascending order.
///
/// `lengths` are in order of arrival. The oldest candidate always goes first, so none waits for more packs
/// than there are candidates; then the longest that still fits, again and again (best-fit decreasing).
/// Equal lengths go by age.
pub(crate) fn choose(lengths: &[usize], budget: usize) -> Vec<usize> {
    let mut by_length: Vec<usize> = (1..lengths.len()).collect();
    by_length.sort_by_key(|&index| (std::cmp::Reverse(lengths[index]), index));
    let oldest = (!lengths.is_empty()).then_some(0);
    let mut left = budget;
    let mut chosen: Vec<usize> = oldest
        .into_iter()
        .chain(by_length)
        .filter(|&index| {
            let fits = lengths[index] <= left;
            if fits {
                left -= lengths[index];
            }
            fits
        })
        .collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_oldest_goes_first_then_the_longest_that_fit() {
        assert_eq!(choose(&[10, 70, 85, 20, 5], 100), [0, 2, 4]);
        assert_eq!(choose(&[10, 30, 30, 30, 30], 100), [0, 1, 2, 3]);
        assert_eq!(choose(&[10, 20], 5), [0_usize; 0]);
        assert_eq!(choose(&[], 5), [0_usize; 0]);
    }

    proptest! {
        #[test]
        fn a_pack_keeps_its_budget_and_leaves_nothing_that_fits(
            lengths in prop::collection::vec(1_usize..100, 0..40),
            budget in 1_usize..300,
        ) {
            let chosen = choose(&lengths, budget);
            let used: usize = chosen.iter().map(|&index| lengths[index]).sum();
            prop_assert!(used <= budget);
            prop_assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]), "no index twice");
            for index in (0..lengths.len()).filter(|index| !chosen.contains(index)) {
                prop_assert!(lengths[index] > budget - used);
            }
            if lengths.first().is_some_and(|&oldest| oldest <= budget) {
                prop_assert_eq!(chosen[0], 0);
            }
        }

        #[test]
        fn every_candidate_is_packed_once(
            lengths in prop::collection::vec(1_usize..=64, 1..80),
            buffer in 1_usize..12,
        ) {
            let mut waiting: Vec<usize> = Vec::new();
            let mut arriving = 0..lengths.len();
            let mut packed = Vec::new();
            loop {
                waiting.extend(arriving.by_ref().take(buffer - waiting.len()));
                if waiting.is_empty() {
                    break;
                }
                let candidates: Vec<usize> = waiting.iter().map(|&sample| lengths[sample]).collect();
                let chosen = choose(&candidates, 64);
                prop_assert!(!chosen.is_empty());
                for index in chosen.into_iter().rev() {
                    packed.push(waiting.remove(index));
                }
            }
            packed.sort_unstable();
            prop_assert!(packed.into_iter().eq(0..lengths.len()));
        }
    }
}
