//! What an earlier receiver has left, when the next one starts.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::spawn_blocking;

use super::{Shared, orphans};
use crate::handover::journal::History;
use crate::handover::{DestinationState, Journal, JournalError, Lease, Verdict};
use crate::standby;
use crate::store::{Store, Tried as _};
use crate::transfer::TransferError;
use crate::transfer::event::Event;
use crate::transfer::finish::{DestinationOutcome, finish_destination, running_pid};
use crate::wire::MigrationId;

/// How long an answer is kept for a source that may still ask.
const ANSWERS: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How often what stands in the way is given time to go away, and how much.
const RETRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);

/// A migration that is not over, in our care.
#[derive(Debug)]
pub(super) struct Waiting {
    journal: Journal<DestinationState>,
    lease: Lease,
}

/// Removes what needs nobody's word to be removed, and gives what remains to be done. Blocks: for as
/// long as killed processes take to end.
pub(super) fn tidy(store: &Store, state: &Path) -> Result<Vec<Waiting>, TransferError> {
    let mut waiting = Vec::new();
    // An error here must not make everything look like a stray.
    let known = Journal::<DestinationState>::list(state);
    let known = known.map_err(|error| super::record::cannot_record(&error))?;
    for id in &known {
        match tidy_one(state, *id) {
            Ok(found) => waiting.extend(found),
            Err(error) => tracing::warn!("migration {id}: {error}"),
        }
    }
    remove_strays(store, &known)?;
    Ok(waiting)
}

fn known(state: &Path) -> Vec<MigrationId> {
    Journal::<DestinationState>::list(state).unwrap_or_else(|error| {
        tracing::warn!("{error}");
        Vec::new()
    })
}

fn tidy_one(state: &Path, id: MigrationId) -> Result<Option<Waiting>, TransferError> {
    let failed = |error: JournalError| super::record::cannot_record(&error);
    let Some(journal) = Journal::open(state, id).map_err(failed)? else {
        return Ok(None);
    };
    // A guard, `crxfer recover`, or a receiver of another directory takes care of it.
    let Some(lease) = journal.lease().map_err(failed)? else {
        return Ok(None);
    };
    let history: History<DestinationState> = journal.read().map_err(failed)?;
    match history.state() {
        DestinationState::Complete | DestinationState::Resuming => {
            return Ok(Some(Waiting { journal, lease }));
        }
        // A source that asks for one of these has not committed.
        DestinationState::Receiving | DestinationState::Removing if history.decided.is_none() => {
            let removed = finish_destination(&journal, &lease, Verdict::Ask);
            removed.map_err(|error| finish_failed(&error))?;
            journal.remove().map_err(failed)?;
        }
        _ => {
            let outcome = finish_destination(&journal, &lease, Verdict::Ask);
            outcome.map_err(|error| finish_failed(&error))?;
            if is_old(&history) {
                journal.remove().map_err(failed)?;
            }
        }
    }
    Ok(None)
}

fn finish_failed(error: &dyn std::error::Error) -> TransferError {
    super::restore::refused(crate::wire::FailureCode::Internal, error.to_string())
}

#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
fn is_old(history: &History<DestinationState>) -> bool {
    let age = SystemTime::now().duration_since(history.since());
    age.is_ok_and(|age| age > ANSWERS)
}

// Directories without a journal are of no migration that got further than its offer.
fn remove_strays(store: &Store, known: &[MigrationId]) -> Result<(), TransferError> {
    let parent = store.home_path("migrations");
    if !parent.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(&parent).tried("list", &parent)? {
        let entry = entry.tried("list", &parent)?;
        let id = entry.file_name().to_str().and_then(MigrationId::parse);
        if id.is_some_and(|id| known.contains(&id)) {
            continue;
        }
        // Of one whose journal is elsewhere, or was lost with /run: perhaps the last copy there is.
        if entry
            .path()
            .join(standby::FINAL)
            .join("inventory.img")
            .exists()
        {
            let place = entry.path();
            tracing::warn!(
                "{} holds a complete copy of a migration without a journal here: look where it runs, then remove it",
                place.display()
            );
            continue;
        }
        tracing::info!("removing {}: it ended early", entry.path().display());
        fs::remove_dir_all(entry.path()).tried("remove", &entry.path())?;
    }
    Ok(())
}

/// Does what remains, beside the receiver's work: a copy is brought to life, a held one is named.
pub(super) fn go_on(shared: &Arc<Shared>, waiting: Vec<Waiting>) {
    for Waiting { journal, lease } in waiting {
        let shared = shared.clone();
        spawn_blocking(move || {
            if let Err(error) = go_on_with(&shared, &journal, &lease) {
                tracing::warn!("migration {}: {error}", journal.id());
            }
        });
    }
}

fn go_on_with(
    shared: &Shared,
    journal: &Journal<DestinationState>,
    lease: &Lease,
) -> Result<(), TransferError> {
    let history = journal.read();
    let about = history.map_err(|error| finish_failed(&error))?.about;
    orphans::adopt();
    let mut outcome = finish_destination(journal, lease, Verdict::Ask);
    for _ in 0..RETRIES {
        if outcome.is_ok() {
            break;
        }
        // Such as a pid that a dead process still holds.
        std::thread::sleep(PAUSE);
        outcome = finish_destination(journal, lease, Verdict::Ask);
    }
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            shared.events.emit(Event::Failed {
                address: about.address,
                error: error.to_string(),
            });
            return Ok(());
        }
    };
    match outcome {
        DestinationOutcome::Held { place } => shared.events.emit(Event::Holding {
            id: journal.id(),
            name: about.name,
            address: about.address,
            images: place,
        }),
        DestinationOutcome::Running { pid, .. } => {
            orphans::reap();
            shared.events.emit(Event::Restored {
                name: about.name,
                pid,
                address: about.address,
            });
        }
        DestinationOutcome::Removed { .. } => {}
    }
    Ok(())
}

/// Whether a guard would find something to do.
pub(super) fn is_anything(shared: &Shared) -> bool {
    let is_open = |id: MigrationId| {
        let journal = Journal::<DestinationState>::open(&shared.state, id);
        let state = journal
            .ok()
            .flatten()
            .and_then(|journal| journal.read().ok());
        state.is_none_or(|history| {
            // One that runs: its source has not heard so, and may hold its tree until it has.
            match history.state() {
                DestinationState::Running => {
                    !history.about.heard && running_pid(&history.about) > 0
                }
                state => !matches!(state, DestinationState::Removed | DestinationState::Over),
            }
        })
    };
    !shared.meetings.is_empty() || known(&shared.state).into_iter().any(is_open)
}
