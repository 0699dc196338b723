//! What the real `sail-train` does: steps of every strategy, bf16, resume, a curriculum, and how fast it is.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::table::{Figure, Table};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(900);
/// Exit code of a run that was stopped and saved.
const STOPPED: i32 = 3;
const STRATEGIES: [&str; 3] = ["ddp", "zero1", "zero2"];
/// How far losses of two runs in fp32 that sum in another order may be apart, as a share.
const SAME: f64 = 1e-4;
/// How far losses of bf16 may be from those of fp32.
const NEAR: f64 = 2e-2;
/// Steps before speed is measured, and of the measurement.
const WARM_UP: usize = 5;
const MEASURED: usize = 10;

/// What is trained with what.
pub(crate) struct Training {
    pub(crate) train: PathBuf,
    pub(crate) work: PathBuf,
    pub(crate) cpu: bool,
    pub(crate) short: bool,
    /// One for each device.
    pub(crate) ranks: usize,
}

/// How a run is started.
#[derive(Clone, Copy)]
struct Start<'a> {
    /// Its folder, and what its log is called.
    name: &'a str,
    /// With the launcher, or without it.
    ranks: Option<usize>,
    config: &'a str,
    options: &'a [&'a str],
}

impl Training {
    /// Makes the checks, those of strategies on groups of these sizes.
    pub(crate) fn check(&self, table: &mut Table, sizes: &[usize]) {
        let mut alone = Vec::new();
        table.row("steps of one process, fp32", || {
            alone = self.steps("alone", None, "ddp", "fp32")?;
            Ok(format!("losses {} to {}", shown(alone.first()), shown(alone.last())))
        });
        let precisions: &[_] = if self.short { &[("fp32", SAME)] } else { &[("fp32", SAME), ("bf16", NEAR)] };
        for (precision, limit) in precisions {
            for size in sizes {
                for strategy in STRATEGIES {
                    table.row(&format!("{strategy} in {precision}, ranks: {size}"), || {
                        let name = format!("{strategy}-{precision}-{size}");
                        apart(&self.steps(&name, Some(*size), strategy, precision)?, &alone, *limit)
                    });
                }
            }
        }
        table.row("stop and resume", || self.resume());
        if self.short {
            return;
        }
        table.row("curriculum, export, eval, generate", || self.curriculum());
        table.row("speed, one process", || self.speed(None));
        if self.ranks > 1 {
            table.row(&format!("speed, ranks: {}", self.ranks), || self.speed(Some(self.ranks)));
        } else {
            table.skip("several ranks", "this machine has one device");
        }
    }

    /// Steps of the plan that all runs of a comparison share, with every module trained.
    fn plan(&self, strategy: &str, precision: &str) -> Vec<String> {
        let steps = if self.short { 3 } else { 6 };
        [
            "eval=null",
            "train.vision={ lr: 2e-4, weight_decay: 0.01 }",
            "train.llm={ lr: 2e-4, weight_decay: 0.01 }",
            &format!("schedule.steps={steps}"),
            &format!("batch.packs_per_step={}", 2 * self.ranks),
            &format!("data.streams={}", self.ranks),
            &format!("run.precision={precision}"),
            &format!("parallel.strategy={strategy}"),
            // Small enough for several of them.
            "parallel.bucket_mb=4",
        ]
        .map(|set| format!("--set={set}"))
        .into()
    }

    /// The losses of a run's steps.
    fn steps(&self, name: &str, ranks: Option<usize>, strategy: &str, precision: &str) -> Result<Vec<f64>> {
        self.stage(name, ranks, &self.plan(strategy, precision), &[], 0)
    }

    fn stage(
        &self,
        name: &str,
        ranks: Option<usize>,
        plan: &[String],
        more: &[&str],
        code: i32,
    ) -> Result<Vec<f64>> {
        let options: Vec<&str> = plan.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let start = Start { name, ranks, config: "configs/tiny/stage1.yaml", options: &options };
        self.run(start, code)?;
        let folder = self.work.join(name);
        let lines = train_lines(&folder.join("runs/tiny/stage1/metrics.jsonl"))?;
        if code == 0 {
            fs::remove_dir_all(&folder)?;
        }
        lines.iter().map(|line| number(line, "loss")).collect()
    }

    fn resume(&self) -> Figure {
        let (ranks, plan) = (Some(self.ranks), self.plan("zero1", "auto"));
        let straight = self.stage("straight", ranks, &plan, &[], 0)?;
        self.stage("resumed", ranks, &plan, &["--stop-at=2"], STOPPED)?;
        let resumed = self.stage("resumed", ranks, &plan, &[], 0)?;
        if resumed == straight {
            return Ok("losses of a straight run, bit for bit".to_owned());
        }
        let figure = apart(&resumed, &straight, if self.cpu { 0.0 } else { NEAR })?;
        Ok(format!("not bit for bit: {figure}"))
    }

    fn curriculum(&self) -> Figure {
        let start = Start { name: "tiny", ranks: None, config: "configs/tiny/curriculum.yaml", options: &[] };
        self.run(start, 0)?;
        let stage3 = self.work.join("tiny/runs/tiny/stage3");
        let summary: Value = serde_json::from_slice(&fs::read(stage3.join("summary.json"))?)?;
        for file in ["config.json", "model.safetensors"] {
            fs::metadata(stage3.join("export/vit").join(file))?;
        }
        let checkpoint = format!("--checkpoint={}", stage3.display());
        self.command("eval", &["eval", &checkpoint])?;
        let device = if self.cpu { "--device=cpu" } else { "--device=cuda" };
        let ask = ["generate", &checkpoint, "--prompt=What is this?", "--max-new-tokens=8", device];
        self.command("generate", &ask)?;
        let loss = |when: &str| shown(summary[when]["total"]["loss"].as_f64().as_ref());
        Ok(format!("held-out loss of stage 3 {} to {}", loss("before"), loss("after")))
    }

