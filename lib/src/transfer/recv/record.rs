//! The journal of a migration that arrives, as its live driver writes it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{RestoreHost, Shared};
use crate::handover::journal::DestinationAbout;
use crate::handover::{DestinationState, Journal, JournalError, Keep, Lease};
use crate::runtime::RestoreCommand;
use crate::sink::Holder;
use crate::transfer::TransferError;
use crate::transfer::finish::record_running;
use crate::transport::Connection;
use crate::tree::{Process, boot_id};
use crate::wire::{FailureCode, Offer};

/// A journal with its lease, shared with the thread that syncs images.
#[derive(Clone, Debug)]
pub(super) struct Record(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    journal: Journal<DestinationState>,
    about: DestinationAbout,
    _lease: Lease,
}

impl Record {
    /// Begins it: from now on somebody else can tidy up.
    pub(super) fn begin(
        shared: &Shared,
        connection: &Connection,
        host: &RestoreHost,
        offer: &Offer,
        runtime: Option<RestoreCommand>,
        place: PathBuf,
        memory: Vec<Holder>,
    ) -> Result<Self, JournalError> {
        let directory = Journal::<DestinationState>::directory_of(&shared.state, offer.id);
        let work = (!memory.is_empty()).then(|| directory.join("work"));
        let limit = host.hooks.time_limit().as_millis();
        let about = DestinationAbout {
            name: offer.name.clone(),
            peer: connection.peer().to_string(),
            address: connection.remote_address(),
            place,
            memory,
            work,
            facts: offer.facts.clone(),
            options: offer.options.clone(),
            runtime,
            container: offer.container.clone(),
            program: from_anywhere(&host.program),
            config_file: host.config_file.as_deref().map(absolute),
            hooks: host.hooks.commands(),
            hook_limit_ms: u64::try_from(limit).unwrap_or(u64::MAX),
            boot: boot_id(),
            criu: None,
            pid: None,
            root: None,
            announced: false,
            heard: false,
        };
        let (journal, lease) = Journal::create(&shared.state, offer.id, about.clone())?;
        Ok(Self(Arc::new(Mutex::new(Inner {
            journal,
            about,
            _lease: lease,
        }))))
    }

    /// Everything that is needed to go on without this process.
    pub(super) fn about(&self) -> DestinationAbout {
        self.inner().about.clone()
    }

    /// Which process will build copies from now on: whatever is left of one is younger.
    pub(super) fn note_criu(&self, criu: Process) -> Result<(), JournalError> {
        let mut inner = self.inner();
        inner.about.criu = Some(criu);
        inner.journal.note_quickly(|about| about.criu = Some(criu))
    }

    /// All images are checked and stored. On disk when this returns, where the place is durable.
    pub(super) fn complete(&self) -> Result<(), JournalError> {
        self.advance(DestinationState::Complete, "")
    }

    /// The copy may be let go.
    pub(super) fn resuming(&self, why: &str) -> Result<(), JournalError> {
        let inner = self.inner();
        inner
            .journal
            .advance_quickly(DestinationState::Resuming, why)
    }

    /// The copy runs.
    pub(super) fn running(&self, pid: u32) -> Result<(), JournalError> {
        let mut inner = self.inner();
        inner.about.pid = Some(pid);
        inner.about.root = Process::of(pid);
        record_running(&inner.journal, pid)
    }

    /// Clients are led here.
    pub(super) fn announced(&self) -> Result<(), JournalError> {
        let mut inner = self.inner();
        inner.about.announced = true;
        inner.journal.note_quickly(|about| about.announced = true)
    }

    /// The workload stays at the source, or never left it.
    pub(super) fn removing(&self, why: &str) -> Result<(), JournalError> {
        self.advance(DestinationState::Removing, why)
    }

    /// Nothing is left here.
    pub(super) fn removed(&self) -> Result<(), JournalError> {
        self.advance(DestinationState::Removed, "")
    }

    fn advance(&self, state: DestinationState, why: &str) -> Result<(), JournalError> {
        self.inner().journal.advance(state, why)
    }

    /// What an operator has decided meanwhile.
    pub(super) fn decided(&self) -> Result<Option<Keep>, JournalError> {
        Ok(self.inner().journal.read()?.keep())
    }

    /// Nobody will ask any more.
    pub(super) fn close(&self) -> Result<(), JournalError> {
        self.inner().journal.remove()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// Whoever finishes it has another working directory. A name alone is looked for on the PATH.
fn from_anywhere(program: &Path) -> PathBuf {
    match program.components().count() {
        1 => program.to_owned(),
        _ => absolute(program),
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// In words, for the source and the operator.
pub(super) fn cannot_record(error: &JournalError) -> TransferError {
    let text = format!("the destination cannot keep its journal: {error}");
    super::restore::refused(FailureCode::Storage, text)
}

/// Between looks at what an operator may have decided.
pub(super) const LOOK: Duration = Duration::from_millis(200);
