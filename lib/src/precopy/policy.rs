//! The decisions.

use std::time::Duration;

use super::dirty::Dirty;
use super::outlook::{Care, Outlook, Reads};
use super::rates::Rates;
use super::{
    Accuracy, Costs, Decision, Goals, Iteration, Measured, OnSlow, Prediction, Sample, Warning,
    Why, duration,
};

/// One more iteration is worth it when it leaves at most this of the downtime.
const WORTH_ONE: f64 = 0.9;

/// Several more are worth it when they leave at most this. An iteration that saves 8 % misses a tenth,
/// but ten of them halve the downtime.
const WORTH_SEVERAL: f64 = 0.8;

/// Iterations that may pass without a downtime lower than the lowest before.
const PATIENCE: u32 = 6;

/// Observations of the dirty rate before a target is called out of reach.
const EVIDENCE: usize = 2;

/// A freeze that comes this close to its limit is put off while it can be: resuming at the limit costs
/// all of it.
const LIMIT_DOUBT: f64 = 1.1;

/// Decides after each iteration whether there shall be another.
///
/// The hazard is in both directions: one iteration too few and the freeze sends what could have been
/// sent before; one too many and the workload ran on, wrote, and the deadline came closer. What
/// decides is not the dirty rate against the link rate, as it is for virtual machines, but the whole
/// downtime: CRIU's dump and restore are in it whatever we do, and once they are most of it, more
/// iterations are in vain, however well they converge.
///
/// Call [`before_first`](Self::before_first) once, [`progress`](Self::progress) as often as you like
/// during an iteration, [`after`](Self::after) when it is acknowledged. [`predict`](Self::predict) and
/// [`latest_freeze`](Self::latest_freeze) may be asked at any time.
#[derive(Clone, Debug)]
pub struct Policy {
    goals: Goals,
    costs: Costs,
    rates: Rates,
    dirty: Dirty,
    reads: Reads,
    /// The lowest downtime predicted after an iteration, and how many iterations ago that was.
    lowest: f64,
    since_lowest: u32,
    early_finish: Option<Duration>,
}

impl Policy {
    /// For one migration.
    pub fn new(goals: Goals, costs: Costs) -> Self {
        Self {
            goals,
            costs,
            rates: Rates::default(),
            dirty: Dirty::default(),
            reads: Reads {
                lacked: 1.0,
                ..Reads::default()
            },
            lowest: f64::INFINITY,
            since_lowest: 0,
            early_finish: None,
        }
    }

    /// Replaces the costs by better ones.
    pub fn set_costs(&mut self, costs: Costs) {
        self.costs = costs;
    }

    /// Replaces what the dump is expected to cost.
    pub fn set_dump_cost(&mut self, dump: Duration) {
        self.costs.dump = dump;
    }

    /// Before the first iteration: how much memory there is, and whether the goals are hopeless.
    pub fn before_first(&mut self, memory_bytes: u64) -> Option<Warning> {
        self.reads.memory = (memory_bytes as f64).max(1.0);
        let criu = duration(self.outlook().criu_alone());
        if let Some(deadline) = self.goals.deadline.filter(|deadline| criu > *deadline) {
            return Some(Warning::CriuExceedsDeadline { criu, deadline });
        }
        let downtime = self.goals.downtime.filter(|target| criu > *target)?;
        Some(Warning::CriuExceedsDowntime { criu, downtime })
    }

    /// The iteration under way as far as it is: `end` is now. [`Decision::Again`] lets it go on; the
    /// others end it here, because of the deadline.
    pub fn progress(&mut self, so_far: &Iteration) -> Decision {
        self.rates.progress(so_far, self.costs.round_trip);
        self.reads.progress(so_far);
        let decision = self.deadline_decides().unwrap_or(Decision::Again);
        self.within_freeze_limit(decision)
    }

    /// Pages of the first iteration, read once more. Later ones are ignored.
    pub fn sampled(&mut self, sample: &Sample) {
        self.dirty.sample(sample, self.reads.memory);
    }

    /// What to do now that this iteration is acknowledged.
    pub fn after(&mut self, done: &Iteration) -> Decision {
        self.rates.iteration(done, self.costs.round_trip);
        let first = self.reads.number == 0;
        let interval = self.reads.iteration(done);
        if !first {
            self.dirty.observe(interval, done.changed_bytes as f64);
        }
        let downtime = self.outlook().downtime_at(self.reads.now, Care::Expected);
        let decision = self.within_freeze_limit(self.decide(downtime));
        if !first {
            self.remember(downtime);
        }
        decision
    }

