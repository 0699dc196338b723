//! Answers compared with what the data says, letter by letter.

use strsim::levenshtein;
use unicode_segmentation::UnicodeSegmentation;

/// Similarity below which ANLS gives nothing (Biten et al. 2019, arXiv 1905.13648, section 4).
const ANLS_THRESHOLD: f64 = 0.5;

/// Whether an answer is one of the truths, apart from case and from white space around and between words.
pub fn exact_match(answer: &str, truths: &[String]) -> bool {
    let answer = folded(answer);
    truths.iter().any(|truth| folded(truth) == answer)
}

/// Average normalised Levenshtein similarity of one answer, in `[0, 1]`: of the truth it is closest to, 0 where half
/// of the longer text or more would have to change (Biten et al. 2019, arXiv 1905.13648, equation 1). Case, and white
/// space around and between words, do not count.
pub fn anls(answer: &str, truths: &[String]) -> f64 {
    let answer = folded(answer);
    truths.iter().map(|truth| similarity(&answer, &folded(truth))).fold(0.0, f64::max)
}

fn similarity(answer: &str, truth: &str) -> f64 {
    let longest = answer.chars().count().max(truth.chars().count());
    if longest == 0 {
        return 1.0;
    }
    let distance = levenshtein(answer, truth) as f64 / longest as f64;
    if distance < ANLS_THRESHOLD { 1.0 - distance } else { 0.0 }
}

/// Edits that make the truth of an answer, and the truth's characters: a character error rate is the sum of the one
/// over the sum of the other, over all samples. White space around both does not count; of several truths the one
/// with the smallest rate is taken.
///
/// Characters are code points, as those of jiwer. An empty truth has as many errors as the answer has characters.
pub fn char_errors(answer: &str, truths: &[String]) -> (usize, usize) {
    let answer = answer.trim();
    let of = |truth: &String| (levenshtein(answer, truth.trim()), truth.trim().chars().count());
    let rate = |(errors, length): (usize, usize)| errors as f64 / length.max(1) as f64;
    let best = truths.iter().map(of).min_by(|a, b| rate(*a).total_cmp(&rate(*b)));
    best.unwrap_or((answer.chars().count(), 0))
}

/// In lower case, with single spaces between words.
pub(crate) fn folded(text: &str) -> String {
    text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The words of a text in lower case, in any script (UAX #29), without punctuation.
pub(super) fn unicode_words(text: &str) -> Vec<String> {
    text.to_lowercase().unicode_words().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truths(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn case_and_spaces_do_not_make_an_answer_wrong() {
        assert!(exact_match("  A  red\nCar ", &truths(&["no", "a red car"])));
        assert!(!exact_match("a red car.", &truths(&["a red car"])));
        assert!(!exact_match("", &truths(&["yes"])));
        assert!(!exact_match("yes", &[]));
    }

    #[test]
    fn half_of_a_text_may_not_change() {
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        close(anls("Hello", &truths(&["hallo"])), 0.8);
        close(anls("ab", &truths(&["ac"])), 0.0);
        close(anls("abc", &truths(&["xyz", "ABD"])), 2.0 / 3.0);
        close(anls("", &truths(&[""])), 1.0);
        close(anls("", &truths(&["a"])), 0.0);
    }

    #[test]
    fn errors_are_counted_in_characters() {
        assert_eq!(char_errors(" Straße\n", &truths(&["Strasse"])), (2, 7));
        assert_eq!(char_errors("kitten", &truths(&["dog", "sitting"])), (3, 7));
        assert_eq!(char_errors("abc", &truths(&[""])), (3, 0));
    }

    #[test]
    fn words_are_those_of_unicode() {
        assert_eq!(
            unicode_words("A red-and-white car's 3.5 m, Straße!"),
            ["a", "red", "and", "white", "car's", "3.5", "m", "straße"]
        );
        assert!(unicode_words(" ... ").is_empty());
    }
}
