//! What records say to TensorBoard: values of its `scalars`, `histograms`, `images` and `text` plugins.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tracing::warn;

use super::super::record::{Record, figures};
use super::proto::{
    Dim, Event, Histogram, Image, Metadata, PluginData, Shape, Shown, Summary, Tensor, Value, What,
};
use crate::eval::Generation;

/// What the tags of texts about the run itself begin with.
pub(super) const ABOUT: &str = "run";
const PICTURES: &str = "eval/pictures/";
const ANSWERS: &str = "eval/answers/";
/// Ends of histogram buckets are this factor apart, from the first one on, as those of TensorFlow.
const GROWTH: f64 = 1.1;
const FIRST_LIMIT: f64 = 1e-12;

/// What there is to show of a record. Pictures of samples that are not `pictured` yet come with their first answers.
pub(super) fn of_record(
    record: &Record,
    pictures: &BTreeMap<String, PathBuf>,
    pictured: &mut BTreeSet<String>,
) -> Summary {
    let scalar = |(tag, figure): (String, f64)| value(tag, Shown::Scalar(figure as f32));
    let mut values: Vec<Value> = figures(&record.line).into_iter().map(scalar).collect();
    for (module, norms) in &record.grad_norms {
        values.extend(
            histogram(norms).map(|it| value(format!("train/grad_norms/{module}"), Shown::Histogram(it))),
        );
    }
    if record.line["kind"] == "eval" {
        let answers = &record.line["report"]["generations"];
        // Of another version, perhaps.
        for answer in Vec::<Generation>::deserialize(answers).unwrap_or_default() {
            if let Some(path) = pictures.get(&answer.sample)
                && !pictured.contains(&answer.sample)
                && let Some(image) = image(path)
            {
                values.push(picture(&answer, image));
                pictured.insert(answer.sample.clone());
            }
            values.push(text(format!("{ANSWERS}{}", answer.sample), &told(&answer)));
        }
    }
    Summary { value: values }
}

fn value(tag: String, shown: Shown) -> Value {
    Value { tag, metadata: None, shown: Some(shown) }
}

/// Markdown under a tag.
pub(super) fn text(tag: String, markdown: &str) -> Value {
    let plugin_data = Some(PluginData { plugin_name: "text".to_owned() });
    let tensor = Tensor {
        dtype: 7,
        shape: Some(Shape { dim: vec![Dim { size: 1 }] }),
        string_val: vec![markdown.as_bytes().to_owned()],
    };
    let metadata = Some(Metadata { plugin_data, summary_description: String::new() });
    Value { tag, metadata, shown: Some(Shown::Tensor(tensor)) }
}

/// The same, where it is to be read as it is: neither Markdown nor HTML in it means anything.
pub(in crate::events) fn verbatim(text: &str) -> String {
    let longest = text.split(|letter| letter != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}\n{}\n{fence}\n", text.trim_end_matches('\n'))
}

fn told(answer: &Generation) -> String {
    let Generation { question, truth, answer, .. } = answer;
    let [question, truth, answer] = [question, truth, answer].map(|text| verbatim(text));
    format!("**Question**\n\n{question}\n**Truth**\n\n{truth}\n**Answer**\n\n{answer}")
}

fn picture(answer: &Generation, image: Image) -> Value {
    let caption =
        format!("**Question**\n\n{}\n**Truth**\n\n{}", verbatim(&answer.question), verbatim(&answer.truth));
    let plugin_data = Some(PluginData { plugin_name: "images".to_owned() });
    let metadata = Some(Metadata { plugin_data, summary_description: caption });
    Value { metadata, ..value(format!("{PICTURES}{}", answer.sample), Shown::Image(image)) }
}

/// A picture that cannot be read is none.
fn image(path: &Path) -> Option<Image> {
    let encoded = match fs::read(path) {
        Ok(encoded) => encoded,
        Err(error) => {
            warn!("{}: {error}; TensorBoard is not shown it", path.display());
            return None;
        }
    };
    let (height, width) = jpeg_size(&encoded)?;
    Some(Image { height: height.into(), width: width.into(), colorspace: 3, encoded_image_string: encoded })
}

