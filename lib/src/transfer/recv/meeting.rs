//! A source that has lost its destination within a migration is back.

use std::sync::Arc;

use super::Shared;
use crate::transfer::TransferError;
use crate::transport::{Connection, ControlSender};
use crate::wire::{Answer, Message, MigrationId, Step, Verdict};

/// Does what the verdict says, and answers.
pub(super) async fn serve(
    _connection: &Connection,
    _shared: &Arc<Shared>,
    control: &mut ControlSender,
    _id: MigrationId,
    _verdict: Verdict,
) -> Result<(), TransferError> {
    let answer = Message::Migration(Step::Met(Answer::Unknown));
    control.write_message(&answer.encode()).await?;
    Ok(())
}
