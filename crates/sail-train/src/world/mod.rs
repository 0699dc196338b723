//! The processes that train together: who this one is, and what they tell each other.
//!
//! A [`World`] lives as long as the process trains. It has a store for words (`agree`), a group for numbers on
//! the host, a group for gradients on the device, and a watch over the other ranks (`watch`), which ends the
//! process when one of them is gone. What this process does is kept (`progress`) for those who look from outside. A
//! process alone is a world of one, in which nothing is sent. Where a process stands is read from its environment
//! (`place`, `slurm`).

mod agree;
mod beats;
mod place;
mod progress;
mod slurm;
mod watch;

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sail_torch::{Backend, GroupOptions, ProcessGroup, Store};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};
use tracing::{info, warn};

use crate::config::Plan;
use crate::device::take_device;
use crate::error::{Error, Result};
use crate::events::Console;
use crate::launch::resolve;

pub use agree::Fields;
pub(crate) use agree::{host_name, within};
pub use place::{Place, Rendezvous, Server, Starter};
pub(crate) use progress::{AGREEING, DATA, DATA_OF_OTHERS, Doing, GRADIENTS, Progress, UPDATING};
use watch::Watch;
pub(crate) use watch::tell_of_end;

/// Slows collectives down to a link of this many bytes a second, to study overlap on one machine.
const SIMULATED_LINK: &str = "SAIL_SIMULATED_LINK_BYTES_PER_SEC";

/// How much longer than its patience a rank waits until all have met, so that the main rank's answer comes first.
const MARGIN: Duration = Duration::from_secs(5);

/// How much later than the watch NCCL gives up: it ends the process without a name, and the watch has one.
const BACKSTOP: Duration = Duration::from_secs(30);

/// The processes that train together.
pub struct World {
    place: Place,
    progress: Arc<Progress>,
    ranks: Option<Ranks>,
}

/// What there is where there are several.
struct Ranks {
    store: Arc<Store>,
    /// Numbers on the host, over Gloo.
    host: Arc<ProcessGroup>,
    /// Tensors on the device, over NCCL or Gloo: a group of its own, so that a word need not wait for gigabytes.
    device: Arc<ProcessGroup>,
    /// How much later than the watch the device's group gives up.
    backstop: Duration,
    watch: Watch,
    /// What [`World::newly_sent_bytes`] has told already.
    told_bytes: AtomicU64,
    /// How often they have compared what they have.
    agreements: AtomicU64,
    /// Keeps the store of all ranks alive, where this process serves it.
    _server: Option<Store>,
}

impl World {
    /// A process alone.
    pub fn alone() -> Self {
        Self { place: Place::SINGLE, progress: Arc::default(), ranks: None }
    }

    /// Meets the other processes. Returns once all are there and agree on how many they are.
    ///
    /// # Errors
    /// [`Error::Ranks`] when one does not come in time or was started otherwise; those of c10d.
    pub fn join(place: Place, plan: &Plan, console: &Console) -> Result<Self> {
        let progress = Arc::default();
        let Some(meeting) = place.rendezvous.clone() else {
            return Ok(Self { place, progress, ranks: None });
        };
        let patience = Duration::from_secs(plan.parallel.first_step_timeout_secs);
        info!("rank {} of {} meets the others at {}:{}", place.rank, place.size, meeting.host, meeting.port);
        resolve(&meeting.host, "`MASTER_ADDR`, or the first of Slurm's node list,")?;
        let mut watch = Watch::start(&place, &meeting, patience + MARGIN, console, &progress)?;
        let at_store = |error| Error::meeting(&meeting.host, meeting.port, error);
        let serve = || Store::serve(meeting.port, patience).map_err(at_store);
        let server = place.serves_store().then(serve).transpose()?;
        let connect = || Store::connect(&meeting.host, meeting.port, &meeting.prefix, patience);
        let store = Arc::new(connect().map_err(at_store)?);
        watch.heard();
        let address = address_towards(&meeting.host, meeting.port);
        agree::meet(&store, &place, address.as_deref(), patience)?;
        watch.beat(connect().map_err(at_store)?, &meeting, patience)?;
        // From here on the others learn what goes wrong.
        let groups = form_groups(&place, plan, &store, address, watch.begun());
        let (host, device, backend) = groups.map_err(|error| watch.explain(error))?;
        let backstop = if backend == Backend::Gloo { Duration::ZERO } else { BACKSTOP };
        // The first comparison was that of the program.
        let (told_bytes, agreements) = (AtomicU64::new(0), AtomicU64::new(1));
        Ok(Self {
            place,
            progress,
            ranks: Some(Ranks {
                store,
                host,
                device,
                backstop,
                watch,
                told_bytes,
                agreements,
                _server: server,
            }),
        })
    }

