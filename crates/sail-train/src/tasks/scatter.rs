//! Two clouds of points as a picture: an SVG file that any browser shows.

use std::fmt::Write;

use tch::Tensor;

use crate::error::Result;

/// Most points that are drawn of a cloud.
const MOST: usize = 2000;
/// Of the square in which they are drawn, pixels.
const SIDE: f64 = 480.0;
const MARGIN: f64 = 48.0;

/// Draws visual tokens over embeddings of words, both `[n, 2]`; of larger clouds every so many-th point.
///
/// # Errors
/// Those of libtorch.
pub(super) fn scatter(title: &str, visual_v2: &Tensor, words_m2: &Tensor) -> Result<String> {
    let clouds = [("words", "#5b7a99", words_m2), ("visual tokens", "#d9722b", visual_v2)];
    let mut drawn = Vec::new();
    for (name, colour, cloud) in clouds {
        drawn.push((name, colour, cloud.size()[0], points(cloud)?));
    }
    let all = || drawn.iter().flat_map(|(_, _, _, points)| points);
    let range = |axis: usize| {
        let low = all().map(|point| point[axis]).fold(f64::INFINITY, f64::min);
        let high = all().map(|point| point[axis]).fold(f64::NEG_INFINITY, f64::max);
        (low, high)
    };
    let ranges = [range(0), range(1)];
    // One scale for both axes, so that distances are what they look like.
    let widest = ranges.iter().map(|(low, high)| high - low).fold(f64::MIN_POSITIVE, f64::max);
    let place = |point: &[f64; 2]| {
        let at = |axis: usize| {
            let (low, high) = ranges[axis];
            (point[axis] - low.midpoint(high)) / widest * SIDE
        };
        (MARGIN + SIDE / 2.0 + at(0), MARGIN + SIDE / 2.0 - at(1))
    };
    let size = SIDE + 2.0 * MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{size}\" height=\"{size}\" viewBox=\"0 0 {size} {size}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <rect x=\"{MARGIN}\" y=\"{MARGIN}\" width=\"{SIDE}\" height=\"{SIDE}\" fill=\"none\" stroke=\"#ccc\"/>\n\
         <text x=\"{MARGIN}\" y=\"20\">{title}</text>\n"
    );
    let mut add = |text: String| svg.write_str(&text).expect("invariant: a string takes all text");
    for (i, (name, colour, count, points)) in drawn.iter().enumerate() {
        let x = MARGIN + 200.0 * i as f64;
        let shown =
            if points.len() as i64 == *count { String::new() } else { format!(", {} shown", points.len()) };
        add(format!(
            "<circle cx=\"{}\" cy=\"35\" r=\"4\" fill=\"{colour}\"/><text x=\"{}\" y=\"40\">{count} {name}{shown}</text>\n",
            x + 5.0,
            x + 14.0
        ));
        add(format!("<g fill=\"{colour}\" fill-opacity=\"0.45\">\n"));
        for point in points {
            let (x, y) = place(point);
            add(format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2\"/>\n"));
        }
        add("</g>\n".to_owned());
    }
    let [(left, right), (bottom, top)] = ranges;
    add(format!(
        "<text x=\"{MARGIN}\" y=\"{}\">first component {left:.3} to {right:.3}, second {bottom:.3} to {top:.3}; one scale</text>\n</svg>\n",
        size - 18.0
    ));
    Ok(svg)
}

/// At most [`MOST`] points, evenly spread over the rows.
fn points(cloud_n2: &Tensor) -> Result<Vec<[f64; 2]>> {
    let rows = Vec::<f64>::try_from(cloud_n2.f_contiguous()?.f_flatten(0, 1)?)?;
    let every = (rows.len() / 2).div_ceil(MOST).max(1);
    Ok(rows.chunks_exact(2).step_by(every).map(|row| [row[0], row[1]]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_inside_the_frame_on_one_scale() {
        let visual = Tensor::from_slice(&[0.0, 0.0, 4.0, 1.0]).reshape([2, 2]);
        let words =
            Tensor::arange(10_000, (tch::Kind::Double, tch::Device::Cpu)).reshape([5000, 2]) / 10_000.0;
        let svg = scatter("both", &visual, &words).unwrap();
        assert!(
            svg.contains("5000 words, 1667 shown") && svg.contains(">2 visual tokens<"),
            "{}",
            &svg[..900]
        );
        assert_eq!(svg.matches("r=\"2\"").count(), 1667 + 2);
        // Four wide and one high: the whole width, a quarter of the height.
        assert!(svg.contains("cx=\"48.0\" cy=\"348.0\"") && svg.contains("cx=\"528.0\" cy=\"228.0\""));
        let alone = scatter("one point", &visual.narrow(0, 0, 1), &visual.narrow(0, 0, 1)).unwrap();
        assert!(alone.contains("cx=\"288.0\" cy=\"288.0\"") && !alone.contains("NaN"), "{alone}");
    }
}
