//! Results as tables in Markdown.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::{AffinityResult, ChoiceResult, GenerationResult, LossResult, RecognitionResult, Results};

/// All results; a table for each task.
pub(super) fn markdown(results: &Results) -> String {
    let mut text = String::new();
    for task in &results.recognition {
        text += &recognition(task);
    }
    for task in &results.affinity {
        text += &affinity(task);
    }
    let per_cent = |share: f64| format!("{:.2}", 100.0 * share);
    if !results.loss.is_empty() {
        text += "## Held-out loss\n\nNats a token of the answers; the last three of samples with images alone.\n\n";
        let head = ["task", "samples", "loss", "perplexity", "true image", "shuffled image", "no image"];
        add_table(&mut text, &head, results.loss.iter().map(loss));
    }
    if !results.generation.is_empty() {
        text += "## Generated answers\n\nPer cent, except CIDEr-D.\n\n";
        let head = ["task", "samples", "exact match", "VQA accuracy", "ANLS", "CIDEr-D", "character errors"];
        let row = |task: &GenerationResult| {
            let shares = [task.exact_match, task.vqa_accuracy, task.anls].map(per_cent);
            let rest = [format!("{:.3}", task.cider_d), per_cent(task.character_error_rate)];
            [task.name.clone(), task.samples.to_string()].into_iter().chain(shares).chain(rest).collect()
        };
        add_table(&mut text, &head, results.generation.iter().map(row));
    }
    if !results.choice.is_empty() {
        text += "## Multiple choice\n\nPer cent of samples whose truth is the likeliest choice.\n\n";
        let head = ["task", "samples", "accuracy", "by token", "commonest truth"];
        let row = |task: &ChoiceResult| {
            let shares = [task.accuracy, task.accuracy_per_token, task.commonest].map(per_cent);
            [task.name.clone(), task.samples.to_string()].into_iter().chain(shares).collect()
        };
        add_table(&mut text, &head, results.choice.iter().map(row));
    }
    text
}

fn loss(task: &LossResult) -> Vec<String> {
    let number = |loss: f64| format!("{loss:.4}");
    let optional = |loss: Option<f64>| loss.map_or_else(|| "-".to_owned(), number);
    let images = task.losses.images;
    vec![
        task.name.clone(),
        task.losses.samples.to_string(),
        number(task.losses.loss),
        format!("{:.3}", task.perplexity),
        optional(images.map(|images| images.true_image)),
        optional(images.map(|images| images.shuffled_image)),
        optional(task.no_image),
    ]
}

/// The first column is text, the others are numbers.
fn add_table(text: &mut String, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let line = (0..head.len()).map(|i| if i == 0 { "---" } else { "---:" }.to_owned()).collect();
    let head = head.iter().map(|&name| name.to_owned()).collect();
    add_rows(text, &[head, line].into_iter().chain(rows).collect::<Vec<_>>());
}

fn recognition(task: &RecognitionResult) -> String {
    let probes: BTreeSet<&String> = task.tests.iter().flat_map(|test| test.top1.keys()).collect();
    let mut text = format!(
        "## {}: recognition\n\nTop-1 accuracy in per cent; probes learnt from {} images of {} classes, {} features each.\n\n",
        task.name, task.train_images, task.classes, task.width
    );
    let mut rows =
        vec![vec!["set".to_owned(), "images".to_owned()], vec!["---".to_owned(), "---:".to_owned()]];
    for probe in &probes {
        rows[0].push((*probe).clone());
        rows[1].push("---:".to_owned());
    }
    for test in &task.tests {
        let shares = probes.iter().map(|probe| test.top1.get(*probe));
        let shares =
            shares.map(|share| share.map_or_else(|| "-".to_owned(), |share| format!("{:.2}", 100.0 * share)));
        rows.push([test.name.clone(), test.images.to_string()].into_iter().chain(shares).collect());
    }
    if task.tests.len() > 1 {
        let means = probes.iter().map(|probe| {
            let sum: f64 = task.tests.iter().filter_map(|test| test.top1.get(*probe)).sum();
            format!("{:.2}", 100.0 * sum / task.tests.len() as f64)
        });
        rows.push(["mean of the sets".to_owned(), String::new()].into_iter().chain(means).collect());
    }
    add_rows(&mut text, &rows);
    text
}

fn affinity(task: &AffinityResult) -> String {
    let mut text = format!(
        "## {}: affinity\n\nDistances of the visual tokens of {} images to the embeddings of {} words, in two dimensions.\n\n",
        task.name,
        task.samples.len(),
        task.words
    );
    let head = ["", "visual tokens", "nearest", "Wasserstein", "mean"].map(str::to_owned).to_vec();
    let line = ["---", "---:", "---:", "---:", "---:"].map(str::to_owned).to_vec();
    let mut rows = vec![head, line];
    for (name, side) in [("before the projector", &task.before), ("after the projector", &task.after)] {
        let distances = [side.distances.nearest, side.distances.wasserstein, side.distances.mean];
        let numbers = distances.map(|distance| format!("{distance:.4}"));
        rows.push([name.to_owned(), side.visual_tokens.to_string()].into_iter().chain(numbers).collect());
    }
    add_rows(&mut text, &rows);
    text
}

fn add_rows(text: &mut String, rows: &[Vec<String>]) {
    for row in rows {
        writeln!(text, "| {} |", row.join(" | ")).expect("invariant: a string takes all text");
    }
    text.push('\n');
}
