//! The search for a learning rate in a session: windows of steps that are made twice, and what is undone of them.

use super::Session;
use crate::ada_lrs::{AdaLrs, Next, Trial};
use crate::checkpoint::Snapshot;
use crate::config::{Amount, Progress};
use crate::error::Result;

impl Session {
    /// Whether a window of steps is to begin that another learning rate will be tried on; none does that the stage would
    /// end in, but where steps of it are skipped.
    pub fn is_window_due(&self) -> bool {
        let schedule = &self.plan.schedule;
        let (Some(search), Some(plan)) = (&self.ada_lrs, &schedule.ada_lrs) else { return false };
        let has_warmed_up = schedule.length.of(self.progress()) >= schedule.warmup;
        let ends_in_it = match schedule.length {
            Amount::Steps(steps) => self.step + plan.window as u64 > steps,
            Amount::Tokens(_) => false,
        };
        has_warmed_up && !ends_in_it && search.is_ready(plan)
    }

    /// Whether going back from the window that is due is to where an earlier one began.
    pub fn goes_farther_back(&self) -> bool {
        self.ada_lrs.as_ref().is_some_and(AdaLrs::has_left)
    }

    /// Begins it, with a snapshot of this moment where that is not the newest one of the saver's.
    pub fn begin_window(&mut self, beginning: Option<Snapshot>) {
        self.beginning = beginning;
        if let Some(search) = &mut self.ada_lrs {
            search.begin();
        }
    }

    /// Where the window began, if not at the newest snapshot of the saver's.
    pub fn take_beginning(&mut self) -> Option<Snapshot> {
        self.beginning.take()
    }

    /// Whether the steps since the newest snapshot of the saver's may yet be undone.
    pub fn may_go_back(&self) -> bool {
        let in_window = self.ada_lrs.as_ref().is_some_and(AdaLrs::in_window);
        in_window || (self.goes_farther_back() && self.is_window_due())
    }

    /// Whether they are made for the second time, at another learning rate.
    pub fn in_trial(&self) -> bool {
        self.ada_lrs.as_ref().is_some_and(AdaLrs::in_trial)
    }

    /// Whether the step that is being made is not to be made: it was skipped before the trial that runs, and the two ways
    /// through the window have the same steps.
    pub fn skips_again(&self) -> bool {
        self.ada_lrs.as_ref().is_some_and(|search| search.skips(self.step + 1))
    }

    /// Passes such a step.
    ///
    /// # Errors
    /// Those of c10d.
    pub fn skip_again(&mut self) -> Result<()> {
        self.guard.pass_over(&self.plan.guard, self.step + 1);
        self.skip()
    }

    /// Takes note of the loss of a step that was made.
    pub fn observe(&mut self, loss: f64) -> Next {
        match (&mut self.ada_lrs, &self.plan.schedule.ada_lrs) {
            (Some(search), Some(plan)) => search.observe(plan, loss),
            _ => Next::Step,
        }
    }

    /// Keeps the end of a window, to which the run goes when the trial on its steps is not kept; the run is at its
    /// beginning.
    pub fn set_aside(&mut self, measured: Snapshot) {
        self.aside = Some((self.progress(), measured));
    }

    /// How far the stage had come when the window began, and its end that was set aside.
    pub fn take_aside(&mut self) -> (Progress, Snapshot) {
        self.aside.take().expect("invariant: set aside when the trial began")
    }

    /// Ends the trial that runs at a step that is not made.
    pub fn break_off_trial(&mut self) -> Trial {
        self.optimizer.discard();
        let (search, plan) = (&mut self.ada_lrs, &self.plan.schedule.ada_lrs);
        let both = search.as_mut().zip(plan.as_ref());
        let (search, plan) = both.expect("invariant: called while a trial runs");
        search.break_off(plan)
    }

    /// Learning rates are multiplied with this from now on, as they were in a run that is made again.
    pub fn follow_search(&mut self, scale: f64) {
        if let Some(search) = &mut self.ada_lrs {
            search.scale = scale;
        }
    }

    /// Goes to a snapshot of this run with everything, the data too, as if nothing else had been done since; but for the
    /// search for a learning rate, which has led there.
    ///
    /// # Errors
    /// Those of c10d and of the data.
    pub fn go_to(&mut self, to: &Snapshot) -> Result<()> {
        self.put_back(to)?;
        self.guard.clone_from(&to.state.guard);
        self.held_out.clone_from(&to.state.held_out);
        self.loader.go_to(to.state.data.clone())?;
        Ok(())
    }
}
