//! Where the time of a step goes: parts that follow one another without a gap, each from where it begins on the device
//! until the next one does.
//!
//! On the CPU a moment is the host's. On CUDA it is an event in the stream, read once the step's own read of the host has
//! waited for the device anyway; nothing waits for it. There the update of a step is computed while the next one has
//! begun, and counts in that. Whoever begins a part says so: the session, the model (through its
//! [`sail_model::blocks::Listener`]) and the groups of ranks, whose waits interrupt the part that they fall into.

use std::sync::{Arc, Mutex, MutexGuard};

use sail_torch::Moment;
use serde::Serialize;
use tch::Device;

use crate::config::Module;
use crate::error::Result;
use crate::threads::lock;

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Data,
    ToDevice,
    /// Forward or backward.
    Of(Module),
    Communication,
    Optimizer,
    Other,
}

/// How long a rank was in each part of a step, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Parts {
    /// Waiting for its own packs.
    pub data_wait: f64,
    /// Making tensors on the device of them.
    pub to_device: f64,
    /// In the vision encoder, forward and backward.
    pub vision: f64,
    /// In the projector, forward and backward.
    pub projector: f64,
    /// In the language model and the loss, forward and backward.
    pub llm: f64,
    /// Waiting for collectives, those of the agreement on the step and on its data included.
    pub communication: f64,
    /// Clipping and updating.
    pub optimizer: f64,
    /// The rest of the step.
    pub other: f64,
}

impl Parts {
    fn add(&mut self, part: Part, secs: f64) {
        *match part {
            Part::Data => &mut self.data_wait,
            Part::ToDevice => &mut self.to_device,
            Part::Of(Module::Vision) => &mut self.vision,
            Part::Of(Module::Projector) => &mut self.projector,
            Part::Of(Module::Llm) => &mut self.llm,
            Part::Communication => &mut self.communication,
            Part::Optimizer => &mut self.optimizer,
            Part::Other => &mut self.other,
        } += secs;
    }

    /// The same of a step that took so long: no more together than it. What an update took of the time before the step
    /// began is not of the step.
    fn of_step(self, step_secs: f64) -> Self {
        let Self { data_wait, to_device, vision, projector, llm, communication, .. } = self;
        let left = (step_secs - data_wait - to_device - vision - projector - llm - communication).max(0.0);
        let optimizer = self.optimizer.min(left);
        Self { optimizer, other: left - optimizer, ..self }
    }
}

/// The clock of a rank's steps. Clones share it.
#[derive(Clone)]
pub(crate) struct Clock(Arc<Mutex<Inner>>);

struct Inner {
    device: Device,
    /// What goes on but for waits; None between steps.
    part: Option<Part>,
    /// Collectives that are waited for now.
    waits: usize,
    /// Beginnings of parts and of what is between steps, in their order: those that are not in `sums` yet.
    marks: Vec<(Option<Part>, Moment)>,
    sums: Parts,
    failed: Option<sail_torch::Error>,
}

impl Clock {
    /// One that stands still, for tensors on this device.
    pub(crate) fn new(device: Device) -> Self {
        let (marks, sums) = (Vec::new(), Parts::default());
        Self(Arc::new(Mutex::new(Inner { device, part: None, waits: 0, marks, sums, failed: None })))
    }

    /// A step begins.
    pub(crate) fn begin(&self) {
        let mut inner = self.lock();
        if !inner.device.is_cuda() {
            inner.settle();
        }
        inner.sums = Parts::default();
        inner.enter(Some(Part::Other));
    }

    /// A part begins, where a step goes on.
    pub(crate) fn enter(&self, part: Part) {
        let mut inner = self.lock();
        if inner.part.is_some() {
            inner.enter(Some(part));
        }
    }

    /// What follows is of no step.
    pub(crate) fn end(&self) {
        self.lock().enter(None);
    }

