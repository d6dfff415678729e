//! The destination's driver.

mod incoming;
mod meeting;
mod memories;
mod migration;
mod offers;
pub(super) mod orphans;
mod pages;
mod record;
pub(super) mod restore;
mod serve;
mod staged;
pub(super) mod stand_in;
mod storing;
mod unfinished;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::spawn_blocking;

use self::meeting::Meetings;
use self::memories::{Guarding, Memories};
pub(super) use self::migration::check_images;
use self::offers::Offers;
use self::serve::serve;
use super::TransferError;
use super::event::{Event, Events};
use super::guard::{Guard, GuardProgram, GuardSide};
use crate::hooks::Hooks;
use crate::identity::Fingerprint;
use crate::preflight;
use crate::runtime::RestoreCommand;
use crate::sink::{Memory, SinkKind, Tmpfs};
use crate::store::{ServingLock, Store, StoreError, Tried as _};
use crate::ticket::{Secret, Ticket};
use crate::transport::{self, BindError, CloseCode, Identity, Incoming, Server, Trust};
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
    /// Where journals of migrations are kept. Without it: `.crxfer/state` in the directory, which
    /// survives what the images survive.
    pub state: Option<PathBuf>,
    /// Started where trees may come: it ends what this process leaves unfinished when it dies.
    pub guard: Option<GuardProgram>,
    /// The keys that may send. Without any, whoever has the ticket may.
    pub peers: Vec<Fingerprint>,
    /// Settings of the connections.
    pub transport: transport::Options,
    /// Who is told what happens.
    pub events: Events,
    /// Where sets and the images of migrations are kept. A migration may ask for memory by itself.
    pub sink: SinkKind,
    /// Bytes that a sink in memory may take. Without it: for sets half of the memory that is
    /// available, for a migration what its memory needs.
    pub sink_bytes: Option<u64>,
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
    /// Commands that restore in the place of CRIU, each for one runtime that offers may name.
    pub runtimes: Vec<RestoreCommand>,
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
    state: PathBuf,
    meetings: Meetings,
    memories: Memories,
    offers: Offers,
    secret: Option<Secret>,
    pinned: bool,
    events: Events,
    received: watch::Sender<u64>,
    _lock: ServingLock,
}

impl Receiver {
    /// Opens the directory and the sockets. Must be called inside a tokio runtime.
    pub fn bind(options: ReceiveOptions) -> Result<Self, TransferError> {
        let store = open_store(&options)?;
        if options.restore.is_some() {
            orphans::adopt();
            // Also those of copies that are not wanted: CRIU kills them, and they are ours then.
            orphans::reap();
        }
        let lock = store.serve()?;
        let identity = match options.identity.clone() {
            Some(identity) => identity,
            None => Identity::load_or_create(&store.home_path("identity.pem"))?,
        };
        let fingerprint = identity.fingerprint();
        let state = options.state.clone();
        let state = state.unwrap_or_else(|| store.home_path("state"));
        let pinned = !options.peers.is_empty();
        let trust = if pinned {
            Trust::Pinned(options.peers.clone())
        } else {
            Trust::Anyone
        };
        let server = bind_server(&options, &state, &identity, trust)?;
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
        let waiting = unfinished::tidy(&store, &state)?;
        let program = options.guard.filter(|_| options.restore.is_some());
        let guard = program.as_ref().map(|program| start_guard(program, &state));
        let guard = guard.transpose()?;
        if guard.is_some() {
            let left = stand_in::leave_word(&state, &server, &identity, &options.peers);
            left.tried("leave word in", &state)?;
        }
        let memories = Memories {
            kind: options.sink,
            limit: options.sink_bytes,
            guarding: Guarding {
                program,
                state: state.clone(),
                guard: Mutex::new(guard),
            },
            held: Mutex::default(),
        };
        let shared = Shared {
            store,
            layout: options.layout,
            max_set_bytes: options.max_set_bytes,
            keep: options.keep,
            restore: options.restore,
            state,
            meetings: Meetings::default(),
            memories,
            offers: Offers::default(),
            secret,
            pinned,
            events: options.events,
            received: watch::Sender::new(0),
            _lock: lock,
        };
        let shared = Arc::new(shared);
        unfinished::go_on(&shared, waiting);
        Ok(Self {
            server,
            shared,
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
        if !unfinished::is_anything(&self.shared) {
            let guard = self.shared.memories.guarding.guard().take();
            let dismissing = spawn_blocking(|| guard.map(Guard::dismiss));
            let _ = dismissing.await;
            stand_in::forget(&self.shared.state, std::process::id());
        }
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

impl Drop for Receiver {
    fn drop(&mut self) {
        // Connections that are still served may keep the rest of it alive.
        drop(self.shared.memories.guarding.guard().take());
    }
}

fn open_store(options: &ReceiveOptions) -> Result<Store, TransferError> {
    let directory = &options.directory;
    Ok(match options.sink {
        SinkKind::Disk => Store::open(directory)?,
        SinkKind::Tmpfs => {
            Tmpfs::open(directory).map_err(StoreError::from)?;
            Store::open(directory)?
        }
        SinkKind::Memory => {
            let bytes = options.sink_bytes;
            let bytes = bytes.unwrap_or_else(|| preflight::memory_available() / 2);
            let memory = Memory::create(bytes).map_err(StoreError::from)?;
            Store::open_over(directory, Arc::new(memory))?
        }
    })
}

// The guard of a receiver that has died may be in this one's place.
#[expect(clippy::disallowed_methods, reason = "a driver reads the clock")]
fn bind_server(
    options: &ReceiveOptions,
    state: &Path,
    identity: &Identity,
    trust: Trust,
) -> Result<Server, TransferError> {
    let until = stand_in::take_away(state).then(|| Instant::now() + stand_in::TAKE_OVER);
    loop {
        let (identity, transport) = (identity.clone(), options.transport.clone());
        match Server::bind(&options.listen, identity, trust.clone(), transport) {
            Err(BindError::Socket { source, .. })
                if source.kind() == std::io::ErrorKind::AddrInUse
                    && until.is_some_and(|until| Instant::now() < until) =>
            {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => {
                if until.is_some() {
                    stand_in::give_back(state);
                }
                return Err(error.into());
            }
            Ok(server) => return Ok(server),
        }
    }
}

fn start_guard(guard: &GuardProgram, state: &Path) -> Result<Guard, TransferError> {
    let failed = |source| TransferError::Read {
        path: guard.program.clone(),
        source,
    };
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(state)
        .map_err(failed)?;
    let log = state.join("guard.log");
    Guard::start(guard, GuardSide::Destination, state, &log).map_err(failed)
}

// In words, so that the source knows that trying again helps.
async fn turn_away(incoming: Incoming) {
    if let Ok(connection) = incoming.complete().await {
        let reason = "too many transfers at once; try again later";
        connection.close_and_tell(CloseCode::Busy, reason).await;
    }
}