    /// Starts a run, looks at some of its steps, and ends it.
    fn speed(&self, ranks: Option<usize>) -> Figure {
        let name = format!("speed-{}", ranks.unwrap_or(1));
        let packs = format!("--set=batch.packs_per_step={}", 2 * self.ranks);
        let streams = format!("--set=data.streams={}", 2 * self.ranks);
        let (config, run) = if self.cpu {
            ("configs/tiny/stage1.yaml", "runs/tiny/stage1")
        } else {
            ("configs/gpu-check/throughput.yaml", "runs/throughput")
        };
        let options = [&packs, &streams, "--set=schedule.steps=100000", "--set=eval=null"];
        let mut child = self.start(Start { name: &name, ranks, config, options: &options })?;
        let metrics = self.work.join(&name).join(run).join("metrics.jsonl");
        let started = Instant::now();
        let lines = loop {
            let lines = train_lines(&metrics).unwrap_or_default();
            if lines.len() >= WARM_UP + MEASURED {
                break lines;
            }
            if child.try_wait()?.is_some() || started.elapsed() > PATIENCE {
                end(&mut child)?;
                return Err(format!("{} steps were made\n{}", lines.len(), self.last_words(&name)).into());
            }
            sleep(Duration::from_millis(200));
        };
        // With its ranks, where it is the launcher.
        end(&mut child)?;
        let measured = &lines[WARM_UP..];
        let sum = |field| measured.iter().map(|line| number(line, field)).sum::<Result<f64>>();
        let (tokens, secs, wait) = (sum("tokens")?, sum("step_secs")?, sum("data_wait_secs")?);
        let memory = measured.last().and_then(|line| line["peak_memory_bytes"].as_f64());
        let memory =
            memory.map_or(String::new(), |peak| format!(", peak {:.1} GiB", peak / f64::from(1 << 30)));
        let (rate, each) = (tokens / secs, tokens / secs / ranks.unwrap_or(1) as f64);
        Ok(format!(
            "{rate:.0} tokens/s, {each:.0} for each rank, {:.2} s a step, {:.0}% of it waiting for data{memory}",
            secs / measured.len() as f64,
            100.0 * wait / secs
        ))
    }

    /// Runs `sail-train` to its end, which must be with this exit code.
    fn run(&self, start: Start, code: i32) -> Result<()> {
        let mut child = self.start(start)?;
        self.wait(&mut child, start.name, code)
    }

    fn start(&self, Start { name, ranks, config, options }: Start) -> Result<Child> {
        let mut args: Vec<String> = Vec::new();
        if let Some(ranks) = ranks {
            args.extend(["launch".into(), format!("--nproc={ranks}"), "--".into()]);
        }
        args.extend([
            format!("--config={config}"),
            format!("--set=run.root={}", self.work.join(name).display()),
        ]);
        args.extend(self.cpu.then(|| "--set=run.device=cpu".to_owned()));
        args.extend(options.iter().map(|option| (*option).to_owned()));
        self.spawn(name, &args)
    }

    /// A command of `sail-train` that is no run.
    fn command(&self, name: &str, args: &[&str]) -> Result<()> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let mut child = self.spawn(name, &args)?;
        self.wait(&mut child, name, 0)
    }

    fn spawn(&self, name: &str, args: &[String]) -> Result<Child> {
        let log = File::options().create(true).append(true).open(self.log(name))?;
        let mut command = Command::new(&self.train);
        command.args(args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command.spawn()?)
    }

    fn wait(&self, child: &mut Child, name: &str, code: i32) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(status) = child.try_wait()? {
                if status.code() == Some(code) {
                    return Ok(());
                }
                return Err(format!("{status}\n{}", self.last_words(name)).into());
            }
            sleep(Duration::from_millis(20));
        }
        end(child)?;
        Err(format!("not done within {} s\n{}", PATIENCE.as_secs(), self.last_words(name)).into())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.work.join(format!("{name}.log"))
    }

    fn last_words(&self, name: &str) -> String {
        let text = fs::read_to_string(self.log(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(15)..].join("\n    ");
        format!("    {last}\n    (the end of {})", self.log(name).display())
    }
}

fn end(child: &mut Child) -> Result<()> {
    // It fails for one that has ended.
    drop(child.kill());
    child.wait()?;
    Ok(())
}

fn train_lines(metrics: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(metrics)?;
    // The last line may be one that is just being written.
    let lines =
        text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(serde_json::from_str::<Value>);
    let lines = lines.collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(lines.into_iter().filter(|line| line["kind"] == "train").collect())
}

fn number(line: &Value, field: &str) -> Result<f64> {
    line[field].as_f64().ok_or_else(|| format!("`{field}` is no number in {line}").into())
}

/// How far two runs' losses are apart, as a share.
fn apart(found: &[f64], expected: &[f64], limit: f64) -> Figure {
    if found.len() != expected.len() || found.is_empty() {
        return Err(format!("{} losses against {}", found.len(), expected.len()).into());
    }
    if found == expected {
        return Ok("the same losses, bit for bit".to_owned());
    }
    let shares = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs() / expected);
    let shares: Vec<f64> = shares.collect();
    let figure = format!("losses at most {:.1e} apart", shares.iter().copied().fold(0.0, f64::max));
    // Also false for what is not a number.
    let near = shares.iter().all(|share| *share <= limit);
    if near { Ok(figure) } else { Err(format!("{figure}, more than {limit:.0e}").into()) }
}

fn shown(loss: Option<&f64>) -> String {
    loss.map_or("nothing".to_owned(), |loss| format!("{loss:.4}"))
}