    fn remember(&mut self, downtime: f64) {
        if downtime <= self.lowest * WORTH_ONE {
            self.since_lowest = 0;
        } else {
            self.since_lowest += 1;
        }
        self.lowest = self.lowest.min(downtime);
        if self.early_finish.is_none() {
            self.early_finish = Some(self.predict().finish);
        }
    }

    fn decide(&self, downtime: f64) -> Decision {
        if let Some(decision) = self.deadline_decides() {
            return decision;
        }
        let target = self.goals.downtime.map(|target| target.as_secs_f64());
        if target.is_some_and(|target| self.outlook().sure_downtime() <= target) {
            return Decision::Freeze(Why::TargetReached);
        }
        if self.left() == 0 {
            return self.too_late(Why::MaxIterations);
        }
        if !self.next_fits() {
            return self.too_late(Why::Deadline);
        }
        match (target, self.goals.on_slow) {
            (Some(target), _) if self.lowest_ahead() <= target => self.unless_stalled(),
            (Some(target), OnSlow::Wait) => self.wait(target, downtime),
            (Some(target), OnSlow::Cancel) => self.cancel(target),
            _ => self.while_it_pays(downtime),
        }
    }

    /// Now or never, where a deadline says so.
    fn deadline_decides(&self) -> Option<Decision> {
        let deadline = self.goals.deadline?.as_secs_f64();
        let now = self.reads.now;
        let outlook = self.outlook();
        let known = self.rates.link_is_known();
        let earliest = if known {
            outlook.downtime_at(now, Care::Hopeful)
        } else {
            outlook.downtime(0.0, Care::Hopeful)
        };
        if now + earliest > deadline {
            return Some(Decision::GiveUp(Why::DeadlineOutOfReach));
        }
        let late = known && outlook.latest_freeze(deadline, self.care()) <= now;
        late.then(|| self.too_late(Why::Deadline))
    }

    /// How careful to be of the deadline. Who cancels a slow migration would rather miss it.
    fn care(&self) -> Care {
        match (self.goals.downtime, self.goals.on_slow) {
            (Some(_), OnSlow::Cancel) => Care::Expected,
            _ => Care::Cautious,
        }
    }

    /// A freeze longer than its limit would end with the source resuming, and nothing would be won.
    fn within_freeze_limit(&self, decision: Decision) -> Decision {
        let (Decision::Freeze(why), Some(limit)) = (decision, self.goals.freeze_limit) else {
            return decision;
        };
        let downtime = self.outlook().downtime_at(self.reads.now, Care::Expected);
        let limit = limit.as_secs_f64();
        let patient = self.goals.deadline.is_some() || self.goals.on_slow == OnSlow::Wait;
        let can_wait = patient && why != Why::TargetReached && self.left() > 0;
        if can_wait && downtime * LIMIT_DOUBT > limit {
            Decision::Again
        } else if downtime > limit {
            Decision::GiveUp(Why::FreezeLimit)
        } else {
            decision
        }
    }

    /// No further iteration is possible, and the target is not reached.
    fn too_late(&self, why: Why) -> Decision {
        let unmet = self.goals.downtime.is_some_and(|target| {
            let now = self.reads.now;
            self.outlook().downtime_at(now, Care::Expected) > target.as_secs_f64()
        });
        match self.goals.on_slow {
            OnSlow::Cancel if unmet => Decision::GiveUp(why),
            OnSlow::Wait if unmet && self.goals.deadline.is_none() => Decision::GiveUp(why),
            _ => Decision::Freeze(why),
        }
    }

    /// Whether the next iteration is expected to end in time. No caution here: where it does not,
    /// [`progress`](Self::progress) ends it early, and what it sent until then is not lost.
    fn next_fits(&self) -> bool {
        let Some(deadline) = self.goals.deadline else {
            return true;
        };
        let deadline = deadline.as_secs_f64();
        let latest = self.outlook().latest_freeze(deadline, Care::Expected);
        let next = self.outlook().ahead(1).next();
        next.is_some_and(|next| next.end <= latest)
    }

