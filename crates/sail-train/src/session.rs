//! Everything a stage needs, built from its plan: model, optimizer, data, position.
//!
//! Where its weights come from is `origin.rs`'s matter; the loop over it is [`crate::train_loop`].

mod parts;
mod search;
mod state;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use sail_data::{Loader, LoaderOptions, Position, Tally, TextEncoder};
use sail_model::params::Params;
use sail_model::vlm::{Loss, Vlm};
use sail_torch::{ReduceOp, span};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::ada_lrs::AdaLrs;
use crate::batch::Feed;
use crate::checkpoint::{Checkpoint, Snapshot, Totals, Untouched};
use crate::clock::{Clock, Part};
use crate::config::{GuardAction, Module, Plan, Progress, UnlockPlan};
use crate::device::{Peak, take_device, take_precision};
use crate::error::Result;
use crate::estimate::PackFlops;
use crate::eval::{EvalReport, Evaluator};
use crate::events::Standing;
use crate::feature_cache::{CacheUse, FeatureCache};
use crate::first_step::FirstStep;
use crate::freeze::FreezePlan;
use crate::guard::{GuardState, Trip};
use crate::lineage::Lineage;
use crate::optim::Optimizer;
use crate::origin::{Folders, Sources, open_finished, untouched};
use crate::schedule::{Factors, is_due};
use crate::stage::Fingerprints;
use crate::step::{Share, Step};
use crate::world::{AGREEING, DATA, DATA_OF_OTHERS, GRADIENTS, UPDATING, World};

pub use self::parts::preflight;
use self::parts::{
    check_division, check_names, clock, exact_frozen, model_fields, modules_of, no_way_on, open_on_all,
    optimizer, passed, restore, trained_after,
};
pub(crate) use self::parts::{encoder, freeze_plan, model_config, visual_shape};

/// In the names of the weights by which a mixture of experts sends tokens to its experts.
const ROUTER: &str = ".mlp.gate.";

/// A stage ready to run.
pub struct Session {
    /// What it follows.
    pub plan: Plan,
    /// The model; its trained parameters require gradients.
    pub model: Vlm,
    /// Masters and moments of what is trained.
    pub optimizer: Optimizer,
    /// Text to tokens and back.
    pub encoder: Arc<TextEncoder>,
    /// Held-out samples, where the plan evaluates.
    pub evaluator: Option<Evaluator>,
    /// Where the tensors are.
    pub device: Device,
    /// What the model computes in.
    pub precision: Kind,
    /// Optimizer steps done.
    pub step: u64,
    /// What was trained on so far.
    pub totals: Totals,
    /// Features of images by its vision encoder, where they are kept.
    pub cache: Option<FeatureCache>,
    /// The ranks that train it together.
    pub world: Arc<World>,
    /// Where the time of a step goes.
    pub(crate) clock: Clock,
    /// What the device computes at most.
    pub(crate) peak: Peak,
    /// What packs take of it, while the same is trained.
    pack_flops: PackFlops,
    /// Whether a step was made by this process.
    warm: bool,
    loader: Loader,
    /// What the loader reads, as `sail-data --spec` takes it.
    data_spec: Value,
    lineage: Lineage,
    untouched: BTreeMap<Module, Untouched>,
    /// fp32 weights of frozen modules, where the model computes in another type.
    exact: Params,
    started_from: Arc<Fingerprints>,
    /// What is trained when.
    pub freeze: FreezePlan,
    /// How far the stage had come at each unlock point that it has passed, by index in the plan.
    unlocked: BTreeMap<usize, Progress>,
    /// The search for a learning rate, where the plan has one.
    ada_lrs: Option<AdaLrs>,
    /// What was judged of the steps so far.
    guard: GuardState,
    /// Beginning and end of a window of steps, while another learning rate is tried on the same ones.
    aside: Option<(Progress, Snapshot)>,
    /// Where the window that is being made began, if not at the newest snapshot of the saver's.
    beginning: Option<Snapshot>,
    /// Held-out losses by step.
    held_out: BTreeMap<u64, f64>,
    /// What this process measured last, and after which step.
    measured: Option<(u64, EvalReport)>,
    /// How the images of the step that is being made were come by, on this rank.
    cache_use: CacheUse,
    /// Where this rank's data stood before the step that is being made.
    before: Position,
}

