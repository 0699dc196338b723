//! A page about runs: what was trained when, how losses and rates went, what came of it. One HTML file that needs nothing
//! else, neither another file nor a network.
//!
//! Called by `sail-train report`, and by [`serve`]. Reads a run's folder as any other program can: `plan.yaml`,
//! `metrics.jsonl`, `trips.jsonl`, `summary.json`, and of the newest checkpoint what it says of itself. A run that still
//! trains may be read. `page.js` draws the page in the browser from the JSON that is put into it here.

mod curve;
pub mod serve;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::prelude::{BASE64_STANDARD, Engine};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::curve::{Curve, StepLine};
use crate::checkpoint::{self, Totals};
use crate::error::{Error, Result};
use crate::eval::EvalReport;
use crate::events::{METRICS, trips};
use crate::freeze::FreezeTable;
use crate::output;
use crate::program;
use crate::resume::PLAN;
use crate::train_loop::{SUMMARY, StageSummary};

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Folders between one that is given and the runs in it, at most.
const DEPTH: usize = 3;

/// What the page is made from.
#[derive(Debug, Serialize)]
struct Report {
    version: String,
    /// Seconds since 1970.
    made_at: u64,
    /// Seconds between questions for newer figures, of a page that is served.
    refresh_secs: Option<u64>,
    courses: Vec<Course>,
}

impl Report {
    fn of(dirs: &[PathBuf]) -> Result<Self> {
        let courses = dirs.iter().map(|dir| Course::read(dir)).collect::<Result<Vec<_>>>()?;
        let made_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Self { version: program::version(), made_at, refresh_secs: None, courses })
    }
}

/// A folder that was asked for: a run, or several of which one goes on from the other.
#[derive(Debug, Serialize)]
struct Course {
    name: String,
    stages: Vec<Stage>,
}

/// A run.
#[derive(Debug, Serialize)]
struct Stage {
    name: String,
    dir: String,
    finished: bool,
    /// Steps done.
    steps: u64,
    /// Time in these steps, seconds.
    seconds: f64,
    plan: Value,
    plan_text: String,
    /// What follows is of the summary, which is written once the run is finished.
    modules: Option<FreezeTable>,
    totals: Option<Totals>,
    train_loss: Option<f64>,
    export: Option<String>,
    lineage: Option<Value>,
    curve: Curve,
    evaluations: Vec<Evaluation>,
    unlocks: Vec<Value>,
    trials: Vec<Value>,
    trips: Vec<Value>,
    saves: Saves,
    /// `data:` addresses of JPEG files, by sample.
    pictures: BTreeMap<String, String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Evaluation {
    step: u64,
    report: EvalReport,
}

/// Checkpoints that were made.
#[derive(Debug, Default, Serialize)]
struct Saves {
    count: u64,
    /// How long steps waited for them, seconds.
    blocked_secs: f64,
}

/// Writes the page about the runs in `dirs`, and gives its path: `out`, or `report.html` in the first folder. Of a folder
/// that is no run itself all runs below it are shown, each after those that it goes on from.
///
/// # Errors
/// [`Error::Usage`] for a folder without a run, for an `out` that cannot be written, and for a file that is not what a run
/// writes, with its line; [`Error::Io`] for one that cannot be read.
pub fn report(dirs: &[PathBuf], out: Option<&Path>) -> Result<PathBuf> {
    let page = page(&Report::of(dirs)?);
    let out = out.map_or_else(|| dirs[0].join("report.html"), Path::to_owned);
    output::replace(&out, |path| fs::write(path, &page).map_err(Error::io(path)))?;
    Ok(out)
}

fn page(report: &Report) -> String {
    let data = serde_json::to_string(report).expect("invariant: text, numbers and lists");
    // Nothing in it ends the element that it stands in.
    let data = data.replace('<', "\\u003c");
    let page = PAGE.replacen("{{style}}", STYLE, 1).replacen("{{script}}", SCRIPT, 1);
    page.replacen("{{data}}", &data, 1)
}

impl Course {
    fn read(dir: &Path) -> Result<Self> {
        let mut runs = Vec::new();
        find_runs(dir, DEPTH, &mut runs)?;
        if runs.is_empty() {
            return Err(Error::usage(
                format!("`{}` holds no run: neither it nor a folder in it has a `{METRICS}`", dir.display()),
                "name the `run.dir` of a stage, or the folder that those of a curriculum are in",
            ));
        }
        let mut stages = runs.iter().map(|run| Stage::read(run)).collect::<Result<Vec<_>>>()?;
        stages.sort_by_key(Stage::ancestors);
        let name =
            dir.file_name().map_or_else(|| stages[0].name.clone(), |name| name.to_string_lossy().into());
        Ok(Self { name, stages })
    }
}

/// Folders of runs in `dir`, itself included, by name; down to `depth` folders below it.
fn find_runs(dir: &Path, depth: usize, runs: &mut Vec<PathBuf>) -> Result<()> {
    if dir.join(METRICS).is_file() {
        runs.push(dir.to_owned());
        return Ok(());
    }
    let folders = fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut folders: Vec<PathBuf> = folders
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| depth > 0 && path.is_dir() && !path.is_symlink())
        .collect();
    folders.sort();
    folders.iter().try_for_each(|folder| find_runs(folder, depth - 1, runs))
}