    /// This process, from 0.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.place.size
    }

    /// Where it stands.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Whether this process is the one that writes what all share: files of the run, and the console.
    pub fn is_main(&self) -> bool {
        self.place.is_main()
    }

    /// The ranks whose collectives move tensors on the device; none for a process alone.
    pub fn group(&self) -> Option<Arc<ProcessGroup>> {
        self.ranks.as_ref().map(|ranks| Arc::clone(&ranks.device))
    }

    /// Bytes that this rank's collectives on the device have sent since the last call.
    pub fn newly_sent_bytes(&self) -> u64 {
        self.ranks.as_ref().map_or(0, |ranks| {
            let sent = ranks.device.sent_bytes();
            sent - ranks.told_bytes.swap(sent, Ordering::Relaxed)
        })
    }

    /// Says what this process does, for the others to read when it does not come, and for the watchdog.
    pub fn doing(&self, step: u64, what: &'static str) {
        self.progress.begin(step, what, self.waited());
    }

    /// Says that this process has done a part of what it does, which may take long.
    pub fn goes_on(&self) {
        self.progress.go_on();
    }

    /// What this process does now.
    pub(crate) fn progress(&self) -> Doing {
        self.progress.now()
    }

    /// Which other rank keeps this one waiting, as far as is known.
    pub(crate) fn who_is_late(&self) -> Option<String> {
        self.ranks.as_ref().and_then(|ranks| ranks.watch.reason())
    }

    /// How long the host has waited for works of the groups so far.
    pub(crate) fn waited(&self) -> Duration {
        self.ranks.as_ref().map_or(Duration::ZERO, |ranks| ranks.host.waited() + ranks.device.waited())
    }

    /// Has `told` called as this process begins and ends to wait for collectives, see [`ProcessGroup::on_wait`].
    pub(crate) fn on_wait(&self, told: impl Fn(bool) + Clone + Send + Sync + 'static) {
        if let Some(ranks) = &self.ranks {
            ranks.host.on_wait(told.clone());
            ranks.device.on_wait(told);
        }
    }

    /// How long the others may be behind from now on.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn set_timeout(&self, secs: u64) -> Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let timeout = Duration::from_secs(secs);
        ranks.watch.set_limit(timeout);
        ranks.host.set_timeout(timeout)?;
        ranks.device.set_timeout(timeout + ranks.backstop)?;
        Ok(())
    }

    /// What every rank gives, in their order; as many numbers from each.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn gather_numbers(&self, own: &[f64]) -> Result<Vec<Vec<f64>>> {
        let Some(ranks) = &self.ranks else { return Ok(vec![own.to_vec()]) };
        let part = Tensor::from_slice(own);
        let whole = Tensor::zeros([(own.len() * self.size()) as i64], (Kind::Double, Device::Cpu));
        ranks.host.all_gather(&whole, &part)?.wait()?;
        let all = Vec::<f64>::try_from(&whole)?;
        Ok(all.chunks(own.len()).map(<[f64]>::to_vec).collect())
    }

    /// What every rank gives, in their order.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, own: &T) -> Result<Vec<T>> {
        let bytes = serde_json::to_vec(own).map_err(Error::exchange)?;
        let lengths = self.gather_numbers(&[bytes.len() as f64])?;
        let longest = lengths.iter().map(|length| length[0] as usize).max().unwrap_or(0);
        let mut padded = bytes;
        padded.resize(longest, 0);
        let whole = match &self.ranks {
            None => padded,
            Some(ranks) => {
                let whole = Tensor::zeros([(longest * self.size()) as i64], (Kind::Uint8, Device::Cpu));
                ranks.host.all_gather(&whole, &Tensor::from_slice(&padded))?.wait()?;
                Vec::<u8>::try_from(&whole)?
            }
        };
        let parts = whole.chunks(longest.max(1)).zip(lengths);
        parts
            .map(|(part, length)| {
                serde_json::from_slice(&part[..length[0] as usize]).map_err(Error::exchange)
            })
            .collect()
    }

    /// What the main rank makes, on every rank; an error there is one everywhere.
    ///
    /// # Errors
    /// The main rank's, on the others as [`Error::Elsewhere`]; those of c10d.
    pub fn from_main<T: Serialize + DeserializeOwned>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(ranks) = &self.ranks else { return make() };
        let (made, failed) = match self.is_main().then(make) {
            None => (None, None),
            Some(Ok(made)) => (Some(Ok(made)), None),
            Some(Err(error)) => (Some(Err((error.to_string(), error.exit_code()))), Some(error)),
        };
        let bytes = serde_json::to_vec(&made).map_err(Error::exchange)?;
        let length = Tensor::from_slice(&[bytes.len() as i64]);
        ranks.host.broadcast(&length, 0)?.wait()?;
        let mut padded = bytes;
        padded.resize(length.int64_value(&[0]) as usize, 0);
        let text = Tensor::from_slice(&padded);
        ranks.host.broadcast(&text, 0)?.wait()?;
        if let Some(error) = failed {
            return Err(error);
        }
        let text = Vec::<u8>::try_from(&text)?;
        // Not as an option, since a value may itself be JSON's `null`.
        let made: std::result::Result<T, (String, u8)> =
            serde_json::from_slice(&text).map_err(Error::exchange)?;
        made.map_err(|(message, code)| Error::Elsewhere { message, code })
    }

    /// Does on the main rank alone what needs no other.
    ///
    /// # Errors
    /// Those of `work`, on the main rank.
    pub fn on_main(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.is_main() { work() } else { Ok(()) }
    }

    /// Compares what this rank has with what the main rank has. Every rank makes the same call.
    ///
    /// # Errors
    /// [`Error::Usage`] on every rank, naming the ranks and the fields that differ.
    pub fn agree(&self, fields: impl FnOnce() -> Fields) -> Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let fields = fields();
        ranks.watch.begun().fetch_add(1, Ordering::Relaxed);
        let number = ranks.agreements.fetch_add(1, Ordering::Relaxed);
        agree::agree(&ranks.store, &self.place, number, &fields)
    }

    /// What an error means: where another rank is the reason of it, that is found out and named. The others
    /// learn why this one ends.
    pub fn explain(&self, error: Error) -> Error {
        match &self.ranks {
            Some(ranks) => ranks.watch.explain(error),
            None => error,
        }
    }

    /// Leaves the others in peace: they know that this process has done its part.
    pub fn leave(&self) {
        let Some(ranks) = &self.ranks else { return };
        if let Err(error) = ranks.device.shut_down() {
            // The run is done and saved.
            warn!("the ranks' group was not left in order: {error}");
        }
        ranks.watch.end();
        agree::leave(&ranks.store, &self.place);
    }
}