impl Session {
    /// Builds the stage, at the position of `resume` if there is one. Every rank makes the same call.
    ///
    /// # Errors
    /// Whatever a file, a configuration or the data reports; a checkpoint of another plan; ranks that differ.
    pub fn build(plan: &Plan, world: &Arc<World>, resume: Option<&Checkpoint>) -> Result<Self> {
        check_division(plan, world.size())?;
        let device = take_device(plan.run.device, world.place())?;
        let arithmetic = take_precision(plan.run.precision, device)?;
        let precision = arithmetic.kind();
        let init = match (resume, &plan.init) {
            (None, Some(init)) => Some(open_on_all(world, || open_finished(&init.from))?),
            _ => None,
        };
        let stored = resume.or(init.as_ref());
        let folders = Folders::for_model(plan, stored)?;
        let config = model_config(plan, &folders)?;
        let shape = visual_shape(plan, &config)?;
        let spec = plan.data_spec(shape);
        let tokenizer = folders.tokenizer(plan);
        let encoder = Arc::new(encoder(&tokenizer, &spec.text, &config.llm)?);
        let sources = Sources::open(plan, &folders, &config, stored)?;
        let model = Vlm::new(&config, sources.for_model(), (Kind::Float, device))?;
        check_names(stored, &model)?;
        let mut started_from = Fingerprints::new(model.params());
        let freeze = freeze_plan(&model, plan)?;
        let unlocked = resume.map_or_else(BTreeMap::new, |resume| passed(plan, resume.state()));
        let trained = trained_after(&freeze, &unlocked);
        let untouched = untouched(plan, stored, &started_from, &modules_of(&trained)?)?;
        let exact = match precision {
            Kind::Float => Params::new(),
            _ => exact_frozen(&model, plan, &trained, &untouched)?,
        };
        world.agree(|| model_fields(&model, &started_from))?;
        let mut optimizer = optimizer(plan, &model, &trained, precision, world)?;
        let clock = clock(device, &model, world);
        let peak = Peak::of(&plan.log, device, arithmetic)?;
        let pack_flops = PackFlops::new(&config, &plan.train.after(unlocked.keys()));
        model.listener().set_recomputed(plan.batch.recompute.blocks(&model.listener().blocks()));
        if precision != Kind::Float {
            started_from = Fingerprints::new(model.params());
        }
        if let Some(checkpoint) = resume {
            restore(&mut optimizer, checkpoint)?;
        }
        let open = |cache| FeatureCache::open(cache, &config.vision, &started_from, (arithmetic, device));
        let cache = plan.data.feature_cache.as_ref().map(open).transpose()?;
        let then = resume.map(Checkpoint::state);
        let lineage = match (then, &init) {
            (Some(then), _) => then.lineage.clone(),
            (None, Some(init)) => init.lineage(),
            (None, None) => folders.origins(plan)?,
        };
        let search = |_| then.and_then(|then| then.ada_lrs.clone()).unwrap_or_default();
        let ada_lrs = plan.schedule.ada_lrs.map(search);
        let evaluator = match (&plan.eval, plan.eval_spec(shape)) {
            (Some(eval), Some(spec)) => Some(Evaluator::new(spec, eval, &encoder)?),
            _ => None,
        };
        let options = LoaderOptions { threads: plan.data.threads, rank: world.rank(), world: world.size() };
        let position = then.map(|then| then.data.clone());
        let loader = Loader::new(&spec, Arc::clone(&encoder), options, position).map_err(no_way_on)?;
        let before = loader.position();
        let plan = plan.clone();
        Ok(Self {
            plan,
            model,
            optimizer,
            encoder,
            evaluator,
            device,
            precision,
            step: then.map_or(0, |then| then.step),
            totals: then.map_or_else(Totals::default, |then| then.totals),
            cache,
            world: Arc::clone(world),
            clock,
            peak,
            pack_flops,
            warm: false,
            loader,
            data_spec: json!({"tokenizer": tokenizer, "data": spec}),
            lineage,
            untouched,
            exact,
            started_from: Arc::new(started_from),
            freeze,
            unlocked,
            ada_lrs,
            guard: then.map_or_else(GuardState::default, |then| then.guard.clone()),
            aside: None,
            beginning: None,
            held_out: then.map_or_else(BTreeMap::new, |then| then.held_out.clone()),
            measured: None,
            cache_use: CacheUse::default(),
            before,
        })
    }

    /// How far the stage has come.
    pub fn progress(&self) -> Progress {
        Progress { steps: self.step, tokens: self.totals.tokens }
    }

    /// Whether it has come to its end.
    pub fn is_done(&self) -> bool {
        self.plan.schedule.length.is_reached(self.progress()) || self.stops_early()
    }

