//! The source's driver of a live migration: [`migrate`].

mod driver;
mod error;
mod freeze;
mod iterate;
mod record;
mod report;
mod stream;
mod work;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::guard::GuardProgram;
use super::send::Target;
use crate::criu::CriuOptions;
use crate::handover::OnPartition;
use crate::hooks::Hooks;
use crate::precopy::{Goals, Prediction};
use crate::runtime::DumpCommand;
use crate::transport::{self, Identity};

pub use driver::migrate;
pub use error::{MigrateError, MigrateFailure};
pub use iterate::{Dumps, Precopy};
pub use report::{Host, HostCheck, IterationReport, MigrationReport, Outcome, PhaseReport};
pub(super) use stream::{RecordStream, StreamEnded};

/// What to move, and how.
#[derive(Debug)]
pub struct MigrateOptions {
    /// Root of the process tree, as seen here.
    pub pid: u32,
    /// A name for people; by default the root's program and pid.
    pub name: Option<String>,
    /// Where to.
    pub target: Target,
    /// This host's key.
    pub identity: Identity,
    /// How memory is copied while the tree runs.
    pub precopy: Precopy,
    /// When to freeze.
    pub goals: Goals,
    /// After this long frozen the tree resumes here, whatever the other side does.
    pub freeze_limit: Duration,
    /// Dumps the tree in the place of a CRIU of our own, as a container's runtime does.
    pub external: Option<DumpCommand>,
    /// The program CRIU.
    pub program: PathBuf,
    /// What CRIU is told on both sides (`config_file` only here).
    pub criu: CriuOptions,
    /// Commands at named moments.
    pub hooks: Hooks,
    /// What only guards against a risk does not stop it.
    pub force: bool,
    /// Only the preflight.
    pub dry_run: bool,
    /// Most bytes a second on the wire.
    pub bytes_per_s: Option<u64>,
    /// Most bytes of memory read a second while the tree runs.
    pub read_bytes_per_s: Option<u64>,
    /// Where images are kept on their way.
    pub mode: Mode,
    /// Where the images of the final dump are made, without its memory; with [`Mode::Diskless`] only
    /// CRIU's log of a failure goes there.
    pub work: PathBuf,
    /// Where the journal of the migration is kept, by which it is ended well whatever dies. On a tmpfs
    /// it costs no time.
    pub state: PathBuf,
    /// What is started beside the migration to go on where this process dies. Without it
    /// [`finish_source`](super::finish::finish_source) must be called for what is left in `state`.
    pub guard: Option<GuardProgram>,
    /// What to do where the destination has been told to go on and cannot be reached any more.
    pub on_partition: OnPartition,
    /// How long to try before `on_partition`, unless that is [`OnPartition::Hold`].
    pub partition_wait: Duration,
    /// Settings of the connection.
    pub transport: transport::Options,
    /// Becomes true to stop: until the commit the workload then runs on here.
    pub stop: watch::Receiver<bool>,
    /// Who is told what happens.
    pub events: MigrateEvents,
}

/// Where the images of a migration are until its copy runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// In directories, wherever those are.
    Disk,
    /// As [`Disk`](Self::Disk), with the source's directory on a tmpfs.
    Tmpfs,
    /// In memory that only descriptors hold, on both hosts: no file of it is visible.
    #[default]
    Diskless,
}

impl Mode {
    /// As the command line has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Tmpfs => "tmpfs",
            Self::Diskless => "diskless",
        }
    }
}

/// What happens during a migration, as it happens.
#[derive(Clone, Debug)]
pub enum MigrateEvent {
    /// Both sides have looked: what they found.
    Preflight(Vec<HostCheck>),
    /// Something that the operator should know before it begins.
    Warning(String),
    /// An iteration begins.
    IterationBegun(u32),
    /// So far, a few times a second.
    Progress {
        /// Of which iteration.
        number: u32,
        /// Bytes of memory that this iteration has compared.
        scanned_bytes: u64,
        /// Bytes that it will compare, about.
        memory_bytes: u64,
        /// Bytes on the wire since the migration began.
        wire_bytes: u64,
        /// What is expected.
        prediction: Prediction,
    },
    /// An iteration is stored at the destination.
    IterationDone(IterationReport),
    /// The tree is being frozen.
    Freezing,
    /// The copy is built there.
    Built,
    /// The destination was told to go on and has not answered: the tree is kept frozen here.
    InDoubt(String),
}

/// Where events go. Called from the migration's task; must not block.
#[derive(Clone)]
pub struct MigrateEvents(Arc<dyn Fn(MigrateEvent) + Send + Sync>);

impl MigrateEvents {
    /// Events go to `sink`.
    pub fn new(sink: impl Fn(MigrateEvent) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Events go nowhere.
    pub fn none() -> Self {
        Self::new(|_| {})
    }

    fn emit(&self, event: MigrateEvent) {
        (self.0)(event);
    }
}

impl fmt::Debug for MigrateEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MigrateEvents")
    }
}
