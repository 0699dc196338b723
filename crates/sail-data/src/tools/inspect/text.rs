//! A sample in the terminal.

use std::fmt::Write;

use image::RgbImage;
use image::imageops::{FilterType, resize};

use super::{Kind, Piece, View};
use crate::tools::page::{one_line, printable};

/// Whether escape sequences are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Paint(pub(crate) bool);

impl Paint {
    const BOLD: &'static str = "1";
    const DIM: &'static str = "2";
    const GREEN: &'static str = "32";
    const MAGENTA: &'static str = "35";

    fn wrap(self, codes: &str, text: &str) -> String {
        if self.0 && !codes.is_empty() { format!("\u{1b}[{codes}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.wrap(Self::BOLD, text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.wrap(Self::DIM, text)
    }
}

/// Everything but the tiles.
pub(crate) fn report(view: &View, paint: Paint) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{} {}", paint.bold("sample"), one_line(&view.id.key));
    let _ = writeln!(out, "{} {}", paint.bold("shard "), one_line(&view.id.shard));
    let _ = writeln!(out, "\n{}", paint.bold("turns"));
    for turn in &view.turns {
        let text = printable(&turn.text).replace('\n', "\n             ");
        let _ = writeln!(out, "  {:<9}  {text}", turn.role.name());
    }
    let _ = writeln!(out, "\n{}", paint.bold("images"));
    for image in &view.images {
        let thumbnail = if image.thumbnail { " and a thumbnail" } else { "" };
        let _ = writeln!(
            out,
            "  {}  {} x {} px -> {} x {} tiles{thumbnail}: {} in all, {} visual tokens",
            one_line(&image.name),
            image.width,
            image.height,
            image.columns,
            image.rows,
            image.tiles,
            image.visual_tokens
        );
    }
    if view.images.is_empty() {
        out.push_str("  none\n");
    }
    tokens(&mut out, view, paint);
    out
}

fn tokens(out: &mut String, view: &View, paint: Paint) {
    let counts = &view.counts;
    if view.pieces.is_empty() {
        let _ = writeln!(out, "\n{}: {}", paint.bold("visual tokens"), counts.visual);
        out.push_str("text was not tokenised; `--tokenizer FILE` shows its tokens\n");
        return;
    }
    let _ = writeln!(
        out,
        "\n{}: {}, of which {} visual and {} learnt with weights of {} in all",
        paint.bold("tokens"),
        counts.tokens,
        counts.visual,
        counts.answers,
        counts.weight
    );
    let marks = if paint.0 { "learnt text is green" } else { "learnt text stands between ⟦ and ⟧" };
    let _ = writeln!(out, "{}\n", paint.dim(&format!("{marks}, its loss weight follows in brackets")));
    let mut begin = 0;
    while begin < view.pieces.len() {
        // A run of pieces with the same label and weight is marked once.
        let weight = view.pieces[begin].weight.map(f32::to_bits);
        let same = |piece: &&Piece| piece.weight.map(f32::to_bits) == weight;
        let run = view.pieces[begin..].iter().take_while(same).count();
        let pieces = &view.pieces[begin..begin + run];
        let text: String = pieces.iter().map(|piece| show(piece, paint)).collect();
        match pieces[0].weight {
            Some(weight) if paint.0 => {
                let _ = write!(out, "{text}{}", paint.dim(&format!("[{weight}]")));
            }
            Some(weight) => {
                let _ = write!(out, "⟦{text}⟧[{weight}]");
            }
            None => out.push_str(&text),
        }
        begin += run;
    }
    if !out.ends_with('\n') {
        out.push('\n');
    }
}

fn show(piece: &Piece, paint: Paint) -> String {
    let learnt = if piece.weight.is_some() { Paint::GREEN } else { "" };
    let text = printable(&piece.text);
    match piece.kind {
        Kind::Text => paint.wrap(learnt, &text),
        Kind::Special if learnt.is_empty() => paint.wrap(Paint::BOLD, &text),
        Kind::Special => paint.wrap(&format!("{};{learnt}", Paint::BOLD), &text),
        Kind::Visual => paint.wrap(Paint::MAGENTA, &format!("{text} x {}", piece.ids.len())),
    }
}

/// The tiles as they lie in their images, two pixels a character, at most `columns` characters wide.
pub(crate) fn tiles(view: &View, columns: usize) -> String {
    let mut out = String::new();
    let mut rest = view.tiles.as_slice();
    for image in &view.images {
        let Some((mine, others)) = rest.split_at_checked(image.tiles) else { break };
        rest = others;
        let _ = writeln!(out, "{}", one_line(&image.name));
        let across = image.columns.max(1);
        // Room for a column of space between tiles; an even height fills whole characters.
        let side = ((columns.min(96) + 1) / across).saturating_sub(1).clamp(4, 32) as u32 & !1;
        for row in mine.chunks(across) {
            draw_row(&mut out, row, side);
        }
        out.push('\n');
    }
    out
}

fn draw_row(out: &mut String, tiles: &[RgbImage], side: u32) {
    let small: Vec<RgbImage> =
        tiles.iter().map(|tile| resize(tile, side, side, FilterType::Triangle)).collect();
    for y in (0..side).step_by(2) {
        for tile in &small {
            for x in 0..side {
                let ([r, g, b], [s, h, c]) = (tile.get_pixel(x, y).0, tile.get_pixel(x, y + 1).0);
                let _ = write!(out, "\u{1b}[38;2;{r};{g};{b};48;2;{s};{h};{c}m▀");
            }
            out.push_str("\u{1b}[0m ");
        }
        out.push('\n');
    }
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(text: &str, kind: Kind, weight: Option<f32>, n: usize) -> Piece {
        Piece { ids: vec![1; n], text: text.into(), kind, weight }
    }

    fn view(pieces: Vec<Piece>) -> View {
        View {
            id: crate::SampleId { source: "s".into(), shard: "a.tar".into(), key: "a\u{1b}".into() },
            turns: Vec::new(),
            pieces,
            images: Vec::new(),
            tiles: Vec::new(),
            counts: super::super::Counts { tokens: 6, visual: 4, answers: 2, weight: 1.0 },
        }
    }

    #[test]
    fn labels_show_with_and_without_colour() {
        let pieces = vec![
            piece("<IMG_CONTEXT>", Kind::Visual, None, 4),
            piece("yes", Kind::Text, Some(0.5), 1),
            piece("<|im_end|>", Kind::Special, Some(0.5), 1),
        ];
        let plain = report(&view(pieces.clone()), Paint(false));
        assert!(plain.ends_with("<IMG_CONTEXT> x 4⟦yes<|im_end|>⟧[0.5]\n"), "{plain}");
        assert!(!plain.contains('\u{1b}'), "neither colours nor the sample's own escapes");
        let coloured = report(&view(pieces), Paint(true));
        assert!(coloured.contains("\u{1b}[32myes\u{1b}[0m\u{1b}[1;32m<|im_end|>\u{1b}[0m"), "{coloured:?}");
    }

    #[test]
    fn tiles_are_drawn_side_by_side() {
        let mut view = view(Vec::new());
        view.tiles = vec![RgbImage::from_pixel(8, 8, image::Rgb([1, 2, 3])); 3];
        view.images = vec![crate::tools::access::PictureFacts {
            name: "a.png".into(),
            width: 16,
            height: 8,
            columns: 2,
            rows: 1,
            thumbnail: true,
            tiles: 3,
            visual_tokens: 12,
        }];
        let drawn = tiles(&view, 20);
        let widths: Vec<usize> = drawn.lines().map(|line| line.matches('▀').count()).collect();
        assert_eq!(widths, [0, 16, 16, 16, 16, 0, 8, 8, 8, 8, 0, 0]);
    }
}
