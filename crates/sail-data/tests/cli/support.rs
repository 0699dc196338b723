//! A small data set on disk, and the command.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use image::{ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// The command, without the environment's wishes about colours.
pub(crate) fn sail_data() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sail-data"));
    command.env_remove("NO_COLOR").env_remove("SAIL_LOG").env_remove("COLUMNS");
    command
}

/// Runs it and gives (exit code, standard output, standard error).
pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = sail_data().args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().expect("it was not killed"), text(stdout), text(stderr))
}

/// Runs it, expecting success.
pub(crate) fn succeed<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> String {
    let (code, out, err) = run(args);
    assert_eq!(code, 0, "{out}\n{err}");
    out
}

pub(crate) fn demo(pattern: &str) -> String {
    format!("{}/../../data/demo/{pattern}", env!("CARGO_MANIFEST_DIR"))
}

/// A folder with images, annotations and a tokenizer.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, contents).unwrap();
        path.display().to_string()
    }

    /// `count` samples as a JSON array: of no, one or two images, with fields that must be kept; number 3 names
    /// an image that is not there, number 5 has no answer, number 7 the id of number 6.
    pub(crate) fn samples(&self, name: &str, count: usize) -> String {
        let list: Vec<Value> = (0..count).map(|n| self.sample(n)).collect();
        self.write(name, serde_json::to_vec_pretty(&list).unwrap())
    }

    fn sample(&self, n: usize) -> Value {
        let names: Vec<String> = (0..n % 3).map(|image| format!("images/{n}-{image}.JPEG")).collect();
        for name in &names {
            self.write(
                name,
                picture(
                    16 + n as u32 % 40,
                    12,
                    if n.is_multiple_of(2) { ImageFormat::Png } else { ImageFormat::Jpeg },
                ),
            );
        }
        let mut sample = json!({
            "id": format!("part/{}.x", if n == 7 { 6 } else { n }),
            "note": {"kept": [n, null, 0.1]},
            "conversations": [
                {"from": "human", "value": format!("{}Question {n}?", "<image>\n".repeat(names.len()))},
                {"from": "gpt", "value": if n == 5 { String::new() } else { format!("Answer {n}.") }},
            ],
        });
        match names.as_slice() {
            [] => {}
            [one] => sample["image"] = json!(one),
            many => sample["image"] = json!(many),
        }
        if n == 3 {
            sample["image"] = json!("images/absent.jpg");
        }
        sample
    }

    /// A tokenizer of one token a byte.
    pub(crate) fn tokenizer(&self) -> String {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: BTreeMap<String, usize> =
            alphabet.into_iter().enumerate().map(|(id, byte)| (byte.to_string(), id)).collect();
        let specials = ["<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>"];
        let added: Vec<Value> = specials
            .iter()
            .enumerate()
            .map(|(n, token)| {
                json!({"id": 256 + n, "content": token, "single_word": false, "lstrip": false,
                                     "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
            "model": {"type": "BPE", "vocab": vocab, "merges": []}
        });
        self.write("tokenizer.json", tokenizer.to_string())
    }
}

fn picture(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
    let image = RgbImage::from_fn(width, height, |x, y| Rgb([(x * 7) as u8, (y * 11) as u8, (x * y) as u8]));
    if format == ImageFormat::Jpeg {
        let (width, height) = (width as usize, height as usize);
        let (format, chroma) = (libjpeg_turbo_rs::PixelFormat::Rgb, libjpeg_turbo_rs::Subsampling::S420);
        return libjpeg_turbo_rs::compress(image.as_raw(), width, height, format, 75, chroma).unwrap();
    }
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// Names and contents of the files of a folder.
pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect()
}
