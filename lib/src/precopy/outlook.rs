//! What would happen if: frozen at some moment, or after some more iterations.

use super::dirty::Dirty;
use super::rates::Rates;
use super::{Costs, Iteration};

/// Share of CRIU's dump during which changed pages can cross already. The rest of it collects and
/// cures processes; no page is handed out then, or the last ones only just were.
const OVERLAP: f64 = 0.5;

/// Round trips within the freeze: the last acknowledgement and the vote before the hand-over.
const ROUND_TRIPS: f64 = 2.0;

/// Rounds of the search for the length of an iteration, which depends on what changes during it.
const ROUNDS: usize = 12;

/// Where a deadline must not fail, this much more is taken to be dirty than expected: links halve and
/// workloads burst. Not so the pages that were never sent: they must cross in any case, and the
/// sooner for the workload running meanwhile.
const DIRTY_DOUBT: f64 = 1.5;
const UNREAD_DOUBT: f64 = 1.05;

/// By how much CRIU may be slower, or faster: restore times scatter.
const CRIU_DOUBT: f64 = 1.25;

/// By how much the link may be faster than measured before a deadline is called lost: links double.
const LINK_HOPE: f64 = 2.0;

/// How careful an estimate must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Care {
    /// As likely too high as too low.
    Expected,
    /// Hardly ever too low.
    Cautious,
    /// Hardly ever too high.
    Hopeful,
}

/// How far reading has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reads {
    /// Number of the last whole iteration; 0 before the first.
    pub(super) number: u32,
    /// When the last whole iteration read its pages, on average, and when it was acknowledged.
    pub(super) middle: f64,
    pub(super) end: f64,
    /// Share of the memory that the iteration under way has read, and since when.
    pub(super) share: f64,
    pub(super) begin: f64,
    /// The latest moment that we know of.
    pub(super) now: f64,
    pub(super) memory: f64,
    /// In the first iteration: the share of what was read that the destination lacked. Zero pages and
    /// files that it has need not be sent.
    pub(super) lacked: f64,
}

impl Reads {
    /// Takes in a whole iteration; returns the time between its reads and those of the one before.
    pub(super) fn iteration(&mut self, done: &Iteration) -> f64 {
        let (begin, end) = (done.begin.as_secs_f64(), done.end.as_secs_f64());
        let middle = f64::midpoint(begin, end);
        let interval = middle - self.middle;
        *self = Self {
            number: done.number,
            middle,
            end,
            share: 0.0,
            begin: end,
            now: end,
            memory: (done.scanned_bytes as f64).max(1.0),
            lacked: 1.0,
        };
        interval
    }

    /// Takes in an iteration under way.
    pub(super) fn progress(&mut self, so_far: &Iteration) {
        self.memory = self.memory.max(so_far.scanned_bytes as f64).max(1.0);
        self.share = so_far.scanned_bytes as f64 / self.memory;
        self.lacked = so_far.changed_bytes as f64 / (so_far.scanned_bytes as f64).max(1.0);
        self.begin = so_far.begin.as_secs_f64();
        self.now = so_far.end.as_secs_f64();
    }
}

/// The state after some more iterations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// When the iteration would be acknowledged.
    pub(super) end: f64,
    /// Downtime if frozen then.
    pub(super) downtime: f64,
}

/// All that predictions are made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outlook<'a> {
    pub(super) costs: &'a Costs,
    pub(super) rates: &'a Rates,
    pub(super) dirty: &'a Dirty,
    pub(super) reads: &'a Reads,
}

