//! Migrations whose images are kept in memory only.
//!
//! Each has a memory sink of its own, which this process and the guard hold from the offer until nobody
//! needs the images any more. The journal names both, so that whoever finishes the migration finds them.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::start_guard;
use crate::handover::{DestinationState, Journal};
use crate::preflight;
use crate::sink::{Holder, Memory, Sink as _, SinkError, SinkKind};
use crate::store::StoreError;
use crate::transfer::TransferError;
use crate::transfer::guard::{Guard, GuardProgram};
use crate::wire::{FailureCode, Keeping, MigrationId};

/// What images may take besides the memory that they are of.
const SLACK: u64 = 256 << 20;

/// The guard of a receiver, and how to start another one.
#[derive(Debug)]
pub(super) struct Guarding {
    pub(super) program: Option<GuardProgram>,
    pub(super) state: PathBuf,
    pub(super) guard: Mutex<Option<Guard>>,
}

impl Guarding {
    pub(super) fn guard(&self) -> MutexGuard<'_, Option<Guard>> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // None where this receiver has no guard.
    fn hold(&self, id: MigrationId, memory: &Memory) -> io::Result<Option<Holder>> {
        let (Some(program), Some(what)) = (&self.program, memory.descriptor()) else {
            return Ok(None);
        };
        let mut guard = self.guard();
        match guard.as_ref().map(|guard| guard.hold(id, what)) {
            Some(Ok(holder)) => return Ok(Some(holder)),
            Some(Err(error)) => tracing::warn!("the guard does not answer ({error}): another one"),
            None => {}
        }
        let new = start_guard(program, &self.state).map_err(io::Error::other)?;
        let held = new.hold(id, what);
        *guard = Some(new);
        held.map(Some)
    }
}

/// A sink that was made for a migration.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) path: PathBuf,
    pub(super) holders: Vec<Holder>,
}

/// The sinks of all migrations under way.
#[derive(Debug)]
pub(super) struct Memories {
    pub(super) kind: SinkKind,
    /// Bytes that each may take, by the operator's word.
    pub(super) limit: Option<u64>,
    pub(super) guarding: Guarding,
    pub(super) held: Mutex<HashMap<MigrationId, Memory>>,
}

impl Memories {
    /// Whether the images of a migration that is offered so are to be kept in memory.
    pub(super) fn wants(&self, keeping: Keeping) -> bool {
        keeping == Keeping::Memory || self.kind == SinkKind::Memory
    }

    /// How much one migration may take.
    pub(super) fn room(&self) -> u64 {
        let available = preflight::memory_available();
        self.limit.map_or(available, |limit| limit.min(available))
    }

    /// Makes the sink of a migration, held by the guard as well. Blocks for a moment.
    pub(super) fn create(
        &self,
        id: MigrationId,
        memory_bytes: u64,
        force: bool,
    ) -> Result<Made, TransferError> {
        let available = self.room();
        if memory_bytes > available && !force {
            let needed = memory_bytes;
            return Err(StoreError::from(SinkError::TooLarge { needed, available }).into());
        }
        // A page may be there twice until the iteration that replaces it is complete.
        let bytes = memory_bytes.saturating_mul(2).saturating_add(SLACK);
        let memory = Memory::create(self.limit.map_or(bytes, |limit| limit.min(bytes)));
        let memory = memory.map_err(StoreError::from)?;
        if memory.may_be_swapped() {
            tracing::info!("this kernel may swap the images of {id}: tmpfs has no `noswap`");
        }
        let number = memory.descriptor().map(|mount| mount.as_raw_fd());
        let own = number.and_then(Holder::here);
        let own = own.ok_or_else(|| cannot_hold(&io::Error::other("/proc lacks this process")))?;
        let guard = self.guarding.hold(id, &memory);
        let guard = guard.map_err(|error| cannot_hold(&error))?;
        let path = memory.path().join(id.to_string());
        self.all().insert(id, memory);
        Ok(Made {
            path,
            holders: std::iter::once(own).chain(guard).collect(),
        })
    }

    /// Lets go of it, here and in the guard.
    pub(super) fn release(&self, id: MigrationId) {
        if self.all().remove(&id).is_some()
            && let Some(guard) = self.guarding.guard().as_ref()
        {
            // One that is dead holds nothing.
            let _ = guard.release(id);
        }
    }

    /// Lets go of those that are over, other than by their own driver.
    pub(super) fn tidy(&self, state: &Path) {
        let ids: Vec<_> = self.all().keys().copied().collect();
        for id in ids {
            let journal = Journal::<DestinationState>::open(state, id).ok().flatten();
            let history = journal.map(|journal| journal.read().map(|history| history.state()));
            let is_over = match history {
                None => true,
                Some(Ok(state)) => matches!(
                    state,
                    DestinationState::Running | DestinationState::Removed | DestinationState::Over
                ),
                Some(Err(_)) => false,
            };
            if is_over {
                self.release(id);
            }
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<MigrationId, Memory>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cannot_hold(error: &io::Error) -> TransferError {
    let reason = format!(
        "the destination cannot keep the images in memory safely: its guard does not hold them ({error}); try again, or migrate with --mode disk"
    );
    super::restore::refused(FailureCode::Storage, reason)
}
