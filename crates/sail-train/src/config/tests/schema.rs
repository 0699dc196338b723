//! The schema that editors use: up to date, and of one mind with what is read.

use std::fs;
use std::path::{Path, PathBuf};

use jsonschema::Validator;
use serde_json::Value;

use super::super::{load, schema};
use super::{STAGE, load_files};

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

fn validator() -> Validator {
    jsonschema::draft202012::new(&schema()).unwrap()
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            found.push(path);
        }
    }
}

#[test]
fn the_file_in_the_repository_is_this_one() {
    let kept = fs::read_to_string(configs().join("schema.json")).unwrap();
    let made = format!("{:#}\n", schema());
    assert!(kept == made, "run `target/release/sail-train config schema > configs/schema.json`");
}

/// Every file in the repository fits and has no faults, says so to editors, and names the command that runs it first.
#[test]
fn configurations_fit_and_name_their_schema() {
    let (validator, mut found) = (validator(), Vec::new());
    files(&configs(), &mut found);
    assert!(found.len() >= 9, "{found:?}");
    for path in found {
        let text = fs::read_to_string(&path).unwrap();
        let value: Value = serde_yaml::from_str(&text).unwrap();
        let faults: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(faults.is_empty(), "{}: {faults:?}", path.display());
        if let Err(faults) = load(&path, &[]) {
            panic!("{}: {faults}", path.display());
        }
        let mut lines = text.lines();
        let first = lines.next().unwrap();
        assert!(first.starts_with("# ") && first.contains("configs/"), "{}: {first}", path.display());
        let modeline = lines.next().unwrap();
        let named = modeline.strip_prefix("# yaml-language-server: $schema=").unwrap_or_default();
        let named = path.parent().unwrap().join(named);
        assert!(named.canonicalize().unwrap() == configs().join("schema.json").canonicalize().unwrap());
    }
}

/// What a plan prints is a configuration again.
#[test]
fn resolved_plans_fit() {
    let validator = validator();
    for file in ["demo/stage3.yaml", "tiny/stage1.yaml"] {
        let sets =
            ["schedule.kind=wsd", "train.unfreeze=[{at: 20%, match: llm, lr: 1e-3}]", "train.llm=frozen"];
        let sets = sets.map(str::to_owned);
        let shown = load(&configs().join(file), &sets).unwrap().to_yaml();
        let value: Value = serde_yaml::from_str(&shown).unwrap();
        let faults: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(faults.is_empty(), "{file}: {faults:?}");
    }
}

#[test]
fn slips_of_the_pen_are_underlined() {
    let validator = validator();
    let fits = |text: &str| validator.is_valid(&serde_yaml::from_str::<Value>(text).unwrap());
    assert!(fits(STAGE));
    for (old, new) in [
        ("projector: {", "projctor: {"),
        ("lr: 1e-3", "lr: fast"),
        ("{ steps: 60 }", "{ steps: 60, kind: cosin }"),
        ("{ steps: 60 }", "{ steps: 60, warmup: some }"),
        ("vision: frozen", "vision: frosty"),
        ("vision: frozen", "vision: { lr: 1e-3, betas: [0.9] }"),
        ("image_px: 112", "image_px: -5"),
        ("streams: 2", "streams: 2\n  template: chat"),
    ] {
        assert!(STAGE.contains(old), "{old}");
        assert!(!fits(&STAGE.replacen(old, new, 1)), "{new}");
    }
    // Editors and the program are of one mind.
    for (amount, is_one) in [
        ("5", true),
        ("2e1", true),
        ("2.5", false),
        ("10%", true),
        ("2.5 %", true),
        ("-5", false),
        ("\"x%\"", false),
    ] {
        let text = STAGE.replacen("{ steps: 60 }", &format!("{{ steps: 60, warmup: {amount} }}"), 1);
        assert_eq!(fits(&text), is_one, "{amount}");
        assert_eq!(load_files(&[("stage.yaml", &text)], &[]).is_ok(), is_one, "{amount}");
    }
    for (amount, is_one) in [("2_000_000 tokens", true), ("2e1 tokens", true), ("2_0.5e3 tokens", false)] {
        let text = STAGE.replacen("{ steps: 60 }", &format!("{{ tokens: 9000000000, warmup: {amount} }}"), 1);
        assert_eq!(
            (fits(&text), load_files(&[("stage.yaml", &text)], &[]).is_ok()),
            (is_one, is_one),
            "{amount}"
        );
    }
    assert!(fits("name: all\nstages: [a.yaml, b.yaml]\n"));
    assert!(!fits("name: all\nstages: [a.yaml]\nsteps: 3\n"));
    assert!(fits("extends: other.yaml\ntrain: { unfreeze: [{ at: 2e9 tokens, match: [llm, vision] }] }\n"));
}
