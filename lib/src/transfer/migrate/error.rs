use std::path::PathBuf;

use crate::criu::CriuError;
use crate::handover::JournalError;
use crate::hooks::HookError;
use crate::image::ImageError;
use crate::live::LiveError;
use crate::precopy::Why;
use crate::preflight::{Outcome, PreflightError};
use crate::session::SessionError;
use crate::session::migration::Owner;
use crate::transfer::TransferError;
use crate::transfer::migrate::record::FencingError;
use crate::transfer::migrate::report::HostCheck;
use crate::tree::FenceError;

/// Why a migration did not come about.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// Connection or session.
    #[error("{}", transfer(.0))]
    Transfer(#[from] TransferError),
    /// The tree cannot be looked at.
    #[error(transparent)]
    Survey(#[from] PreflightError),
    /// A check failed: nothing was touched.
    #[error("preflight: {}", failed(.0))]
    Preflight(Vec<HostCheck>),
    /// The running tree cannot be read.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// The caller's next dump could not be had.
    #[error("iteration {number}: no dump to copy from: {source}")]
    Dump {
        /// For which iteration.
        number: u32,
        /// What the caller said.
        source: std::io::Error,
    },
    /// The caller's dump cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// CRIU's part failed here.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// The memory that CRIU dumped could not be passed on.
    #[error("the memory of the dump could not be passed on: {0}")]
    Memory(String),
    /// A command of the operator's failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The goals cannot be met.
    #[error("given up: {0}")]
    GivenUp(Why),
    /// The operator stopped it.
    #[error("stopped")]
    Stopped,
    /// The records that keep the workload safe cannot be written, or say something else by now.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The tree could not be held apart from CRIU.
    #[error("the workload could not be fenced: {0}")]
    Fence(#[from] FenceError),
    /// CRIU let the tree go too soon: it may have run on after it was dumped.
    #[error("CRIU died before the workload was fenced: what was sent may be out of date")]
    LetGo,
    /// There is no such place for the dump here.
    #[error(transparent)]
    Sink(#[from] crate::sink::SinkError),
    /// A directory for the dump.
    #[error("cannot use {} for the dump: {source}", path.display())]
    Work {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl From<SessionError> for MigrateError {
    fn from(error: SessionError) -> Self {
        Self::Transfer(error.into())
    }
}

impl From<FencingError> for MigrateError {
    fn from(error: FencingError) -> Self {
        match error {
            FencingError::Journal(error) => error.into(),
            FencingError::Fence(error) => error.into(),
            FencingError::LetGo => Self::LetGo,
        }
    }
}

// What that error says of sending images again is not true here.
fn transfer(error: &TransferError) -> String {
    match error {
        TransferError::Transport(error) => error.to_string(),
        other => other.to_string(),
    }
}

/// The checks that failed, with what to do.
fn failed(checks: &[HostCheck]) -> String {
    let failed = checks
        .iter()
        .filter(|it| it.check.outcome == Outcome::Failed);
    let each = failed.map(|HostCheck { host, check }| {
        let host = host.as_str();
        format!("{} ({host}): {}; {}", check.name, check.found, check.advice)
    });
    each.collect::<Vec<_>>().join("\n  ")
}

/// A migration that failed, and what became of the workload.
#[derive(Debug, thiserror::Error)]
#[error("{error}\n{}", self.fate())]
pub struct MigrateFailure {
    /// Why.
    pub error: MigrateError,
    /// Whose the workload is.
    pub owner: Owner,
    /// Nothing was frozen or sent yet.
    pub untouched: bool,
    /// The destination has said that nothing is left there.
    pub destination_is_clean: bool,
}

impl MigrateFailure {
    fn fate(&self) -> &'static str {
        // Nothing runs on, here or there.
        if matches!(self.error, MigrateError::Live(LiveError::RootGone { .. })) {
            return "nothing of it runs at the destination either";
        }
        match (self.owner, self.untouched, self.destination_is_clean) {
            (Owner::Source, true, _) => "the workload runs on here; nothing was touched",
            (Owner::Source, false, true) => {
                "the workload runs on here; the destination has removed what came"
            }
            (Owner::Source, false, false) => {
                "the workload runs on here; the destination could not be told, and removes what came when it is: crxfer recover does that, too"
            }
            (Owner::InDoubt, ..) => {
                "the destination was told to go on and has not answered: the workload is held frozen here until both meet again; crxfer recover says more, and takes a decision"
            }
            (Owner::Destination, ..) => "the workload runs at the destination",
        }
    }
}