/// Height and width from the frame header of a JPEG file (ITU T.81, B.2.2).
fn jpeg_size(file: &[u8]) -> Option<(u16, u16)> {
    let mut rest = file.strip_prefix(&[0xff, 0xd8])?;
    loop {
        let &[0xff, marker, high, low, ..] = rest else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        // Frames are C0 to CF, but for three segments of other kinds.
        if (0xc0..=0xcf).contains(&marker) && ![0xc4, 0xc8, 0xcc].contains(&marker) {
            let &[_, _, _, _, _, y1, y0, x1, x0, ..] = rest else { return None };
            return Some((u16::from_be_bytes([y1, y0]), u16::from_be_bytes([x1, x0])));
        }
        rest = rest.get(2 + length..)?;
    }
}

/// The samples whose pictures a record has.
pub(super) fn pictured(event: &Event) -> impl Iterator<Item = String> {
    values(event).iter().filter_map(|value| value.tag.strip_prefix(PICTURES).map(str::to_owned))
}

/// The texts of a record, by tag.
pub(super) fn texts(event: &Event) -> impl Iterator<Item = (String, Vec<u8>)> {
    values(event).iter().filter_map(|value| match &value.shown {
        Some(Shown::Tensor(tensor)) => Some((value.tag.clone(), tensor.string_val.first()?.clone())),
        _ => None,
    })
}

fn values(event: &Event) -> &[Value] {
    match &event.what {
        Some(What::Summary(summary)) => &summary.value,
        _ => &[],
    }
}

/// Of norms that are numbers; none without any.
fn histogram(norms: &[f64]) -> Option<Histogram> {
    let norms: Vec<f64> = norms.iter().copied().filter(|norm| norm.is_finite()).collect();
    let (min, max) = (norms.iter().copied().reduce(f64::min)?, norms.iter().copied().reduce(f64::max)?);
    // The first bucket is for what is no more than its limit.
    let bucket_of = |norm: f64| ((norm / FIRST_LIMIT).ln() / GROWTH.ln()).ceil().max(0.0) as usize;
    let (first, last) = (bucket_of(min), bucket_of(max));
    let mut bucket = vec![0.0; last - first + 1];
    for norm in &norms {
        bucket[bucket_of(*norm) - first] += 1.0;
    }
    let limit = |index: usize| FIRST_LIMIT * GROWTH.powi(index as i32);
    Some(Histogram {
        min,
        max,
        num: norms.len() as f64,
        sum: norms.iter().sum(),
        sum_squares: norms.iter().map(|norm| norm * norm).sum(),
        bucket_limit: (first..=last).map(limit).collect(),
        bucket,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_hold_every_norm() {
        let Histogram { min, max, num, sum, sum_squares, bucket_limit, bucket } =
            histogram(&[0.0, 2.0, 2.01, f64::NAN, 4.0]).unwrap();
        assert_eq!((min, max, num), (0.0, 4.0, 4.0));
        assert!((sum - 8.01).abs() < 1e-9 && (sum_squares - 24.0401).abs() < 1e-9);
        assert_eq!((bucket.len(), bucket.iter().sum::<f64>()), (bucket_limit.len(), 4.0));
        let last = bucket_limit[bucket_limit.len() - 1];
        assert!((4.0 * (1.0 - 1e-9)..4.0 * GROWTH).contains(&last) && bucket[0] > 0.5, "{last}");
        assert!(histogram(&[]).is_none() && histogram(&[f64::INFINITY]).is_none());
    }

    #[test]
    fn text_is_shown_as_it_is() {
        assert_eq!(verbatim("a *b*\n"), "```\na *b*\n```\n");
        assert_eq!(verbatim("````\n<b>"), "`````\n````\n<b>\n`````\n");
    }

    #[test]
    fn the_size_of_a_picture_is_in_its_frame_header() {
        let app0 = [0xff, 0xe0, 0, 4, 1, 2];
        let table = [0xff, 0xc4, 0, 3, 9];
        let frame = [0xff, 0xc0, 0, 17, 8, 0, 32, 1, 64, 3];
        let file = [&[0xff, 0xd8][..], &app0, &table, &frame].concat();
        assert_eq!(jpeg_size(&file), Some((32, 320)));
        for cut in 0..file.len() - 1 {
            assert_eq!(jpeg_size(&file[..cut]), None, "{cut}");
        }
    }
}
