//! An estimate as text: aligned tables, and what was assumed.

use std::fmt;

use super::link::Cluster;
use super::{Counts, FeatureSpace, Phase, StageEstimate, StrategyEstimate};
use crate::config::Module;
use crate::stage::grouped;

const GIB: f64 = (1u64 << 30) as f64;

/// The stages of a configuration, and what all of them assume.
pub struct Tables<'a>(pub &'a [StageEstimate]);

impl fmt::Display for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for stage in self.0 {
            stage.head(f)?;
            stage.memory(f)?;
            stage.step(f)?;
            stage.hint(f)?;
            writeln!(f)?;
        }
        self.0.last().map_or(Ok(()), |stage| assumptions(f, &stage.cluster))
    }
}

impl StageEstimate {
    fn head(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cluster = &self.cluster;
        let dtype = if self.backend.compute_bytes == 2 { "bf16" } else { "fp32" };
        let nodes = match cluster.nodes() {
            1 => "1 node".to_owned(),
            nodes => format!("{nodes} nodes of {}", cluster.node_gpus),
        };
        let ranks = count(cluster.world, if self.backend.cuda { "GPU" } else { "CPU" });
        let packs = count(self.packs_per_rank, "pack");
        writeln!(f, "{}: {ranks} on {nodes}, {dtype}, {packs} for each in a step", self.name)?;
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        let module = |module: Module| {
            let Counts { trained, frozen } = self.modules.get(&module).copied().unwrap_or_default();
            let parts = [(trained, "trained"), (frozen, "frozen")];
            let parts = parts.into_iter().filter(|(count, _)| *count > 0);
            let parts: Vec<String> =
                parts.map(|(count, state)| format!("{} {state}", short(count as f64, ""))).collect();
            format!("{module} {}", parts.join(" and "))
        };
        let buckets = count(self.buckets as u64, "bucket");
        writeln!(f, "parameters: {}; {buckets}", Module::ALL.map(module).join(", "))?;
        let pack = &self.pack;
        let longest = pack.samples.iter().max().copied().unwrap_or(0);
        writeln!(
            f,
            "a pack: {}; {} of {}, {} of {longest}, {}",
            count(pack.tokens(), "token"),
            count(pack.images, "image"),
            count(self.tokens_per_image, "visual token"),
            count(pack.samples.len() as u64, "sample"),
            count(pack.targets, "answer token"),
        )?;
        let flops = self.pass.total_flops();
        let [total, forward, inputs, weights] =
            [flops.total(), flops.forward, flops.backward_inputs, flops.backward_weights]
                .map(|flops| short(flops as f64, "FLOP"));
        writeln!(
            f,
            "its work: {total}; forward {forward}, gradients of inputs {inputs}, of weights {weights}"
        )?;
        self.course(f)
    }

    /// A step of all ranks, and the stage.
    fn course(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let course = &self.course;
        let (step, stage) = (&course.step, &course.stage);
        writeln!(
            f,
            "a step: {}, {} tokens, {} samples of {} tokens, {}",
            count(step.packs as u64, "pack"),
            whole(step.tokens),
            whole(step.samples),
            whole(course.sample_tokens),
            short(step.flops, "FLOP"),
        )?;
        if course.phases.len() > 1 {
            let begin = |phase: &Phase| match phase.start {
                0 => format!("{} at first", short(phase.flops, "FLOP")),
                start => format!("{} after step {}", short(phase.flops, "FLOP"), grouped(start)),
            };
            // A point may unlock more of what counts as trained already.
            let different = course.phases.chunk_by(|a, b| a.flops.total_cmp(&b.flops).is_eq());
            let steps: Vec<String> = different.map(|same| begin(&same[0])).collect();
            writeln!(f, "its unlock points: {}", steps.join(", "))?;
        }
        writeln!(
            f,
            "the stage: {} step{}, {} tokens, {} samples, {}, {}",
            grouped(course.steps),
            if course.steps == 1 { "" } else { "s" },
            rounded(stage.tokens),
            rounded(stage.samples),
            short(stage.flops, "FLOP"),
            duration(course.secs),
        )?;
        if let Some(epochs) = course.epochs {
            writeln!(f, "or less: `data.epochs` {epochs} may end it earlier")?;
        }
        if course.stops_early {
            writeln!(f, "or less: `schedule.early_stop` may end it earlier")?;
        }
        if let Some(FeatureSpace { image_bytes, images, max_bytes }) = self.feature_cache {
            let all = images * image_bytes as f64;
            writeln!(
                f,
                "its features on disk: {} an image, {} for {} images if none comes twice; at most {}",
                short(image_bytes as f64, "B"),
                short(all, "B"),
                rounded(images),
                short(max_bytes as f64, "B"),
            )?;
        }
        Ok(())
    }

