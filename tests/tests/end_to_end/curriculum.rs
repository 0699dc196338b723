//! The tiny curriculum from start to export, and what it must leave behind.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use sail_model::llm::LlmConfig;
use sail_model::params::Params;
use sail_model::weights::Shards;
use sail_train::checkpoint::newest;
use sail_train::config::{self, Config, Module};
use sail_train::optim::StateKind;
use sail_train::session::Session;
use sail_train::world::World;
use serde_json::{Value, json};

use crate::{root, run, under};

#[test]
fn three_stages_train_and_export() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let args = ["--config", "configs/tiny/curriculum.yaml", "--set", &set];
    let output = run(&args, 0);
    let summary = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(summary.contains("vision + projector + llm"), "{summary}");
    assert!(summary.contains("AutoModel.from_pretrained"), "{summary}");

    held_out_loss_falls(dir.path());
    frozen_modules_are_bit_equal(&[], dir.path());
    transformers_loads_the_export(dir.path());
    a_checkpoint_evaluates_and_exports_again(dir.path());
    exports_say_where_they_come_from(dir.path());
    a_page_shows_the_stages(dir.path());

    // What an export is missing is made again; all else is left alone.
    std::fs::remove_dir_all(dir.path().join("runs/tiny/stage3/export")).unwrap();
    run(&args, 0);
    assert!(dir.path().join("runs/tiny/stage3/export/vit/config.json").exists());

    // Once finished, a second run has nothing to do and says the same.
    let again = run(&args, 0);
    assert_eq!(String::from_utf8_lossy(&again.stdout), summary);
    assert!(crate::stderr(&again).contains("already finished"));
}

fn a_page_shows_the_stages(dir: &Path) {
    let folder = dir.join("runs/tiny");
    let output = run(&["report", folder.to_str().unwrap()], 0);
    let path = folder.join("report.html");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), path.to_str().unwrap());
    let page = std::fs::read_to_string(path).unwrap();
    let data = page.split_once("id=\"data\">").unwrap().1.split_once("</script>").unwrap().0;
    let data: Value = serde_json::from_str(data).unwrap();
    let stages = data["courses"][0]["stages"].as_array().unwrap();
    let names: Vec<&Value> = stages.iter().map(|stage| &stage["name"]).collect();
    assert_eq!(names, ["tiny-stage1", "tiny-stage2", "tiny-stage3"]);
    for (before, stage) in stages.iter().enumerate() {
        assert_eq!(stage["finished"], true);
        assert_eq!(stage["lineage"]["stages"].as_array().map_or(0, Vec::len), before);
        let steps = stage["steps"].as_u64().unwrap() as usize;
        assert_eq!(stage["curve"]["loss"].as_array().unwrap().len(), steps);
        let evaluation = stage["evaluations"].as_array().unwrap().last().unwrap();
        assert_eq!(evaluation["step"], stage["steps"]);
        let answer = &evaluation["report"]["generations"][0];
        let picture = stage["pictures"][answer["sample"].as_str().unwrap()].as_str().unwrap();
        assert!(picture.starts_with("data:image/jpeg;base64,/9j/"), "{picture}");
    }
    the_page_is_served(&folder);
}

/// The server ended as soon as it had printed its address.
fn the_page_is_served(folder: &Path) {
    let mut command = crate::sail_train(&["report", folder.to_str().unwrap(), "--serve=0"]);
    let mut server = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut address = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut address).unwrap();
    let host = address.trim().strip_prefix("http://").unwrap().trim_end_matches('/').to_owned();
    let answer = TcpStream::connect(&host).and_then(|mut stream| {
        write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    });
    server.kill().unwrap();
    server.wait().unwrap();
    let answer = answer.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("tiny-stage3"), "{answer}");
}

/// The newest checkpoint of the stage before was damaged after this one had begun from it; the one before that is
/// another one, and the stage was told to be removed.
#[test]
fn a_stage_goes_on_though_what_it_began_from_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let quick =
        ["--set", &set, "--set", "eval=null", "--set", "export=null", "--set", "batch.tokens_per_pack=128"];
    let first = [&["--config", "configs/tiny/stage1.yaml"], &quick[..]].concat();
    let second = [&["--config", "configs/tiny/stage2.yaml"], &quick[..]].concat();
    run(&first, 0);
    run(&[&second[..], &["--stop-at", "2"]].concat(), 3);
    let newest = newest(&dir.path().join("runs/tiny/stage1")).unwrap().unwrap();
    let path = newest.dir().join("state.json");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[10] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let said = crate::stderr(&run(&second, 0));
    assert!(said.contains("resumes after step 2"), "{said}");
}

/// A checkpoint of a deeper model lost its upper blocks without a word.
#[test]
fn a_checkpoint_of_a_deeper_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let quick = ["--set", &set, "--set", "eval=null", "--set", "export=null", "--set", "schedule.steps=2"];
    run(&[&["--config", "configs/tiny/stage1.yaml"], &quick[..]].concat(), 0);
    let shallow = ["--set", "model.llm.random.num_hidden_layers=2"];
    let output = run(&[&["--config", "configs/tiny/stage2.yaml"], &quick[..], &shallow].concat(), 2);
    let said = crate::stderr(&output);
    assert!(
        said.contains("llm.model.layers.2.") && said.contains("which this model does not have"),
        "{said}"
    );
}

