//! A source that has lost its destination within a migration is back.
//!
//! Only the key that made the offer is answered; to others nothing is known of it. Where the migration
//! has a live driver that one does what the source says; else its journal is finished here.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};

use super::Shared;
use crate::handover::{DestinationState, Journal};
use crate::identity::Fingerprint;
use crate::transfer::TransferError;
use crate::transfer::event::Event;
use crate::transfer::finish::{DestinationOutcome, FinishError, finish_destination};
use crate::transport::{Connection, ControlSender};
use crate::wire::{Answer, Message, MigrationId, Step, Verdict};

/// How often a source hears that its answer takes a while: building a copy again may take minutes.
const WORKING: Duration = Duration::from_secs(5);

/// How long a source may take to leave when it has its answer.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a source that is back says to the driver of its migration.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) verdict: Verdict,
    /// Dropped without an answer: ask again.
    pub(super) answer: oneshot::Sender<Answer>,
}

/// The migrations that have a live driver.
#[derive(Debug, Default)]
pub(super) struct Meetings(Mutex<HashMap<MigrationId, Live>>);

#[derive(Debug)]
struct Live {
    peer: Fingerprint,
    calls: mpsc::UnboundedSender<Call>,
}

impl Meetings {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<MigrationId, Live>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether any migration is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.with(|live| live.is_empty())
    }
}

/// A driver that can be met, until this is dropped.
#[derive(Debug)]
pub(super) struct Registered {
    shared: Arc<Shared>,
    id: MigrationId,
}

impl Registered {
    pub(super) fn new(
        shared: &Arc<Shared>,
        id: MigrationId,
        peer: Fingerprint,
        calls: mpsc::UnboundedSender<Call>,
    ) -> Self {
        let live = Live { peer, calls };
        shared.meetings.with(|meetings| meetings.insert(id, live));
        Self {
            shared: shared.clone(),
            id,
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.meetings.with(|live| live.remove(&self.id));
    }
}

/// Does what the verdict says, and answers.
pub(super) async fn serve(
    connection: &Connection,
    shared: &Arc<Shared>,
    control: &mut ControlSender,
    id: MigrationId,
    verdict: Verdict,
) -> Result<(), TransferError> {
    let answering = tokio::spawn(answer(shared.clone(), connection.peer(), id, verdict));
    tell(connection, control, answering, &shared.state, id).await
}

/// Sends the answer when it is there; says that it is worked on until then.
pub(super) async fn tell(
    connection: &Connection,
    control: &mut ControlSender,
    mut answering: JoinHandle<Answer>,
    state: &Path,
    id: MigrationId,
) -> Result<(), TransferError> {
    let mut working = tokio::time::interval(WORKING);
    working.tick().await;
    let answer = loop {
        tokio::select! {
            answer = &mut answering => break answer.unwrap_or(Answer::Busy),
            _ = working.tick() => control.write_message(&Message::Working.encode()).await?,
        }
    };
    let met = Message::Migration(Step::Met(answer));
    control.write_message(&met.encode()).await?;
    let _ = control.finish();
    // The source closes when it has read that.
    let closed = tokio::time::timeout(FAREWELL, connection.closed()).await;
    if closed.is_ok() && matches!(answer, Answer::Runs { .. }) {
        note_heard(state, id);
    }
    Ok(())
}

// Nobody has to wait here for that source any more. An answer for one that asks again stays.
fn note_heard(state: &Path, id: MigrationId) {
    let noted = Journal::<DestinationState>::open(state, id).and_then(|journal| {
        journal.map_or(Ok(()), |journal| {
            journal.note_quickly(|about| about.heard = true)
        })
    });
    if let Err(error) = noted {
        tracing::warn!("migration {id}: {error}");
    }
}

async fn answer(
    shared: Arc<Shared>,
    peer: Fingerprint,
    id: MigrationId,
    verdict: Verdict,
) -> Answer {
    let live = shared.meetings.with(|meetings| {
        let live = meetings.get(&id)?;
        Some((live.peer == peer).then(|| live.calls.clone()))
    });
    match live {
        Some(None) => Answer::Unknown,
        Some(Some(calls)) => {
            let (answer, answered) = oneshot::channel();
            let _ = calls.send(Call { verdict, answer });
            answered.await.unwrap_or(Answer::Busy)
        }
        None => {
            let finishing = spawn_blocking(move || {
                let answer = finish(&shared.state, peer, id, verdict, |name, pid, address| {
                    shared.events.emit(Event::Restored { name, pid, address });
                });
                shared.memories.tidy(&shared.state);
                answer
            });
            finishing.await.unwrap_or(Answer::Busy)
        }
    }
}

/// Finishes a migration whose driver is gone; `brought` hears of a copy that this has brought to life:
/// its name, its root process, and where it came from. Blocks.
pub(super) fn finish(
    state: &Path,
    peer: Fingerprint,
    id: MigrationId,
    verdict: Verdict,
    brought: impl FnOnce(String, u32, SocketAddr),
) -> Answer {
    match try_finish(state, peer, id, verdict, brought) {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!("migration {id}: {error}");
            Answer::Busy
        }
    }
}

fn try_finish(
    state: &Path,
    peer: Fingerprint,
    id: MigrationId,
    verdict: Verdict,
    brought: impl FnOnce(String, u32, SocketAddr),
) -> Result<Answer, FinishError> {
    let Some(journal) = Journal::<DestinationState>::open(state, id)? else {
        return Ok(Answer::Unknown);
    };
    let before = journal.read()?;
    if before.about.peer != peer.to_string() {
        return Ok(Answer::Unknown);
    }
    let Some(lease) = journal.lease()? else {
        return Ok(Answer::Busy);
    };
    let outcome = finish_destination(&journal, &lease, verdict)?;
    Ok(match outcome {
        DestinationOutcome::Held { .. } => Answer::Holds,
        DestinationOutcome::Running { pid, .. } => {
            if !before.state().is_ours() {
                brought(before.about.name, pid, before.about.address);
            }
            Answer::Runs { pid }
        }
        DestinationOutcome::Removed { .. } => {
            // A source that has not committed needs no answer twice: "unknown" says the same to it.
            if verdict == Verdict::Abort || before.state() == DestinationState::Receiving {
                journal.remove()?;
            }
            Answer::Removed
        }
    })
}
