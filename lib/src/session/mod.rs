//! One transfer session, without I/O: both sides as state machines over events and `now`.
//!
//! A driver feeds what happened through `handle_*`, drains `poll_command` until it is empty, then
//! waits for the next event or for `poll_timeout`, whichever comes first. `now` never goes
//! backwards. An error from any `handle_*` ends the session: the driver sends
//! [`SessionError::to_failure`] to the peer where there is one left, and closes.
//!
//! ```text
//!  source                                            destination
//!    Hello ------------------------------------------> checks version and ticket
//!      <---------------------------------------------- Welcome
//!    QueryHeld (roots of ancestors) -----------------> which sets are there already?
//!      <---------------------------------------------- Held
//!    for each set, oldest missing ancestor first:
//!    BeginSet, Files --------------------------------> opens a staging place
//!      <---------------------------------------------- SetReady
//!    segment by segment, many in flight:
//!      SegmentDigest / SegmentState, BlockIds / Lacking (or nothing, if all is lacking)
//!      frames of blocks on other streams ------------> hashes, writes
//!    FileDigests, EndSet ----------------------------> checks the whole, stores, publishes
//!      <---------------------------------------------- Published
//! ```

mod destination;
mod error;
pub mod migration;
pub mod pages;
mod source;
#[cfg(test)]
mod tests;

pub use destination::{Destination, DestinationCommand, DestinationConfig, StoreJob};
pub use error::SessionError;
pub use source::{PageCounts, SetLeaves, SetPlan, Source, SourceCommand, SourceConfig};

use std::time::{Duration, Instant};

/// A peer that says nothing for this long is taken for gone. A healthy one says [`Working`] every
/// [`KEEP_TALKING`], so this is many lost messages; QUIC's own idle timeout ends dead links sooner.
///
/// [`Working`]: crate::wire::Message::Working
pub const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// A side that has said nothing for this long says [`Working`](crate::wire::Message::Working).
pub const KEEP_TALKING: Duration = Duration::from_secs(10);

/// When either side last spoke.
#[derive(Debug)]
struct Liveness {
    heard: Instant,
    said: Instant,
}

impl Liveness {
    fn new(now: Instant) -> Self {
        Self {
            heard: now,
            said: now,
        }
    }

    fn next(&self) -> Instant {
        (self.heard + SILENCE_LIMIT).min(self.said + KEEP_TALKING)
    }

    /// Whether it is time to say [`Working`](crate::wire::Message::Working).
    fn check(&mut self, now: Instant) -> Result<bool, SessionError> {
        if now >= self.heard + SILENCE_LIMIT {
            return Err(SessionError::Silent(SILENCE_LIMIT.as_secs()));
        }
        let due = now >= self.said + KEEP_TALKING;
        if due {
            self.said = now;
        }
        Ok(due)
    }
}