    /// What a group of ranks is to call as a wait begins and ends.
    pub(crate) fn on_wait(&self) -> impl Fn(bool) + Clone + Send + Sync + 'static {
        let clock = self.clone();
        move |begins| clock.lock().wait(begins)
    }

    /// To be called once the host has waited for the device: adds up what was done until then.
    ///
    /// # Errors
    /// What has kept a moment from being noted or read.
    pub(crate) fn settle(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.settle();
        inner.failed.take().map_or(Ok(()), |error| Err(error.into()))
    }

    /// The parts of a step that has taken so long; on CUDA until it was settled.
    pub(crate) fn parts(&self, step_secs: f64) -> Parts {
        let mut inner = self.lock();
        if inner.device.is_cuda() {
            return inner.sums.of_step(step_secs);
        }
        // With what goes on until now.
        let part = inner.part;
        inner.enter(part);
        inner.settle();
        inner.sums
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

impl Inner {
    fn enter(&mut self, part: Option<Part>) {
        self.part = part;
        if self.waits == 0 {
            self.mark(part);
        }
    }

    fn wait(&mut self, begins: bool) {
        self.waits = if begins { self.waits + 1 } else { self.waits - 1 };
        let is_edge = self.waits == usize::from(begins);
        if self.part.is_some() && is_edge {
            self.mark(if begins { Some(Part::Communication) } else { self.part });
        }
    }

    fn mark(&mut self, part: Option<Part>) {
        match Moment::now(self.device) {
            Ok(moment) => self.marks.push((part, moment)),
            Err(error) => drop(self.failed.get_or_insert(error)),
        }
    }

    /// Adds up all but the part that goes on.
    fn settle(&mut self) {
        for pair in self.marks.windows(2) {
            let [(Some(part), from), (_, to)] = pair else { continue };
            match from.secs_until(to) {
                Ok(secs) => self.sums.add(*part, secs),
                Err(error) => drop(self.failed.get_or_insert(error)),
            }
        }
        let last = self.marks.pop();
        self.marks.clear();
        self.marks.extend(last);
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use super::*;

    fn pass(millis: u64) {
        sleep(Duration::from_millis(millis));
    }

    #[test]
    fn a_step_is_cut_into_parts_without_a_gap() {
        let clock = Clock::new(Device::Cpu);
        let wait = clock.on_wait();
        for _ in 0..2 {
            let outside = Instant::now();
            clock.begin();
            let inside = Instant::now();
            clock.enter(Part::Data);
            pass(20);
            clock.enter(Part::Of(Module::Llm));
            pass(10);
            // Two waits at once, and a part that begins meanwhile.
            wait(true);
            pass(5);
            wait(true);
            clock.enter(Part::Of(Module::Vision));
            wait(false);
            pass(5);
            wait(false);
            pass(15);
            clock.settle().unwrap();
            clock.enter(Part::Optimizer);
            pass(5);
            clock.enter(Part::Other);
            pass(5);
            let least_secs = inside.elapsed().as_secs_f64();
            let parts = clock.parts(least_secs);
            let most_secs = outside.elapsed().as_secs_f64();
            clock.end();
            let Parts { data_wait, to_device, vision, projector, llm, communication, optimizer, other } =
                parts;
            for (secs, millis) in
                [(data_wait, 20), (vision, 15), (llm, 10), (communication, 10), (optimizer, 5), (other, 5)]
            {
                // A sleep may be longer on a busy machine, never shorter; what is longer is in the sum.
                assert!(secs >= 1e-3 * f64::from(millis), "{secs} s, expected {millis} ms");
            }
            assert_eq!((to_device, projector), (0.0, 0.0));
            let sum = data_wait + vision + llm + communication + optimizer + other;
            assert!(sum > least_secs - 1e-9 && sum < most_secs + 1e-9, "{parts:?}: {sum}");
            // An evaluation between two steps.
            clock.enter(Part::Of(Module::Vision));
            wait(true);
            pass(5);
            wait(false);
        }
    }

    /// As on CUDA, where an update may have begun before the step.
    #[test]
    fn parts_are_no_more_than_their_step() {
        let sums = Parts { llm: 2.0, optimizer: 1.5, other: 9.0, ..Parts::default() };
        assert_eq!(sums.of_step(3.0), Parts { llm: 2.0, optimizer: 1.0, ..Parts::default() });
        assert_eq!(sums.of_step(5.0), Parts { other: 1.5, ..sums });
    }
}
