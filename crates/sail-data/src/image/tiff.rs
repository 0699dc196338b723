//! Pages of TIFF files: header, count, pixels.
//!
//! The `tiff` crate reads directories and the usual compressions. Strips and tiles of JPEG and fax data are
//! taken out and decoded by `jpeg` and `fax`, so that they equal libtiff's, which uses libjpeg-turbo too.
//! Not supported: palettes, planes, CIE colours, floating point.

use std::collections::BTreeSet;
use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};
use tiff::decoder::{ChunkType, Decoder, DecodingResult, Limits};
use tiff::tags::Tag;
use tiff::{ColorType, TiffResult};

use super::color::cmyk_to_rgb;
use super::fax::{self, Scheme};
use super::jpeg;
use super::resize::Size;

const FAX3: u16 = 3;
const FAX4: u16 = 4;
const JPEG: u16 = 7;
const WHITE_IS_ZERO: u16 = 0;
const RGB: u16 = 2;
const YCBCR: u16 = 6;

type Page<'a> = Decoder<Cursor<&'a [u8]>>;

/// Size and orientation of a page.
pub(super) fn header(bytes: &[u8], page: usize) -> Result<(Size, Orientation), String> {
    let mut decoder = open(bytes, page)?;
    let (width, height) = decoder.dimensions().map_err(text)?;
    let orientation = u8::try_from(number(&mut decoder, Tag::Orientation, 1)).ok();
    let orientation = orientation.and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms);
    Ok((Size { height: height as usize, width: width as usize }, orientation))
}

/// Number of pages.
pub(super) fn pages(bytes: &[u8]) -> Result<usize, String> {
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(text)?;
    let mut seen = BTreeSet::new();
    let mut next = decoder.ifd_pointer();
    while let Some(pointer) = next {
        if !seen.insert(pointer.0) {
            return Err("its pages follow each other in a circle".into());
        }
        next = decoder.read_directory(pointer).map_err(text)?.next();
    }
    Ok(seen.len())
}

fn open(bytes: &[u8], page: usize) -> Result<Page<'_>, String> {
    let mut decoder = Decoder::new(Cursor::new(bytes)).map_err(text)?;
    if page > 0 {
        let pages = pages(bytes)?;
        if page >= pages {
            return Err(format!("it has {pages} pages, and page {page} (counted from 0) is asked for"));
        }
        decoder.seek_to_image(page).map_err(text)?;
    }
    Ok(decoder)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn text(error: tiff::TiffError) -> String {
    error.to_string()
}

/// A tag that holds one small number.
fn number(decoder: &mut Page, tag: Tag, default: u16) -> u16 {
    decoder.find_tag_unsigned(tag).ok().flatten().unwrap_or(default)
}

/// All pixels of a page, at most `max_bytes` at once.
pub(super) fn decode(
    bytes: &[u8],
    page: usize,
    max_pixels: u64,
    max_bytes: u64,
) -> Result<DynamicImage, String> {
    let mut limits = Limits::default();
    limits.decoding_buffer_size = max_bytes as usize;
    limits.intermediate_buffer_size = max_bytes as usize;
    let mut decoder = open(bytes, page)?.with_limits(limits);
    let compression = number(&mut decoder, Tag::Compression, 1);
    match compression {
        FAX3 | FAX4 => {
            let white_is_zero = number(&mut decoder, Tag::PhotometricInterpretation, 0) == WHITE_IS_ZERO;
            // Bit 0: rows refer to the row above, as in group 4.
            let options = decoder.find_tag_unsigned::<u32>(Tag::Unknown(292)).ok().flatten().unwrap_or(0);
            if compression == FAX3 && options & 1 == 1 {
                return Err("two-dimensional group 3 fax is not supported".into());
            }
            let scheme = if compression == FAX3 { Scheme::Group3 } else { Scheme::Group4 };
            let reversed = number(&mut decoder, Tag::FillOrder, 1) == 2;
            from_chunks(&mut decoder, bytes, |data, size| {
                fax::decode(data, scheme, reversed, white_is_zero, size)
            })
        }
        JPEG => {
            let head = jpeg_head(&mut decoder)?;
            from_chunks(&mut decoder, bytes, |data, _| {
                let data = data.strip_prefix(&[0xff, 0xd8]).unwrap_or(data);
                jpeg::decode(&[&head, data].concat(), max_pixels, max_bytes)
            })
        }
        _ => raster(&mut decoder),
    }
}

/// What stands before the data of each strip: the tables that the strips share, and Adobe's marker, which
/// says whether the colours are YCbCr, because that is a matter of the TIFF tags here.
fn jpeg_head(decoder: &mut Page) -> Result<Vec<u8>, String> {
    let mut head = vec![0xff, 0xd8];
    let colours = number(decoder, Tag::PhotometricInterpretation, 0);
    if matches!(colours, RGB | YCBCR) {
        head.extend([0xff, 0xee, 0, 14]);
        head.extend(b"Adobe\0\x64\0\0\0\0");
        head.push(u8::from(colours == YCBCR));
    }
    if let Some(tables) = decoder.find_tag(Tag::JPEGTables).map_err(text)? {
        let tables = tables.into_u8_vec().map_err(text)?;
        let tables = tables.strip_prefix(&[0xff, 0xd8]).and_then(|tables| tables.strip_suffix(&[0xff, 0xd9]));
        head.extend(tables.ok_or("its JPEG tables are broken")?);
    }
    Ok(head)
}

/// Pixels of a strip or tile that any page may have, however small it is.
const MOST_CHUNK_PIXELS: u64 = 1 << 24;

