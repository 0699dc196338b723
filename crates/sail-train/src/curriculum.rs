//! Several stages in order, and the summary of what they did.
//!
//! Each stage names the one it continues by `init.from`; this only runs them one after another.
//! A finished stage is skipped, an interrupted one resumes.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use sail_data::printable;

use crate::config::{Module, Plan};
use crate::error::Result;
use crate::freeze::FreezeTable;
use crate::session::preflight;
use crate::stopping::remove_file;
use crate::train_loop::{Outcome, RunOptions, StageSummary, run_stage};
use crate::world::World;

/// The finished stages of a curriculum, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary(pub Vec<StageSummary>);

/// Runs `plans` in order; `None` when one was asked to stop.
///
/// # Errors
/// Those of [`run_stage`].
pub fn run(plans: &[&Plan], world: &Arc<World>, options: &RunOptions) -> Result<Option<Summary>> {
    for plan in plans {
        preflight(plan)?;
    }
    let mut stages = Vec::new();
    for (index, plan) in plans.iter().enumerate() {
        match run_stage(plan, world, options)? {
            Outcome::Finished(summary) => stages.push(*summary),
            Outcome::Interrupted { .. } => return Ok(None),
        }
        let asked = options.stopping.reason_between(plan, world.is_main());
        world.on_main(|| {
            remove_file(plan);
            Ok(())
        })?;
        // Asked for while the last step was made, or later.
        let is_asked = world.gather(&asked.is_some())?.contains(&true);
        if is_asked && index + 1 < plans.len() {
            let reason = asked.map_or("another rank was asked to".to_owned(), |reason| reason.to_string());
            options.console.line(format!("{}: finished, and stopped there, since {reason}", plan.run.name));
            return Ok(None);
        }
    }
    Ok(Some(Summary(stages)))
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<16} {:<24} {:>6} {:>8} {:>11} {:>19} {:>11} {:>15}",
            "stage",
            "trained",
            "steps",
            "samples",
            "train loss",
            "held-out loss",
            "true image",
            "shuffled image"
        )?;
        for stage in &self.0 {
            let loss = |report: &Option<_>| {
                report
                    .as_ref()
                    .map_or("-".to_owned(), |r: &crate::eval::EvalReport| format!("{:.3}", r.total.loss))
            };
            let images = stage.after.as_ref().and_then(|report| report.total.images);
            let image = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
            writeln!(
                f,
                "{:<16} {:<24} {:>6} {:>8} {:>11} {:>19} {:>11} {:>15}",
                stage.name,
                trained(&stage.modules),
                stage.steps,
                stage.totals.samples,
                stage.train_loss.map_or("-".to_owned(), |loss| format!("{loss:.3}")),
                format!("{} -> {}", loss(&stage.before), loss(&stage.after)),
                image(images.map(|images| images.true_image)),
                image(images.map(|images| images.shuffled_image)),
            )?;
        }
        for stage in &self.0 {
            for (source, tally) in &stage.coverage {
                writeln!(f, "{}, `{source}`: {tally}", stage.name)?;
            }
        }
        let Some(last) = self.0.last() else { return Ok(()) };
        if let Some(report) = last.after.as_ref().filter(|report| !report.generations.is_empty()) {
            writeln!(f, "\nheld-out answers of {}", last.name)?;
            for generation in &report.generations {
                let question = generation.question.replace("<image>", "").replace('\n', " ");
                writeln!(f, "  {}", generation.sample)?;
                writeln!(f, "    asked  {}", printable(question.trim()))?;
                writeln!(f, "    truth  {}", printable(&generation.truth))?;
                let answer = if generation.answer.is_empty() { "(empty)" } else { &generation.answer };
                writeln!(f, "    model  {}", printable(answer))?;
            }
        }
        if let Some(export) = &last.export {
            write!(f, "{}", how_to_load(export))?;
        }
        Ok(())
    }
}

fn trained(table: &FreezeTable) -> String {
    let rows = table.0.iter().filter(|row| row.plan.is_trained());
    let modules: BTreeSet<&str> = rows.map(|row| row.module.name()).collect();
    let in_order = Module::ALL.map(Module::name).into_iter().filter(|module| modules.contains(module));
    in_order.collect::<Vec<_>>().join(" + ")
}

fn how_to_load(export: &Path) -> String {
    let path = export.display();
    format!(
        "\nthe refined vision encoder is in {path}; in Python:\n  \
         from transformers import AutoImageProcessor, AutoModel\n  \
         vit = AutoModel.from_pretrained(\"{path}\")\n  \
         processor = AutoImageProcessor.from_pretrained(\"{path}\")\n"
    )
}
