//! Collectives on a group of several ranks, each a process with a device of its own: their values, and that what
//! is queued before and after one is ordered with it.
//!
//! The ranks are started by the launcher of `sail-train`. Each looks at its own values and ends with 1 when one is
//! wrong; the first one writes the rows of the table.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sail_torch::{Backend, GroupOptions, ProcessGroup, ReduceOp, Store, Work};
use sail_train::events::Console;
use sail_train::launch::Launch;
use sail_train::world::Place;
use tch::{Cuda, Device, Kind, Tensor, no_grad};

use crate::device::name;
use crate::table::{Figure, Table};

/// Long enough to make the first connections.
const TIMEOUT: Duration = Duration::from_secs(120);
/// A rank that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// Elements of each rank's part.
const PART: i64 = 1 << 16;
/// How often a check of order is made: a race shows in some turns only.
const TURNS: i64 = 50;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Receives the rows, `check TAB figure`
    #[arg(long)]
    rows: PathBuf,
    #[arg(long)]
    cpu: bool,
}

/// Starts a group and shows what its ranks found.
pub(crate) fn check(table: &mut Table, ranks: usize, work: &Path, device: Device) {
    let rows = work.join(format!("group-{ranks}.rows"));
    let ended = table.row(&format!("group of {ranks}, {}", backend(device)), || {
        let mut args = vec!["rank".into(), "--rows".into(), rows.clone().into()];
        args.extend((device == Device::Cpu).then(|| "--cpu".into()));
        let launch = Launch { args, nproc: ranks, nnodes: 1, node_rank: 0, rdzv: None };
        match launch.run(&Console::new().talking(false))? {
            0 => Ok("every rank found the right values".to_owned()),
            code => Err(format!("a rank ended with {code}; what it said is above").into()),
        }
    });
    let found = fs::read_to_string(&rows).unwrap_or_default();
    for (check, figure) in found.lines().filter(|_| ended).filter_map(|line| line.split_once('\t')) {
        table.row(&format!("group of {ranks}: {check}"), || Ok(figure.to_owned()));
    }
}

fn backend(device: Device) -> &'static str {
    if device.is_cuda() { "NCCL" } else { "Gloo" }
}

