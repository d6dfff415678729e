//! Being told to stop.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::Failed;

/// SIGINT and SIGTERM, caught from the moment this is made.
#[derive(Debug)]
pub(crate) struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    pub(crate) fn catch() -> Result<Self, Failed> {
        let catch =
            |kind| signal(kind).map_err(Failed::file("catch signals of", "this process".as_ref()));
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
        })
    }

    /// Returns when one of them arrives.
    pub(crate) async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
