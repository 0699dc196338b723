//! A stage whose models are on a hub: a local server that answers as one does.

#[path = "../../../crates/sail-model/tests/hub/server.rs"]
mod server;

use std::path::Path;
use std::process::Output;

use server::{COMMIT, Faults, Server};

use crate::{root, run, sail_train, stderr, under};

/// The tiny language model as a folder's files.
fn exported(dir: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let set = under(dir);
    run(&["--config", "configs/tiny/stage1.yaml", "--set", &set, "--stop-at", "1"], 3);
    let (checkpoint, out) = (dir.join("runs/tiny/stage1"), dir.join("llm"));
    let [checkpoint, out] = [&checkpoint, &out].map(|path| path.to_str().unwrap());
    run(&["export", "--checkpoint", checkpoint, "--what", "llm", "--out", out], 0);
    let read = |name: &'static str| (name, std::fs::read(Path::new(out).join(name)).unwrap());
    ["config.json", "model.safetensors", "tokenizer.json"].map(read).to_vec()
}

#[test]
fn a_stage_fetches_its_language_model() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&exported(dir.path()));
    let stage = dir.path().join("stage.yaml");
    let text = format!(
        "extends: {}\nmodel: {{ llm: {{ from: \"hf:org/name\", random: null, tokenizer: null }} }}\n",
        root().join("configs/tiny/stage1.yaml").display()
    );
    std::fs::write(&stage, text).unwrap();
    let start = |endpoint: &str, offline: &str, name: &str, options: &[&str]| -> Output {
        let (root, run_dir) = (under(dir.path()), format!("run.dir={name}"));
        let config = stage.to_str().unwrap();
        let args = ["--config", config, "--set", &root, "--set", &run_dir];
        let mut command = sail_train(&[&args[..], options].concat());
        for proxy in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(proxy);
        }
        for unset in ["HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
            command.env_remove(unset);
        }
        let home = dir.path().join("hf");
        command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env("HF_HUB_OFFLINE", offline);
        command.output().unwrap()
    };
    let train =
        |endpoint: &str, offline: &str, name: &str| start(endpoint, offline, name, &["--stop-at", "1"]);

    // Without the models nothing starts.
    server.set(Faults { status: Some((401, "RepoNotFound")), ..Faults::default() });
    let refused = train(&server.endpoint, "0", "refused");
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("`hf:org/name`: the server answered 401"), "{}", stderr(&refused));
    let cold = train(&server.endpoint, "1", "cold");
    assert_eq!(cold.status.code(), Some(2), "{}", stderr(&cold));
    assert!(stderr(&cold).contains("HF_HUB_OFFLINE is set"), "{}", stderr(&cold));

    server.set(Faults::default());
    // Planning needs the shapes alone.
    server.requests();
    let planned = start(&server.endpoint, "0", "planned", &["--dry-run", "--world", "8"]);
    assert_eq!(planned.status.code(), Some(0), "{}", stderr(&planned));
    assert!(String::from_utf8_lossy(&planned.stdout).contains("llm 3.67M frozen"));
    let requests = server.requests().join("\n");
    assert!(requests.contains("/config.json"), "{requests}");
    assert!(!requests.contains("safetensors") && !requests.contains("tokenizer"), "{requests}");

    let first = train(&server.endpoint, "0", "first");
    assert_eq!(first.status.code(), Some(3), "{}", stderr(&first));
    assert!(stderr(&first).contains("fetching `model.safetensors` of `hf:org/name`, "), "{}", stderr(&first));
    let is_download = |request: &&String| request.starts_with("GET /cdn/");
    assert_eq!(server.requests().iter().filter(is_download).count(), 1);
    let snapshot = dir.path().join("hf/hub/models--org--name/snapshots").join(COMMIT);
    assert!(snapshot.join("model.safetensors").is_file());
    let manifest = dir.path().join("first/step-00000001/manifest.json");
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    assert_eq!(manifest["untouched"]["llm"]["from"], "hf:org/name");
    assert_eq!(manifest["sail_version"], concat!(env!("CARGO_PKG_VERSION"), " (under test)"));
    assert_eq!(manifest["torch_version"], sail_torch::version());

    let warm = train("http://127.0.0.1:1", "1", "warm");
    assert_eq!(warm.status.code(), Some(3), "{}", stderr(&warm));
}