/// Puts a page together from its strips or tiles, decoded one by one.
fn from_chunks(
    decoder: &mut Page,
    bytes: &[u8],
    decode: impl Fn(&[u8], Size) -> Result<RgbImage, String>,
) -> Result<DynamicImage, String> {
    let (width, height) = decoder.dimensions().map_err(text)?;
    let (chunk_width, chunk_height) = decoder.chunk_dimensions();
    let (offsets, lengths) = chunk_places(decoder).map_err(text)?;
    let across = width.div_ceil(chunk_width.max(1)).max(1);
    let rows = height.div_ceil(chunk_height.max(1));
    if offsets.len() != lengths.len() || offsets.len() as u64 != u64::from(across) * u64::from(rows) {
        return Err(format!("it has {} pieces of data for {across}x{rows} places", offsets.len()));
    }
    let mut page = RgbImage::new(width, height);
    for (index, (&offset, &length)) in offsets.iter().zip(&lengths).enumerate() {
        let (left, top) = (index as u32 % across * chunk_width, index as u32 / across * chunk_height);
        let data = offset.checked_add(length).and_then(|end| bytes.get(offset as usize..end as usize));
        let data = data.ok_or("the file is truncated: a strip ends beyond it")?;
        // Rows of a tile that lie beyond the page are not asked for.
        let size = Size { height: chunk_height.min(height - top) as usize, width: chunk_width as usize };
        if size.area() as u64 > MOST_CHUNK_PIXELS.max(4 * u64::from(width) * u64::from(height)) {
            return Err(format!("a strip claims {chunk_width}x{chunk_height} pixels"));
        }
        let chunk = decode(data, size)?;
        let (visible_width, visible_height) = (chunk_width.min(width - left), chunk_height.min(height - top));
        if chunk.width() < visible_width || chunk.height() < visible_height {
            return Err(format!("a strip has {}x{} pixels", chunk.width(), chunk.height()));
        }
        for row in 0..visible_height {
            let from = (row * chunk.width()) as usize * 3;
            let to = ((top + row) as usize * width as usize + left as usize) * 3;
            let count = visible_width as usize * 3;
            page.as_mut()[to..to + count].copy_from_slice(&chunk.as_raw()[from..from + count]);
        }
    }
    Ok(page.into())
}

fn chunk_places(decoder: &mut Page) -> TiffResult<(Vec<u64>, Vec<u64>)> {
    let (offsets, lengths) = match decoder.get_chunk_type() {
        ChunkType::Strip => (Tag::StripOffsets, Tag::StripByteCounts),
        ChunkType::Tile => (Tag::TileOffsets, Tag::TileByteCounts),
    };
    Ok((decoder.get_tag_u64_vec(offsets)?, decoder.get_tag_u64_vec(lengths)?))
}

/// A page in one of the compressions of the `tiff` crate.
fn raster(decoder: &mut Page) -> Result<DynamicImage, String> {
    let (width, height) = decoder.dimensions().map_err(text)?;
    let color = decoder.colortype().map_err(text)?;
    if number(decoder, Tag::PlanarConfiguration, 1) == 2 && color.num_samples() > 1 {
        return Err("colours in separate planes are not supported".into());
    }
    let data = decoder.read_image().map_err(text)?;
    let image = match (color, data) {
        (ColorType::Gray(bits @ (1 | 2 | 4)), DecodingResult::U8(data)) => {
            let values = unpack(&data, usize::from(bits), width as usize);
            image::GrayImage::from_raw(width, height, values).map(DynamicImage::from)
        }
        (ColorType::Gray(8), DecodingResult::U8(data)) => {
            image::GrayImage::from_raw(width, height, data).map(DynamicImage::from)
        }
        (ColorType::Gray(16), DecodingResult::U16(data)) => {
            image::ImageBuffer::from_raw(width, height, data).map(DynamicImage::ImageLuma16)
        }
        (ColorType::RGB(8), DecodingResult::U8(data)) => {
            RgbImage::from_raw(width, height, data).map(DynamicImage::from)
        }
        (ColorType::RGB(16), DecodingResult::U16(data)) => {
            image::ImageBuffer::from_raw(width, height, data).map(DynamicImage::ImageRgb16)
        }
        (ColorType::RGBA(8), DecodingResult::U8(data)) => {
            image::RgbaImage::from_raw(width, height, data).map(DynamicImage::from)
        }
        (ColorType::RGBA(16), DecodingResult::U16(data)) => {
            image::ImageBuffer::from_raw(width, height, data).map(DynamicImage::ImageRgba16)
        }
        (ColorType::CMYK(8), DecodingResult::U8(data)) => {
            let (inks, _) = data.as_chunks();
            let pixels = inks.iter().flat_map(|&inks| cmyk_to_rgb(inks)).collect();
            RgbImage::from_raw(width, height, pixels).map(DynamicImage::from)
        }
        (color, _) => return Err(format!("TIFF of {color:?} is not supported")),
    };
    image.ok_or_else(|| "it has fewer pixels than its header says".into())
}

/// Values of fewer than 8 bits, rows of whole bytes, to the range of 8 bits.
fn unpack(data: &[u8], bits: usize, width: usize) -> Vec<u8> {
    let most = (1_u8 << bits) - 1;
    let value = |row: &[u8], x: usize| {
        let at = x * bits;
        let shift = 8 - bits - at % 8;
        (row[at / 8] >> shift & most) * (255 / most)
    };
    let rows = data.chunks_exact((width * bits).div_ceil(8));
    rows.flat_map(|row| (0..width).map(move |x| value(row, x))).collect()
}
