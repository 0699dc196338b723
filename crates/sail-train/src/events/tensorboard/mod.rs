//! The event file in `tensorboard/` of a run's folder: every figure of `metrics.jsonl`, norms of gradients as histograms,
//! held-out images with their answers, and what the run is.
//!
//! There is one file at a time. Where a run resumes or goes back a new one takes its place, made from what the old one and
//! `metrics.jsonl` have of the steps that count: no step is there twice, and what the old one missed, because the disk was
//! full or the process was killed, is added. It begins with a mark at which a TensorBoard that reads along forgets what it
//! has read.

mod content;
mod framing;
mod proto;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;
use serde_json::Value;
use tracing::warn;

use self::proto::{Event, SessionLog, Summary, What};
use super::appender::Appender;
use super::record::{Ending, Record, Sink, figures};
use super::{METRICS, lines};
use crate::config::Plan;
use crate::error::{Error, Result};
use crate::freeze::FreezeTable;
use crate::pictures;

const FOLDER: &str = "tensorboard";
/// What every reader finds event files by.
const MARK: &str = "events.out.tfevents.";

/// The event file of a run.
pub(super) struct TensorBoard {
    run_dir: PathBuf,
    file: Appender,
    /// Pictures of held-out samples, which the file has once each.
    pictures: BTreeMap<String, PathBuf>,
    pictured: BTreeSet<String>,
}

/// What a record of the file belongs to: the kind of a line of `metrics.jsonl`, and its step.
type Place = (String, u64);

impl TensorBoard {
    /// Of the run in `run_dir`, whose `metrics.jsonl` holds what counts. `texts` say what it is from `step` on.
    pub(super) fn open(run_dir: &Path, step: u64, texts: &[(&str, String)]) -> Result<Self> {
        let (path, pictured) = rewrite(run_dir, step, texts)?;
        let pictures = pictures::list(run_dir)?;
        Ok(Self { run_dir: run_dir.to_owned(), file: Appender::open(path)?, pictures, pictured })
    }
}

impl Sink for TensorBoard {
    fn record(&mut self, record: &Record) {
        let summary = content::of_record(record, &self.pictures, &mut self.pictured);
        if let Some(event) = event_of(&record.line, summary) {
            self.file.write(&framing::framed(&event.encode_to_vec()));
        }
    }

    fn back_to(&mut self, step: u64) {
        // What could not be written yet is in `metrics.jsonl`.
        match rewrite(&self.run_dir, step, &[])
            .and_then(|(path, pictured)| Ok((Appender::open(path)?, pictured)))
        {
            Ok((file, pictured)) => (self.file, self.pictured) = (file, pictured),
            Err(error) => {
                warn!("{error}; the steps after {step} stay in it beside those that are made instead");
            }
        }
    }

    fn close(&mut self, _ending: Ending) {
        if let Err(error) = self.file.catch_up() {
            warn!("{error}; its last records are lost until the run resumes");
        }
    }
}

/// A record of the values of a line, if it has some.
fn event_of(line: &Value, summary: Summary) -> Option<Event> {
    if summary.value.is_empty() {
        return None;
    }
    let wall_time = line["time"].as_f64().unwrap_or_else(now);
    Some(Event { wall_time, step: line["step"].as_i64()?, what: Some(What::Summary(summary)) })
}

fn place_of(line: &Value) -> Option<Place> {
    Some((line["kind"].as_str()?.to_owned(), line["step"].as_u64()?))
}

/// The same of a record, from the first tag in it.
fn place_of_event(event: &Event) -> Option<Place> {
    let Some(What::Summary(summary)) = &event.what else { return None };
    let (kind, _) = summary.value.first()?.tag.split_once('/')?;
    Some((kind.to_owned(), event.step as u64))
}

/// Puts a new file in place of those that are there, and gives its path and the samples whose pictures it has.
fn rewrite(run_dir: &Path, step: u64, texts: &[(&str, String)]) -> Result<(PathBuf, BTreeSet<String>)> {
    let dir = run_dir.join(FOLDER);
    fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
    let old = event_files(&dir)?;
    // Not found as an event file until it is whole.
    let temporary = dir.join("rewriting.tmp");
    let path = dir.join(new_name(&old));
    let mut new = NewFile::create(&temporary)?;
    new.start()?;
    let counts = counting(&run_dir.join(METRICS))?;
    for old in &old {
        new.keep(old, step, &counts)?;
    }
    new.add_missing(run_dir)?;
    new.add_texts(step, texts)?;
    let pictured = new.finish()?;
    fs::rename(&temporary, &path).map_err(Error::io(&path))?;
    for old in old {
        fs::remove_file(&old).map_err(Error::io(&old))?;
    }
    Ok((path, pictured))
}