fn held_out_loss_falls(dir: &Path) {
    let path = dir.join("runs/tiny/stage3/summary.json");
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let loss = |when: &str| summary[when]["total"]["loss"].as_f64().unwrap();
    assert!(loss("after") < loss("before"), "{} is not below {}", loss("after"), loss("before"));
    assert!(summary["after"]["total"]["images"]["shuffled_image"].is_number());
    assert!(!summary["after"]["generations"].as_array().unwrap().is_empty());
}

/// Stage 1 trains the projector, stage 2 the vision encoder as well, stage 3 everything.
fn frozen_modules_are_bit_equal(sets: &[&str], dir: &Path) {
    let mut set = vec![under(dir)];
    set.extend(sets.iter().map(|set| (*set).to_owned()));
    let Config::Stage(plan) = config::load(&root().join("configs/tiny/stage1.yaml"), &set).unwrap() else {
        panic!("a stage");
    };
    std::env::set_current_dir(root()).unwrap();
    let fresh = Session::build(&plan, &Arc::new(World::alone()), None).unwrap();
    let [one, two, three] = ["stage1", "stage2", "stage3"]
        .map(|stage| newest(&dir.join("runs/tiny").join(stage)).unwrap().unwrap());
    let exact =
        [Module::Vision, Module::Projector, Module::Llm].map(|module| fresh.final_params(module).unwrap());
    let exact: Params = exact.into_iter().flatten().collect();
    let mut changed_last = 0;
    for (name, start) in fresh.model.params() {
        let [first, second, third] = [&one, &two, &three].map(|c| c.tensor(name, StateKind::Param).unwrap());
        let module = name.split('.').next().unwrap();
        let start = exact.get(name).unwrap_or(start).detach();
        assert_eq!(module != "projector", start.equal(&first), "{name} in stage 1");
        assert_eq!(module == "llm", first.equal(&second), "{name} in stage 2");
        changed_last += usize::from(!second.equal(&third));
    }
    assert_eq!(changed_last, fresh.model.params().len(), "stage 3 trains every parameter");
    for (checkpoint, trained) in [(&one, "projector."), (&two, "vision."), (&three, "llm.")] {
        let has_moments = |name: &str| checkpoint.tensor(name, StateKind::ExpAvg).is_ok();
        for name in checkpoint.names().filter(|name| name.starts_with(trained)) {
            assert!(has_moments(name), "{name}");
        }
    }
    let moments_of_frozen =
        one.names().filter(|n| n.starts_with("llm.")).filter(|n| one.tensor(n, StateKind::ExpAvg).is_ok());
    assert_eq!(moments_of_frozen.count(), 0, "frozen parameters have no optimizer state");
}

