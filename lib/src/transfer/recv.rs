//! The destination's driver.

mod incoming;
mod meeting;
mod migration;
mod orphans;
mod restore;
mod serve;
mod staged;
mod storing;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use self::serve::serve;
use super::TransferError;
use super::event::{Event, Events};
use crate::hooks::Hooks;
use crate::identity::Fingerprint;
use crate::store::{ServingLock, Store};
use crate::ticket::{Secret, Ticket};
use crate::transport::{self, CloseCode, Identity, Incoming, Server, Trust};
use crate::wire::Layout;

/// Transfers at the same time; more are told to come back.
const CONNECTIONS: usize = 64;

/// Where to receive, and how.
#[derive(Debug)]
pub struct ReceiveOptions {
    /// The receiving directory; made where it does not exist.
    pub directory: PathBuf,
    /// Addresses to listen at.
    pub listen: Vec<SocketAddr>,
    /// How sets are laid out.
    pub layout: Layout,
    /// Largest set that is taken, in bytes.
    pub max_set_bytes: Option<u64>,
    /// Superseded generations of each name that are kept besides those that are built on.
    pub keep: u64,
    /// This host's key. Without one a key is made and kept in the directory.
    pub identity: Option<Identity>,
    /// Process trees may come and run here; without it only images are received.
    pub restore: Option<RestoreHost>,
    /// The keys that may send. Without any, whoever has the ticket may.
    pub peers: Vec<Fingerprint>,
    /// Settings of the connections.
    pub transport: transport::Options,
    /// Who is told what happens.
    pub events: Events,
}

/// How trees are restored on this host.
#[derive(Clone, Debug)]
pub struct RestoreHost {
    /// The program CRIU.
    pub program: PathBuf,
    /// A file of CRIU options for this host; it wins over what the source asks for.
    pub config_file: Option<PathBuf>,
    /// Commands at named moments.
    pub hooks: Hooks,
}

/// A receiving directory with an open socket.
#[derive(Debug)]
pub struct Receiver {
    server: Server,
    shared: Arc<Shared>,
    ticket: Option<Ticket>,
    addresses: Vec<SocketAddr>,
}

/// What all connections of one receiver have in common.
#[derive(Debug)]
struct Shared {
    store: Store,
    layout: Layout,
    max_set_bytes: Option<u64>,
    keep: u64,
    restore: Option<RestoreHost>,
    secret: Option<Secret>,
    pinned: bool,
    events: Events,
    received: watch::Sender<u64>,
    _lock: ServingLock,
}

impl Receiver {
    /// Opens the directory and the sockets. Must be called inside a tokio runtime.
    pub fn bind(options: ReceiveOptions) -> Result<Self, TransferError> {
        let store = Store::open(&options.directory)?;
        if options.restore.is_some() {
            orphans::adopt();
        }
        let lock = store.serve()?;
        let identity = match options.identity {
            Some(identity) => identity,
            None => Identity::load_or_create(&store.state_path("identity.pem"))?,
        };
        let fingerprint = identity.fingerprint();
        let pinned = !options.peers.is_empty();
        let trust = if pinned {
            Trust::Pinned(options.peers)
        } else {
            Trust::Anyone
        };
        let server = Server::bind(&options.listen, identity, trust, options.transport)?;
        let addresses = server
            .local_addresses()
            .map_err(|source| TransferError::Read {
                path: "/proc/net".into(),
                source,
            })?;
        let secret = if pinned {
            None
        } else {
            Some(Secret::generate())
        };
        let ticket = secret
            .as_ref()
            .map(|secret| Ticket::new(addresses.clone(), fingerprint, secret.clone()));
        let shared = Shared {
            store,
            layout: options.layout,
            max_set_bytes: options.max_set_bytes,
            keep: options.keep,
            restore: options.restore,
            secret,
            pinned,
            events: options.events,
            received: watch::Sender::new(0),
            _lock: lock,
        };
        Ok(Self {
            server,
            shared: Arc::new(shared),
            ticket: ticket.transpose()?,
            addresses,
        })
    }

    /// What a source needs to know; `None` between pinned peers.
    pub fn ticket(&self) -> Option<&Ticket> {
        self.ticket.as_ref()
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// This host's key.
    pub fn fingerprint(&self) -> Fingerprint {
        self.server.fingerprint()
    }

    /// Serves senders, until the future is dropped or (with `once`) one named set is received.
    pub async fn run(&self, once: bool) {
        let mut received = self.shared.received.subscribe();
        let done = async {
            if once {
                // The sender is in `shared`, which lives as long as this does.
                let _ = received.wait_for(|&count| count > 0).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = self.accept_all() => {}
            () = done => {}
        }
    }

    /// Tells senders that are connected, and closes the sockets.
    pub async fn close(&self) {
        self.server
            .close(CloseCode::ShuttingDown, "the receiver was stopped")
            .await;
    }

    async fn accept_all(&self) {
        let places = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS));
        while let Some(incoming) = self.server.accept().await {
            let Ok(place) = places.clone().try_acquire_owned() else {
                tokio::spawn(turn_away(incoming));
                continue;
            };
            let shared = self.shared.clone();
            let address = incoming.remote_address();
            tokio::spawn(async move {
                let failed = match incoming.complete().await {
                    Ok(connection) => serve(connection, &shared)
                        .await
                        .err()
                        .map(|error| error.to_string()),
                    Err(error) => Some(error.to_string()),
                };
                if let Some(error) = failed {
                    shared.events.emit(Event::Failed { address, error });
                }
                drop(place);
            });
        }
    }
}

// In words, so that the source knows that trying again helps.
async fn turn_away(incoming: Incoming) {
    if let Ok(connection) = incoming.complete().await {
        let reason = "too many transfers at once; try again later";
        connection.close_and_tell(CloseCode::Busy, reason).await;
    }
}
