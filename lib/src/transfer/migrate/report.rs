use std::time::Duration;

use crate::image::DumpStats;
use crate::precopy::{Accuracy, Why};
use crate::preflight::Check;
use crate::session::migration::ClockOffset;
use crate::transfer::migrate::Mode;
use crate::wire::MigrationId;

/// How a migration ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The workload runs at the destination.
    Migrated,
    /// `dry_run`: it could be tried.
    Checked,
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Where the workload came from.
    Source,
    /// Where it is now.
    Destination,
}

impl Host {
    /// Its name in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What one host found before the migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCheck {
    /// Which host.
    pub host: Host,
    /// What it found.
    pub check: Check,
}

impl HostCheck {
    /// What `host` found.
    pub fn all(host: Host, checks: Vec<Check>) -> impl Iterator<Item = Self> {
        checks.into_iter().map(move |check| Self { host, check })
    }
}

/// Whether nothing that was found stops a migration.
pub(super) fn may_begin(checks: &[HostCheck]) -> bool {
    let failed = |it: &HostCheck| it.check.outcome == crate::preflight::Outcome::Failed;
    !checks.iter().any(failed)
}

/// Something that took time, in nanoseconds since the migration began, by the source's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhaseReport {
    /// What.
    pub name: String,
    /// Where.
    pub host: Host,
    /// From. May lie before the begin by the clocks' error.
    pub begin_ns: i64,
    /// To.
    pub end_ns: i64,
}

/// One iteration of pre-copy.
#[derive(Clone, Debug)]
pub struct IterationReport {
    /// From 1.
    pub number: u32,
    /// Pages read.
    pub scanned_pages: u64,
    /// Pages that the destination did not hold.
    pub changed_pages: u64,
    /// Of the changed ones, those whose bytes crossed: not zero, no copies of others.
    pub sent_pages: u64,
    /// Bytes put on the stream for them, after compression.
    pub stream_bytes: u64,
    /// From its begin to the destination's acknowledgement.
    pub took: Duration,
    /// Time in which reading waited for the link.
    pub link_wait: Duration,
    /// From the end of the stream to the acknowledgement.
    pub destination_wait: Duration,
    /// Time that the destination spent on unpacking, hashing and writing.
    pub destination_work: Duration,
    /// Stream bytes a second.
    pub bytes_per_s: f64,
    /// Downtime that was expected after it, if frozen then.
    pub predicted_downtime: Duration,
    /// How long the tree stood still for it, as CRIU says; `None` where it was only read.
    pub frozen: Option<Duration>,
    /// Bytes of memory a second that the workload changes, as far as known.
    pub dirty_bytes_per_s: f64,
}

/// Where each millisecond went.
#[derive(Clone, Debug)]
pub struct MigrationReport {
    /// Which migration.
    pub id: MigrationId,
    /// Its name.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Where its images were.
    pub mode: Mode,
    /// What was checked before.
    pub checks: Vec<HostCheck>,
    /// How the running tree was read.
    pub method: &'static str,
    /// The iterations while the tree ran.
    pub iterations: Vec<IterationReport>,
    /// Why it was frozen then.
    pub why_frozen: Option<Why>,
    /// Pages of the final dump.
    pub dumped_pages: u64,
    /// Of these, those that the destination did not hold.
    pub final_changed_pages: u64,
    /// Of these, those whose bytes crossed.
    pub final_sent_pages: u64,
    /// From the freeze on the source to the copy running; none for a dry run.
    pub downtime: Option<Duration>,
    /// What was expected, and how far off it was.
    pub accuracy: Option<Accuracy>,
    /// From the begin until the workload ran at the destination.
    pub total: Duration,
    /// The clocks' difference; its error is that of `downtime` and of the destination's phases.
    pub clock: Option<ClockOffset>,
    /// CRIU's own figures of the dump. Its frozen time includes the wait for the destination.
    pub criu_stats: Option<DumpStats>,
    /// Everything that took time, in order of begin.
    pub phases: Vec<PhaseReport>,
    /// Bytes of UDP payload, sent and received.
    pub wire_bytes: (u64, u64),
    /// Root process at the destination.
    pub pid: Option<u32>,
    /// What the operator should know.
    pub notes: Vec<String>,
}