fn transformers_loads_the_export(dir: &Path) {
    let export = dir.join("runs/tiny/stage3/export/vit");
    let image = root().join("docs/images/sample.png");
    let out = dir.join("features.safetensors");
    let [vit, image, features] = [&export, &image, &out].map(|path| path.to_str().unwrap().to_owned());
    run(&["embed", "--vit", &vit, "--image", &image, "--out", &features], 0);
    let output = Command::new(root().join(".venv/bin/python"))
        .arg(root().join("scripts/check_export.py"))
        .args([&vit, "--image", &image, "--embedding", &features])
        .output()
        .expect("scripts/setup.sh --reference has made .venv");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn a_checkpoint_evaluates_and_exports_again(dir: &Path) {
    let [run_dir, json, again] =
        ["runs/tiny/stage3", "report.json", "again"].map(|path| dir.join(path).to_str().unwrap().to_owned());
    run(&["eval", "--checkpoint", &run_dir, "--json", &json], 0);
    let [report, summary] = [Path::new(&json).to_owned(), dir.join("runs/tiny/stage3/summary.json")]
        .map(|path| serde_json::from_slice::<serde_json::Value>(&std::fs::read(path).unwrap()).unwrap());
    assert_eq!(report, summary["after"], "the same weights on the same samples");

    let llm = dir.join("llm");
    run(&["export", "--checkpoint", &run_dir, "--what", "llm", "--out", llm.to_str().unwrap()], 0);
    let source = Shards::open(&llm).unwrap();
    let checkpoint = newest(Path::new(&run_dir)).unwrap().unwrap();
    for name in checkpoint.names().filter(|name| name.starts_with("llm.")) {
        let trained = checkpoint.tensor(name, StateKind::Param).unwrap();
        let read = source.tensor(&name["llm.".len()..]).unwrap();
        assert!(read.equal(&trained), "{name}");
    }
    let trained = checkpoint.names().filter(|name| name.starts_with("llm.")).count();
    assert_eq!(source.names().count(), trained);
    assert_eq!(LlmConfig::read(&llm).unwrap().model_type(), "qwen3");

    run(&["export", "--checkpoint", &run_dir, "--out", &again], 0);
    let [first, second] = [dir.join("runs/tiny/stage3/export/vit"), again.into()]
        .map(|path| std::fs::read(path.join("model.safetensors")).unwrap());
    assert!(first == second, "the same weights are exported");
}

/// Every export names the stages that its weights went through, and no folder of this machine.
fn exports_say_where_they_come_from(dir: &Path) {
    let read = |path: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.join(path).join("config.json")).unwrap()).unwrap()
    };
    let checkpoint = newest(&dir.join("runs/tiny/stage3")).unwrap().unwrap();
    let lineage = &read("runs/tiny/stage3/export/vit")["sail_lineage"];
    assert_eq!(lineage["weights"], json!({"vision": "random", "projector": "random", "llm": "random"}));
    let stages = lineage["stages"].as_array().unwrap();
    let of = |field: &str| stages.iter().map(|stage| stage[field].clone()).collect::<Vec<Value>>();
    assert_eq!(of("run"), ["tiny-stage1", "tiny-stage2", "tiny-stage3"]);
    for (stage, (name, field)) in stages.iter().zip([("stage1", 0), ("stage2", 1), ("stage3", 2)]) {
        let ended = newest(&dir.join("runs/tiny").join(name)).unwrap().unwrap();
        assert_eq!(stage["checkpoint"], ended.seal(), "{name}");
        assert_eq!(stage["step"], ended.state().step, "{name}");
        assert_eq!(stage["samples"], ended.state().totals.samples, "{name}");
        assert_eq!(checkpoint.lineage().stages[field].seal, ended.seal(), "{name}");
    }
    assert!(!lineage.to_string().contains(dir.to_str().unwrap()), "{lineage}");
    let run_dir = dir.join("runs/tiny/stage3").display().to_string();
    for (what, layout) in [("llm", "transformers"), ("mllm", "sail"), ("vit", "transformers")] {
        let out = dir.join(format!("again-{what}"));
        let out = out.to_str().unwrap();
        run(&["export", "--checkpoint", &run_dir, "--what", what, "--layout", layout, "--out", out], 0);
        assert_eq!(&read(&format!("again-{what}"))["sail_lineage"], lineage, "{what}");
    }
    // A stage that begins with an export says where that came from.
    let vit = dir.join("runs/tiny/stage3/export/vit");
    let (set, from) =
        (under(&dir.join("next")), format!("model.vision={{from: {}, image_px: 112}}", vit.display()));
    let quick = ["eval=null", "schedule.steps=1", "schedule.warmup=0", "export={vit: transformers}"];
    let mut args = vec!["--config", "configs/tiny/stage1.yaml", "--set", &set, "--set", &from];
    args.extend(quick.iter().flat_map(|set| ["--set", set]));
    run(&args, 0);
    let next = &read("next/runs/tiny/stage1/export/vit")["sail_lineage"];
    assert_eq!(next["weights"]["vision"], json!({"from": "vit", "sail_lineage": lineage}));
    assert_eq!(next["stages"].as_array().unwrap().len(), 1);
}

/// In bf16 the masters and the frozen weights stay exact: nothing is rounded on the way from stage to
/// stage or into the export.
#[test]
fn in_bf16_frozen_weights_stay_exact() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let mut args = vec!["--config", "configs/tiny/curriculum.yaml", "--set", &set];
    let sets = ["run.precision=bf16", "schedule.steps=2", "schedule.warmup=1", "eval.samples=2"];
    args.extend(sets.iter().flat_map(|set| ["--set", set]));
    run(&args, 0);
    frozen_modules_are_bit_equal(&sets, dir.path());
    let last = newest(&dir.path().join("runs/tiny/stage3")).unwrap().unwrap();
    let export = Shards::open(&dir.path().join("runs/tiny/stage3/export/vit")).unwrap();
    for name in last.names().filter(|name| name.starts_with("vision.")) {
        let master = last.tensor(name, StateKind::Param).unwrap();
        let exported = export.tensor(&name["vision.".len()..]).unwrap();
        assert!(exported.equal(&master), "{name}");
    }
}

#[test]
fn a_mistake_in_the_last_stage_stops_before_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let curriculum = ["--config", "configs/tiny/curriculum.yaml", "--set", &set, "--set"];
    let wrong_shards = "stages[2].data.sources=[{name: gone, shards: data/demo/gone-*.tar}]";
    let error = crate::stderr(&run(&[&curriculum[..], &[wrong_shards]].concat(), 2));
    assert!(error.contains("tiny-stage3") && error.contains("gone-*.tar"), "{error}");
    let wrong_key = "stages[2].model.vision.random.hidden_sise=3";
    let error = crate::stderr(&run(&[&curriculum[..], &[wrong_key]].concat(), 2));
    assert!(error.contains("`model.vision.random.hidden_sise`"), "{error}");
    assert!(!dir.path().join("runs").exists(), "nothing was trained");
}
