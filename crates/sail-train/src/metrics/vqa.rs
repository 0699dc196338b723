//! VQA accuracy (Antol et al. 2015, arXiv 1505.00468, section 5): an answer is right as far as people gave it too.
//!
//! The normalisation of answers is that of the challenge's `vqaEval.py`, with what is odd about it: an apostrophe stays,
//! every full stop without a digit after it goes, and `none` is a number. Of the people's answers it takes punctuation
//! alone away, and only where they differ.

/// Each of them alone, and all of them where one stands next to a space or a comma between digits.
const PUNCTUATION: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!',
];
const ARTICLES: [&str; 3] = ["a", "an", "the"];
const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];
/// Words that are written in this way where one of their apostrophes is left out.
const CONTRACTIONS: &str = "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've \
     hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've \
     mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've \
     somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've \
     something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't \
     we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's \
     who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll \
     you're you've";
/// The one that goes the other way there.
const REVERSED: (&str, &str) = ("somebody'd", "somebodyd");

/// How right an answer is, in `[0, 1]`: over all choices of all people's answers but one, the mean of a third for each
/// that it equals, at most 1.
///
/// That takes four answers. Of fewer, one that it equals makes it right.
pub fn vqa_accuracy(answer: &str, truths: &[String]) -> f64 {
    let answer = normalised_answer(answer);
    let differ = truths.windows(2).any(|pair| pair[0] != pair[1]);
    let as_compared = |truth: &String| if differ { without_punctuation(truth) } else { truth.clone() };
    let equal = |truth: &&String| as_compared(truth) == answer;
    let (equals, all) = (truths.iter().filter(equal).count(), truths.len());
    if all < 4 {
        let right =
            truths.iter().any(|truth| as_compared(truth) == answer || normalised_answer(truth) == answer);
        return f64::from(u8::from(right));
    }
    let share = |equals: usize| (equals as f64 / 3.0).min(1.0);
    // Without one of those that are equal, and without one of the others.
    let (with, without) = (equals as f64, (all - equals) as f64);
    (with * share(equals.saturating_sub(1)) + without * share(equals)) / all as f64
}

/// An answer as it is compared: punctuation and articles gone, numbers as digits, apostrophes where they belong.
pub fn normalised_answer(answer: &str) -> String {
    let line = answer.replace(['\n', '\t'], " ");
    let text = without_punctuation(line.trim()).to_lowercase();
    let words = text.split_whitespace().map(|word| {
        let number = NUMBERS.iter().find(|(name, _)| *name == word);
        number.map_or(word, |(_, digits)| digits)
    });
    let words: Vec<&str> = words.filter(|word| !ARTICLES.contains(word)).map(contracted).collect();
    words.join(" ")
}

fn contracted(word: &str) -> &str {
    if word == REVERSED.0 {
        return REVERSED.1;
    }
    let leaves_one_out = |whole: &&str| {
        let apostrophes = whole.match_indices('\'');
        apostrophes.into_iter().any(|(at, _)| {
            whole.len() == word.len() + 1
                && word.starts_with(&whole[..at])
                && word.ends_with(&whole[at + 1..])
        })
    };
    CONTRACTIONS.split_whitespace().find(leaves_one_out).unwrap_or(word)
}

fn without_punctuation(text: &str) -> String {
    let number = text.as_bytes().windows(3);
    let has_comma_in_number =
        number.into_iter().any(|at| at[0].is_ascii_digit() && at[1] == b',' && at[2].is_ascii_digit());
    let mut out = text.to_owned();
    for mark in PUNCTUATION {
        let at_space = text.contains(&format!("{mark} ")) || text.contains(&format!(" {mark}"));
        out = out.replace(mark, if at_space || has_comma_in_number { "" } else { " " });
    }
    let followed_by_digit = |at: usize| out[at + 1..].starts_with(|next: char| next.is_ascii_digit());
    let kept = out.char_indices().filter(|(at, char)| *char != '.' || followed_by_digit(*at));
    kept.map(|(_, char)| char).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_than_four_answers_are_compared_one_by_one() {
        let truths = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let percent = |answer, texts: &[&str]| (100.0 * vqa_accuracy(answer, &truths(texts))).round() as i64;
        assert_eq!(percent("The  cat.", &["cat"]), 100);
        assert_eq!(percent("two", &["2"]), 100);
        assert_eq!(percent("2", &["Two"]), 100);
        assert_eq!(percent("dog", &["cat", "bird"]), 0);
        assert_eq!(percent("dog", &[]), 0);
        // Twice a third, and twice two thirds.
        assert_eq!(percent("yes", &["yes", "yes", "no", "no"]), 50);
    }
}
