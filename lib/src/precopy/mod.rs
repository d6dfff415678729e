//! When to freeze: the policy of pre-copy, without I/O and without a clock.
//!
//! A driver reads the memory of a running tree again and again and sends what changed. After each
//! iteration that the destination acknowledged it asks [`Policy::after`]: again, freeze, or give up.
//!
//! ```text
//!   before_first ──▶ iteration 1 ──▶ after ── Again ──▶ iteration 2 ──▶ after ── Freeze ──▶ measured
//!   (warnings)        │ progress       │                                  │
//!                     ▼                ▼                                  ▼
//!               predict, latest_freeze: may be asked at any time     or GiveUp
//! ```
//!
//! All times are [`Duration`]s since the migration's start, which the driver counts; they never go
//! backwards. All bytes are bytes of memory, except where the name says *wire*.

mod accuracy;
mod dirty;
mod outlook;
mod policy;
mod rates;
#[cfg(test)]
mod simulate;
#[cfg(test)]
mod tests;

pub use accuracy::{Accuracy, Measured};
pub use policy::Policy;

use std::fmt;
use std::time::Duration;

/// What to do when the downtime target is out of reach (`--on-slow`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnSlow {
    /// Come as close as further iterations bring us, then freeze all the same.
    #[default]
    Freeze,
    /// Give up as soon as two measurements of the dirty rate say so; the workload stays on the
    /// source. This holds with a deadline too: who asks for it prefers no migration to a slow one.
    Cancel,
    /// Go on in the hope of a quieter workload. Ends with giving up at the last iteration that is
    /// allowed, or, where there is a deadline, with the latest freeze that meets it. There is nothing
    /// to wait for where CRIU alone takes longer than the target.
    Wait,
}

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Goals {
    /// Target for all of the downtime, CRIU's part included (`--downtime`). Reached means frozen at
    /// once, though more iterations might lower it further.
    pub downtime: Option<Duration>,
    /// Iterations at most (`--max-iterations`); 0 counts as 1.
    pub max_iterations: u32,
    /// When the workload must run on the destination (`--deadline`). Goes before everything except
    /// [`OnSlow::Cancel`].
    pub deadline: Option<Duration>,
    /// The source resumes when the freeze lasts this long (`--freeze-limit`), so a freeze that is
    /// expected to last longer is not begun. `None` for no limit.
    pub freeze_limit: Option<Duration>,
    /// What to do when `downtime` is out of reach.
    pub on_slow: OnSlow,
}

impl Default for Goals {
    fn default() -> Self {
        Self {
            downtime: None,
            max_iterations: 30,
            deadline: None,
            freeze_limit: Some(Duration::from_secs(10)),
            on_slow: OnSlow::default(),
        }
    }
}

/// What the freeze costs on these two hosts, whatever was sent before.
#[derive(Clone, Copy, Debug, Default)]
pub struct Costs {
    /// CRIU's dump from the freeze to its end, its reader never making it wait.
    pub dump: Duration,
    /// CRIU's restore until the workload runs.
    pub restore: Duration,
    /// Round trip between the hosts.
    pub round_trip: Duration,
}

/// One iteration, acknowledged by the destination; or, for [`Policy::progress`], as far as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Iteration {
    /// From 1.
    pub number: u32,
    /// When reading began.
    pub begin: Duration,
    /// When the destination acknowledged it; in progress: now.
    pub end: Duration,
    /// Bytes read and hashed.
    pub scanned_bytes: u64,
    /// Time that reading and hashing alone took, without waiting for the link.
    pub scan_time: Duration,
    /// Bytes of pages whose content the destination lacked.
    pub changed_bytes: u64,
    /// Bytes that crossed the wire for them.
    pub wire_bytes: u64,
    /// Time in which the link was busy or waited for.
    pub send_time: Duration,
}

/// Some pages that this iteration has read already, read once more.
///
/// Before the second iteration nothing is known of the dirty rate, so with a deadline the policy
/// must take all that was sent for dirty again. A few thousand pages chosen at random among those
/// already read tell better, and cost next to nothing.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Mean time between the two reads.
    pub interval: Duration,
    /// Pages read.
    pub pages: u64,
    /// Those that had changed.
    pub changed_pages: u64,
}

