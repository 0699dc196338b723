//! What a machine has that training needs, found by using it: libtorch and its devices, collectives between processes,
//! memory, the folder of runs, limits of the system. What is missing comes with how to mend it.
//!
//! Called by `sail-train doctor`. Trains nothing, and leaves nothing behind but what a stage names on a hub: its small
//! files, in the cache.

mod devices;
mod machine;

use std::fmt;
use std::path::Path;

use sail_model::weights::ModelRef;
use serde::Serialize;

use crate::config::{Config, ModelSource, Plan};
use crate::session::preflight;

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Good,
    /// Training works, but not as well as it might, or not everything does.
    Poor,
    /// Training fails.
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is, such as `memory`.
    pub name: String,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do about it, where something is to be done.
    pub hint: Option<String>,
}

impl Finding {
    fn good(name: &str, found: impl Into<String>) -> Self {
        Self { name: name.to_owned(), state: State::Good, found: found.into(), hint: None }
    }

    fn poor(name: &str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { state: State::Poor, hint: Some(hint.into()), ..Self::good(name, found) }
    }

    fn bad(name: &str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { state: State::Bad, hint: Some(hint.into()), ..Self::good(name, found) }
    }

    /// Good as long as `hint` has nothing to say, poor otherwise.
    fn unless(name: &str, found: impl Into<String>, hint: Option<String>) -> Self {
        match hint {
            Some(hint) => Self::poor(name, found, hint),
            None => Self::good(name, found),
        }
    }
}

/// Everything that was found, in the order in which it was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Findings(pub Vec<Finding>);

impl Findings {
    /// The state of the worst.
    pub fn worst(&self) -> State {
        self.0.iter().map(|finding| finding.state).max().unwrap_or(State::Good)
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wide = self.0.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
        for Finding { name, state, found, hint } in &self.0 {
            let state = match state {
                State::Good => "ok",
                State::Poor => "poor",
                State::Bad => "BAD",
            };
            writeln!(f, "{state:<4}  {name:<wide$}  {found}")?;
            if let Some(hint) = hint {
                writeln!(f, "      {:wide$}  hint: {hint}", "")?;
            }
        }
        Ok(())
    }
}

/// Looks at this machine, with runs to be kept in `folder`; and at what the stages of `config` name.
pub fn examine(folder: &Path, config: Option<&Config>) -> Findings {
    let mut findings = vec![machine::processor(), machine::memory()];
    findings.extend(devices::all());
    findings.extend([machine::folder(folder), machine::open_files(), machine::shared_memory()]);
    for plan in config.iter().flat_map(|config| config.plans()) {
        findings.push(match preflight(plan) {
            Ok(()) => Finding::good(&plan.run.name, found_of(plan)),
            Err(error) => {
                let text = error.to_string();
                let (found, hint) = text.split_once("\n\nhint: ").unwrap_or((&text, "mend what it names"));
                Finding::bad(&plan.run.name, found, hint)
            }
        });
    }
    Findings(findings)
}

/// What was found of a stage that has no fault.
fn found_of(plan: &Plan) -> String {
    let sources = [&plan.model.vision.source, &plan.model.llm.source];
    let of_hub = sources.into_iter().filter_map(|source| match source {
        ModelSource::From(model @ ModelRef::Hub { .. }) => Some(format!("`{model}`")),
        _ => None,
    });
    let of_hub: Vec<String> = of_hub.collect();
    let unseen = if of_hub.is_empty() {
        String::new()
    } else {
        format!("; the weights of {} are fetched when it starts", of_hub.join(" and "))
    };
    format!("its data, tokenizer and folders of weights are there, and fit{unseen}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_counts_and_hints_stand_below() {
        let good = Finding::good("memory", "24 GB");
        let poor = Finding::unless("open files", "1,024", Some("raise it".to_owned()));
        assert_eq!(Findings(vec![]).worst(), State::Good);
        assert_eq!(Findings(vec![good.clone(), poor.clone()]).worst(), State::Poor);
        let all = Findings(vec![good, Finding::bad("folder", "full", "make room"), poor]);
        assert_eq!(all.worst(), State::Bad);
        let text = "ok    memory      24 GB\nBAD   folder      full\n                  hint: make room\n\
                    poor  open files  1,024\n                  hint: raise it\n";
        assert_eq!(all.to_string(), text);
    }

    #[test]
    fn this_machine_trains() {
        let dir = tempfile::tempdir().unwrap();
        let findings = examine(dir.path(), None);
        assert!(findings.worst() < State::Bad, "{findings}");
        let names: Vec<&str> = findings.0.iter().map(|finding| finding.name.as_str()).collect();
        for name in ["processor", "memory", "libtorch", "GPU", "collectives, Gloo", "folder", "open files"] {
            assert!(names.iter().any(|found| found.starts_with(name)), "{name}: {findings}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let gone = examine(&dir.path().join("none"), None);
        let folder = gone.0.iter().find(|finding| finding.name == "folder").unwrap();
        assert_eq!(folder.state, State::Bad, "{gone}");
    }
}
