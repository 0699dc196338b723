//! Mistakes of the user end with exit code 2 and a message that says what to do.

use std::fs;
use std::process::Command;

use crate::processes::Job;
use crate::{run, sail_train, stderr, under};

/// A warning that could not be written ended the training.
#[test]
fn a_log_that_nobody_reads_ends_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let quick = [
        "--config",
        "configs/tiny/stage1.yaml",
        "--set",
        &set,
        "--set",
        "eval=null",
        "--set",
        "schedule.steps=2",
    ];
    run(&[&quick[..], &["--set", "checkpoint.every=1"]].concat(), 0);
    let newest = dir.path().join("runs/tiny/stage1/step-00000002/state.json");
    std::fs::write(newest, "{}").unwrap();
    std::fs::remove_file(dir.path().join("runs/tiny/stage1/summary.json")).unwrap();
    let mut command = crate::sail_train(&quick);
    command.stderr(std::fs::File::create("/dev/full").unwrap());
    assert_eq!(command.status().unwrap().code(), Some(0));
}

#[test]
fn the_version_names_the_commit_and_torch() {
    let said = |flag: &str| String::from_utf8(run(&[flag], 0).stdout).unwrap();
    let release = concat!("sail-train ", env!("CARGO_PKG_VERSION"), " (under test)\n");
    assert_eq!(said("-V"), release);
    assert_eq!(said("--version"), format!("{release}torch {}\n", sail_torch::version()));
}

#[test]
fn all_configuration_errors_are_listed_with_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("stage.yaml");
    std::fs::write(&file, "run: { dir: x }\ntrain:\n  projctor: { lr: 1e-3 }\nschedule: { steps: many }\n")
        .unwrap();
    let error = stderr(&run(&["--config", file.to_str().unwrap()], 2));
    assert!(error.contains("stage.yaml:3") && error.contains("did you mean `projector`"), "{error}");
    assert!(error.contains("stage.yaml:4") && error.contains("schedule.steps"), "{error}");
}

#[test]
fn a_stage_whose_predecessor_did_not_run_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let error = stderr(&run(&["--config", "configs/tiny/stage2.yaml", "--set", &set], 2));
    assert!(
        error.contains("holds no complete checkpoint") && error.contains("hint: run that stage first"),
        "{error}"
    );
}

#[test]
fn an_unfinished_predecessor_and_a_changed_plan_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let set = under(dir.path());
    let stage1 = ["--config", "configs/tiny/stage1.yaml", "--set", &set];
    run(&[&stage1[..], &["--stop-at", "2"]].concat(), 3);

    let error = stderr(&run(&["--config", "configs/tiny/stage2.yaml", "--set", &set], 2));
    assert!(error.contains("stopped after 2 steps of 12 steps"), "{error}");

    let error = stderr(&run(&[&stage1[..], &["--set", "train.projector.lr=0.5"]].concat(), 2));
    assert!(error.contains("`train.projector.lr`: 0.001 -> 0.5"), "{error}");

    let error = stderr(&run(&[&stage1[..], &["--resume", "never"]].concat(), 2));
    assert!(error.contains("--resume never"), "{error}");
}

/// A reader that goes away must not turn into a panic or a hang.
#[test]
fn closed_output_is_not_a_failure() {
    let mut child = crate::sail_train(&["--config", "configs/tiny/stage1.yaml", "--dry-run"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));

    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut to_full = crate::sail_train(&["--config", "configs/tiny/stage1.yaml", "--set", "nonsense"]);
    assert_eq!(to_full.stderr(full()).status().unwrap().code(), Some(2));
}

#[test]
fn numbers_far_out_of_range_are_refused() {
    for set in ["data.threads=100000", "data.streams=1000000000", "model.vision.image_px=9223372036854775800"]
    {
        let error = stderr(&run(&["--config", "configs/tiny/stage1.yaml", "--set", set], 2));
        assert!(error.contains("must be") && error.contains(set.split('=').next().unwrap()), "{error}");
    }
}

#[test]
fn a_plan_that_is_shown_loads_again() {
    let dir = tempfile::tempdir().unwrap();
    let first = run(&["config", "show", "configs/tiny/stage1.yaml"], 0).stdout;
    let file = dir.path().join("plan.yaml");
    std::fs::write(&file, &first).unwrap();
    let second = run(&["config", "show", file.to_str().unwrap()], 0).stdout;
    assert_eq!(String::from_utf8(first), String::from_utf8(second));
}

/// What would be ignored is refused.
#[test]
fn a_dry_run_takes_no_position() {
    for option in [&["--resume", "never"][..], &["--stop-at", "3"], &["--allow-config-change"]] {
        let dry_run = ["--config", "configs/tiny/stage1.yaml", "--dry-run"];
        let error = stderr(&run(&[&dry_run[..], option].concat(), 2));
        assert!(error.contains("cannot be used with") && error.contains(option[0]), "{error}");
    }
}