impl Stage {
    fn read(dir: &Path) -> Result<Self> {
        let plan_path = dir.join(PLAN);
        let plan_text = fs::read_to_string(&plan_path).map_err(Error::io(&plan_path))?;
        let plan: Value = serde_yaml::from_str(&plan_text).map_err(|error| broken(&plan_path, 0, &error))?;
        let state = checkpoint::newest_state(dir)?;
        let mut recorded = Recorded::default();
        recorded.read(&dir.join(METRICS))?;
        let steps: Vec<StepLine> = recorded.steps.into_values().collect();
        let last = steps.last().map_or(0, |last| last.step);
        // One that went on since then has not finished yet.
        let summary = summary_of(dir)?.filter(|summary| summary.steps >= last);
        let finished = summary.is_some();
        let (modules, totals, train_loss, export) = summary.map_or((None, None, None, None), |summary| {
            (Some(summary.modules), Some(summary.totals), summary.train_loss, summary.export)
        });
        let mut trips = trips(dir)?;
        trips.reverse();
        Ok(Self {
            name: plan["run"]["name"].as_str().unwrap_or_default().to_owned(),
            finished,
            steps: last,
            seconds: steps.iter().map(|step| step.step_secs).sum(),
            plan,
            plan_text,
            lineage: state.map(|mut state| state["lineage"].take()),
            curve: Curve::of(&steps),
            evaluations: recorded.evaluations,
            unlocks: recorded.unlocks,
            trials: recorded.trials,
            trips,
            saves: recorded.saves,
            pictures: pictures(dir)?,
            modules,
            totals,
            train_loss,
            export: export.map(|export| export.to_string_lossy().into_owned()),
            // JSON has no bytes that are no text.
            dir: dir.to_string_lossy().into_owned(),
        })
    }

    /// How many stages came before it.
    fn ancestors(&self) -> usize {
        self.lineage.as_ref().and_then(|lineage| lineage["stages"].as_array()).map_or(0, Vec::len)
    }
}

fn summary_of(run_dir: &Path) -> Result<Option<StageSummary>> {
    let path = run_dir.join(SUMMARY);
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| broken(&path, 0, &error)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(&path)(error)),
    }
}

fn pictures(run_dir: &Path) -> Result<BTreeMap<String, String>> {
    let address = |(sample, path): (String, PathBuf)| {
        let picture = fs::read(&path).map_err(Error::io(&path))?;
        Ok((sample, format!("data:image/jpeg;base64,{}", BASE64_STANDARD.encode(picture))))
    };
    crate::pictures::list(run_dir)?.into_iter().map(address).collect()
}

/// What `metrics.jsonl` holds.
#[derive(Default)]
struct Recorded {
    steps: BTreeMap<u64, StepLine>,
    evaluations: Vec<Evaluation>,
    unlocks: Vec<Value>,
    trials: Vec<Value>,
    saves: Saves,
}

impl Recorded {
    /// The last line may be cut off: perhaps the run is writing it.
    fn read(&mut self, path: &Path) -> Result<()> {
        let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
        let (mut line, mut number) = (Vec::new(), 0);
        while file.read_until(b'\n', &mut line).map_err(Error::io(path))? > 0 && line.ends_with(b"\n") {
            number += 1;
            self.add(&line).map_err(|error| broken(path, number, &error))?;
            line.clear();
        }
        Ok(())
    }

    fn add(&mut self, line: &[u8]) -> serde_json::Result<()> {
        #[derive(Deserialize)]
        struct OfKind {
            kind: String,
        }
        let OfKind { kind } = serde_json::from_slice(line)?;
        match kind.as_str() {
            "train" => {
                let step: StepLine = serde_json::from_slice(line)?;
                self.steps.insert(step.step, step);
            }
            "eval" => self.evaluations.push(serde_json::from_slice(line)?),
            "unlock" => self.unlocks.push(serde_json::from_slice(line)?),
            "ada_lrs" => self.trials.push(serde_json::from_slice(line)?),
            "checkpoint" => {
                let save: Value = serde_json::from_slice(line)?;
                self.saves.count += 1;
                self.saves.blocked_secs += save["blocked_secs"].as_f64().unwrap_or(0.0);
            }
            // Of a later version.
            _ => {}
        }
        Ok(())
    }
}

