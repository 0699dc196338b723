//! Reads shards as packs, stops, and goes on from where it was.
//!
//! `cargo run --release --example stream -- 'data/demo/caption-train-*.tar' configs/tiny/tokenizer.json`

use std::env;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use sail_data::{
    DataSpec, ImageSpec, ImageTokens, Length, Loader, LoaderOptions, LossWeight, Pack, SourceSpec, Template,
    TextEncoder, TextSpec,
};

fn main() -> ExitCode {
    match run(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [shards, tokenizer] = args else {
        return Err("two arguments are needed\n\nhint: stream SHARDS TOKENIZER.json".into());
    };
    let [start, context, end] = ["<img>", "<IMG_CONTEXT>", "</img>"].map(str::to_owned);
    let text = TextSpec {
        template: Template::Chatml,
        template_file: None,
        system: None,
        image_tokens: ImageTokens { start, context, end },
        loss_weight: LossWeight::Token,
    };
    // An image is one tile of 112 pixels, which the model makes 16 tokens of.
    let image = ImageSpec::square(112, 16);
    let spec = DataSpec {
        length: Length::Endless,
        streams: 2,
        seed: 42,
        tokens_per_pack: 256,
        shuffle_buffer: 32,
        pack_buffer: 8,
        ..DataSpec::in_order(vec![SourceSpec::new("photos", vec![shards.clone()])], text, image)
    };
    let encoder = Arc::new(TextEncoder::new(Path::new(tokenizer), &spec.text)?);
    let mut loader = Loader::new(&spec, Arc::clone(&encoder), LoaderOptions::alone(2), None)?;
    for _ in 0..3 {
        print(&next(&mut loader)?);
    }

    // What a checkpoint keeps of the data is this position; nothing is read again to come to it.
    let position = loader.position();
    let expected = next(&mut loader)?;
    let mut resumed = Loader::new(&spec, encoder, LoaderOptions::alone(1), Some(position))?;
    let found = next(&mut resumed)?;
    print(&found);
    if found != expected {
        return Err("a resumed stream gives another pack".into());
    }
    println!("the resumed stream gives the same pack");
    Ok(())
}

/// The pack of the next stream; streams of this length do not end.
fn next(loader: &mut Loader) -> Result<Pack, Box<dyn Error>> {
    Ok(loader.next_pack()?.pack.ok_or("the stream has ended")?)
}

fn print(pack: &Pack) {
    let (samples, tokens, images) = (pack.samples.len(), pack.ids.len(), pack.images.len());
    let learnt = pack.answer_tokens();
    println!(
        "{samples} samples, {tokens} tokens, {learnt} learnt, {images} images; first {}",
        pack.samples[0]
    );
}