/// What `metrics.jsonl` has figures of.
fn counting(metrics: &Path) -> Result<BTreeSet<Place>> {
    let mut places = BTreeSet::new();
    for line in lines::read(metrics)? {
        places.extend(place_of(&line?));
    }
    Ok(places)
}

/// A file that is being made.
struct NewFile<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    has: BTreeSet<Place>,
    /// The last text of each tag.
    texts: BTreeMap<String, Vec<u8>>,
    pictured: BTreeSet<String>,
}

impl<'a> NewFile<'a> {
    fn create(path: &'a Path) -> Result<Self> {
        let file = BufWriter::new(File::create(path).map_err(Error::io(path))?);
        let (has, texts, pictured) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
        Ok(Self { path, file, has, texts, pictured })
    }

    fn write(&mut self, record: &[u8]) -> Result<()> {
        self.file.write_all(&framing::framed(record)).map_err(Error::io(self.path))
    }

    fn add(&mut self, event: &Event) -> Result<()> {
        self.write(&event.encode_to_vec())
    }

    fn start(&mut self) -> Result<()> {
        let of_start = |what| Event { wall_time: now(), step: 0, what: Some(what) };
        self.add(&of_start(What::FileVersion("brain.Event:2".to_owned())))?;
        self.add(&of_start(What::SessionLog(SessionLog { status: 1 })))
    }

    /// Takes over what an old file has of the steps that count.
    fn keep(&mut self, old: &Path, step: u64, counts: &BTreeSet<Place>) -> Result<()> {
        let mut file = BufReader::new(File::open(old).map_err(Error::io(old))?);
        while let Some(record) = framing::next(&mut file).map_err(Error::io(old))? {
            let Ok(event) = Event::decode(&record[..]) else { continue };
            let Some(place) = place_of_event(&event) else { continue };
            if place.0 == content::ABOUT {
                if place.1 <= step {
                    self.texts.extend(content::texts(&event));
                    self.write(&record)?;
                }
            } else if counts.contains(&place) && self.has.insert(place) {
                self.pictured.extend(content::pictured(&event));
                self.write(&record)?;
            }
        }
        Ok(())
    }

    /// Adds what only `metrics.jsonl` has.
    fn add_missing(&mut self, run_dir: &Path) -> Result<()> {
        let pictures = pictures::list(run_dir)?;
        for line in lines::read(&run_dir.join(METRICS))? {
            let line = line?;
            if figures(&line).is_empty() || !place_of(&line).is_some_and(|place| self.has.insert(place)) {
                continue;
            }
            let record = Record::from(line);
            let summary = content::of_record(&record, &pictures, &mut self.pictured);
            if let Some(event) = event_of(&record.line, summary) {
                self.add(&event)?;
            }
        }
        Ok(())
    }

    /// Adds the texts that are not the last ones of their tags.
    fn add_texts(&mut self, step: u64, texts: &[(&str, String)]) -> Result<()> {
        for (name, text) in texts {
            let value = content::text(format!("{}/{name}", content::ABOUT), text);
            let summary = Summary { value: vec![value] };
            let event = Event { wall_time: now(), step: step as i64, what: Some(What::Summary(summary)) };
            if content::texts(&event).any(|(tag, text)| self.texts.get(&tag) != Some(&text)) {
                self.add(&event)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<BTreeSet<String>> {
        let file = self.file.into_inner().map_err(|error| Error::io(self.path)(error.into_error()))?;
        file.sync_all().map_err(Error::io(self.path))?;
        Ok(self.pictured)
    }
}

/// The event files in a folder, the oldest first.
fn event_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        if entry.file_name().to_string_lossy().starts_with(MARK) {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// A name after those of `old` by time, as readers sort them.
fn new_name(old: &[PathBuf]) -> String {
    let last = old.iter().filter_map(|path| {
        path.file_name()?.to_str()?.strip_prefix(MARK)?.split('.').next()?.parse::<u64>().ok()
    });
    let after = last.max().map_or(0, |last| last + 1);
    format!("{MARK}{:010}.sail", after.max(now() as u64))
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// What a run is, by the names of the texts that say so.
pub(super) fn texts(plan: &Plan, table: &FreezeTable) -> [(&'static str, String); 2] {
    [("configuration", content::verbatim(&plan.to_yaml())), ("freeze", content::verbatim(&table.to_string()))]
}

/// Removes what is there of a run that is to be made anew in this folder.
pub(super) fn remove(run_dir: &Path) -> Result<()> {
    let dir = run_dir.join(FOLDER);
    match fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(&dir)(error)),
        Ok(_) => {
            event_files(&dir)?.iter().try_for_each(|path| fs::remove_file(path).map_err(Error::io(path)))
        }
    }
}

#[cfg(test)]
mod tests;