/// One rank.
pub(crate) fn rank(options: &Options) -> ExitCode {
    // NCCL waits without an end for a rank that it cannot reach.
    std::thread::spawn(|| {
        std::thread::sleep(PATIENCE);
        eprintln!("error: not done within {} s", PATIENCE.as_secs());
        std::process::abort()
    });
    match Member::join(options.cpu).and_then(|member| member.run(&options.rows)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// This process in the group.
struct Member {
    rank: i64,
    size: i64,
    device: Device,
    group: Arc<ProcessGroup>,
}

impl Member {
    fn join(cpu: bool) -> Result<Self, Box<dyn Error>> {
        let place = Place::from_env()?;
        let meeting = place.rendezvous.ok_or("not started as a rank")?;
        let device = if cpu { Device::Cpu } else { Device::Cuda(place.local_rank) };
        sail_torch::set_device(device)?;
        let store = Store::connect(&meeting.host, meeting.port, &meeting.prefix, TIMEOUT)?;
        let options = GroupOptions {
            name: "check".to_owned(),
            backend: Backend::for_device(device),
            rank: place.rank,
            size: place.size,
            timeout: TIMEOUT,
            address: Some("127.0.0.1".to_owned()),
        };
        let group = Arc::new(ProcessGroup::join(&store, options)?);
        Ok(Self { rank: place.rank as i64, size: place.size as i64, device, group })
    }

    fn run(&self, rows: &Path) -> Result<(), Box<dyn Error>> {
        let mut found = Vec::new();
        let mut row = |check: &str, figure: Figure| -> Result<(), Box<dyn Error>> {
            let figure = figure.map_err(|error| format!("{check}: {error}"))?;
            found.push(format!("{check}\t{figure}"));
            Ok(())
        };
        for kind in [Kind::Float, Kind::BFloat16] {
            row(&format!("values in {}", name(kind)), self.values(kind))?;
        }
        row("gathers in place, used at once", self.gathers())?;
        row("sums that gradient hooks start", self.hooks())?;
        row("speed of all-reduce", self.speed())?;
        if self.device.is_cuda() {
            row("contexts", self.contexts())?;
        }
        self.group.barrier()?;
        self.group.shut_down()?;
        if self.rank == 0 {
            fs::write(rows, found.join("\n"))?;
        }
        Ok(())
    }

    /// What a rank puts in: small whole numbers, whose sums bf16 holds as well.
    fn own(&self, rank: i64, parts: i64, kind: Kind) -> Tensor {
        (Tensor::arange(parts * PART, (Kind::Int64, self.device)).remainder(7) + rank).to_kind(kind)
    }

    fn zeros(&self, parts: i64, kind: Kind) -> Tensor {
        Tensor::zeros([parts * PART], (kind, self.device))
    }

    fn part(&self, whole: &Tensor) -> Tensor {
        whole.narrow(0, self.rank * PART, PART)
    }

    fn values(&self, kind: Kind) -> Figure {
        let ranks = self.size * (self.size - 1) / 2;
        let sum = self.own(0, self.size, kind) * self.size + ranks;
        let whole = || self.own(self.rank, self.size, kind);

        let tensor = whole();
        self.group.all_reduce(&tensor, ReduceOp::Sum)?.wait()?;
        same("all-reduce", &tensor, &sum)?;
        let tensor = whole();
        self.group.all_reduce(&tensor, ReduceOp::Max)?.wait()?;
        same("all-reduce of the largest", &tensor, &self.own(self.size - 1, self.size, kind))?;
        let tensor = whole();
        self.group.reduce_scatter(&self.part(&tensor), &tensor)?.wait()?;
        same("reduce-scatter", &self.part(&tensor), &self.part(&sum))?;
        let tensor = self.zeros(self.size, kind);
        self.part(&tensor).copy_(&self.own(self.rank, 1, kind));
        self.group.all_gather(&tensor, &self.part(&tensor))?.wait()?;
        let parts: Vec<Tensor> = (0..self.size).map(|rank| self.own(rank, 1, kind)).collect();
        same("all-gather", &tensor, &Tensor::cat(&parts, 0))?;
        let tensor = whole();
        self.group.broadcast(&tensor, self.size as usize - 1)?.wait()?;
        same("broadcast", &tensor, &self.own(self.size - 1, self.size, kind))?;
        let tensor = Tensor::full([3], self.rank, (Kind::Double, self.device));
        self.group.all_reduce(&tensor, ReduceOp::Sum)?.wait()?;
        same("all-reduce of fp64", &tensor, &(tensor.zeros_like() + ranks))?;
        self.group.barrier()?;
        Ok("all-reduce, reduce-scatter, all-gather, broadcast, barrier".to_owned())
    }

    /// As updated parameters travel: written, gathered in place while other work runs, and read at once.
    fn gathers(&self) -> Figure {
        let whole = self.zeros(self.size, Kind::Float);
        let other = Tensor::randn([512, 512], (Kind::Float, self.device));
        let ranks = Tensor::arange(self.size, (Kind::Float, self.device)).unsqueeze(1);
        let mut wrong = Tensor::zeros([], (Kind::Float, self.device));
        for turn in 0..TURNS {
            let _ = self.part(&whole).fill_(turn * 100 + self.rank);
            let work = self.group.all_gather(&whole, &self.part(&whole))?;
            let _beside = other.matmul(&other);
            work.wait()?;
            wrong += (whole.view([self.size, PART]) - (&ranks + turn * 100)).abs().max();
        }
        right(&wrong)
    }

    /// As gradients travel: a hook, on the thread that autograd runs it on, starts the sum, and this thread waits.
    fn hooks(&self) -> Figure {
        let param = self.zeros(1, Kind::Float).set_requires_grad(true);
        let state = Arc::new(Mutex::new((self.zeros(1, Kind::Float), Vec::<Work>::new())));
        let (of_hook, group) = (Arc::clone(&state), Arc::clone(&self.group));
        sail_torch::set_grad_sink(&param, move |param: Tensor| {
            let send = || -> Result<(), Box<dyn Error>> {
                let grad = sail_torch::take_grad(&param)?.ok_or("no gradient")?;
                let (flat, works) = &mut *of_hook.lock().unwrap_or_else(PoisonError::into_inner);
                no_grad(|| flat.copy_(&grad));
                works.push(group.all_reduce(flat, ReduceOp::Sum)?);
                Ok(())
            };
            send().map_err(|error| error.to_string())
        })?;
        let other = Tensor::randn([512, 512], (Kind::Float, self.device)).set_requires_grad(true);
        let mut wrong = Tensor::zeros([], (Kind::Float, self.device));
        for turn in 1..=TURNS {
            let loss = (&param * (turn + self.rank)).sum(Kind::Float) + other.matmul(&other).sum(Kind::Float);
            loss.f_backward()?;
            let (flat, works) = &mut *state.lock().unwrap_or_else(PoisonError::into_inner);
            for work in works.drain(..) {
                work.wait()?;
            }
            let expected = self.size * turn + self.size * (self.size - 1) / 2;
            wrong += (&*flat - expected).abs().max();
        }
        right(&wrong)
    }

    fn speed(&self) -> Figure {
        let (mib, times) = if self.device.is_cuda() { (256, 10) } else { (4, 2) };
        let tensor = Tensor::zeros([mib << 18], (Kind::Float, self.device));
        let reduce = |times| -> Result<f64, Box<dyn Error>> {
            let started = Instant::now();
            for _ in 0..times {
                self.group.all_reduce(&tensor, ReduceOp::Sum)?.wait()?;
            }
            // The host waits for the device.
            let _ = tensor.double_value(&[0]);
            Ok(started.elapsed().as_secs_f64() / f64::from(times))
        };
        reduce(2)?;
        let secs = reduce(times)?;
        let share = 2.0 * (self.size - 1) as f64 / self.size as f64;
        let gb_per_sec = share * (mib << 20) as f64 / secs / 1e9;
        Ok(format!("{mib} MiB in {:.2} ms, {gb_per_sec:.1} GB/s sent by each rank", 1e3 * secs))
    }

    /// A rank must take nothing of the devices of others.
    fn contexts(&self) -> Figure {
        for other in (0..Cuda::device_count() as usize).filter(|other| Device::Cuda(*other) != self.device) {
            if sail_torch::has_context(other)? {
                return Err(format!("a context on device {other} beside {:?}", self.device).into());
            }
        }
        Ok("every rank has one on its own device alone".to_owned())
    }
}

fn same(what: &str, found: &Tensor, expected: &Tensor) -> Result<(), Box<dyn Error>> {
    if found.equal(expected) {
        return Ok(());
    }
    let wrong = found.ne_tensor(expected).sum(Kind::Int64).int64_value(&[]);
    Err(format!("{what}: {wrong} of {} values are wrong", found.numel()).into())
}

/// `wrong` is 0 where every turn was right.
fn right(wrong: &Tensor) -> Figure {
    match wrong.double_value(&[]) {
        0.0 => Ok(format!("right in each of {TURNS} turns")),
        wrong => Err(format!("values are off by {wrong} in all turns together").into()),
    }
}
