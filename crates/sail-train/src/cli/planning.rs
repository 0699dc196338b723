//! `--dry-run`: what stages would do and take, on this many GPUs or on any other number.

use clap::Args;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::estimate::link::Cluster;
use crate::estimate::peak::H100_SXM;
use crate::estimate::{PackGuess, StageEstimate, Tables};

/// Bytes a second of a Gbit/s.
const GBIT: f64 = 1e9 / 8.0;

#[derive(Debug, Args)]
#[command(next_help_heading = "Planning, with --dry-run")]
pub(super) struct Options {
    /// GPUs that each stage is planned for [default: 1, or as many as ranks were started]
    #[arg(long, value_name = "N")]
    world: Option<u64>,
    /// GPUs of a node
    #[arg(long, value_name = "N", default_value_t = 8, requires = "dry_run")]
    node_gpus: u64,
    /// Gbit/s from a node to others, all its network cards together
    #[arg(long, value_name = "N", default_value_t = 3200.0, requires = "dry_run")]
    link_gbps: f64,
    /// Gbit/s from a GPU to others of its node
    #[arg(long, value_name = "N", default_value_t = 3600.0, requires = "dry_run")]
    intra_link_gbps: f64,
    /// What a GPU computes at most in the run's dtype, TFLOP/s
    #[arg(long, value_name = "N", default_value_t = H100_SXM, requires = "dry_run")]
    peak_tflops: f64,
    /// Share of it that training reaches, up to 1
    #[arg(long, value_name = "X", default_value_t = 0.4, requires = "dry_run")]
    mfu: f64,
    /// Visual tokens of a pack [default: `data.visual_tokens_per_pack`, or all]
    #[arg(long, value_name = "N", requires = "dry_run")]
    visual_tokens: Option<u64>,
    /// Tokens of a sample [default: a whole pack]
    #[arg(long, value_name = "N", requires = "dry_run")]
    sample_tokens: Option<u64>,
    /// Tokens of a pack that are learnt [default: all]
    #[arg(long, value_name = "N", requires = "dry_run")]
    answer_tokens: Option<u64>,
}

impl Options {
    /// The machines to plan for, where the command asks for it; `started` is how many ranks it was started as.
    ///
    /// # Errors
    /// [`Error::Usage`] for numbers that make no sense, and for planning without `--dry-run`.
    pub(super) fn cluster(&self, is_dry_run: bool, started: usize) -> Result<Option<Cluster>> {
        if !is_dry_run {
            return self.world.map_or(Ok(None), |world| {
                Err(Error::usage(
                    format!("`--world {world}` only plans, and this command would train"),
                    "add `--dry-run`, or start ranks with `sail-train launch`",
                ))
            });
        }
        let world = self.world.unwrap_or(started as u64);
        for (option, value) in [("world", world), ("node-gpus", self.node_gpus)] {
            if !(1..=1 << 20).contains(&value) {
                let message = format!("`--{option}` is {value}");
                return Err(Error::usage(message, "give a number of GPUs, from 1 to 1048576"));
            }
        }
        for (option, value) in [
            ("link-gbps", self.link_gbps),
            ("intra-link-gbps", self.intra_link_gbps),
            ("peak-tflops", self.peak_tflops),
        ] {
            if !(1e-3..=1e9).contains(&value) {
                return Err(Error::usage(
                    format!("`--{option}` is {value}"),
                    "give a number from 0.001 to 1e9",
                ));
            }
        }
        if !(1e-3..=1.0).contains(&self.mfu) {
            let message = format!("`--mfu` is {}", self.mfu);
            return Err(Error::usage(message, "give a share from 0.001 to 1, such as 0.4"));
        }
        Ok(Some(Cluster {
            world,
            node_gpus: self.node_gpus,
            node_bytes_per_sec: self.link_gbps * GBIT,
            gpu_bytes_per_sec: self.intra_link_gbps * GBIT,
            peak_flops: self.peak_tflops * 1e12,
            mfu: self.mfu,
        }))
    }

    /// What each stage would do and take on these machines.
    ///
    /// # Errors
    /// Those of [`StageEstimate::of_plan`].
    pub(super) fn text(&self, config: &Config, cluster: Cluster) -> Result<String> {
        let guess = PackGuess {
            visual_tokens: self.visual_tokens,
            sample_tokens: self.sample_tokens,
            answer_tokens: self.answer_tokens,
        };
        let stages: Result<Vec<StageEstimate>> =
            config.plans().into_iter().map(|plan| StageEstimate::of_plan(plan, cluster, &guess)).collect();
        Ok(Tables(&stages?).to_string())
    }
}
