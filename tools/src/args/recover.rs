//! `crxfer recover`, `status` and the hidden `guard`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum, ValueHint};
use crxfer::handover::{Keep, OnPartition};
use crxfer::identity::Fingerprint;
use crxfer::transfer::guard::GuardSide;
use crxfer::wire::MigrationId;

use super::TransportArgs;
use super::migrate::seconds;
use crate::exit;

const EXAMPLES: &str = "\
Examples:
  crxfer recover
  crxfer recover --dir /var/lib/images --to @ticket
  crxfer recover 0f3c… --keep-source";

/// End migrations that a crash, a power cut or a lost link has left unfinished
///
/// Every step of a migration is recorded on both hosts before it is taken. This reads the records,
/// says who holds what, and brings each migration to its end: forward where the source has handed the
/// workload over, else back. Nothing is lost by calling it twice, or at boot, or while a guard does
/// the same. Migrations under way are left alone.
///
/// Where the source has handed over and cannot reach the destination, nobody can know whether the
/// copy runs: the workload is held frozen on the source. It goes on as soon as both hosts meet again
/// (--to where the destination listens elsewhere now). If they never will, look on both hosts, and
/// decide with --keep-source or --keep-destination.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, after_long_help = exit::help(EXAMPLES))]
pub(crate) struct RecoverArgs {
    /// Only these migrations: their ids, or how those begin [default: all]
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<String>,

    #[command(flatten)]
    pub(crate) places: PlaceArgs,

    /// Let the workload run on the source, although the destination may have been told to run it
    ///
    /// Only for a migration in doubt. If its copy runs at the destination, there are then two: make
    /// sure that it does not, and never will.
    #[arg(long, conflicts_with = "keep_destination")]
    pub(crate) keep_source: bool,

    /// End the workload on the source, although the destination may not have been told to run it
    ///
    /// Only for a migration in doubt. If its copy does not run at the destination, nothing runs until
    /// `crxfer recover` there, or this host, lets it: make sure that the complete images are there.
    #[arg(long)]
    pub(crate) keep_destination: bool,

    /// Where the destination can be met now: a ticket, @FILE, -, or HOST:PORT
    #[arg(long, value_name = "TICKET|@FILE|-|HOST:PORT")]
    pub(crate) to: Option<String>,

    /// Key that the destination must have, with --to HOST:PORT; may be repeated
    #[arg(long, value_name = "FINGERPRINT")]
    pub(crate) peer: Vec<Fingerprint>,

    /// Seconds to try to reach the other host
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub(crate) wait: Duration,

    /// Print one JSON object a line
    ///
    /// {"event":"migration","id","side","name","pid","state","age","holder","finding"} for each that
    /// is found, then {"event":"outcome","id","side","outcome","detail","notes"}, where outcome is
    /// kept, moved, running, removed, held, undecided, busy or failed. Ages are in seconds.
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) transport: TransportArgs,
}

impl RecoverArgs {
    pub(crate) fn keep(&self) -> Option<Keep> {
        match (self.keep_source, self.keep_destination) {
            (true, _) => Some(Keep::Source),
            (_, true) => Some(Keep::Destination),
            _ => None,
        }
    }
}

/// Where records are.
#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// Directory of the records, as given to `crxfer migrate` or `recv` [default: /run/crxfer]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state: Option<PathBuf>,

    /// Also those of this receiving directory; may be repeated
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: Vec<PathBuf>,
}

/// Show the migrations that are under way
///
/// Those of this host, in both directions. What was left unfinished is shown as well, and that
/// `crxfer recover` ends it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer status
  crxfer status --json --dir /var/lib/images | jq -r .state")]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) places: PlaceArgs,

    /// Print one JSON object a line: those of `crxfer recover --json` with the event "migration"
    #[arg(long)]
    pub(crate) json: bool,
}

/// Go on where the program at the other end of standard input is gone
///
/// Started by `crxfer migrate` and `crxfer recv`, for nobody else.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  crxfer guard --side source --state /run/crxfer < pipe
  crxfer guard --side destination --state images/.crxfer/state < pipe")]
pub(crate) struct GuardArgs {
    /// Whose records
    #[arg(long, value_enum)]
    pub(crate) side: SideArg,

    /// Directory of the records
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state: PathBuf,
}

/// `--side`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum SideArg {
    /// Where workloads leave
    Source,
    /// Where they arrive
    Destination,
}

impl From<SideArg> for GuardSide {
    fn from(side: SideArg) -> Self {
        match side {
            SideArg::Source => Self::Source,
            SideArg::Destination => Self::Destination,
        }
    }
}

/// What protects the workload.
#[derive(Debug, Args)]
#[command(next_help_heading = "When something dies")]
pub(crate) struct SafetyArgs {
    /// Directory of the migration's records, by which `crxfer recover` ends it well; on a tmpfs they
    /// cost no time [default: /run/crxfer]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state: Option<PathBuf>,

    /// Where the destination was told to go on and cannot be reached any more
    ///
    /// hold never runs two copies, and never loses one: the workload stays frozen here until both
    /// hosts meet again or an operator decides (`crxfer recover`). The other two end the wait after
    /// --partition-wait, and may be wrong: keep-source runs TWO copies where the destination has
    /// heard the word before the link broke; keep-destination runs NONE, until the hosts meet again,
    /// where it has not.
    #[arg(long, value_enum, default_value_t = PartitionArg::Hold)]
    pub(crate) on_partition: PartitionArg,

    /// Seconds without a word from the destination before --on-partition; counted anew by a guard
    /// or `crxfer recover` that takes over
    #[arg(long, value_name = "S", default_value = "60", value_parser = seconds)]
    pub(crate) partition_wait: Duration,
}

/// `--on-partition`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum PartitionArg {
    /// Hold it frozen until it is known
    Hold,
    /// Let it run here; two copies may run
    KeepSource,
    /// End it here; none may run for a while
    KeepDestination,
}

impl From<PartitionArg> for OnPartition {
    fn from(policy: PartitionArg) -> Self {
        match policy {
            PartitionArg::Hold => Self::Hold,
            PartitionArg::KeepSource => Self::KeepSource,
            PartitionArg::KeepDestination => Self::KeepDestination,
        }
    }
}

impl RecoverArgs {
    /// Whether this migration is meant.
    pub(crate) fn means(&self, id: MigrationId) -> bool {
        let id = id.to_string();
        self.ids.is_empty()
            || self
                .ids
                .iter()
                .any(|wanted| id.starts_with(wanted.as_str()))
    }
}
