use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::identity::Fingerprint;
use crate::session::PageCounts;
use crate::wire::{Layout, MigrationId};

/// A set that was received.
#[derive(Clone, Debug)]
pub struct Received {
    /// Its name.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Generation of the name, from 1.
    pub generation: u64,
    /// How it is laid out.
    pub layout: Layout,
    /// What it builds on.
    pub base: Option<String>,
    /// Whether CRIU could restore it, in a word.
    pub completeness: String,
    /// Nothing had changed; nothing was written.
    pub unchanged: bool,
    /// Size of the source's files in bytes.
    pub image_bytes: u64,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// What happens during a transfer, as it happens.
#[derive(Clone, Debug)]
pub enum Event {
    /// A source connected.
    Connected {
        /// From where.
        address: SocketAddr,
        /// Its key.
        peer: Fingerprint,
    },
    /// A set begins.
    SetBegun {
        /// Its name.
        name: String,
        /// Bytes of all its files.
        total_bytes: u64,
        /// It is sent only because another builds on it.
        ancestor: bool,
    },
    /// So far.
    Progress {
        /// Bytes of the set's files that are dealt with: sent, or found to be there.
        done_bytes: u64,
        /// Bytes on the wire in both directions.
        wire_bytes: u64,
        /// Pages by how they crossed (on the source only).
        pages: PageCounts,
    },
    /// All of a set has been sent; the destination stores it.
    Storing,
    /// A set is visible.
    Received(Received),
    /// A process tree has come and runs.
    Restored {
        /// Name of the migration.
        name: String,
        /// Its root process.
        pid: u32,
        /// From where.
        address: SocketAddr,
    },
    /// A complete copy of a process tree is held, and the source has not said whose the workload is:
    /// it does when it can be reached again, or an operator decides.
    Holding {
        /// Which migration.
        id: MigrationId,
        /// Its name.
        name: String,
        /// Where the source was.
        address: SocketAddr,
        /// Directory of the complete images.
        images: PathBuf,
    },
    /// A transfer ended early (on a destination, which goes on).
    Failed {
        /// From where.
        address: SocketAddr,
        /// Why.
        error: String,
    },
}

/// Where events go. Called from the transfer's tasks; must not block.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(Event) + Send + Sync>);

impl Events {
    /// Events go to `sink`.
    pub fn new(sink: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Events go nowhere.
    pub fn none() -> Self {
        Self::new(|_| {})
    }

    pub(super) fn emit(&self, event: Event) {
        (self.0)(event);
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}