impl Outlook<'_> {
    /// Bytes that a freeze at `at` would still have to send.
    pub(super) fn changed_at(&self, at: f64, care: Care) -> f64 {
        let reads = self.reads;
        let fresh = at - f64::midpoint(reads.begin, reads.now);
        let unread = if reads.number == 0 {
            let doubt = if care == Care::Cautious {
                UNREAD_DOUBT
            } else {
                1.0
            };
            reads.memory * reads.lacked * doubt
        } else {
            self.dirtied(at - reads.middle, care)
        };
        (1.0 - reads.share) * unread + reads.share * self.dirtied(fresh, care)
    }

    fn dirtied(&self, seconds: f64, care: Care) -> f64 {
        let memory = self.reads.memory;
        match care {
            Care::Expected => self.dirty.within(seconds, memory),
            Care::Cautious => (self.dirty.at_most(seconds, memory) * DIRTY_DOUBT).min(memory),
            Care::Hopeful if !self.dirty.is_known() => 0.0,
            Care::Hopeful => self.dirty.within(seconds, memory) / DIRTY_DOUBT,
        }
    }

    /// Downtime of a freeze at the end of the last iteration, surely enough for a target.
    pub(super) fn sure_downtime(&self) -> f64 {
        let since = self.reads.end - self.reads.middle;
        let changed = self.dirty.shorter(since, self.reads.memory);
        self.downtime(changed, Care::Expected)
    }

    /// Downtime with `changed` bytes left.
    pub(super) fn downtime(&self, changed: f64, care: Care) -> f64 {
        let (criu_factor, sending) = match care {
            Care::Expected => (1.0, self.rates.seconds_to_send(changed)),
            Care::Cautious => (CRIU_DOUBT, self.rates.seconds_to_send(changed)),
            Care::Hopeful => (
                1.0 / CRIU_DOUBT,
                self.rates.least_seconds_to_send(changed) / LINK_HOPE,
            ),
        };
        let dump = self.costs.dump.as_secs_f64();
        let hidden = sending.min(OVERLAP * dump);
        let criu = (dump + self.costs.restore.as_secs_f64()) * criu_factor;
        criu + sending - hidden + ROUND_TRIPS * self.costs.round_trip.as_secs_f64()
    }

    /// Downtime of a freeze at `at`.
    pub(super) fn downtime_at(&self, at: f64, care: Care) -> f64 {
        self.downtime(self.changed_at(at, care), care)
    }

    /// The latest moment from which all is done at `deadline`; before 0 where that has passed.
    pub(super) fn latest_freeze(&self, deadline: f64, care: Care) -> f64 {
        let fits = |at: f64| at + self.downtime_at(at, care) <= deadline;
        if !fits(self.reads.now) {
            return -1.0;
        }
        // What is left only grows with time, so there is one boundary.
        let (mut early, mut late) = (self.reads.now, deadline);
        for _ in 0..40 {
            let middle = f64::midpoint(early, late);
            if fits(middle) {
                early = middle;
            } else {
                late = middle;
            }
        }
        early
    }

    /// The next iterations after the last whole one, `count` at most.
    pub(super) fn ahead(&self, count: u32) -> impl Iterator<Item = Step> {
        let reads = self.reads;
        let mut middle = reads.middle;
        let mut end = reads.end;
        let mut unread = (reads.number == 0).then_some(reads.memory * reads.lacked);
        (0..count).map(move |_| {
            if let Some(bytes) = unread.take() {
                end = reads.now + self.length(bytes) * (1.0 - reads.share);
                middle = f64::midpoint(reads.begin, end);
            } else {
                let length = self.next_length(end - middle);
                middle = end + length / 2.0;
                end += length;
            }
            let changed = self.dirtied(end - middle, Care::Expected);
            Step {
                end,
                downtime: self.downtime(changed, Care::Expected),
            }
        })
    }

    /// How long an iteration lasts whose pages were read `since` seconds ago when it begins.
    fn next_length(&self, since: f64) -> f64 {
        let mut length = self.length(0.0);
        for _ in 0..ROUNDS {
            length = self.length(self.dirtied(since + length / 2.0, Care::Expected));
        }
        length
    }

    /// How long an iteration lasts that finds `changed` bytes.
    fn length(&self, changed: f64) -> f64 {
        let scan = self.rates.seconds_to_scan(self.reads.memory);
        scan.max(self.rates.seconds_to_send(changed)) + self.costs.round_trip.as_secs_f64()
    }

    /// What CRIU and the hand-over take, nothing being left to send.
    pub(super) fn criu_alone(&self) -> f64 {
        self.downtime(0.0, Care::Expected)
    }
}
