//! The side that connects: the source.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::server::endpoint;
use super::tls::{self, Refused};
use super::{Connection, Fingerprint, HANDSHAKE_TIMEOUT, Identity, Options, TransportError, Trust};

/// Head start of each address before the next one is tried as well.
const STAGGER: Duration = Duration::from_millis(200);

/// Sent as TLS server name, which somebody must fill; nobody looks at it.
const SERVER_NAME: &str = "crxfer";

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No address given.
    #[error("no address to connect to")]
    NoAddress,
    /// TLS does not take the host's key.
    #[error("the host's key cannot be used for TLS")]
    Key(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Every address failed: all of them, in the order they were given.
    #[error("{}", Attempts(.0))]
    Failed(Vec<Attempt>),
}

/// What came of one address.
#[derive(Debug)]
pub struct Attempt {
    /// The address.
    pub address: SocketAddr,
    /// What went wrong there.
    pub error: AttemptError,
}

/// Why there is no connection with one address.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The host is up and says that no program has this port.
    #[error("nothing listens there")]
    Refused,
    /// No answer at all.
    #[error("no answer within {} s (host down, wrong address, or a firewall that drops UDP)", .0.as_secs())]
    Timeout(Duration),
    /// Somebody else answers: another host, or the one we want with a new key.
    #[error("that host has another key ({found}) than the ticket or --peer says")]
    WrongKey {
        /// The key that it has.
        found: Fingerprint,
    },
    /// A crxfer of another protocol version, or another program.
    #[error("that host speaks another version of crxfer: use the same on both")]
    Incompatible,
    /// No socket for this address, or no route.
    #[error("cannot send there: {0}")]
    Socket(io::Error),
    /// The handshake was broken off.
    #[error(transparent)]
    Handshake(TransportError),
}

impl ConnectError {
    /// Whether trying again may succeed with nothing changed.
    pub fn is_retryable(&self) -> bool {
        let Self::Failed(attempts) = self else {
            return false;
        };
        attempts.iter().any(|attempt| match &attempt.error {
            AttemptError::Refused | AttemptError::Timeout(_) => true,
            AttemptError::Handshake(error) => error.is_retryable(),
            _ => false,
        })
    }

    /// The key of a host that answered in place of the expected one, if that happened.
    pub fn wrong_key(&self) -> Option<(SocketAddr, Fingerprint)> {
        let Self::Failed(attempts) = self else {
            return None;
        };
        attempts.iter().find_map(|attempt| match attempt.error {
            AttemptError::WrongKey { found } => Some((attempt.address, found)),
            _ => None,
        })
    }
}

struct Attempts<'a>(&'a [Attempt]);

impl fmt::Display for Attempts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot connect")?;
        for (place, Attempt { address, error }) in self.0.iter().enumerate() {
            write!(
                f,
                "{} to {address}: {error}",
                if place == 0 { "" } else { ";" }
            )?;
        }
        Ok(())
    }
}

/// Connects to the host that has one of the `expected` keys, at whichever of `addresses` it answers
/// first: they are tried in order, each 200 ms after the one before or at once when that one fails.
/// Gives up after [`HANDSHAKE_TIMEOUT`]. Must be called inside a tokio runtime.
///
/// That the *server* does not accept this host's key shows only at the first use of the connection,
/// as [`TransportError::KeyRefused`].
pub async fn connect(
    addresses: &[SocketAddr],
    identity: &Identity,
    expected: &[Fingerprint],
    options: &Options,
) -> Result<Connection, ConnectError> {
    if addresses.is_empty() {
        return Err(ConnectError::NoAddress);
    }
    let trust = Trust::Pinned(expected.to_vec());
    let mut race = Race {
        running: JoinSet::new(),
        failed: Vec::new(),
    };
    for (place, address) in addresses.iter().enumerate() {
        let refused = Refused::default();
        let crypto = tls::client_config(identity, trust.clone(), &refused)
            .map_err(|error| ConnectError::Key(error.into()))?;
        race.start(place, *address, crypto, refused, options);
        if let Some(connection) = race.wait(place + 1 < addresses.len()).await {
            return Ok(connection);
        }
    }
    race.failed.sort_by_key(|(place, _)| *place);
    Err(ConnectError::Failed(
        race.failed
            .into_iter()
            .map(|(_, attempt)| attempt)
            .collect(),
    ))
}