    /// Whether the held-out loss says that it ends before its length.
    pub fn stops_early(&self) -> bool {
        let early_stop = self.plan.schedule.early_stop;
        let every = self.plan.eval.as_ref().and_then(|eval| eval.every);
        // That of its end does not count where a stage was made longer.
        let in_turn = |(step, _): &(&u64, &f64)| **step == 0 || is_due(every, **step);
        let losses = || self.held_out.iter().filter(in_turn).map(|(_, loss)| *loss);
        early_stop.is_some_and(|early_stop| early_stop.is_reached(losses()))
    }

    /// Held-out losses by step, as this run measured them.
    pub fn held_out(&self) -> &BTreeMap<u64, f64> {
        &self.held_out
    }

    /// Takes note of what was measured after the checkpoint was saved that the run resumes from. Every rank is given
    /// the same.
    pub fn remember(&mut self, held_out: BTreeMap<u64, f64>) {
        self.held_out.extend(held_out);
    }

    /// Begins to train what unlock points that the stage has come to free: their indices in the plan; not while steps are
    /// tried that may be undone. Every rank makes the same call.
    ///
    /// # Errors
    /// Those of libtorch and of c10d.
    pub fn unlock_due(&mut self) -> Result<Vec<usize>> {
        let progress = self.progress();
        let points = self.plan.train.unfreeze.iter().enumerate();
        let is_due = |(index, unlock): &(usize, &UnlockPlan)| {
            !self.unlocked.contains_key(index) && unlock.at.is_reached(progress)
        };
        let due: Vec<usize> = if self.in_trial() {
            Vec::new()
        } else {
            points.filter(is_due).map(|(index, _)| index).collect()
        };
        for &index in &due {
            let freed = self.freeze.unlocked_by(index);
            self.optimizer.settle()?;
            self.optimizer.take_over(self.model.params(), &self.exact, freed)?;
            for module in modules_of(&[freed])? {
                self.untouched.remove(&module);
            }
            self.exact.retain(|name, _| !freed.contains_key(name));
            self.unlocked.insert(index, progress);
            // What it could go back to has fewer parameters.
            if let Some(search) = &mut self.ada_lrs {
                search.forget_window();
            }
        }
        if !due.is_empty() {
            let train = self.plan.train.after(self.unlocked.keys());
            self.pack_flops = PackFlops::new(self.model.config(), &train);
        }
        Ok(due)
    }

    /// What the learning rates of a step are multiplied with.
    pub fn factors(&self, step: &Step) -> Factors {
        let Plan { schedule, train, .. } = &self.plan;
        let factors = Factors::new(schedule, train, &self.unlocked, self.progress(), step.all.size.tokens);
        factors.times(self.ada_lrs.as_ref().map_or(1.0, |search| search.scale))
    }

    /// This rank's packs of the next step, fewer where streams have ended; `None` when all ranks' have.
    pub fn next_step(&mut self) -> Result<Option<Step>> {
        let _span = span("data wait");
        self.clock.enter(Part::Data);
        let passes = self.plan.batch.packs_per_step / self.world.size();
        let started = Instant::now();
        self.before = self.loader.position();
        // With more streams than packs a step may find only streams that have ended, while others go on.
        loop {
            self.world.doing(self.step + 1, DATA);
            let mut packs = Vec::with_capacity(passes);
            // A rank whose streams have ended takes its turns as well, so that all stand at the same one.
            for _ in 0..passes {
                packs.extend(self.loader.next_pack()?.pack);
                self.world.goes_on();
            }
            self.world.doing(self.step + 1, DATA_OF_OTHERS);
            let mut flops = self.pack_flops.of(&packs);
            if self.cache.is_some() {
                // What is read back takes none; what has to be made for that first is not counted.
                flops.insert(Module::Vision, 0);
            }
            let share = Share {
                ended: self.loader.has_ended(),
                data_wait_secs: started.elapsed().as_secs_f64(),
                coverage: self.loader.tallies(),
                flops,
                ..Share::of(&packs)
            };
            let all = Share::all(self.world.gather(&share)?);
            if all.packs > 0 {
                self.clock.enter(Part::Other);
                return Ok(Some(Step { packs, passes, all }));
            }
            if all.ended {
                return Ok(None);
            }
        }
    }