/// What to do after an iteration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another iteration.
    Again,
    /// Freeze now.
    Freeze(Why),
    /// Leave the workload on the source.
    GiveUp(Why),
}

/// Reason of a decision, for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The predicted downtime is within `--downtime`.
    TargetReached,
    /// More iterations would hardly lower the predicted downtime.
    NoGain,
    /// More iterations were predicted to lower the downtime, and repeatedly did not.
    Stalled,
    /// `--max-iterations` are done.
    MaxIterations,
    /// Another iteration would put the deadline at risk.
    Deadline,
    /// Even a freeze at this moment could not meet the deadline.
    DeadlineOutOfReach,
    /// No number of iterations would bring the downtime within `--downtime`.
    TargetOutOfReach,
    /// The freeze would last longer than `--freeze-limit`, and iterations do not shorten it enough.
    FreezeLimit,
    /// Whoever gives the memory to copy has no more of it.
    NothingMore,
}

impl Why {
    /// A word for reports that programs read.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TargetReached => "target-reached",
            Self::NoGain => "no-gain",
            Self::Stalled => "stalled",
            Self::MaxIterations => "max-iterations",
            Self::Deadline => "deadline",
            Self::DeadlineOutOfReach => "deadline-out-of-reach",
            Self::TargetOutOfReach => "target-out-of-reach",
            Self::FreezeLimit => "freeze-limit",
            Self::NothingMore => "nothing-more",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TargetReached => "the predicted downtime is within --downtime",
            Self::NoGain => "another iteration would not lower the downtime by a tenth",
            Self::Stalled => "the last iterations did not lower the downtime as predicted",
            Self::MaxIterations => "--max-iterations are done",
            Self::Deadline => "another iteration would put --deadline at risk",
            Self::DeadlineOutOfReach => {
                "--deadline cannot be met any more, not even by freezing now"
            }
            Self::TargetOutOfReach => {
                "no further iteration would bring the downtime within --downtime"
            }
            Self::FreezeLimit => "the freeze would last longer than --freeze-limit",
            Self::NothingMore => "there are no more dumps to copy from",
        })
    }
}

/// What is known to go against the goals before anything was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warning {
    /// CRIU's dump and restore alone take longer than the downtime target.
    CriuExceedsDowntime {
        /// CRIU's part, with the round trips of the hand-over.
        criu: Duration,
        /// The target.
        downtime: Duration,
    },
    /// CRIU's dump and restore alone take longer than the whole migration may.
    CriuExceedsDeadline {
        /// CRIU's part, with the round trips of the hand-over.
        criu: Duration,
        /// The deadline.
        deadline: Duration,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CriuExceedsDowntime { criu, downtime } => write!(
                f,
                "CRIU's dump and restore alone are expected to take {} ms, more than --downtime {}: \
                 the target cannot be met on these hosts",
                criu.as_millis(),
                downtime.as_millis()
            ),
            Self::CriuExceedsDeadline { criu, deadline } => write!(
                f,
                "CRIU's dump and restore alone are expected to take {:.1} s, more than --deadline {}: \
                 it cannot be met on these hosts",
                criu.as_secs_f64(),
                deadline.as_secs_f64()
            ),
        }
    }
}

/// What the policy expects at the moment.
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    /// Downtime if frozen now.
    pub downtime: Duration,
    /// Downtime if frozen when the policy expects to.
    pub final_downtime: Duration,
    /// When the workload would then run on the destination, since the migration's start.
    pub finish: Duration,
    /// Pages that the workload dirties, over an interval like the last one; 0 while unknown.
    pub dirty_bytes_per_s: f64,
    /// Wire bytes that the link carries; 0 while unknown.
    pub link_bytes_per_s: f64,
    /// Reading and hashing memory; 0 while unknown.
    pub hash_bytes_per_s: f64,
}

/// `seconds` as a [`Duration`]; estimates that are negative or absurdly long become the nearest one.
fn duration(seconds: f64) -> Duration {
    const LONGEST: Duration = Duration::from_secs(1_000_000_000);
    Duration::try_from_secs_f64(seconds.max(0.0)).map_or(LONGEST, |time| time.min(LONGEST))
}