    fn memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nmemory of a rank, GiB")?;
        let heads = ["parameters", "masters", "gradients", "moments", "activations", "logits", "total"];
        self.rows(f, &heads.map(|head| (head, 11)), |row| {
            let memory = &row.memory;
            [
                memory.parameters,
                memory.masters,
                memory.gradients,
                memory.moments,
                memory.activations,
                memory.logits,
                memory.total(),
            ]
            .map(|bytes| digits(bytes as f64 / GIB))
            .into()
        })
    }

    fn step(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\na step: GB that a rank sends, seconds, tokens of all ranks a second")?;
        let heads = [
            ("sent", 9),
            ("compute", 9),
            ("sending", 9),
            ("of it latency", 14),
            ("without overlap", 16),
            ("with overlap", 13),
            ("tokens/s", 14),
        ];
        self.rows(f, &heads, |row| {
            let sending = row.communication;
            let mut cells: Vec<String> = [
                row.sent_bytes / 1e9,
                row.compute_secs,
                sending.secs,
                sending.latency_secs,
                row.serial_secs,
                row.step_secs,
            ]
            .map(digits)
            .into();
            cells.push(grouped(row.tokens_per_sec.round() as u64));
            cells
        })
    }

    /// A line for each strategy; the plan's own has a mark.
    fn rows(
        &self,
        f: &mut fmt::Formatter<'_>,
        heads: &[(&str, usize)],
        cells: impl Fn(&StrategyEstimate) -> Vec<String>,
    ) -> fmt::Result {
        write!(f, "{:<9}", "strategy")?;
        for (head, width) in heads {
            write!(f, " {head:>width$}")?;
        }
        writeln!(f)?;
        for row in &self.strategies {
            let mark = if row.strategy == self.planned { "*" } else { "" };
            write!(f, "{:<9}", format!("{}{mark}", row.strategy.name()))?;
            for (cell, (_, width)) in cells(row).iter().zip(heads) {
                write!(f, " {cell:>width$}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    /// What would make sending faster.
    fn hint(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(row) = self.strategies.iter().find(|row| row.strategy == self.planned) else {
            return Ok(());
        };
        let trained = self.modules.values().filter(|counts| counts.trained > 0).count();
        let waits = row.step_secs > 1.05 * row.compute_secs;
        // Two buckets of a module are the least: what lies in its blocks, and what does not.
        if waits
            && row.communication.latency_secs > 0.5 * row.communication.secs
            && self.buckets > 2 * trained
        {
            let buckets = self.buckets;
            writeln!(
                f,
                "hint: most of the sending is the latency of {buckets} buckets; raise `parallel.bucket_mb`"
            )?;
        }
        Ok(())
    }
}

fn assumptions(f: &mut fmt::Formatter<'_>, cluster: &Cluster) -> fmt::Result {
    writeln!(
        f,
        "*: the strategy of the plan.\n\
         Assumed: {} TFLOP/s of a GPU at most, {} % of it reached; {} GB/s from a node to others, {} GB/s from a GPU\n\
         to others of its node; rings and trees as NCCL's; full packs.\n\
         Not counted: the CUDA context, NCCL's buffers, unused gaps in memory, waiting for data, the update.",
        digits(cluster.peak_flops / 1e12),
        trimmed(100.0 * cluster.mfu),
        digits(cluster.node_bytes_per_sec / 1e9),
        digits(cluster.gpu_bytes_per_sec / 1e9),
    )
}

/// Three digits, more before the point where there are more.
fn digits(value: f64) -> String {
    let magnitude = if value > 0.0 { value.log10().floor() as i32 } else { 0 };
    let decimals = if value > 0.0 { (2 - magnitude).clamp(0, 6) as usize } else { 0 };
    format!("{value:.decimals$}")
}

/// Without zeros at the end.
fn trimmed(value: f64) -> String {
    let text = digits(value);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// 1234567 as `1.23M`, or with a unit as `1.23 MFLOP`.
fn short(value: f64, unit: &str) -> String {
    let prefixes = [(1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (size, prefix) = prefixes.into_iter().find(|(size, _)| value >= *size).unwrap_or((1.0, ""));
    let space = if unit.is_empty() { "" } else { " " };
    format!("{}{space}{prefix}{unit}", digits(value / size))
}

fn whole(value: f64) -> String {
    grouped(value.round() as u64)
}

/// Three digits of millions and more, else all.
fn rounded(value: f64) -> String {
    if value < 1e6 { whole(value) } else { short(value, "") }
}

fn duration(secs: f64) -> String {
    let units = [(86_400.0, "days"), (3600.0, "h"), (60.0, "min")];
    // Hours stay hours for two days.
    let (size, unit) = units.into_iter().find(|(size, _)| secs >= 2.0 * size).unwrap_or((1.0, "s"));
    format!("{} {unit}", digits(secs / size))
}

fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Config, load};
    use crate::estimate::PackGuess;

    fn cluster(world: u64) -> Cluster {
        Cluster {
            world,
            node_gpus: 8,
            node_bytes_per_sec: 400e9,
            gpu_bytes_per_sec: 450e9,
            peak_flops: 989e12,
            mfu: 0.4,
        }
    }

    fn tables(file: &str, world: u64, sets: &[&str], guess: &PackGuess) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tiny").join(file);
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        let Config::Stage(plan) = load(&path, &sets).unwrap() else { panic!("a stage") };
        match StageEstimate::of_plan(&plan, cluster(world), guess) {
            Ok(estimate) => Tables(&[estimate]).to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_stage_is_a_page() {
        insta::assert_snapshot!(tables("stage3.yaml", 2, &[], &PackGuess::default()), @r"
        tiny-stage3: 2 GPUs on 1 node, bf16, 1 pack for each in a step
        parameters: vision 2.78M trained, projector 264k trained, llm 3.67M trained; 5 buckets
        a pack: 256 tokens; 16 images of 16 visual tokens, 1 sample of 256, 256 answer tokens
        its work: 24.1 GFLOP; forward 8.12 GFLOP, gradients of inputs 8.32 GFLOP, of weights 7.68 GFLOP
        a step: 2 packs, 512 tokens, 2 samples of 256 tokens, 48.2 GFLOP
        the stage: 12 steps, 6,144 tokens, 24 samples, 579 GFLOP, 0.000854 s

        memory of a rank, GiB
        strategy   parameters     masters   gradients     moments activations      logits       total
        ddp            0.0125      0.0250      0.0250      0.0501      0.0499     0.00696       0.170
        zero1*         0.0125      0.0125      0.0250      0.0250      0.0499     0.00696       0.132
        zero2          0.0125      0.0125      0.0375      0.0250      0.0499     0.00696       0.144

        a step: GB that a rank sends, seconds, tokens of all ranks a second
        strategy       sent   compute   sending  of it latency  without overlap  with overlap       tokens/s
        ddp          0.0269  0.000061  0.000079       0.000018         0.000140      0.000099      5,160,620
        zero1*       0.0202  0.000061  0.000064       0.000019         0.000125      0.000071      7,194,859
        zero2        0.0202  0.000061  0.000064       0.000019         0.000125      0.000071      7,194,859

        *: the strategy of the plan.
        Assumed: 989 TFLOP/s of a GPU at most, 40 % of it reached; 400 GB/s from a node to others, 450 GB/s from a GPU
        to others of its node; rings and trees as NCCL's; full packs.
        Not counted: the CUDA context, NCCL's buffers, unused gaps in memory, waiting for data, the update.
        ");
    }

    #[test]
    fn what_a_run_would_refuse_is_said() {
        let sets = ["parallel.bucket_mb=1", "parallel.strategy=zero2", "run.device=cpu"];
        let guess = PackGuess { visual_tokens: Some(64), sample_tokens: Some(100), answer_tokens: Some(10) };
        insta::assert_snapshot!(tables("stage3.yaml", 1024, &sets, &guess), @r"
        tiny-stage3: 1024 CPUs on 128 nodes of 8, fp32, 1 pack for each in a step
        warning: 1024 ranks do not divide `data.streams`, 2: a run would refuse
        warning: 1024 ranks do not divide `batch.packs_per_step`, 2: a run would refuse
        parameters: vision 2.78M trained, projector 264k trained, llm 3.67M trained; 33 buckets
        a pack: 256 tokens; 4 images of 16 visual tokens, 3 samples of 100, 10 answer tokens
        its work: 9.53 GFLOP; forward 3.19 GFLOP, gradients of inputs 3.26 GFLOP, of weights 3.07 GFLOP
        a step: 2 packs, 512 tokens, 5 samples of 100 tokens, 19.1 GFLOP
        the stage: 12 steps, 6,144 tokens, 61 samples, 229 GFLOP, 1.75 s

        memory of a rank, GiB
        strategy   parameters     masters   gradients     moments activations      logits       total
        ddp            0.0286           0      0.0286      0.0571      0.0392     0.00195       0.155
        zero1          0.0286           0      0.0286    0.000056      0.0392     0.00195      0.0983
        zero2*         0.0286           0      0.0286    0.000056      0.0392     0.00195      0.0983

        a step: GB that a rank sends, seconds, tokens of all ranks a second
        strategy       sent   compute   sending  of it latency  without overlap  with overlap       tokens/s
        ddp          0.0613  0.000024   0.00465        0.00448          0.00468       0.00466     56,255,653
        zero1        0.0613  0.000024     0.146          0.146            0.146         0.146      1,795,020
        zero2*       0.0613  0.000024     0.146          0.146            0.146         0.146      1,795,020
        hint: most of the sending is the latency of 33 buckets; raise `parallel.bucket_mb`

        *: the strategy of the plan.
        Assumed: 989 TFLOP/s of a GPU at most, 40 % of it reached; 400 GB/s from a node to others, 450 GB/s from a GPU
        to others of its node; rings and trees as NCCL's; full packs.
        Not counted: the CUDA context, NCCL's buffers, unused gaps in memory, waiting for data, the update.
        ");
    }

    #[test]
    fn building_a_model_can_take_more_than_training_it() {
        let guess = PackGuess { visual_tokens: Some(16), sample_tokens: None, answer_tokens: Some(1) };
        let text = tables("stage1.yaml", 2, &["batch.tokens_per_pack=32"], &guess);
        let warning = "warning: fp32 weights take 0.025 GiB while the model is built, more than training";
        assert!(text.contains(warning), "{text}");
    }

    #[test]
    fn kept_features_have_their_size() {
        let cache = "data.feature_cache={dir: runs/features, max_bytes: 5000000}";
        let guess = PackGuess { visual_tokens: Some(64), ..PackGuess::default() };
        let text = tables("stage1.yaml", 2, &[cache], &guess);
        // 12 steps of 2 packs of 4 images; 64 patches of 192 numbers in bf16.
        let said = "its features on disk: 24.6 kB an image, 2.36 MB for 96 images if none comes twice; at most 5.00 MB";
        assert!(text.contains(said), "{text}");
    }

    #[test]
    fn guesses_must_fit_into_a_pack() {
        let guess = PackGuess { sample_tokens: Some(257), ..PackGuess::default() };
        insta::assert_snapshot!(tables("stage1.yaml", 2, &[], &guess), @r"
        tiny-stage1: `--sample-tokens` is 257, a pack has 256 tokens

        hint: give a number from 1 to 256, or raise `batch.tokens_per_pack`
        ");
    }

    #[test]
    fn numbers_have_three_digits() {
        let cases = [0.0, 0.000_123_4, 0.012_34, 1.0, 12.34, 1234.5, 1e7];
        assert_eq!(cases.map(digits), ["0", "0.000123", "0.0123", "1.00", "12.3", "1234", "10000000"]);
        assert_eq!([40.0, 12.5].map(trimmed), ["40", "12.5"]);
        assert_eq!(short(2.5e9, "FLOP"), "2.50 GFLOP");
        assert_eq!([512.0, 999_999.6, 2.5e9].map(rounded), ["512", "1,000,000", "2.50G"]);
        let times = [0.5, 119.0, 7199.0, 7201.0, 2e5].map(duration);
        assert_eq!(times, ["0.500 s", "119 s", "120 min", "2.00 h", "2.31 days"]);
    }
}
