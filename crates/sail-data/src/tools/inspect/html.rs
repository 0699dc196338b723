//! A sample as a page, with its tiles as pictures.

use std::fmt::Write;
use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use super::{Kind, Piece, View};
use crate::tools::access::PictureFacts;
use crate::tools::page::{document, escape};

/// Shows in the page what hovering shows, for fingers.
const SCRIPT: &str = "<script>\n\
    const out=document.querySelector('output');\n\
    const tell=e=>{const t=e.target.closest('.t');if(t)out.textContent=t.title};\n\
    for(const kind of ['click','mouseover'])document.querySelector('.tokens').addEventListener(kind,tell);\n\
    </script>\n";

/// The page of a sample.
pub(crate) fn page(view: &View) -> String {
    let mut body = format!(
        "<h1>{}</h1>\n<p class=\"soft\">{} · source {}</p>\n",
        escape(&view.id.key),
        escape(&view.id.shard),
        escape(&view.id.source)
    );
    totals(&mut body, view);
    body.push_str("<h2>Turns</h2>\n");
    for turn in &view.turns {
        let _ = writeln!(body, "<div class=\"turn\"><b>{}</b>{}</div>", turn.role.name(), escape(&turn.text));
    }
    images(&mut body, view);
    tokens(&mut body, view);
    document(&format!("Sample {}", view.id.key), &body)
}

fn totals(body: &mut String, view: &View) {
    let counts = &view.counts;
    let mut cells = vec![("images", view.images.len().to_string()), ("tiles", view.tiles.len().to_string())];
    cells.push(("visual tokens", counts.visual.to_string()));
    if !view.pieces.is_empty() {
        cells.push(("tokens", counts.tokens.to_string()));
        cells.push(("learnt tokens", counts.answers.to_string()));
        cells.push((
            "sum of loss weights",
            format!("{:.4}", counts.weight).trim_end_matches('0').trim_end_matches('.').to_owned(),
        ));
    }
    body.push_str("<div class=\"totals\">\n");
    for (label, value) in cells {
        let _ = writeln!(body, "<div class=\"total\"><b>{value}</b><span>{label}</span></div>");
    }
    body.push_str("</div>\n");
}

fn images(body: &mut String, view: &View) {
    body.push_str("<h2>Images as the encoder sees them</h2>\n");
    if view.images.is_empty() {
        body.push_str("<p class=\"soft\">none</p>\n");
    }
    let mut rest = view.tiles.as_slice();
    for image in &view.images {
        let Some((mine, others)) = rest.split_at_checked(image.tiles) else { break };
        rest = others;
        figure(body, image, mine);
    }
}

fn figure(body: &mut String, image: &PictureFacts, tiles: &[RgbImage]) {
    let name = escape(&image.name);
    let thumbnail = if image.thumbnail { " and a thumbnail" } else { "" };
    let _ = write!(
        body,
        "<figure><figcaption><b>{name}</b> · {} × {} px · {} × {} tiles{thumbnail} · {} visual tokens</figcaption>\
         <div class=\"picture\"><div class=\"grid\" style=\"grid-template-columns:repeat({},1fr);max-width:{}px\">",
        image.width,
        image.height,
        image.columns,
        image.rows,
        image.visual_tokens,
        image.columns,
        image.columns * 224
    );
    let grid = tiles.len() - usize::from(image.thumbnail);
    for (n, tile) in tiles[..grid].iter().enumerate() {
        picture(body, tile, &format!("tile {} of {name}", n + 1));
    }
    body.push_str("</div>");
    if let Some(tile) = tiles.get(grid) {
        body.push_str("<div class=\"thumb\">");
        picture(body, tile, &format!("thumbnail of {name}"));
        body.push_str("</div>");
    }
    body.push_str("</div></figure>\n");
}

fn picture(body: &mut String, tile: &RgbImage, label: &str) {
    let (width, height) = tile.dimensions();
    let mut png = Cursor::new(Vec::new());
    match PngEncoder::new(&mut png).write_image(tile.as_raw(), width, height, ExtendedColorType::Rgb8) {
        Ok(()) => {
            let data = STANDARD.encode(png.into_inner());
            let _ = write!(
                body,
                "<img src=\"data:image/png;base64,{data}\" width=\"{width}\" height=\"{height}\" alt=\"{label}\">"
            );
        }
        Err(error) => {
            let _ = write!(body, "<p>{label}: {}</p>", escape(&error.to_string()));
        }
    }
}

fn tokens(body: &mut String, view: &View) {
    // The line at the foot stays in sight as long as its section does.
    body.push_str("<section>\n<h2>Tokens</h2>\n");
    if view.pieces.is_empty() {
        body.push_str("<p class=\"soft\">Text was not tokenised: no tokenizer was given.</p>\n</section>\n");
        return;
    }
    body.push_str(
        "<div class=\"legend\"><span><span class=\"a\">learnt</span> a loss falls on it</span>\
         <span><span class=\"s\">special</span> written by the template</span>\
         <span><span class=\"v\">visual</span> in the place of an image</span></div>\n<div class=\"tokens\">",
    );
    for piece in &view.pieces {
        span(body, piece);
    }
    body.push_str(
        "</div>\n<output aria-live=\"polite\">Point at a token, or touch it.</output>\n</section>\n",
    );
    body.push_str(SCRIPT);
}

fn span(body: &mut String, piece: &Piece) {
    let mut class = String::from("t");
    match piece.kind {
        Kind::Text => {}
        Kind::Special => class.push_str(" s"),
        Kind::Visual => class.push_str(" v"),
    }
    if piece.weight.is_some() {
        class.push_str(" a");
    }
    let ids: Vec<String> = match piece.kind {
        Kind::Visual => vec![format!("{} x {}", piece.ids[0], piece.ids.len())],
        _ => piece.ids.iter().map(ToString::to_string).collect(),
    };
    let label = match piece.weight {
        Some(weight) => format!("learnt, weight {weight}"),
        None => "not learnt".to_owned(),
    };
    let text = match piece.kind {
        Kind::Visual => format!("{} × {}", piece.text, piece.ids.len()),
        _ => piece.text.clone(),
    };
    // A line break is a token like others: it shows, and breaks the line behind it.
    let text = escape(&text).replace('\n', "↵\n");
    let _ = write!(body, "<span class=\"{class}\" title=\"id {} · {label}\">{text}</span>", ids.join(" "));
}