type Outcome = (usize, SocketAddr, Result<Connection, AttemptError>);

/// Attempts under way. Dropping it ends them.
struct Race {
    running: JoinSet<Outcome>,
    failed: Vec<(usize, Attempt)>,
}

impl Race {
    fn start(
        &mut self,
        place: usize,
        address: SocketAddr,
        crypto: QuicClientConfig,
        refused: Refused,
        options: &Options,
    ) {
        let options = options.clone();
        self.running.spawn(async move {
            (
                place,
                address,
                attempt(address, crypto, &refused, &options).await,
            )
        });
    }

    /// Waits for a success; with `more` addresses to come only for a while, or for a failure.
    async fn wait(&mut self, more: bool) -> Option<Connection> {
        let pause = sleep(STAGGER);
        tokio::pin!(pause);
        loop {
            let joined = tokio::select! {
                joined = self.running.join_next() => joined?,
                () = &mut pause, if more => return None,
            };
            // An attempt that panicked has no outcome; the others go on.
            let Ok((place, address, outcome)) = joined else {
                continue;
            };
            match outcome {
                Ok(connection) => return Some(connection),
                Err(error) => self.failed.push((place, Attempt { address, error })),
            }
            if more {
                return None;
            }
        }
    }
}

/// One address. UDP alone cannot tell a closed port from a slow host: quinn's socket is shared
/// between peers and is not told. A second, connected one is, so that "nothing listens there" takes
/// a round trip and not ten seconds.
async fn attempt(
    address: SocketAddr,
    crypto: QuicClientConfig,
    refused: &Refused,
    options: &Options,
) -> Result<Connection, AttemptError> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let local = SocketAddr::new(any, 0);
    let endpoint = endpoint(local, options, None).map_err(AttemptError::Socket)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(options.transport_config(address));
    let connected = tokio::select! {
        result = timeout(HANDSHAKE_TIMEOUT, handshake(&endpoint, config, address)) => {
            result.unwrap_or(Err(AttemptError::Timeout(HANDSHAKE_TIMEOUT)))
        }
        error = port_closed(local, address) => Err(error),
    };
    let inner = connected.map_err(|error| match refused.peer() {
        Some(found) => AttemptError::WrongKey { found },
        None => error,
    })?;
    Connection::new(inner, Some(endpoint)).map_err(AttemptError::Handshake)
}

async fn handshake(
    endpoint: &Endpoint,
    config: ClientConfig,
    address: SocketAddr,
) -> Result<quinn::Connection, AttemptError> {
    let connecting = endpoint
        .connect_with(config, address, SERVER_NAME)
        .map_err(|error| AttemptError::Socket(io::Error::other(error)))?;
    connecting.await.map_err(|error| match error {
        ConnectionError::TimedOut => AttemptError::Timeout(HANDSHAKE_TIMEOUT),
        error => match TransportError::from(error) {
            TransportError::Incompatible => AttemptError::Incompatible,
            error => AttemptError::Handshake(error),
        },
    })
}

/// Returns when the system knows that nobody can be reached at `address`, else never.
async fn port_closed(local: SocketAddr, address: SocketAddr) -> AttemptError {
    let ask = async {
        let socket = UdpSocket::bind(local).await?;
        socket.connect(address).await?;
        // No QUIC packet: whoever listens drops it.
        socket.send(&[0]).await?;
        socket.recv(&mut [0; 1]).await
    };
    match ask.await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => AttemptError::Refused,
        Err(error) => AttemptError::Socket(error),
        // Something answered a byte that means nothing. The handshake will tell.
        Ok(_) => std::future::pending().await,
    }
}
