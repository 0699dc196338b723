//! The n-grams of a sample's answers: what is counted of a text.
//!
//! Words are those of Unicode (UAX #29) in lower case, without the punctuation between them. Where a script writes no
//! spaces, as in Chinese, its characters are the words.

use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;

use crate::rng::Key;

/// The words of a sample's answers and their n-grams, each n-gram once.
#[derive(Debug)]
pub(super) struct Ngrams {
    words: Vec<String>,
    grams: Vec<(u64, Range<usize>)>,
}

impl Ngrams {
    /// The n-grams of these answers, none of which reaches from one answer into the next. An answer of fewer than
    /// `n` words is one n-gram, and one without any word (`:-)`) is one word.
    pub(super) fn of(answers: &[String], n: usize) -> Self {
        let (mut words, mut grams) = (Vec::new(), Vec::new());
        for answer in answers {
            let begin = words.len();
            let text = answer.to_lowercase();
            words.extend(text.unicode_words().map(str::to_owned));
            if words.len() == begin {
                words.push(text.trim().to_owned());
            }
            let length = n.min(words.len() - begin);
            for first in begin..=words.len() - length {
                let place = first..first + length;
                grams.push((hash(&words[place.clone()]), place));
            }
        }
        grams.sort_unstable_by_key(|(hash, place)| (*hash, place.start));
        grams.dedup_by_key(|(hash, _)| *hash);
        Self { words, grams }
    }

    /// The hashes of all of them, in ascending order.
    pub(super) fn hashes(&self) -> impl ExactSizeIterator<Item = u64> {
        self.grams.iter().map(|(hash, _)| *hash)
    }

    /// The text of n-gram number `index`.
    pub(super) fn text(&self, index: usize) -> String {
        self.words[self.grams[index].1.clone()].join(" ")
    }
}

/// 64 bits that are the same on every machine and in every release.
fn hash(words: &[String]) -> u64 {
    let word = |word: &String| Key::new(0).with_name(word).bits(0);
    words.iter().fold(Key::new(words.len() as u64), |key, text| key.with(word(text))).bits(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(answers: &[&str], n: usize) -> Vec<String> {
        let answers: Vec<String> = answers.iter().map(|&answer| answer.to_owned()).collect();
        let grams = Ngrams::of(&answers, n);
        let mut texts: Vec<String> = (0..grams.hashes().len()).map(|index| grams.text(index)).collect();
        texts.sort_unstable();
        texts
    }

    #[test]
    fn words_have_neither_case_nor_punctuation() {
        assert_eq!(texts(&["A dog, it's \"BIG\"."], 2), ["a dog", "dog it's", "it's big"]);
        assert_eq!(texts(&["In 1.5 m"], 1), ["1.5", "in", "m"]);
    }

    #[test]
    fn an_ngram_counts_once_and_stays_in_its_answer() {
        assert_eq!(texts(&["no no no no"], 2), ["no no"]);
        assert_eq!(texts(&["a b", "c d"], 2), ["a b", "c d"]);
        assert_eq!(texts(&["a b", "A, b!"], 2), ["a b"]);
    }

    #[test]
    fn a_short_text_is_one_ngram() {
        assert_eq!(texts(&["Red fish"], 4), ["red fish"]);
        assert_eq!(texts(&[" :-) "], 4), [":-)"]);
    }

    #[test]
    fn characters_are_the_words_of_scripts_without_spaces() {
        assert_eq!(texts(&["红色的鱼。"], 3), ["红 色 的", "色 的 鱼"]);
    }

    #[test]
    fn hashes_are_fixed_for_good() {
        // Weights that are written again must be the same.
        let hash = |words: &[&str]| hash(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        assert_eq!(hash(&["a", "photo"]), PINNED);
        assert_ne!(hash(&["a", "photo"]), hash(&["photo", "a"]));
        assert_ne!(hash(&["a", "b"]), hash(&["ab"]));
    }

    const PINNED: u64 = 10_377_902_457_980_999_494;
}