    fn unless_stalled(&self) -> Decision {
        match self.goals.on_slow {
            OnSlow::Freeze if self.since_lowest >= PATIENCE => Decision::Freeze(Why::Stalled),
            _ => Decision::Again,
        }
    }

    fn cancel(&self, target: f64) -> Decision {
        if self.dirty.observations() >= EVIDENCE || self.outlook().criu_alone() > target {
            Decision::GiveUp(Why::TargetOutOfReach)
        } else {
            Decision::Again
        }
    }

    /// A quieter workload does not help where CRIU alone takes too long.
    fn wait(&self, target: f64, downtime: f64) -> Decision {
        if self.outlook().criu_alone() <= target {
            Decision::Again
        } else if self.goals.deadline.is_some() {
            self.while_it_pays(downtime)
        } else {
            Decision::GiveUp(Why::TargetOutOfReach)
        }
    }

    fn while_it_pays(&self, downtime: f64) -> Decision {
        if !self.pays(downtime) {
            Decision::Freeze(Why::NoGain)
        } else if self.since_lowest >= PATIENCE {
            Decision::Freeze(Why::Stalled)
        } else {
            Decision::Again
        }
    }

    /// Whether the downtime would be lower later, or was lower before: then this is a burst, which
    /// passes.
    fn pays(&self, downtime: f64) -> bool {
        if self.dirty.observations() < EVIDENCE {
            // Nothing can be predicted well. Only where whatever is left crosses in no time there is
            // nothing to gain.
            return self.outlook().criu_alone() < self.outlook().sure_downtime() * WORTH_ONE;
        }
        let next = self.outlook().ahead(1).next();
        next.is_some_and(|next| next.downtime <= downtime * WORTH_ONE)
            || self.lowest_ahead() <= downtime * WORTH_SEVERAL
            || self.lowest <= downtime * WORTH_SEVERAL
    }

    /// The lowest downtime that further iterations are expected to lead to.
    fn lowest_ahead(&self) -> f64 {
        self.outlook()
            .ahead(self.left())
            .fold(f64::INFINITY, |lowest, step| lowest.min(step.downtime))
    }

    /// Iterations that are still allowed.
    fn left(&self) -> u32 {
        let allowed = self.goals.max_iterations.max(1);
        allowed.saturating_sub(self.reads.number)
    }

    /// When the driver must freeze, in the middle of an iteration if need be, for the deadline to be
    /// met; zero when that moment has passed. `None` without a deadline, and before the link is known.
    pub fn latest_freeze(&self) -> Option<Duration> {
        let deadline = self.goals.deadline?.as_secs_f64();
        if !self.rates.link_is_known() {
            return None;
        }
        let latest = self.outlook().latest_freeze(deadline, self.care());
        Some(duration(latest))
    }

    /// What to expect.
    pub fn predict(&self) -> Prediction {
        let now = self.reads.now;
        let downtime = self.outlook().downtime_at(now, Care::Expected);
        let (end, last) = self.planned(now, downtime);
        Prediction {
            downtime: duration(downtime),
            final_downtime: duration(last),
            finish: duration(end + last),
            dirty_bytes_per_s: self.dirty.bytes_per_s(),
            link_bytes_per_s: self.rates.link_bytes_per_s(),
            hash_bytes_per_s: self.rates.hash_bytes_per_s(),
        }
    }

    /// When the freeze is to be expected, and the downtime then.
    fn planned(&self, now: f64, downtime: f64) -> (f64, f64) {
        let mut planned = (now, downtime);
        let target = self.goals.downtime.map(|target| target.as_secs_f64());
        for step in self.outlook().ahead(self.left()) {
            let reached = target.is_some_and(|target| planned.1 <= target);
            if reached || step.downtime > planned.1 * WORTH_ONE {
                break;
            }
            planned = (step.end.max(now), step.downtime);
        }
        planned
    }

    /// How far off the predictions were, once the workload runs on the destination.
    pub fn accuracy(&self, measured: Measured) -> Accuracy {
        let now = self.reads.now;
        Accuracy {
            predicted: self.predict(),
            predicted_changed_bytes: self.outlook().changed_at(now, Care::Expected),
            measured,
            early_finish: self.early_finish,
        }
    }

    fn outlook(&self) -> Outlook<'_> {
        Outlook {
            costs: &self.costs,
            rates: &self.rates,
            dirty: &self.dirty,
            reads: &self.reads,
        }
    }
}