/// The groups of ranks that have met: for numbers on the host, and for tensors on the device.
fn form_groups(
    place: &Place,
    plan: &Plan,
    store: &Store,
    address: Option<String>,
    begun: &Arc<AtomicU64>,
) -> Result<(Arc<ProcessGroup>, Arc<ProcessGroup>, Backend)> {
    agree::agree(store, place, 0, &Fields::from([("sail-train".to_owned(), agree::program()?)]))?;
    let device = take_device(plan.run.device, place)?;
    let address = reachable_address(address, store, place)?;
    let link = simulated_link()?;
    let timeout = Duration::from_secs(plan.parallel.first_step_timeout_secs);
    let group = |name: &str, backend, link: Option<f64>| {
        let (name, address) = (name.to_owned(), address.clone());
        let options = GroupOptions { name, backend, rank: place.rank, size: place.size, timeout, address };
        let group = ProcessGroup::join(store, options)?.with_counter(Arc::clone(begun));
        Ok::<_, Error>(Arc::new(match link {
            Some(bytes_per_sec) => group.with_simulated_link(bytes_per_sec),
            None => group,
        }))
    };
    let backend = Backend::for_device(device);
    Ok((group("host", Backend::Gloo, None)?, group("device", backend, link)?, backend))
}

/// The address of this host from which it reaches another one.
fn address_towards(host: &str, port: u16) -> Option<String> {
    ["0.0.0.0:0", "[::]:0"].into_iter().find_map(|any| {
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect((host, port)).ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    })
}

/// The address of this host that the others reach it at: the one that it reaches the store from. Where that is
/// the loopback device, because this host's own name stands for it, and there are other hosts, the one that it
/// reaches them from.
fn reachable_address(towards_store: Option<String>, store: &Store, place: &Place) -> Result<Option<String>> {
    if std::env::var_os("GLOO_SOCKET_IFNAME").is_some() {
        return Ok(None);
    }
    let is_loopback = |address: &str| address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if place.local_size < place.size && towards_store.as_deref().is_some_and(is_loopback) {
        for rank in 0..place.size {
            if let Some(other) = agree::address_of(store, rank)?.filter(|other| !is_loopback(other)) {
                return Ok(address_towards(&other, 9));
            }
        }
    }
    Ok(towards_store)
}

fn simulated_link() -> Result<Option<f64>> {
    let Some(value) = std::env::var_os(SIMULATED_LINK) else { return Ok(None) };
    let bytes_per_sec = value.to_str().and_then(|text| text.parse::<f64>().ok()).filter(|rate| *rate > 0.0);
    match bytes_per_sec {
        Some(rate) => Ok(Some(rate)),
        None => Err(Error::usage(
            format!("`{SIMULATED_LINK}={}` is not a number above 0", value.display()),
            "unset it; it is only for studying overlap on one machine",
        )),
    }
}