    /// Forward and backward of every pack, gradients summed over all ranks in the optimizer; this rank's part of
    /// the step's mean loss, a 0-dimensional tensor.
    pub fn accumulate(&mut self, step: &Step) -> Result<Tensor> {
        self.world.doing(self.step + 1, GRADIENTS);
        let mut total = Tensor::zeros([], (Kind::Float, self.device));
        // Of an evaluation before.
        self.take_cache_use();
        let trains_router = self.optimizer.names().any(|name| name.contains(ROUTER));
        let mut batches = self.feed().batches(&step.packs, self.plan.batch.vision_images);
        for pass in 0..step.passes {
            self.world.goes_on();
            self.optimizer.begin_pass(pass, step.passes);
            self.clock.enter(Part::ToDevice);
            if let Some(batch) = batches.next_batch()? {
                // Told of the modules by the model, of which the language model comes last and goes back first.
                let Loss { sum, balance, .. } = self.model.loss(&batch)?;
                let mut loss = sum / step.all.weight;
                // A frozen router is as it is; one that trains is kept from sending all rows one way.
                if let Some(balance) = balance.filter(|_| trains_router) {
                    loss += balance / step.all.packs as f64;
                }
                // A pack of text alone reaches nothing that is trained before the language model.
                if loss.requires_grad() {
                    let _span = span("backward");
                    self.optimizer.backward(&loss)?;
                }
                total += loss.detach();
            }
            self.clock.enter(Part::Other);
            self.optimizer.end_pass()?;
        }
        self.cache_use = self.take_cache_use();
        Ok(total)
    }