/// A file that is not what a run writes; `line` 0 is the whole of it.
fn broken(path: &Path, line: usize, error: &dyn std::fmt::Display) -> Error {
    let place = if line > 0 { format!("{}:{line}", path.display()) } else { path.display().to_string() };
    Error::usage(
        format!("`{place}` is not what a run writes: {error}"),
        "was it changed, or written by another version? `report` needs that of this one",
    )
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    pub(super) fn run_in(dir: &Path, metrics: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(
            dir.join(PLAN),
            "run: { name: a-run }\nschedule: { steps: 4 }\ntrain: { vision: frozen }\n",
        )
        .unwrap();
        fs::write(dir.join(METRICS), metrics).unwrap();
    }

    fn data_of(page: &str) -> Value {
        let (_, rest) = page.split_once("id=\"data\">").unwrap();
        serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
    }

    pub(super) const STEP: &str = r#"{"kind":"train","step":1,"loss":2.5,"grad_norm":1.0,"lr":{"projector":0.001},"tokens":100,"step_secs":2.0,"data_wait_secs":0.5,"parts_secs":{"llm":1.0},"mfu":null,"peak_memory_bytes":null}"#;

    /// It ended the process.
    #[test]
    fn a_folder_may_have_any_name() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;

        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join(OsStr::from_bytes(b"not\xffutf8"));
        run_in(&run, &format!("{STEP}\n"));
        let page = fs::read_to_string(report(&[run], None).unwrap()).unwrap();
        assert!(page.contains("not\u{fffd}utf8"), "{page}");
    }

    #[test]
    fn what_a_run_wrote_is_in_the_page_and_ends_no_element() {
        let dir = tempfile::tempdir().unwrap();
        let answer =
            r#"{"sample":"ocr/a.tar/1","question":"</script><b>","truth":"{{script}}","answer":"no"}"#;
        let losses = r#"{"samples":1,"answer_tokens":3,"loss":2.0}"#;
        let eval = format!(
            r#"{{"kind":"eval","step":0,"report":{{"sources":{{"ocr":{losses}}},"total":{losses},"generations":[{answer}]}}}}"#
        );
        run_in(&dir.path().join("course/stage1"), &format!("{eval}\n{STEP}\n{{\"kind\":\"tr"));
        let out = report(&[dir.path().join("course")], None).unwrap();
        assert_eq!(out, dir.path().join("course/report.html"));
        let page = fs::read_to_string(out).unwrap();
        assert!(!page.contains("</script><b>") && page.matches("</script>").count() == 2, "{page}");
        let data = data_of(&page);
        let stage = &data["courses"][0]["stages"][0];
        assert_eq!(data["courses"][0]["name"], "course");
        assert_eq!((stage["name"].as_str(), stage["finished"].as_bool()), (Some("a-run"), Some(false)));
        assert_eq!((stage["steps"].as_u64(), stage["seconds"].as_f64()), (Some(1), Some(2.0)));
        assert_eq!(stage["curve"]["tokens_per_sec"], serde_json::json!([50.0]));
        assert_eq!(stage["evaluations"][0]["report"]["generations"][0]["question"], "</script><b>");
        assert_eq!(stage["evaluations"][0]["report"]["generations"][0]["truth"], "{{script}}");
        // Nothing is fetched: the one address in it names the elements of a drawing.
        assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    }

    #[test]
    fn folders_that_are_no_runs_and_broken_lines_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let message = report(&[dir.path().to_owned()], None).unwrap_err().to_string();
        assert!(
            message.contains("holds no run") && message.contains("hint: name the `run.dir`"),
            "{message}"
        );
        let run = dir.path().join("run");
        run_in(&run, &format!("{STEP}\nnonsense\n{STEP}\n"));
        let message = report(slice::from_ref(&run), None).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl:2` is not what a run writes"), "{message}");
        assert!(!run.join("report.html").exists());
        fs::write(run.join(METRICS), "").unwrap();
        assert!(report(slice::from_ref(&run), Some(&run.join("none/report.html"))).is_err());
        report(&[run.clone(), run], Some(&dir.path().join("two.html"))).unwrap();
    }

    /// A run that went on after it had finished was shown as finished, with the figures of then.
    #[test]
    fn a_summary_counts_while_it_is_of_the_newest_step() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        run_in(&run, &format!("{STEP}\n"));
        let stage = || {
            let page = fs::read_to_string(report(slice::from_ref(&run), None).unwrap()).unwrap();
            data_of(&page)["courses"][0]["stages"][0].clone()
        };
        for (steps, finished) in [(0, false), (1, true), (2, true)] {
            let totals = r#"{"samples":1,"tokens":2,"answer_tokens":1}"#;
            let summary = format!(
                r#"{{"name":"a-run","plan_hash":"x","modules":[],"steps":{steps},"totals":{totals},"coverage":{{}}}}"#
            );
            fs::write(run.join(SUMMARY), summary).unwrap();
            let stage = stage();
            assert_eq!((&stage["finished"], stage["totals"].is_object()), (&Value::Bool(finished), finished));
        }
        fs::remove_file(run.join(SUMMARY)).unwrap();
        assert_eq!(stage()["finished"], false);
        fs::create_dir(run.join(SUMMARY)).unwrap();
        assert!(report(&[run], None).unwrap_err().to_string().contains("summary.json"));
    }
}
