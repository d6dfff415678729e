//! The side that waits for connections: the destination.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use quinn::{ConnectionError, Endpoint, ServerConfig, TokioRuntime};
use tokio::time::timeout;

use super::error::is_alpn_mismatch;
use super::reset;
use super::tls::{self, Refused};
use super::{
    CloseCode, Connection, Fingerprint, HANDSHAKE_TIMEOUT, Identity, Options, TransportError,
    Trust, addresses, socket,
};
use crate::ticket::MAX_ADDRESSES;

/// How long [`Server::close`] waits for the last packets to leave.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// Sockets at which sources connect.
#[derive(Debug)]
pub struct Server {
    endpoints: Vec<Endpoint>,
    shared: Arc<Shared>,
}

/// What every handshake needs.
#[derive(Debug)]
struct Shared {
    identity: Identity,
    trust: Trust,
    options: Options,
    /// Settings that all handshakes have in common, such as the key for address tokens.
    base: ServerConfig,
}

/// Why a server cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// No address given.
    #[error("no address to listen at")]
    NoAddress,
    /// The address is taken, or not this host's.
    #[error("cannot listen at {address}")]
    Socket {
        /// The address that was asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// TLS does not take the host's key.
    #[error("the host's key cannot be used for TLS")]
    Key(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why a peer's handshake came to nothing. The server goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcceptError {
    /// Its key is not among the pinned ones.
    #[error("refused {address}: its key {peer} is not among the accepted ones")]
    UnknownKey {
        /// Where it connected from.
        address: SocketAddr,
        /// The key that it showed.
        peer: Fingerprint,
    },
    /// It does not speak this version of crxfer.
    #[error("refused {address}: it speaks another version of crxfer")]
    Incompatible {
        /// Where it connected from.
        address: SocketAddr,
    },
    /// The handshake took too long or was broken off.
    #[error("the handshake with {address} failed")]
    Handshake {
        /// Where it connected from.
        address: SocketAddr,
        /// How.
        source: TransportError,
    },
}

impl Server {
    /// Listens at every address of `listen`; port 0 takes a free one, `[::]` takes IPv4 as well.
    /// Must be called inside a tokio runtime.
    pub fn bind(
        listen: &[SocketAddr],
        identity: Identity,
        trust: Trust,
        options: Options,
    ) -> Result<Self, BindError> {
        if listen.is_empty() {
            return Err(BindError::NoAddress);
        }
        let crypto = tls::server_config(&identity, trust.clone(), &Refused::default())
            .map_err(|error| BindError::Key(error.into()))?;
        let mut base = ServerConfig::with_crypto(Arc::new(crypto));
        // A connection stays with the host that it was made with.
        base.migration(false);
        let endpoints = listen
            .iter()
            .map(|address| {
                endpoint(*address, &options, Some((base.clone(), &identity))).map_err(|source| {
                    BindError::Socket {
                        address: *address,
                        source,
                    }
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            endpoints,
            shared: Arc::new(Shared {
                identity,
                trust,
                options,
                base,
            }),
        })
    }

    /// The addresses for a ticket, best first, at most as many as a ticket takes. For sockets bound
    /// to all interfaces those of the host, without link-local ones, loopback last.
    pub fn local_addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let mut all = Vec::new();
        for endpoint in &self.endpoints {
            for address in addresses::reachable(endpoint.local_addr()?)? {
                if !all.contains(&address) {
                    all.push(address);
                }
            }
        }
        all.truncate(MAX_ADDRESSES);
        Ok(all)
    }

    /// The addresses that its sockets are bound to, with the ports that were free.
    pub fn bound(&self) -> io::Result<Vec<SocketAddr>> {
        let bound = self.endpoints.iter().map(quinn::Endpoint::local_addr);
        bound.collect()
    }

    /// The server's own key.
    pub fn fingerprint(&self) -> Fingerprint {
        self.shared.identity.fingerprint()
    }

    /// The next peer that knocks; `None` once the server is closed. The handshake is not done yet:
    /// [`Incoming::complete`] it in a task of its own, so that a slow peer does not keep others out.
    pub async fn accept(&self) -> Option<Incoming> {
        let mut waiting: Vec<_> = self
            .endpoints
            .iter()
            .map(|endpoint| Box::pin(endpoint.accept()))
            .collect();
        let inner = std::future::poll_fn(|context| {
            let mut closed = 0;
            for accept in &mut waiting {
                match pin!(accept).poll(context) {
                    Poll::Ready(Some(incoming)) => return Poll::Ready(Some(incoming)),
                    Poll::Ready(None) => closed += 1,
                    Poll::Pending => {}
                }
            }
            // All sockets are closed together.
            if closed > 0 {
                Poll::Ready(None)
            } else {
                Poll::Pending
            }
        })
        .await?;
        Some(Incoming {
            inner,
            shared: self.shared.clone(),
        })
    }

    /// Ends all connections with `code` and waits up to a second until the peers were told.
    pub async fn close(&self, code: CloseCode, reason: &str) {
        for endpoint in &self.endpoints {
            endpoint.close(code.to_varint(), reason.as_bytes());
        }
        let told = async {
            for endpoint in &self.endpoints {
                endpoint.wait_idle().await;
            }
        };
        let _ = timeout(CLOSE_TIME, told).await;
    }
}

/// A QUIC endpoint with a socket of its own at `address`.
pub(super) fn endpoint(
    address: SocketAddr,
    options: &Options,
    server: Option<(ServerConfig, &Identity)>,
) -> io::Result<Endpoint> {
    let socket = socket::bind(address, options.socket_buffer)?;
    let mut endpoint = options.endpoint_config();
    let config = server.map(|(config, identity)| {
        reset::outlive(&mut endpoint, identity);
        config
    });
    Endpoint::new(endpoint, config, socket, Arc::new(TokioRuntime))
}

/// A peer that has sent its first packet.
#[derive(Debug)]
pub struct Incoming {
    inner: quinn::Incoming,
    shared: Arc<Shared>,
}

impl Incoming {
    /// Where the packet says that it comes from.
    pub fn remote_address(&self) -> SocketAddr {
        socket::canonical(self.inner.remote_address())
    }

    /// Does the handshake, for at most [`HANDSHAKE_TIMEOUT`].
    pub async fn complete(self) -> Result<Connection, AcceptError> {
        let address = self.remote_address();
        let refused = Refused::default();
        let failed = |error| accept_error(address, &refused, error);
        // Settings for this peer alone: its verifier reports to us, its packets fit its route.
        let crypto = tls::server_config(&self.shared.identity, self.shared.trust.clone(), &refused)
            .expect("Server::bind has made the same");
        let mut config = self.shared.base.clone();
        config.crypto = Arc::new(crypto);
        config.transport = self.shared.options.transport_config(address);
        let connecting = self.inner.accept_with(Arc::new(config)).map_err(failed)?;
        let inner = timeout(HANDSHAKE_TIMEOUT, connecting)
            .await
            .unwrap_or(Err(ConnectionError::TimedOut))
            .map_err(failed)?;
        Connection::new(inner, None).map_err(|source| AcceptError::Handshake { address, source })
    }

    /// Turns the peer away: it may try again.
    pub fn refuse(self) {
        self.inner.refuse();
    }
}

fn accept_error(address: SocketAddr, refused: &Refused, error: ConnectionError) -> AcceptError {
    if let Some(peer) = refused.peer() {
        return AcceptError::UnknownKey { address, peer };
    }
    match error {
        ConnectionError::TransportError(error) if is_alpn_mismatch(error.code) => {
            AcceptError::Incompatible { address }
        }
        error => AcceptError::Handshake {
            address,
            source: error.into(),
        },
    }
}