    fn feed(&self) -> Feed<'_> {
        Feed { model: &self.model, device: self.device, cache: self.cache.as_ref() }
    }

    fn take_cache_use(&self) -> CacheUse {
        self.cache.as_ref().map_or_else(CacheUse::default, FeatureCache::take_used)
    }

    /// Puts the ranks' losses and gradient norms together, clips, and reads what all ranks decide by: the one
    /// place where the host waits for the device in a step.
    pub fn agree(&self, loss: &Tensor, stop: bool, saved: bool) -> Result<Verdict> {
        self.world.doing(self.step + 1, AGREEING);
        self.clock.enter(Part::Optimizer);
        // Made on the device: a copy from the host would wait for all that is queued there.
        let number = |number: f64| Tensor::f_full([], number, (Kind::Double, self.device));
        let CacheUse { hits, misses } = self.cache_use;
        let own = [
            loss,
            &number(f64::from(stop))?,
            &number(f64::from(saved))?,
            &number(hits as f64)?,
            &number(misses as f64)?,
        ];
        let own = Tensor::stack(&own.map(|value| value.to_kind(Kind::Double)), 0);
        let numbers = own.size()[0];
        let sums = Tensor::cat(&[own, self.optimizer.squared_norms()?], 0);
        if let Some(group) = self.world.group() {
            group.all_reduce(&sums, ReduceOp::Sum)?.wait()?;
        }
        let squared = sums.narrow(0, numbers, sums.size()[0] - numbers).sum(Kind::Double);
        let in_optimizer = span("optimizer");
        self.optimizer.clip(&squared.sqrt())?;
        drop(in_optimizer);
        self.clock.enter(Part::Other);
        let read = Vec::<f64>::try_from(Tensor::cat(&[sums, squared.unsqueeze(0)], 0))?;
        self.clock.settle()?;
        let [loss, stop, saved, hits, misses, ref squared_norms @ .., squared] = read[..] else {
            unreachable!("five numbers and the sum were put there");
        };
        Ok(Verdict {
            loss,
            grad_norm: squared.sqrt(),
            grad_norms: squared_norms.iter().map(|squared| squared.sqrt()).collect(),
            stop: stop > 0.0,
            saved: saved as usize == self.world.size(),
            cache_use: CacheUse { hits: hits as u64, misses: misses as u64 },
        })
    }

    /// The norms of the gradients of a step before clipping, of each trained parameter, by its module.
    pub fn grad_norms(&self, verdict: &Verdict) -> BTreeMap<Module, Vec<f64>> {
        let mut norms: BTreeMap<Module, Vec<f64>> = BTreeMap::new();
        for (module, norm) in self.optimizer.modules().zip(&verdict.grad_norms) {
            norms.entry(module).or_default().push(*norm);
        }
        norms
    }

    /// What is wrong with the step that the verdict is of, if anything. All ranks find the same.
    pub fn judge(&mut self, verdict: &Verdict) -> Option<Trip> {
        let mut guard = self.guard.clone();
        let trip = guard.judge(&self.plan.guard, self.step + 1, verdict.loss, verdict.grad_norm);
        // A run that ends here judges the same step again when it goes on.
        if trip.as_ref().is_none_or(|trip| trip.action != GuardAction::Stop) {
            self.guard = guard;
        }
        trip
    }

    /// What is written of a step that is not made: enough to find its samples and to make it again.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn record(&self, trip: &Trip, step: &Step, verdict: &Verdict) -> Result<Value> {
        let samples: Vec<Vec<String>> = self.world.gather(&step.samples())?;
        let position = Position::merge(self.world.gather(&self.before)?)?;
        // Where the run ends with it, the step counts as judged when it goes on.
        let judged = self.guard.judged() + u64::from(trip.action == GuardAction::Stop);
        Ok(json!({
            "kind": "trip", "step": self.step + 1, "judged": judged, "reason": trip.reason, "action": trip.action,
            "loss": verdict.loss, "grad_norm": verdict.grad_norm, "size": step.all.size,
            "packing": step.all.packing(self.plan.batch.tokens_per_pack),
            "samples": samples, "position": position,
        }))
    }

    /// Where the run stands, for its record.
    pub fn standing(&self) -> Standing {
        Standing {
            progress: self.progress(),
            judged: self.guard.judged(),
            trials: self.ada_lrs.as_ref().map_or(0, AdaLrs::trials),
            unlocked: self.unlocked.keys().copied().collect(),
        }
    }

    /// Makes the update; the first one of each parameter is checked.
    ///
    /// # Errors
    /// Those of libtorch and of c10d; [`crate::Error::SelfCheck`].
    pub fn update(&mut self, step: &Step, factors: &Factors) -> Result<()> {
        self.world.doing(self.step + 1, UPDATING);
        let is_first = self.optimizer.updates().any_never() && self.plan.guard.self_check;
        let before = is_first.then(|| FirstStep::before(self)).transpose()?;
        let in_optimizer = span("optimizer");
        self.clock.enter(Part::Optimizer);
        self.optimizer.step(factors)?;
        self.clock.enter(Part::Other);
        drop(in_optimizer);
        before.map_or(Ok(()), |before| before.check(self, step, factors))
    }

    /// Where its weights come from.
    pub(crate) fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// What was measured of the weights as they are, if it was.
    pub fn measured(&self) -> Option<&EvalReport> {
        self.measured.as_ref().filter(|(step, _)| *step == self.step).map(|(_, report)| report)
    }

    /// Measures the held-out loss, where the plan does, with moving averages where it has some.
    ///
    /// # Errors
    /// Those of the model, of c10d, and [`crate::Error::HeldOutNotFinite`].
    pub fn evaluate(&mut self) -> Result<Option<EvalReport>> {
        let Some(evaluator) = &self.evaluator else { return Ok(None) };
        let _span = span("evaluation");
        self.world.doing(self.step, "evaluating");
        let run = || evaluator.run(self.feed(), &self.encoder, &self.world);
        let report = self.optimizer.with_averages(run)?;
        // The host has waited for the device, and with it for the update before: that is of no later step.
        self.clock.settle()?;
        self.held_out.insert(self.step, report.total.loss);
        self.measured = Some((self.step, report.clone()));
        Ok(Some(report))
    }

    /// Takes note that the update for `step` was made.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn advance(&mut self, step: &Step) -> Result<()> {
        let Totals { samples, tokens, answer_tokens } = step.all.size;
        self.totals.samples += samples;
        self.totals.tokens += tokens;
        self.totals.answer_tokens += answer_tokens;
        self.pass()
    }

    /// Passes a step without its update.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn skip(&mut self) -> Result<()> {
        self.optimizer.discard();
        if let Some(search) = &mut self.ada_lrs {
            search.skip(self.step + 1);
        }
        self.pass()
    }

    fn pass(&mut self) -> Result<()> {
        self.measured = None;
        self.step += 1;
        if !self.warm {
            self.warm = true;
            // Nothing may be under way while the time that it may take changes.
            self.optimizer.settle()?;
            self.world.set_timeout(self.plan.parallel.timeout_secs)?;
        }
        Ok(())
    }

    /// What the loader reads, in YAML, as `sail-data --spec` takes it.
    pub fn data_spec(&self) -> String {
        serde_yaml::to_string(&self.data_spec)
            .expect("invariant: a data specification has only text keys and finite numbers")
    }

    /// What was seen of each source so far. Every rank makes the same call.
    pub fn coverage(&self) -> Result<BTreeMap<String, Tally>> {
        let own = Share { coverage: self.loader.tallies(), ..Share::default() };
        Ok(Share::all(self.world.gather(&own)?).coverage)
    }
}

/// What all ranks decide by after a step's gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Mean loss of the step.
    pub loss: f64,
    /// Global norm of its gradients before clipping.
    pub grad_norm: f64,
    /// The same of each trained parameter, in the optimizer's order.
    pub grad_norms: Vec<f64>,
    /// Whether a rank was asked to stop.
    pub stop: bool,
    /// Whether all ranks have done their part of the save under way.
    pub saved: bool,
    /// How all ranks' images were come by; zeros without a cache.
    pub cache_use: CacheUse,
}