/// For one GPU unless another number is asked for.
#[test]
fn a_dry_run_says_what_would_be_done() {
    let output = run(&["--config", "configs/tiny/stage2.yaml", "--dry-run"], 0);
    let page = String::from_utf8(output.stdout.clone()).unwrap();
    for part in [
        "tiny-stage2: 1 GPU on 1 node, bf16, 2 packs for each in a step\n",
        "parameters: vision 2.78M trained, projector 264k trained, llm 3.67M frozen;",
        "a step: 2 packs, 512 tokens, 2 samples of 256 tokens, ",
        "the stage: 12 steps, 6,144 tokens, 24 samples, ",
        "`sail-train config show configs/tiny/stage2.yaml`, with the same `--set`, prints every value.\n",
    ] {
        assert!(page.contains(part), "`{part}` in {page}");
    }
    assert_eq!(stderr(&output), "");
    let of_one = run(&["--config", "configs/tiny/stage2.yaml", "--dry-run", "--world", "1"], 0);
    assert_eq!(String::from_utf8(of_one.stdout).unwrap(), page);
}

#[test]
fn a_dry_run_finds_that_a_model_is_not_there() {
    let gone = ["model.llm.random=null", "model.llm.from=nowhere"];
    let sets = ["--set", gone[0], "--set", gone[1]];
    let dry_run = ["--config", "configs/tiny/stage1.yaml", "--dry-run"];
    let error = stderr(&run(&[&dry_run[..], &sets].concat(), 2));
    assert!(error.contains("`model.llm.from`: there is no folder `nowhere`"), "{error}");
    let broken = ["--set", gone[0], "--set", "model.llm.from=configs"];
    let error = stderr(&run(&[&dry_run[..], &broken].concat(), 2));
    assert!(error.contains("config.json"), "{error}");
}

/// The machines need not be here, nor the predecessor of a stage; standard output has the tables alone.
#[test]
fn planning_prints_every_stage() {
    let args = ["--config", "configs/tiny/curriculum.yaml", "--dry-run", "--world", "16", "--mfu", "0.5"];
    let set = ["--set", "run.device=cuda:3", "--set", "data.streams=16", "--set", "batch.packs_per_step=32"];
    let output = run(&[&args[..], &set].concat(), 0);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    for stage in ["tiny-stage1", "tiny-stage2", "tiny-stage3"] {
        let head = format!("{stage}: 16 GPUs on 2 nodes of 8, bf16, 2 packs for each in a step\n");
        assert!(text.contains(&head), "{text}");
    }
    assert!(text.contains("50 % of it reached") && !text.contains("warning"), "{text}");
    assert_eq!(stderr(&output), "");
}

#[test]
fn planning_that_makes_no_sense_is_refused() {
    let stage = ["--config", "configs/tiny/stage1.yaml"];
    let cases: [(&[&str], &str, &str); 6] = [
        (&["--world", "8"], "would train", "hint: add `--dry-run`"),
        (&["--dry-run", "--world", "0"], "`--world` is 0", "hint: give a number of GPUs"),
        (&["--dry-run", "--world", "8", "--mfu", "1.5"], "`--mfu` is 1.5", "hint: give a share from 0.001"),
        (
            &["--dry-run", "--world", "8", "--link-gbps", "0"],
            "`--link-gbps` is 0",
            "hint: give a number from 0.001 to 1e9",
        ),
        (
            &["--dry-run", "--world", "8", "--sample-tokens", "999"],
            "a pack has 256 tokens",
            "hint: give a number",
        ),
        (&["--node-gpus", "4"], "--dry-run", "required arguments were not provided"),
    ];
    for (options, problem, hint) in cases {
        let error = stderr(&run(&[&stage[..], options].concat(), 2));
        assert!(error.contains(problem) && error.contains(hint), "{options:?}: {error}");
    }
}

/// A part of the log was asked for, and errors went with the rest of it.
#[test]
fn errors_are_shown_whatever_of_the_log_is_asked_for() {
    let wrong = ["--config", "missing.yaml", "--log-format", "json"];
    for asked in ["sail_data=debug", "off", ""] {
        let output = sail_train(&wrong).env("SAIL_LOG", asked).output().unwrap();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{asked}: {error}");
        let line: serde_json::Value = serde_json::from_str(error.trim()).unwrap();
        assert!(line["message"].as_str().unwrap().contains("missing.yaml"), "{asked}: {error}");
    }
    let output =
        sail_train(&["--config", "configs/tiny/stage1.yaml"]).env("SAIL_LOG", "a=b=c").output().unwrap();
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("`SAIL_LOG` is `a=b=c`") && error.contains("hint: write levels"), "{error}");
}

/// Answers were printed with whatever they held.
#[test]
fn what_a_sample_says_does_not_steer_the_terminal() {
    let mut job = Job::new(&["schedule.steps=1"]);
    let dir = job.dir.path();
    let turns =
        r#"[{"from": "human", "value": "q\u001b[2J"}, {"from": "gpt", "value": "a\u001b]0;title\u0007"}]"#;
    fs::write(dir.join("x.json"), format!("{{\"conversations\": {turns}}}")).unwrap();
    let shard = dir.join("x.tar");
    let made = Command::new("tar").arg("cf").arg(&shard).arg("-C").arg(dir).arg("x.json").status();
    assert!(made.unwrap().success());
    let source = format!("{{name: x, shards: \"{}\"}}", shard.display());
    job.set(&[&format!("eval={{sources: [{source}], samples: 1, generate: 1, max_new_tokens: 2}}")]);
    let trained = job.run(job.alone(), 0);
    let measured = run(&["eval", "--checkpoint", job.run_dir().to_str().unwrap()], 0);
    for said in [trained, String::from_utf8(measured.stdout).unwrap()] {
        assert!(said.contains(r"a\u{1b}]0;title\u{7}") && !said.contains('\u{1b}'), "{said}");
    }
}
